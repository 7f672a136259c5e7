"""The interpreter of Gluon: it computes what is right, and refuses what is undefined on a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
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
from triton.experimental.gluon.nvidia import hopper
from triton.language.extra.cuda import gdc_wait

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("about the interpreter itself", allow_module_level=True)

from tests.device.gluon import HangError, KernelError, RaceError

SWIZZLED = gl.NVMMASharedLayout(128, 16, rank=2)


def box(x: Tensor, rows: int = 64, columns: int = 64) -> hopper.TensorDescriptor:
    return hopper.TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], SWIZZLED)


def numbers(*size: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)


@gluon.jit
def _offsets(WIDTH: gl.constexpr, layout: gl.constexpr):
    """[64, 64] of a row-major matrix."""
    row, column = gl.arange(0, 64, gl.SliceLayout(1, layout)), gl.arange(0, 64, gl.SliceLayout(0, layout))
    return row[:, None] * WIDTH + column[None, :]


@gluon.jit
def _moved(source, target, at_row, at_column, DAMAGE: gl.constexpr):
    """A box from one matrix to the other, by way of shared memory."""
    place = gl.allocate_shared_memory(source.dtype, source.block_shape, source.layout)
    ready = mbarrier.allocate_mbarrier()
    if DAMAGE != "no barrier":
        mbarrier.init(ready, count=1)
    if DAMAGE == "few bytes expected":
        mbarrier.expect(ready, 4096)
    elif DAMAGE == "many bytes expected":
        mbarrier.expect(ready, 16384)
    else:
        mbarrier.expect(ready, 8192)
    tma.async_load(source, [at_row, at_column], ready, place, pred=DAMAGE != "no load")
    if DAMAGE == "two loads":
        tma.async_load(source, [at_row, at_column], ready, place)
    if DAMAGE == "two arrivals":
        mbarrier.arrive(ready, count=2)
    if DAMAGE == "wrong phase":
        mbarrier.wait(ready, 1)
    elif DAMAGE != "no wait for the load":
        mbarrier.wait(ready, 0)
    tma.async_store(target, [at_row, at_column], place)
    if DAMAGE == "refilled under the store":
        mbarrier.expect(ready, 8192)
        tma.async_load(source, [at_row, at_column], ready, place)
    if DAMAGE != "no wait for the store":
        tma.store_wait(0)


@pytest.mark.parametrize("corner", [(0, 0), (64, 8), (100, 64), (-16, -8), (0, 128), (-64, 0)], ids=str)
def test_a_box_is_zero_outside_and_stored_inside(corner: tuple[int, int]) -> None:
    """Zeros around the source; the target is smaller in one dimension, larger in the other."""
    source, target = numbers(110, 104), torch.full((90, 128), 7.0, dtype=torch.float16)
    _moved[(1,)](box(source), box(target), *corner, "nothing")
    padded = torch.zeros(512, 512, dtype=torch.float16)
    padded[128:238, 128:232] = source
    expected = torch.full((512, 512), 7.0, dtype=torch.float16)
    rows, columns = (slice(128 + place, 192 + place) for place in corner)
    expected[rows, columns] = padded[rows, columns]
    assert torch.equal(target, expected[128:218, 128:256])


DAMAGE = {
    "no barrier": (KernelError, "nobody has initialised"),
    "few bytes expected": (KernelError, "8192 bytes come to a barrier that expects 4096"),
    "many bytes expected": (HangError, "phase 0 of barrier 0: 0 of 1 arrivals, 8192 bytes missing"),
    "no load": (HangError, "8192 bytes missing"),
    "two loads": (RaceError, "has not landed"),
    "two arrivals": (KernelError, "2 arrivals at a barrier with 1 of 1"),
    "wrong phase": (RaceError, "has not landed"),
    "no wait for the load": (RaceError, "has not landed"),
    "refilled under the store": (RaceError, "still reads"),
    "no wait for the store": (KernelError, "ends while a store"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_a_copy_is_seen(damage: str) -> None:
    error, said = DAMAGE[damage]
    with pytest.raises(error, match=said):
        _moved[(1,)](box(numbers(64, 64)), box(numbers(64, 64)), 0, 0, damage)


def test_an_error_tells_where() -> None:
    with pytest.raises(KernelError) as caught:
        _moved[(1,)](box(numbers(64, 64)), box(numbers(64, 64)), 0, 0, "two arrivals")
    place, task = caught.value.__notes__
    line, _, statement = place.partition(": ")
    assert statement == "mbarrier.arrive(ready, count=2)" and task == "in CTA (0, 0, 0)"
    file, _, number = line.rpartition(":")
    assert Path(file).read_text().splitlines()[int(number) - 1].strip() == statement


@gluon.jit
def _seen(target, target_ptr, seen_ptr, ONES: gl.constexpr, READ_ONLY: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    place = gl.allocate_shared_memory(target.dtype, [64, 64], target.layout)
    place.store(gl.full([64, 64], ONES, target.dtype, layout))
    fence_async_shared()
    tma.async_store(target, [0, 0], place)
    tma.store_wait(0, read_only=READ_ONLY)
    gl.store(seen_ptr, gl.load(target_ptr))


def test_a_store_reaches_memory_when_it_is_waited_for_as_a_whole() -> None:
    for read_only, expected in ((True, 0.0), (False, 1.0)):
        target, seen = torch.zeros(64, 64, dtype=torch.float16), torch.empty(1, dtype=torch.float16)
        _seen[(1,)](box(target), target, seen, 1.0, read_only)
        assert seen.item() == expected and (target == 1).all()


@gluon.jit
def _in_turns(target, COUNT: gl.constexpr, PENDING: gl.constexpr):
    """Stores of 64 rows of one number, by way of three places."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    places = gl.allocate_shared_memory(target.dtype, [3, 64, 64], target.layout)
    for i in range(COUNT):
        tma.store_wait(PENDING)
        places.index(i % 3).store(gl.zeros([64, 64], gl.float32, layout).to(target.dtype) + i.to(target.dtype))
        fence_async_shared()
        tma.async_store(target, [64 * i, 0], places.index(i % 3))
    tma.store_wait(0)


