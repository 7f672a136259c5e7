// Inner products of all pairs of rows: G_ij = sum_p x_ip x_jp.
#pragma once

#include <cstdint>

#include "memory.h"
#include "tiles.h"

namespace cprune {

// x [rows, columns], columns contiguous; gram [rows, rows] float64, exactly symmetric. Windows of kGramColumns are
// summed in float32, all else in float64; the same bits for any number of threads.
void gram(const void* x, Type type, int64_t row_stride, int64_t rows, int64_t columns, double* gram, Isa isa,
          const Threads& threads);

}  // namespace cprune
