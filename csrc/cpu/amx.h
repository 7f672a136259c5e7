// The eight tiles of AMX, each 16 rows of 64 bytes: the first six hold sums, and two the factors.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace cprune::amx {

struct alignas(64) Configuration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

constexpr Configuration kWhole{
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};  // of all eight tiles

inline void configure() { _tile_loadconfig(&kWhole); }
inline void release() { _tile_release(); }

inline void load_rows(const void* from, int64_t stride) { _tile_loadd(6, from, stride); }
inline void load_columns(const void* from, int64_t stride) { _tile_loadd(7, from, stride); }

template <int N>
struct Sum;

// multiply: sum[m][n] += sum_k rows[m][2 k] columns[k][2 n] + rows[m][2 k + 1] columns[k][2 n + 1], of bf16 in float32.
#define CPRUNE_AMX_SUM(N)                                                        \
  template <>                                                                    \
  struct Sum<N> {                                                                \
    static void zero() { _tile_zero(N); }                                        \
    static void multiply() { _tile_dpbf16ps(N, 6, 7); }                          \
    static void store(void* to, int64_t stride) { _tile_stored(N, to, stride); } \
  };
CPRUNE_AMX_SUM(0)
CPRUNE_AMX_SUM(1)
CPRUNE_AMX_SUM(2)
CPRUNE_AMX_SUM(3)
CPRUNE_AMX_SUM(4)
CPRUNE_AMX_SUM(5)
#undef CPRUNE_AMX_SUM

}  // namespace cprune::amx
