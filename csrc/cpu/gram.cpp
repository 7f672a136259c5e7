// Bound by the products for more than a few rows: rows (rows + 1) columns, of an x that is read from memory once.
#include "gram.h"

#include <algorithm>

namespace cprune {
namespace {

constexpr int64_t kParts = 64;  // of the columns at most, each with sums of its own

}  // namespace

void gram(const void* x, Type type, int64_t row_stride, int64_t rows, int64_t columns, double* gram, Isa isa,
          const Threads& threads) {
  if (!rows) return;
  const Kernels& kernels = cprune::kernels(isa, type);
  const int64_t windows = ceil_div(columns, kGramColumns), parts = std::min(kParts, windows), size = rows * rows;
  const int64_t scratch_stride = whole_lines(gram_bytes(rows));
  const Aligned<double> sums(parts * size);
  const Aligned<char> scratch(scratch_stride * threads.count);
  take_tasks(threads, parts, scratch.get(), scratch_stride, [&](int64_t part, char* memory) {
    double* const sum = sums.get() + part * size;
    std::fill_n(sum, size, 0.0);
    const int64_t first = windows * part / parts * kGramColumns;
    const int64_t last = std::min(columns, windows * (part + 1) / parts * kGramColumns);
    kernels.gram(static_cast<const char*>(x) + first * size_of(type), row_stride, rows, last - first, memory, sum);
  });
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i; j < rows; ++j) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += sums.get()[part * size + i * rows + j];
      gram[i * rows + j] = gram[j * rows + i] = sum;
    }
  }
}

}  // namespace cprune
