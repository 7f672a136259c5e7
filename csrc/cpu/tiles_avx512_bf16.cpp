// The tiles for AVX-512 with bf16 dot products, compiled with these instructions: called only where the CPU has them.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "tiles.h"

namespace cprune {
namespace {

constexpr int64_t kRows = 8;  // of weights, in one tile
static_assert(kRows == 2 * kGateStep && kRowBlock % 16 == 0 && kPanel == 48);

// 16 x 16 words of 32 bits.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

void pack(const uint16_t* x, int64_t x_stride, const int64_t* tokens, int64_t count, int64_t width, int64_t columns,
          uint16_t* panel) {
  for (int64_t lane = 0; lane < width; lane += 16) {
    const uint16_t* rows[16];
    for (int64_t i = 0; i < 16; ++i) rows[i] = x + tokens[std::min(lane + i, count - 1)] * x_stride;
    for (int64_t c = 0; c < columns; c += 32) {
      const int64_t left = std::min<int64_t>(32, columns - c);
      const __mmask32 mask = left == 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
      __m512i r[16];
      for (int i = 0; i < 16; ++i) r[i] = _mm512_maskz_loadu_epi16(mask, rows[i] + c);
      transpose(r);
      uint16_t* to = panel + (c / 2 * width + lane) * 2;
      if (left == 32) {
        for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * width * 2, r[i]);
      } else {
        for (int64_t i = 0; i < (left + 1) / 2; ++i) _mm512_store_si512(to + i * width * 2, r[i]);
      }
    }
  }
}

inline __m512bh broadcast_pair(const uint16_t* from) {
  int pair;
  std::memcpy(&pair, from, sizeof pair);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}

// acc <- rows [kRows, columns] times a panel of V vectors.
template <int V>
inline __attribute__((always_inline)) void multiply(const uint16_t* const (&rows)[kRows], int64_t columns,
                                                    const uint16_t* panel, __m512 (&acc)[kRows][V]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_ps();
  }
  const uint16_t *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
  const uint16_t *r4 = rows[4], *r5 = rows[5], *r6 = rows[6], *r7 = rows[7];
  const int64_t even = columns & ~int64_t{1};
#pragma GCC unroll 4
  for (int64_t c = 0; c < even; c += 2, panel += V * 32) {
    __m512bh x[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) x[v] = reinterpret_cast<__m512bh>(_mm512_load_si512(panel + v * 32));
    const uint16_t* const at[kRows] = {r0, r1, r2, r3, r4, r5, r6, r7};
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512bh w = broadcast_pair(at[r] + c);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], w, x[v]);
    }
  }
  if (columns != even) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512bh w = reinterpret_cast<__m512bh>(_mm512_set1_epi32(rows[r][even]));
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) {
        const __m512bh x = reinterpret_cast<__m512bh>(_mm512_load_si512(panel + v * 32));
        acc[r][v] = _mm512_dpbf16_ps(acc[r][v], w, x);
      }
    }
  }
}

// e^x by x = n ln 2 + r, |r| <= ln 2 / 2, and the Taylor polynomial of e^r (its remainder is below 2^-26).
inline __m512 exp_ps(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(104.0f), _mm512_max_ps(_mm512_set1_ps(-104.0f), x));  // NaN stays NaN
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);  // ln 2 in two parts, the first of 16 bits
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 p = _mm512_set1_ps(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  }
  return _mm512_scalef_ps(p, n);
}

inline __m512 silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(x, _mm512_add_ps(one, exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

inline __m512i bf16_words(__m512 x) { return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x))); }

template <int V>
void gate_up_of(const uint16_t* weight, int64_t row_stride, int64_t hidden, int64_t intermediate, int64_t first,
                int64_t last, const uint16_t* panel, uint16_t* act) {
  for (int64_t row = first; row < last; row += kGateStep) {
    const uint16_t* rows[kRows];
    for (int64_t i = 0; i < kGateStep; ++i) {
      const int64_t own = std::min(row + i, intermediate - 1);
      rows[i] = weight + own * row_stride;
      rows[kGateStep + i] = weight + (intermediate + own) * row_stride;
    }
    __m512 acc[kRows][V];
    multiply<V>(rows, hidden, panel, acc);
#pragma GCC unroll 2
    for (int i = 0; i < kGateStep; i += 2) {
      if (row + i >= last) break;
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) {
        __m512i pair = bf16_words(_mm512_mul_ps(silu(acc[i][v]), acc[kGateStep + i][v]));
        if (row + i + 1 < last) {
          const __m512 odd = _mm512_mul_ps(silu(acc[i + 1][v]), acc[kGateStep + i + 1][v]);
          pair = _mm512_or_si512(pair, _mm512_slli_epi32(bf16_words(odd), 16));
        }
        _mm512_store_si512(act + ((row + i) / 2 * V + v) * 32, pair);
      }
    }
  }
}

