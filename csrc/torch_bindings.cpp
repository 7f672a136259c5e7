// The only file that knows torch, through its stable ABI: one binary for every torch from TORCH_TARGET_VERSION on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/attention.h"
#include "cpu/centred_grams.h"
#include "cpu/gram.h"
#include "cpu/group_tokens.h"
#include "cpu/moe_forward.h"
#include "cpu/pages.h"
#include "cpu/rms_norm.h"

namespace {

using cprune::Isa;
using cprune::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string text(const std::vector<int64_t>& sizes) {
  std::string all = "[";
  for (size_t i = 0; i < sizes.size(); ++i) all += (i ? ", " : "") + std::to_string(sizes[i]);
  return all + "]";
}

std::string shape(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
  return text(sizes);
}

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another type";
  }
}

void check(const Tensor& x, const char* name, ScalarType dtype, const std::vector<int64_t>& sizes) {
  bool fits = x.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = x.size(i) == sizes[i];
  STD_TORCH_CHECK(fits, name, " must be ", text(sizes), ", got ", shape(x));
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, " must be ", name_of(dtype), ", got ", name_of(x.scalar_type()));
}

Type type_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return Type::kBfloat16;
    case ScalarType::Half:
      return Type::kFloat16;
    case ScalarType::Float:
      return Type::kFloat32;
    default:
      STD_TORCH_CHECK(false, name, " must be bfloat16, float16 or float32, got ", name_of(x.scalar_type()));
  }
}

// An empty name is the best that this processor has.
Isa isa_of(const std::string& name) {
  if (name.empty()) return cprune::best_isa();
  for (Isa isa : cprune::kIsas) {
    if (name == cprune::name_of(isa) && cprune::supported(isa)) return isa;
  }
  STD_TORCH_CHECK(false, "isa must be one of isas(), got ", name);
}

// Calling an operator of torch takes long where its code is not in the cache.
Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

Tensor with_rows(const Tensor& x) { return x.stride(-1) == 1 || x.size(-1) <= 1 ? x : torch::stable::contiguous(x); }

cprune::Threads torch_threads() {
  const int64_t count = torch::stable::get_num_threads();
  return {count, [count](const std::function<void()>& work) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) { work(); });
          }};
}

void check_pairs(int64_t pairs) {
  STD_TORCH_CHECK(pairs <= std::numeric_limits<int32_t>::max(), "T K must be below 2^31, got ", pairs);
}

// The tensors that an input points into, checked and with rows of adjacent elements.
struct Layer {
  Tensor hidden, index, gates, gate_up, down;
  std::optional<Tensor> gate_up_bias, down_bias;
  std::vector<int64_t> slots;  // of an index that is not of int64
  cprune::MoeInput in;

  Layer(const Tensor& x, const Tensor& experts_of, const Tensor& scales, const Tensor& fused, const Tensor& last)
      : hidden(with_rows(x)),
        index(dense(experts_of)),
        gates(dense(scales)),
        gate_up(with_rows(fused)),
        down(with_rows(last)),
        in{} {
    STD_TORCH_CHECK(x.dim() == 2, "hidden must be [T, H], got ", shape(x));
    STD_TORCH_CHECK(index.dim() == 2, "index must be [T, K], got ", shape(index));
    STD_TORCH_CHECK(down.dim() == 3, "down must be [E, H, I], got ", shape(down));
    in.type = type_of(x, "hidden");
    in.tokens = x.size(0), in.hidden = x.size(1), in.top_k = index.size(1);
    in.experts = down.size(0), in.inner = down.size(2);
    const bool narrow = index.scalar_type() == ScalarType::Int;
    check(index, "index", narrow ? ScalarType::Int : ScalarType::Long, {in.tokens, in.top_k});
    check(gates, "gates", ScalarType::Float, {in.tokens, in.top_k});
    check(gate_up, "gate_up", x.scalar_type(), {in.experts, 2 * in.inner, in.hidden});
    check(down, "down", x.scalar_type(), {in.experts, in.hidden, in.inner});
    STD_TORCH_CHECK(in.experts && in.hidden && in.inner, "E, H and I must be at least 1, got down ", shape(down));
    check_pairs(in.tokens * in.top_k);
    if (narrow) {
      const auto* from = static_cast<const int32_t*>(index.data_ptr());
      slots.assign(from, from + in.tokens * in.top_k);
    }
    in.x = hidden.data_ptr();
    in.x_stride = hidden.stride(0);
    in.index = narrow ? slots.data() : static_cast<const int64_t*>(index.data_ptr());
    in.gates = static_cast<const float*>(gates.data_ptr());
    in.gate_up = {gate_up.data_ptr(), gate_up.stride(0), gate_up.stride(1)};
    in.down = {down.data_ptr(), down.stride(0), down.stride(1)};
    in.activation = {0, 1.0f, std::numeric_limits<float>::infinity()};
  }

