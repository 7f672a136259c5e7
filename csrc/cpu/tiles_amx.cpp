// The tiles for AMX with bf16 products. Chunks are those of tiles_avx512_bf16.cpp, whose pairs along the sum are what
// the tile of columns wants; rows of weights are a tile where they are. What is left of rows and columns, and all that
// is not a product, goes the way of that file.
#ifdef CPRUNE_EMULATE_AMX
#include "../tests/amx_emulated.h"
#else
#include "amx.h"
#endif

#include <algorithm>
#include <cstring>

#include "tiles.h"

namespace cprune {
namespace {

constexpr int64_t kSide = 16;  // rows of a tile, and tokens
constexpr int64_t kStep = 32;  // columns of a tile
static_assert(kChunk == 3 * kSide && kGateRows % kSide == 0 && kRowBlock % kSide == 0);

const Tiles& panels() { return *avx512_bf16_kernels().many; }

// y [kHigh tiles of rows, V tiles of tokens] <- rows times a chunk of V tiles' width; `fetched` rows from `next` on are
// fetched meanwhile. With two tiles of rows and three of tokens there are six sums, and room for a tile of each factor.
template <int kHigh, int V>
void tile(const uint16_t* rows, int64_t row_stride, int64_t columns, const uint16_t* tokens, const uint16_t* next,
          int64_t fetched, float* y) {
  using namespace amx;
  const uint16_t* more = rows + kSide * row_stride;
  const int64_t row_bytes = row_stride * 2, lanes = V * kSide * 2, lane_bytes = lanes * 2;
  zero<0>(), zero<1>(), zero<2>();
  if constexpr (kHigh > 1) zero<3>();
  if constexpr (kHigh > 1 && V > 2) zero<4>(), zero<5>();
  for (int64_t c = 0; c < columns; c += kStep, tokens += kSide * lanes) {
    for (int64_t r = 0; r < fetched; ++r) __builtin_prefetch(next + r * row_stride + c, 0, 2);
    if constexpr (kHigh == 1) {
      load<7>(rows + c, row_bytes);
      load<4>(tokens, lane_bytes), multiply<0, 7, 4>();
      if constexpr (V > 1) load<5>(tokens + kSide * 2, lane_bytes), multiply<1, 7, 5>();
      if constexpr (V > 2) load<6>(tokens + kSide * 4, lane_bytes), multiply<2, 7, 6>();
    } else if constexpr (V < 3) {
      load<6>(rows + c, row_bytes), load<4>(tokens, lane_bytes), load<7>(more + c, row_bytes);
      multiply<0, 6, 4>(), multiply<1, 7, 4>();
      if constexpr (V > 1) load<5>(tokens + kSide * 2, lane_bytes), multiply<2, 6, 5>(), multiply<3, 7, 5>();
    } else {
      load<6>(rows + c, row_bytes);
      load<7>(tokens, lane_bytes), multiply<0, 6, 7>();
      load<7>(tokens + kSide * 2, lane_bytes), multiply<2, 6, 7>();
      load<7>(tokens + kSide * 4, lane_bytes), multiply<4, 6, 7>();
      load<6>(more + c, row_bytes), multiply<5, 6, 7>();
      load<7>(tokens + kSide * 2, lane_bytes), multiply<3, 6, 7>();
      load<7>(tokens, lane_bytes), multiply<1, 6, 7>();
    }
  }
  constexpr int64_t kBytes = kChunk * 4;
  float* const below = y + kSide * kChunk;
  store<0>(y, kBytes);
  if constexpr (kHigh > 1) store<1>(below, kBytes);
  if constexpr (V > 1) store<kHigh>(y + kSide, kBytes);
  if constexpr (kHigh > 1 && V > 1) store<3>(below + kSide, kBytes);
  if constexpr (V > 2) store<2 * kHigh>(y + 2 * kSide, kBytes);
  if constexpr (kHigh > 1 && V > 2) store<5>(below + 2 * kSide, kBytes);
}

// Rows of weights from `row` on, kHigh tiles at a time as long as there are so many. Returns the row after them.
template <int kHigh>
int64_t tiles(const uint16_t* weight, int64_t row, int64_t whole, const Following& next, int64_t row_stride,
              int64_t columns, const uint16_t* chunk, int64_t count, float* y) {
  constexpr int64_t kRows = kHigh * kSide;
  const auto of = count <= kSide ? tile<kHigh, 1> : count <= 2 * kSide ? tile<kHigh, 2> : tile<kHigh, 3>;
  const auto* then = static_cast<const uint16_t*>(next.weight);
  const int64_t share = next.last - next.first;
  for (; row + kRows <= whole; row += kRows) {
    const int64_t from = share * row / whole, to = share * (row + kRows) / whole;
    of(weight + row * row_stride, row_stride, columns, chunk, then + (next.first + from) * row_stride, to - from,
       y + row * kChunk);
  }
  return row;
}

void multiply(const void* weight, const Following& next, int64_t row_stride, int64_t rows, int64_t columns,
              const void* chunk, int64_t count, float* y) {
  const int64_t whole = columns % kStep ? 0 : rows / kSide * kSide;
  const auto *first = static_cast<const uint16_t*>(weight), *tokens = static_cast<const uint16_t*>(chunk);
  if (whole) {
    amx::configure();
    const bool once = next.calls == 1;  // then weights come from memory, which likes fewer rows at a time
    const int64_t row = once ? 0 : tiles<2>(first, 0, whole, next, row_stride, columns, tokens, count, y);
    tiles<1>(first, row, whole, next, row_stride, columns, tokens, count, y);
    amx::release();
  }
  if (whole < rows) {
    panels().multiply(first + whole * row_stride, next, row_stride, rows - whole, columns, chunk, count,
                      y + whole * kChunk);
  }
}

// Rows are packed first, zeros up to whole tiles: far apart in memory, they share cache lines. They are the weights
// and, some at a time, the tokens too. What is below the diagonal is left in whatever state.
void gram(const void* x, int64_t row_stride, int64_t rows, int64_t columns, void* scratch, double* gram) {
  constexpr int64_t kStride = kGramColumns + kStep, kAhead = 2;  // elements, rows
  const int64_t wide = ceil_div(columns, kStep) * kStep;
  auto* const packed = static_cast<uint16_t*>(scratch);
  uint16_t* const chunk = packed + ceil_div(rows, kSide) * kSide * kStride;
  auto* const y = reinterpret_cast<float*>(chunk + kChunk * kGramColumns);
  const auto row_of = [&](int64_t row) { return static_cast<const uint16_t*>(x) + row * row_stride; };
  int64_t row = 0;
  for (uint16_t* to = packed; to < chunk; to += kStride, ++row) {
    const int64_t copied = row < rows ? columns : 0, later = row + kAhead;
    const uint16_t* next = later < rows ? row_of(later) : row_of(later % rows) + columns;
    for (int64_t c = 0; c < copied; c += kStep) __builtin_prefetch(next + c, 0, 2);
    if (copied) std::memcpy(to, row_of(row), copied * sizeof *to);
    std::fill(to + copied, to + wide, uint16_t{0});
  }
  for (int64_t first = 0; first < rows; first += kChunk) {
    const int64_t count = std::min(kChunk, rows - first), end = first + count;
    int64_t tokens[kChunk];
    for (int64_t i = 0; i < count; ++i) tokens[i] = first + i;
    panels().pack(packed, kStride, tokens, count, wide, chunk);
    for (int64_t row = 0; row < end; row += kRowBlock) {
      const int64_t block = std::min(kRowBlock, end - row);
      multiply(packed + row * kStride, {packed, 0, 0, 2}, kStride, ceil_div(block, kSide) * kSide, wide, chunk, count,
               y);
      for (int64_t r = 0; r < block; ++r) {
        double* const to = gram + (row + r) * rows + first;
        for (int64_t i = 0; i < count; ++i) to[i] += y[r * kChunk + i];
      }
    }
  }
}

}  // namespace

const Kernels& amx_bf16_kernels() {
  static const Tiles many = [] {
    Tiles tiles = panels();
    tiles.multiply = multiply;
    return tiles;
  }();
  static const Kernels kernels = [] {
    Kernels all = avx512_bf16_kernels();
    all.few_tokens = 1;
    all.many = &many;
    all.gram = gram;
    return all;
  }();
  return kernels;
}

}  // namespace cprune
