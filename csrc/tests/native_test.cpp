// The kernels without torch, against sums in double: what AddressSanitizer and UndefinedBehaviorSanitizer watch, and
// what runs on another processor under an emulator. Every array is as long as it must be and starts off every
// alignment.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/attention.h"
#include "cpu/centred_grams.h"
#include "cpu/gram.h"
#include "cpu/group_tokens.h"
#include "cpu/moe_forward.h"
#include "cpu/rms_norm.h"

namespace {

using namespace cprune;

int failures = 0;

void expect(bool holds, const char* what, Isa isa, Type type, int64_t a, int64_t b) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s: %s, type %d, case %lld %lld\n", what, name_of(isa), static_cast<int>(type),
              static_cast<long long>(a), static_cast<long long>(b));
}

Threads threads(int64_t count) {
  return {count, [count](const std::function<void()>& work) {
            std::vector<std::thread> others;
            for (int64_t i = 1; i < count; ++i) others.emplace_back(work);
            work();
            for (std::thread& other : others) other.join();
          }};
}

// Numbers of a type as the kernels read them, and what they are in double. The first byte is off any alignment of 4.
struct Array {
  Type type;
  std::vector<char> bytes;
  std::vector<double> values;

  Array(Type type, int64_t count, double scale, std::mt19937& random)
      : type(type), bytes(count * size_of(type) + 2), values(count) {
    std::normal_distribution<double> normal;
    std::vector<float> drawn(count);
    for (float& x : drawn) x = static_cast<float>(scale * normal(random));
    kernels(Isa::kPortable, type).narrow(drawn.data(), count, data());
    kernels(Isa::kPortable, type).widen(data(), count, drawn.data());
    std::copy(drawn.begin(), drawn.end(), values.begin());
  }
  void* data() { return bytes.data() + (type == Type::kFloat32 ? 0 : 2); }
};

double unit(Type type) { return type == Type::kBfloat16 ? 0x1p-8 : type == Type::kFloat16 ? 0x1p-11 : 0x1p-24; }

struct Shape {
  int64_t tokens, top_k, experts, hidden, inner;
};

