"""The products of prefill on Hopper: tiles of 192 rows by 256 columns of the accumulator, on persistent CTAs.

gate_up_wide   what gate_up_kernel computes, for weights [C, 2, I, H] behind a tensor descriptor, without bias
down_wide      what down_kernel computes, for act [R, I] and weights [C, H, I] behind descriptors, without bias

What a tile draws from L2 bounds prefill, and 192 x 256 is what the registers of two warpgroups hold: each sums 64 rows
by all columns, and the last 64 rows by half of the columns. A third one keeps a ring of operands full, across the ends
of tiles (wide_ring.py). Where an expert's rows end, whole blocks of 64 are neither read nor multiplied. Results leave
through shared memory, 64 columns at a time; blocks that are not full by masked stores. The last block's do while the
others have their last step, and half of the others' while the next tile has its first one: no more than one half waits
in registers beside the sums of a step. Down runs beside gate_up, and the combine beside down: what is stored is
therefore reported.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from cprune_kernels import expert_gemm
from cprune_kernels.wide_ring import barriers, fetch, following, gather, hear, order_copies

_activated = gluon.jit(expert_gemm._activated.fn)


@gluon.jit
def _before(slot, STAGES: gl.constexpr):
    return gl.where(slot == 0, STAGES, slot) - 1


@gluon.jit
def _halves(x):
    """[64, 2 n] as two of [64, n]."""
    return x.reshape([64, 2, x.shape[1] // 2]).permute([0, 2, 1]).split()


@gluon.jit
def _sigmoids(x):
    """Of [64, 32]: one reciprocal, of the product of four, gives all. Below -21 sigmoid is taken for 2^-31.

    So four powers stay finite together; it is then off by less than 2^-31.
    """
    power = gl.exp2(gl.minimum(-1.4426950408889634 * x, 31.0)) + 1.0
    left, right = power.reshape([64, 2, 2, 4, 2]).permute([0, 1, 3, 4, 2]).split()  # 8 columns apart, in one thread
    a, b = left.split()
    c, d = right.split()
    ab, cd = a * b, c * d
    all = 1.0 / (ab * cd)
    ab, cd = all * cd, all * ab  # the reciprocals of these products
    value = gl.join(gl.join(ab * b, ab * a), gl.join(cd * d, cd * c)).permute([0, 1, 4, 2, 3]).reshape([64, 32])
    return gl.convert_layout(value, x.type.layout, assert_trivial=True)


@gluon.jit
def _curve(gate, up, KIND: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr, SHIFT: gl.constexpr):
    if KIND == "silu" and LIMIT is None:
        return gate * _sigmoids(ALPHA * gate) * (up + SHIFT)
    elif KIND == "gelu_tanh" and LIMIT is None:
        return gate * _sigmoids(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * (up + SHIFT)
    else:
        return _activated(gate, up, KIND, ALPHA, LIMIT, SHIFT)


@gluon.jit
def _leave(
    a,
    b,
    places,
    out,
    out_ptr,
    top,
    left,
    first,
    PART: gl.constexpr,
    TURN: gl.constexpr,
    WIDTH: gl.constexpr,
    curve: gl.constexpr,
):
    """Store 64 rows by 64 columns by way of one of three places, in turns: two stores may be under way beside it.

    They are a, without curve, or what it makes of a and b: in two parts, which take fewer registers.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    place = places.index(3 * PART + TURN % 3)
    if left < 64:
        tma.store_wait(0)  # what leaves without a descriptor counts as no store
    tma.store_wait(2)
    if curve is None:
        place.store(a.to(out.dtype))
    else:
        (a, gate), (b, up) = _halves(a), _halves(b)
        a = _curve(a, b, curve[0], curve[1], curve[2], curve[3])
        place.slice(0, 32, dim=1).store(a.to(out.dtype))
        gate = _curve(gate, up, curve[0], curve[1], curve[2], curve[3])
        place.slice(32, 32, dim=1).store(gate.to(out.dtype))
    if left >= 64:
        fence_async_shared()
        tma.async_store(out, [top, first], place)
    else:
        row = top + gl.arange(0, 64, gl.SliceLayout(1, layout))
        i = first + gl.arange(0, 64, gl.SliceLayout(0, layout))
        at = out_ptr + (row.to(gl.int64) * WIDTH)[:, None] + i[None, :]
        gl.store(at, place.load(layout), mask=(row < top + left)[:, None] & (i < WIDTH)[None, :])


