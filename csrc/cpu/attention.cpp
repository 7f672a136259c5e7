// A task has some chunks of queries of one head. Their scores with all keys up to the last query are in memory at a
// time: for a few thousand tokens they stay in the core's cache.
#include "attention.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace cprune {
namespace {

constexpr int64_t kTasks = 4;  // a thread, at least: none waits long for the last
constexpr int64_t kPad = 32;   // between rows of values: they are not to meet in one set of the cache

const char* head_of(const HeadRows& rows, int64_t batch, int64_t head, Type type) {
  return static_cast<const char*>(rows.data) + (batch * rows.batch_stride + head * rows.head_stride) * size_of(type);
}

class Attention {
 public:
  Attention(const AttentionInput& in, void* out, Isa isa, const Threads& threads)
      : in_(in),
        out_(out),
        threads_(threads),
        kernels_(cprune::kernels(isa, in.type)),
        tiles_(*kernels_.many),
        chunks_(ceil_div(in.tokens, kChunk)),
        parts_(std::clamp<int64_t>(ceil_div(kTasks * threads.count, std::max<int64_t>(1, in.batch * in.heads)), 1,
                                   std::max<int64_t>(1, chunks_))),
        value_stride_(ceil_div(in.tokens, 32) * 32 + kPad),
        query_bytes_(whole_lines(tiles_.lane_bytes(in.depth) * kChunk)),
        score_bytes_(ceil_div(in.tokens, kRowBlock) * kRowBlock * kChunk * 4),
        weight_bytes_(whole_lines(tiles_.lane_bytes(in.tokens) * kChunk)),
        value_bytes_(whole_lines(in.width * value_stride_ * size_of(in.type))),
        scratch_stride_(query_bytes_ + score_bytes_ + weight_bytes_ + value_bytes_),
        tokens_(in.tokens),
        scratch_(scratch_stride_ * threads.count) {
    std::iota(tokens_.begin(), tokens_.end(), 0);
  }

  void run() {
    const int64_t tasks = in_.batch * in_.heads * parts_;
    take_tasks(threads_, tasks, scratch_.get(), scratch_stride_, [&](int64_t task, char* memory) {
      attend(task / parts_ / in_.heads, task / parts_ % in_.heads, task % parts_, memory);
    });
  }

 private:
  // Every parts-th chunk of a head's queries: later ones have more keys.
  void attend(int64_t batch, int64_t head, int64_t part, char* memory) {
    const int64_t shared = head / (in_.heads / in_.shared_heads);
    char* const query = memory;
    auto* const scores = reinterpret_cast<float*>(query + query_bytes_);
    char* const weights = reinterpret_cast<char*>(scores) + score_bytes_;
    char* const values = weights + weight_bytes_;
    turn(head_of(in_.v, batch, shared, in_.type), values);
    for (int64_t chunk = part; chunk < chunks_; chunk += parts_) {
      const int64_t first = chunk * kChunk, count = std::min(kChunk, in_.tokens - first), keys = first + count;
      float sums[kChunk];
      tiles_.pack(head_of(in_.q, batch, head, in_.type), in_.q.row_stride, &tokens_[first], count, in_.depth, query);
      multiply(head_of(in_.k, batch, shared, in_.type), in_.k.row_stride, keys, in_.depth, query, count, scores);
      tiles_.weigh(scores, keys, first, in_.scale, count, weights, sums);
      for (float& sum : sums) sum = 1.0f / sum;
      for (int64_t column = 0; column < in_.width; column += kRowBlock) {
        const int64_t columns = std::min(kRowBlock, in_.width - column);
        const char* from = values + column * value_stride_ * size_of(in_.type);
        multiply(from, value_stride_, columns, keys, weights, count, scores);
        write(scores, columns, sums, count, static_cast<char*>(out_) + place(batch, first, head, column));
      }
    }
  }

  int64_t place(int64_t batch, int64_t token, int64_t head, int64_t column) const {
    return (((batch * in_.tokens + token) * in_.heads + head) * in_.width + column) * size_of(in_.type);
  }

  // values [width, tokens] <- v [tokens, width]
  void turn(const char* v, char* values) const {
    constexpr int64_t kBlock = 16;
    const auto* from = reinterpret_cast<const uint16_t*>(v);
    auto* to = reinterpret_cast<uint16_t*>(values);
    for (int64_t t = 0; t < in_.tokens; t += kBlock) {
      const int64_t last = std::min(in_.tokens, t + kBlock);
      for (int64_t column = 0; column < in_.width; ++column) {
        for (int64_t i = t; i < last; ++i) to[column * value_stride_ + i] = from[i * in_.v.row_stride + column];
      }
    }
  }

  // y [rows, kChunk] <- weight [rows, columns] times a chunk
  void multiply(const char* weight, int64_t stride, int64_t rows, int64_t columns, const char* chunk, int64_t count,
                float* y) const {
    const int64_t step = stride * size_of(in_.type);
    for (int64_t row = 0; row < rows; row += kRowBlock) {
      const int64_t some = std::min(kRowBlock, rows - row), after = std::min(row + kRowBlock, rows - 1);
      const Following next{weight + after * step, 0, std::min(kRowBlock, rows - after), 1};
      tiles_.multiply(weight + row * step, next, stride, some, columns, chunk, count, y + row * kChunk);
    }
  }

  // out, rows of all heads <- y [columns, kChunk], turned and each lane times its scale.
  void write(float* y, int64_t columns, const float* scales, int64_t count, char* out) const {
    float rows[kChunk * kRowBlock] = {};
    Reduction reduction{};
    reduction.count = count;
    reduction.tokens = tokens_.data();
    reduction.gates = scales;
    reduction.out = rows;
    reduction.out_stride = kRowBlock;
    tiles_.reduce(y, columns, reduction);
    for (int64_t i = 0; i < count; ++i) {
      kernels_.narrow(rows + i * kRowBlock, columns, out + i * in_.heads * in_.width * size_of(in_.type));
    }
  }

  const AttentionInput& in_;
  void* const out_;
  const Threads& threads_;
  const Kernels& kernels_;
  const Tiles& tiles_;
  const int64_t chunks_, parts_;
  const int64_t value_stride_;
  const int64_t query_bytes_, score_bytes_, weight_bytes_, value_bytes_, scratch_stride_;
  std::vector<int64_t> tokens_;
  const Aligned<char> scratch_;
};

}  // namespace

bool has_attention(Isa isa, Type type) { return kernels(isa, type).many->weigh != nullptr; }

void causal_attention(const AttentionInput& in, void* out, Isa isa, const Threads& threads) {
  Attention(in, out, isa, threads).run();
}

}  // namespace cprune
