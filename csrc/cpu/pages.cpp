#include "pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace cprune {

int64_t use_large_pages(const void* data, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers do not know
  const uintptr_t from = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (from + kPage - 1) / kPage * kPage, last = (from + bytes) / kPage * kPage;
  if (first < last && madvise(reinterpret_cast<void*>(first), last - first, kCollapse) == 0) {
    return static_cast<int64_t>(last - first);
  }
#endif
  return 0;
}

}  // namespace cprune
