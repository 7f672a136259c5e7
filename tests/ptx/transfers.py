"""Loads, stores, atomics and cp.async."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.ptx.machine import Getter, Machine, Operation, builder, unknown
from tests.ptx.memory import Space
from tests.ptx.program import Address, Instruction, Symbol
from tests.ptx.types import BITS, CARRIER, POISON, TYPES, Array, Mask

_SPACES = ("global", "shared", "local", "param", "const")


def space_name(ins: Instruction) -> str:
    """The state space in an opcode, "" for generic addresses."""
    return next((p.split("::")[0] for p in ins.parts if p.split("::")[0] in _SPACES), "")


def _space(machine: Machine, ins: Instruction) -> Space:
    """Volatile and ordered accesses are how warps talk without a barrier, so they are no races."""
    ordered = any(p in ("volatile", "relaxed", "acquire", "release") for p in ins.parts)
    return (machine.atomic_spaces if ordered else machine.spaces)[space_name(ins)]


def vector_length(ins: Instruction) -> int:
    return next((int(p[1]) for p in ins.parts if p in ("v2", "v4", "v8")), 1)


@builder("ld", "ldu")
def build_load(machine: Machine, ins: Instruction) -> Operation:
    kind, count = TYPES[ins.parts[-1]], vector_length(ins)
    width = kind.size * count
    if width not in CARRIER:
        raise unknown(ins)
    source = ins.operands[1]
    if isinstance(source, Address) and isinstance(source.base, Symbol) and source.base.name not in machine.symbols:
        return Operation(lambda act: None)  # the result of a call, which is refused when it is reached
    space, address = _space(machine, ins), machine.address(source)
    puts = machine.write_items(ins.operands[0], kind.name if kind.size < 8 else None, ins.guard is not None)
    if len(puts) != count:
        raise unknown(ins)
    bits = BITS[kind.size]

    def run(act: Mask) -> None:
        lanes, places = machine.active(act), address(act)
        items = space.load(places if act is None else places[lanes], width, lanes)
        if act is not None:
            all_items = np.zeros(machine.threads, items.dtype)
            all_items[lanes] = items
            items = all_items
        if count == 1:
            puts[0](items.view(kind.compute) if not kind.is_float else items, act)
            return
        columns = np.ascontiguousarray(items.view(bits).reshape(-1, count).T)
        for column, put in zip(columns, puts, strict=True):
            put(column.view(kind.compute) if not kind.is_float else column, act)

    return Operation(run)


@builder("st")
def build_store(machine: Machine, ins: Instruction) -> Operation:
    kind, count = TYPES[ins.parts[-1]], vector_length(ins)
    target = ins.operands[0]
    if space_name(ins) == "param" and isinstance(target, Address) and isinstance(target.base, Symbol):
        return Operation(lambda act: None)  # an argument of a call, which is refused when it is reached
    if kind.size * count not in CARRIER:
        raise unknown(ins)
    space, address = _space(machine, ins), machine.address(target)
    gets = machine.read_items(ins.operands[1], f"b{kind.bits}" if not kind.name.startswith("f") else kind.name)
    if len(gets) != count:
        raise unknown(ins)
    carrier, bits = CARRIER[kind.size * count], BITS[kind.size]

    def run(act: Mask) -> None:
        lanes, places = machine.active(act), address(act)
        values = [get(act).view(bits) for get in gets]
        items = values[0] if count == 1 else np.stack(values, axis=1).view(carrier).reshape(-1)
        if act is not None:
            items, places = items[lanes], places[lanes]
        space.store(places, items, lanes)

    return Operation(run)


def _atomic_function(name: str, dtype: np.dtype) -> Callable[[Array, Array, Array], Array]:
    """new = f(old, b, c)."""
    if dtype.kind == "f":
        chosen = {"min": np.fmin, "max": np.fmax, "add": np.add}.get(name)
        if chosen:
            return lambda old, b, c: chosen(old, b)
    functions: dict[str, Callable[[Array, Array, Array], Array]] = {
        "add": lambda old, b, c: old + b,
        "min": lambda old, b, c: np.minimum(old, b),
        "max": lambda old, b, c: np.maximum(old, b),
        "and": lambda old, b, c: old & b,
        "or": lambda old, b, c: old | b,
        "xor": lambda old, b, c: old ^ b,
        "exch": lambda old, b, c: b,
        "cas": lambda old, b, c: np.where(old == b, c, old),
        "inc": lambda old, b, c: np.where(old >= b, dtype.type(0), old + dtype.type(1)),
        "dec": lambda old, b, c: np.where((old == 0) | (old > b), b, old - dtype.type(1)),
    }
    return functions[name]


_ATOMICS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")


def _turns(addresses: Array) -> list[Array]:
    """Accesses in rounds of distinct addresses; threads at one address take turns in their order."""
    order = np.argsort(addresses, kind="stable")
    ordered = addresses[order]
    first = np.r_[True, ordered[1:] != ordered[:-1]]
    if first.all():
        return [np.arange(len(addresses))]
    starts = np.maximum.accumulate(np.where(first, np.arange(len(ordered)), 0))
    turn = np.arange(len(ordered)) - starts
    return [order[turn == t] for t in range(int(turn.max()) + 1)]


@builder("atom", "red")
def build_atomic(machine: Machine, ins: Instruction) -> Operation:
    """One thread after the other in the order of their numbers, which is one of the orders that a GPU may take."""
    returns, count = ins.parts[0] == "atom", vector_length(ins)
    name = next((p for p in ins.parts if p in _ATOMICS), "")
    kind = TYPES.get(ins.parts[-1])
    if not name or kind is None or "async" in ins.parts or kind.size > 8 or (count > 1 and ins.parts[-1] == "noftz"):
        raise unknown(ins)
    operands = ins.operands[1:] if returns else ins.operands
    space, address = machine.atomic_spaces[space_name(ins)], machine.address(operands[0])
    values = [machine.read_items(o, kind.name) for o in operands[1:3]]
    values = [v for v in values if len(v) == count][: 2 if name == "cas" else 1]
    puts = machine.write_items(ins.operands[0], f"b{kind.bits}", ins.guard is not None) if returns else []
    function, bits = _atomic_function(name, kind.compute), BITS[kind.size]

    def run(act: Mask) -> None:
        lanes = machine.active(act)
        places = address(act)[lanes]
        for i in range(count):
            given = [v[i](act)[lanes] for v in values]
            before = np.zeros(machine.threads, bits)
            where = places + i * kind.size
            for turn in _turns(where):
                old = space.load(where[turn], kind.size, lanes[turn])
                before[lanes[turn]] = old
                arguments = [g[turn] for g in given] + [None] * (2 - len(given))
                new = function(kind.decode(old), *arguments)
                space.store(where[turn], kind.encode(new), lanes[turn])
            if returns:
                puts[i](before, act)

    return Operation(run)


@dataclass
class _Copy:
    """One cp.async of many threads, not landed yet."""

    lanes: Array
    groups: Array  # the number of the commit group, by lane
    places: Array  # in shared memory
    data: Array


class _Copies:
    """Outstanding cp.async. Data land in shared memory when the thread that asked for them waits, not before."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.committed = np.zeros(machine.threads, np.int64)
        self.open: list[_Copy] = []

    def wait(self, act: Mask, allowed: int | None) -> None:
        """Land all but the `allowed` newest committed groups; everything where None."""
        limit = self.committed - allowed if allowed is not None else self.committed + 1
        left = []
        for copy in self.open:
            done = copy.groups < limit[copy.lanes]
            if act is not None:
                done &= act[copy.lanes]
            if done.all():
                self.machine.shared.store(copy.places, copy.data, copy.lanes)
            elif done.any():
                self.machine.shared.store(copy.places[done], copy.data[done], copy.lanes[done])
                rest = ~done
                left.append(_Copy(copy.lanes[rest], copy.groups[rest], copy.places[rest], copy.data[rest]))
            else:
                left.append(copy)
        self.open = left

    def take(self, act: Mask) -> list[_Copy]:
        """What the threads have asked for, to land when an mbarrier says so and no longer when they wait."""
        taken, left = [], []
        for copy in self.open:
            mine = np.ones(len(copy.lanes), bool) if act is None else act[copy.lanes]
            for part, to in ((mine, taken), (~mine, left)):
                if part.any():
                    to.append(_Copy(copy.lanes[part], copy.groups[part], copy.places[part], copy.data[part]))
        self.open = left
        return taken


