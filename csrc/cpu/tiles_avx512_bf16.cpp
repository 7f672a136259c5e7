// The tiles for AVX-512 with bf16 dot products, compiled with these instructions: called only where the CPU has them.
//
// Few tokens go through dots.h, some through fours.h. With many, tokens lie along the lanes and weights are broadcast:
// a chunk of width lanes, a multiple of 16, is [ceil(columns / 2), width, 2], pairs along the sum as vdpbf16ps wants
// them; an odd last column is paired with zero, and lanes at and beyond `count` hold anything finite. y is [row,
// kChunk].
#include <algorithm>
#include <limits>

#include "fours.h"
#include "transpose.h"

namespace cprune {
namespace {

struct Pairs {
  using Element = Bfloat16;
  using Token = uint16_t;
  using Packed = Pairs;
  using Vector = __m512bh;
  static constexpr int64_t kStep = 32;
  static Vector weight(const uint16_t* from) {
    Vector all = load<Vector>(from);
    asm("" : "+v"(all));  // or the compiler reads it again for every token
    return all;
  }
  static Vector weight(const uint16_t* from, int64_t count) { return load_some<Vector>(from, count); }
  static Vector token(const uint16_t* from) { return load<Vector>(from); }
  static Floats add(Floats sum, Vector weight, Vector token) {
    return bits<Floats>(_mm512_dpbf16_ps(bits<__m512>(sum), weight, token));
  }
  static void pack(const void* row, int64_t count, uint16_t* to) { std::memcpy(to, row, count * 2); }
  static void put(Floats x, int64_t count, uint16_t* to) { store_some(to, Bfloat16::narrow(x), count); }
};

constexpr int64_t kRows = 8;  // of weights in a tile: 24 sums with 3 vectors of tokens; more would meet in a cache set
constexpr int64_t kFew = 3;   // tokens: memory alone counts, and dots.h reads it row by row
static_assert(kRowBlock % 16 == 0 && kGateRows % kRows == 0 && kChunk == 48);

int64_t width_of(int64_t count) { return ceil_div(count, 16) * 16; }

int64_t lane_bytes(int64_t columns) { return ceil_div(columns, 2) * 4; }

void pack(const void* x, int64_t x_stride, const int64_t* tokens, int64_t count, int64_t columns, void* chunk) {
  const int64_t width = width_of(count);
  for (int64_t lane = 0; lane < width; lane += 16) {
    const uint16_t* rows[16];
    for (int64_t i = 0; i < 16; ++i) {
      rows[i] = static_cast<const uint16_t*>(x) + tokens[std::min(lane + i, count - 1)] * x_stride;
    }
    for (int64_t c = 0; c < columns; c += 32) {
      const int64_t left = std::min<int64_t>(32, columns - c);
      const __mmask32 mask = left == 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
      __m512i r[16];
      for (int i = 0; i < 16; ++i) r[i] = _mm512_maskz_loadu_epi16(mask, rows[i] + c);
      transpose(r);
      uint16_t* to = static_cast<uint16_t*>(chunk) + (c / 2 * width + lane) * 2;
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

// sum <- rows [kRows, columns] times V vectors of tokens.
template <int V>
inline __attribute__((always_inline)) void tile(const uint16_t* const (&rows)[kRows], int64_t ahead, int64_t columns,
                                                const uint16_t* tokens, __m512 (&sum)[kRows][V]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) sum[r][v] = _mm512_setzero_ps();
  }
  const auto step = [&](int64_t c) __attribute__((always_inline)) {
    __m512bh x[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) x[v] = reinterpret_cast<__m512bh>(_mm512_load_si512(tokens + v * 32));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512bh w = broadcast_pair(rows[r] + c);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], w, x[v]);
    }
    tokens += V * 32;
  };
  const int64_t even = columns & ~int64_t{1}, lines = columns & ~int64_t{31};
  for (int64_t c = 0; c < lines; c += 32) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {  // a line at a time: the tokens come from the L2 cache too
      _mm_prefetch(reinterpret_cast<const char*>(rows[r] + c + ahead), _MM_HINT_T1);
      step(c + 4 * r);
      step(c + 4 * r + 2);
    }
  }
  for (int64_t c = lines; c < even; c += 2) step(c);
  if (columns != even) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512bh w = reinterpret_cast<__m512bh>(_mm512_set1_epi32(rows[r][even]));
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) {
        const __m512bh x = reinterpret_cast<__m512bh>(_mm512_load_si512(tokens + v * 32));
        sum[r][v] = _mm512_dpbf16_ps(sum[r][v], w, x);
      }
    }
  }
}

template <int V>
void multiply_of(const uint16_t* weight, const uint16_t* next, int64_t row_stride, int64_t count, int64_t columns,
                 const uint16_t* chunk, float* y) {
  for (int64_t row = 0; row < count; row += kRows) {
    const uint16_t* rows[kRows];
    for (int64_t i = 0; i < kRows; ++i) rows[i] = weight + std::min(row + i, count - 1) * row_stride;
    __m512 sum[kRows][V];
    tile<V>(rows, row + kRows < count ? kRows * row_stride : next - rows[0], columns, chunk, sum);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kRows; ++i) {  // y has room for whole tiles
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) _mm512_store_ps(y + (row + i) * kChunk + v * 16, sum[i][v]);
    }
  }
}

void multiply(const void* weight, const Following& next, int64_t row_stride, int64_t rows, int64_t columns,
              const void* chunk, int64_t count, float* y) {
  const auto of = count <= 16 ? multiply_of<1> : count <= 32 ? multiply_of<2> : multiply_of<3>;
  const auto *first = static_cast<const uint16_t*>(weight), *then = static_cast<const uint16_t*>(next.weight);
  of(first, then, row_stride, rows, columns, static_cast<const uint16_t*>(chunk), y);
}