@gluon.jit
def _finish(
    sums,
    places,
    out,
    out_ptr,
    top,
    left,
    half,
    PART: gl.constexpr,
    ORDER: gl.constexpr,  # of the up to three that a warpgroup finishes
    WIDTH: gl.constexpr,
    curve: gl.constexpr,
):
    """Store what 64 rows by 128 columns of the accumulator give: 64 columns of act, or as many of y."""
    a, b = _halves(sums)
    if curve is None:
        _leave(a, a, places, out, out_ptr, top, left, 128 * half, PART, 2 * ORDER, WIDTH, None)
        _leave(b, b, places, out, out_ptr, top, left, 128 * half + 64, PART, 2 * ORDER + 1, WIDTH, None)
    else:
        _leave(a, b, places, out, out_ptr, top, left, 64 * half, PART, ORDER, WIDTH, curve)


@gluon.jit
def _report(reports_ptr, stored):
    """Say that this warpgroup's part of a tile is in memory, when it is."""
    order_copies()
    tma.store_wait(0, read_only=False)
    gl.atomic_add(reports_ptr + stored, 1, mask=stored >= 0, sem="release")


@gluon.jit
def _moved(x):
    """The same numbers in other registers: where they are, the next sums are under way."""
    return gl.inline_asm_elementwise(
        "add.f32 $0, $1, 0f00000000;", "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _step(x, x_place, w, w_place, sums, BEGUN: gl.constexpr):
    """Add the products of a step to the sums, or begin them, under way when it returns."""
    fence_async_shared()
    return warpgroup_mma(x.index(x_place), w.index(w_place).permute([1, 0]), sums, use_acc=BEGUN, is_async=True)


@gluon.jit
def _multiply(
    PART: gl.constexpr,
    out,
    out_ptr,
    reports_ptr,  # counts what is stored
    depth,
    ring,
    places,
    DEPTH: gl.constexpr,
    WIDTH: gl.constexpr,
    curve: gl.constexpr,  # of gate_up: KIND, ALPHA, LIMIT and SHIFT; None: down
    STAGES: gl.constexpr,
):
    """One of the warpgroups that multiply: block PART of the rows, and half PART of the columns of the last block."""
    x_ring, w_ring, said, full, empty = ring
    sum_all: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    sum_half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    rows: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    w_all = w_ring._reinterpret(w_ring.dtype, [STAGES, 256, 64], rows)
    w_half = w_ring._reinterpret(w_ring.dtype, [2 * STAGES, 128, 64], rows)
    reported: gl.constexpr = min(128, (DEPTH - 1) // 64 * 64)  # a tile in the third step of the next one
    beside: gl.constexpr = 1 if DEPTH > 64 else 0
    slot = 0
    phase = 0
    going = True
    stored, own, half, below = -1, 0, 0, 0  # of the tile before: its rows here, of which half is to be finished
    two = gl.zeros([64, 128], gl.float32, sum_half)
    while going:
        mbarrier.wait(full.index(slot), phase)
        told = said.index(slot)
        left = hear(told, 3)
        acc = gl.zeros([64, 256], gl.float32, sum_all)
        if left > 64 * PART:
            acc = _step(x_ring, 3 * slot + PART, w_all, slot, acc, False)
            acc, two = warpgroup_mma_wait(1, deps=[acc, two])  # finished while the first step is multiplied
            if own > 0:
                _finish(two, places, out, out_ptr, below, own, half, PART, 2, WIDTH, curve)
            acc = warpgroup_mma_wait(0, deps=[acc])
            if reported == 0:
                _report(reports_ptr, stored)
            counter, column, top = hear(told, 0), hear(told, 1), hear(told, 2)
            if left > 128:
                last = gl.zeros([64, 128], gl.float32, sum_half)
                last = _step(x_ring, 3 * slot + 2, w_half, 2 * slot + PART, last, False)
                last = warpgroup_mma_wait(1, deps=[last])
                slot, phase = following(slot, phase, STAGES)
                for start in range(64, depth, 64):
                    mbarrier.wait(full.index(slot), phase)
                    last = _step(x_ring, 3 * slot + 2, w_half, 2 * slot + PART, last, True)
                    acc = _step(x_ring, 3 * slot + PART, w_all, slot, acc, True)
                    acc, last = warpgroup_mma_wait(2, deps=[acc, last])
                    mbarrier.arrive(empty.index(_before(slot, STAGES)))
                    if start == reported:
                        _report(reports_ptr, stored)
                    slot, phase = following(slot, phase, STAGES)
                # finished while the last step of the others is multiplied
                last = warpgroup_mma_wait(beside, deps=[last])
                _finish(last, places, out, out_ptr, top + 128, left - 128, 2 * column + PART, PART, 0, WIDTH, curve)
                acc = warpgroup_mma_wait(0, deps=[acc])
            else:
                slot, phase = following(slot, phase, STAGES)
                for start in range(64, depth, 64):
                    mbarrier.wait(full.index(slot), phase)
                    acc = _step(x_ring, 3 * slot + PART, w_all, slot, acc, True)
                    acc = warpgroup_mma_wait(1, deps=[acc])
                    mbarrier.arrive(empty.index(_before(slot, STAGES)))
                    if start == reported:
                        _report(reports_ptr, stored)
                    slot, phase = following(slot, phase, STAGES)
                acc = warpgroup_mma_wait(0, deps=[acc])
                tma.store_wait(0)  # the turns begin with the second
        else:
            if own > 0:
                _finish(two, places, out, out_ptr, below, own, half, PART, 2, WIDTH, curve)
            counter, column, top = hear(told, 0), hear(told, 1), hear(told, 2)
            if left > 0:
                for start in range(0, depth, 64):
                    mbarrier.wait(full.index(slot), phase)
                    mbarrier.arrive(empty.index(_before(slot, STAGES)), pred=start > 0)
                    if start == reported:
                        _report(reports_ptr, stored)
                    slot, phase = following(slot, phase, STAGES)
        mbarrier.arrive(empty.index(_before(slot, STAGES)), pred=left > 0)
        own, below, half = left - 64 * PART, top + 64 * PART, 2 * column + 1
        one, two = _halves(acc)
        two = _moved(gl.convert_layout(two, sum_half, assert_trivial=True))
        if own > 0:
            _finish(one, places, out, out_ptr, below, own, half - 1, PART, 1, WIDTH, curve)
        going = left > 0
        stored = gl.where(going, counter, stored)
    _report(reports_ptr, stored)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["depth"])
def gate_up_wide_kernel(
    x_ptr,  # [T, H], rows contiguous and at multiples of 16 bytes
    w,  # descriptor of [C, 2, I, H]
    act,  # descriptor of [R, I]
    act_ptr,
    order_ptr,  # [R] the pair t * K + k of each sorted row
    offsets_ptr,  # [C + 1] first sorted row of each expert
    tile_expert_ptr,  # [M]
    tile_row_ptr,
    tile_count_ptr,
    progress_ptr,  # [2 + M] tiles of gate_up and of down taken; how many have said that their part of act is there
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
    said, full, empty = barriers(1 + 128, STAGES)  # full: the weights' bytes, and every thread that gathers
    gdc_wait()  # for the map of tiles
    gdc_launch_dependents()
    ring = (x_ring, w_ring, said, full, empty)
    map = (offsets_ptr, tile_expert_ptr, tile_row_ptr, tile_count_ptr)
    curve: gl.constexpr = (KIND, ALPHA, LIMIT, SHIFT)
    gl.warp_specialize(
        [
            (_multiply, (0, act, act_ptr, progress_ptr + 2, depth, ring, places, H, I, curve, STAGES)),
            (_multiply, (1, act, act_ptr, progress_ptr + 2, depth, ring, places, H, I, curve, STAGES)),
            (gather, (x_ptr, w, order_ptr, progress_ptr, map, depth, ring, K, H, tiles, stride_xt, GROUP, STAGES)),
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
    progress_ptr,
    done_ptr,  # [C, H / SPAN] how many have said that their part of an expert's rows and of these columns is stored
    depth,  # I, at run time
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    REPORTS: gl.constexpr,  # of a tile of rows when all of its act is there
    SPAN: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    tiles: gl.constexpr = (H + 255) // 256
    gdc_launch_dependents()
    x_ring = gl.allocate_shared_memory(w.dtype, [3 * STAGES, 64, 64], act.layout)
    w_ring = gl.allocate_shared_memory(w.dtype, [2 * STAGES, 1, 128, 64], w.layout)
    places = gl.allocate_shared_memory(w.dtype, [6, 64, 64], y.layout)
    said, full, empty = barriers(1, STAGES)
    ring = (x_ring, w_ring, said, full, empty)
    map = (offsets_ptr, tile_expert_ptr, tile_row_ptr, tile_count_ptr)
    gl.warp_specialize(
        [
            (_multiply, (0, y, y_ptr, done_ptr, depth, ring, places, I, H, None, STAGES)),
            (_multiply, (1, y, y_ptr, done_ptr, depth, ring, places, I, H, None, STAGES)),
            (fetch, (act, w, progress_ptr, map, depth, ring, REPORTS, tiles, SPAN, GROUP, STAGES)),
        ],
        [4, 4],
        [232, 40],
    )
