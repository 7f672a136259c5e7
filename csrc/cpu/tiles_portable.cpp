// The tiles in plain C++: any processor, no intrinsics, the twin that the vector tiles are tested against.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "tiles.h"

namespace cprune {
namespace {

float to_float(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

uint16_t to_bf16(float value) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

int64_t at(int64_t column, int64_t lane, int64_t width) { return (column / 2 * width + lane) * 2 + column % 2; }

void pack(const uint16_t* x, int64_t x_stride, const int64_t* tokens, int64_t count, int64_t width, int64_t columns,
          uint16_t* panel) {
  for (int64_t lane = 0; lane < width; ++lane) {
    const uint16_t* row = x + tokens[std::min(lane, count - 1)] * x_stride;
    for (int64_t c = 0; c < columns; ++c) panel[at(c, lane, width)] = row[c];
    if (columns % 2) panel[at(columns, lane, width)] = 0;
  }
}

// sums [width] <- weight [columns] times panel
void dot(const uint16_t* weight, int64_t columns, const uint16_t* panel, int64_t width, float* sums) {
  std::fill(sums, sums + width, 0.0f);
  for (int64_t c = 0; c < columns; ++c) {
    const float w = to_float(weight[c]);
    for (int64_t lane = 0; lane < width; ++lane) sums[lane] += w * to_float(panel[at(c, lane, width)]);
  }
}

void gate_up(const uint16_t* weight, int64_t row_stride, int64_t hidden, int64_t intermediate, int64_t first,
             int64_t last, const uint16_t* panel, int64_t width, uint16_t* act) {
  float gate[kPanel], up[kPanel];
  for (int64_t row = first; row < last; ++row) {
    dot(weight + row * row_stride, hidden, panel, width, gate);
    dot(weight + (intermediate + row) * row_stride, hidden, panel, width, up);
    for (int64_t lane = 0; lane < width; ++lane) {
      act[at(row, lane, width)] = to_bf16(gate[lane] / (1.0f + std::exp(-gate[lane])) * up[lane]);
    }
  }
  if (last == intermediate && last % 2) {
    for (int64_t lane = 0; lane < width; ++lane) act[at(last, lane, width)] = 0;
  }
}

void down(const uint16_t* weight, int64_t row_stride, int64_t rows, int64_t columns, const uint16_t* panel,
          int64_t width, float* y) {
  for (int64_t row = 0; row < rows; ++row) dot(weight + row * row_stride, columns, panel, width, y + row * kPanel);
}

void reduce(const float* y, int64_t rows, int64_t width, const Reduction& r) {
  std::fill(r.squares, r.squares + width, 0.0f);
  for (int64_t row = 0; row < rows; ++row) {
    float sum = 0;
    for (int64_t lane = 0; lane < r.count; ++lane) {
      const float value = y[row * kPanel + lane];
      r.squares[lane] += value * value;
      r.out[r.tokens[lane] * r.out_stride + row] += r.gates[lane] * value;
      if (r.valid[lane]) {
        sum += value;
        *r.high = std::max(*r.high, value);
        *r.low = std::min(*r.low, value);
      }
    }
    r.sums[row] += sum;
  }
}

}  // namespace

const Tiles kPortableTiles{"portable", pack, gate_up, down, reduce};

}  // namespace cprune