void activate(const float* gate, const float* up, const float* gate_bias, const float* up_bias,
              const Activation& activation, int64_t first, int64_t rows, int64_t, int64_t count, void* chunk) {
  const int64_t width = width_of(count);
  const auto words = [&](int64_t row, int64_t lane) -> Words {
    if (row >= rows) return Words{};
    Floats g = load<Floats>(gate + row * kChunk + lane), u = load<Floats>(up + row * kChunk + lane);
    if (gate_bias) g += gate_bias[row], u += up_bias[row];
    const __m512 act = bits<__m512>(activated(g, u, activation));
    return bits<Words>(_mm512_cvtepu16_epi32(bits<__m256i>(_mm512_cvtneps_pbh(act))));
  };
  for (int64_t row = 0; row < rows; row += 2) {
    uint16_t* to = static_cast<uint16_t*>(chunk) + (first + row) * width;
    for (int64_t lane = 0; lane < width; lane += 16) {
      store(to + lane * 2, words(row, lane) | words(row + 1, lane) << 16);
    }
  }
}

// Statistics of y [rows, kChunk], the bias already in it.
void observe(const float* y, int64_t rows, const Reduction& r) {
  const int64_t vectors = width_of(r.count) / 16;
  __mmask16 counts[3] = {};
  for (int64_t i = 0; i < r.count; ++i) counts[i / 16] |= __mmask16(r.valid[i]) << (i % 16);
  __m512 high = _mm512_set1_ps(*r.high), low = _mm512_set1_ps(*r.low);
  __m512 squares[3] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t v = 0; v < vectors; ++v) {
      const __m512 value = _mm512_load_ps(y + row * kChunk + v * 16);
      squares[v] = _mm512_fmadd_ps(value, value, squares[v]);
      high = _mm512_mask_max_ps(high, counts[v], high, value);
      low = _mm512_mask_min_ps(low, counts[v], low, value);
    }
  }
  for (int64_t v = 0; v < vectors; ++v) _mm512_storeu_ps(r.squares + v * 16, squares[v]);
  *r.high = _mm512_reduce_max_ps(high);
  *r.low = _mm512_reduce_min_ps(low);
}

void reduce(float* y, int64_t rows, const Reduction& r) {
  for (int64_t row = 0; r.bias && row < rows; ++row) {
    for (int64_t i = 0; i < kChunk; ++i) y[row * kChunk + i] += r.bias[row];
  }
  if (r.valid) observe(y, rows, r);
  for (int64_t lane = 0; lane < r.count; lane += 16) {
    for (int64_t row = 0; row < rows; row += 16) {
      const int64_t left = std::min<int64_t>(16, rows - row);
      const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
      __m512i t[16];
      for (int i = 0; i < 16; ++i) t[i] = _mm512_load_si512(y + (row + i) * kChunk + lane);
      transpose(t);
      const int64_t last = std::min<int64_t>(16, r.count - lane);
      __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        if (i >= last) break;
        float* out = r.out + r.tokens[lane + i] * r.out_stride + row;
        const __m512 gate = _mm512_set1_ps(r.gates[lane + i]), value = _mm512_castsi512_ps(t[i]);
        _mm512_mask_storeu_ps(out, mask, _mm512_fmadd_ps(gate, value, _mm512_maskz_loadu_ps(mask, out)));
        if (r.valid && r.valid[lane + i]) sum = _mm512_add_ps(sum, value);
      }
      if (r.valid) {
        float* sums = r.sums + row;
        _mm512_mask_storeu_ps(sums, mask, _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, sums)));
      }
    }
  }
}

void weigh(float* scores, int64_t keys, int64_t first, float scale, int64_t count, void* chunk, float* sums) {
  const int64_t width = width_of(count);
  for (int64_t lane = 0; lane < width; lane += 16) {
    const int64_t all = first + lane + 1;  // keys of every token of the vector
    const auto seen = [&](int64_t key) {
      return static_cast<__mmask16>(0xffffu << std::clamp<int64_t>(key - all + 1, 0, 16));
    };
    const auto score = [&](int64_t key) { return load<Floats>(scores + key * kChunk + lane); };
    __m512 high = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (int64_t key = 0; key < keys; ++key) high = _mm512_mask_max_ps(high, seen(key), high, bits<__m512>(score(key)));
    Floats sum{};
    const auto words = [&](int64_t key) -> Words {
      if (key >= keys) return Words{};
      const Floats e = exp((score(key) - bits<Floats>(high)) * scale);
      const __m512 weight = _mm512_maskz_mov_ps(seen(key), bits<__m512>(e));
      sum += bits<Floats>(weight);
      return bits<Words>(_mm512_cvtepu16_epi32(bits<__m256i>(_mm512_cvtneps_pbh(weight))));
    };
    uint16_t* to = static_cast<uint16_t*>(chunk) + lane * 2;
    for (int64_t key = 0; key < keys; key += 2) {
      const Words even = words(key);
      store(to + key * width, even | words(key + 1) << 16);
    }
    store(sums + lane, sum);
  }
}

constexpr Tiles kPanels{lane_bytes, 16, pack, multiply, activate, reduce, weigh};
using Few = Dots<Pairs>;
using Some = Fours<Pairs>;
constexpr Kernels kKernels{&Few::kAll,       kFew,           &Some::kAll,      Some::kMost, &kPanels, widen<Bfloat16>,
                           narrow<Bfloat16>, norm<Bfloat16>, centre<Bfloat16>, Few::gram};

}  // namespace

const Kernels& avx512_bf16_kernels() { return kKernels; }

}  // namespace cprune
