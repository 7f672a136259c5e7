"""The products of prefill on Hopper: tiles of 192 rows by 256 columns of the accumulator, on persistent CTAs.

gate_up_wide   what gate_up_kernel computes, for weights [C, 2, I, H] behind a tensor descriptor, without bias
down_wide      what down_kernel computes, for act [R, I] and weights [C, H, I] behind descriptors, without bias

What a tile draws from L2 bounds prefill, and 192 x 256 is what the registers of two warpgroups hold: each sums 64 rows
by all columns, and the last 64 rows by half of the columns. A third one keeps a ring of operands full, across the ends
of tiles. Where an expert's rows end, whole blocks of 64 are neither read nor multiplied. Results leave through shared
memory, 64 columns at a time, while the next tile is multiplied; blocks that are not full by masked stores.

Gluon, which has no interpreter: the order of sums is that of expert_gemm.py, so that its kernels say what is right.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from cprune_kernels import expert_gemm

_place = gluon.jit(expert_gemm._place.fn)
_activated = gluon.jit(expert_gemm._activated.fn)


@gluon.jit
def _next(slot, phase, STAGES: gl.constexpr):
    end = slot == STAGES - 1
    return gl.where(end, 0, slot + 1), gl.where(end, phase ^ 1, phase)


@gluon.jit
def _before(slot, STAGES: gl.constexpr):
    return gl.where(slot == 0, STAGES, slot) - 1


@gluon.jit
def _tile_at(pid, tiles, map, COLUMN_TILES: gl.constexpr, GROUP: gl.constexpr):
    """(expert, column tile, first row, rows) of a place in the walk; `_write_levelled` cut the expert's rows so."""
    offsets_ptr, tile_expert_ptr, tile_row_ptr, _ = map
    tile, column, _ = _place(pid, tiles, COLUMN_TILES, 1, GROUP)
    expert = gl.load(tile_expert_ptr + tile)
    top = gl.load(tile_row_ptr + tile)
    first = gl.load(offsets_ptr + expert)
    end = gl.load(offsets_ptr + expert + 1)
    blocks = (end - first + 63) // 64
    three = blocks - (blocks + 2) // 3 * 2  # tiles of 192 rows, then those of 128
    return expert, column, top, gl.minimum(end - top, gl.where(top - first < 192 * three, 192, 128))


