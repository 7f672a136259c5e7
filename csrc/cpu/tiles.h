// The inner loops of moe_forward, once for every instruction set.
//
// Tokens lie along the vector lanes and weights are broadcast, so weights are read where they are and never repacked.
// A panel holds up to 48 tokens of one expert, its width rounded up to 16, as [ceil(columns / 2), width, 2]: pairs
// along the summed dimension, as vdpbf16ps wants them. Lanes at and beyond `count` hold anything finite. An odd last
// column is paired with zero.
#pragma once

#include <cstdint>

namespace cprune {

constexpr int64_t kPanel = 48;     // tokens in a panel: 3 vectors, times 8 rows of weights = 24 accumulators
constexpr int64_t kRowBlock = 64;  // rows of down that one task owns, and of which one partial norm is kept
constexpr int64_t kGateStep = 4;   // gate_up starts at multiples of it

struct Reduction {
  int64_t count;          // tokens in the panel
  const int64_t* tokens;  // [count]
  const float* gates;     // [count]
  const bool* valid;      // [count]
  float* out;             // [T, rows], row t at out + t * out_stride
  int64_t out_stride;
  float* squares;  // [width]: written, the sum of y^2 over the rows
  float* sums;     // [rows]: added to
  float* high;     // [1]: updated
  float* low;      // [1]: updated
};

struct Tiles {
  const char* name;

  // panel <- x[tokens[0..count)], bf16 rows of `columns`.
  void (*pack)(const uint16_t* x, int64_t x_stride, const int64_t* tokens, int64_t count, int64_t width,
               int64_t columns, uint16_t* panel);

  // Rows [first, last) of silu(gate x) * (up x) as bf16 into the panel `act`; `weight` is one expert's [2 I, H].
  void (*gate_up)(const uint16_t* weight, int64_t row_stride, int64_t hidden, int64_t intermediate, int64_t first,
                  int64_t last, const uint16_t* panel, int64_t width, uint16_t* act);

  // y [rows, kPanel] float32 <- weight [rows, columns] times panel.
  void (*down)(const uint16_t* weight, int64_t row_stride, int64_t rows, int64_t columns, const uint16_t* panel,
               int64_t width, float* y);

  // The combine and the statistics of y [rows, kPanel].
  void (*reduce)(const float* y, int64_t rows, int64_t width, const Reduction& r);
};

extern const Tiles kPortableTiles;
#ifdef CPRUNE_AVX512_BF16
extern const Tiles kAvx512Bf16Tiles;
#endif

}  // namespace cprune
