"""Bulk asynchronous copies (TMA) and the mbarriers that report them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tests.ptx.errors import ExecutionError
from tests.ptx.machine import Kind, Machine, Operation, builder, unknown
from tests.ptx.memory import PARAM_WINDOW, Buffer
from tests.ptx.program import Address, Instruction
from tests.ptx.transfers import build_async_copy, copies_of
from tests.ptx.types import POISON, Array, Mask


@dataclass(frozen=True, eq=False)
class TensorMap:
    """What a CUtensorMap parameter describes: boxes of an array, outermost dimension first as in its shape.

    `array` may be a view of a registered buffer; bf16 is given as uint16. Parts of a box outside the array read as
    zeros (NaN where `fill_nan`) and are not written. Raises ValueError for what cuTensorMapEncodeTiled would refuse.
    """

    array: Array
    box: tuple[int, ...]
    swizzle: int = 0  # bytes: 0, 32, 64 or 128
    fill_nan: bool = False

    def __post_init__(self) -> None:
        strides, size = self.array.strides, self.array.itemsize
        inner = self.box[-1] * size
        if len(self.box) != self.array.ndim or not 1 <= len(self.box) <= 5:
            raise ValueError(
                f"box must have the array's 1 to 5 dimensions, got {self.box} for shape {self.array.shape}"
            )
        if any(not 1 <= b <= 256 for b in self.box) or inner % 16:
            raise ValueError(f"box must lie in [1, 256] with a multiple of 16 innermost bytes, got {self.box}")
        if self.swizzle not in (0, 32, 64, 128) or self.swizzle and inner > self.swizzle:
            raise ValueError(f"the innermost box must fit into the swizzle, got {inner} bytes and {self.swizzle}")
        if strides[-1] != size or any(s % 16 for s in strides[:-1]) or self.array.ctypes.data % 16:
            raise ValueError(f"array must be dense innermost and 16-byte aligned elsewhere, got strides {strides}")


@dataclass
class _Barrier:
    """An mbarrier object: what its current phase still waits for."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0
    landing: list[tuple[int, Callable[[], None]]] = field(default_factory=list)  # copies that report here

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


def _barrier(machine: Machine, place: int) -> _Barrier:
    found = machine.state.get("barriers", {}).get(place)
    if found is None:
        raise ExecutionError(f"no mbarrier was initialised at {place} of shared memory")
    return found


def _land(machine: Machine, barrier: _Barrier) -> None:
    """Bulk copies take effect when somebody looks at their barrier: the latest moment that a GPU may take."""
    for size, finish in barrier.landing:
        finish()
        barrier.bytes -= size
        machine.events += 1
    barrier.landing.clear()
    barrier.settle()


@builder("mbarrier")
def build_mbarrier(machine: Machine, ins: Instruction) -> Operation:
    what = ins.parts[1]
    if what in ("try_wait", "test_wait"):
        return _build_wait(machine, ins)
    has_result = what == "arrive"
    operands = ins.operands[1:] if has_result else ins.operands
    address = machine.address(operands[0])
    amount = machine.read(operands[1], "u32") if len(operands) > 1 else None
    expects = "expect_tx" in ins.parts
    put = machine.write(ins.operands[0], "b64") if has_result else None
    if what not in ("init", "inval", "arrive", "expect_tx", "complete_tx") or "noComplete" in ins.parts:
        raise unknown(ins)

    def apply(place: int, value: int) -> None:
        barriers = machine.state.setdefault("barriers", {})
        if what == "init":
            barriers[place] = _Barrier(value, value)
            return
        barrier = _barrier(machine, place)
        if what == "inval":
            del barriers[place]
            return
        if expects:
            barrier.bytes += value
        elif what == "complete_tx":
            barrier.bytes -= value
        if what == "arrive":
            barrier.pending -= 1 if expects else value
            if barrier.pending < 0:
                raise ExecutionError(f"more threads arrive at the mbarrier at {place} than it counts in one phase")
        barrier.settle()

    def run(act: Mask) -> None:
        lanes = machine.active(act)
        places = address(act)[lanes]
        machine.shared.slots(places, 8, lanes)
        amounts = amount(act)[lanes] if amount else np.ones(len(lanes), np.uint32)
        tokens = np.zeros(machine.threads, np.uint64)
        for lane, place, value in zip(lanes, places, amounts, strict=True):
            if what == "arrive":
                tokens[lane] = _barrier(machine, int(place)).phase
            apply(int(place), int(value))
        if put:
            put(tokens, act)
        machine.events += 1

    return Operation(run)


