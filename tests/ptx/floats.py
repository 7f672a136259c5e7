"""Float functions of one argument, and conversions between all types.

Approximate instructions (ex2.approx, rcp.approx ...) are computed in float64 and rounded once: at least as accurate as
the hardware, so they may differ from it in the last bits.
"""

from __future__ import annotations

import numpy as np

from tests.ptx.machine import Machine, Operation, builder, unknown
from tests.ptx.program import Instruction
from tests.ptx.scalar import Function, elementwise, flush, with_modifiers
from tests.ptx.types import BITS, TYPES, Array, Mask, Type

UNARY = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "rcp": lambda x: 1.0 / x,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "sqrt": np.sqrt,
}


@builder(*UNARY)
def build_unary(machine: Machine, ins: Instruction) -> Operation:
    kind, exact = TYPES[ins.parts[-1]], UNARY[ins.parts[0]]

    def function(a: Array) -> Array:
        return exact(a.astype(np.float64)).astype(kind.compute)

    return elementwise(machine, ins, with_modifiers(ins, function), kind.name, kind.name)


@builder("neg", "abs")
def build_sign(machine: Machine, ins: Instruction) -> Operation:
    kind = TYPES[ins.parts[-1]]
    function = np.negative if ins.parts[0] == "neg" else np.abs
    return elementwise(machine, ins, with_modifiers(ins, function), kind.name, kind.name)


@builder("copysign")
def build_copysign(machine: Machine, ins: Instruction) -> Operation:
    kind = ins.parts[-1]
    return elementwise(machine, ins, lambda a, b: np.copysign(b, a), kind, kind, kind)


@builder("testp")
def build_testp(machine: Machine, ins: Instruction) -> Operation:
    kind = TYPES[ins.parts[-1]]
    tiny = np.finfo(kind.compute).tiny
    tests = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": lambda a: (np.abs(a) < tiny) & (a != 0),
    }
    return elementwise(machine, ins, tests[ins.parts[1]], "pred", kind.name)


ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@builder("cvt")
def build_cvt(machine: Machine, ins: Instruction) -> Operation:
    names = [p for p in ins.parts[1:] if p in TYPES or p == "tf32"]
    if len(names) != 2 or any(p.startswith(("e4m3", "e5m2", "e2m1", "ue8m0", "rs")) for p in ins.parts):
        raise unknown(ins)
    to, source = names
    if to == "tf32":
        return elementwise(machine, ins, _round_to_tf32(ins), "f32", "f32")
    if to.endswith("x2"):
        return _convert_pair(machine, ins, to, source)
    return elementwise(machine, ins, conversion(ins, TYPES[to], TYPES[source]), to, source)


def _round_to_tf32(ins: Instruction) -> Function:
    nearest_even = "rn" in ins.parts

    def function(a: Array) -> Array:
        bits = a.view(np.uint32)
        half = np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1)) if nearest_even else np.uint32(0x1000)
        rounded = ((bits + half) & np.uint32(0xFFFFE000)).view(np.float32)
        return np.where(np.isfinite(a), rounded, a)

    return with_modifiers(ins, function)


def _narrow(ins: Instruction, to: Type, source: Type) -> Function:
    """A float conversion's rounding, before the target's own round to nearest."""
    if "rz" in ins.parts and to.name in ("f16", "bf16", "f16x2", "bf16x2", "f32"):

        def toward_zero(a: Array) -> Array:
            nearest = to.decode(to.encode(a)) if to.size < 4 else a.astype(np.float32)
            if to.name.startswith("bf16"):
                return np.where(np.isnan(a), a, (a.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))
            over = np.abs(nearest.astype(np.float64)) > np.abs(a.astype(np.float64))
            narrow = np.float32 if to.size == 4 else np.float16
            down = np.nextafter(nearest.astype(narrow), narrow(0)).astype(to.compute)
            return np.where(over, down, nearest)

        return toward_zero
    if any(p in ins.parts for p in ("rm", "rp", "rna")) or "rz" in ins.parts:
        raise unknown(ins)
    return lambda a: a.astype(to.compute)


