// Vectors of float32 as wide as the instructions that the including file is compiled for, and what is stored of them.
// Everything is local to that file: the same names mean other code in the next one.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "tiles.h"

namespace cprune {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

template <class To, class From>
inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class V, class T>
inline V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class T>
inline void store(T* to, const V& v) {
  std::memcpy(to, &v, sizeof v);
}

template <class V, class T>
inline V load_some(const T* from, int64_t count) {  // at most all of them; zeros after the first `count`
  constexpr int64_t kAll = sizeof(V) / sizeof(T);
  if (count >= kAll) return load<V>(from);
  T all[kAll] = {};
  std::memcpy(all, from, count * sizeof(T));
  return load<V>(all);
}

template <class V, class T>
inline void store_some(T* to, const V& v, int64_t count) {
  constexpr int64_t kAll = sizeof(V) / sizeof(T);
  if (count >= kAll) return store(to, v);
  T all[kAll];
  store(all, v);
  std::memcpy(to, all, count * sizeof(T));
}

inline Floats splat(float x) { return x - Floats{}; }

inline Words select(Ints mask, Words yes, Words no) {
  const Words m = bits<Words>(mask);
  return (yes & m) | (no & ~m);
}

struct Bfloat16 {
  using Stored = uint16_t;
  using Vector = Halves;
  static Floats widen(Halves h) { return bits<Floats>(__builtin_convertvector(h, Words) << 16); }
  static Halves narrow(Floats x) {  // to nearest, ties to even; NaN stays NaN
    const Words w = bits<Words>(x);
    const Words rounded = (w + 0x7fff + (w >> 16 & 1)) >> 16;
    return __builtin_convertvector(select(x != x, w >> 16 | 0x40, rounded), Halves);
  }
};

struct Float16 {
  using Stored = uint16_t;
  using Vector = Halves;
#if defined(__AVX512F__)
  static Floats widen(Halves h) { return bits<Floats>(_mm512_cvtph_ps(bits<__m256i>(h))); }
  static Halves narrow(Floats x) { return bits<Halves>(_mm512_cvtps_ph(bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__AVX2__)
  static Floats widen(Halves h) { return bits<Floats>(_mm256_cvtph_ps(bits<__m128i>(h))); }
  static Halves narrow(Floats x) { return bits<Halves>(_mm256_cvtps_ph(bits<__m256>(x), _MM_FROUND_TO_NEAREST_INT)); }
#else
  static Floats widen(Halves h) {
    const Words w = __builtin_convertvector(h, Words), exponent = w & 0x7c00;
    const Words magnitude = ((w & 0x7fff) << 13) + (112u << 23);
    const Words small = bits<Words>(bits<Floats>(magnitude + (1u << 23)) - bits<Floats>(Words{} + (113u << 23)));
    const Words finite = select(exponent == 0, small, magnitude);
    return bits<Floats>(select(exponent == 0x7c00, magnitude + (112u << 23), finite) | (w & 0x8000) << 16);
  }
  static Halves narrow(Floats x) {  // to nearest, ties to even
    const Words w = bits<Words>(x), sign = w & 0x80000000u, magnitude = w ^ sign;
    const Words magic = Words{} + (126u << 23);  // 0.5: its last bit is worth 2^-24, as that of a subnormal half
    const Words small = bits<Words>(bits<Floats>(magnitude) + bits<Floats>(magic)) - magic;
    const Words normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const Words finite = select(magnitude < (113u << 23), small, normal);
    const Words large = select(magnitude > (255u << 23), Words{} + 0x7e00, Words{} + 0x7c00);
    return __builtin_convertvector(select(magnitude >= (143u << 23), large, finite) | sign >> 16, Halves);
  }
#endif
};

struct Float32 {
  using Stored = float;
  using Vector = Floats;
  static Floats widen(Floats x) { return x; }
  static Floats narrow(Floats x) { return x; }
};

template <class Element>
void widen(const void* from, int64_t count, float* to) {
  const auto* in = static_cast<const typename Element::Stored*>(from);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, Element::widen(load<typename Element::Vector>(in + i)));
  if (i < count) store_some(to + i, Element::widen(load_some<typename Element::Vector>(in + i, count - i)), count - i);
}

template <class Element>
void narrow(const float* from, int64_t count, void* to) {
  auto* out = static_cast<typename Element::Stored*>(to);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, Element::narrow(load<Floats>(from + i)));
  if (i < count) store_some(out + i, Element::narrow(load_some<Floats>(from + i, count - i)), count - i);
}

typedef float Four __attribute__((vector_size(16)));

inline Four quarter(const Floats& x) {  // the sums of every fourth lane
  float lanes[kLanes];
  store(lanes, x);
  Four sum = load<Four>(lanes);
  for (int i = 4; i < kLanes; i += 4) sum += load<Four>(lanes + i);
  return sum;
}

inline float sum_of(const Floats& x) {
  const Four sum = quarter(x);
  return sum[0] + sum[1] + sum[2] + sum[3];
}

// x / sqrt(mean(x^2) + epsilon), rounded, times the weight.
template <class Element>
void norm(const void* x, int64_t rows, int64_t columns, const float* weight, float epsilon, void* out) {
  using Vector = typename Element::Vector;
  const auto* from = static_cast<const typename Element::Stored*>(x);
  auto* to = static_cast<typename Element::Stored*>(out);
  const int64_t whole = columns / kLanes * kLanes, rest = columns - whole;
  for (int64_t row = 0; row < rows; ++row, from += columns, to += columns) {
    Floats squares{};
    const auto add = [&](const Floats& value) { squares += value * value; };
    for (int64_t i = 0; i < whole; i += kLanes) add(Element::widen(load<Vector>(from + i)));
    if (rest) add(Element::widen(load_some<Vector>(from + whole, rest)));
    const float scale = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(columns) + epsilon);
    const auto normed = [&](const Vector& v, const Floats& factor) {
      return Element::narrow(Element::widen(Element::narrow(Element::widen(v) * scale)) * factor);
    };
    for (int64_t i = 0; i < whole; i += kLanes) {
      store(to + i, normed(load<Vector>(from + i), load<Floats>(weight + i)));
    }
    if (rest) {
      const Vector last = normed(load_some<Vector>(from + whole, rest), load_some<Floats>(weight + whole, rest));
      store_some(to + whole, last, rest);
    }
  }
}

