"""The experts of a transformers model on cprune's kernels: what `experts_implementation="cprune"` runs.

Knows the contract of transformers 5 for experts modules (flags `has_gate`, `has_bias`, `is_transposed`,
`is_concatenated`, weights `gate_up_proj`, `down_proj`), and nothing else of transformers; `cprune.hf` registers it.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn

from cprune_kernels import backend
from cprune_kernels.fused_moe import ON_GPU, SILU, Activation, moe_forward
from cprune_kernels.layer import activation_of
from cprune_kernels.native import ISAS, wants_gradients
from cprune_kernels.routing import remap

log = logging.getLogger(__name__)

SERVE = "cprune"
BF16_PRODUCTS = ISAS[ISAS.index("avx512_bf16") :]  # from these instructions on, kernels beat the matrix library
FP32_PRODUCTS = ISAS[ISAS.index("avx512") :]  # the same, while experts have at most `FEW_ROWS` on average
FEW_ROWS = 128


@torch.compiler.assume_constant_result
def served_activation(experts: nn.Module) -> Activation | None:
    """The activation of an experts module, found once; None, which is logged, where no kernel computes its experts."""
    if "cprune_activation" not in experts.__dict__:
        try:
            experts.cprune_activation = activation_of(experts)
        except ValueError as error:
            experts.cprune_activation = None
            _say_once(str(error))
    return experts.__dict__["cprune_activation"]


@functools.cache
def _say_once(reason: str) -> None:
    log.warning("experts run as transformers has them, without kernels: %s", reason)


def weight_layout(experts: nn.Module) -> dict[str, Any]:
    """The keyword arguments by which `moe_forward` and `moe_observe` know the weights of an experts module."""
    return {
        "gate_up_bias": experts.gate_up_proj_bias if experts.has_bias else None,
        "down_bias": experts.down_proj_bias if experts.has_bias else None,
        "activation": served_activation(experts),
        "transposed": experts.is_transposed,
        "interleaved": not experts.is_concatenated,
    }


def serve_experts(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts implementation: hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K] -> [T, H].

    Slots outside the experts, as expert parallelism has them, contribute nothing. Experts that the kernels cannot
    compute run in their module's own forward.
    """
    if served_activation(experts) is None:
        return type(experts).forward.__wrapped__(experts, hidden_states, top_k_index, top_k_weights)
    options = weight_layout(experts)
    hidden = hidden_states
    if hidden.dtype != experts.down_proj.dtype and experts.down_proj.dtype in (*ON_GPU, torch.float64):
        hidden = hidden.to(experts.down_proj.dtype)  # inputs of float32 under autocast
    if getattr(experts, "repeats_choices", False) and not (torch.is_grad_enabled() and top_k_weights.requires_grad):
        num = experts.down_proj.shape[0]  # of a merged model: one visit to an expert, with the sum of the gates
        top_k_index, top_k_weights = remap(top_k_index, top_k_weights, torch.arange(num, device=hidden.device), num)
    out = moe_forward(hidden, top_k_index, top_k_weights, experts.gate_up_proj, experts.down_proj, **options)
    return out.to(hidden_states.dtype)


def observed_by_one_kernel(experts: nn.Module, hidden: torch.Tensor) -> bool:
    """Whether `moe_observe` computes what this experts module does, and faster than the matrix library."""
    if not _fits(experts, hidden):
        return False
    if hidden.device.type == "cuda":
        return hidden.dtype in ON_GPU
    return hidden.dtype == torch.bfloat16 and _is_plain(experts) and backend() in BF16_PRODUCTS


def served_by_one_kernel(experts: nn.Module, hidden: torch.Tensor, index: torch.Tensor) -> bool:
    """Whether `serve_experts` does, for index [T, K]: in float32 too where experts have few rows each."""
    if hidden.dtype != torch.float32 or hidden.device.type != "cpu":
        return observed_by_one_kernel(experts, hidden)
    few = index.numel() <= FEW_ROWS * experts.down_proj.shape[0]
    return few and backend() in FP32_PRODUCTS and _fits(experts, hidden) and _is_plain(experts)


def _fits(experts: nn.Module, hidden: torch.Tensor) -> bool:
    """Whether a kernel knows the activation, no gradient is wanted, and all is of one type in one place."""
    if served_activation(experts) is None or wants_gradients(hidden, experts.down_proj):
        return False
    tensors = (hidden, experts.gate_up_proj, experts.down_proj)
    return len({(x.dtype, x.device.type) for x in tensors}) == 1


def _is_plain(experts: nn.Module) -> bool:
    plain = experts.is_concatenated and not (experts.is_transposed or experts.has_bias)
    return plain and served_activation(experts) == SILU
