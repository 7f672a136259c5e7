// The norm of a model's rows, its roundings where models have them:
//     out = weight * (x / sqrt(mean(x^2) + epsilon)), what is in brackets rounded to the type before
#pragma once

#include <cstdint>

#include "memory.h"
#include "tiles.h"

namespace cprune {

struct NormInput {
  Type type;
  int64_t rows, columns;
  const void* x;       // [rows, columns]
  const void* weight;  // [columns]
  float epsilon;
};

// out [rows, columns] in the type of the input.
void rms_norm(const NormInput& in, void* out, Isa isa, const Threads& threads);

}  // namespace cprune
