// Two phases over slabs of chunks. First every chunk goes through gate_up, in tasks of a few chunks of one expert. Then
// each task owns some blocks of down's rows and walks all chunks in order: nothing is shared between threads, so
// nothing is locked, no output of every pair is ever in memory, and each sum has one order.
#include "moe_forward.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "group_tokens.h"

namespace cprune {
namespace {

constexpr int64_t kTaskChunks = 8;                // of a task of the first phase, at most
constexpr int64_t kTaskBlocks = 8;                // of a task of the second
constexpr int64_t kSlabBytes = int64_t{4} << 20;  // of activations, a thread
constexpr int64_t kShares = 4;                    // of what is left, for each thread; one at a time
constexpr int64_t kOutput = kChunk * kRowBlock;   // floats of an output block

struct Chunk {
  const Tiles* tiles;
  int64_t expert;
  int64_t first, count;  // of its pairs, in the order by expert
  int64_t place;         // of its activations, bytes into the slab
};

struct Pairs {  // the (token, slot) pairs, grouped by expert, tokens ascending
  std::vector<int32_t> place, offsets;
  std::vector<int64_t> token;
  std::vector<float> gate;
  std::unique_ptr<bool[]> valid;
};

Pairs group(const MoeInput& in, const bool* valid) {
  const int64_t slots = in.tokens * in.top_k;
  Pairs pairs;
  pairs.place.resize(slots), pairs.offsets.resize(in.experts + 1);
  std::vector<int32_t> position(slots);
  group_tokens(in.index, slots, in.experts, pairs.place.data(), pairs.offsets.data(), position.data());
  const int64_t total = pairs.offsets.back();
  pairs.token.resize(total), pairs.gate.resize(total);
  if (valid) pairs.valid = std::make_unique<bool[]>(total);
  for (int64_t pair = 0; pair < total; ++pair) {
    pairs.token[pair] = pairs.place[pair] / in.top_k;
    pairs.gate[pair] = in.gates[pairs.place[pair]];
    if (valid) pairs.valid[pair] = valid[pairs.token[pair]];
  }
  return pairs;
}

// Of an expert's tokens that are left, those of the next chunk. Whole vectors of many go first, then the rest by
// itself; a rest of few takes another vector's tokens with it, as weights cost least where more tokens share them.
int64_t next_count(int64_t left, const Kernels& kernels) {
  if (left <= kernels.some_tokens) return left;
  const int64_t granule = kernels.many->granule;
  int64_t rest = left % granule;
  if (rest > kernels.some_tokens) rest = 0;
  if (rest && rest <= kernels.few_tokens && rest + granule <= kernels.some_tokens) rest += granule;
  return std::min(kChunk, left - rest);
}

const Tiles* tiles_of(int64_t count, const Kernels& kernels) {
  if (count <= kernels.few_tokens) return kernels.few;
  return count <= kernels.some_tokens ? kernels.some : kernels.many;
}

std::vector<Chunk> chunks_of(const Pairs& pairs, const Kernels& kernels) {
  std::vector<Chunk> chunks;
  for (size_t expert = 0; expert + 1 < pairs.offsets.size(); ++expert) {
    const int64_t end = pairs.offsets[expert + 1];
    for (int64_t first = pairs.offsets[expert], count; first < end; first += count) {
      count = next_count(end - first, kernels);
      chunks.push_back({tiles_of(count, kernels), static_cast<int64_t>(expert), first, count, 0});
    }
  }
  return chunks;
}

int64_t bytes(const Tiles& tiles, int64_t count, int64_t columns) {
  return whole_lines(ceil_div(count, tiles.granule) * tiles.granule * tiles.lane_bytes(columns));
}

const void* at(const void* data, int64_t element, Type type) {
  return static_cast<const char*>(data) + element * size_of(type);
}

// What the call for chunk p of `count` that share their weights fetches of the weights after them.
Following share(const void* weight, int64_t rows, int64_t p, int64_t count) {
  return {weight, rows * p / count, rows * (p + 1) / count, count};
}

// How the pairs go through, and the memory that takes.
struct Layout {
  std::vector<Chunk> chunks;
  std::vector<int64_t> slabs{0};  // the first chunk of each, and the end of the last
  int64_t slab_bytes = 0;         // of activations
  int64_t slab_chunks = 0;        // at most
  int64_t chunk_bytes = 0;        // of x, at most
  int64_t task_chunks = 0;        // of a task of the first phase, at most
  int64_t output_bytes = 0;       // of a thread's output blocks and biases, before its packed chunks
};

Layout layout_of(const Pairs& pairs, const MoeInput& in, const Kernels& kernels, int64_t threads) {
  Layout layout;
  layout.chunks = chunks_of(pairs, kernels);
  const int64_t last = layout.chunks.size();
  int64_t used = 0;
  for (int64_t p = 0; p < last; ++p) {
    Chunk& chunk = layout.chunks[p];
    const int64_t size = bytes(*chunk.tiles, chunk.count, in.inner);
    if (used && used + size > kSlabBytes * threads) layout.slabs.push_back(p), used = 0;
    chunk.place = used;
    used += size;
    layout.slab_bytes = std::max(layout.slab_bytes, used);
    layout.chunk_bytes = std::max(layout.chunk_bytes, bytes(*chunk.tiles, chunk.count, in.hidden));
  }
  layout.slabs.push_back(last);
  for (size_t s = 0; s + 1 < layout.slabs.size(); ++s) {
    layout.slab_chunks = std::max(layout.slab_chunks, layout.slabs[s + 1] - layout.slabs[s]);
  }
  const int64_t in_cache = core_cache() / 2 / std::max<int64_t>(1, layout.chunk_bytes);  // the other half: weights
  layout.task_chunks = std::clamp<int64_t>(in_cache, 1, kTaskChunks);
  layout.output_bytes = ((layout.task_chunks + 1) * kOutput + 2 * kRowBlock) * 4;
  return layout;
}

// After the chunks of the expert of chunk p, of those before `end`.
int64_t end_of_expert(const std::vector<Chunk>& chunks, int64_t p, int64_t end) {
  int64_t stop = p;
  while (stop < end && chunks[stop].expert == chunks[p].expert) ++stop;
  return stop;
}

struct GateUpTask {
  int64_t begin, end;  // chunks, all of one expert
};

// Chunks [begin, end) of a slab, at most some of an expert together.
std::vector<GateUpTask> gate_up_tasks(const std::vector<Chunk>& chunks, int64_t begin, int64_t end, int64_t at_most) {
  std::vector<GateUpTask> tasks;
  for (int64_t p = begin, stop; p < end; p = stop) {
    stop = end_of_expert(chunks, p, end);
    const int64_t parts = ceil_div(stop - p, at_most);
    for (int64_t i = 0; i < parts; ++i) tasks.push_back({p + (stop - p) * i / parts, p + (stop - p) * (i + 1) / parts});
  }
  return tasks;
}

// A bias's rows in float32, or null.
const float* bias_rows(const Biases& bias, int64_t expert, int64_t row, int64_t rows, Type type, const Kernels& kernels,
                       float* to) {
  if (!bias.data) return nullptr;
  kernels.widen(at(bias.data, expert * bias.expert_stride + row, type), rows, to);
  return to;
}

class Forward {
 public:
  Forward(const MoeInput& in, void* out, const MoeStatistics* statistics, Isa isa, const Threads& threads)
      : in_(in),
        out_(out),
        statistics_(statistics),
        threads_(threads),
        kernels_(cprune::kernels(isa, in.type)),
        blocks_(ceil_div(in.hidden, kRowBlock)),
        pairs_(group(in, statistics ? statistics->valid : nullptr)),
        layout_(layout_of(pairs_, in, kernels_, threads.count)),
        scratch_stride_(layout_.output_bytes + layout_.task_chunks * layout_.chunk_bytes),
        high_(statistics ? blocks_ * in.experts : 0, -kInfinity),
        low_(statistics ? blocks_ * in.experts : 0, kInfinity),
        sums_(blocks_ * in.tokens * kRowBlock),
        squares_(statistics ? layout_.slab_chunks * blocks_ * kChunk : 0),
        act_(layout_.slab_bytes),
        scratch_(scratch_stride_ * threads.count) {}

