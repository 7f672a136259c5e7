"""out_t = sum_{s <= t} softmax_s(scale q_t . k_s) v_s: causal self-attention of whole sequences.

The one kernel here that knows no experts, for the walk through a model on a CPU: where a processor multiplies bfloat16
but has no AMX, the matrix library behind torch's attention widens it to float32 first, and attention then takes as long
as a third of the experts. The native kernel runs on their tiles. Everything else is torch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cprune_kernels.native import backend, wants_gradients

__all__ = ["attends_natively", "causal_attention", "causal_attention_reference"]

NATIVE = "avx512_bf16"


def causal_attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The specification of `causal_attention`, in the type of the inputs."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    later = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
    return (scores.masked_fill(later, float("-inf")).softmax(-1) @ v).transpose(1, 2)


def attends_natively(*inputs: Tensor) -> bool:
    """Whether the native kernel serves these inputs: bfloat16 on a CPU with AVX-512-BF16 and no AMX, no gradients."""
    fit = all(x.is_cpu and x.dtype == torch.bfloat16 for x in inputs)
    return fit and not wants_gradients(*inputs) and backend() == NATIVE


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention of every token to itself and those before it.

    Args:
        q: [B, heads, S, D] floating; k [B, shared, S, D] and v [B, shared, S, W] of the same type, each of their heads
            for heads / shared of q.
        scale: above 0; 1 / sqrt(D) by default.

    Returns [B, S, heads, W]. The native kernel (see `attends_natively`) rounds what weighs the values to bfloat16, as
    torch does, and gives the same bits for any number of threads. Raises ValueError for shapes that do not fit.
    """
    _check(q, k, v, scale)
    if attends_natively(q, k, v):
        return torch.ops.cprune_native.causal_attention(q, k, v, q.shape[3] ** -0.5 if scale is None else scale)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    if q.dim() != 4 or 0 in q.shape[1::2] or not q.is_floating_point():
        raise ValueError(f"q must be a floating [B, heads, S, D], got {q.dtype} of shape {list(q.shape)}")
    batch, heads, tokens, depth = q.shape
    for name, x in (("k", k), ("v", v)):
        fits = x.dim() == 4 and (x.shape[0], x.shape[2]) == (batch, tokens) and 0 not in x.shape[1::2]
        if not fits or x.dtype != q.dtype or heads % x.shape[1]:
            raise ValueError(
                f"{name} must be {q.dtype} [{batch}, a part of {heads}, {tokens}, D], got {x.dtype} of shape "
                f"{list(x.shape)}"
            )
    if k.shape[1] != v.shape[1] or k.shape[3] != depth:
        raise ValueError(
            f"k must have the heads of v, {v.shape[1]}, and the D of q, {depth}, got shape {list(k.shape)}"
        )
    if scale is not None and not 0.0 < scale < float("inf"):
        raise ValueError(f"scale must be above 0 and finite, got {scale}")
