"""Inner products between all pairs of experts: G_ij = <x_i, x_j>, the cosine that follows from it, and linear CKA.

The rows are long (P = I x H weights, or S x H outputs) and few (E <= 512), so the product is bound by reading x once; a
library matrix product would first want a float32 copy of x and would carry one float32 sum over all of P.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pairwise_gram(x: Tensor, *, chain: int = 32768) -> Tensor:
    """Inner products of all pairs of rows, G_ij = sum_p x_ip x_jp.

    x: [E, P] of any floating type and any strides. Returns [E, E] float64, exactly symmetric. Columns are taken in
    windows of at most `chain`; a window is upcast (float64 stays, the rest becomes float32) and multiplied in that
    type, and the windows are added in float64. Memory beyond x: one window, E x chain elements.
    Raises ValueError where x is not a floating [E, P] or chain is below 1.
    """
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be a floating [E, P], got {x.dtype} of shape {list(x.shape)}")
    if chain < 1:
        raise ValueError(f"chain must be at least 1, got {chain}")
    compute = torch.promote_types(x.dtype, torch.float32)
    gram = torch.zeros(x.shape[0], x.shape[0], dtype=torch.float64, device=x.device)
    for window in x.split(chain, dim=1):
        window = window.to(compute)
        gram += window @ window.T
    return (gram + gram.T) / 2


def cosine_from_gram(gram: Tensor) -> Tensor:
    """Cosine similarity from inner products, G_ij / sqrt(G_ii G_jj).

    gram: [..., E, E] of any type, finite. Returns the same shape in float64: exactly 1 on the diagonal, exactly
    symmetric, in [-1, 1]; a row of zero norm has similarity 0 to every other.
    """
    gram = gram.double()
    norm = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    scale = norm.unsqueeze(-1) * norm.unsqueeze(-2)
    cosine = (gram + gram.transpose(-2, -1)) / 2 / scale.where(scale > 0, 1.0)
    cosine = cosine.where(scale > 0, 0.0).clamp(-1.0, 1.0)
    cosine.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return cosine


def pairwise_cka(y: Tensor) -> Tensor:
    """Linear centred kernel alignment between all pairs of experts (Kornblith et al., 1905.00414, eq. 4).

    CKA_ij = <K_i, K_j> / (|K_i| |K_j|) with K_e = Yc_e Yc_e^T [S, S] and Yc_e centred over the S samples. This equals
    |Yc_i^T Yc_j|^2 / (|Yc_i^T Yc_i| |Yc_j^T Yc_j|), at S x S an expert in place of H x H a pair.

    y: [E, S, H] of any floating type. Returns [E, E] float64 in [0, 1], 1 on the diagonal; an expert that gives the
    same output for all samples has CKA 0 with every other. Memory beyond y: E x S x S float32 and one expert.
    Raises ValueError where y is not a floating [E, S, H].
    """
    if y.dim() != 3 or not y.is_floating_point():
        raise ValueError(f"y must be a floating [E, S, H], got {y.dtype} of shape {list(y.shape)}")
    num_experts, samples, _ = y.shape
    kernels = torch.zeros(num_experts, samples * samples, dtype=torch.float32, device=y.device)
    for expert in range(num_experts):
        centred = y[expert].to(torch.promote_types(y.dtype, torch.float32))
        centred = centred - centred[:1]  # a constant output is exactly 0 now; less a rounded mean it would not be
        centred = centred - centred.mean(dim=0)
        # CKA does not depend on the scale, float32 does: squares of massive outputs overflow, of tiny ones vanish.
        peak = centred.abs().max() if centred.numel() else centred.new_zeros(())
        centred = (centred / peak.where(peak > 0, 1.0)).float()
        kernels[expert] = (centred @ centred.T).flatten()
    return cosine_from_gram(pairwise_gram(kernels)).clamp(min=0.0)
