// The tiles for AMX with bf16 products. Chunks are those of tiles_avx512_bf16.cpp, whose pairs along the sum are what
// the tile of columns wants; rows of weights are a tile where they are. What is left of rows and columns, and all that
// is not a product, goes the way of that file.
#ifdef CPRUNE_EMULATE_AMX
#include "../tests/amx_emulated.h"
#else
#include "amx.h"
#endif

#include "tiles.h"

namespace cprune {
namespace {

constexpr int64_t kSide = 16;         // rows of a tile, and tokens
constexpr int64_t kRows = 2 * kSide;  // of weights at a time: with three tiles of tokens, six sums
constexpr int64_t kStep = 32;         // columns of a tile
static_assert(kChunk == 3 * kSide && kGateRows % kRows == 0 && kRowBlock % kRows == 0);

const Tiles& panels() { return *avx512_bf16_kernels().many; }

// y [kRows, V tiles of tokens] <- rows [kRows, columns] times a chunk of V tiles' width.
template <int V>
void tile(const uint16_t* rows, int64_t ahead, int64_t row_stride, int64_t columns, const uint16_t* tokens, float* y) {
  using namespace amx;
  const auto sums = [](auto each) {
    each(Sum<0>{}, 0, 0), each(Sum<V>{}, 1, 0);
    if constexpr (V > 1) each(Sum<1>{}, 0, 1), each(Sum<V + 1>{}, 1, 1);
    if constexpr (V > 2) each(Sum<2>{}, 0, 2), each(Sum<V + 2>{}, 1, 2);
  };
  sums([](auto sum, int, int) { sum.zero(); });
  for (int64_t c = 0; c < columns; c += kStep, tokens += V * kSide * kStep) {
    for (int64_t r = 0; r < kRows; ++r) __builtin_prefetch(rows + r * row_stride + c + ahead, 0, 2);
    const auto half = [&](int which) {
      load_rows(rows + which * kSide * row_stride + c, row_stride * 2);
      sums([&](auto sum, int row, int lane) {
        if (row != which) return;
        load_columns(tokens + lane * kSide * 2, V * kSide * 4);
        sum.multiply();
      });
    };
    half(0), half(1);
  }
  sums([&](auto sum, int row, int lane) { sum.store(y + (row * kChunk + lane) * kSide, kChunk * 4); });
}

void multiply(const void* weight, const void* next, int64_t row_stride, int64_t rows, int64_t columns,
              const void* chunk, int64_t count, float* y) {
  const int64_t whole = columns % kStep ? 0 : rows / kRows * kRows;
  const auto *first = static_cast<const uint16_t*>(weight), *then = static_cast<const uint16_t*>(next);
  const auto of = count <= kSide ? tile<1> : count <= 2 * kSide ? tile<2> : tile<3>;
  if (whole) {
    amx::configure();
    for (int64_t row = 0; row < whole; row += kRows) {
      const uint16_t* from = first + row * row_stride;
      const int64_t ahead = row + kRows < whole ? kRows * row_stride : then - from;
      of(from, ahead, row_stride, columns, static_cast<const uint16_t*>(chunk), y + row * kChunk);
    }
    amx::release();
  }
  if (whole < rows) {
    panels().multiply(first + whole * row_stride, next, row_stride, rows - whole, columns, chunk, count,
                      y + whole * kChunk);
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
    all.many = &many;
    return all;
  }();
  return kernels;
}

}  // namespace cprune
