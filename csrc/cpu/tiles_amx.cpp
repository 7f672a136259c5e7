// The tiles for AMX with bf16 products. Chunks are those of tiles_avx512_bf16.cpp, whose pairs along the sum are what
// the tile of columns wants; rows of weights are a tile where they are. What is left of rows and columns, and all that
// is not a product, goes the way of that file.
#ifdef CPRUNE_EMULATE_AMX
#include "../tests/amx_emulated.h"
#else
#include "amx.h"
#endif

#include <algorithm>

#include "ahead.h"
#include "tiles.h"
#include "transpose.h"

namespace cprune {
namespace {

constexpr int64_t kSide = 16;  // rows of a tile, and tokens
constexpr int64_t kStep = 32;  // columns of a tile
constexpr int64_t kTile = kSide * kStep;
constexpr int64_t kPair = 2 * kSide;  // rows of the Gram at a time, and columns of it
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

// y [H tiles of rows, V of columns] += tiles times tiles, `steps` of each one after another and `stride` elements from
// one row of them to the next; meanwhile() is called at every step.
template <int H, int V, typename Meanwhile>
void square(const uint16_t* rows, const uint16_t* columns, int64_t steps, int64_t stride, float* y,
            const Meanwhile& meanwhile) {
  using namespace amx;
  constexpr int64_t kBytes = kPair * 4;
  float* const below = y + kSide * kPair;
  load<0>(y, kBytes);
  if constexpr (V > 1) load<1>(y + kSide, kBytes);
  if constexpr (H > 1) load<2>(below, kBytes);
  if constexpr (H > 1 && V > 1) load<3>(below + kSide, kBytes);
  for (int64_t s = 0; s < steps; ++s, rows += kTile, columns += kTile) {
    meanwhile();
    load<4>(rows, 64), load<6>(columns, 64), multiply<0, 4, 6>();
    if constexpr (V > 1) load<7>(columns + stride, 64), multiply<1, 4, 7>();
    if constexpr (H > 1) load<5>(rows + stride, 64), multiply<2, 5, 6>();
    if constexpr (H > 1 && V > 1) multiply<3, 5, 7>();
  }
  store<0>(y, kBytes);
  if constexpr (V > 1) store<1>(y + kSide, kBytes);
  if constexpr (H > 1) store<2>(below, kBytes);
  if constexpr (H > 1 && V > 1) store<3>(below + kSide, kBytes);
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

// The same 16 rows of kStep columns, `mask` of them, as a tile of rows and as one of columns.
void both(const uint16_t* const (&rows)[kSide], __mmask32 mask, uint16_t* of_rows, uint16_t* of_columns) {
  __m512i r[kSide];
  for (int64_t i = 0; i < kSide; ++i) {
    r[i] = _mm512_maskz_loadu_epi16(mask, rows[i]);
    _mm512_store_si512(of_rows + i * kStep, r[i]);
  }
  transpose(r);
  for (int64_t i = 0; i < kSide; ++i) _mm512_store_si512(of_columns + i * kStep, r[i]);
}

// gram [rows, rows] += the blocks that `gram` sums in float32.
void add_sums(const float* sums, int64_t rows, double* gram) {
  for (int64_t column = 0; column < rows; column += kPair) {
    const int64_t count = std::min(kPair, rows - column);
    for (int64_t row = 0; row <= column; row += kPair, sums += kPair * kPair) {
      for (int64_t r = row; r < std::min(rows, row + kPair); ++r) {
        double* const to = gram + r * rows + column;
        for (int64_t i = 0; i < count; ++i) to[i] += sums[(r - row) * kPair + i];
      }
    }
  }
}

// A few columns of all rows become tiles, and are multiplied two by two while they are in the cache. What is below the
// diagonal is left in whatever state.
void gram(const void* x, int64_t row_stride, int64_t rows, int64_t columns, void* scratch, double* gram) {
  constexpr int64_t kSums = kPair * kPair, kRun = 256;
  const int64_t groups = ceil_div(rows, kSide), pairs = ceil_div(groups, 2), blocks = pairs * (pairs + 1) / 2;
  const int64_t steps = groups <= 4 ? 1 : 4, piece = steps * kStep;  // more sums are worth longer ones
  auto* const of_rows = static_cast<uint16_t*>(scratch);
  uint16_t* const of_columns = of_rows + groups * steps * kTile;
  auto* const y = reinterpret_cast<float*>(of_columns + groups * steps * kTile);
  const auto row_of = [&](int64_t row) {
    return static_cast<const uint16_t*>(x) + std::min(row, rows - 1) * row_stride;
  };
  Ahead ahead(static_cast<const uint16_t*>(x), row_stride, rows, columns, kRun);
  const int64_t lines = ceil_div(rows, groups + blocks);  // a step
  amx::configure();
  for (int64_t first = 0; first < columns; first += kGramColumns) {
    const int64_t last = std::min(columns, first + kGramColumns);
    std::fill_n(y, blocks * kSums, 0.0f);
    for (int64_t c = first; c < last; c += piece) {
      const int64_t used = std::min(steps, ceil_div(last - c, kStep));
      for (int64_t group = 0; group < groups; ++group) {
        const uint16_t* from[kSide];
        for (int64_t i = 0; i < kSide; ++i) from[i] = row_of(group * kSide + i) + c;
        for (int64_t s = 0; s < used; ++s) {
          const int64_t left = last - c - s * kStep, place = (group * steps + s) * kTile;
          both(from, left >= kStep ? ~__mmask32{0} : (__mmask32{1} << left) - 1, of_rows + place, of_columns + place);
          for (const uint16_t*& row : from) row += kStep;
          ahead.fetch(lines, c);
        }
      }
      const auto fetch = [&] { ahead.fetch(lines, c); };
      float* sums = y;
      for (int64_t column = 0; column < groups; column += 2) {
        const bool narrow = groups - column < 2;
        for (int64_t row = 0; row <= column; row += 2, sums += kSums) {
          const uint16_t *a = of_rows + row * steps * kTile, *b = of_columns + column * steps * kTile;
          if (row == column && narrow) {
            square<1, 1>(a, b, used, steps * kTile, sums, fetch);
          } else if (narrow) {
            square<2, 1>(a, b, used, steps * kTile, sums, fetch);
          } else {
            square<2, 2>(a, b, used, steps * kTile, sums, fetch);
          }
        }
      }
    }
    add_sums(y, rows, gram);
  }
  amx::release();
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
    all.few_tokens = all.some_tokens = 1;
    all.many = &many;
    all.gram = gram;
    return all;
  }();
  return kernels;
}

}  // namespace cprune
