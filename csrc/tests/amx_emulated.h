// cpu/amx.h in plain C++, as Intel's manual describes the instructions, to run the AMX kernels on processors without.
//
// It is stricter in one thing: each thread configures its tiles once before it uses them, and releases them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace cprune::amx {

struct State {
  bool configured = false;
  char tiles[8][16][64];
};
inline thread_local State state;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

inline char (&tile(int number))[16][64] {
  if (!state.configured) fail("a tile is used without a configuration");
  return state.tiles[number];
}

inline void configure() {
  if (state.configured) fail("tiles are configured twice");
  state.configured = true;
  std::memset(state.tiles, 0, sizeof state.tiles);
}
inline void release() { state.configured = false; }

template <int kTile>
void zero() {
  std::memset(tile(kTile), 0, sizeof tile(kTile));
}

template <int kTile>
void load(const void* from, int64_t stride) {
  for (int64_t row = 0; row < 16; ++row) {
    std::memcpy(tile(kTile)[row], static_cast<const char*>(from) + row * stride, 64);
  }
}

template <int kTile>
void store(void* to, int64_t stride) {
  for (int64_t row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(to) + row * stride, tile(kTile)[row], 64);
}

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

inline float bfloat16_at(const char* row, int64_t column) {
  uint16_t half;
  std::memcpy(&half, row + 2 * column, 2);
  const uint32_t word = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return flushed(value);
}

template <int kSum, int kRows, int kColumns>
void multiply() {
  static_assert(kSum != kRows && kSum != kColumns && kRows != kColumns, "the instruction wants three tiles");
  for (int64_t m = 0; m < 16; ++m) {
    for (int64_t n = 0; n < 16; ++n) {
      float even = 0, odd = 0, sum;
      for (int64_t k = 0; k < 16; ++k) {
        const char *row = tile(kRows)[m], *column = tile(kColumns)[k];
        even = flushed(std::fma(bfloat16_at(row, 2 * k), bfloat16_at(column, 2 * n), even));
        odd = flushed(std::fma(bfloat16_at(row, 2 * k + 1), bfloat16_at(column, 2 * n + 1), odd));
      }
      std::memcpy(&sum, tile(kSum)[m] + 4 * n, 4);
      sum = flushed(flushed(sum) + flushed(even + odd));
      std::memcpy(tile(kSum)[m] + 4 * n, &sum, 4);
    }
  }
}

}  // namespace cprune::amx
