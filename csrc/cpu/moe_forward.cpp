// Two phases over slabs of chunks. First every chunk goes through gate_up, in tasks of a few chunks of one expert. Then
// each task owns some blocks of down's rows and walks all chunks in order: nothing is shared between threads, so
// nothing is locked, no output of every pair is ever in memory, and each sum has one order.
#include "moe_forward.h"

#include <algorithm>
#include <atomic>
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
constexpr int64_t kTasks = 32;                    // a thread, at least: none waits long for the last
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

// Whole vectors of an expert's tokens first; a rest of few goes by itself.
std::vector<Chunk> chunks_of(const Pairs& pairs, const Kernels& kernels) {
  std::vector<Chunk> chunks;
  for (size_t expert = 0; expert + 1 < pairs.offsets.size(); ++expert) {
    const int64_t end = pairs.offsets[expert + 1];
    for (int64_t first = pairs.offsets[expert], count; first < end; first += count) {
      count = std::min(kChunk, end - first);
      const int64_t rest = count % kernels.many->granule;
      if (rest < count && rest <= kernels.few_tokens) count -= rest;
      const Tiles* tiles = count <= kernels.few_tokens ? kernels.few : kernels.many;
      chunks.push_back({tiles, static_cast<int64_t>(expert), first, count, 0});
    }
  }
  return chunks;
}

int64_t bytes(const Tiles& tiles, int64_t count, int64_t columns) {
  return ceil_div(ceil_div(count, tiles.granule) * tiles.granule * tiles.lane_bytes(columns), 64) * 64;
}

const void* at(const void* data, int64_t element, Type type) {
  return static_cast<const char*>(data) + element * size_of(type);
}

// What the call for chunk p of `count` that share their weights fetches of the weights after them.
Following share(const void* weight, int64_t rows, int64_t p, int64_t count) {
  return {weight, rows * p / count, rows * (p + 1) / count, count};
}

struct GateUpTask {
  int64_t begin, end;   // chunks, all of one expert
  int64_t first, last;  // rows of the gate
};

