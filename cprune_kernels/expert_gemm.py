"""The Triton kernels of the experts forward, one CTA per tile of rows of one expert.

gate_up    act[r] = f(x[token r] W_gate) (x[token r] W_up + shift), rows sorted by expert, never 2 I columns in memory
activate   the same epilogue on the float32 parts of a split gate_up
down       y[r] = act[r] W_down, or its float32 parts
combine    out[t] = sum_k gate[t, k] y[position[t, k]], and |y| out of the same read

One accumulator holds the gate and the up columns of a tile, so that a single tensor-core instruction of twice the width
reads each row of x once. Weights are read where they are: strides tell rows (hidden contiguous) from columns
(intermediate contiguous), and PAIRED says that gate and up alternate. Sums run in an order that only shapes decide.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(pid, num_tiles, COLUMN_TILES: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile, part): GROUP row tiles share each tile of weights before the next one is read."""
    part = pid % SPLIT
    pid = pid // SPLIT
    group = pid // (GROUP * COLUMN_TILES)
    within = pid % (GROUP * COLUMN_TILES)
    size = tl.minimum(num_tiles - group * GROUP, GROUP)
    return group * GROUP + within % size, within // size, part


@triton.jit
def _pointers(base, row, k, ROWS: tl.constexpr):
    """Of a tile whose rows (ROWS) or columns are contiguous in the summed dimension: [row, k] or [k, row]."""
    if ROWS:
        return base + row[:, None] + k[None, :]
    else:
        return base + k[:, None] + row[None, :]


@triton.jit
def _tile(at, row_ok, k_ok, ROWS: tl.constexpr, RAGGED: tl.constexpr):
    """[row, k] from `_pointers`, zero outside; k is masked where the summed dimension is no multiple of the step."""
    if ROWS:
        mask = row_ok[:, None]
        if RAGGED:
            mask = mask & k_ok[None, :]
        return tl.load(at, mask=mask, other=0.0)
    else:
        mask = row_ok[None, :]
        if RAGGED:
            mask = mask & k_ok[:, None]
        return tl.load(at, mask=mask, other=0.0).T


