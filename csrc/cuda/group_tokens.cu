// Stable counting sort of (token, slot) pairs by expert, with the results of csrc/cpu/group_tokens.h, bit for bit.
//
// A pair's rank among those of its expert is a count of earlier bits in ballots of a warp, never the outcome of a race:
// no atomics, the same numbers in every run. Bound by latency at the sizes of one layer.
//
// All launches have kThreads threads and no dynamic shared memory. Up to kSmallPairs pairs:
//     group_small<<<1>>>(index, pairs, experts, order, offsets, position)
// beyond, with blocks = ceil(pairs / kThreads) and counts [experts, blocks] of int32 as workspace:
//     group_count<<<blocks>>>(index, pairs, experts, counts)
//     group_scan<<<1>>>(counts, experts, blocks, offsets)
//     group_scatter<<<blocks>>>(index, pairs, experts, counts, offsets, order, position)
// Names end in _i32 or _i64, the type of index. order [pairs], offsets [experts + 1] and position [pairs] are of int32.
// Strides are none: all arrays are contiguous. experts <= kMostExperts for group_small.
#include <cstdint>

namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kSmallPairs = 4096;   // held in shared memory
constexpr int kMostExperts = 4096;  // counted in shared memory

// An expert outside [0, experts) is -1: no expert's number.
template <class Index>
__device__ int expert_of(const Index* index, int64_t pair, int64_t pairs, int experts) {
  if (pair >= pairs) return -1;
  const Index expert = index[pair];
  return expert >= 0 && expert < experts ? static_cast<int>(expert) : -1;
}

__device__ unsigned earlier_lanes() { return (1u << (threadIdx.x % 32)) - 1; }

// How many of the `count` experts, a multiple of 32, are `expert`; for a whole warp.
__device__ int count_of(const int* experts, int count, int expert) {
  int total = 0;
  for (int i = 0; i < count; i += 32) {
    total += __popc(__ballot_sync(~0u, experts[i + threadIdx.x % 32] == expert));
  }
  return total;
}

// Places the pairs [first, first + count) of `expert` from `place` on; for a whole warp.
__device__ void place_all(const int* experts, int count, int expert, int place, int64_t first, int* order,
                          int* position) {
  for (int i = 0; i < count; i += 32) {
    const int lane = i + threadIdx.x % 32;
    const bool mine = experts[lane] == expert;
    const unsigned all = __ballot_sync(~0u, mine);
    if (mine) {
      const int at = place + __popc(all & earlier_lanes());
      order[at] = static_cast<int>(first + lane);
      position[first + lane] = at;
    }
    place += __popc(all);
  }
}

// Exclusive sums of values [count] in place, and what all sum up to; for a whole block.
__device__ int scan(int* values, int64_t count) {
  __shared__ int warps[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int before = 0;
  for (int64_t first = 0; first < count; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const int value = i < count ? values[i] : 0;
    int sum = value;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) warps[warp] = sum;
    __syncthreads();
    int total = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) sum += total;
      total += warps[w];
    }
    if (i < count) values[i] = before + sum - value;
    before += total;
    __syncthreads();
  }
  return before;
}

template <class Index>
__device__ void small(const Index* index, int64_t pairs, int experts, int* order, int* offsets, int* position) {
  __shared__ int expert_at[kSmallPairs], counts[kMostExperts];
  const int padded = static_cast<int>((pairs + 31) / 32 * 32);
  for (int pair = threadIdx.x; pair < padded; pair += kThreads) {
    expert_at[pair] = expert_of(index, pair, pairs, experts);
    if (pair < pairs && expert_at[pair] < 0) position[pair] = -1;
  }
  __syncthreads();
  for (int expert = threadIdx.x / 32; expert < experts; expert += kWarps) {
    const int count = count_of(expert_at, padded, expert);
    if (threadIdx.x % 32 == 0) counts[expert] = count;
  }
  __syncthreads();
  const int total = scan(counts, experts);
  for (int expert = threadIdx.x; expert < experts; expert += kThreads) offsets[expert] = counts[expert];
  if (threadIdx.x == 0) offsets[experts] = total;
  for (int64_t i = total + threadIdx.x; i < pairs; i += kThreads) order[i] = -1;
  for (int expert = threadIdx.x / 32; expert < experts; expert += kWarps) {
    place_all(expert_at, padded, expert, counts[expert], 0, order, position);
  }
}

template <class Index>
__device__ void count(const Index* index, int64_t pairs, int experts, int* counts) {
  __shared__ int expert_at[kThreads];
  expert_at[threadIdx.x] = expert_of(index, int64_t{blockIdx.x} * kThreads + threadIdx.x, pairs, experts);
  __syncthreads();
  for (int expert = threadIdx.x / 32; expert < experts; expert += kWarps) {
    const int total = count_of(expert_at, kThreads, expert);
    if (threadIdx.x % 32 == 0) counts[int64_t{expert} * gridDim.x + blockIdx.x] = total;
  }
}

template <class Index>
__device__ void scatter(const Index* index, int64_t pairs, int experts, const int* counts, const int* offsets,
                        int* order, int* position) {
  __shared__ int expert_at[kThreads];
  const int64_t first = int64_t{blockIdx.x} * kThreads, pair = first + threadIdx.x;
  expert_at[threadIdx.x] = expert_of(index, pair, pairs, experts);
  if (pair < pairs && expert_at[threadIdx.x] < 0) position[pair] = -1;
  if (pair < pairs && pair >= offsets[experts]) order[pair] = -1;
  __syncthreads();
  for (int expert = threadIdx.x / 32; expert < experts; expert += kWarps) {
    const int place = counts[int64_t{expert} * gridDim.x + blockIdx.x];
    place_all(expert_at, kThreads, expert, place, first, order, position);
  }
}

}  // namespace

extern "C" {

__global__ void __launch_bounds__(kThreads)
    group_small_i32(const int32_t* index, int64_t pairs, int experts, int* order, int* offsets, int* position) {
  small(index, pairs, experts, order, offsets, position);
}

__global__ void __launch_bounds__(kThreads)
    group_small_i64(const int64_t* index, int64_t pairs, int experts, int* order, int* offsets, int* position) {
  small(index, pairs, experts, order, offsets, position);
}

__global__ void __launch_bounds__(kThreads)
    group_count_i32(const int32_t* index, int64_t pairs, int experts, int* counts) {
  count(index, pairs, experts, counts);
}

__global__ void __launch_bounds__(kThreads)
    group_count_i64(const int64_t* index, int64_t pairs, int experts, int* counts) {
  count(index, pairs, experts, counts);
}

__global__ void __launch_bounds__(kThreads) group_scan(int* counts, int experts, int blocks, int* offsets) {
  const int total = scan(counts, int64_t{experts} * blocks);
  for (int expert = threadIdx.x; expert < experts; expert += kThreads) {
    offsets[expert] = counts[int64_t{expert} * blocks];
  }
  if (threadIdx.x == 0) offsets[experts] = total;
}

__global__ void __launch_bounds__(kThreads)
    group_scatter_i32(const int32_t* index, int64_t pairs, int experts, const int* counts, const int* offsets,
                      int* order, int* position) {
  scatter(index, pairs, experts, counts, offsets, order, position);
}

__global__ void __launch_bounds__(kThreads)
    group_scatter_i64(const int64_t* index, int64_t pairs, int experts, const int* counts, const int* offsets,
                      int* order, int* position) {
  scatter(index, pairs, experts, counts, offsets, order, position);
}

}  // extern "C"
