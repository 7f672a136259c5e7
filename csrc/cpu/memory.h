// Scratch memory and threads, whoever provides them.
#pragma once

#include <algorithm>
#include <atomic>
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

inline int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }  // of the cache

// work(task, memory) for tasks [0, count), each by whichever thread is free. `scratch` has `stride` bytes for each of
// the threads, which are its memory.
template <class Work>
void take_tasks(const Threads& threads, int64_t count, char* scratch, int64_t stride, const Work& work) {
  std::atomic<int64_t> thread{0}, next{0};
  threads.run([&] {
    char* const memory = scratch + stride * thread++;
    for (int64_t task; (task = next++) < count;) work(task, memory);
  });
}

}  // namespace cprune