def _build_wait(machine: Machine, ins: Instruction) -> Operation:
    """try_wait suspends its thread until the phase is over; test_wait only looks."""
    put, address = machine.write(ins.operands[0]), machine.address(ins.operands[1])
    parity = "parity" in ins.parts
    phase = machine.read(ins.operands[2], "u32" if parity else "u64")

    def over(act: Mask) -> Array:
        lanes = machine.active(act)
        places, phases = address(act)[lanes], phase(act)[lanes]
        ready = np.zeros(machine.threads, bool)
        for place in np.unique(places):
            barrier = _barrier(machine, int(place))
            _land(machine, barrier)
            here = places == place
            asked = phases[here]
            ready[lanes[here]] = (asked & 1) != barrier.phase % 2 if parity else asked < barrier.phase
        return ready

    def wait(act: Mask) -> Array | None:
        ready = over(act)
        finished = ready if act is None else ready & act
        put(np.ones(machine.threads, bool), finished)
        if finished.any():
            machine.shared.synchronise()
        return None if (ready if act is None else ready[act]).all() else finished

    if ins.parts[1] == "test_wait":
        return Operation(lambda act: put(over(act), act))
    return Operation(wait, Kind.WAIT)


@builder("cp")
def build_cp(machine: Machine, ins: Instruction) -> Operation:
    if ins.parts[1] != "async":
        raise unknown(ins)
    if ins.parts[2] == "mbarrier":
        return _build_report(machine, ins)
    if ins.parts[2] != "bulk":
        return build_async_copy(machine, ins)
    if ins.parts[3] == "commit_group":
        return Operation(lambda act: [_stores(machine, lane).append([]) for lane in machine.active(act)])
    if ins.parts[3] == "wait_group":
        return _build_stores_wait(machine, int(ins.operands[0].text, 0), "read" in ins.parts)
    if any(p in ins.parts for p in ("multicast::cluster", "tile::gather4", "tile::scatter4", "im2col", "prefetch")):
        raise unknown(ins)
    if ins.parts[3] != "tensor":
        return _build_plain(machine, ins)
    loads = ins.parts[5].startswith("shared")
    tensor = ins.operands[1 if loads else 0]
    if not isinstance(tensor, Address) or len(tensor.coordinates) != int(ins.parts[4][0]):
        raise unknown(ins)
    map_address = machine.address(Address(tensor.base, tensor.offset))
    coordinates = [machine.read(c, "s32") for c in reversed(tensor.coordinates)]
    shared = machine.address(ins.operands[0 if loads else 1])
    report = machine.address(ins.operands[2]) if loads else None

    def run(act: Mask) -> None:
        for lane in machine.active(act):
            tile = _Box(machine, lane, int(map_address(act)[lane]), [int(c(act)[lane]) for c in coordinates])
            place = int(shared(act)[lane])
            if report:
                tile.load(place, _barrier(machine, int(report(act)[lane])))
            else:
                _stores(machine, lane)[-1].append(tile.store(place))

    return Operation(run)


def _stores(machine: Machine, lane: int) -> list[list[Callable[[], Callable[[], None]]]]:
    """The groups of stores of tensor maps that a thread has not waited for, the last one not committed yet."""
    return machine.state.setdefault("stores", {}).setdefault(int(lane), [[]])


def _build_stores_wait(machine: Machine, allowed: int, reading: bool) -> Operation:
    """Stores read shared memory when their thread waits for that: the latest moment that a GPU may take.

    They write when it waits for more than that, or at the end of the CTA.
    """

    def run(act: Mask) -> None:
        leaving = machine.state.setdefault("leaving", {})
        for lane in machine.active(act):
            groups = _stores(machine, lane)
            while len(groups) > allowed + 1:
                leaving.setdefault(int(lane), []).extend(finish() for finish in groups.pop(0))
            if not reading and allowed == 0:
                for write in leaving.pop(int(lane), []):
                    write()

    return Operation(run)


def _build_report(machine: Machine, ins: Instruction) -> Operation:
    """Threads arrive at an mbarrier when what they copied before, with cp.async, has landed."""
    if "noinc" not in ins.parts:
        raise unknown(ins)
    address = machine.address(ins.operands[0])

    def run(act: Mask) -> None:
        lanes = machine.active(act)
        places = np.unique(address(act)[lanes])
        if len(places) != 1:
            raise unknown(ins)
        barrier, copies = _barrier(machine, int(places[0])), copies_of(machine).take(act)

        def finish() -> None:
            for copy in copies:
                machine.shared.plain.store(copy.places, copy.data, copy.lanes)
            barrier.pending -= len(lanes)
            if barrier.pending < 0:
                raise ExecutionError(f"more threads arrive at the mbarrier at {places[0]} than it counts in one phase")

        barrier.landing.append((0, finish))
        machine.events += 1

    return Operation(run)