template <int V>
void down_of(const uint16_t* weight, int64_t row_stride, int64_t count, int64_t columns, const uint16_t* panel,
             float* y) {
  for (int64_t row = 0; row < count; row += kRows) {
    const uint16_t* rows[kRows];
    for (int64_t i = 0; i < kRows; ++i) rows[i] = weight + std::min(row + i, count - 1) * row_stride;
    __m512 acc[kRows][V];
    multiply<V>(rows, columns, panel, acc);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kRows; ++i) {  // y has room for whole tiles
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) _mm512_store_ps(y + (row + i) * kPanel + v * 16, acc[i][v]);
    }
  }
}

void gate_up(const uint16_t* weight, int64_t row_stride, int64_t hidden, int64_t intermediate, int64_t first,
             int64_t last, const uint16_t* panel, int64_t width, uint16_t* act) {
  const auto of = width == 16 ? gate_up_of<1> : width == 32 ? gate_up_of<2> : gate_up_of<3>;
  of(weight, row_stride, hidden, intermediate, first, last, panel, act);
}

void down(const uint16_t* weight, int64_t row_stride, int64_t rows, int64_t columns, const uint16_t* panel,
          int64_t width, float* y) {
  const auto of = width == 16 ? down_of<1> : width == 32 ? down_of<2> : down_of<3>;
  of(weight, row_stride, rows, columns, panel, y);
}

void reduce(const float* y, int64_t rows, int64_t width, const Reduction& r) {
  __mmask16 counts[3];
  for (int64_t v = 0; v < width / 16; ++v) {
    counts[v] = 0;
    for (int64_t i = v * 16; i < std::min(r.count, v * 16 + 16); ++i)
      counts[v] |= __mmask16(r.valid[i]) << (i - v * 16);
  }
  __m512 high = _mm512_set1_ps(*r.high), low = _mm512_set1_ps(*r.low);
  __m512 squares[3] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t row = 0; row < rows; ++row) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t v = 0; v < width / 16; ++v) {
      const __m512 value = _mm512_load_ps(y + row * kPanel + v * 16);
      squares[v] = _mm512_fmadd_ps(value, value, squares[v]);
      high = _mm512_mask_max_ps(high, counts[v], high, value);
      low = _mm512_mask_min_ps(low, counts[v], low, value);
      sum = _mm512_mask_add_ps(sum, counts[v], sum, value);
    }
    r.sums[row] += _mm512_reduce_add_ps(sum);
  }
  for (int64_t v = 0; v < width / 16; ++v) _mm512_storeu_ps(r.squares + v * 16, squares[v]);
  *r.high = _mm512_reduce_max_ps(high);
  *r.low = _mm512_reduce_min_ps(low);

  for (int64_t lane = 0; lane < r.count; lane += 16) {
    for (int64_t row = 0; row < rows; row += 16) {
      const int64_t left = std::min<int64_t>(16, rows - row);
      const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
      __m512i t[16];
      for (int i = 0; i < 16; ++i) t[i] = _mm512_load_si512(y + (row + i) * kPanel + lane);
      transpose(t);
      const int64_t last = std::min<int64_t>(16, r.count - lane);
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        if (i >= last) break;
        float* out = r.out + r.tokens[lane + i] * r.out_stride + row;
        const __m512 gate = _mm512_set1_ps(r.gates[lane + i]);
        _mm512_mask_storeu_ps(out, mask,
                              _mm512_fmadd_ps(gate, _mm512_castsi512_ps(t[i]), _mm512_maskz_loadu_ps(mask, out)));
      }
    }
  }
}

}  // namespace

const Tiles kAvx512Bf16Tiles{"avx512_bf16", pack, gate_up, down, reduce};

}  // namespace cprune
