// Causal self-attention on a CPU, over the tiles that multiply experts: keys and values take the place of weights.
//
//     out_t = sum_{s <= t} softmax_s(scale q_t . k_s) v_s
// Scores, their exponentials and sums are of float32; the exponentials are rounded to the type of the values before
// they weigh them, and out is rounded once.
#pragma once

#include <cstdint>

#include "memory.h"
#include "tiles.h"

namespace cprune {

// [B, heads, S, columns]; columns are contiguous, strides are in elements.
struct HeadRows {
  const void* data;
  int64_t batch_stride, head_stride, row_stride;
};

struct AttentionInput {
  Type type;
  int64_t batch, heads, shared_heads;  // of q; of k and v, each for heads / shared_heads of q
  int64_t tokens, depth, width;        // S; columns of q and k; columns of v
  HeadRows q, k, v;
  float scale;  // above 0
};

// Whether the tiles for these instructions and this type can weigh values.
bool has_attention(Isa isa, Type type);

// out [B, S, heads, width] in the type of the input. It does not depend on the number of threads, bit for bit.
void causal_attention(const AttentionInput& in, void* out, Isa isa, const Threads& threads);

}  // namespace cprune