@triton.jit
def _sides(
    column,
    stride_wp: tl.constexpr,
    stride_wi: tl.constexpr,
    stride_bp: tl.constexpr,
    stride_bi: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    BN: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """Of the BN columns of gate and the BN of up: places in the weights and in the bias, and whether there is one."""
    j = tl.arange(0, 2 * BN)
    if PAIRED:
        at = 2 * BN * column + j
        return at.to(tl.int64) * stride_wp, at * stride_bp, at < 2 * I
    else:
        at = BN * column + j % BN
        return (
            (j // BN).to(tl.int64) * stride_wp + at.to(tl.int64) * stride_wi,
            j // BN * stride_bp + at * stride_bi,
            at < I,
        )


@triton.jit
def _accumulator(bias_ptr, column, ok, BM: tl.constexpr, BN: tl.constexpr, SWAP: tl.constexpr):
    """[BM, BN] or, swapped, [BN, BM] of the bias of each column: it waits in no register after the products."""
    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=ok, other=0.0).to(tl.float32)
        acc += bias[:, None] if SWAP else bias[None, :]
    return acc


@triton.jit
def _activated(
    gate, up, KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr
):  # float32 in, float32 out
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if KIND == "silu":
        gate = gate * tl.sigmoid(ALPHA * gate)
    elif KIND == "gelu":
        gate = 0.5 * gate * (1.0 + tl.erf(0.7071067811865476 * gate))
    else:  # 1 + tanh(z) = 2 sigmoid(2 z)
        gate = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    return gate * (up + SHIFT)


@triton.jit(do_not_specialize=["rows", "depth"])
def gate_up_kernel(
    x_ptr,  # [T, H]
    w,  # pointer, or descriptor of [C, 2, I, H] | [C, 2 I, H] | [C, H, 2, I] | [C, H, 2 I]
    bias_ptr,  # of [C, 2, I] or None
    act_ptr,  # [R, I] of x's type, or float32 [SPLIT, R, 2, I]
    order_ptr,  # [R] the pair t * K + k of each sorted row
    offsets_ptr,  # [C + 1] first sorted row of each expert
    tile_expert_ptr,
    tile_row_ptr,
    tile_count_ptr,
    rows,
    depth,  # H, at run time: known bounds would unroll the loop
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    stride_xt: tl.constexpr,
    stride_xh: tl.constexpr,
    stride_we: tl.constexpr,
    stride_wp: tl.constexpr,  # from gate to up
    stride_wi: tl.constexpr,
    stride_wh: tl.constexpr,
    stride_be: tl.constexpr,
    stride_bp: tl.constexpr,
    stride_bi: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    PAIRED: tl.constexpr,
    SWAP: tl.constexpr,
):
    column_tiles: tl.constexpr = (I + BN - 1) // BN
    pid = tl.program_id(0)
    tiles = tl.load(tile_count_ptr)
    if pid >= tiles * column_tiles * SPLIT:
        return
    tile, column, part = _place(pid, tiles, column_tiles, SPLIT, GROUP)
    expert = tl.load(tile_expert_ptr + tile)
    top = tl.load(tile_row_ptr + tile)
    row = tl.arange(0, BM)
    row_ok = row < tl.load(offsets_ptr + expert + 1) - top
    token = tl.load(order_ptr + top + row, mask=row_ok, other=0) // K
    each = tl.cdiv(tl.cdiv(depth, BK), SPLIT) * BK
    first = part * each
    last = tl.minimum(first + each, depth)
    k = tl.arange(0, BK)
    x_at = _pointers(x_ptr, token.to(tl.int64) * stride_xt, (first + k).to(tl.int64) * stride_xh, True)
    w_column, bias_column, w_ok = _sides(column, stride_wp, stride_wi, stride_bp, stride_bi, I, BN, PAIRED)
    if not TMA:
        w_expert = w + expert.to(tl.int64) * stride_we
        w_at = _pointers(w_expert, w_column, (first + k).to(tl.int64) * stride_wh, stride_wh == 1)
    acc = _accumulator(bias_ptr, expert.to(tl.int64) * stride_be + bias_column, w_ok, BM, 2 * BN, SWAP)
    for start in tl.range(first, last, BK):
        x_tile = _tile(x_at, row_ok, start + k < H, True, H % BK != 0)
        x_at += BK * stride_xh
        if TMA:
            if stride_wh == 1:
                if PAIRED:
                    w_tile = w.load([expert, 2 * BN * column, start]).reshape(2 * BN, BK)
                else:
                    w_tile = w.load([expert, 0, BN * column, start]).reshape(2 * BN, BK)
            else:
                if PAIRED:
                    w_tile = w.load([expert, start, 2 * BN * column]).reshape(BK, 2 * BN).T
                else:
                    w_tile = w.load([expert, start, 0, BN * column]).reshape(BK, 2 * BN).T
        else:
            w_tile = _tile(w_at, w_ok, start + k < H, stride_wh == 1, H % BK != 0)
            w_at += BK * stride_wh
        if SWAP:
            acc = tl.dot(w_tile, x_tile.T, acc, input_precision="ieee")
        else:
            acc = tl.dot(x_tile, w_tile.T, acc, input_precision="ieee")
    if SWAP:
        acc = acc.T
    if PAIRED:
        gate, up = tl.split(acc.reshape(BM, BN, 2))
    else:
        gate, up = tl.split(acc.reshape(BM, 2, BN).permute(0, 2, 1))
    i = tl.arange(0, BN)
    ok = row_ok[:, None] & (BN * column + i < I)[None, :]
    if SPLIT > 1:
        at = act_ptr + (part.to(tl.int64) * rows + top) * (2 * I) + BN * column
        at += row[:, None] * (2 * I) + i[None, :]
        tl.store(at, gate, mask=ok)
        tl.store(at + I, up, mask=ok)
    else:
        value = _activated(gate, up, KIND, ALPHA, LIMIT, SHIFT)
        at = act_ptr + top.to(tl.int64) * I + BN * column + (row[:, None] * I + i[None, :])
        tl.store(at, value.to(act_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["rows"])
def activate_kernel(
    parts_ptr,  # float32 [SPLIT, R, 2, I]
    bias_ptr,
    act_ptr,  # [R, I]
    offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    tile_count_ptr,
    rows,
    I: tl.constexpr,  # noqa: E741
    stride_be: tl.constexpr,
    stride_bp: tl.constexpr,
    stride_bi: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,  # rows of a program, of the BM of a tile
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
):
    tile = tl.program_id(0) // (BM // BR)
    if tile >= tl.load(tile_count_ptr):
        return
    expert = tl.load(tile_expert_ptr + tile)
    row = tl.load(tile_row_ptr + tile) + tl.program_id(0) % (BM // BR) * BR + tl.arange(0, BR)
    i = BN * tl.program_id(1) + tl.arange(0, BN)
    ok = (row < tl.load(offsets_ptr + expert + 1))[:, None] & (i < I)[None, :]
    gate = tl.zeros((BR, BN), tl.float32)
    up = tl.zeros((BR, BN), tl.float32)
    for part in tl.static_range(SPLIT):
        at = parts_ptr + (part * rows.to(tl.int64) + row)[:, None] * (2 * I) + i[None, :]
        gate += tl.load(at, mask=ok, other=0.0)
        up += tl.load(at + I, mask=ok, other=0.0)
    if bias_ptr is not None:
        bias_at = bias_ptr + expert.to(tl.int64) * stride_be + i * stride_bi
        gate += tl.load(bias_at, mask=i < I, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias_at + stride_bp, mask=i < I, other=0.0).to(tl.float32)[None, :]
    value = _activated(gate, up, KIND, ALPHA, LIMIT, SHIFT)
    tl.store(act_ptr + row.to(tl.int64)[:, None] * I + i[None, :], value.to(act_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["rows", "depth"])
def down_kernel(
    act,  # pointer or descriptor of [R, I]
    w,  # pointer, or descriptor of [C, H, I] | [C, I, H]
    bias_ptr,  # [C, H] or None
    y_ptr,  # [SPLIT, R, H]: of act's type, or float32 where split
    offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    tile_count_ptr,
    rows,
    depth,  # I, at run time
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    stride_we: tl.constexpr,
    stride_wh: tl.constexpr,
    stride_wi: tl.constexpr,
    stride_be: tl.constexpr,
    stride_bh: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    SWAP: tl.constexpr,
):
    column_tiles: tl.constexpr = (H + BN - 1) // BN
    pid = tl.program_id(0)
    tiles = tl.load(tile_count_ptr)
    if pid >= tiles * column_tiles * SPLIT:
        return
    tile, column, part = _place(pid, tiles, column_tiles, SPLIT, GROUP)
    expert = tl.load(tile_expert_ptr + tile)
    top = tl.load(tile_row_ptr + tile)
    row = tl.arange(0, BM)
    row_ok = row < tl.load(offsets_ptr + expert + 1) - top
    each = tl.cdiv(tl.cdiv(depth, BK), SPLIT) * BK
    first = part * each
    last = tl.minimum(first + each, depth)
    k = tl.arange(0, BK)
    h = BN * column + tl.arange(0, BN)
    if not TMA:
        act_at = _pointers(act + top.to(tl.int64) * I, row * I, first + k, True)
        w_expert = w + expert.to(tl.int64) * stride_we
        w_at = _pointers(w_expert, h.to(tl.int64) * stride_wh, (first + k).to(tl.int64) * stride_wi, stride_wi == 1)
    acc = _accumulator(bias_ptr, expert.to(tl.int64) * stride_be + h * stride_bh, (h < H) & (part == 0), BM, BN, SWAP)
    for start in tl.range(first, last, BK):
        if TMA:
            act_tile = act.load([top, start])  # rows past the expert's are computed and not stored
            if stride_wi == 1:
                w_tile = w.load([expert, BN * column, start]).reshape(BN, BK)
            else:
                w_tile = w.load([expert, start, BN * column]).reshape(BK, BN).T
        else:
            act_tile = _tile(act_at, row_ok, start + k < I, True, I % BK != 0)
            w_tile = _tile(w_at, h < H, start + k < I, stride_wi == 1, I % BK != 0)
            act_at += BK
            w_at += BK * stride_wi
        if SWAP:
            acc = tl.dot(w_tile, act_tile.T, acc, input_precision="ieee")
        else:
            acc = tl.dot(act_tile, w_tile.T, acc, input_precision="ieee")
    if SWAP:
        acc = acc.T
    n = tl.arange(0, BN)
    y_at = y_ptr + (part.to(tl.int64) * rows + top) * H + BN * column + (row[:, None] * H + n[None, :])
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=row_ok[:, None] & (n < H - BN * column)[None, :])


@triton.jit(do_not_specialize=["rows"])
def combine_kernel(
    y_ptr,  # [SPLIT, R, H]
    position_ptr,  # [T, K] sorted row of each pair, -1 without one
    gates_ptr,  # [T, K]
    out_ptr,  # [T, H]
    norms_ptr,  # float32 [T, K] or None
    done_ptr,  # [C, H / SPAN] reports of down_wide_kernel: what is stored of an expert's rows; None: all is
    index_ptr,  # [T, K] expert of each pair; read for reports, as the others are
    offsets_ptr,
    rows,
    stride_gt: tl.constexpr,
    stride_gk: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,  # K, to a power of two
    BH: tl.constexpr,
    SPAN: tl.constexpr,  # columns of a program: BH, or all for norms
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, KP)
    row = tl.load(position_ptr + token * K + slot, mask=slot < K, other=-1)
    live = row >= 0
    gate = tl.load(gates_ptr + token * stride_gt + slot * stride_gk, mask=live, other=0.0).to(tl.float32)
    if done_ptr is not None:
        expert = tl.load(index_ptr + token * K + slot, mask=live, other=0)
        count = tl.load(offsets_ptr + expert + 1, mask=live, other=0)
        count -= tl.load(offsets_ptr + expert, mask=live, other=0)
        span = tl.program_id(1)
        needed = tl.cdiv(count, BM) * (2 * tl.cdiv(tl.minimum(H - span * SPAN, SPAN), BN))
        done_at = done_ptr + expert * ((H + SPAN - 1) // SPAN) + span
        waits = live
        while tl.max(waits.to(tl.int32), 0) > 0:
            waits &= tl.atomic_add(done_at, 0, mask=waits, sem="acquire") < needed
    at = y_ptr + tl.where(live, row, 0).to(tl.int64) * H
    squares = tl.zeros((KP, BH), tl.float32)
    for first in tl.range(0, SPAN, BH):
        h = tl.program_id(1) * SPAN + first + tl.arange(0, BH)
        ok = live[:, None] & (h < H)[None, :]
        value = tl.load(at[:, None] + h[None, :], mask=ok, other=0.0).to(tl.float32)
        for part in tl.static_range(1, SPLIT):
            value += tl.load(at[:, None] + part * rows.to(tl.int64) * H + h[None, :], mask=ok, other=0.0)
        if norms_ptr is not None:
            squares += value * value
        total = tl.sum(value * gate[:, None], 0)
        tl.store(out_ptr + token * H + h, total.to(out_ptr.dtype.element_ty), mask=h < H)
    if norms_ptr is not None:
        tl.store(norms_ptr + token * K + slot, tl.sqrt(tl.sum(squares, 1)), mask=slot < K)
    if done_ptr is not None:
        if tl.program_id(0) + 1 == tl.num_programs(0):
            tl.extra.cuda.gdc_wait()  # what comes after this kernel comes after down
