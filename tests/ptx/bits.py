"""Instructions on the bits of integers."""

from __future__ import annotations

import numpy as np

from tests.ptx.machine import Machine, Operation, builder, unknown
from tests.ptx.program import Immediate, Instruction
from tests.ptx.scalar import elementwise
from tests.ptx.types import BITS, TYPES, Array


@builder("shl", "shr")
def build_shift(machine: Machine, ins: Instruction) -> Operation:
    """Shifts clamp: by the width or more leaves 0, or the sign."""
    kind = TYPES[ins.parts[-1]]
    bits, compute = kind.bits, kind.compute

    def left(a: Array, n: Array) -> Array:
        return np.where(n < bits, np.left_shift(a, np.minimum(n, bits - 1).astype(compute)), compute.type(0))

    def right(a: Array, n: Array) -> Array:
        shifted = np.right_shift(a, np.minimum(n, bits - 1).astype(compute))
        return shifted if kind.is_signed else np.where(n < bits, shifted, compute.type(0))

    if isinstance(ins.operands[2], Immediate) and 0 <= int(ins.operands[2].text, 0) < bits:
        amount = np.array(int(ins.operands[2].text, 0)).astype(compute)
        function = np.left_shift if ins.parts[0] == "shl" else np.right_shift
        put, get = machine.write(ins.operands[0], kind.name), machine.read(ins.operands[1], kind.name)
        return Operation(lambda act: put(function(get(act), amount), act))
    return elementwise(machine, ins, left if ins.parts[0] == "shl" else right, kind.name, kind.name, "u32")


@builder("shf")
def build_funnel(machine: Machine, ins: Instruction) -> Operation:
    wrap, to_left = "wrap" in ins.parts, ins.parts[1] == "l"

    def function(low: Array, up: Array, n: Array) -> Array:
        n = (n & np.uint32(31) if wrap else np.minimum(n, np.uint32(32))).astype(np.uint64)
        both = low.astype(np.uint64) | (up.astype(np.uint64) << np.uint64(32))
        return ((both << n) >> np.uint64(32) if to_left else both >> n).astype(np.uint32)

    return elementwise(machine, ins, function, *["b32"] * 3, "u32")


@builder("bfe")
def build_extract(machine: Machine, ins: Instruction) -> Operation:
    kind = TYPES[ins.parts[-1]]
    bits = kind.bits

    def function(a: Array, start: Array, length: Array) -> Array:
        start, length = (start & np.uint32(255)).astype(np.int64), (length & np.uint32(255)).astype(np.int64)
        top = np.minimum(start + length, bits)  # bits above the register repeat its sign
        kept = np.maximum(top - start, 0)
        up, down = np.clip(bits - top, 0, bits - 1), np.clip(bits - kept, 0, bits - 1)
        field = np.right_shift(np.left_shift(a, up.astype(a.dtype)), down.astype(a.dtype))
        sign = np.right_shift(a, a.dtype.type(bits - 1)) if kind.is_signed else np.zeros_like(a)
        return np.where(length == 0, a.dtype.type(0), np.where(kept == 0, sign, field))

    return elementwise(machine, ins, function, kind.name, kind.name, "u32", "u32")


@builder("bfi")
def build_insert(machine: Machine, ins: Instruction) -> Operation:
    kind = TYPES["u" + ins.parts[-1][1:]]
    bits, one = kind.bits, kind.compute.type(1)

    def function(a: Array, b: Array, start: Array, length: Array) -> Array:
        start, length = np.minimum(start & np.uint32(255), bits), np.minimum(length & np.uint32(255), bits)
        ones = np.where(
            length >= bits, ~kind.compute.type(0), (one << np.minimum(length, bits - 1).astype(a.dtype)) - one
        )
        shift = np.minimum(start, bits - 1).astype(a.dtype)
        mask = np.where(start >= bits, a.dtype.type(0), ones << shift)
        return (b & ~mask) | ((a << shift) & mask)

    return elementwise(machine, ins, function, kind.name, kind.name, kind.name, "u32", "u32")


@builder("prmt")
def build_permute(machine: Machine, ins: Instruction) -> Operation:
    if ins.parts[-1] != "b32":
        raise unknown(ins)

    def function(a: Array, b: Array, selector: Array) -> Array:
        source = np.stack([a, b], axis=1).view(np.uint8).reshape(-1, 8)
        out = np.empty((len(a), 4), np.uint8)
        for i in range(4):
            pick = (selector >> np.uint32(4 * i)) & np.uint32(15)
            byte = source[np.arange(len(a)), pick & np.uint32(7)]
            out[:, i] = np.where(pick & np.uint32(8), np.where(byte & 0x80, 0xFF, 0), byte)
        return out.view(np.uint32).reshape(-1)

    return elementwise(machine, ins, function, *["b32"] * 4)


@builder("lop3")
def build_lop3(machine: Machine, ins: Instruction) -> Operation:
    if len(ins.operands) != 5 or not isinstance(ins.operands[4], Immediate):
        raise unknown(ins)
    table = int(ins.operands[4].text, 0)

    def function(a: Array, b: Array, c: Array, _: Array) -> Array:
        out = np.zeros_like(a)
        for i in range(8):
            if table >> i & 1:
                out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return out

    return elementwise(machine, ins, function, *["b32"] * 5)


def highest_bit(a: Array) -> Array:
    """The place of the highest one, -1 for zero, exact for 64 bits."""
    place = np.full(a.shape, -1, np.int64)
    rest = a.astype(np.uint64)
    for step in (32, 16, 8, 4, 2, 1):
        big = rest >> np.uint64(step) != 0
        place += np.where(big, step, 0)
        rest = np.where(big, rest >> np.uint64(step), rest)
    return np.where(rest != 0, place + 1, -1)


def reverse_bits(a: Array) -> Array:
    size = a.dtype.itemsize
    flags = np.unpackbits(np.ascontiguousarray(a).view(np.uint8).reshape(-1, size), axis=1, bitorder="little")
    return np.packbits(flags[:, ::-1], axis=1, bitorder="little").view(BITS[size]).reshape(-1)


@builder("popc", "clz", "bfind", "brev")
def build_count(machine: Machine, ins: Instruction) -> Operation:
    kind = TYPES[ins.parts[-1]]
    name, bits = ins.parts[0], kind.bits
    if name == "popc":
        return elementwise(machine, ins, lambda a: np.bitwise_count(a).astype(np.uint32), "u32", kind.name)
    if name == "clz":
        return elementwise(machine, ins, lambda a: (bits - 1 - highest_bit(a)).astype(np.uint32), "u32", kind.name)
    if name == "brev":
        return elementwise(machine, ins, reverse_bits, kind.name, kind.name)

    def find(a: Array) -> Array:
        unsigned = a.view(BITS[kind.size])
        place = highest_bit(np.where(a < 0, ~unsigned, unsigned) if kind.is_signed else unsigned)
        if "shiftamt" in ins.parts:
            place = np.where(place < 0, -1, bits - 1 - place)
        return place.astype(np.uint32)

    return elementwise(machine, ins, find, "u32", kind.name)


@builder("sad", "dp4a")
def build_absolute_difference(machine: Machine, ins: Instruction) -> Operation:
    if ins.parts[0] == "dp4a":
        raise unknown(ins)
    return elementwise(machine, ins, lambda a, b, c: c + (np.maximum(a, b) - np.minimum(a, b)), *[ins.parts[-1]] * 4)