  void with_biases(const std::optional<Tensor>& fused, const std::optional<Tensor>& last) {
    if (fused) {
      check(*fused, "gate_up_bias", hidden.scalar_type(), {in.experts, 2 * in.inner});
      gate_up_bias = with_rows(*fused);
      in.gate_up_bias = {gate_up_bias->data_ptr(), gate_up_bias->stride(0)};
    }
    if (last) {
      check(*last, "down_bias", hidden.scalar_type(), {in.experts, in.hidden});
      down_bias = with_rows(*last);
      in.down_bias = {down_bias->data_ptr(), down_bias->stride(0)};
    }
  }
};

Tensor moe_forward(const Tensor& hidden, const Tensor& index, const Tensor& gates, const Tensor& gate_up,
                   const Tensor& down, std::optional<Tensor> gate_up_bias, std::optional<Tensor> down_bias,
                   int64_t activation, double alpha, double limit, std::string isa) {
  Layer layer(hidden, index, gates, gate_up, down);
  layer.with_biases(gate_up_bias, down_bias);
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "activation must lie in [0, 2], got ", activation);
  STD_TORCH_CHECK(limit >= 0, "limit must be at least 0, got ", limit);
  layer.in.activation.kind = activation;
  layer.in.activation.alpha = static_cast<float>(alpha);
  if (limit > 0) layer.in.activation.limit = static_cast<float>(limit);
  Tensor out = torch::stable::new_empty(hidden, {layer.in.tokens, layer.in.hidden});
  cprune::moe_forward(layer.in, out.data_ptr(), nullptr, isa_of(isa), torch_threads());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> moe_observe(const Tensor& hidden, const Tensor& index,
                                                               const Tensor& gates, const Tensor& gate_up,
                                                               const Tensor& down, const Tensor& valid,
                                                               std::string isa) {
  const Layer layer(hidden, index, gates, gate_up, down);
  const cprune::MoeInput& in = layer.in;
  check(valid, "valid", ScalarType::Bool, {in.tokens});
  const Tensor counts = dense(valid);
  const auto empty = [&](std::initializer_list<int64_t> sizes) { return torch::stable::new_empty(gates, sizes); };
  Tensor out = empty({in.tokens, in.hidden}), norms = empty({in.tokens, in.top_k});
  Tensor high = empty({in.experts}), low = empty({in.experts}), sums = empty({in.experts, in.hidden});
  const auto floats = [](const Tensor& x) { return static_cast<float*>(x.data_ptr()); };
  const cprune::MoeStatistics statistics{static_cast<const bool*>(counts.data_ptr()), floats(norms), floats(high),
                                         floats(low), floats(sums)};
  cprune::moe_forward(in, out.data_ptr(), &statistics, isa_of(isa), torch_threads());
  return {out, norms, high, low, sums};
}

Tensor causal_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, std::string isa) {
  STD_TORCH_CHECK(q.dim() == 4, "q must be [B, heads, S, D], got ", shape(q));
  STD_TORCH_CHECK(v.dim() == 4, "v must be [B, heads, S, D], got ", shape(v));
  const cprune::Isa instructions = isa_of(isa);
  const Type type = type_of(q, "q");
  STD_TORCH_CHECK(cprune::has_attention(instructions, type), "q must be of a type that ", cprune::name_of(instructions),
                  " attends in, got ", name_of(q.scalar_type()));
  const int64_t batch = q.size(0), tokens = q.size(2), heads = v.size(1);
  check(k, "k", q.scalar_type(), {batch, heads, tokens, q.size(3)});
  check(v, "v", q.scalar_type(), {batch, heads, tokens, v.size(3)});
  STD_TORCH_CHECK(heads && q.size(1) % heads == 0, "q must have a multiple of the heads of v, ", heads, ", got ",
                  q.size(1));
  STD_TORCH_CHECK(q.size(3) && v.size(3), "D must be at least 1, got q ", shape(q), " and v ", shape(v));
  STD_TORCH_CHECK(scale > 0, "scale must be above 0, got ", scale);
  const Tensor queries = with_rows(q), keys = with_rows(k), values = with_rows(v);
  const auto rows = [](const Tensor& x) {
    return cprune::HeadRows{x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
  };
  Tensor out = torch::stable::new_empty(q, {batch, tokens, q.size(1), v.size(3)});
  const cprune::AttentionInput in{type,
                                  batch,
                                  q.size(1),
                                  heads,
                                  tokens,
                                  q.size(3),
                                  v.size(3),
                                  rows(queries),
                                  rows(keys),
                                  rows(values),
                                  static_cast<float>(scale)};
  cprune::causal_attention(in, out.data_ptr(), instructions, torch_threads());
  return out;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double epsilon, std::string isa) {
  STD_TORCH_CHECK(x.dim() >= 1, "x must be [..., N], got ", shape(x));
  const int64_t columns = x.size(-1);
  const Type type = type_of(x, "x");
  check(weight, "weight", x.scalar_type(), {columns});
  STD_TORCH_CHECK(epsilon >= 0, "epsilon must be at least 0, got ", epsilon);
  const Tensor rows = dense(x), factors = dense(weight);
  Tensor out = torch::stable::empty_like(rows);
  const cprune::NormInput in{type,
                             columns ? rows.numel() / columns : 0,
                             columns,
                             rows.data_ptr(),
                             factors.data_ptr(),
                             static_cast<float>(epsilon)};
  cprune::rms_norm(in, out.data_ptr(), isa_of(isa), torch_threads());
  return out;
}

Tensor gram(const Tensor& x, std::string isa) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be [E, P], got ", shape(x));
  const Type type = type_of(x, "x");
  const Tensor rows = with_rows(x);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(0)}, ScalarType::Double);
  cprune::gram(rows.data_ptr(), type, rows.stride(0), x.size(0), x.size(1), static_cast<double*>(out.data_ptr()),
               isa_of(isa), torch_threads());
  return out;
}

