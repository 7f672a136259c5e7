// The only file that knows torch, through its stable ABI: one binary for every torch from TORCH_TARGET_VERSION on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/moe_forward.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string shape(const Tensor& x) {
  std::string text = "[";
  for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + "]";
}

void check(const Tensor& x, const char* name, const char* type, ScalarType dtype, const std::vector<int64_t>& sizes) {
  bool fits = x.dim() == static_cast<int64_t>(sizes.size());
  std::string wanted = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    fits = fits && x.size(i) == sizes[i];
    wanted += (i ? ", " : "") + std::to_string(sizes[i]);
  }
  STD_TORCH_CHECK(fits, name, " must be ", wanted, "], got ", shape(x));
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, " must be ", type, ", got another type");
}

Tensor with_rows(const Tensor& x) { return x.stride(-1) == 1 || x.size(-1) <= 1 ? x : torch::stable::contiguous(x); }

cprune::Weights weights(const Tensor& x) {
  return {static_cast<const uint16_t*>(x.data_ptr()), x.stride(0), x.stride(1)};
}

float* floats(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> moe_observe(const Tensor& hidden, const Tensor& index,
                                                               const Tensor& gates, const Tensor& gate_up,
                                                               const Tensor& down, const Tensor& valid, bool portable) {
  STD_TORCH_CHECK(hidden.dim() == 2, "hidden must be [T, H], got ", shape(hidden));
  STD_TORCH_CHECK(index.dim() == 2, "index must be [T, K], got ", shape(index));
  STD_TORCH_CHECK(down.dim() == 3, "down must be [E, H, I], got ", shape(down));
  const int64_t tokens = hidden.size(0), width = hidden.size(1), top_k = index.size(1);
  const int64_t experts = down.size(0), intermediate = down.size(2);
  check(hidden, "hidden", "bfloat16", ScalarType::BFloat16, {tokens, width});
  check(index, "index", "int64", ScalarType::Long, {tokens, top_k});
  check(gates, "gates", "float32", ScalarType::Float, {tokens, top_k});
  check(gate_up, "gate_up", "bfloat16", ScalarType::BFloat16, {experts, 2 * intermediate, width});
  check(down, "down", "bfloat16", ScalarType::BFloat16, {experts, width, intermediate});
  check(valid, "valid", "bool", ScalarType::Bool, {tokens});
  STD_TORCH_CHECK(experts && width && intermediate, "E, H and I must be at least 1, got down ", shape(down));

  const Tensor x = with_rows(hidden), fused = with_rows(gate_up), last = with_rows(down);
  const Tensor slots = torch::stable::contiguous(index), scales = torch::stable::contiguous(gates);
  const Tensor counts = torch::stable::contiguous(valid);
  Tensor out = torch::stable::new_zeros(gates, {tokens, width});
  Tensor norms = torch::stable::new_zeros(gates, {tokens, top_k});
  Tensor high = torch::stable::new_empty(gates, {experts}), low = torch::stable::new_empty(gates, {experts});
  Tensor sums = torch::stable::new_zeros(gates, {experts, width});

  const int64_t threads = torch::stable::get_num_threads();
  const cprune::MoeInput in{tokens,
                            top_k,
                            experts,
                            width,
                            intermediate,
                            static_cast<const uint16_t*>(x.data_ptr()),
                            x.stride(0),
                            static_cast<const int64_t*>(slots.data_ptr()),
                            static_cast<const float*>(scales.data_ptr()),
                            static_cast<const bool*>(counts.data_ptr()),
                            weights(fused),
                            weights(last)};
  cprune::moe_forward(in, {floats(out), floats(norms), floats(high), floats(low), floats(sums)}, portable, threads,
                      [threads](const std::function<void()>& work) {
                        torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(); });
                      });
  return {out, norms, high, low, sums};
}

std::string backend() { return cprune::backend(); }

}  // namespace

STABLE_TORCH_LIBRARY(cprune, m) {
  m.def(
      "moe_observe(Tensor hidden, Tensor index, Tensor gates, Tensor gate_up, Tensor down, Tensor valid, "
      "bool portable=False) -> (Tensor out, Tensor norms, Tensor high, Tensor low, Tensor sums)");
  m.def("backend() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(cprune, CPU, m) { m.impl("moe_observe", TORCH_BOX(&moe_observe)); }
STABLE_TORCH_LIBRARY_IMPL(cprune, CompositeExplicitAutograd, m) { m.impl("backend", TORCH_BOX(&backend)); }
