// The routed experts of a Mixture-of-Experts layer on a CPU, with or without the statistics of what every expert gave.
//
// For a token t and its slot k with expert e = index[t, k]:
//     y = down_e act(gate_e x_t + b, up_e x_t + c) + d,   out_t = sum_k gates[t, k] y
// Sums are of float32; the activations are rounded to the type of the weights; y stays float32, and out is rounded
// once.
#pragma once

#include <cstdint>

#include "memory.h"
#include "tiles.h"

namespace cprune {

// [E, rows, columns] of the layer's type; columns are contiguous, strides are in elements, no alignment is asked for.
struct Weights {
  const void* data;
  int64_t expert_stride;
  int64_t row_stride;
};

struct Biases {      // [E, rows], rows contiguous
  const void* data;  // or null
  int64_t expert_stride;
};

struct MoeInput {
  Type type;
  int64_t tokens, top_k, experts, hidden, inner;
  const void* x;         // [T, H]
  int64_t x_stride;      // elements from row to row
  const int64_t* index;  // [T, K]; a slot whose expert is outside [0, E) contributes nothing
  const float* gates;    // [T, K]
  Weights gate_up;       // [E, 2 I, H]: the gate's rows, then those of up
  Weights down;          // [E, H, I]
  Biases gate_up_bias;   // [E, 2 I]
  Biases down_bias;      // [E, H]
  Activation activation;
};

struct MoeStatistics {
  const bool* valid;  // [T]: the tokens that count in high, low and sums
  float* norms;       // [T, K] |y|, 0 where the slot has no expert
  float* high;        // [E] the greatest component of y, -infinity where the expert has no token
  float* low;         // [E] the smallest, infinity where it has none
  float* sums;        // [E, H] the sum of y over tokens
};

// out [T, H] in the type of the input; with statistics (not null) in float32. All outputs are written whole. The result
// does not depend on the number of threads, bit for bit.
void moe_forward(const MoeInput& in, void* out, const MoeStatistics* statistics, Isa isa, const Threads& threads);

}  // namespace cprune
