#pragma once

#include <algorithm>
#include <cstdint>

namespace cprune {
namespace {

// Lines of the rows of x on their way into the cache, a few at a time between products, so that memory never waits for
// those: runs of some columns, row after row. The first one is left to whoever reads it.
template <typename Element>
class Ahead {
 public:
  Ahead(const Element* x, int64_t row_stride, int64_t rows, int64_t columns, int64_t run)
      : x_(x), row_stride_(row_stride), rows_(rows), columns_(columns), run_(run), first_(run) {}

  // `lines` more, to the end of two runs from `column` on.
  void fetch(int64_t lines, int64_t column) {
    const int64_t last = std::min(columns_, column + 2 * run_);
    for (; lines > 0 && first_ < last; --lines, column_ += kLine) {
      if (column_ >= std::min(run_, columns_ - first_)) {
        column_ = 0;
        if (++row_ == rows_) {
          row_ = 0, first_ += run_;
          if (first_ >= last) return;
        }
      }
      __builtin_prefetch(x_ + row_ * row_stride_ + first_ + column_, 0, 2);
    }
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(Element);
  const Element* x_;
  int64_t row_stride_, rows_, columns_, run_;
  int64_t first_, row_ = 0, column_ = 0;
};

}  // namespace
}  // namespace cprune