  void run() {
    if (statistics_) std::fill_n(statistics_->norms, in_.tokens * in_.top_k, 0.0f);
    for (size_t s = 0; s + 1 < layout_.slabs.size(); ++s) {
      const int64_t begin = layout_.slabs[s], end = layout_.slabs[s + 1];
      const auto tasks = gate_up_tasks(layout_.chunks, begin, end, layout_.task_chunks);
      const int64_t pieces = ceil_div(in_.inner, kGateRows);  // of a task
      share_out(pieces * tasks.size(), pieces, [&](int64_t first, int64_t last, char* memory) {
        for (int64_t stop; first < last; first = stop) {
          const int64_t task = first / pieces;
          stop = std::min(last, (task + 1) * pieces);
          gate_up(tasks[task], (first - task * pieces) * kGateRows, (stop - task * pieces) * kGateRows, memory);
        }
      });
      share_out(blocks_, kTaskBlocks,
                [&](int64_t first, int64_t last, char* memory) { down(first, last, begin, end, memory); });
      if (statistics_) write_norms(begin, end);
    }
    if (statistics_) write_extremes();
  }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  // work(first, last, a thread's memory) for `count` pieces of work by whichever thread is free, at most so many at a
  // time: ever fewer, so that none waits long for the last.
  template <typename Work>
  void share_out(int64_t count, int64_t at_most, const Work& work) {
    std::vector<int64_t> ends{0};
    while (ends.back() < count) {
      const int64_t share = (count - ends.back()) / (kShares * threads_.count);
      ends.push_back(ends.back() + std::clamp<int64_t>(share, 1, at_most));
    }
    const int64_t shares = ends.size() - 1;
    take_tasks(threads_, shares, scratch_.get(), scratch_stride_,
               [&](int64_t i, char* memory) { work(ends[i], ends[i + 1], memory); });
  }