def test_stores_take_turns() -> None:
    target = torch.empty(5 * 64, 64, dtype=torch.float16)
    _in_turns[(1,)](box(target), 5, 2)
    assert torch.equal(target, torch.arange(5).half().repeat_interleave(64)[:, None].expand(320, 64))
    for pending in (3, 4, 9):
        with pytest.raises(RaceError, match="still reads"):
            _in_turns[(1,)](box(target), 5, pending)


@gluon.jit
def _product(a_ptr, b_ptr, out_ptr, DAMAGE: gl.constexpr):
    """[64, 128] of two steps, a [64, 128] and b [128, 128] by columns."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    a = gl.allocate_shared_memory(a_ptr.dtype.element_ty, [2, 64, 64], shared)
    b = gl.allocate_shared_memory(a_ptr.dtype.element_ty, [4, 64, 64], shared)
    at = _offsets(128, layout)
    for step in gl.static_range(2):
        a.index(step).store(gl.load(a_ptr + 64 * step + at))
        for half in gl.static_range(2):
            b.index(2 * step + half).store(gl.load(b_ptr + 64 * step + 64 * 128 * half + at))
    if DAMAGE != "no fence":
        fence_async_shared()
    if DAMAGE == "written after the fence":
        a.index(1).store(gl.load(a_ptr + 64 + at))
    columns = b._reinterpret(b.dtype, [2, 128, 64], shared)
    acc = gl.zeros([64, 128], gl.float32, sums)
    for step in gl.static_range(2):
        acc = warpgroup_mma(a.index(step), columns.index(step).permute([1, 0]), acc, use_acc=step > 0, is_async=True)
    if DAMAGE == "operand overwritten":
        b.index(1).store(gl.load(b_ptr + at))
    acc = warpgroup_mma_wait(1 if DAMAGE == "no wait" else 0, deps=[acc])
    row, column = gl.arange(0, 64, gl.SliceLayout(1, sums)), gl.arange(0, 128, gl.SliceLayout(0, sums))
    gl.store(out_ptr + row[:, None] * 128 + column[None, :], acc)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_sums_in_float32(dtype: torch.dtype) -> None:
    a, b, out = numbers(64, 128, dtype=dtype), numbers(128, 128, dtype=dtype), torch.empty(64, 128)
    _product[(1,)](a, b, out, "nothing")
    torch.testing.assert_close(out.double(), a.double() @ b.double().T, rtol=0, atol=128 * 128 * 2**-24)


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        ("no fence", KernelError, "no fence is between"),
        ("written after the fence", KernelError, "no fence is between"),
        ("operand overwritten", RaceError, "still reads"),
        ("no wait", KernelError, "used before it was waited for"),
    ],
)
def test_damage_to_a_product_is_seen(damage: str, error: type[KernelError], said: str) -> None:
    with pytest.raises(error, match=said):
        _product[(1,)](numbers(64, 128), numbers(128, 128), torch.empty(64, 128), damage)


@gluon.jit
def _fill(x_ptr, ring, full, empty, STEPS: gl.constexpr, DAMAGE: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [2, 1], [1, 0])
    for step in range(STEPS):
        slot, phase = step % 2, step // 2 % 2
        if DAMAGE != "filled before it is free":
            mbarrier.wait(empty.index(slot), phase ^ 1)
        at = _offsets(64, layout)
        async_copy.async_load(ring.index(slot), x_ptr + 4096 * step + at, mask=at < 4096 - 64 * step)
        if DAMAGE != "no arrival":
            async_copy.mbarrier_arrive(full.index(slot), increment_count=False)


@gluon.jit
def _drain(out_ptr, ring, full, empty, STEPS: gl.constexpr, DAMAGE: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for step in range(STEPS):
        slot, phase = step % 2, step // 2 % 2
        if DAMAGE != "no wait" or step < 2:
            mbarrier.wait(full.index(slot), phase)
        if DAMAGE == "given back before it is read":
            mbarrier.arrive(empty.index(slot))
        gl.store(out_ptr + 4096 * step + _offsets(64, layout), ring.index(slot).load(layout))
        if DAMAGE != "given back before it is read" and DAMAGE != "never given back":
            mbarrier.arrive(empty.index(slot), pred=step < STEPS - 2)


@gluon.jit
def _ring(x_ptr, out_ptr, STEPS: gl.constexpr, DAMAGE: gl.constexpr):
    """Blocks of 64 by 64, through a ring of two places; of each the last 64 `step` elements are left out."""
    ring = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [2, 64, 64], gl.NVMMASharedLayout(128, 16, rank=2))
    full, empty = mbarrier.allocate_mbarrier(batch=2), mbarrier.allocate_mbarrier(batch=2)
    for slot in gl.static_range(2):
        mbarrier.init(full.index(slot), count=128 if DAMAGE == "threads miscounted" else 64)
        mbarrier.init(empty.index(slot), count=1)
    gl.warp_specialize(
        [
            (_drain, (out_ptr, ring, full, empty, STEPS, DAMAGE)),
            (_fill, (x_ptr, ring, full, empty, STEPS, DAMAGE)),
        ],
        [2],
        [40],
    )


def test_partitions_hand_over_a_ring() -> None:
    x, out = numbers(5, 4096), torch.empty(5, 4096, dtype=torch.float16)
    _ring[(1,)](x, out, 5, "nothing")
    left = torch.arange(4096) < 4096 - 64 * torch.arange(5)[:, None]
    assert torch.equal(out, x.where(left, 0))


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        ("no wait", RaceError, "nothing orders them|not landed"),
        ("filled before it is free", RaceError, "nothing orders them|not landed"),
        ("given back before it is read", RaceError, "nothing orders them"),
        ("never given back", HangError, "partition 1: phase 0 of barrier 0: 1 of 1 arrivals"),
        ("no arrival", HangError, r"CTA \(0, 0, 0\): phase 0 of barrier 0: 64 of 64 arrivals"),
        ("threads miscounted", HangError, "64 of 128 arrivals"),
    ],
)
def test_damage_to_a_ring_is_seen(damage: str, error: type[KernelError], said: str) -> None:
    with pytest.raises(error, match=said):
        _ring[(1,)](numbers(5, 4096), torch.empty(5, 4096, dtype=torch.float16), 5, damage)


@gluon.jit
def _grouped(x_ptr, out_ptr, MOST: gl.constexpr):
    """Two groups of copies, then both places."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    places = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [2, 64, 64], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    at = _offsets(64, layout)
    for slot in gl.static_range(2):
        async_copy.async_load(places.index(slot), x_ptr + 4096 * slot + at)
        async_copy.commit_group()
    async_copy.wait_group(1)
    gl.store(out_ptr + at, places.index(0).load(layout))
    async_copy.wait_group(MOST)
    gl.store(out_ptr + 4096 + at, places.index(1).load(layout))