def _build_plain(machine: Machine, ins: Instruction) -> Operation:
    """cp.async.bulk of contiguous bytes, in either direction."""
    loads = ins.parts[3].startswith("shared")
    to, source, size = machine.address(ins.operands[0]), machine.address(ins.operands[1]), ins.operands[2]
    length = machine.read(size, "u32")
    report = machine.address(ins.operands[3]) if loads else None

    def run(act: Mask) -> None:
        for lane in machine.active(act):
            count = int(length(act)[lane])
            if count % 16:
                raise ExecutionError(f"thread {lane} copies {count} bytes, not a multiple of 16")
            steps = np.arange(0, count, 16)
            lanes = np.full(len(steps), lane)
            places, origin = to(act)[lane] + steps, source(act)[lane] + steps
            if report:
                data = machine.memory.load(origin, 16, lanes)
                index = machine.shared.slots(places, 16, lanes)
                _fly(machine, index, data, lanes, _barrier(machine, int(report(act)[lane])))
            else:
                machine.memory.store(places, machine.shared.load(origin, 16, lanes), lanes)

    return Operation(run)


def _fly(machine: Machine, index: Array, data: Array, lanes: Array, barrier: _Barrier) -> None:
    """Poison the target now, fill it when the barrier is looked at."""
    items = machine.shared.view(16)
    poison = np.full(16 * len(index), POISON, np.uint8).view(items.dtype)
    machine.shared.note_write(index, poison, lanes)
    items[index] = poison

    def finish() -> None:
        items[index] = data

    barrier.landing.append((data.nbytes, finish))


class _Box:
    """The part of a tensor map's array that one instruction touches."""

    def __init__(self, machine: Machine, lane: int, address: int, start: list[int]) -> None:
        self.machine, self.lane = machine, lane
        tensor = machine.tensor_maps.get(address - PARAM_WINDOW if address >= PARAM_WINDOW else address)
        if tensor is None:
            raise ExecutionError(f"no tensor map was passed at the address {address:#x}")
        if len(start) != tensor.array.ndim:
            raise ExecutionError(f"{len(start)} coordinates for a tensor map of {tensor.array.ndim} dimensions")
        self.map: TensorMap = tensor
        ends = [min(s + b, d) for s, b, d in zip(start, tensor.box, tensor.array.shape, strict=True)]
        self.outer = tuple(slice(max(s, 0), max(e, 0)) for s, e in zip(start, ends, strict=True))
        self.inner = tuple(
            slice(max(-s, 0), max(-s, 0) + max(o.stop - o.start, 0)) for s, o in zip(start, self.outer, strict=True)
        )

    def _index(self, place: int) -> tuple[Array, Array]:
        """Where the box's 16-byte pieces lie in shared memory, and the thread that moves each."""
        if place % 128:
            raise ExecutionError(f"a tensor copy needs 128-byte alignment in shared memory, got {place}")
        size = int(np.prod(self.map.box)) * self.map.array.itemsize
        addresses = place + np.arange(0, size, 16)
        addresses ^= (addresses >> 7 & (self.map.swizzle // 16 - 1 if self.map.swizzle else 0)) << 4
        lanes = np.full(len(addresses), self.lane)
        return self.machine.shared.slots(addresses, 16, lanes), lanes

    def _mark(self, buffer: Buffer, what: str) -> None:
        marks, size = getattr(buffer, what), self.map.array.itemsize
        start = self.map.array.ctypes.data - buffer.base
        shape, strides = (*self.map.array.shape, size), (*self.map.array.strides, 1)
        np.lib.stride_tricks.as_strided(marks[start:], shape, strides)[self.outer] = 1

    def load(self, place: int, barrier: _Barrier) -> None:
        machine, array = self.machine, self.map.array
        tile = np.zeros(self.map.box, array.dtype)
        if self.map.fill_nan:
            tile.view(np.uint8)[...] = POISON
        part = array[self.outer]
        tile[tuple(slice(i.start, i.start + n) for i, n in zip(self.inner, part.shape, strict=True))] = part
        self._mark(machine.memory.add(array), "read")
        machine.memory.read_bytes += part.nbytes
        index, lanes = self._index(place)
        _fly(machine, index, tile.reshape(-1).view(np.complex128), lanes, barrier)

    def store(self, place: int) -> Callable[[], Callable[[], None]]:
        """What remains to be done when shared memory is read, which gives what remains then."""
        machine, array = self.machine, self.map.array
        index, lanes = self._index(place)
        machine.shared.note_read(index, 16, lanes)
        part = array[self.outer]
        inner = tuple(slice(i.start, i.start + n) for i, n in zip(self.inner, part.shape, strict=True))

        def read() -> Callable[[], None]:
            data = machine.shared.view(16)[index].view(array.dtype).reshape(self.map.box)[inner].copy()

            def write() -> None:
                part[...] = data
                self._mark(machine.memory.add(array), "written")
                machine.memory.written_bytes += part.nbytes

            return write

        return read
