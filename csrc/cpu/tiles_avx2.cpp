// The tiles for AVX2, FMA and F16C.
#include "dots.h"

namespace cprune {

const Kernels& avx2_kernels(Type type) { return widened_kernels(type); }

}  // namespace cprune
