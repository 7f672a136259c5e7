// Two phases over slabs of panels. First every panel goes through gate_up, in tasks of a few panels of one expert. Then
// each task owns a block of down's rows and walks all panels in order: nothing is shared between threads, so nothing is
// locked, no output of every pair is ever in memory, and each sum has one order.
#include "moe_forward.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "tiles.h"

namespace cprune {
namespace {

constexpr int64_t kPackedBytes = 512 << 10;  // packed tokens that one task of the first phase keeps in its L2 cache
constexpr int64_t kSlabBytes = int64_t{4} << 20;  // of activations, a thread

const Tiles& best_tiles() {
#ifdef CPRUNE_AVX512_BF16
  if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    return kAvx512Bf16Tiles;
  }
#endif
  return kPortableTiles;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

struct Panel {
  int64_t expert;
  int64_t first;  // of its pairs, in the order by expert
  int64_t count, width;
  int64_t lane;  // of its first token, in the slab
};

struct Pairs {  // the (token, slot) pairs, grouped by expert, tokens ascending
  std::vector<int64_t> place, token;
  std::vector<float> gate;
  std::unique_ptr<bool[]> valid;
  std::vector<Panel> panels;
};

Pairs group(const MoeInput& in) {
  const int64_t slots = in.tokens * in.top_k;
  std::vector<int64_t> start(in.experts + 1, 0);
  const auto routed = [&](int64_t place) { return in.index[place] >= 0 && in.index[place] < in.experts; };
  for (int64_t place = 0; place < slots; ++place) {
    if (routed(place)) ++start[in.index[place] + 1];
  }
  Pairs pairs;
  for (int64_t expert = 0; expert < in.experts; ++expert) {
    start[expert + 1] += start[expert];
    for (int64_t first = start[expert]; first < start[expert + 1]; first += kPanel) {
      const int64_t count = std::min(kPanel, start[expert + 1] - first);
      pairs.panels.push_back({expert, first, count, ceil_div(count, 16) * 16, 0});
    }
  }
  const int64_t total = start[in.experts];
  pairs.place.resize(total), pairs.token.resize(total), pairs.gate.resize(total);
  pairs.valid = std::make_unique<bool[]>(total);
  for (int64_t place = 0; place < slots; ++place) {
    if (!routed(place)) continue;
    const int64_t pair = start[in.index[place]]++;
    pairs.place[pair] = place;
    pairs.token[pair] = place / in.top_k;
    pairs.gate[pair] = in.gates[place];
    pairs.valid[pair] = in.valid[place / in.top_k];
  }
  return pairs;
}

struct GateUpTask {
  int64_t begin, end;   // panels, all of one expert
  int64_t first, last;  // rows of the intermediate
};

// Panels [begin, end) of a slab in tasks; few tasks for many threads are cut along the rows too.
std::vector<GateUpTask> gate_up_tasks(const std::vector<Panel>& panels, int64_t begin, int64_t end, int64_t at_most,
                                      int64_t intermediate, int64_t threads) {
  std::vector<GateUpTask> whole;
  for (int64_t p = begin, stop; p < end; p = stop) {
    for (stop = p; stop < end && panels[stop].expert == panels[p].expert;) ++stop;
    const int64_t parts = ceil_div(stop - p, at_most);
    for (int64_t i = 0; i < parts; ++i) {
      whole.push_back({p + (stop - p) * i / parts, p + (stop - p) * (i + 1) / parts, 0, intermediate});
    }
  }
  const int64_t wanted = ceil_div(4 * threads, std::max<int64_t>(1, whole.size()));
  const int64_t step = ceil_div(std::max(ceil_div(intermediate, wanted), int64_t{32}), kGateStep) * kGateStep;
  std::vector<GateUpTask> tasks;
  for (const GateUpTask& task : whole) {
    for (int64_t row = 0; row < intermediate; row += step) {
      tasks.push_back({task.begin, task.end, row, std::min(intermediate, row + step)});
    }
  }
  return tasks;
}

}  // namespace

const char* backend() { return best_tiles().name; }

void moe_forward(const MoeInput& in, const MoeOutput& out, bool portable, int64_t threads,
                 const OnThreads& on_threads) {
  const Tiles& tiles = portable ? kPortableTiles : best_tiles();
  const int64_t x_lane = ceil_div(in.hidden, 2) * 2, act_lane = ceil_div(in.intermediate, 2) * 2;
  const int64_t blocks = ceil_div(in.hidden, kRowBlock);
  const float infinity = std::numeric_limits<float>::infinity();
  std::vector<float> high(blocks * in.experts, -infinity), low(blocks * in.experts, infinity);

  Pairs pairs = group(in);
  std::vector<Panel>& panels = pairs.panels;
  const int64_t slab_lanes = std::max(kPanel, kSlabBytes * threads / 2 / act_lane);
  int64_t lanes = 0, most_lanes = 0;
  std::vector<int64_t> slabs;  // the first panel of each
  for (size_t p = 0; p < panels.size(); ++p) {
    if (slabs.empty() || lanes + panels[p].width > slab_lanes) slabs.push_back(p), lanes = 0;
    panels[p].lane = lanes;
    lanes += panels[p].width;
    most_lanes = std::max(most_lanes, lanes);
  }
  const int64_t packed_panels = std::max<int64_t>(1, kPackedBytes / (kPanel * x_lane * 2));
  const int64_t scratch_bytes = std::max(packed_panels * kPanel * x_lane * 2, kRowBlock * kPanel * int64_t{4});
  const int64_t scratch_stride = ceil_div(scratch_bytes, 64) * 64;
  const Aligned<uint16_t> act(most_lanes * act_lane);
  const Aligned<float> squares(most_lanes * blocks);
  const Aligned<char> scratch(panels.empty() ? 0 : scratch_stride * threads);

  for (size_t s = 0; s < slabs.size(); ++s) {
    const int64_t begin = slabs[s], end = s + 1 < slabs.size() ? slabs[s + 1] : panels.size();
    const int64_t slab_width = panels[end - 1].lane + panels[end - 1].width;

    const auto tasks = gate_up_tasks(panels, begin, end, packed_panels, in.intermediate, threads);
    std::atomic<int64_t> thread{0}, next{0};
    on_threads([&] {
      auto* packed = reinterpret_cast<uint16_t*>(scratch.get() + scratch_stride * thread++);
      for (int64_t t; (t = next++) < static_cast<int64_t>(tasks.size());) {
        const GateUpTask& task = tasks[t];
        const uint16_t* weight = in.gate_up.data + panels[task.begin].expert * in.gate_up.expert_stride;
        for (int64_t p = task.begin; p < task.end; ++p) {
          tiles.pack(in.x, in.x_stride, &pairs.token[panels[p].first], panels[p].count, panels[p].width, in.hidden,
                     packed + (p - task.begin) * kPanel * x_lane);
        }
        for (int64_t row = task.first; row < task.last; row += kGateStep) {  // these weights stay in the L1 cache
          for (int64_t p = task.begin; p < task.end; ++p) {
            tiles.gate_up(weight, in.gate_up.row_stride, in.hidden, in.intermediate, row,
                          std::min(task.last, row + kGateStep), packed + (p - task.begin) * kPanel * x_lane,
                          panels[p].width, act.get() + panels[p].lane * act_lane);
          }
        }
      }
    });

    thread = 0, next = 0;
    on_threads([&] {
      auto* y = reinterpret_cast<float*>(scratch.get() + scratch_stride * thread++);
      for (int64_t block; (block = next++) < blocks;) {
        const int64_t row = block * kRowBlock, rows = std::min(kRowBlock, in.hidden - row);
        for (int64_t p = begin; p < end; ++p) {
          const Panel& panel = panels[p];
          tiles.down(in.down.data + panel.expert * in.down.expert_stride + row * in.down.row_stride, in.down.row_stride,
                     rows, in.intermediate, act.get() + panel.lane * act_lane, panel.width, y);
          tiles.reduce(y, rows, panel.width,
                       {panel.count, &pairs.token[panel.first], &pairs.gate[panel.first], &pairs.valid[panel.first],
                        out.out + row, in.hidden, squares.get() + block * slab_width + panel.lane,
                        out.sums + panel.expert * in.hidden + row, &high[block * in.experts + panel.expert],
                        &low[block * in.experts + panel.expert]});
        }
      }
    });

    for (int64_t p = begin; p < end; ++p) {
      for (int64_t i = 0; i < panels[p].count; ++i) {
        float sum = 0;
        for (int64_t block = 0; block < blocks; ++block) sum += squares.get()[block * slab_width + panels[p].lane + i];
        out.norms[pairs.place[panels[p].first + i]] = std::sqrt(sum);
      }
    }
  }

  for (int64_t expert = 0; expert < in.experts; ++expert) {
    out.high[expert] = -infinity, out.low[expert] = infinity;
    for (int64_t block = 0; block < blocks; ++block) {
      out.high[expert] = std::max(out.high[expert], high[block * in.experts + expert]);
      out.low[expert] = std::min(out.low[expert], low[block * in.experts + expert]);
    }
  }
}

}  // namespace cprune