def test_copies_land_by_groups() -> None:
    x, out = numbers(2, 4096), torch.zeros(2, 4096, dtype=torch.float16)
    with pytest.raises(RaceError, match="not landed"):
        _grouped[(1,)](x, out, 1)
    assert torch.equal(out[0], x[0]) and not out[1].any()
    _grouped[(1,)](x, out, 0)
    assert torch.equal(out, x)


@gluon.jit
def _tally(counter_ptr, taken_ptr, owner_ptr, flag_ptr, COUNT: gl.constexpr, WAITS: gl.constexpr):
    """Programs take numbers in turn; then wait for one another, by looking at memory."""
    gdc_wait()
    place = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    while place < COUNT:
        gl.atomic_add(taken_ptr + place, 1)
        gl.store(owner_ptr + place, gl.program_id(0))
        place = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    gl.atomic_add(flag_ptr, 1, sem="release")
    while gl.atomic_add(flag_ptr, 0, sem="acquire") < WAITS:
        pass


def test_programs_run_side_by_side() -> None:
    counter, taken, owner, flag = (torch.zeros(n, dtype=torch.int32) for n in (1, 20, 20, 1))
    _tally[(3,)](counter, taken, owner, flag, 20, 3)
    assert counter.item() == 23 and (taken == 1).all() and set(owner.tolist()) == {0, 1, 2} and flag.item() == 3


def test_waiting_for_what_nobody_writes_is_seen() -> None:
    counter, taken, owner, flag = (torch.zeros(n, dtype=torch.int32) for n in (1, 20, 20, 1))
    with pytest.raises(HangError, match="finds in memory"):
        _tally[(3,)](counter, taken, owner, flag, 20, 4)