void test_moe(Isa isa, Type type, const Shape& shape, int64_t kind) {
  const auto [tokens, top_k, experts, hidden, inner] = shape;
  std::mt19937 random(7);
  Array x(type, tokens * hidden, 1, random);
  Array gate_up(type, experts * 2 * inner * hidden, 1 / std::sqrt(hidden), random);
  Array down(type, experts * hidden * inner, 1 / std::sqrt(inner), random);
  Array gate_up_bias(type, experts * 2 * inner, 1, random), down_bias(type, experts * hidden, 1, random);
  std::vector<int64_t> index(tokens * top_k);
  std::vector<float> gates(tokens * top_k);
  for (int64_t& expert : index) expert = static_cast<int64_t>(random() % (experts + 2)) - 1;  // on both sides of [0, E)
  for (float& gate : gates) gate = static_cast<float>(random() % 1000) / 1000;
  const auto valid = std::make_unique<bool[]>(tokens);
  for (int64_t t = 0; t < tokens; ++t) valid[t] = random() % 4 != 0;
  MoeInput in{};
  in.type = type, in.tokens = tokens, in.top_k = top_k, in.experts = experts, in.hidden = hidden, in.inner = inner;
  in.x = x.data(), in.x_stride = hidden, in.index = index.data(), in.gates = gates.data();
  in.gate_up = {gate_up.data(), 2 * inner * hidden, hidden}, in.down = {down.data(), hidden * inner, inner};
  in.activation = {kind, kind == 1 ? 1.702f : 1.0f, kind == 1 ? 1.5f : std::numeric_limits<float>::infinity()};
  if (kind) in.gate_up_bias = {gate_up_bias.data(), 2 * inner}, in.down_bias = {down_bias.data(), hidden};

  // `room` bounds what rounding may change, to first order and doubled: of sums in float32, of the activations.
  std::vector<double> out(tokens * hidden, 0.0), room(tokens * hidden, 0.0), act(inner), slack(inner);
  std::vector<double> norms(tokens * top_k, 0.0), norm_room(tokens * top_k, 0.0);
  for (int64_t pair = 0; pair < tokens * top_k; ++pair) {
    const int64_t e = index[pair], t = pair / top_k;
    if (e < 0 || e >= experts) continue;
    for (int64_t i = 0; i < inner; ++i) {
      double sum[2], size[2];
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t row = e * 2 * inner + half * inner + i;
        sum[half] = kind ? gate_up_bias.values[row] : 0, size[half] = std::abs(sum[half]);
        for (int64_t c = 0; c < hidden; ++c) {
          const double product = x.values[t * hidden + c] * gate_up.values[row * hidden + c];
          sum[half] += product, size[half] += std::abs(product);
        }
        size[half] *= 2 * (hidden + 3) * 0x1p-24;
      }
      const double g = std::min<double>(sum[0], in.activation.limit);
      const double u =
          std::max<double>(std::min<double>(sum[1], in.activation.limit), -in.activation.limit) + (kind == 1);
      const double slope = kind == 2 ? 1.5957691216 * (g + 0.044715 * g * g * g) : in.activation.alpha * g;
      const double s = g / (1 + std::exp(-slope));
      act[i] = s * u;
      slack[i] = 1.3 * size[0] * (std::abs(u) + size[1]) + std::abs(s) * size[1] +
                 (unit(type) + 0x1p-18) * std::abs(act[i]) * 2;
    }
    for (int64_t h = 0; h < hidden; ++h) {
      double y = kind ? down_bias.values[e * hidden + h] : 0, size = std::abs(y), error = 0;
      for (int64_t i = 0; i < inner; ++i) {
        const double w = down.values[(e * hidden + h) * inner + i];
        y += act[i] * w, size += std::abs(act[i] * w), error += slack[i] * std::abs(w);
      }
      error += 2 * (inner + 3) * 0x1p-24 * size;
      out[t * hidden + h] += gates[pair] * y;
      room[t * hidden + h] += gates[pair] * (error + (top_k + 2) * 0x1p-23 * std::abs(y));
      norms[pair] += y * y, norm_room[pair] += error * error;
    }
    norms[pair] = std::sqrt(norms[pair]);
    norm_room[pair] = std::sqrt(norm_room[pair]) + (hidden + 2) * 0x1p-23 * norms[pair];
  }

  std::vector<char> first;
  std::vector<float> got(tokens * hidden);
  for (int64_t count : {1, 3}) {
    std::vector<char> raw(tokens * hidden * size_of(type), 77);
    moe_forward(in, raw.data(), nullptr, isa, threads(count));
    kernels(Isa::kPortable, type).widen(raw.data(), tokens * hidden, got.data());
    bool close = true;
    for (int64_t i = 0; i < tokens * hidden; ++i) {
      close = close && std::abs(got[i] - out[i]) <= room[i] + 2 * unit(type) * (std::abs(out[i]) + room[i]);
    }
    expect(close, "moe_forward", isa, type, tokens, kind);
    if (count == 1) first = raw;
    expect(first == raw, "moe_forward on three threads", isa, type, tokens, kind);
  }
  std::vector<float> observed(tokens * top_k), high(experts), low(experts), sums(experts * hidden);
  const MoeStatistics statistics{valid.get(), observed.data(), high.data(), low.data(), sums.data()};
  moe_forward(in, got.data(), &statistics, isa, threads(2));
  bool close = true;
  for (int64_t i = 0; i < tokens * hidden; ++i) close = close && std::abs(got[i] - out[i]) <= room[i];
  expect(close, "moe_forward with statistics", isa, type, tokens, kind);
  close = true;
  for (int64_t i = 0; i < tokens * top_k; ++i) close = close && std::abs(observed[i] - norms[i]) <= norm_room[i];
  expect(close, "norms", isa, type, tokens, kind);
}

void test_gram(Isa isa, Type type, int64_t rows, int64_t columns) {
  std::mt19937 random(3);
  Array x(type, std::max<int64_t>(1, rows * columns), 1, random);
  std::vector<double> got(rows * rows, 77), again(rows * rows, 77);
  gram(x.data(), type, columns, rows, columns, got.data(), isa, threads(1));
  gram(x.data(), type, columns, rows, columns, again.data(), isa, threads(3));
  expect(got == again, "gram on three threads", isa, type, rows, columns);
  bool close = true;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < rows; ++j) {
      double sum = 0, size = 0;
      for (int64_t c = 0; c < columns; ++c) {
        const double product = x.values[i * columns + c] * x.values[j * columns + c];
        sum += product, size += std::abs(product);
      }
      close = close && std::abs(got[i * rows + j] - sum) <= (kGramColumns + 2) * 0x1p-24 * size;
    }
  }
  expect(close, "gram", isa, type, rows, columns);
}

