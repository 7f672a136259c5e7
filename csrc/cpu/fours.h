// Tiles for more tokens than dots.h does best with and fewer than fill vectors, for AVX-512 with bf16 dot products.
//
// Four tokens share a vector, 8 columns each, and meet the same 8 weights in all its quarters; those left over have
// vectors of 32 columns as in dots.h. So no lane is idle, and a weight is loaded and summed once for four tokens. Of
// every 32 columns a chunk is [4, fours, 4, 8], then [rest, 32]. y is [token, kRowBlock].
#pragma once

#include <algorithm>

#include "dots.h"

namespace cprune {
namespace {

template <class Ops>
struct Fours {
  static constexpr int64_t kMost = 24;  // tokens
  static constexpr int64_t kStep = 32;  // columns
  static constexpr int kSums = 6;       // of a row of weights, times kTileRows in registers
  static_assert(kGateRows == kStep && kMost == 4 * kSums);

  static int64_t rest_of(int64_t count) { return count / 4 + count % 4 <= kSums ? count % 4 : 0; }
  static int64_t fours_of(int64_t count) { return ceil_div(count - rest_of(count), 4); }
  static int64_t vectors_of(int64_t count) { return 4 * fours_of(count) + rest_of(count); }  // of a step

  static int64_t lane_bytes(int64_t columns) { return ceil_div(columns, kStep) * kStep * 2; }

  // chunk <- the columns of token i of a step.
  static void put(__m512i columns, int64_t i, int64_t count, int64_t step, void* chunk) {
    const int64_t fours = fours_of(count);
    uint16_t* to = static_cast<uint16_t*>(chunk) + step * vectors_of(count) * kStep;
    if (i >= 4 * fours) return _mm512_store_si512(to + i * kStep, columns);
    to += i / 4 * kStep + i % 4 * 8;
    const auto eight = [&](int64_t k, __m128i words) {
      _mm_store_si128(reinterpret_cast<__m128i*>(to + k * fours * kStep), words);
    };
    eight(0, _mm512_castsi512_si128(columns));
    eight(1, _mm512_extracti32x4_epi32(columns, 1));
    eight(2, _mm512_extracti32x4_epi32(columns, 2));
    eight(3, _mm512_extracti32x4_epi32(columns, 3));
  }

  static __mmask32 first(int64_t count) { return count >= kStep ? ~__mmask32{0} : (__mmask32{1} << count) - 1; }

  static void pack(const void* x, int64_t x_stride, const int64_t* tokens, int64_t count, int64_t columns,
                   void* chunk) {
    for (int64_t c = 0; c < columns; c += kStep) {
      for (int64_t i = 0; i < count; ++i) {
        const uint16_t* from = static_cast<const uint16_t*>(x) + tokens[i] * x_stride + c;
        put(_mm512_maskz_loadu_epi16(first(columns - c), from), i, count, c / kStep, chunk);
      }
    }
  }

  template <int kFours, int kRest>
  static void tile(const uint16_t* const* weights, int64_t ahead, int64_t further, int64_t columns,
                   const uint16_t* tokens, float* y) {
    constexpr int kAll = kFours + kRest;
    Floats sum[kTileRows][kAll] = {};
    const auto step = [&](const uint16_t* r0, const uint16_t* r1, const uint16_t* r2,
                          const uint16_t* r3) __attribute__((always_inline)) {
      const uint16_t* const rows[] = {r0, r1, r2, r3};
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        __m512bh x[kFours];
#pragma GCC unroll 6
        for (int t = 0; t < kFours; ++t) x[t] = Ops::token(tokens + (k * kFours + t) * kStep);
#pragma GCC unroll 4
        for (int r = 0; r < kTileRows; ++r) {
          const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r] + k * 8));
          const __m512bh w = bits<__m512bh>(_mm512_broadcast_i32x4(eight));
#pragma GCC unroll 6
          for (int t = 0; t < kFours; ++t) sum[r][t] = Ops::add(sum[r][t], w, x[t]);
        }
      }
      if constexpr (kRest > 0) {
        __m512bh x[kRest];
#pragma GCC unroll 3
        for (int t = 0; t < kRest; ++t) x[t] = Ops::token(tokens + (4 * kFours + t) * kStep);
#pragma GCC unroll 4
        for (int r = 0; r < kTileRows; ++r) {
          const __m512bh w = Ops::weight(rows[r]);
#pragma GCC unroll 3
          for (int t = 0; t < kRest; ++t) sum[r][kFours + t] = Ops::add(sum[r][kFours + t], w, x[t]);
        }
      }
      tokens += (4 * kFours + kRest) * kStep;
    };
    const uint16_t *r0 = weights[0], *r1 = weights[1], *r2 = weights[2], *r3 = weights[3];
    int64_t c = 0;
    for (; c + kStep <= columns; c += kStep) {
      for (const uint16_t* row : {r0, r1, r2, r3}) {
        __builtin_prefetch(row + c + ahead, 0, 2);
        __builtin_prefetch(row + c + further, 0, 2);
      }
      step(r0 + c, r1 + c, r2 + c, r3 + c);
    }
    if (c < columns) {
      uint16_t last[kTileRows][kStep];
      for (int r = 0; r < kTileRows; ++r) store(last[r], _mm512_maskz_loadu_epi16(first(columns - c), weights[r] + c));
      step(last[0], last[1], last[2], last[3]);
    }
