// The eight tiles of AMX, each 16 rows of 64 bytes.
#pragma once

#include <cstdint>

namespace cprune::amx {

struct alignas(64) Configuration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

constexpr Configuration kWhole{
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};  // of all eight tiles

inline void configure() { asm volatile("ldtilecfg %0" ::"m"(kWhole)); }
inline void release() { asm volatile("tilerelease"); }

// The compiler's own intrinsics take a tile's number as a literal only.
template <int kTile>
void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

template <int kTile>
void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}

// sum[m][n] += sum_k rows[m][2 k] columns[k][2 n] + rows[m][2 k + 1] columns[k][2 n + 1], of bf16 in float32.
template <int kSum, int kRows, int kColumns>
void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kRows), "i"(kColumns));
}

}  // namespace cprune::amx