// Chunks [begin, end) of a slab in tasks; few tasks for many threads are cut along the rows too.
std::vector<GateUpTask> gate_up_tasks(const std::vector<Chunk>& chunks, int64_t begin, int64_t end, int64_t at_most,
                                      int64_t inner, int64_t threads) {
  std::vector<GateUpTask> whole;
  for (int64_t p = begin, stop; p < end; p = stop) {
    for (stop = p; stop < end && chunks[stop].expert == chunks[p].expert;) ++stop;
    const int64_t parts = ceil_div(stop - p, at_most);
    for (int64_t i = 0; i < parts; ++i) {
      whole.push_back({p + (stop - p) * i / parts, p + (stop - p) * (i + 1) / parts, 0, inner});
    }
  }
  const int64_t wanted = ceil_div(kTasks * threads, std::max<int64_t>(1, whole.size()));
  const int64_t step = ceil_div(ceil_div(inner, wanted), kGateRows) * kGateRows;
  std::vector<GateUpTask> tasks;
  for (const GateUpTask& task : whole) {
    for (int64_t row = 0; row < inner; row += step) {
      tasks.push_back({task.begin, task.end, row, std::min(inner, row + step)});
    }
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

}  // namespace

void moe_forward(const MoeInput& in, void* out, const MoeStatistics* statistics, Isa isa, const Threads& threads) {
  const Kernels& kernels = cprune::kernels(isa, in.type);
  const int64_t blocks = ceil_div(in.hidden, kRowBlock);
  const int64_t run = std::clamp<int64_t>(blocks / (4 * threads.count), 1, kTaskBlocks);  // four tasks a thread
  const float infinity = std::numeric_limits<float>::infinity();
  std::vector<float> high(statistics ? blocks * in.experts : 0, -infinity);
  std::vector<float> low(statistics ? blocks * in.experts : 0, infinity);
  const bool floats = statistics || in.type == Type::kFloat32;  // of out
  const Aligned<float> sums(blocks * in.tokens * kRowBlock);    // block by block: its rows are next to one another

  if (statistics) std::fill_n(statistics->norms, in.tokens * in.top_k, 0.0f);
  const Pairs pairs = group(in, statistics ? statistics->valid : nullptr);
  std::vector<Chunk> chunks = chunks_of(pairs, kernels);
  const int64_t last_chunk = chunks.size();
  int64_t used = 0, slab_bytes = 0;
  std::vector<int64_t> slabs{0};  // the first chunk of each
  for (int64_t p = 0; p < last_chunk; ++p) {
    const int64_t size = bytes(*chunks[p].tiles, chunks[p].count, in.inner);
    if (used && used + size > kSlabBytes * threads.count) slabs.push_back(p), used = 0;
    chunks[p].place = used;
    used += size;
    slab_bytes = std::max(slab_bytes, used);
  }
  slabs.push_back(last_chunk);
  int64_t chunk_bytes = 0, slab_chunks = 0;
  for (const Chunk& chunk : chunks) chunk_bytes = std::max(chunk_bytes, bytes(*chunk.tiles, chunk.count, in.hidden));
  for (size_t s = 0; s + 1 < slabs.size(); ++s) slab_chunks = std::max(slab_chunks, slabs[s + 1] - slabs[s]);
  const int64_t in_cache = core_cache() / 2 / std::max<int64_t>(1, chunk_bytes);  // the other half is for weights
  const int64_t at_most = std::clamp<int64_t>(in_cache, 1, kTaskChunks);
  const int64_t output_bytes = ((at_most + 1) * kOutput + 2 * kRowBlock) * 4;
  const int64_t scratch_stride = output_bytes + at_most * chunk_bytes;
  const Aligned<char> act(slab_bytes), scratch(scratch_stride * threads.count);
  const Aligned<float> squares(statistics ? slab_chunks * blocks * kChunk : 0);

  for (size_t s = 0; s + 1 < slabs.size(); ++s) {
    const int64_t begin = slabs[s], end = slabs[s + 1];
    const auto tasks = gate_up_tasks(chunks, begin, end, at_most, in.inner, threads.count);
    std::atomic<int64_t> thread{0}, next{0};
    threads.run([&] {
      char* const memory = scratch.get() + scratch_stride * thread++;
      auto* const up = reinterpret_cast<float*>(memory);
      float* const gates = up + kOutput;  // of every chunk
      float* const bias = gates + at_most * kOutput;
      for (int64_t t; (t = next++) < static_cast<int64_t>(tasks.size());) {
        const GateUpTask& task = tasks[t];
        const int64_t expert = chunks[task.begin].expert;
        const auto packed = [&](int64_t p) { return memory + output_bytes + (p - task.begin) * chunk_bytes; };
        const auto weight = [&](int64_t row) {
          return at(in.gate_up.data, expert * in.gate_up.expert_stride + row * in.gate_up.row_stride, in.type);
        };
        for (int64_t p = task.begin; p < task.end; ++p) {
          chunks[p].tiles->pack(in.x, in.x_stride, &pairs.token[chunks[p].first], chunks[p].count, in.hidden,
                                packed(p));
        }
        for (int64_t row = task.first; row < task.last; row += kGateRows) {
          const int64_t rows = std::min(kGateRows, task.last - row);
          const float* gate_bias = bias_rows(in.gate_up_bias, expert, row, rows, in.type, kernels, bias);
          const float* up_bias =
              bias_rows(in.gate_up_bias, expert, in.inner + row, rows, in.type, kernels, bias + kRowBlock);
          const int64_t after = std::min(row + kGateRows, task.last - 1);
          const int64_t rows_after = std::min(kGateRows, task.last - after);
          for (int64_t p = task.begin; p < task.end; ++p) {
            const Following ups = share(weight(in.inner + row), rows, p - task.begin, task.end - task.begin);
            chunks[p].tiles->multiply(weight(row), ups, in.gate_up.row_stride, rows, in.hidden, packed(p),
                                      chunks[p].count, gates + (p - task.begin) * kOutput);
          }
          for (int64_t p = task.begin; p < task.end; ++p) {
            const Tiles& tiles = *chunks[p].tiles;
            const Following more = share(weight(after), rows_after, p - task.begin, task.end - task.begin);
            tiles.multiply(weight(in.inner + row), more, in.gate_up.row_stride, rows, in.hidden, packed(p),
                           chunks[p].count, up);
            tiles.activate(gates + (p - task.begin) * kOutput, up, gate_bias, up_bias, in.activation, row, rows,
                           in.inner, chunks[p].count, act.get() + chunks[p].place);
          }
        }
      }
    });

    thread = 0, next = 0;
    threads.run([&] {
      auto* const y = reinterpret_cast<float*>(scratch.get() + scratch_stride * thread++);
      float* const bias = y + kOutput;
      const auto rows_of = [&](int64_t block) { return std::min(kRowBlock, in.hidden - block * kRowBlock); };
      const auto sum_of = [&](int64_t block) { return sums.get() + block * in.tokens * kRowBlock; };  // [T, kRowBlock]
      const auto weight = [&](int64_t expert, int64_t block) {
        const int64_t row = block * kRowBlock;
        return at(in.down.data, expert * in.down.expert_stride + row * in.down.row_stride, in.type);
      };
      for (int64_t begin_block; (begin_block = run * next++) < blocks;) {
        const int64_t end_block = std::min(blocks, begin_block + run);
        for (int64_t block = begin_block; s == 0 && block < end_block; ++block) {
          std::fill_n(sum_of(block), in.tokens * kRowBlock, 0.0f);
          for (int64_t e = 0; statistics && e < in.experts; ++e) {
            std::fill_n(statistics->sums + e * in.hidden + block * kRowBlock, rows_of(block), 0.0f);
          }
        }
        for (int64_t first = begin, stop; first < end; first = stop) {
          const int64_t expert = chunks[first].expert;
          for (stop = first; stop < end && chunks[stop].expert == expert;) ++stop;
          for (int64_t block = begin_block; block < end_block; ++block) {
            const bool more = block + 1 < end_block;
            const void* after =
                more ? weight(expert, block + 1) : weight(chunks[std::min(stop, end - 1)].expert, begin_block);
            const int64_t row = block * kRowBlock, rows = rows_of(block),
                          rows_after = rows_of(more ? block + 1 : begin_block);
            for (int64_t p = first; p < stop; ++p) {
              const Chunk& chunk = chunks[p];
              Reduction reduction{};
              reduction.count = chunk.count;
              reduction.tokens = &pairs.token[chunk.first];
              reduction.gates = &pairs.gate[chunk.first];
              reduction.bias = bias_rows(in.down_bias, expert, row, rows, in.type, kernels, bias);
              reduction.out = sum_of(block);
              reduction.out_stride = kRowBlock;
              if (statistics) {
                reduction.valid = &pairs.valid[chunk.first];
                reduction.squares = squares.get() + (block * slab_chunks + p - begin) * kChunk;
                reduction.sums = statistics->sums + expert * in.hidden + row;
                reduction.high = &high[block * in.experts + expert];
                reduction.low = &low[block * in.experts + expert];
              }
              chunk.tiles->multiply(weight(expert, block), share(after, rows_after, p - first, stop - first),
                                    in.down.row_stride, rows, in.inner, act.get() + chunk.place, chunk.count, y);
              chunk.tiles->reduce(y, rows, reduction);
            }
          }
        }
        for (int64_t block = begin_block; end == last_chunk && block < end_block; ++block) {
          for (int64_t t = 0; t < in.tokens; ++t) {
            const float* from = sum_of(block) + t * kRowBlock;
            const int64_t place = t * in.hidden + block * kRowBlock;
            if (floats) {
              std::copy_n(from, rows_of(block), static_cast<float*>(out) + place);
            } else {
              kernels.narrow(from, rows_of(block), static_cast<char*>(out) + place * size_of(in.type));
            }
          }
        }
      }
    });

    for (int64_t p = begin; statistics && p < end; ++p) {
      for (int64_t i = 0; i < chunks[p].count; ++i) {
        float sum = 0;
        for (int64_t block = 0; block < blocks; ++block) {
          sum += squares.get()[(block * slab_chunks + p - begin) * kChunk + i];
        }
        statistics->norms[pairs.place[chunks[p].first + i]] = std::sqrt(sum);
      }
    }
  }

  if (!statistics) return;
  for (int64_t expert = 0; expert < in.experts; ++expert) {
    statistics->high[expert] = -infinity, statistics->low[expert] = infinity;
    for (int64_t block = 0; block < blocks; ++block) {
      statistics->high[expert] = std::max(statistics->high[expert], high[block * in.experts + expert]);
      statistics->low[expert] = std::min(statistics->low[expert], low[block * in.experts + expert]);
    }
  }
}

}  // namespace cprune
