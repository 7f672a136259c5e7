// The tiles for AVX-512 F, BW, DQ and VL.
#include "dots.h"

namespace cprune {

const Kernels& avx512_kernels(Type type) { return widened_kernels(type); }

}  // namespace cprune
