// The routed experts of a Mixture-of-Experts layer on a CPU, with the statistics of what every expert gave.
//
// For a token t and its slot k with expert e = index[t, k]:
//     y = down_e (silu(gate_e x_t) * (up_e x_t)),   out_t = sum_k gates[t, k] y
// Products are of bf16 numbers, summed in float32; silu(.) * (.) is rounded to bf16; y and out stay float32.
#pragma once

#include <cstdint>
#include <functional>

namespace cprune {

// bf16 [E, rows, columns]; columns are contiguous, strides are in elements, no alignment is asked for.
struct Weights {
  const uint16_t* data;
  int64_t expert_stride;
  int64_t row_stride;
};

struct MoeInput {
  int64_t tokens, top_k, experts, hidden, intermediate;
  const uint16_t* x;     // bf16 [T, H]
  int64_t x_stride;      // elements from row to row
  const int64_t* index;  // [T, K]; a slot whose expert is outside [0, E) contributes nothing
  const float* gates;    // [T, K]
  const bool* valid;     // [T]: the tokens that count in high, low and sums
  Weights gate_up;       // [E, 2 I, H]: the gate's rows, then those of up
  Weights down;          // [E, H, I]
};

struct MoeOutput {
  float* out;    // [T, H], zero on entry
  float* norms;  // [T, K] |y|, zero on entry
  float* high;   // [E] the greatest component of y, -infinity where the expert has no token
  float* low;    // [E] the smallest, infinity where it has none
  float* sums;   // [E, H] the sum of y over tokens, zero on entry
};

// Calls its argument once on each of some threads and returns when all are done.
using OnThreads = std::function<void(const std::function<void()>&)>;

// The result does not depend on the number of threads, bit for bit. `threads` only sizes the scratch memory: at most
// that many calls of the work given to `on_threads` may run at a time.
void moe_forward(const MoeInput& in, const MoeOutput& out, bool portable, int64_t threads, const OnThreads& on_threads);

// What moe_forward runs on when it is not told to be portable: "avx512_bf16" or "portable".
const char* backend();

}  // namespace cprune