  // Rows [first, last) of the gate, and as many of up.
  void gate_up(const GateUpTask& task, int64_t first, int64_t last, char* memory) {
    last = std::min(last, in_.inner);
    const auto& chunks = layout_.chunks;
    const int64_t expert = chunks[task.begin].expert, count = task.end - task.begin;
    auto* const up = reinterpret_cast<float*>(memory);
    float* const gates = up + kOutput;  // of every chunk
    float* const bias = gates + layout_.task_chunks * kOutput;
    const auto packed = [&](int64_t p) {
      return memory + layout_.output_bytes + (p - task.begin) * layout_.chunk_bytes;
    };
    const auto weight = [&](int64_t row) {
      return at(in_.gate_up.data, expert * in_.gate_up.expert_stride + row * in_.gate_up.row_stride, in_.type);
    };
    for (int64_t p = task.begin; p < task.end; ++p) {
      chunks[p].tiles->pack(in_.x, in_.x_stride, &pairs_.token[chunks[p].first], chunks[p].count, in_.hidden,
                            packed(p));
    }
    for (int64_t row = first; row < last; row += kGateRows) {
      const int64_t rows = std::min(kGateRows, last - row);
      const float* gate_bias = bias_rows(in_.gate_up_bias, expert, row, rows, in_.type, kernels_, bias);
      const float* up_bias =
          bias_rows(in_.gate_up_bias, expert, in_.inner + row, rows, in_.type, kernels_, bias + kRowBlock);
      const int64_t after = std::min(row + kGateRows, last - 1);
      const int64_t rows_after = std::min(kGateRows, last - after);
      for (int64_t p = task.begin; p < task.end; ++p) {
        const Following ups = share(weight(in_.inner + row), rows, p - task.begin, count);
        chunks[p].tiles->multiply(weight(row), ups, in_.gate_up.row_stride, rows, in_.hidden, packed(p),
                                  chunks[p].count, gates + (p - task.begin) * kOutput);
      }
      for (int64_t p = task.begin; p < task.end; ++p) {
        const Tiles& tiles = *chunks[p].tiles;
        const Following more = share(weight(after), rows_after, p - task.begin, count);
        tiles.multiply(weight(in_.inner + row), more, in_.gate_up.row_stride, rows, in_.hidden, packed(p),
                       chunks[p].count, up);
        tiles.activate(gates + (p - task.begin) * kOutput, up, gate_bias, up_bias, in_.activation, row, rows, in_.inner,
                       chunks[p].count, act_.get() + chunks[p].place);
      }
    }
  }

  // Blocks [first, last) of down's rows, for chunks [begin, end) of a slab.
  void down(int64_t first, int64_t last, int64_t begin, int64_t end, char* memory) {
    const auto& chunks = layout_.chunks;
    auto* const y = reinterpret_cast<float*>(memory);
    for (int64_t block = first; begin == 0 && block < last; ++block) clear(block);
    for (int64_t p = begin, stop; p < end; p = stop) {
      stop = end_of_expert(chunks, p, end);
      for (int64_t block = first; block < last; ++block) {
        const bool more = block + 1 < last;
        const int64_t expert = chunks[more ? p : std::min(stop, end - 1)].expert, after = more ? block + 1 : first;
        down_block(block, p, stop, begin, down_weight(expert, after), rows_of(after), y);
      }
    }
    const int64_t last_chunk = chunks.size();
    for (int64_t block = first; end == last_chunk && block < last; ++block) write(block);
  }

