"""y = weight * (x / sqrt(mean(x^2) + epsilon)): the norm of most models' rows, in one read and one write.

For the walk through a model on a CPU, like `causal_attention`: torch takes seven passes for it, over arrays of float32
that are each in memory of their own. Everything else is torch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cprune_kernels.native import backend, wants_gradients

__all__ = ["norms_natively", "rms_norm", "rms_norm_reference"]


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The specification of `rms_norm`, with the roundings that models have: before the weight, and after it."""
    values = x.float()
    scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon)
    return weight * (values * scale).to(x.dtype)


def norms_natively(x: Tensor, weight: Tensor) -> bool:
    """Whether the native kernel serves these inputs: 16-bit or float32, on a CPU, where it was built, no gradients."""
    fits = x.is_cpu and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return fits and not wants_gradients(x, weight) and backend() != "reference"


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The norm of rows.

    Args:
        x: [..., N] bf16, fp16 or fp32; weight [N] of the same type.
        epsilon: at least 0.

    Returns [..., N]. The mean is summed in float32. Raises ValueError for shapes or types that do not fit.
    """
    if x.dim() == 0 or weight.shape != x.shape[-1:] or weight.dtype != x.dtype or not x.is_floating_point():
        raise ValueError(
            f"x must be floating [..., N] and weight [N] of the same type, got {x.dtype} {list(x.shape)} and "
            f"{weight.dtype} {list(weight.shape)}"
        )
    if not 0.0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon must be at least 0 and finite, got {epsilon}")
    if norms_natively(x, weight):
        return torch.ops.cprune_native.rms_norm(x, weight, epsilon)
    return rms_norm_reference(x, weight, epsilon)
