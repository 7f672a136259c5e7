"""The products of prefill as persistent CTAs: each walks over tiles, and loads the next one during the last one's end.

gate_up_persistent   what gate_up_kernel computes, for weights [C, 2, I, H] behind a tensor descriptor, without bias
down_persistent      what down_kernel computes, for act [R, I] and weights [C, H, I] behind descriptors, without bias

A tile of 128 x 256 leaves room for one CTA on an SM, whose tensor core would wait at every tile for indices and the
first loads. `flatten` makes one loop of tiles and steps, so that the pipeline of copies runs on across tiles; what is
left between two of them is the epilogue. The order of sums is that of expert_gemm.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cprune_kernels.expert_gemm import _activated, _place, _tile


@triton.jit(do_not_specialize=["depth"])
def gate_up_persistent_kernel(
    x_ptr,  # [T, H]
    w,  # descriptor of [C, 2, I, H]
    act_ptr,  # [R, I]
    order_ptr,  # [R] the pair t * K + k of each sorted row
    offsets_ptr,  # [C + 1] first sorted row of each expert
    tile_expert_ptr,
    tile_row_ptr,
    tile_count_ptr,
    depth,  # H, at run time: known bounds would unroll the loop
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    stride_xt: tl.constexpr,
    stride_xh: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    column_tiles: tl.constexpr = (I + BN - 1) // BN
    tl.assume(depth > 0)
    tiles = tl.load(tile_count_ptr)
    if tl.program_id(0) >= tiles * column_tiles:
        return
    row = tl.arange(0, BM)
    k = tl.arange(0, BK)
    i = tl.arange(0, BN)
    for pid in tl.range(tl.program_id(0), tiles * column_tiles, tl.num_programs(0), flatten=True):
        tile, column, _ = _place(pid, tiles, column_tiles, 1, GROUP)
        expert = tl.load(tile_expert_ptr + tile)
        top = tl.load(tile_row_ptr + tile)
        row_ok = row < tl.load(offsets_ptr + expert + 1) - top
        token = tl.load(order_ptr + top + row, mask=row_ok, other=0) // K
        x_row = x_ptr + token.to(tl.int64) * stride_xt
        acc = tl.zeros((BM, 2 * BN), tl.float32)
        for start in tl.range(0, depth, BK):
            x_at = x_row[:, None] + ((start + k).to(tl.int64) * stride_xh)[None, :]
            x_tile = _tile(x_at, row_ok, start + k < H, True, H % BK != 0)
            w_tile = w.load([expert, 0, BN * column, start]).reshape(2 * BN, BK)
            acc = tl.dot(x_tile, w_tile.T, acc)
        gate, up = tl.split(acc.reshape(BM, 2, BN).permute(0, 2, 1))
        value = _activated(gate, up, KIND, ALPHA, LIMIT, SHIFT)
        ok = row_ok[:, None] & (BN * column + i < I)[None, :]
        at = act_ptr + top.to(tl.int64) * I + BN * column + (row[:, None] * I + i[None, :])
        tl.store(at, value.to(act_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["depth"])
def down_persistent_kernel(
    act,  # descriptor of [R, I]
    w,  # descriptor of [C, H, I]
    y_ptr,  # [R, H]
    offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    tile_count_ptr,
    depth,  # I, at run time
    H: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    column_tiles: tl.constexpr = (H + BN - 1) // BN
    tl.assume(depth > 0)
    tiles = tl.load(tile_count_ptr)
    if tl.program_id(0) >= tiles * column_tiles:
        return
    row = tl.arange(0, BM)
    n = tl.arange(0, BN)
    for pid in tl.range(tl.program_id(0), tiles * column_tiles, tl.num_programs(0), flatten=True):
        tile, column, _ = _place(pid, tiles, column_tiles, 1, GROUP)
        expert = tl.load(tile_expert_ptr + tile)
        top = tl.load(tile_row_ptr + tile)
        acc = tl.zeros((BM, BN), tl.float32)
        for start in tl.range(0, depth, BK):
            act_tile = act.load([top, start])  # rows past the expert's are computed and not stored
            w_tile = w.load([expert, BN * column, start]).reshape(BN, BK)
            acc = tl.dot(act_tile, w_tile.T, acc)
        row_ok = row < tl.load(offsets_ptr + expert + 1) - top
        y_at = y_ptr + top.to(tl.int64) * H + BN * column + (row[:, None] * H + n[None, :])
        tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=row_ok[:, None] & (n < H - BN * column)[None, :])
