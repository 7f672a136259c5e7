// The inner loops of the experts, once for every instruction set and type of the weights.
//
// A chunk holds some tokens of one expert in the layout that its tiles want, and so do its activations; an output block
// y holds kChunk x kRowBlock sums of float32, again in the order that suits the tiles. The driver only passes them on.
// All weights are read where they are: columns are contiguous, strides are in elements, no alignment is asked for.
#pragma once

#include <cstdint>

namespace cprune {

constexpr int64_t kChunk = 48;     // tokens in a chunk at most
constexpr int64_t kRowBlock = 64;  // rows of an output block at most
constexpr int64_t kGateRows = 32;  // rows of the gate, and as many of up, that go through at a time

enum class Type { kBfloat16, kFloat16, kFloat32 };
enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16 };
constexpr Isa kIsas[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmxBf16};  // the best last

// With sigma the logistic function, g <= limit and -limit <= u <= limit clamped first:
//     0: g sigma(alpha g) u   1: g sigma(alpha g) (u + 1)   2: 0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) u
struct Activation {
  int64_t kind;
  float alpha, limit;
};

struct Reduction {
  int64_t count;          // tokens in the chunk
  const int64_t* tokens;  // [count]
  const float* gates;     // [count]
  const float* bias;      // [rows] added to y first, or null
  float* out;             // [T, rows], row t at out + t * out_stride: gate * y is added
  int64_t out_stride;
  const bool* valid;  // [count]: the tokens that count in sums, high and low; or null for no statistics at all
  float* squares;     // [kChunk]: written, the sum of y^2 over the rows
  float* sums;        // [rows]: added to
  float* high;        // [1]: updated
  float* low;         // [1]: updated
};

// The weights that come after those of a call, in the same tensor. As `calls` calls share those of this one, each has
// rows [first, last) of the next to fetch meanwhile; kernels that fetch but a little ahead see to the first rows only.
struct Following {
  const void* weight;
  int64_t first, last;
  int64_t calls;
};

struct Tiles {
  int64_t (*lane_bytes)(int64_t columns);  // of a chunk, for every token
  int64_t granule;                         // a chunk takes the memory of this many tokens or a multiple

  // chunk <- x[tokens[0..count)], rows of `columns`.
  void (*pack)(const void* x, int64_t x_stride, const int64_t* tokens, int64_t count, int64_t columns, void* chunk);

  // y <- weight [rows, columns] times a chunk; rows <= kRowBlock.
  void (*multiply)(const void* weight, const Following& next, int64_t row_stride, int64_t rows, int64_t columns,
                   const void* chunk, int64_t count, float* y);

  // Rows [first, first + rows) of the activations, rounded to the type of the weights; `inner` is all their rows,
  // `first` a multiple of kGateRows. A null bias adds nothing.
  void (*activate)(const float* gate, const float* up, const float* gate_bias, const float* up_bias,
                   const Activation& activation, int64_t first, int64_t rows, int64_t inner, int64_t count,
                   void* chunk);

  // The combine and the statistics of y.
  void (*reduce)(float* y, int64_t rows, const Reduction& reduction);

  // chunk <- exp(scale (score - the greatest)) of every token, rounded as activations are, and their sums [kChunk] not
  // rounded. scores [keys, kChunk]: token i has those of keys 0 to first + i, the others weigh nothing. Null where the
  // tiles cannot.
  void (*weigh)(float* scores, int64_t keys, int64_t first, float scale, int64_t count, void* chunk,
                float* sums) = nullptr;
};

struct Kernels {
  const Tiles* few;  // chunks of at most few_tokens: bound by reading the weights
  int64_t few_tokens;
  const Tiles* some;  // chunks of more, at most some_tokens
  int64_t some_tokens;
  const Tiles* many;
  void (*widen)(const void* from, int64_t count, float* to);
  void (*narrow)(const float* from, int64_t count, void* to);

  // out <- the rms_norm.h of rows that lie one after the other.
  void (*norm)(const void* x, int64_t rows, int64_t columns, const float* weight, float epsilon, void* out);

  // to <- the c of centred_grams.h, of rows x; strides in elements.
  void (*centre)(const void* x, int64_t x_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride);

  // gram [rows, rows] += x x^T, the upper triangle at least; of each kGramColumns columns a sum in float32, which are
  // added in float64. `scratch` holds gram_bytes(rows).
  void (*gram)(const void* x, int64_t row_stride, int64_t rows, int64_t columns, void* scratch, double* gram);
};

constexpr int64_t kGramColumns = 1024;
inline int64_t gram_bytes(int64_t rows) {
  return (rows + kChunk) * (kGramColumns + 64) * 4 + kChunk * kRowBlock * 4 + (rows + 64) * (rows + 64) * 2;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t size_of(Type type) { return type == Type::kFloat32 ? 4 : 2; }

// The best of this processor, up to the one that CPRUNE_MAX_ISA in the environment names. isa.cpp
Isa best_isa();
bool supported(Isa isa);
int64_t core_cache();  // bytes that a core has to itself
const char* name_of(Isa isa);
const Kernels& kernels(Isa isa, Type type);

// One file each, compiled for its instructions.
const Kernels& portable_kernels(Type type);
const Kernels& avx2_kernels(Type type);
const Kernels& avx512_kernels(Type type);
const Kernels& avx512_bf16_kernels();  // bfloat16
const Kernels& amx_bf16_kernels();     // bfloat16

}  // namespace cprune