// Two heads share keys and values. Rows of q stand between those of other heads, as in the output.
void test_attention(Isa isa, Type type, int64_t tokens, int64_t depth, int64_t width) {
  if (!has_attention(isa, type)) return;
  constexpr int64_t kHeads = 2;
  std::mt19937 random(5);
  Array q(type, tokens * kHeads * depth, 1, random);
  Array k(type, tokens * depth, 1, random), v(type, tokens * width, 1, random);
  const int64_t size = tokens * kHeads * width;
  std::vector<char> got(size * size_of(type)), again(got);
  const AttentionInput in{type,
                          1,
                          kHeads,
                          1,
                          tokens,
                          depth,
                          width,
                          {q.data(), 0, depth, kHeads * depth},
                          {k.data(), 0, 0, depth},
                          {v.data(), 0, 0, width},
                          0.5f};
  causal_attention(in, got.data(), isa, threads(1));
  causal_attention(in, again.data(), isa, threads(3));
  expect(got == again, "attention on three threads", isa, type, tokens, depth);
  std::vector<float> out(size);
  kernels(Isa::kPortable, type).widen(got.data(), size, out.data());
  bool close = true;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t head = 0; head < kHeads; ++head) {
      std::vector<double> weights(t + 1);
      double sum = 0;
      for (int64_t s = 0; s <= t; ++s) {
        double score = 0;
        for (int64_t c = 0; c < depth; ++c)
          score += q.values[(t * kHeads + head) * depth + c] * k.values[s * depth + c];
        sum += weights[s] = std::exp(score / 2);
      }
      for (int64_t c = 0; c < width; ++c) {
        double value = 0, most = 0;
        for (int64_t s = 0; s <= t; ++s) {
          value += weights[s] / sum * v.values[s * width + c];
          most += weights[s] / sum * std::abs(v.values[s * width + c]);
        }
        close = close && std::abs(out[(t * kHeads + head) * width + c] - value) <= 2 * unit(type) * most + 1e-6;
      }
    }
  }
  expect(close, "attention", isa, type, tokens, depth);
}

void test_norm(Isa isa, Type type, int64_t rows, int64_t columns) {
  std::mt19937 random(3);
  Array x(type, rows * columns, 1, random), weight(type, columns, 1, random);
  std::vector<char> got(rows * columns * size_of(type)), again(got);
  const NormInput in{type, rows, columns, x.data(), weight.data(), 1e-5f};
  rms_norm(in, got.data(), isa, threads(1));
  rms_norm(in, again.data(), isa, threads(3));
  expect(got == again, "norm on three threads", isa, type, rows, columns);
  std::vector<float> out(rows * columns);
  kernels(Isa::kPortable, type).widen(got.data(), rows * columns, out.data());
  bool close = true;
  for (int64_t row = 0; row < rows; ++row) {
    double mean = 0;
    for (int64_t c = 0; c < columns; ++c) mean += std::pow(x.values[row * columns + c], 2) / columns;
    for (int64_t c = 0; c < columns; ++c) {
      const double value = x.values[row * columns + c] / std::sqrt(mean + 1e-5) * weight.values[c];
      const double room = std::abs(value) * (3 * unit(type) + (columns + 8) * 0x1p-24);
      close = close && std::abs(out[row * columns + c] - value) <= room + 0x1p-14 * unit(type);
    }
  }
  expect(close, "norm", isa, type, rows, columns);
}

void test_centred(Isa isa, Type type, int64_t samples, int64_t columns) {
  constexpr int64_t kExperts = 2;
  std::mt19937 random(5);
  Array y(type, kExperts * samples * columns, 1, random);
  std::vector<float> got(kExperts * samples * samples), again(got);
  const Outputs in{type, kExperts, samples, columns, y.data(), samples * columns, columns};
  centred_grams(in, got.data(), isa, threads(1));
  centred_grams(in, again.data(), isa, threads(3));
  expect(got == again, "centred Grams on three threads", isa, type, samples, columns);
  bool close = true;
  for (int64_t expert = 0; expert < kExperts; ++expert) {
    double* const rows = y.values.data() + expert * samples * columns;
    double greatest = 0;
    for (int64_t c = 0; c < columns; ++c) {
      double mean = 0;
      for (int64_t i = 0; i < samples; ++i) mean += rows[i * columns + c] / samples;
      for (int64_t i = 0; i < samples; ++i) {
        rows[i * columns + c] -= mean;
        greatest = std::max(greatest, std::abs(rows[i * columns + c]));
      }
    }
    const double factor = greatest > 0 ? std::ldexp(1.0, -2 * std::ilogb(greatest)) : 1.0;
    for (int64_t i = 0; i < samples; ++i) {
      for (int64_t j = 0; j < samples; ++j) {
        double exact = 0;
        for (int64_t c = 0; c < columns; ++c) exact += factor * rows[i * columns + c] * rows[j * columns + c];
        // numbers below 2, each off by less than 64 of its last bits
        const double room = columns * 4 * (columns + 128) * 0x1p-24;
        close = close && std::abs(got[(expert * samples + i) * samples + j] - exact) <= room;
      }
    }
  }
  expect(close, "centred Grams", isa, type, samples, columns);
}

