// Which instructions to use is known at run time only; CMakeLists.txt says what was compiled.
#include <cstdlib>
#include <cstring>

#include "tiles.h"

#ifdef __linux__
#include <unistd.h>
#endif
#if defined(CPRUNE_AMX) && !defined(CPRUNE_EMULATE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#endif

namespace cprune {
namespace {

// Whether the processor has tiles of bf16, the system saves them, and this process may use them: it has to ask for the
// 8 KB that they take in every thread's state.
[[maybe_unused]] bool amx_allowed() {
#if defined(CPRUNE_EMULATE_AMX)
  return true;
#elif defined(CPRUNE_AMX) && defined(__linux__) && defined(SYS_arch_prctl)
  constexpr unsigned kXsave = 1u << 27, kBf16 = 1u << 22, kTile = 1u << 24, kTileState = 3u << 17;
  constexpr long kAskFor = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kXsave)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16) || !(d & kTile)) return false;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kTileState) == kTileState && syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

bool supported(Isa isa) {
#ifdef CPRUNE_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512) return avx512;
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (isa == Isa::kAvx512Bf16) return bf16;
  static const bool amx = bf16 && amx_allowed();
  if (isa == Isa::kAmxBf16) return amx;
#endif
  return isa == Isa::kPortable;
}

int64_t core_cache() {
  constexpr int64_t kUsual = 1 << 20;
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t told = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return told > 0 ? told : kUsual;
#else
  return kUsual;
#endif
}

Isa best_isa() {
  static const Isa best = [] {
    const char* most = std::getenv("CPRUNE_MAX_ISA");
    Isa found = Isa::kPortable;
    for (Isa isa : kIsas) {
      if (supported(isa)) found = isa;
      if (most && std::strcmp(most, name_of(isa)) == 0) break;
    }
    return found;
  }();
  return best;
}

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kAmxBf16:
      return "amx_bf16";
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
#ifdef CPRUNE_AMX
  if (isa == Isa::kAmxBf16 && type == Type::kBfloat16) return amx_bf16_kernels();
#endif
#ifdef CPRUNE_X86
  if (isa == Isa::kAvx512Bf16 && type == Type::kBfloat16) return avx512_bf16_kernels();
  if (isa >= Isa::kAvx512) return avx512_kernels(type);
  if (isa == Isa::kAvx2) return avx2_kernels(type);
#endif
  (void)isa;
  return portable_kernels(type);
}

}  // namespace cprune
