// Tiles of dot products along the columns: a few rows of weights times a few tokens, all lanes of a vector along the
// sum. Nothing is repacked and no lane is idle whatever the number of tokens, so each weight costs its reading alone
// where tokens are few. y is [token, kRowBlock].
#pragma once

#include <algorithm>

#include "ahead.h"
#include "lanes.h"
#include "tiles.h"

namespace cprune {
namespace {

constexpr int kTileRows = 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileTokens = 6;  // 24 sums of 32 registers
#else
constexpr int kTileTokens = 2;  // 8 sums of 16 registers
#endif

constexpr int kLineTokens = kTileTokens / 2;
constexpr int64_t kLineAhead = 4096;  // bytes: a page, whose address is looked up meanwhile

#if defined(__AVX512F__)
// In every quarter the sums of the same quarter of a, b, c and d.
inline Floats quarters(const Floats& a, const Floats& b, const Floats& c, const Floats& d) {
  const __m512 w = bits<__m512>(a), x = bits<__m512>(b), y = bits<__m512>(c), z = bits<__m512>(d);
  const __m512 wx = _mm512_add_ps(_mm512_unpacklo_ps(w, x), _mm512_unpackhi_ps(w, x));
  const __m512 yz = _mm512_add_ps(_mm512_unpacklo_ps(y, z), _mm512_unpackhi_ps(y, z));
  return bits<Floats>(_mm512_add_ps(_mm512_shuffle_ps(wx, yz, 0x44), _mm512_shuffle_ps(wx, yz, 0xee)));
}
#endif

inline Four totals(const Floats& a, const Floats& b, const Floats& c, const Floats& d) {
#if defined(__AVX512F__)
  return quarter(quarters(a, b, c, d));
#else
  const Four w = quarter(a), x = quarter(b), y = quarter(c), z = quarter(d);
  return Four{w[0], x[0], y[0], z[0]} + Four{w[1], x[1], y[1], z[1]} + Four{w[2], x[2], y[2], z[2]} +
         Four{w[3], x[3], y[3], z[3]};
#endif
}

// How weights of a type meet tokens held in float32.
template <class E>
struct Widened {
  using Element = E;
  using Token = float;
  using Packed = Widened<Float32>;
  using Vector = Floats;
  static constexpr int64_t kStep = kLanes;
  static Vector weight(const typename E::Stored* from) { return E::widen(load<typename E::Vector>(from)); }
  static Vector weight(const typename E::Stored* from, int64_t count) {
    return E::widen(load_some<typename E::Vector>(from, count));
  }
  static Vector token(const Token* from) { return load<Floats>(from); }
  static Floats add(Floats sum, Vector weight, Vector token) { return sum + weight * token; }
  static void pack(const void* row, int64_t count, Token* to) { widen<E>(row, count, to); }
  static void put(Floats x, int64_t count, Token* to) { store_some(to, E::widen(E::narrow(x)), count); }
};

template <class Ops>
struct Dots {
  using Token = typename Ops::Token;
  using Stored = typename Ops::Element::Stored;

  // One vector more than needed: rows of tokens a power of two apart would meet in the same lines of the L1 cache.
  static int64_t stride(int64_t columns) { return (ceil_div(columns, Ops::kStep) + 1) * Ops::kStep; }

  static int64_t lane_bytes(int64_t columns) { return stride(columns) * sizeof(Token); }

  static void pack(const void* x, int64_t x_stride, const int64_t* tokens, int64_t count, int64_t columns,
                   void* chunk) {
    for (int64_t i = 0; i < count; ++i) {
      Token* row = static_cast<Token*>(chunk) + i * stride(columns);
      Ops::pack(static_cast<const Stored*>(x) + tokens[i] * x_stride, columns, row);
      std::fill(row + columns, row + stride(columns), Token{});
    }
  }