void test_types(Isa isa) {
  for (uint32_t pattern = 0; pattern < 1 << 16; pattern += 16) {  // every number of 16 bits there and back
    for (Type type : {Type::kBfloat16, Type::kFloat16}) {
      uint16_t halves[16], back[16];
      float wide[16];
      for (uint32_t i = 0; i < 16; ++i) halves[i] = static_cast<uint16_t>(pattern + i);
      kernels(isa, type).widen(halves, 16, wide);
      kernels(isa, type).narrow(wide, 16, back);
      for (int i = 0; i < 16; ++i) {
        const bool same = std::isnan(wide[i]) ? (halves[i] & 0x7fff) > (type == Type::kFloat16 ? 0x7c00 : 0x7f80)
                                              : back[i] == halves[i];
        expect(same, "numbers of 16 bits", isa, type, halves[i], back[i]);
      }
    }
  }
}

void test_group_tokens() {
  const std::vector<int32_t> index{2, 0, -1, 2, 5, 1, 2, 0};
  std::vector<int32_t> order(8), offsets(4), position(8);
  group_tokens(index.data(), 8, 3, order.data(), offsets.data(), position.data());
  expect(order == std::vector<int32_t>({1, 7, 5, 0, 3, 6, -1, -1}), "order", Isa::kPortable, Type::kFloat32, 0, 0);
  expect(offsets == std::vector<int32_t>({0, 2, 3, 6}), "offsets", Isa::kPortable, Type::kFloat32, 0, 0);
  expect(position == std::vector<int32_t>({3, 0, -1, 4, -1, 2, 5, 1}), "position", Isa::kPortable, Type::kFloat32, 0,
         0);
}

}  // namespace

int main() {
  // Where there is one expert a third of the pairs goes to it, where there are two a half to one of them.
  const Shape shapes[] = {{0, 2, 3, 16, 8},     {1, 2, 3, 64, 32},   {5, 3, 4, 33, 7},    {131, 2, 3, 48, 24},
                          {200, 1, 1, 35, 65},  {60, 2, 3, 97, 34},  {9, 1, 40, 8, 3},    {40, 2, 2, 70, 130},
                          {131, 2, 2, 160, 96}, {60, 2, 2, 64, 40},  {60, 2, 2, 104, 64}, {30, 1, 1, 64, 32},
                          {70, 1, 1, 96, 48},   {125, 1, 1, 64, 64}, {175, 1, 1, 64, 48}, {225, 1, 1, 96, 64}};
  test_group_tokens();
  for (Isa isa : kIsas) {
    if (!supported(isa)) continue;
    test_types(isa);
    for (Type type : {Type::kBfloat16, Type::kFloat16, Type::kFloat32}) {
      for (const Shape& shape : shapes) {
        for (int64_t kind : {0, 1, 2}) test_moe(isa, type, shape, kind);
      }
      for (auto [rows, columns] : {std::pair<int64_t, int64_t>{1, 1},
                                   {7, 131},
                                   {66, 300},
                                   {3, 5000},
                                   {40, 2085},
                                   {130, 1100},
                                   {2, 0},
                                   {0, 2}}) {
        test_gram(isa, type, rows, columns);
      }
      for (auto [rows, columns] :
           {std::pair<int64_t, int64_t>{0, 8}, {3, 0}, {1, 1}, {300, 70}, {131, 16}, {2, 1031}}) {
        test_norm(isa, type, rows, columns);
      }
      for (auto [samples, columns] :
           {std::pair<int64_t, int64_t>{0, 8}, {3, 0}, {1, 1}, {97, 70}, {131, 16}, {2, 1031}}) {
        test_centred(isa, type, samples, columns);
      }
      test_attention(isa, type, 0, 8, 8);
      test_attention(isa, type, 1, 16, 8);
      test_attention(isa, type, 50, 33, 7);
      test_attention(isa, type, 131, 24, 70);
    }
    std::printf("%s: done\n", name_of(isa));
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
