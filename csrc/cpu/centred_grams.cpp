// An expert to a thread at a time. Of the products those of a chunk of rows with the rows from its first one on.
#include "centred_grams.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace cprune {
namespace {

constexpr int64_t kPad = 16;  // between rows: they are not to meet in one set of the cache

}  // namespace

void centred_grams(const Outputs& y, float* out, Isa isa, const Threads& threads) {
  if (!y.samples) return;
  const Kernels& kernels = cprune::kernels(isa, y.type);
  const Tiles& tiles = *cprune::kernels(isa, Type::kFloat32).many;
  const int64_t size = y.samples, stride = ceil_div(y.columns, kPad) * kPad + kPad;
  const int64_t chunk_bytes = whole_lines(tiles.lane_bytes(y.columns) * kChunk);
  const int64_t scratch_stride = chunk_bytes + whole_lines((size * stride + kChunk * kRowBlock) * 4);
  const Aligned<char> scratch(scratch_stride * threads.count);
  std::vector<int64_t> row_numbers(size);
  std::iota(row_numbers.begin(), row_numbers.end(), 0);
  const std::vector<float> ones(kChunk, 1.0f);
  take_tasks(threads, y.experts, scratch.get(), scratch_stride, [&](int64_t expert, char* chunk) {
    auto* const sums = reinterpret_cast<float*>(chunk + chunk_bytes);
    float* const rows = sums + kChunk * kRowBlock;
    float* const gram = out + expert * size * size;
    kernels.centre(static_cast<const char*>(y.data) + expert * y.expert_stride * size_of(y.type), y.row_stride, size,
                   y.columns, rows, stride);
    std::fill_n(gram, size * size, 0.0f);
    for (int64_t first = 0; first < size; first += kChunk) {
      const int64_t count = std::min(kChunk, size - first);
      tiles.pack(rows, stride, &row_numbers[first], count, y.columns, chunk);
      for (int64_t row = first; row < size; row += kRowBlock) {
        const float* const factor = rows + row * stride;
        Reduction reduction{};
        reduction.count = count;
        reduction.tokens = &row_numbers[first];
        reduction.gates = ones.data();
        reduction.out = gram + row;
        reduction.out_stride = size;
        const int64_t some = std::min(kRowBlock, size - row);
        tiles.multiply(factor, {factor, 0, 0, 1}, stride, some, y.columns, chunk, count, sums);
        tiles.reduce(sums, some, reduction);
      }
    }
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j < i; ++j) gram[i * size + j] = gram[j * size + i];
    }
  });
}

}  // namespace cprune