  // The rows `ahead` and `further` elements away are fetched meanwhile: twice, as a busy memory drops requests.
  template <int kTokens>
  static void tile(const Stored* const* rows, int64_t ahead, int64_t further, int64_t columns, const Token* tokens,
                   float* y) {
    const int64_t stride = Dots::stride(columns), whole = columns / Ops::kStep * Ops::kStep;
    Floats sum[kTokens][kTileRows] = {};
    const Stored *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
    for (int64_t c = 0; c < whole; c += Ops::kStep) {
      const typename Ops::Vector w[kTileRows] = {Ops::weight(r0 + c), Ops::weight(r1 + c), Ops::weight(r2 + c),
                                                 Ops::weight(r3 + c)};
      for (const Stored* row : {r0, r1, r2, r3}) {
        __builtin_prefetch(row + c + ahead, 0, 2);
        __builtin_prefetch(row + c + further, 0, 2);
      }
#pragma GCC unroll 6
      for (int t = 0; t < kTokens; ++t) {
        const typename Ops::Vector x = Ops::token(tokens + t * stride + c);
#pragma GCC unroll 4
        for (int r = 0; r < kTileRows; ++r) sum[t][r] = Ops::add(sum[t][r], w[r], x);
      }
    }
    if (whole < columns) {
      typename Ops::Vector w[kTileRows];
      for (int r = 0; r < kTileRows; ++r) w[r] = Ops::weight(rows[r] + whole, columns - whole);
#pragma GCC unroll 6
      for (int t = 0; t < kTokens; ++t) {
        const typename Ops::Vector x = Ops::token(tokens + t * stride + whole);
#pragma GCC unroll 4
        for (int r = 0; r < kTileRows; ++r) sum[t][r] = Ops::add(sum[t][r], w[r], x);
      }
    }
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) store(y + t * kRowBlock, totals(sum[t][0], sum[t][1], sum[t][2], sum[t][3]));
  }

  // Memory is read from one end to the other, which is what it does best: for so few tokens that it alone counts. What
  // comes `kLineAhead` bytes later is fetched meanwhile, and so is what comes at twice and, if that takes one more
  // instruction for a line, at four times that: a busy memory drops requests.
  template <int kTokens>
  static void lines(const Stored* weight, const Stored* next, int64_t row_stride, int64_t rows, int64_t columns,
                    const Token* tokens, float* y) {
    constexpr int64_t kSums = kTileRows, kStride = kSums * Ops::kStep;
    constexpr bool kWholeLine = Ops::kStep * sizeof(Stored) == 64;
    const int64_t stride = Dots::stride(columns), whole = columns / kStride * kStride;
    const int64_t skip = ceil_div(kLineAhead, std::max<int64_t>(1, columns * sizeof(Stored)));
    const auto at = [&](int64_t row) {
      return row < rows ? weight + row * row_stride : next + (row - rows) * row_stride;
    };
    for (int64_t first = 0; first < rows; first += kTileRows) {
      Floats total[kTokens][kTileRows];
      for (int r = 0; r < kTileRows; ++r) {
        const int64_t row = std::min(first + r, rows - 1);
        const Stored* from = at(row);
        const Stored *ahead = at(row + skip), *further = at(row + 2 * skip), *furthest = at(row + 4 * skip);
        __builtin_prefetch(at(row + 16 * skip), 0, 2);  // for its page to be known by then
        Floats sum[kTokens][kSums] = {};
        for (int64_t c = 0; c < whole; c += kStride) {
#pragma GCC unroll 4
          for (int64_t s = 0; s < kSums; ++s) {
            const int64_t place = c + s * Ops::kStep;
            __builtin_prefetch(ahead + place, 0, 2);
            __builtin_prefetch(further + place, 0, 2);
            if (kWholeLine) __builtin_prefetch(furthest + place, 0, 2);
            const typename Ops::Vector w = Ops::weight(from + place);
#pragma GCC unroll 3
            for (int t = 0; t < kTokens; ++t) {
              sum[t][s] = Ops::add(sum[t][s], w, Ops::token(tokens + t * stride + place));
            }
          }
        }
        for (int64_t c = whole; c < columns; c += Ops::kStep) {
          const typename Ops::Vector w =
              c + Ops::kStep <= columns ? Ops::weight(from + c) : Ops::weight(from + c, columns - c);
#pragma GCC unroll 3
          for (int t = 0; t < kTokens; ++t) sum[t][0] = Ops::add(sum[t][0], w, Ops::token(tokens + t * stride + c));
        }
#pragma GCC unroll 3
        for (int t = 0; t < kTokens; ++t) total[t][r] = (sum[t][0] + sum[t][1]) + (sum[t][2] + sum[t][3]);
      }
#pragma GCC unroll 3
      for (int t = 0; t < kTokens; ++t) {
        store(y + t * kRowBlock + first, totals(total[t][0], total[t][1], total[t][2], total[t][3]));
      }
    }
  }