  // One block of an expert's rows for its chunks [first, stop); `after` has the rows that come next.
  void down_block(int64_t block, int64_t first, int64_t stop, int64_t slab, const void* after, int64_t rows_after,
                  float* y) {
    const int64_t expert = layout_.chunks[first].expert, row = block * kRowBlock, rows = rows_of(block);
    const float* bias = bias_rows(in_.down_bias, expert, row, rows, in_.type, kernels_, y + kOutput);
    for (int64_t p = first; p < stop; ++p) {
      const Chunk& chunk = layout_.chunks[p];
      Reduction reduction{};
      reduction.count = chunk.count;
      reduction.tokens = &pairs_.token[chunk.first];
      reduction.gates = &pairs_.gate[chunk.first];
      reduction.bias = bias;
      reduction.out = sum_of(block);
      reduction.out_stride = kRowBlock;
      if (statistics_) {
        reduction.valid = &pairs_.valid[chunk.first];
        reduction.squares = squares_of(block, p - slab);
        reduction.sums = statistics_->sums + expert * in_.hidden + row;
        reduction.high = &high_[block * in_.experts + expert];
        reduction.low = &low_[block * in_.experts + expert];
      }
      chunk.tiles->multiply(down_weight(expert, block), share(after, rows_after, p - first, stop - first),
                            in_.down.row_stride, rows, in_.inner, act_.get() + chunk.place, chunk.count, y);
      chunk.tiles->reduce(y, rows, reduction);
    }
  }

  void clear(int64_t block) {
    std::fill_n(sum_of(block), in_.tokens * kRowBlock, 0.0f);
    for (int64_t expert = 0; statistics_ && expert < in_.experts; ++expert) {
      std::fill_n(statistics_->sums + expert * in_.hidden + block * kRowBlock, rows_of(block), 0.0f);
    }
  }

  void write(int64_t block) {
    const bool floats = statistics_ || in_.type == Type::kFloat32;
    for (int64_t t = 0; t < in_.tokens; ++t) {
      const float* from = sum_of(block) + t * kRowBlock;
      const int64_t place = t * in_.hidden + block * kRowBlock;
      if (floats) {
        std::copy_n(from, rows_of(block), static_cast<float*>(out_) + place);
      } else {
        kernels_.narrow(from, rows_of(block), static_cast<char*>(out_) + place * size_of(in_.type));
      }
    }
  }

  void write_norms(int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const Chunk& chunk = layout_.chunks[p];
      for (int64_t i = 0; i < chunk.count; ++i) {
        float sum = 0;
        for (int64_t block = 0; block < blocks_; ++block) sum += squares_of(block, p - begin)[i];
        statistics_->norms[pairs_.place[chunk.first + i]] = std::sqrt(sum);
      }
    }
  }

  void write_extremes() {
    for (int64_t expert = 0; expert < in_.experts; ++expert) {
      float &high = statistics_->high[expert] = -kInfinity, &low = statistics_->low[expert] = kInfinity;
      for (int64_t block = 0; block < blocks_; ++block) {
        high = std::max(high, high_[block * in_.experts + expert]);
        low = std::min(low, low_[block * in_.experts + expert]);
      }
    }
  }

  int64_t rows_of(int64_t block) const { return std::min(kRowBlock, in_.hidden - block * kRowBlock); }
  float* sum_of(int64_t block) const { return sums_.get() + block * in_.tokens * kRowBlock; }  // [T, kRowBlock]
  float* squares_of(int64_t block, int64_t p) const {  // [kChunk], for chunk p of a slab
    return squares_.get() + (block * layout_.slab_chunks + p) * kChunk;
  }
  const void* down_weight(int64_t expert, int64_t block) const {
    const int64_t row = block * kRowBlock;
    return at(in_.down.data, expert * in_.down.expert_stride + row * in_.down.row_stride, in_.type);
  }

  const MoeInput& in_;
  void* const out_;
  const MoeStatistics* const statistics_;
  const Threads& threads_;
  const Kernels& kernels_;
  const int64_t blocks_;
  const Pairs pairs_;
  const Layout layout_;
  const int64_t scratch_stride_;
  std::vector<float> high_, low_;
  const Aligned<float> sums_;  // block by block: its rows are next to one another
  const Aligned<float> squares_;
  const Aligned<char> act_, scratch_;
};

}  // namespace

void moe_forward(const MoeInput& in, void* out, const MoeStatistics* statistics, Isa isa, const Threads& threads) {
  Forward(in, out, statistics, isa, threads).run();
}

}  // namespace cprune
