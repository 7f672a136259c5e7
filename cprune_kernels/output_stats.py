"""What the outputs of each expert were, over the sorted rows of the down product: greatest, smallest component, sum.

Bound by reading the rows once. A program owns a block of columns of a part of one expert's rows; a second kernel adds
the parts in their order, in float64, so the same numbers come out whenever it runs. No atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cprune_kernels.launch import Launch
from cprune_kernels.picker import Arch
from cprune_kernels.routing import RoutedTokens

ROWS, COLUMNS, STEPS = 4, 512, 4  # a program reads ROWS x COLUMNS at once and adds STEPS of them in float32


class OutputSums(NamedTuple):
    """What the outputs of each expert were before gates apply, over its rows whose token counts: all float32."""

    high: Tensor  # [E] greatest component, -inf for an expert without a row
    low: Tensor  # [E] smallest component, +inf for an expert without a row
    sums: Tensor  # [E, H]


def expert_output_reference(
    rows: Tensor, order: Tensor, offsets: Tensor, valid: Tensor | None, top_k: int
) -> OutputSums:
    """The specification of `expert_output_launches`, an expert at a time; rows [R, H], order [R], offsets [E + 1]."""
    bounds = offsets.tolist()
    sums = rows.new_zeros(len(bounds) - 1, rows.shape[1], dtype=torch.float64)
    high = rows.new_full((len(sums),), -torch.inf, dtype=torch.float32)
    low = high.neg()
    for expert, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        own = rows[first:last].double()
        if valid is not None:
            own = own[valid[order[first:last].long() // top_k]]
        if own.numel():
            low[expert], high[expert] = own.aminmax()
            sums[expert] = own.sum(0)
    return OutputSums(high, low, sums.float())


@triton.jit
def _expert_output_kernel(
    rows_ptr,  # [R, H], grouped by expert
    order_ptr,  # [R] pairs t K + k
    offsets_ptr,  # [E + 1]
    valid_ptr,  # [T] uint8 or None
    sums_ptr,  # [SPLITS, E, H] float64
    high_ptr,  # [E, SPLITS, BLOCKS] float32
    low_ptr,  # [E, SPLITS, BLOCKS] float32
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """A part of the rows of one expert and a block of their columns; float32 over STEPS rows at most, then float64."""
    expert, block, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    first, last = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float64)
    high = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    low = tl.full((ROWS, COLUMNS), float("inf"), tl.float32)
    for row in range(first + split * ROWS * STEPS, last, SPLITS * ROWS * STEPS):
        part = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in tl.static_range(STEPS):
            rows = row + step * ROWS + tl.arange(0, ROWS)
            live = rows < last
            if valid_ptr is not None:
                pair = tl.load(order_ptr + rows, mask=live, other=0)
                live &= tl.load(valid_ptr + pair // TOP_K, mask=live, other=0) != 0
            kept = live[:, None] & (columns < WIDTH)[None, :]
            place = rows_ptr + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
            y = tl.load(place, mask=kept, other=0.0).to(tl.float32)
            part += y
            high = tl.maximum(high, tl.where(kept, y, float("-inf")))
            low = tl.minimum(low, tl.where(kept, y, float("inf")))
        total += part.to(tl.float64)
    out = sums_ptr + (split * EXPERTS + expert) * WIDTH + columns
    tl.store(out, tl.sum(total, 0), mask=columns < WIDTH)
    extreme = (expert * SPLITS + split) * tl.num_programs(1) + block
    tl.store(high_ptr + extreme, tl.max(tl.max(high, 1), 0))
    tl.store(low_ptr + extreme, tl.min(tl.min(low, 1), 0))


@triton.jit
def _finish_output_kernel(
    sums_ptr,  # [SPLITS, E, H] float64
    high_ptr,  # [E, PARTS] float32
    low_ptr,  # [E, PARTS] float32
    out_ptr,  # [E, H] float32
    out_high_ptr,  # [E] float32
    out_low_ptr,  # [E] float32
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS_CEIL: tl.constexpr,
):
    """The parts of one expert in a block of columns, added in their order; the first block takes the extremes."""
    expert, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float64)
    for split in range(SPLITS):
        part = sums_ptr + (split * EXPERTS + expert) * WIDTH + columns
        total += tl.load(part, mask=columns < WIDTH, other=0.0)
    tl.store(out_ptr + expert * WIDTH + columns, total.to(tl.float32), mask=columns < WIDTH)
    if block == 0:
        parts = tl.arange(0, PARTS_CEIL)
        place = expert * PARTS + parts
        high = tl.load(high_ptr + place, mask=parts < PARTS, other=float("-inf"))
        low = tl.load(low_ptr + place, mask=parts < PARTS, other=float("inf"))
        tl.store(out_high_ptr + expert, tl.max(high, 0))
        tl.store(out_low_ptr + expert, tl.min(low, 0))


def expert_output_launches(
    y_rows: Tensor, routed: RoutedTokens, valid: Tensor | None, num_experts: int, arch: Arch
) -> tuple[list[Launch], OutputSums]:
    """Reduce the experts' outputs over the rows of each, in the order of the routing's grouping.

    Args:
        y_rows: [R, H] contiguous floating, R = T K: outputs before gates apply, row r that of pair `routed.order[r]`.
            Rows behind the last expert's segment are not read.
        valid: [T] bool: the tokens that count; all of them by default.
    """
    width = y_rows.shape[1]
    top_k = 1 if valid is None else len(routed.order) // max(1, len(valid))
    blocks = triton.cdiv(width, COLUMNS)
    splits = splits_of(num_experts * blocks, y_rows.shape[0], 4 * ROWS * STEPS, arch)
    float32 = {"dtype": torch.float32, "device": y_rows.device}
    parts = torch.empty(splits, num_experts, width, dtype=torch.float64, device=y_rows.device)
    high, low = (torch.empty(num_experts, splits, blocks, **float32) for _ in range(2))
    out = OutputSums(
        torch.empty(num_experts, **float32),
        torch.empty(num_experts, **float32),
        torch.empty(num_experts, width, **float32),
    )
    partial = {"sums_ptr": parts, "high_ptr": high, "low_ptr": low}
    sizes = {"EXPERTS": num_experts, "WIDTH": width, "SPLITS": splits, "COLUMNS": COLUMNS}
    gather = Launch(
        _expert_output_kernel,
        (num_experts, blocks, splits),
        {
            "rows_ptr": y_rows,
            "order_ptr": routed.order,
            "offsets_ptr": routed.offsets,
            "valid_ptr": as_bytes(valid),
            **partial,
        },
        {"TOP_K": top_k, **sizes, "ROWS": ROWS, "STEPS": STEPS},
    )
    finish = Launch(
        _finish_output_kernel,
        (num_experts, blocks),
        {**partial, "out_ptr": out.sums, "out_high_ptr": out.high, "out_low_ptr": out.low},
        {**sizes, "PARTS": splits * blocks, "PARTS_CEIL": triton.next_power_of_2(splits * blocks)},
    )
    return [gather, finish], out


def splits_of(programs: int, rows: int, rows_each: int, arch: Arch) -> int:
    """Into how many parts a segment is cut: enough to fill the GPU twice, none below a few steps on average."""
    return max(1, min(triton.cdiv(2 * arch.sms, programs), triton.cdiv(rows, programs * rows_each), 64))


def as_bytes(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid.view(torch.uint8)
