// Memory in large pages: weights are read once a call, and with small pages much of that is looking up addresses.
#pragma once

#include <cstdint>

namespace cprune {

// Moves what lies in [data, data + bytes) to pages of 2 MB, in place and at once. Returns the bytes that now are in
// such pages, whole ones only; 0 where the system cannot (Linux from 6.1 can, but for files).
int64_t use_large_pages(const void* data, int64_t bytes);

}  // namespace cprune
