"""The kernels of `expert_statistics`: one walks a part of an expert's pairs, one adds the parts in their order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cprune_kernels.launch import Launch
from cprune_kernels.output_stats import as_bytes, splits_of
from cprune_kernels.picker import Arch, arch_of
from cprune_kernels.routing import RoutedTokens
from cprune_kernels.routing_launches import group_tokens_launches
from cprune_kernels.stats import FIELDS, SCALE_FLOOR, ExpertSums, packed

PAIRS, ROWS, COLUMNS = 128, 16, 128  # pairs a step of the sums; pairs x experts a step of the co-activation


@triton.jit
def _wide(values):
    """Any floating type to float64; bfloat16 passes through float32."""
    return values.to(tl.float32).to(tl.float64) if values.dtype == tl.bfloat16 else values.to(tl.float64)


@triton.jit
def _expert_sums_kernel(
    order_ptr,  # [R] pairs t K + k, grouped by expert
    offsets_ptr,  # [E + 1] where in `order` an expert begins
    index_ptr,  # [T, K] int32 or int64
    gates_ptr,  # [T, K]
    norms_ptr,  # [T, K]
    scale_ptr,  # [T] or None
    valid_ptr,  # [T] uint8 or None
    sums_ptr,  # [SPLITS, E, 8] float64: count, then FIELDS
    meetings_ptr,  # [SPLITS, E, E] int32
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    SPLITS: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FLOOR: tl.constexpr,
):
    """A part of the pairs of one expert: blocks `split`, `split` + SPLITS, ... of its segment."""
    expert, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, last = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    place = split * EXPERTS + expert

    count, gate_sum = tl.zeros((PAIRS,), tl.float64), tl.zeros((PAIRS,), tl.float64)
    gated_sum, gated_sq_sum = tl.zeros((PAIRS,), tl.float64), tl.zeros((PAIRS,), tl.float64)
    relative_sum, norm_sum = tl.zeros((PAIRS,), tl.float64), tl.zeros((PAIRS,), tl.float64)
    norm_sq_sum, norm_max = tl.zeros((PAIRS,), tl.float64), tl.zeros((PAIRS,), tl.float64)
    for row in range(first + split * PAIRS, last, SPLITS * PAIRS):
        rows = row + tl.arange(0, PAIRS)
        live = rows < last
        pair = tl.load(order_ptr + rows, mask=live, other=0).to(tl.int64)
        if valid_ptr is not None:
            live &= tl.load(valid_ptr + pair // TOP_K, mask=live, other=0) != 0
        gate = _wide(tl.load(gates_ptr + pair, mask=live, other=0.0))
        norm = _wide(tl.load(norms_ptr + pair, mask=live, other=0.0))
        gated = gate * norm
        count += live.to(tl.float64)
        gate_sum += gate
        gated_sum += gated
        gated_sq_sum += gated * gated
        norm_sum += norm
        norm_sq_sum += norm * norm
        norm_max = tl.maximum(norm_max, norm)
        if scale_ptr is not None:
            scale = _wide(tl.load(scale_ptr + pair // TOP_K, mask=live, other=1.0))
            relative_sum += gated / tl.maximum(scale, FLOOR)
    out = sums_ptr + place * 8
    tl.store(out, tl.sum(count, 0))
    tl.store(out + 1, tl.sum(gate_sum, 0))
    tl.store(out + 2, tl.sum(gated_sum, 0))
    tl.store(out + 3, tl.sum(gated_sq_sum, 0))
    tl.store(out + 4, tl.sum(relative_sum, 0))
    tl.store(out + 5, tl.sum(norm_sum, 0))
    tl.store(out + 6, tl.sum(norm_sq_sum, 0))
    tl.store(out + 7, tl.max(norm_max, 0))

    for column in range(0, EXPERTS, COLUMNS):
        others = column + tl.arange(0, COLUMNS)
        met = tl.zeros((ROWS, COLUMNS), tl.int32)
        for row in range(first + split * ROWS, last, SPLITS * ROWS):
            rows = row + tl.arange(0, ROWS)
            live = rows < last
            token = tl.load(order_ptr + rows, mask=live, other=0).to(tl.int64) // TOP_K
            if valid_ptr is not None:
                live &= tl.load(valid_ptr + token, mask=live, other=0) != 0
            for slot in range(TOP_K):
                other = tl.load(index_ptr + token * TOP_K + slot, mask=live, other=-1).to(tl.int32)
                met += (other[:, None] == others[None, :]).to(tl.int32)
        tl.store(meetings_ptr + place * EXPERTS + others, tl.sum(met, 0), mask=others < EXPERTS)


@triton.jit
def _finish_sums_kernel(
    sums_ptr,  # [SPLITS, E, 8] float64
    meetings_ptr,  # [SPLITS, E, E] int32
    count_ptr,  # [E] int64
    fields_ptr,  # [7, E] float64
    coactivation_ptr,  # [E, E] int64
    EXPERTS: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The parts of one expert, added in their order."""
    expert = tl.program_id(0).to(tl.int64)
    field = tl.arange(0, 8)
    total = tl.zeros((8,), tl.float64)
    for split in range(SPLITS):
        part = tl.load(sums_ptr + (split * EXPERTS + expert) * 8 + field)
        total = tl.where(field == 7, tl.maximum(total, part), total + part)
    count = tl.sum(tl.where(field == 0, total, 0.0), 0)
    tl.store(count_ptr + expert, count.to(tl.int64))
    tl.store(fields_ptr + (field - 1) * EXPERTS + expert, total, mask=field > 0)
    for column in range(0, EXPERTS, COLUMNS):
        others = column + tl.arange(0, COLUMNS)
        met = tl.zeros((COLUMNS,), tl.int64)
        for split in range(SPLITS):
            part = meetings_ptr + (split * EXPERTS + expert) * EXPERTS + others
            met += tl.load(part, mask=others < EXPERTS, other=0).to(tl.int64)
        tl.store(coactivation_ptr + expert * EXPERTS + others, met, mask=others < EXPERTS)