@gluon.jit
def _gather(
    x_ptr,
    w,
    order_ptr,
    map,
    depth,
    ring,
    K: gl.constexpr,
    H: gl.constexpr,
    COLUMN_TILES: gl.constexpr,
    stride_xt: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fill the ring for gate_up: rows of x by their tokens, and of each half of the columns those of gate and of up."""
    x_ring, w_ring, full, empty = ring
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, 64, gl.SliceLayout(1, layout))
    k = gl.arange(0, 64, gl.SliceLayout(0, layout))
    tiles = gl.load(map[3])
    slot = 0
    phase = 1
    for pid in range(gl.program_id(0), tiles * COLUMN_TILES, gl.num_programs(0)):
        expert, column, top, left = _tile_at(pid, tiles, map, COLUMN_TILES, GROUP)
        token0 = gl.load(order_ptr + top + row, mask=row < left, other=0) // K
        token1 = gl.load(order_ptr + top + 64 + row, mask=row < left - 64, other=0) // K
        token2 = gl.load(order_ptr + top + 128 + row, mask=row < left - 128, other=0) // K
        for start in range(0, depth, 64):
            mbarrier.wait(empty.index(slot), phase)
            ready = full.index(slot)
            mbarrier.expect(ready, 2 * 256 * 64)
            tma.async_load(w, [expert, 0, 128 * column, start], ready, w_ring.index(2 * slot))
            tma.async_load(w, [expert, 0, 128 * column + 64, start], ready, w_ring.index(2 * slot + 1))
            at, ok = (start + k)[None, :], (start + k < H)[None, :]
            rows = (x_ptr + token0.to(gl.int64) * stride_xt)[:, None]
            async_copy.async_load(x_ring.index(3 * slot), rows + at, mask=(row < left)[:, None] & ok)
            if left > 64:
                rows = (x_ptr + token1.to(gl.int64) * stride_xt)[:, None]
                async_copy.async_load(x_ring.index(3 * slot + 1), rows + at, mask=(row < left - 64)[:, None] & ok)
            if left > 128:
                rows = (x_ptr + token2.to(gl.int64) * stride_xt)[:, None]
                async_copy.async_load(x_ring.index(3 * slot + 2), rows + at, mask=(row < left - 128)[:, None] & ok)
            async_copy.mbarrier_arrive(ready, increment_count=False)
            slot, phase = _next(slot, phase, STAGES)


@gluon.jit
def _fetch(act, w, map, depth, ring, COLUMN_TILES: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr):
    """Fill the ring for down; rows past the expert's in the last block are multiplied and not stored."""
    x_ring, w_ring, full, empty = ring
    tiles = gl.load(map[3])
    slot = 0
    phase = 1
    for pid in range(gl.program_id(0), tiles * COLUMN_TILES, gl.num_programs(0)):
        expert, column, top, left = _tile_at(pid, tiles, map, COLUMN_TILES, GROUP)
        two, three = left > 64, left > 128
        for start in range(0, depth, 64):
            mbarrier.wait(empty.index(slot), phase)
            ready = full.index(slot)
            mbarrier.expect(ready, 2 * (256 + 64) * 64, pred=left <= 64)
            mbarrier.expect(ready, 2 * (256 + 128) * 64, pred=two & (left <= 128))
            mbarrier.expect(ready, 2 * (256 + 192) * 64, pred=three)
            tma.async_load(w, [expert, 256 * column, start], ready, w_ring.index(2 * slot))
            tma.async_load(w, [expert, 256 * column + 128, start], ready, w_ring.index(2 * slot + 1))
            tma.async_load(act, [top, start], ready, x_ring.index(3 * slot))
            tma.async_load(act, [top + 64, start], ready, x_ring.index(3 * slot + 1), pred=two)
            tma.async_load(act, [top + 128, start], ready, x_ring.index(3 * slot + 2), pred=three)
            slot, phase = _next(slot, phase, STAGES)


@gluon.jit
def _halves(x):
    """[64, 2 n] as two of [64, n]."""
    return x.reshape([64, 2, x.shape[1] // 2]).permute([0, 2, 1]).split()


@gluon.jit
def _leave(value, places, turn, out, out_ptr, top, left, first, PART: gl.constexpr, WIDTH: gl.constexpr):
    """Store 64 rows by 64 columns by way of one of three places, in turns: two stores may be under way beside it."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    place = places.index(3 * PART + turn)
    if left < 64:
        tma.store_wait(0)  # what leaves without a descriptor counts as no store
    tma.store_wait(2)
    place.store(value.to(out.dtype))
    if left >= 64:
        fence_async_shared()
        tma.async_store(out, [top, first], place)
    else:
        row = gl.arange(0, 64, gl.SliceLayout(1, layout))
        i = first + gl.arange(0, 64, gl.SliceLayout(0, layout))
        at = out_ptr + top.to(gl.int64) * WIDTH + (row[:, None] * WIDTH + i[None, :])
        gl.store(at, place.load(layout), mask=(row < left)[:, None] & (i < WIDTH)[None, :])
    return gl.where(turn == 2, 0, turn + 1)


@gluon.jit
def _sigmoids(x):
    """Of [64, 64]: one reciprocal, of the product of two, gives both. Below -41 sigmoid is taken for 2^-60."""
    power = gl.exp2(gl.minimum(-1.4426950408889634 * x, 60.0)) + 1.0
    a, b = power.reshape([64, 32, 2]).split()
    both = 1.0 / (a * b)
    return gl.convert_layout(gl.join(both * b, both * a).reshape([64, 64]), x.type.layout, assert_trivial=True)


@gluon.jit
def _curve(gate, up, KIND: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr, SHIFT: gl.constexpr):
    if KIND == "silu" and LIMIT is None:
        return gate * _sigmoids(ALPHA * gate) * (up + SHIFT)
    else:
        return _activated(gate, up, KIND, ALPHA, LIMIT, SHIFT)


@gluon.jit
def _finish(
    sums,
    places,
    turn,
    out,
    out_ptr,
    top,
    left,
    half,
    PART: gl.constexpr,
    WIDTH: gl.constexpr,
    curve: gl.constexpr,
):
    """Store what 64 rows by 128 columns of the accumulator give: 64 columns of act, or as many of y."""
    a, b = _halves(sums)
    if curve is None:
        turn = _leave(a, places, turn, out, out_ptr, top, left, 128 * half, PART, WIDTH)
        return _leave(b, places, turn, out, out_ptr, top, left, 128 * half + 64, PART, WIDTH)
    else:
        a = _curve(a, b, curve[0], curve[1], curve[2], curve[3])
        return _leave(a, places, turn, out, out_ptr, top, left, 64 * half, PART, WIDTH)


@gluon.jit
def _multiply(
    PART: gl.constexpr,
    out,
    out_ptr,
    map,
    depth,
    ring,
    places,
    COLUMN_TILES: gl.constexpr,
    WIDTH: gl.constexpr,
    curve: gl.constexpr,  # of gate_up: KIND, ALPHA, LIMIT and SHIFT; None: down
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One of the warpgroups that multiply: block PART of the rows, and half PART of the columns of the last block."""
    x_ring, w_ring, full, empty = ring
    sum_all: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    sum_half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    rows: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    w_all = w_ring._reinterpret(w_ring.dtype, [STAGES, 256, 64], rows)
    w_half = w_ring._reinterpret(w_ring.dtype, [2 * STAGES, 128, 64], rows)
    tiles = gl.load(map[3])
    slot = 0
    phase = 0
    turn = 0
    for pid in range(gl.program_id(0), tiles * COLUMN_TILES, gl.num_programs(0)):
        _, column, top, left = _tile_at(pid, tiles, map, COLUMN_TILES, GROUP)
        acc = gl.zeros([64, 256], gl.float32, sum_all)
        last = gl.zeros([64, 128], gl.float32, sum_half)
        if left > 128:
            for start in range(0, depth, 64):
                mbarrier.wait(full.index(slot), phase)
                fence_async_shared()
                w = w_all.index(slot).permute([1, 0])
                acc = warpgroup_mma(x_ring.index(3 * slot + PART), w, acc, use_acc=start > 0, is_async=True)
                w = w_half.index(2 * slot + PART).permute([1, 0])
                last = warpgroup_mma(x_ring.index(3 * slot + 2), w, last, use_acc=start > 0, is_async=True)
                acc, last = warpgroup_mma_wait(2, deps=[acc, last])
                mbarrier.arrive(empty.index(_before(slot, STAGES)), pred=start > 0)
                slot, phase = _next(slot, phase, STAGES)
            acc, last = warpgroup_mma_wait(0, deps=[acc, last])
        elif left > 64 * PART:
            for start in range(0, depth, 64):
                mbarrier.wait(full.index(slot), phase)
                fence_async_shared()
                w = w_all.index(slot).permute([1, 0])
                acc = warpgroup_mma(x_ring.index(3 * slot + PART), w, acc, use_acc=start > 0, is_async=True)
                acc = warpgroup_mma_wait(1, deps=[acc])
                mbarrier.arrive(empty.index(_before(slot, STAGES)), pred=start > 0)
                slot, phase = _next(slot, phase, STAGES)
            acc = warpgroup_mma_wait(0, deps=[acc])
        else:
            for start in range(0, depth, 64):
                mbarrier.wait(full.index(slot), phase)
                mbarrier.arrive(empty.index(_before(slot, STAGES)), pred=start > 0)
                slot, phase = _next(slot, phase, STAGES)
        mbarrier.arrive(empty.index(_before(slot, STAGES)))
        if left > 64 * PART:
            one, two = _halves(acc)
            below = top + 64 * PART
            beside = left - 64 * PART
            turn = _finish(one, places, turn, out, out_ptr, below, beside, 2 * column, PART, WIDTH, curve)
            turn = _finish(two, places, turn, out, out_ptr, below, beside, 2 * column + 1, PART, WIDTH, curve)
        if left > 128:
            half = 2 * column + PART
            turn = _finish(last, places, turn, out, out_ptr, top + 128, left - 128, half, PART, WIDTH, curve)
    tma.store_wait(0)


@gluon.jit
def _ready(ring, arrivals: gl.constexpr, STAGES: gl.constexpr):
    _, _, full, empty = ring
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=arrivals)
        mbarrier.init(empty.index(slot), count=2)


@gluon.jit(do_not_specialize=["depth"])
def gate_up_wide_kernel(
    x_ptr,  # [T, H], rows contiguous and at multiples of 16 bytes
    w,  # descriptor of [C, 2, I, H]
    act,  # descriptor of [R, I]
    act_ptr,
    order_ptr,  # [R] the pair t * K + k of each sorted row
    offsets_ptr,  # [C + 1] first sorted row of each expert
    tile_expert_ptr,
    tile_row_ptr,
    tile_count_ptr,
    depth,  # H, at run time
    K: gl.constexpr,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    stride_xt: gl.constexpr,
    KIND: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
    SHIFT: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    tiles: gl.constexpr = (I + 127) // 128
    rows: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    x_ring = gl.allocate_shared_memory(w.dtype, [3 * STAGES, 64, 64], rows)
    w_ring = gl.allocate_shared_memory(w.dtype, [2 * STAGES, 1, 2, 64, 64], w.layout)
    places = gl.allocate_shared_memory(w.dtype, [6, 64, 64], act.layout)
    ring = (x_ring, w_ring, mbarrier.allocate_mbarrier(batch=STAGES), mbarrier.allocate_mbarrier(batch=STAGES))
    _ready(ring, 1 + 128, STAGES)  # full: the weights' bytes, and every thread that gathers
    map = (offsets_ptr, tile_expert_ptr, tile_row_ptr, tile_count_ptr)
    curve: gl.constexpr = (KIND, ALPHA, LIMIT, SHIFT)
    gl.warp_specialize(
        [
            (_multiply, (0, act, act_ptr, map, depth, ring, places, tiles, I, curve, GROUP, STAGES)),
            (_multiply, (1, act, act_ptr, map, depth, ring, places, tiles, I, curve, GROUP, STAGES)),
            (_gather, (x_ptr, w, order_ptr, map, depth, ring, K, H, tiles, stride_xt, GROUP, STAGES)),
        ],
        [4, 4],
        [232, 40],
    )


@gluon.jit(do_not_specialize=["depth"])
def down_wide_kernel(
    act,  # descriptor of [R, I]
    w,  # descriptor of [C, H, I]
    y,  # descriptor of [R, H]
    y_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    tile_count_ptr,
    depth,  # I, at run time
    H: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    tiles: gl.constexpr = (H + 255) // 256
    x_ring = gl.allocate_shared_memory(w.dtype, [3 * STAGES, 64, 64], act.layout)
    w_ring = gl.allocate_shared_memory(w.dtype, [2 * STAGES, 1, 128, 64], w.layout)
    places = gl.allocate_shared_memory(w.dtype, [6, 64, 64], y.layout)
    ring = (x_ring, w_ring, mbarrier.allocate_mbarrier(batch=STAGES), mbarrier.allocate_mbarrier(batch=STAGES))
    _ready(ring, 1, STAGES)
    map = (offsets_ptr, tile_expert_ptr, tile_row_ptr, tile_count_ptr)
    gl.warp_specialize(
        [
            (_multiply, (0, y, y_ptr, map, depth, ring, places, tiles, H, None, GROUP, STAGES)),
            (_multiply, (1, y, y_ptr, map, depth, ring, places, tiles, H, None, GROUP, STAGES)),
            (_fetch, (act, w, map, depth, ring, tiles, GROUP, STAGES)),
        ],
        [4, 4],
        [232, 40],
    )