def conversion(ins: Instruction, to: Type, source: Type) -> Function:
    """The function from values of `source` to values of `to`."""
    rounding = next((ROUND[p] for p in ins.parts if p in ROUND), None)
    if source.is_float and to.is_float:
        if rounding:
            return with_modifiers(ins, lambda a: rounding(a).astype(to.compute))
        if to.size >= source.size and to.name != source.name:
            return with_modifiers(ins, lambda a: a.astype(to.compute))
        return with_modifiers(ins, _narrow(ins, to, source))
    if source.is_float:
        return _float_to_integer(ins, to, rounding or np.trunc)
    if to.is_float:
        if any(p in ins.parts for p in ("rz", "rm", "rp")):
            return _integer_toward(ins, to)
        if to.size == 2:
            return lambda a: a.astype(np.float64).astype(np.float32)
        return with_modifiers(ins, lambda a: a.astype(to.compute))
    if "sat" in ins.parts:
        bounds = np.iinfo(to.compute)
        low = max(bounds.min, np.iinfo(source.compute).min)
        top = min(bounds.max, np.iinfo(source.compute).max)
        return lambda a: np.clip(a, low, top).astype(to.compute)
    return lambda a: a.astype(to.compute)


def _integer_toward(ins: Instruction, to: Type) -> Function:
    """Directed rounding of integers: correct the nearest float by one step where it lies on the wrong side."""
    if to.size < 4:
        raise unknown(ins)
    mode = next(p for p in ins.parts if p in ("rz", "rm", "rp"))

    def function(a: Array) -> Array:
        nearest = a.astype(to.compute)
        exact, got = a.astype(np.longdouble), nearest.astype(np.longdouble)
        wrong = {"rz": np.abs(got) > np.abs(exact), "rm": got > exact, "rp": got < exact}[mode]
        goal = {"rz": 0.0, "rm": -np.inf, "rp": np.inf}[mode]
        return np.where(wrong, np.nextafter(nearest, to.compute.type(goal)), nearest)

    return function


def _float_to_integer(ins: Instruction, to: Type, rounding: Function) -> Function:
    """Out-of-range numbers become the nearest integer of the type, NaN becomes 0 (its top bit alone for 64 bits)."""
    bounds, ftz = np.iinfo(to.compute), "ftz" in ins.parts
    nan = 0 if to.size < 8 else -(1 << 63) if to.is_signed else 1 << 63

    def function(a: Array) -> Array:
        rounded = rounding((flush(a) if ftz else a).astype(np.float64))
        above, below = rounded >= float(bounds.max), rounded <= float(bounds.min)
        inside = np.where(above | below | np.isnan(a), 0.0, rounded).astype(to.compute)
        out = np.where(above, to.compute.type(bounds.max), np.where(below, to.compute.type(bounds.min), inside))
        return np.where(np.isnan(a), np.array(nan, to.compute), out)

    return function


def _convert_pair(machine: Machine, ins: Instruction, to: str, source: str) -> Operation:
    """cvt.rn.bf16x2.f32 d, a, b: a becomes the upper half."""
    kind = TYPES[to]
    if source != "f32" or len(ins.operands) != 3 or "satfinite" in ins.parts:
        raise unknown(ins)
    half = TYPES[to.removesuffix("x2")]
    function = with_modifiers(ins, _narrow(ins, half, TYPES[source]))
    upper, lower = (machine.read(o, "f32") for o in ins.operands[1:])
    put = machine.write(ins.operands[0], f"b{kind.bits}")

    def run(act: Mask) -> None:
        pair = np.stack([half.encode(function(lower(act))), half.encode(function(upper(act)))], axis=1)
        put(pair.view(BITS[4]).reshape(-1), act)

    return Operation(run)
