#include "rms_norm.h"

#include <algorithm>
#include <atomic>
#include <vector>

namespace cprune {
namespace {

constexpr int64_t kNumbers = 16384;  // that a thread takes at a time, about

}  // namespace

void rms_norm(const NormInput& in, void* out, Isa isa, const Threads& threads) {
  if (!in.columns) return;
  const Kernels& kernels = cprune::kernels(isa, in.type);
  const int64_t group = ceil_div(kNumbers, in.columns), row_bytes = in.columns * size_of(in.type);
  std::vector<float> weight(in.columns);
  kernels.widen(in.weight, in.columns, weight.data());
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t first; (first = group * next++) < in.rows;) {
      kernels.norm(static_cast<const char*>(in.x) + first * row_bytes, std::min(group, in.rows - first), in.columns,
                   weight.data(), in.epsilon, static_cast<char*>(out) + first * row_bytes);
    }
  };
  if (in.rows > group) {
    threads.run(work);
  } else {
    work();  // waking the others takes longer
  }
}

}  // namespace cprune