  static void multiply(const void* weight, const Following& next, int64_t row_stride, int64_t rows, int64_t columns,
                       const void* chunk, int64_t count, float* y) {
    const auto* tokens = static_cast<const Token*>(chunk);
    const auto *from = static_cast<const Stored*>(weight), *then = static_cast<const Stored*>(next.weight);
    if (count <= kLineTokens) {
      return kLines[count](from, then, row_stride, rows, columns, tokens, y);
    }
    const int64_t groups = ceil_div(count, kTileTokens), stride = Dots::stride(columns);
    by_rows(from, then, row_stride, rows, [&](const Stored* const* four, int64_t one, int64_t two, int64_t row) {
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = count * group / groups;
        kTiles[count * (group + 1) / groups - first](four, one, two, columns, tokens + first * stride,
                                                     y + first * kRowBlock + row);
      }
    });
  }

  // tile(rows, ahead, further, row) for every kTileRows of them, with what it may fetch of those one and two tiles on.
  template <class Tile>
  static void by_rows(const Stored* weight, const Stored* next, int64_t row_stride, int64_t rows, const Tile& tile) {
    const int64_t whole = ceil_div(rows, kTileRows) * kTileRows;
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const Stored* four[kTileRows];
      for (int64_t r = 0; r < kTileRows; ++r) four[r] = weight + std::min(row + r, rows - 1) * row_stride;
      const auto ahead = [&](int64_t more) {
        if (row + more < rows) return more * row_stride;
        return next - four[0] + (row + more - whole) * row_stride;
      };
      const int64_t far = ahead(8 * kTileRows);
      for (const Stored* r : four) __builtin_prefetch(r + far, 0, 2);  // for their pages to be known by then
      tile(four, ahead(kTileRows), ahead(2 * kTileRows), row);
    }
  }

  static void activate(const float* gate, const float* up, const float* gate_bias, const float* up_bias,
                       const Activation& activation, int64_t first, int64_t rows, int64_t inner, int64_t count,
                       void* chunk) {
    for (int64_t i = 0; i < count; ++i) {
      Token* to = static_cast<Token*>(chunk) + i * stride(inner) + first;
      for (int64_t row = 0; row < rows; row += kLanes) {
        const int64_t some = std::min<int64_t>(kLanes, rows - row);
        Floats g = load_some<Floats>(gate + i * kRowBlock + row, some);
        Floats u = load_some<Floats>(up + i * kRowBlock + row, some);
        if (gate_bias) g += load_some<Floats>(gate_bias + row, some), u += load_some<Floats>(up_bias + row, some);
        Ops::put(activated(g, u, activation), some, to + row);
      }
      if (first + rows == inner) std::fill(to + rows, to + stride(inner) - first, Token{});
    }
  }

  static void reduce(float* y, int64_t rows, const Reduction& r) {
    Floats high = splat(r.valid ? *r.high : 0.0f), low = splat(r.valid ? *r.low : 0.0f);
    for (int64_t i = 0; i < r.count; ++i, y += kRowBlock) {
      float* out = r.out + r.tokens[i] * r.out_stride;
      Floats squares{};
      for (int64_t row = 0; row < rows; row += kLanes) {
        const int64_t some = std::min<int64_t>(kLanes, rows - row);
        Floats value = load_some<Floats>(y + row, some);
        if (r.bias) value += load_some<Floats>(r.bias + row, some);
        store_some(out + row, load_some<Floats>(out + row, some) + r.gates[i] * value, some);
        if (!r.valid) continue;
        squares += value * value;
        if (!r.valid[i]) continue;
        store_some(r.sums + row, load_some<Floats>(r.sums + row, some) + value, some);
        for (int64_t lane = some; lane < kLanes; ++lane) value[lane] = value[0];
        high = value > high ? value : high;
        low = value < low ? value : low;
      }
      if (r.valid) r.squares[i] = sum_of(squares);
    }
    for (int lane = 0; r.valid && lane < kLanes; ++lane) {
      *r.high = std::max(*r.high, high[lane]);
      *r.low = std::min(*r.low, low[lane]);
    }
  }

  static void gram(const void* x, int64_t row_stride, int64_t rows, int64_t columns, void* scratch, double* gram) {
    const auto* from = static_cast<const Stored*>(x);
    Ahead ahead(from, row_stride, rows, columns, kGramColumns);
    int64_t tiles = 0;
    for (int64_t first = 0; first < rows; first += kTileTokens) tiles += ceil_div(rows - first, kTileRows);
    const int64_t lines = ceil_div(rows * ceil_div(kGramColumns, 64 / sizeof(Stored)), tiles);  // a tile
    for (int64_t first = 0; first < columns; first += kGramColumns) {
      gram_window(from + first, row_stride, rows, std::min(kGramColumns, columns - first), scratch, gram,
                  [&] { ahead.fetch(lines, first); });
    }
  }

  // Rows far apart in memory are packed first, as both factors: at strides of a power of two they share cache lines.
  // meanwhile() is called with every tile.
  template <typename Meanwhile>
  static void gram_window(const Stored* x, int64_t row_stride, int64_t rows, int64_t columns, void* scratch,
                          double* gram, const Meanwhile& meanwhile) {
    using Packed = Dots<typename Ops::Packed>;
    auto* packed = static_cast<Token*>(scratch);
    const int64_t lane = stride(columns);
    float* y = reinterpret_cast<float*>(packed + rows * stride(kGramColumns));
    for (int64_t row = 0; row < rows; ++row) pack(x, row_stride, &row, 1, columns, packed + row * lane);
    for (int64_t first = 0; first < rows; first += kTileTokens) {
      const int64_t count = std::min<int64_t>(kTileTokens, rows - first);
      for (int64_t row = first; row < rows; row += kTileRows) {
        meanwhile();
        const int64_t block = std::min<int64_t>(kTileRows, rows - row);
        const Token* factor = packed + row * lane;
        Packed::multiply(factor, {factor, 0, 0, 1}, lane, block, columns, packed + first * lane, count, y);
        for (int64_t i = 0; i < count; ++i) {
          double* to = gram + (first + i) * rows + row;
          for (int64_t j = 0; j < block; ++j) to[j] += y[i * kRowBlock + j];
        }
      }
    }
  }

  using Lines = void (*)(const Stored*, const Stored*, int64_t, int64_t, int64_t, const Token*, float*);
  using Tile = void (*)(const Stored* const*, int64_t, int64_t, int64_t, const Token*, float*);
