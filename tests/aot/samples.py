"""Small kernels on which the harness itself is tested: a masked sum, and a product fed by pointers or descriptors."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from cprune_kernels.launch import Launch


@triton.jit(do_not_specialize=["seed"])
def masked_add(x_ptr, y_ptr, out_ptr, count, stride, seed, scale, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + i * stride, mask=i < count, other=0.0).to(tl.float32) * scale + seed
    if y_ptr is not None:
        value += tl.load(y_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, value, mask=i < count)


@triton.jit
def product(
    a_ptr,
    b_ptr,
    out_ptr,
    rows,
    stride,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """out [rows, N] = a [rows, K] @ b [N, K]^T; with DESCRIBED, b_ptr is a descriptor."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n0 = tl.program_id(1) * BN
    n, k = n0 + tl.arange(0, BN), tl.arange(0, BK)
    accumulator = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(0, K, BK):
        a = tl.load(a_ptr + m[:, None].to(tl.int64) * stride + step + k[None, :], mask=m[:, None] < rows, other=0.0)
        if DESCRIBED:
            b = b_ptr.load([n0, step]).T
        else:
            b = tl.load(b_ptr + n[None, :].to(tl.int64) * K + step + k[:, None])
        accumulator = tl.dot(a, b, accumulator, input_precision="ieee")
    out = accumulator.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + m[:, None].to(tl.int64) * N + n[None, :], out, mask=m[:, None] < rows)


def add_launch(
    x: torch.Tensor, y: torch.Tensor | None, out: torch.Tensor, stride: int = 1, seed: int = 16, scale: float = 0.5
) -> Launch:
    args = {"x_ptr": x, "y_ptr": y, "out_ptr": out, "count": out.numel(), "stride": stride, "seed": seed}
    return Launch(masked_add, (triton.cdiv(out.numel(), 128),), {**args, "scale": scale}, {"BLOCK": 128})


def product_launch(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    tile: tuple[int, int, int] = (64, 64, 64),
    described: bool = False,
    warps: int = 4,
    stages: int = 3,
) -> Launch:
    (m, n, k), (rows, columns) = tile, out.shape
    operand = TensorDescriptor.from_tensor(b, [n, k]) if described else b
    args = {"a_ptr": a, "b_ptr": operand, "out_ptr": out, "rows": rows, "stride": a.stride(0)}
    constants = {"N": columns, "K": a.shape[1], "BM": m, "BN": n, "BK": k, "DESCRIBED": described}
    return Launch(product, (triton.cdiv(rows, m), columns // n), args, constants, warps, stages)


def meta_product(
    rows: int = 4096, columns: int = 4096, depth: int = 4096, stride: int | None = None, **options: Any
) -> Launch:
    """A product of that size on tensors without memory; `stride` is that of a's rows."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    a = empty(rows, stride or depth)[:, :depth]
    return product_launch(a, empty(columns, depth), empty(rows, columns), **options)
