// Which instructions to use is known at run time only; CMakeLists.txt says what was compiled.
#include <initializer_list>

#include "tiles.h"

namespace cprune {

bool supported(Isa isa) {
#ifdef CPRUNE_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512) return avx512;
  if (isa == Isa::kAvx512Bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return isa == Isa::kPortable;
}

Isa best_isa() {
  for (Isa isa : {Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2}) {
    if (supported(isa)) return isa;
  }
  return Isa::kPortable;
}

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

const Kernels& kernels(Isa isa, Type type) {
#ifdef CPRUNE_X86
  if (isa == Isa::kAvx512Bf16 && type == Type::kBfloat16) return avx512_bf16_kernels();
  if (isa == Isa::kAvx512Bf16 || isa == Isa::kAvx512) return avx512_kernels(type);
  if (isa == Isa::kAvx2) return avx2_kernels(type);
#endif
  (void)isa;
  return portable_kernels(type);
}

}  // namespace cprune
