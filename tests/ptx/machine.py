"""The state of one CTA, and how instructions read and write it.

`Machine.read` and `Machine.write` are called once per operand when a program is bound; the closures that they return
run once per executed instruction, on the values of all threads at a time. Values are never changed in place, so a `mov`
may share them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from tests.ptx.errors import AccessError
from tests.ptx.memory import FlatMemory, GenericMemory, GlobalMemory, LocalMemory, Space
from tests.ptx.program import (
    Address,
    Immediate,
    Instruction,
    Negated,
    Operand,
    Pair,
    Program,
    Register,
    Special,
    Symbol,
    Vector,
    immediate_bits,
)
from tests.ptx.shared import SharedMemory
from tests.ptx.types import BITS, TYPES, Array, Mask, Type

Getter = Callable[[Mask], Array]
Putter = Callable[[Array, Mask], None]


class Kind(IntEnum):
    """How the scheduler treats an instruction."""

    PLAIN = 0
    BRANCH = 1
    EXIT = 2
    BARRIER = 3  # bar and barrier
    SYNC = 4  # needs several threads at once: `need` says which
    WAIT = 5  # `run` returns the threads that may go on, None for all
    TABLE = 6  # `run` returns the next instruction of every thread


@dataclass(frozen=True)
class Operation:
    """An instruction bound to a machine."""

    run: Callable[[Mask], Any]
    kind: Kind = Kind.PLAIN
    need: Callable[[Mask], Array] | None = None  # SYNC: the threads that have to take part
    target: int = 0  # BRANCH
    barrier: Callable[[Mask], tuple[int, int | None]] | None = None  # BARRIER: number, and threads where given
    arrives_only: bool = False
    aligned: bool = True


Builder = Callable[["Machine", Instruction], Operation]
BUILDERS: dict[str, Builder] = {}


def builder(*mnemonics: str) -> Callable[[Builder], Builder]:
    """Register the function that binds instructions whose first part is one of `mnemonics`."""

    def register(function: Builder) -> Builder:
        for mnemonic in mnemonics:
            BUILDERS[mnemonic] = function
        return function

    return register


def unknown(instruction: Instruction) -> NotImplementedError:
    return NotImplementedError(f"line {instruction.line}: {instruction.text}")


@dataclass
class Machine:
    """Registers, memories and barriers of one CTA of `threads` threads."""

    program: Program
    threads: int
    memory: GlobalMemory
    param: FlatMemory
    shared: SharedMemory
    symbols: Mapping[str, int]  # addresses in their own space
    tensor_maps: Mapping[int, Any] = field(default_factory=dict)  # by address in the parameter space
    values: list[Any] = field(init=False)
    defined: list[Any] = field(init=False)  # None, True, or a mask, by register
    specials: dict[str, Array] = field(init=False)
    group: Mask = None  # the threads at the current instruction, before its guard
    events: int = 0  # counts what may let a waiting thread go on
    state: dict[str, Any] = field(default_factory=dict)  # of asynchronous units, by name; empty for each CTA

    def __post_init__(self) -> None:
        self.local = LocalMemory(self.program.local_bytes, self.threads)
        self.lanes = np.arange(self.threads)
        self.lane = self.lanes % 32
        self.warp_start = self.lanes - self.lane
        self.values = [None] * len(self.program.registers)
        self.defined = [None] * len(self.program.registers)
        self.specials = {}
        spaces: dict[str, Space] = {
            "global": self.memory,
            "shared": self.shared,
            "local": self.local,
            "param": self.param,
        }
        unchecked: dict[str, Space] = {**spaces, "shared": self.shared.plain}
        self.spaces = {**spaces, "const": self.memory, "": GenericMemory(spaces)}
        self.atomic_spaces = {**unchecked, "const": self.memory, "": GenericMemory(unchecked)}
        self._constants: dict[tuple[int, int], Array] = {}

    def reset(self, specials: Mapping[str, Array]) -> None:
        """Start the next CTA: nothing is defined, shared memory is poison."""
        count = len(self.values)
        self.values[:], self.defined[:] = [None] * count, [None] * count
        self.shared.poison()
        self.local.poison()
        self.specials.update(specials)
        self.state.clear()
        self.group, self.events = None, 0

    def active(self, act: Mask) -> Array:
        """The numbers of the executing threads."""
        return self.lanes if act is None else np.flatnonzero(act)

    def full(self, value: int, size: int) -> Array:
        """An unchangeable array of `size`-byte integers, one per thread."""
        key = (value & (1 << 8 * size) - 1, size)
        if key not in self._constants:
            array = np.full(self.threads, key[0], BITS[size])
            array.flags.writeable = False
            self._constants[key] = array
        return self._constants[key]

    # Operands

    def read(self, operand: Operand, type_: str) -> Getter:
        """Values of an operand as PTX type `type_`: a function of the mask; other lanes hold anything."""
        kind = TYPES[type_]
        if isinstance(operand, Register):
            return self._read_register(operand, kind)
        if isinstance(operand, Special):
            specials, name = self.specials, operand.name
            return lambda act: specials[name].astype(BITS[kind.size]).view(kind.compute)
        if isinstance(operand, Negated):
            inner = self.read(operand.operand, "pred")
            return lambda act: ~inner(act)
        if isinstance(operand, Immediate):
            if type_ == "pred":
                constant = np.full(self.threads, int(operand.text, 0) != 0)
            else:
                constant = kind.decode(self.full(immediate_bits(operand.text, type_), kind.size))
            return lambda act: constant
        if isinstance(operand, Symbol):
            if type_ == "pred" and operand.name in ("true", "false"):
                truth = np.full(self.threads, operand.name == "true")
                return lambda act: truth
            if operand.name not in self.symbols:
                raise NotImplementedError(f"no variable {operand.name}")
            place = kind.decode(self.full(self.symbols[operand.name], kind.size))
            return lambda act: place
        raise NotImplementedError(f"operand {operand} as {type_}")

    def _read_register(self, register: Register, kind: Type) -> Getter:
        slot, values, defined = register.slot, self.values, self.defined
        width = self.program.registers[slot][1]
        check, decode = self._check_defined, kind.decode
        if kind.name == "pred" or kind.compute == width:

            def get(act: Mask) -> Array:
                if defined[slot] is not True:
                    check(register, act)
                return values[slot]
        elif width.itemsize == kind.size:

            def get(act: Mask) -> Array:
                if defined[slot] is not True:
                    check(register, act)
                return decode(values[slot])
        elif width.itemsize > kind.size:
            narrow = BITS[kind.size]

            def get(act: Mask) -> Array:
                if defined[slot] is not True:
                    check(register, act)
                return decode(values[slot].astype(narrow))
        else:
            raise NotImplementedError(f"{register.name} of {width} read as {kind.name}")
        return get

    def _check_defined(self, register: Register, act: Mask) -> None:
        known = self.defined[register.slot]
        missing = self.active(act) if known is None else np.flatnonzero(~known if act is None else act & ~known)
        if len(missing):
            raise AccessError(f"thread {missing[0]} reads {register.name}, which was never written")
        if known is None:
            self.values[register.slot] = np.zeros(self.threads, self.program.registers[register.slot][1])

    def write(self, operand: Operand, type_: str | None = None, loaded: bool = False) -> Putter:
        """A function that stores values of `type_` (bits of the register's width where None) for the masked threads.

        `loaded` marks the result of a guarded load: where the guard is off, an unwritten register becomes poison that
        may be copied about, as compilers do with lanes that they never use.
        """
        if isinstance(operand, Symbol) and operand.name == "_":
            return lambda values, act: None
        if not isinstance(operand, Register):
            raise NotImplementedError(f"result {operand}")
        slot, values, defined = operand.slot, self.values, self.defined
        width = self.program.registers[slot][1]
        merge = self.assign
        convert = _to_width(TYPES[type_], width) if type_ else None

        def put(new: Array, act: Mask) -> None:
            bits = convert(new) if convert else new
            if act is None:
                values[slot], defined[slot] = bits, True
            else:
                merge(slot, bits, act)
                if loaded and defined[slot] is not True:
                    defined[slot] = True if self.group is None else defined[slot] | self.group

        return put

    def assign(self, slot: int, bits: Array, act: Mask) -> None:
        """Set a register for the masked threads."""
        if act is None:
            self.values[slot], self.defined[slot] = bits, True
            return
        old, known = self.values[slot], self.defined[slot]
        if old is None:
            old = np.full(self.threads, -1, np.int64).astype(self.program.registers[slot][1])
        self.values[slot] = np.where(act, bits, old)
        if known is not True:
            known = act.copy() if known is None else known | act
            self.defined[slot] = True if known.all() else known

    def read_items(self, operand: Operand, type_: str) -> list[Getter]:
        items = operand.items if isinstance(operand, Vector) else (operand,)
        return [self.read(item, type_) for item in items]

    def write_items(self, operand: Operand, type_: str | None = None, loaded: bool = False) -> list[Putter]:
        items = operand.items if isinstance(operand, Vector) else (operand,)
        return [self.write(item, type_, loaded) for item in items]

    def address(self, operand: Operand) -> Getter:
        """Addresses of `[base + offset]` as int64."""
        if not isinstance(operand, Address):
            raise NotImplementedError(f"not an address: {operand}")
        base, offset = operand.base, np.int64(operand.offset)
        if isinstance(base, Register):
            size = self.program.registers[base.slot][1].itemsize
            get = self.read(base, f"u{8 * size}")
            if offset == 0:
                return lambda act: get(act).astype(np.int64)
            return lambda act: get(act).astype(np.int64) + offset
        get = self.read(base, "s64")
        constant = get(None) + offset
        return lambda act: constant


def _to_width(kind: Type, width: np.dtype) -> Callable[[Array], Array] | None:
    """From computed values of `kind` to a register: the same bits, or integers extended by their sign."""
    if width.kind == "b":
        return None
    if width.itemsize == kind.size:
        return None if kind.compute == width else kind.encode
    if kind.is_float:
        return lambda v: kind.encode(v).astype(width)
    signed = np.dtype(f"i{width.itemsize}")
    if kind.is_signed:
        return lambda v: v.astype(signed).view(width)
    return lambda v: v.astype(width)


def pair(operand: Operand) -> Sequence[Operand]:
    """`value|predicate` as two results; a single result stays alone."""
    return (operand.first, operand.second) if isinstance(operand, Pair) else (operand,)
