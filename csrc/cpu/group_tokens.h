// Counting sort of (token, slot) pairs by expert: stable, so each expert's tokens ascend.
#pragma once

#include <cstdint>

namespace cprune {

// index [pairs]; a pair whose expert is outside [0, experts) is routed nowhere. order [pairs] holds the pairs by
// expert, -1 after the routed ones; offsets [experts + 1] says where each expert's begin; position [pairs] is where a
// pair stands in order, -1 if nowhere.
template <class Index>
void group_tokens(const Index* index, int64_t pairs, int64_t experts, int32_t* order, int32_t* offsets,
                  int32_t* position) {
  const auto routed = [&](int64_t pair) { return index[pair] >= 0 && index[pair] < experts; };
  for (int64_t expert = 0; expert <= experts; ++expert) offsets[expert] = 0;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    if (routed(pair)) ++offsets[index[pair]];
  }
  int32_t total = 0;
  for (int64_t expert = 0; expert <= experts; ++expert) {
    const int32_t count = offsets[expert];
    offsets[expert] = total;
    total += count;
  }
  for (int64_t pair = 0; pair < pairs; ++pair) {  // offsets now move to the end of each expert ...
    position[pair] = routed(pair) ? offsets[index[pair]]++ : -1;
    if (position[pair] >= 0) order[position[pair]] = static_cast<int32_t>(pair);
  }
  for (int64_t expert = experts; expert > 0; --expert)
    offsets[expert] = offsets[expert - 1];  // ... which begins the next
  offsets[0] = 0;
  for (int64_t pair = total; pair < pairs; ++pair) order[pair] = -1;
}

}  // namespace cprune
