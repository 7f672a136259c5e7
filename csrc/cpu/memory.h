// Scratch memory and threads, whoever provides them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>

namespace cprune {

// Calls its argument once on each of at most `count` threads and returns when all are done.
struct Threads {
  int64_t count;
  std::function<void(const std::function<void()>&)> run;
};

template <class T>
struct Aligned {  // uninitialised memory on cache lines
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> memory;
  explicit Aligned(int64_t count)
      : memory(static_cast<T*>(::operator new(std::max<int64_t>(count, 1) * sizeof(T), std::align_val_t{64}))) {}
  T* get() const { return memory.get(); }
};

}  // namespace cprune