Tensor centred_grams(const Tensor& y, std::string isa) {
  STD_TORCH_CHECK(y.dim() == 3, "y must be [E, S, H], got ", shape(y));
  const Type type = type_of(y, "y");
  const Tensor rows = with_rows(y);
  Tensor out = torch::stable::new_empty(y, {y.size(0), y.size(1), y.size(1)}, ScalarType::Float);
  const cprune::Outputs outputs{type, y.size(0), y.size(1), y.size(2), rows.data_ptr(), rows.stride(0), rows.stride(1)};
  cprune::centred_grams(outputs, static_cast<float*>(out.data_ptr()), isa_of(isa), torch_threads());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> group_tokens(const Tensor& index, int64_t experts) {
  STD_TORCH_CHECK(index.dim() == 2, "index must be [T, K], got ", shape(index));
  STD_TORCH_CHECK(experts >= 0, "num_experts must be at least 0, got ", experts);
  const bool narrow = index.scalar_type() == ScalarType::Int;
  check(index, "index", narrow ? ScalarType::Int : ScalarType::Long, {index.size(0), index.size(1)});
  const Tensor slots = dense(index);
  const int64_t pairs = index.size(0) * index.size(1);
  check_pairs(pairs);
  const auto empty = [&](int64_t size) { return torch::stable::new_empty(index, {size}, ScalarType::Int); };
  Tensor order = empty(pairs), offsets = empty(experts + 1), position = empty(pairs);
  const auto group = [&](const auto* from) {
    cprune::group_tokens(from, pairs, experts, static_cast<int32_t*>(order.data_ptr()),
                         static_cast<int32_t*>(offsets.data_ptr()), static_cast<int32_t*>(position.data_ptr()));
  };
  if (narrow) {
    group(static_cast<const int32_t*>(slots.data_ptr()));
  } else {
    group(static_cast<const int64_t*>(slots.data_ptr()));
  }
  return {order, offsets, position};
}

// Whatever lies between the first element and the last moves with them.
int64_t use_large_pages(const Tensor& x) {
  int64_t elements = x.numel() ? 1 : 0;
  for (int64_t i = 0; elements && i < x.dim(); ++i) elements += (x.size(i) - 1) * x.stride(i);
  return cprune::use_large_pages(x.data_ptr(), elements * static_cast<int64_t>(x.element_size()));
}

std::string backend() { return cprune::name_of(cprune::best_isa()); }

std::string isas() {
  std::string all;
  for (Isa isa : cprune::kIsas) {
    if (cprune::supported(isa)) all += (all.empty() ? "" : " ") + std::string(cprune::name_of(isa));
  }
  return all;
}

}  // namespace

STABLE_TORCH_LIBRARY(cprune_native, m) {
  m.def(
      "moe_forward(Tensor hidden, Tensor index, Tensor gates, Tensor gate_up, Tensor down, Tensor? gate_up_bias=None, "
      "Tensor? down_bias=None, int activation=0, float alpha=1.0, float limit=0.0, str isa=\"\") -> Tensor");
  m.def(
      "moe_observe(Tensor hidden, Tensor index, Tensor gates, Tensor gate_up, Tensor down, Tensor valid, "
      "str isa=\"\") -> (Tensor out, Tensor norms, Tensor high, Tensor low, Tensor sums)");
  m.def("causal_attention(Tensor q, Tensor k, Tensor v, float scale, str isa=\"\") -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float epsilon, str isa=\"\") -> Tensor");
  m.def("centred_grams(Tensor y, str isa=\"\") -> Tensor");
  m.def("gram(Tensor x, str isa=\"\") -> Tensor");
  m.def("group_tokens(Tensor index, int num_experts) -> (Tensor order, Tensor offsets, Tensor position)");
  m.def("use_large_pages(Tensor x) -> int");
  m.def("backend() -> str");
  m.def("isas() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(cprune_native, CPU, m) {
  m.impl("moe_forward", TORCH_BOX(&moe_forward));
  m.impl("moe_observe", TORCH_BOX(&moe_observe));
  m.impl("causal_attention", TORCH_BOX(&causal_attention));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("centred_grams", TORCH_BOX(&centred_grams));
  m.impl("gram", TORCH_BOX(&gram));
  m.impl("group_tokens", TORCH_BOX(&group_tokens));
  m.impl("use_large_pages", TORCH_BOX(&use_large_pages));
}
STABLE_TORCH_LIBRARY_IMPL(cprune_native, CompositeExplicitAutograd, m) {
  m.impl("backend", TORCH_BOX(&backend));
  m.impl("isas", TORCH_BOX(&isas));
}
