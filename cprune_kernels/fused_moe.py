"""The routed experts of a layer and what they gave: out_t = sum_k g_tk y_tk, y = down_e (silu(gate_e x) * (up_e x)).

Bound by the matrix products when many tokens meet each expert. One operator because everything between them (gather,
activation, norms, sums, the weighted combine) would otherwise pass through memory several times, and because statistics
then come from y in float32, before it is rounded. csrc/cpu/moe_forward.cpp is the native kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cprune_kernels.native import backend


class MoEObservation(NamedTuple):
    """The combined output of a layer, and of the outputs y before gates apply: all float32."""

    out: Tensor  # [T, H]
    norms: Tensor  # [T, K] |y|; 0 where the slot has no expert
    high: Tensor  # [E] greatest component of y over the valid tokens, -inf for an expert without one
    low: Tensor  # [E] smallest component, +inf for an expert without one
    sums: Tensor  # [E, H] sum of y over the valid tokens


def moe_observe_reference(
    hidden: Tensor, index: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor, valid: Tensor | None = None
) -> MoEObservation:
    """The specification of `moe_observe`, an expert at a time."""
    valid = _checked(hidden, index, gates, gate_up, down, valid)
    (tokens, width), (experts, _, inner) = hidden.shape, down.shape
    out, norms = gates.new_zeros(tokens, width, dtype=torch.float32), torch.zeros_like(gates, dtype=torch.float32)
    high, low = out.new_full((experts,), -torch.inf), out.new_full((experts,), torch.inf)
    sums = out.new_zeros(experts, width)
    for expert in range(experts):
        token, slot = (index == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        both = hidden[token].float() @ gate_up[expert].float().T  # [n, 2 I]
        act = (F.silu(both[:, :inner]) * both[:, inner:]).to(hidden.dtype)
        y = act.float() @ down[expert].float().T  # [n, H]
        out.index_add_(0, token, y * gates[token, slot].float().unsqueeze(1))
        norms[token, slot] = torch.linalg.vector_norm(y, dim=1)
        y = y[valid[token]]
        if len(y):
            low[expert], high[expert] = y.aminmax()
            sums[expert] = y.sum(0)
    return MoEObservation(out, norms, high, low, sums)


def moe_observe(
    hidden: Tensor, index: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor, valid: Tensor | None = None
) -> MoEObservation:
    """Run the routed (token, expert) pairs of a layer and reduce what each expert gave. Not differentiable.

    Args:
        hidden: [T, H] floating.
        index: [T, K] int64: the experts of each token; a slot outside [0, E) contributes nothing.
        gates: [T, K] floating, applied to the outputs in the combine only.
        gate_up: [E, 2 I, H] of hidden's type: the rows of gate, then those of up.
        down: [E, H, I] of hidden's type.
        valid: [T] bool: the tokens that count in high, low and sums; all of them by default.

    Products are summed in float32, silu(.) * (.) is rounded to hidden's type. The native kernel (CPU, bfloat16, weights
    read where they are if their last dimension is contiguous) gives the same bits for any number of threads.
    Raises ValueError, in one sentence, for a wrong shape or type.
    """
    valid = _checked(hidden, index, gates, gate_up, down, valid)
    if hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu" and backend() != "reference":
        return MoEObservation(*torch.ops.cprune.moe_observe(hidden, index, gates.float(), gate_up, down, valid))
    return moe_observe_reference(hidden, index, gates, gate_up, down, valid)


def _checked(
    hidden: Tensor, index: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor, valid: Tensor | None
) -> Tensor:
    """The mask of tokens that count; raises ValueError where shapes, types or devices do not fit one another."""
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be a floating [T, H], got {hidden.dtype} of shape {list(hidden.shape)}")
    tokens, width = hidden.shape
    if index.dim() != 2 or index.shape[0] != tokens or index.dtype != torch.int64:
        raise ValueError(f"index must be an int64 [{tokens}, K], got {index.dtype} of shape {list(index.shape)}")
    if gates.shape != index.shape or not gates.is_floating_point():
        raise ValueError(
            f"gates must be floating of the shape of index {list(index.shape)}, got {gates.dtype} of shape "
            f"{list(gates.shape)}"
        )
    if down.dim() != 3 or down.shape[1] != width or 0 in down.shape or down.dtype != hidden.dtype:
        raise ValueError(f"down must be a {hidden.dtype} [E, {width}, I], got {down.dtype} of shape {list(down.shape)}")
    fused = (down.shape[0], 2 * down.shape[2], width)
    if gate_up.shape != fused or gate_up.dtype != hidden.dtype:
        raise ValueError(
            f"gate_up must be a {hidden.dtype} {list(fused)}, got {gate_up.dtype} of shape {list(gate_up.shape)}"
        )
    if valid is None:
        valid = torch.ones(tokens, dtype=torch.bool, device=hidden.device)
    if valid.shape != (tokens,) or valid.dtype != torch.bool:
        raise ValueError(f"valid must be a bool [{tokens}], got {valid.dtype} of shape {list(valid.shape)}")
    devices = sorted({str(x.device) for x in (hidden, index, gates, gate_up, down, valid)})
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {' and '.join(devices)}")
    return valid
