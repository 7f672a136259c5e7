"""Inner products between all pairs of experts: G_ij = <x_i, x_j>, what follows from them, and linear CKA.

The rows are long (P = I x H weights, or S x H outputs) and few (E <= 512), so the product is bound by reading x once; a
library matrix product would first want a float32 copy of x and would carry one float32 sum over all of P. Tensor cores
truncate as they add in float32, which over 32768 products biases a sum of squares by 4e-5: no chain is longer.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from cprune_kernels.native import backend
from cprune_kernels.picker import Arch, arch_of

CHAIN = 32768  # products to a float32 sum, at most
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOAT8_BLOCK = 128  # columns to a scale
NATIVE = (torch.bfloat16, torch.float16, torch.float32)


def pairwise_gram(x: Tensor, *, scale: Tensor | None = None, chain: int | None = None) -> Tensor:
    """Inner products of all pairs of rows, G_ij = sum_p x_ip x_jp. Not differentiable.

    Args:
        x: [E, P] or [L, E, P] floating, of any strides. On CUDA, rows that are contiguous and aligned to 16 bytes are
            read once, others more slowly; float64 goes to the matrix library.
        scale: [E, ceil(P / 128)] or [L, E, ceil(P / 128)] float32, for float8_e4m3fn and float8_e5m2 only: x_ip is its
            float8 value times scale[.., i, p // 128], rounded to bfloat16. `row_scales` makes it from 2-D blocks.
        chain: columns that are summed in float32 (in float64 where x is), whole windows of them being added in float64.
            By default at most 32768; on CUDA in whole steps of at most 128.

    Returns [E, E] or [L, E, E] float64, exactly symmetric, the same bits whenever it is called on the same device.
    Raises ValueError, in one sentence, for a wrong shape or type.
    """
    _check_gram(x, scale, chain)
    return torch.ops.cprune.pairwise_gram(x, scale, chain)


def pairwise_gram_reference(x: Tensor, scale: Tensor | None = None, chain: int | None = None) -> Tensor:
    """The specification of `pairwise_gram`. Memory beyond x: one window, L x E x chain elements."""
    chain = chain or CHAIN
    gram = x.new_zeros(*x.shape[:-1], x.shape[-2], dtype=torch.float64)
    for start in range(0, x.shape[-1], chain):
        _add_window(gram, x, scale, start, start + chain)
    return (gram + gram.mT) / 2


def _add_window(gram: Tensor, x: Tensor, scale: Tensor | None, start: int, end: int) -> None:
    window = x[..., start:end]
    if x.dtype in FLOAT8:
        window = window.float()
        if scale is not None:
            columns = torch.arange(start, start + window.shape[-1], device=x.device)
            window = window * scale[..., columns // FLOAT8_BLOCK]
        window = window.bfloat16()
    window = window.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    gram += window @ window.mT


@torch.library.custom_op("cprune::pairwise_gram", mutates_args=(), device_types="cuda")
def _pairwise_gram(x: Tensor, scale: Tensor | None, chain: int | None) -> Tensor:
    if x.dtype == torch.float64:
        return pairwise_gram_reference(x, scale, chain)
    from cprune_kernels.gram_launches import gram_launches  # Triton is imported where there is a GPU

    with torch.cuda.device(x.device):
        launches, gram = gram_launches(x, arch_of(x.device), scale=scale, chain=chain)
        for launch in launches:
            launch.run()
    return gram


@_pairwise_gram.register_kernel("cpu")
def _pairwise_gram_cpu(x: Tensor, scale: Tensor | None, chain: int | None) -> Tensor:
    if chain is None and x.dtype in NATIVE and 0 not in x.shape and x.stride(-1) == 1 and backend() != "reference":
        grams = [torch.ops.cprune_native.gram(rows) for rows in (x if x.dim() == 3 else x[None])]
        return torch.stack(grams) if x.dim() == 3 else grams[0]
    return pairwise_gram_reference(x, scale, chain)


@_pairwise_gram.register_fake
def _(x: Tensor, scale: Tensor | None, chain: int | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-2], dtype=torch.float64)


def row_scales(scale: Tensor, columns: int) -> Tensor:
    """The scales of `pairwise_gram` for weights that have one scale to 128 x 128.

    scale: [.., ceil(N / 128), K / 128] of weights [.., N, K], with K a multiple of 128; columns: N x K, the length of
    a flattened weight. Returns [.., N x K / 128]: flattened weights meet the scales of a row of blocks 128 times over.
    Raises ValueError where columns do not fit.
    """
    rows, across = scale.shape[-2:]
    if not (rows - 1) * FLOAT8_BLOCK < columns / max(1, across * FLOAT8_BLOCK) <= rows * FLOAT8_BLOCK or columns % (
        across * FLOAT8_BLOCK
    ):
        raise ValueError(
            f"columns must be N x {across * FLOAT8_BLOCK} with ceil(N / 128) = {rows} for a scale of shape "
            f"{list(scale.shape)}, got {columns}"
        )
    return scale.repeat_interleave(FLOAT8_BLOCK, dim=-2).flatten(-2)[..., : columns // FLOAT8_BLOCK]


class GramAccumulator:
    """The Gram of rows that arrive some columns at a time, as a layer is read from disk or from pinned memory.

    Windows may have any width. Where all but the last are whole multiples of `chain` (and on CUDA aligned to 16 bytes),
    the result has the bits of `pairwise_gram` of all columns at once with that chain, computed where the windows are.

    Args:
        experts: E.
        device: where the sums are; a window from elsewhere is copied there on the current stream, without waiting for
            it where it is pinned, so that its memory must stay as it is until that stream has come by.
        dtype: of the windows.
        chain: columns that are summed in float32. 4096 keeps an H100 busy with windows of a few million columns.
        arch: what the kernels are for; by default the device's, and torch operations on a CPU.

    Raises ValueError for a chain that is no multiple of 128, or fewer than one expert.
    """

    def __init__(
        self,
        experts: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        *,
        chain: int = 4096,
        arch: Arch | None = None,
    ) -> None:
        if experts < 1:
            raise ValueError(f"experts must be at least 1, got {experts}")
        if chain < 1 or chain % FLOAT8_BLOCK:
            raise ValueError(f"chain must be a multiple of {FLOAT8_BLOCK} and at least that, got {chain}")
        self._device, self._dtype, self._chain = torch.device(device), dtype, chain
        self._arch = arch_of(self._device) if arch is None and self._device.type == "cuda" else arch
        self._arch = None if dtype == torch.float64 else self._arch
        self._chunks = 0
        shape = (experts, experts)
        if self._arch is not None:
            from cprune_kernels.gram_launches import lane_count  # Triton is imported where there is a GPU

            shape = (1, lane_count(experts), *shape)
        self._sums = torch.zeros(shape, dtype=torch.float64, device=self._device)

    def add(self, window: Tensor, *, scale: Tensor | None = None) -> None:
        """Add columns: window [E, w] of the dtype given, with the scales of its own columns as for `pairwise_gram`.

        Raises ValueError for another shape or type.
        """
        experts = self._sums.shape[-1]
        if window.dim() != 2 or len(window) != experts or window.dtype != self._dtype:
            raise ValueError(
                f"window must be a {self._dtype} [{experts}, w], got {window.dtype} of shape {list(window.shape)}"
            )
        _check_gram(window, scale, self._chain)
        window = window.to(self._device, non_blocking=True)
        scale = None if scale is None else scale.to(self._device, non_blocking=True)
        if self._arch is None:
            for start in range(0, window.shape[1], self._chain):
                _add_window(self._sums, window, scale, start, start + self._chain)
            return
        from cprune_kernels.gram_launches import add_launches

        with _current(self._device):
            launches, chunks = add_launches(
                window, self._sums, self._arch, scale=scale, chain=self._chain, first=self._chunks
            )
            for launch in launches:
                launch.run()
        self._chunks += chunks

    def result(self) -> Tensor:
        """The Gram [E, E] float64 of all columns so far; more may follow."""
        if self._arch is None:
            return (self._sums + self._sums.mT) / 2
        from cprune_kernels.gram_launches import finish_launch

        gram = torch.empty(self._sums.shape[-2:], dtype=torch.float64, device=self._device)
        with _current(self._device):
            finish_launch(self._sums, gram).run()
        return gram


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


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


def l2_from_gram(gram: Tensor) -> Tensor:
    """Distances from inner products, |x_i - x_j| = sqrt(G_ii + G_jj - 2 G_ij).

    gram: [..., E, E] of any type, finite. Returns the same shape in float64: exactly 0 on the diagonal, exactly
    symmetric, >= 0. A distance below sqrt(error of G) is lost: rows that agree to 1e-3 of their norm in float32 sums.
    """
    gram = gram.double()
    square = gram.diagonal(dim1=-2, dim2=-1)
    distance = square.unsqueeze(-1) + square.unsqueeze(-2) - (gram + gram.transpose(-2, -1))
    distance = distance.clamp(min=0.0).sqrt()
    distance.diagonal(dim1=-2, dim2=-1).zero_()
    return distance


def pairwise_cka(y: Tensor) -> Tensor:
    """Linear centred kernel alignment between all pairs of experts (Kornblith et al., 1905.00414, eq. 4).

    CKA_ij = <K_i, K_j> / (|K_i| |K_j|) with K_e = Yc_e Yc_e^T [S, S] and Yc_e centred over the S samples. This equals
    |Yc_i^T Yc_j|^2 / (|Yc_i^T Yc_i| |Yc_j^T Yc_j|), at S x S an expert in place of H x H a pair.

    y: [E, S, H] of any floating type but float8, of any strides. Returns [E, E] float64 in [0, 1], 1 on the diagonal;
    an expert that gives the same output for all samples has CKA 0 with every other. Not differentiable.
    Memory beyond y: E x S x S float32, and on a CPU an expert in float32 for each thread. Raises ValueError where y is
    not such an [E, S, H].
    """
    if y.dim() != 3 or not y.is_floating_point() or y.dtype.itemsize < 2:
        raise ValueError(f"y must be a floating [E, S, H], got {y.dtype} of shape {list(y.shape)}")
    return cosine_from_gram(torch.ops.cprune.cka_gram(y)).clamp(min=0.0)


def cka_gram_reference(y: Tensor) -> Tensor:
    """<K_i, K_j> [E, E] float64 of y [E, S, H], up to a factor for every expert: `pairwise_cka` before it is scaled."""
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
    return pairwise_gram(kernels)


@torch.library.custom_op("cprune::cka_gram", mutates_args=(), device_types="cuda")
def _cka_gram(y: Tensor) -> Tensor:
    if y.dtype == torch.float64 or not y.numel():
        return cka_gram_reference(y)
    from cprune_kernels.gram_launches import cka_launches  # Triton is imported where there is a GPU

    with torch.cuda.device(y.device):
        launches, gram = cka_launches(y, arch_of(y.device))
        for launch in launches:
            launch.run()
    return gram


@_cka_gram.register_kernel("cpu")
def _cka_gram_cpu(y: Tensor) -> Tensor:
    if y.dtype not in NATIVE or not y.numel() or backend() == "reference":
        return cka_gram_reference(y)
    return pairwise_gram(torch.ops.cprune_native.centred_grams(y).flatten(1))


@_cka_gram.register_fake
def _(y: Tensor) -> Tensor:
    return y.new_empty(len(y), len(y), dtype=torch.float64)


def _check_gram(x: Tensor, scale: Tensor | None, chain: int | None) -> None:
    if x.dim() not in (2, 3) or not x.is_floating_point():
        raise ValueError(f"x must be a floating [E, P] or [L, E, P], got {x.dtype} of shape {list(x.shape)}")
    if x.dtype.itemsize == 1 and x.dtype not in FLOAT8:
        raise ValueError(f"x must be float8_e4m3fn or float8_e5m2 where it is a float8, got {x.dtype}")
    if x.shape[-1] >= 2**31:
        raise ValueError(f"x must have fewer than 2^31 columns, got {x.shape[-1]}")
    if chain is not None and chain < 1:
        raise ValueError(f"chain must be at least 1, got {chain}")
    if scale is None:
        return
    if x.dtype not in FLOAT8:
        raise ValueError(f"scale must be given for a float8 x only, got x of {x.dtype}")
    shape = (*x.shape[:-1], -(-x.shape[-1] // FLOAT8_BLOCK))
    if scale.shape != shape or scale.dtype != torch.float32 or scale.device != x.device:
        raise ValueError(
            f"scale must be a float32 {list(shape)} on {x.device}, got {scale.dtype} of shape {list(scale.shape)} on "
            f"{scale.device}"
        )
