"""Instructions in which the threads of a warp exchange values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.machine import Getter, Kind, Machine, Operation, builder, pair, unknown
from tests.ptx.program import Instruction
from tests.ptx.types import TYPES, Array, Mask

FULL = 0xFFFFFFFF


def as_mask(machine: Machine, act: Mask) -> Array:
    return np.ones(machine.threads, bool) if act is None else act


def warp_words(machine: Machine, flags: Array) -> Array:
    """Bit l of the word of a thread is the flag of lane l of its warp."""
    padded = np.zeros(-(-machine.threads // 32) * 32, bool)
    padded[: machine.threads] = flags
    words = np.packbits(padded.reshape(-1, 32), axis=1, bitorder="little").view(np.uint32).reshape(-1)
    return np.repeat(words, 32)[: machine.threads]


def member_need(machine: Machine, mask: Getter) -> Callable[[Mask], Array]:
    """The threads that the member masks of the executing threads name."""

    def need(act: Mask) -> Array:
        given = np.where(as_mask(machine, act), mask(act), np.uint32(0))
        needed = np.zeros(-(-machine.threads // 32) * 32, np.uint32)
        needed[: machine.threads] = given
        words = np.bitwise_or.reduce(needed.reshape(-1, 32), axis=1)
        named = np.repeat(words, 32)[: machine.threads]
        return (named >> machine.lane.astype(np.uint32)) & np.uint32(1) != 0

    return need


def whole_need(machine: Machine, size: int = 32) -> Callable[[Mask], Array]:
    """All threads of every warp (or warpgroup: 128) of which any takes part."""

    def need(act: Mask) -> Array:
        if act is None:
            return np.ones(machine.threads, bool)
        groups = machine.lanes // size
        return np.isin(groups, groups[act])

    return need


def synchronous(run: Callable[[Mask], None], need: Callable[[Mask], Array]) -> Operation:
    return Operation(run, Kind.SYNC, need)


@builder("shfl")
def build_shuffle(machine: Machine, ins: Instruction) -> Operation:
    """Lanes that are not there, or do not take part, give poison."""
    mode = ins.parts[-2]
    results = pair(ins.operands[0])
    puts = [machine.write(results[0], "b32")] + [machine.write(r) for r in results[1:]]
    value, offset, clamp = (machine.read(o, "b32") for o in ins.operands[1:4])
    lane = machine.lane

    def run(act: Mask) -> None:
        values, b, c = value(act), (offset(act) & np.uint32(31)).astype(np.int64), clamp(act).astype(np.int64)
        segment, bound = (c >> 8) & 31, c & 31
        low = lane & segment
        top = low | (bound & ~segment)
        if mode == "up":
            source = lane - b
            inside = source >= top
        else:
            source = {"down": lane + b, "bfly": lane ^ b, "idx": low | (b & ~segment)}[mode]
            inside = source <= top
        index = machine.warp_start + np.where(inside, source, lane)
        there = index < machine.threads
        index = np.where(there, index, 0)
        if act is not None:
            there = there & act[index]
        puts[0](np.where(there, values[index], np.uint32(FULL)), act)
        if len(puts) > 1:
            puts[1](inside, act)

    if "sync" not in ins.parts:
        return Operation(run)
    return synchronous(run, member_need(machine, machine.read(ins.operands[4], "b32")))


@builder("vote")
def build_vote(machine: Machine, ins: Instruction) -> Operation:
    mode = next(p for p in ins.parts if p in ("all", "any", "uni", "ballot"))
    flag, put = machine.read(ins.operands[1], "pred"), machine.write(ins.operands[0])

    def run(act: Mask) -> None:
        flags = flag(act)
        ones = warp_words(machine, flags & as_mask(machine, act))
        zeros = warp_words(machine, ~flags & as_mask(machine, act))
        result = {"ballot": ones, "any": ones != 0, "all": zeros == 0, "uni": (ones == 0) | (zeros == 0)}[mode]
        put(result, act)

    if "sync" not in ins.parts:
        return Operation(run)
    return synchronous(run, member_need(machine, machine.read(ins.operands[2], "b32")))


@builder("match")
def build_match(machine: Machine, ins: Instruction) -> Operation:
    results, everywhere = pair(ins.operands[0]), "all" in ins.parts
    puts = [machine.write(r) for r in results]
    value, mask = machine.read(ins.operands[1], ins.parts[-1]), machine.read(ins.operands[2], "b32")

    def run(act: Mask) -> None:
        values, taking = value(act), as_mask(machine, act)
        words = np.zeros(machine.threads, np.uint32)
        for start in range(0, machine.threads, 32):
            warp = slice(start, min(start + 32, machine.threads))
            same = (values[warp, None] == values[None, warp]) & taking[None, warp]
            bits = np.zeros((same.shape[0], 32), bool)
            bits[:, : same.shape[1]] = same
            words[warp] = np.packbits(bits, axis=1, bitorder="little").view(np.uint32).reshape(-1)
        if everywhere:
            agree = words == warp_words(machine, taking)
            words = np.where(agree, mask(act), np.uint32(0))
            if len(puts) > 1:
                puts[1](agree, act)
        puts[0](words, act)

    return synchronous(run, member_need(machine, mask))


@builder("redux")
def build_redux(machine: Machine, ins: Instruction) -> Operation:
    kind = TYPES[ins.parts[-1]]
    if kind.is_float:
        raise unknown(ins)
    name = ins.parts[2]
    function = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[name]
    value, put = machine.read(ins.operands[1], kind.name), machine.write(ins.operands[0], kind.name)

    def run(act: Mask) -> None:
        values, taking = value(act), as_mask(machine, act)
        result = values.copy()
        for start in range(0, machine.threads, 32):
            inside = values[start : start + 32][taking[start : start + 32]]
            if len(inside):
                result[start : start + 32] = function.reduce(inside, dtype=kind.compute)
        put(result, act)

    return synchronous(run, member_need(machine, machine.read(ins.operands[2], "b32")))


@builder("activemask")
def build_activemask(machine: Machine, ins: Instruction) -> Operation:
    put = machine.write(ins.operands[0])
    return Operation(lambda act: put(warp_words(machine, as_mask(machine, act)), act))


@builder("elect")
def build_elect(machine: Machine, ins: Instruction) -> Operation:
    """The lowest lane that takes part leads."""
    results = pair(ins.operands[0])
    lane_put, leads = machine.write(results[0], "b32"), machine.write(results[1])

    def run(act: Mask) -> None:
        words = warp_words(machine, as_mask(machine, act))
        leader = np.log2((words & (~words + np.uint32(1))).astype(np.float64)).astype(np.int64)
        lane_put(leader.astype(np.uint32), act)
        leads(machine.lane == leader, act)

    return synchronous(run, member_need(machine, machine.read(ins.operands[1], "b32")))


def _matrix_count(ins: Instruction) -> int:
    if "m8n8" not in ins.parts or ins.parts[-1] != "b16":
        raise unknown(ins)
    return int(next(p for p in ins.parts if p in ("x1", "x2", "x4"))[1])


@builder("ldmatrix")
def build_ldmatrix(machine: Machine, ins: Instruction) -> Operation:
    """Lane l of a warp gets elements 2(l%4), 2(l%4)+1 of row l//4 of matrix i, whose row r starts where lane 8i+r says.
    With .trans rows and columns change places."""
    count, transposed = _matrix_count(ins), "trans" in ins.parts
    puts, address = machine.write_items(ins.operands[0], "b32"), machine.address(ins.operands[1])

    def run(act: Mask) -> None:
        warps, places = executing_warps(machine, act), address(act).reshape(-1, 32)
        rows = places[warps, : 8 * count]
        lanes = (warps[:, None] * 32 + np.arange(8 * count)).reshape(-1)
        items = machine.shared.load(rows.reshape(-1), 16, lanes).view(np.uint16).reshape(len(warps), count, 8, 8)
        if transposed:
            items = np.ascontiguousarray(items.transpose(0, 1, 3, 2))
        words = items.view(np.uint32).reshape(len(warps), count, 32)
        for i, put in enumerate(puts):
            put(spread(machine, words[:, i], warps), act)

    return synchronous(run, whole_need(machine))


@builder("stmatrix")
def build_stmatrix(machine: Machine, ins: Instruction) -> Operation:
    """The inverse of ldmatrix."""
    count, transposed = _matrix_count(ins), "trans" in ins.parts
    address, gets = machine.address(ins.operands[0]), machine.read_items(ins.operands[1], "b32")

    def run(act: Mask) -> None:
        warps, places = executing_warps(machine, act), address(act).reshape(-1, 32)
        words = np.stack([get(act).reshape(-1, 32)[warps] for get in gets], axis=1)
        items = words.view(np.uint16).reshape(len(warps), count, 8, 8)
        if transposed:
            items = np.ascontiguousarray(items.transpose(0, 1, 3, 2))
        data = items.reshape(-1).view(np.complex128)
        lanes = (warps[:, None] * 32 + np.arange(8 * count)).reshape(-1)
        machine.shared.store(places[warps, : 8 * count].reshape(-1), data, lanes)

    return synchronous(run, whole_need(machine))


def executing_warps(machine: Machine, act: Mask) -> Array:
    """The numbers of the warps that execute."""
    count = machine.threads // 32
    return np.arange(count) if act is None else np.flatnonzero(act[: 32 * count : 32])


def spread(machine: Machine, words: Array, warps: Array) -> Array:
    """[executing warps, 32] to one value per thread."""
    if len(warps) * 32 == machine.threads:
        return np.ascontiguousarray(words).reshape(-1)
    out = np.zeros((machine.threads // 32, 32), words.dtype)
    out[warps] = words
    return out.reshape(-1)


@builder("bar")
def build_bar(machine: Machine, ins: Instruction) -> Operation:
    """bar.warp.sync here; the others stop more than a warp."""
    if ins.parts[1] == "warp":
        return synchronous(lambda act: None, member_need(machine, machine.read(ins.operands[0], "b32")))
    return build_barrier(machine, ins)


@builder("barrier")
def build_barrier(machine: Machine, ins: Instruction) -> Operation:
    """bar.sync, bar.arrive and bar.red; the count may be left out, the number always stands."""
    if "cluster" in ins.parts:
        raise unknown(ins)
    what = next(p for p in ins.parts if p in ("sync", "arrive", "red"))
    operands = list(ins.operands)
    result = machine.write(operands.pop(0)) if what == "red" else None
    flag = machine.read(operands.pop(), "pred") if what == "red" else None
    number = machine.read(operands[0], "u32")
    count = machine.read(operands[1], "u32") if len(operands) > 1 else None

    def which(act: Mask) -> tuple[int, int | None]:
        lanes = machine.active(act)
        numbers = number(act)[lanes]
        if (numbers != numbers[0]).any():
            raise unknown(ins)
        return int(numbers[0]), int(count(act)[lanes[0]]) if count else None

    def run(act: Mask) -> None:
        if result is None or flag is None:
            return
        flags = flag(act) if act is None else flag(act)[act]
        name = next(p for p in ins.parts if p in ("popc", "and", "or"))
        if name == "popc":
            result(machine.full(int(np.count_nonzero(flags)), 4), act)
        else:
            result(np.full(machine.threads, flags.all() if name == "and" else flags.any()), act)

    aligned = ins.parts[0] == "bar" or "aligned" in ins.parts
    return Operation(run, Kind.BARRIER, barrier=which, arrives_only=what == "arrive", aligned=aligned)


@builder(
    "membar", "fence", "nanosleep", "setmaxnreg", "prefetch", "prefetchu", "griddepcontrol", "discard", "applypriority"
)
def build_nothing(machine: Machine, ins: Instruction) -> Operation:
    """Memory is sequentially consistent here, so fences order nothing; the rest are hints."""
    return Operation(lambda act: None)


@builder("createpolicy")
def build_policy(machine: Machine, ins: Instruction) -> Operation:
    put = machine.write(ins.operands[0], "b64")
    return Operation(lambda act: put(machine.full(0, 8), act))