// to <- 2^n (x - mean over the rows), the greatest number in [1, 2). Columns go by some vectors at a time.
template <class Element>
void centre(const void* x, int64_t x_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  using Vector = typename Element::Vector;
  constexpr int64_t kTogether = 4, kRun = 32;  // vectors; rows to a sum
  const auto* from = static_cast<const typename Element::Stored*>(x);
  Floats high{};
  for (int64_t start = 0; start < columns; start += kTogether * kLanes) {
    const int64_t vectors = std::min(kTogether, (columns - start + kLanes - 1) / kLanes);
    const auto at = [&](int64_t row, int64_t v) {
      const int64_t c = start + v * kLanes;
      return Element::widen(load_some<Vector>(from + row * x_stride + c, columns - c));
    };
    Floats first[kTogether], mean[kTogether] = {};
    for (int64_t v = 0; v < vectors; ++v) first[v] = at(0, v);
    for (int64_t run = 0; run < rows; run += kRun) {
      Floats sum[kTogether] = {};
      for (int64_t row = run; row < std::min(rows, run + kRun); ++row) {
        for (int64_t v = 0; v < vectors; ++v) sum[v] += at(row, v) - first[v];
      }
      for (int64_t v = 0; v < vectors; ++v) mean[v] += sum[v] / static_cast<float>(rows);
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t v = 0; v < vectors; ++v) {
        const Floats value = at(row, v) - first[v] - mean[v], size = value < 0.0f ? -value : value;
        high = size > high ? size : high;
        const int64_t c = start + v * kLanes;
        store_some(to + row * to_stride + c, value, columns - c);
      }
    }
  }
  float greatest = 0;
  for (int lane = 0; lane < kLanes; ++lane) greatest = std::max(greatest, high[lane]);
  if (!(greatest > 0)) return;  // all equal, or not a number
  const float factor = std::ldexp(1.0f, -std::clamp(std::ilogb(greatest), -126, 126));
  for (int64_t row = 0; row < rows; ++row, to += to_stride) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      store_some(to + c, load_some<Floats>(to + c, columns - c) * factor, columns - c);
    }
  }
}

// e^x by x = n ln 2 + r, |r| <= ln 2 / 2, and the Taylor polynomial of e^r (its remainder is below 2^-26).
inline Floats exp(Floats x) {
  x = x > 104.0f ? splat(104.0f) : x;  // NaN stays NaN
  x = x < -104.0f ? splat(-104.0f) : x;
  const Floats magic = splat(12582912.0f);  // 1.5 2^23: adding it rounds to a whole number
  const Floats shifted = x * 1.44269504f + magic, n = shifted - magic;
  Floats r = x - n * 0.693145752f;  // ln 2 in two parts, the first of 16 bits
  r = r - n * 1.42860677e-6f;
  Floats p = splat(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  const Ints whole = bits<Ints>(shifted) - 0x4b400000, half = whole >> 1;  // 2^n in two factors, each a normal number
  return p * bits<Floats>((half + 127) << 23) * bits<Floats>((whole - half + 127) << 23);
}

inline Floats activated(Floats gate, Floats up, const Activation& activation) {
  gate = gate > activation.limit ? splat(activation.limit) : gate;
  up = up > activation.limit ? splat(activation.limit) : up;
  up = up < -activation.limit ? splat(-activation.limit) : up;
  Floats slope = gate * activation.alpha;
  if (activation.kind == 2) slope = 1.59576912f * (gate + 0.044715f * gate * gate * gate);
  if (activation.kind == 1) up = up + 1.0f;
  return gate / (1.0f + exp(-slope)) * up;
}

}  // namespace
}  // namespace cprune