#if defined(__AVX512F__) || defined(__aarch64__)
  // Groups have three tokens or more: fewer go through lines.
  static constexpr Tile kTiles[] = {nullptr, nullptr, nullptr, tile<3>, tile<4>, tile<5>, tile<6>};
  static constexpr Lines kLines[] = {nullptr, lines<1>, lines<2>, lines<3>};
#else
  static constexpr Tile kTiles[] = {nullptr, tile<1>, tile<2>};
  static constexpr Lines kLines[] = {nullptr, lines<1>};
#endif
  static_assert(sizeof kTiles / sizeof(Tile) == kTileTokens + 1, "one for every number of tokens");
  static_assert(sizeof kLines / sizeof(Lines) == kLineTokens + 1, "one for every number of tokens");

  static constexpr Tiles kAll{lane_bytes, 1, pack, multiply, activate, reduce};
  static constexpr Kernels kKernels{&kAll,
                                    kChunk,
                                    &kAll,
                                    kChunk,
                                    &kAll,
                                    cprune::widen<typename Ops::Element>,
                                    cprune::narrow<typename Ops::Element>,
                                    cprune::norm<typename Ops::Element>,
                                    cprune::centre<typename Ops::Element>,
                                    gram};
};

inline const Kernels& widened_kernels(Type type) {
  if (type == Type::kBfloat16) return Dots<Widened<Bfloat16>>::kKernels;
  if (type == Type::kFloat16) return Dots<Widened<Float16>>::kKernels;
  return Dots<Widened<Float32>>::kKernels;
}

}  // namespace
}  // namespace cprune
