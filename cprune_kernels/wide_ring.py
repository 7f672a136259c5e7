"""The ring of operands between the warpgroup that copies and those that multiply, of the kernels of expert_wide.py.

Tiles are taken in turn by a counter in memory, so that no SM idles while there is one: which CTA has which depends on
time, and what a tile gives does not. Beside the first place of the ring that a tile takes stands which one it is.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from cprune_kernels import expert_gemm

_place = gluon.jit(expert_gemm._place.fn)


@gluon.jit
def following(slot, phase, STAGES: gl.constexpr):
    end = slot == STAGES - 1
    return gl.where(end, 0, slot + 1), gl.where(end, phase ^ 1, phase)


@gluon.jit
def order_copies():
    """What was written as usual comes before what copies of tensor descriptors do, and the other way round."""
    gl.inline_asm_elementwise("fence.proxy.async; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _next(progress_ptr, REPORTS: gl.constexpr):
    """The place of a tile that nobody has taken; each CTA begins with its own number."""
    return gl.num_programs(0) + gl.atomic_add(progress_ptr + (REPORTS > 0), 1, sem="relaxed")


@gluon.jit
def _tile_at(place, progress_ptr, map, REPORTS: gl.constexpr, COLUMN_TILES: gl.constexpr, GROUP: gl.constexpr):
    """The tile there: (whether there is one, tile of rows, column, expert, first row, rows).

    Of down where REPORTS, when so many have said that their part of act is there.
    """
    offsets_ptr, tile_expert_ptr, tile_row_ptr, tile_count_ptr = map
    tiles = gl.load(tile_count_ptr)
    some = place < tiles * COLUMN_TILES
    tile, column, _ = _place(gl.where(some, place, 0), gl.maximum(tiles, 1), COLUMN_TILES, 1, GROUP)
    expert = gl.maximum(gl.load(tile_expert_ptr + tile), 0)
    top = gl.load(tile_row_ptr + tile)
    if REPORTS > 0:
        if some:
            while gl.atomic_add(progress_ptr + 2 + tile, 0, sem="acquire") < REPORTS:
                pass
            order_copies()
    first = gl.load(offsets_ptr + expert)
    end = gl.load(offsets_ptr + expert + 1)
    blocks = (end - first + 63) // 64
    three = blocks - (blocks + 2) // 3 * 2  # tiles of 192 rows, then those of 128: `_write_tiles` cut them so
    return some, tile, column, expert, top, gl.minimum(end - top, gl.where(top - first < 192 * three, 192, 128))


@gluon.jit
def _tell(said, counter, column, top, left):
    """Leave word of a tile beside the first place of the ring that it takes."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    word = gl.arange(0, 4, layout)
    said.store(gl.where(word == 0, counter, gl.where(word == 1, column, gl.where(word == 2, top, left))))


@gluon.jit
def hear(said, WORD: gl.constexpr):
    """A word of what was told: what counts its reports, column, first row, rows; 0 rows at the end of all."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    return gl.sum(gl.where(gl.arange(0, 4, layout) == WORD, said.load(layout), 0), 0)


@gluon.jit
def gather(
    x_ptr,
    w,
    order_ptr,
    progress_ptr,
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
    x_ring, w_ring, said, full, empty = ring
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, 64, gl.SliceLayout(1, layout))
    k = gl.arange(0, 64, gl.SliceLayout(0, layout))
    slot = 0
    phase = 1
    place = gl.program_id(0)
    some, tile, column, expert, top, left = _tile_at(place, progress_ptr, map, 0, COLUMN_TILES, GROUP)
    while some:
        token0 = gl.load(order_ptr + top + row, mask=row < left, other=0) // K
        token1 = gl.load(order_ptr + top + 64 + row, mask=row < left - 64, other=0) // K
        token2 = gl.load(order_ptr + top + 128 + row, mask=row < left - 128, other=0) // K
        mbarrier.wait(empty.index(slot), phase)
        _tell(said.index(slot), tile, column, top, left)
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
            slot, phase = following(slot, phase, STAGES)
        place = _next(progress_ptr, 0)
        some, tile, column, expert, top, left = _tile_at(place, progress_ptr, map, 0, COLUMN_TILES, GROUP)
    mbarrier.wait(empty.index(slot), phase)
    _tell(said.index(slot), 0, 0, 0, 0)
    mbarrier.arrive(full.index(slot), count=129)


@gluon.jit
def fetch(
    act,
    w,
    progress_ptr,
    map,
    depth,
    ring,
    REPORTS: gl.constexpr,
    COLUMN_TILES: gl.constexpr,
    SPAN: gl.constexpr,  # columns whose reports are counted together
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fill the ring for down, as far as gate_up has come; rows past the expert's are multiplied and not stored."""
    x_ring, w_ring, said, full, empty = ring
    slot = 0
    phase = 1
    spans: gl.constexpr = (COLUMN_TILES * 256 + SPAN - 1) // SPAN
    place = gl.program_id(0)
    some, _, column, expert, top, left = _tile_at(place, progress_ptr, map, REPORTS, COLUMN_TILES, GROUP)
    while some:
        two, three = left > 64, left > 128
        mbarrier.wait(empty.index(slot), phase)
        _tell(said.index(slot), expert * spans + 256 * column // SPAN, column, top, left)
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
            slot, phase = following(slot, phase, STAGES)
        place = _next(progress_ptr, REPORTS)
        some, _, column, expert, top, left = _tile_at(place, progress_ptr, map, REPORTS, COLUMN_TILES, GROUP)
    mbarrier.wait(empty.index(slot), phase)
    _tell(said.index(slot), 0, 0, 0, 0)
    mbarrier.arrive(full.index(slot))


@gluon.jit
def barriers(arrivals: gl.constexpr, STAGES: gl.constexpr):
    """Room for word of tiles, and the barriers of a ring."""
    said = gl.allocate_shared_memory(gl.int32, [STAGES, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full, empty = mbarrier.allocate_mbarrier(batch=STAGES), mbarrier.allocate_mbarrier(batch=STAGES)
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=arrivals)
        mbarrier.init(empty.index(slot), count=2)
    return said, full, empty
