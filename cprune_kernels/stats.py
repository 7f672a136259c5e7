"""What calibration wants to know of each expert, from numbers the forward has at hand: no [E, T, H] tensor, no atomics.

For expert e, its routed pairs (t, k), gate g, output y and hidden state h: sums of 1, g, g|y|, (g|y|)^2, g|y|/|h|, |y|,
|y|^2, the greatest |y|, and how often two experts meet in a token. That reads some 20 bytes a pair, where the experts
move several rows of H: bound by launches. Pairs come in the order of the routing's grouping, one expert after the
other, so a program walks a segment of it and adds in float64, in an order that only shapes decide.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FIELDS = ("gate_sum", "gated_norm_sum", "gated_sq_sum", "relative_sum", "norm_sum", "norm_sq_sum", "norm_max")
SCALE_FLOOR = 2.0**-100  # a hidden state of zeros makes no infinity


class ExpertSums(NamedTuple):
    """Sums over the routed pairs of each expert whose token counts; float64 but for the two of integers."""

    count: Tensor  # [E] int64 pairs
    gate_sum: Tensor  # [E] sum g
    gated_norm_sum: Tensor  # [E] sum g |y|
    gated_sq_sum: Tensor  # [E] sum (g |y|)^2
    relative_sum: Tensor  # [E] sum g |y| / scale, 0 without a scale
    norm_sum: Tensor  # [E] sum |y|
    norm_sq_sum: Tensor  # [E] sum |y|^2
    norm_max: Tensor  # [E] greatest |y|, 0 for an expert without a pair
    coactivation: Tensor  # [E, E] int64 pairs of slots of one token that hold i and j: tokens, where its experts differ


def expert_statistics_reference(
    index: Tensor, gates: Tensor, norms: Tensor, scale: Tensor | None, valid: Tensor | None, num_experts: int
) -> ExpertSums:
    """The specification of `expert_statistics`, by counting; also its CPU kernel."""
    counted = (index >= 0) & (index < num_experts)
    if valid is not None:
        counted &= valid.unsqueeze(1)
    expert = torch.where(counted, index.long(), num_experts)  # the rest goes to a bin of its own, which is cut off
    bins = num_experts + 1

    def by_expert(values: Tensor) -> Tensor:
        sums = torch.bincount(expert.flatten(), weights=values.flatten(), minlength=bins)
        return sums[:num_experts].double()  # of nothing, bincount makes integers

    gates, norms = gates.double(), norms.double()
    gated = gates * norms
    relative = torch.zeros_like(gated) if scale is None else gated / scale.double().clamp_min(SCALE_FLOOR).unsqueeze(1)
    peak = torch.zeros(bins, dtype=torch.float64, device=index.device)
    peak.scatter_reduce_(0, expert.flatten(), norms.flatten(), "amax")
    meetings = (expert.unsqueeze(2) * bins + expert.unsqueeze(1)).flatten()  # [T, K, K]
    return ExpertSums(
        torch.bincount(expert.flatten(), minlength=bins)[:num_experts],
        *(by_expert(values) for values in (gates, gated, gated.square(), relative, norms, norms.square())),
        peak[:num_experts],
        torch.bincount(meetings, minlength=bins * bins).view(bins, bins)[:-1, :-1].contiguous(),
    )


def packed(count: Tensor, fields: Tensor, coactivation: Tensor) -> ExpertSums:
    return ExpertSums(count, *fields, coactivation)


def expert_statistics(
    index: Tensor,
    gates: Tensor,
    norms: Tensor,
    scale: Tensor | None,
    valid: Tensor | None,
    num_experts: int,
) -> ExpertSums:
    """Sums over the routed pairs of each expert. Not differentiable; the same numbers whenever it is called.

    Args:
        index: [T, K] int32 or int64: the experts of each token; a slot outside [0, num_experts) counts nowhere.
        gates: [T, K] floating.
        norms: [T, K] floating, >= 0: |y| of each pair, y the expert's output before its gate (`moe_observe`'s norms).
        scale: [T] floating, >= 0: |h|, which `relative_sum` divides by (at least 2^-100); None leaves that sum 0.
        valid: [T] bool: the tokens that count; all of them by default.
        num_experts: E, at least 1.

    Raises ValueError, in one sentence, for a wrong shape or type.
    """
    _check(index, gates, norms, scale, valid, num_experts)
    return packed(*torch.ops.cprune.expert_statistics(index, gates, norms, scale, valid, num_experts))


def _check(
    index: Tensor, gates: Tensor, norms: Tensor, scale: Tensor | None, valid: Tensor | None, num_experts: int
) -> None:
    if index.dim() != 2 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"index must be an int32 or int64 [T, K], got {index.dtype} of shape {list(index.shape)}")
    for name, x in (("gates", gates), ("norms", norms)):
        if x.shape != index.shape or not x.is_floating_point():
            raise ValueError(
                f"{name} must be floating of the shape of index {list(index.shape)}, got {x.dtype} of shape "
                f"{list(x.shape)}"
            )
    tokens = len(index)
    if scale is not None and (scale.shape != (tokens,) or not scale.is_floating_point()):
        raise ValueError(f"scale must be a floating [{tokens}], got {scale.dtype} of shape {list(scale.shape)}")
    if valid is not None and (valid.shape != (tokens,) or valid.dtype != torch.bool):
        raise ValueError(f"valid must be a bool [{tokens}], got {valid.dtype} of shape {list(valid.shape)}")
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    devices = sorted({str(x.device) for x in (index, gates, norms, scale, valid) if x is not None})
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {' and '.join(devices)}")


@torch.library.custom_op("cprune::expert_statistics", mutates_args=(), device_types="cuda")
def _expert_statistics(
    index: Tensor, gates: Tensor, norms: Tensor, scale: Tensor | None, valid: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    index = index.contiguous()
    others = [None if x is None else x.contiguous() for x in (gates, norms, scale, valid)]
    from cprune_kernels.stats_launches import run  # Triton is imported where there is a GPU

    return run(index, *others, num_experts)


@_expert_statistics.register_kernel("cpu")
def _(
    index: Tensor, gates: Tensor, norms: Tensor, scale: Tensor | None, valid: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    sums = expert_statistics_reference(index, gates, norms, scale, valid, num_experts)
    return sums.count, torch.stack([getattr(sums, name) for name in FIELDS]), sums.coactivation


@_expert_statistics.register_fake
def _(
    index: Tensor, gates: Tensor, norms: Tensor, scale: Tensor | None, valid: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    count = index.new_empty(num_experts, dtype=torch.int64)
    fields = index.new_empty(len(FIELDS), num_experts, dtype=torch.float64)
    return count, fields, index.new_empty(num_experts, num_experts, dtype=torch.int64)
