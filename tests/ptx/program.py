"""A kernel as data: instructions with their operands, parameters and variables."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tests.ptx.types import TYPES


@dataclass(frozen=True)
class Register:
    slot: int
    name: str


@dataclass(frozen=True)
class Special:
    name: str  # "%tid.x"


@dataclass(frozen=True)
class Immediate:
    text: str


@dataclass(frozen=True)
class Symbol:
    name: str


@dataclass(frozen=True)
class Negated:
    operand: Operand


@dataclass(frozen=True)
class Address:
    base: Operand
    offset: int
    coordinates: tuple[Operand, ...] = ()  # of a tensor map


@dataclass(frozen=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """`value|predicate`, the two results of one instruction."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Target:
    index: int  # of the instruction to go to


Operand = Register | Special | Immediate | Symbol | Negated | Address | Vector | Pair | Target


@dataclass(frozen=True)
class Instruction:
    opcode: str  # "ld.global.v4.b32"
    parts: tuple[str, ...]  # the opcode split at its dots
    operands: tuple[Operand, ...]
    guard: Register | None
    guard_negated: bool
    line: int
    text: str


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    size: int
    offset: int  # in the parameter space


@dataclass(frozen=True)
class Variable:
    """A module-scope `.global` or `.const` array with its first bytes."""

    name: str
    size: int
    data: bytes


@dataclass(frozen=True)
class Program:
    """One entry point, ready to be executed."""

    name: str
    params: list[tuple[str, str | int]]  # (name, type), or (name, bytes) for an array of bytes
    parameters: tuple[Parameter, ...]
    threads: int | None  # what .reqntid or .maxntid says
    instructions: tuple[Instruction, ...]
    registers: tuple[tuple[str, np.dtype], ...]  # name and dtype, by slot
    shared_bytes: int  # static; dynamic shared memory starts behind it
    shared: dict[str, int]  # offsets by name
    local: dict[str, int]
    local_bytes: int
    variables: tuple[Variable, ...] = ()
    tables: dict[str, tuple[int, ...]] = field(default_factory=dict)  # .branchtargets by label


def immediate_bits(text: str, type_: str) -> int:
    """The bits of a literal when an instruction of PTX type `type_` reads it."""
    sign, body = (-1, text[1:]) if text.startswith("-") else (1, text)
    if body[:2].lower() in ("0f", "0d"):
        width = np.uint32 if body[1] in "fF" else np.uint64
        bits = np.array([int(body[2:], 16)], width)
        if type_ == "f64" and width is np.uint32:
            bits = bits.view(np.float32).astype(np.float64).view(np.uint64)
        elif type_ == "f32" and width is np.uint64:
            bits = bits.view(np.float64).astype(np.float32).view(np.uint32)
        value = int(bits[0])
        return value if sign > 0 else value ^ (1 << (8 * bits.itemsize - 1))
    if "." in body or type_ in ("f32", "f64") and not body.lower().startswith("0x"):
        kind = TYPES[type_ if TYPES[type_].is_float else "f32"]
        return int(kind.encode(np.array([sign * float(body)], kind.compute))[0])
    return sign * int(body.rstrip("U"), 0)
