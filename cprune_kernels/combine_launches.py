"""The launch of the combine: the gates' weighted sum of what a token's experts gave."""

from __future__ import annotations

import triton
from torch import Tensor

from cprune_kernels.expert_gemm import combine_kernel
from cprune_kernels.launch import Launch
from cprune_kernels.picker import Tile
from cprune_kernels.routing import RoutedTokens


def combine_columns(top_k: int, width: int, norms: bool, down: Tile) -> tuple[int, int, int]:
    """Of the combine: (columns at a time, columns of a program, warps). A program of norms has all columns."""
    columns, warps = (1024, 4) if norms else (512, 2)
    while triton.next_power_of_2(top_k) * columns > 8192:  # numbers in registers
        columns //= 2
    if norms:
        return columns, triton.cdiv(width, columns) * columns, warps
    return columns, max(columns, down.n) if down.wide else columns, warps


def combine_launch(
    y: Tensor,
    routed: RoutedTokens,
    gates: Tensor,
    out: Tensor,
    norms: Tensor | None,
    index: Tensor,
    done: Tensor | None,
    down: Tile,
) -> Launch:
    """A program per token and block of columns; per token where it also sums squares along them.

    After wide tiles it starts as SMs have none left, and takes rows that are `done`.
    """
    (tokens, top_k), (split_k, rows, width) = gates.shape, y.shape
    columns, span, warps = combine_columns(top_k, width, norms is not None, down)
    return Launch(
        combine_kernel,
        (tokens, triton.cdiv(width, span)),
        {
            "y_ptr": y,
            "position_ptr": routed.position,
            "gates_ptr": gates,
            "out_ptr": out,
            "norms_ptr": norms,
            "done_ptr": done,
            "index_ptr": None if done is None else index,
            "offsets_ptr": None if done is None else routed.offsets,
            "rows": rows,
        },
        {
            "stride_gt": gates.stride(0),
            "stride_gk": gates.stride(1),
            "H": width,
            "K": top_k,
            "KP": triton.next_power_of_2(top_k),
            "BH": columns,
            "SPAN": span,
            "SPLIT": split_k,
            "BM": down.m,
            "BN": down.n,
        },
        warps,
        early=done is not None,
    )