def expert_statistics_launches(
    index: Tensor,
    gates: Tensor,
    norms: Tensor,
    scale: Tensor | None,
    valid: Tensor | None,
    routed: RoutedTokens,
    num_experts: int,
    arch: Arch,
) -> tuple[list[Launch], ExpertSums]:
    """The launches of `expert_statistics` over a grouping of the same `index`; all tensors contiguous."""
    launches, outputs = _launches(index, gates, norms, scale, valid, routed, num_experts, arch)
    return launches, packed(*outputs)


def _launches(
    index: Tensor,
    gates: Tensor,
    norms: Tensor,
    scale: Tensor | None,
    valid: Tensor | None,
    routed: RoutedTokens,
    num_experts: int,
    arch: Arch,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
    """The launches, and (count [E] int64, FIELDS [7, E] float64, coactivation [E, E] int64)."""
    top_k, pairs = index.shape[1], index.numel()
    splits = splits_of(num_experts, pairs, 4 * PAIRS, arch)
    float64 = {"dtype": torch.float64, "device": index.device}
    parts = torch.empty(splits, num_experts, 8, **float64)
    meetings = torch.empty(splits, num_experts, num_experts, dtype=torch.int32, device=index.device)
    count = index.new_empty(num_experts, dtype=torch.int64)
    fields = torch.empty(len(FIELDS), num_experts, **float64)
    coactivation = index.new_empty(num_experts, num_experts, dtype=torch.int64)
    partial = {"sums_ptr": parts, "meetings_ptr": meetings}
    sizes = {"EXPERTS": num_experts, "SPLITS": splits, "COLUMNS": COLUMNS}
    gather = Launch(
        _expert_sums_kernel,
        (num_experts, splits),
        {
            "order_ptr": routed.order,
            "offsets_ptr": routed.offsets,
            "index_ptr": index,
            "gates_ptr": gates,
            "norms_ptr": norms,
            "scale_ptr": scale,
            "valid_ptr": as_bytes(valid),
            **partial,
        },
        {"TOP_K": top_k, **sizes, "PAIRS": PAIRS, "ROWS": ROWS, "FLOOR": SCALE_FLOOR},
    )
    outputs = {"count_ptr": count, "fields_ptr": fields, "coactivation_ptr": coactivation}
    finish = Launch(_finish_sums_kernel, (num_experts,), {**partial, **outputs}, sizes)
    return [gather, finish], (count, fields, coactivation)


def run(
    index: Tensor, gates: Tensor, norms: Tensor, scale: Tensor | None, valid: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Group the pairs by expert and sum, on the current stream of the GPU that holds them."""
    with torch.cuda.device(index.device):
        arch = arch_of(index.device)
        launches, routed = group_tokens_launches(index, num_experts, PAIRS, arch)
        own, outputs = _launches(index, gates, norms, scale, valid, routed, num_experts, arch)
        for launch in (*launches, *own):
            launch.run()
    return outputs
