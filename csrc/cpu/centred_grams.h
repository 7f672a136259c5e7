// Of every expert's outputs y [samples, columns] the Gram of the centred rows, up to a factor of the expert's own:
//     out_ij = <c_i, c_j>,  c_i = 2^n (y_i - mean of all y_i), the greatest number of all c in [1, 2)
// What the experts' linear CKA is made of. A factor leaves CKA as it is, and keeps squares in float32's range; the
// first row is taken from all before their mean, so that equal rows give exactly 0.
#pragma once

#include <cstdint>

#include "memory.h"
#include "tiles.h"

namespace cprune {

struct Outputs {
  Type type;
  int64_t experts, samples, columns;
  const void* data;                   // columns are contiguous
  int64_t expert_stride, row_stride;  // in elements
};

// out [experts, samples, samples], exactly symmetric: sums in float32, the same bits for any number of threads.
void centred_grams(const Outputs& y, float* out, Isa isa, const Threads& threads);

}  // namespace cprune