#pragma GCC unroll 6
    for (int t = 0; t < kAll; ++t) {
      const Floats all = quarters(sum[0][t], sum[1][t], sum[2][t], sum[3][t]);
      if (t < kFours) {
        Four each[4];
        store(each, all);
        for (int i = 0; i < 4; ++i) store(y + (4 * t + i) * kRowBlock, each[i]);
      } else {
        store(y + (3 * kFours + t) * kRowBlock, quarter(all));
      }
    }
  }

  template <int kFours, int kRest>
  static void multiply_of(const uint16_t* weight, const uint16_t* next, int64_t row_stride, int64_t rows,
                          int64_t columns, const uint16_t* chunk, float* y) {
    Dots<Ops>::by_rows(weight, next, row_stride, rows,
                       [&](const uint16_t* const* four, int64_t one, int64_t two, int64_t row) {
                         tile<kFours, kRest>(four, one, two, columns, chunk, y + row);
                       });
  }

  static void multiply(const void* weight, const Following& next, int64_t row_stride, int64_t rows, int64_t columns,
                       const void* chunk, int64_t count, float* y) {
    const auto *from = static_cast<const uint16_t*>(weight), *then = static_cast<const uint16_t*>(next.weight);
    kMultiply[fours_of(count)][rest_of(count)](from, then, row_stride, rows, columns,
                                               static_cast<const uint16_t*>(chunk), y);
  }

  static void activate(const float* gate, const float* up, const float* gate_bias, const float* up_bias,
                       const Activation& activation, int64_t first, int64_t rows, int64_t, int64_t count, void* chunk) {
    for (int64_t i = 0; i < count; ++i) {
      __m256i half[2];
      for (int64_t row = 0; row < kStep; row += kLanes) {
        const int64_t some = std::clamp<int64_t>(rows - row, 0, kLanes);  // zeros after them
        Floats g = load_some<Floats>(gate + i * kRowBlock + row, some);
        Floats u = load_some<Floats>(up + i * kRowBlock + row, some);
        if (gate_bias) g += load_some<Floats>(gate_bias + row, some), u += load_some<Floats>(up_bias + row, some);
        half[row / kLanes] = bits<__m256i>(Ops::Element::narrow(activated(g, u, activation)));
      }
      put(load<__m512i>(half), i, count, first / kStep, chunk);
    }
  }

  using Multiply = void (*)(const uint16_t*, const uint16_t*, int64_t, int64_t, int64_t, const uint16_t*, float*);
  static constexpr Multiply kMultiply[kSums + 1][4] = {
      {},
      {multiply_of<1, 0>, multiply_of<1, 1>, multiply_of<1, 2>, multiply_of<1, 3>},
      {multiply_of<2, 0>, multiply_of<2, 1>, multiply_of<2, 2>, multiply_of<2, 3>},
      {multiply_of<3, 0>, multiply_of<3, 1>, multiply_of<3, 2>, multiply_of<3, 3>},
      {multiply_of<4, 0>, multiply_of<4, 1>, multiply_of<4, 2>},
      {multiply_of<5, 0>, multiply_of<5, 1>},
      {multiply_of<6, 0>}};

  static constexpr Tiles kAll{lane_bytes, 4, pack, multiply, activate, Dots<Ops>::reduce};
};

}  // namespace
}  // namespace cprune