def copies_of(machine: Machine) -> _Copies:
    if "copies" not in machine.state:
        machine.state["copies"] = _Copies(machine)
    return machine.state["copies"]


def build_async_copy(machine: Machine, ins: Instruction) -> Operation:
    """The non-bulk cp.async family."""
    what = ins.parts[2]
    if what == "commit_group":

        def commit(act: Mask) -> None:
            copies_of(machine).committed[slice(None) if act is None else act] += 1

        return Operation(commit)
    if what in ("wait_group", "wait_all"):
        allowed = int(ins.operands[0].text, 0) if what == "wait_group" else None  # type: ignore[union-attr]
        return Operation(lambda act: copies_of(machine).wait(act, allowed))
    if what not in ("ca", "cg"):
        raise unknown(ins)
    return Operation(_copy(machine, ins))


def _copy(machine: Machine, ins: Instruction) -> Callable[[Mask], None]:
    to, source = machine.address(ins.operands[0]), machine.address(ins.operands[1])
    width = int(ins.operands[2].text, 0)  # type: ignore[union-attr]
    hinted = "cache_hint" in " ".join(ins.parts)
    sizes = ins.operands[3 : len(ins.operands) - hinted]
    size: Getter | None = machine.read(sizes[0], "u32") if sizes else None
    memory: Space = machine.memory

    def run(act: Mask) -> None:
        copies, lanes = copies_of(machine), machine.active(act)
        places, addresses = to(act)[lanes], source(act)[lanes]
        data = np.zeros(len(lanes), CARRIER[width])
        sizes = np.full(len(lanes), width) if size is None else size(act)[lanes]
        full, partial = sizes >= width, (sizes > 0) & (sizes < width)
        if full.all():
            data = memory.load(addresses, width, lanes)
        elif full.any():
            data[full] = memory.load(addresses[full], width, lanes[full])
        for i in np.flatnonzero(partial):
            each = addresses[i] + np.arange(sizes[i])
            data[i : i + 1].view(np.uint8)[: sizes[i]] = memory.load(each, 1, np.full(len(each), lanes[i]))
        poison = np.full(len(lanes) * width, POISON, np.uint8).view(CARRIER[width])
        machine.shared.store(places, poison, lanes)
        copies.open.append(_Copy(lanes, copies.committed[lanes], places, data))

    return run
