"""Arithmetic of single threads: integers, floats, comparisons, moves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.machine import Machine, Operation, builder, pair, unknown
from tests.ptx.memory import WINDOWS
from tests.ptx.program import Instruction, Vector
from tests.ptx.types import BITS, TYPES, WIDER, Array, Mask, Type

Function = Callable[..., Array]


def elementwise(machine: Machine, ins: Instruction, function: Function, out: str, *types: str) -> Operation:
    """d = function(a, b, ...): operand 0 written as `out`, the others read as `types`."""
    put = machine.write(ins.operands[0], out)
    gets = [machine.read(o, t) for o, t in zip(ins.operands[1:], types, strict=True)]
    if len(gets) == 1:
        (a,) = gets
        return Operation(lambda act: put(function(a(act)), act))
    if len(gets) == 2:
        a, b = gets
        return Operation(lambda act: put(function(a(act), b(act)), act))
    if len(gets) == 3:
        a, b, c = gets
        return Operation(lambda act: put(function(a(act), b(act), c(act)), act))
    return Operation(lambda act: put(function(*[get(act) for get in gets]), act))


def flush(values: Array) -> Array:
    """.ftz: subnormal numbers become zeros of their sign."""
    small = np.abs(values) < np.finfo(np.float32).tiny
    return np.where(small, np.copysign(np.float32(0), values), values)


def with_modifiers(ins: Instruction, function: Function) -> Function:
    """Apply .ftz, .sat and .relu around a float function."""
    if "ftz" in ins.parts:
        inner = function

        def function(*args: Array) -> Array:
            return flush(inner(*[flush(a) for a in args]))

    if "sat" in ins.parts:
        unclamped = function

        def function(*args: Array) -> Array:
            value = unclamped(*args)
            return np.where(np.isnan(value), value.dtype.type(0), np.clip(value, 0, 1)).astype(value.dtype)

    if "relu" in ins.parts:
        signed = function

        def function(*args: Array) -> Array:
            value = signed(*args)
            return np.where(value > 0, value, np.where(np.isnan(value), value, value.dtype.type(0)))

    return function


def _minimum(a: Array, b: Array) -> Array:
    """IEEE minimumNumber: a number wins over NaN, -0 is below +0."""
    return np.where(a == b, np.where(np.signbit(a), a, b), np.fmin(a, b))


def _maximum(a: Array, b: Array) -> Array:
    return np.where(a == b, np.where(np.signbit(a), b, a), np.fmax(a, b))


def _divide_integers(a: Array, b: Array) -> Array:
    """Truncates towards zero; anything but an error where b is 0."""
    b = np.where(b == 0, np.iinfo(b.dtype).max, b)
    if a.dtype.kind == "u":
        return a // b
    quotient = np.floor_divide(a, b)
    return quotient + ((quotient * b != a) & ((a < 0) != (b < 0))).astype(a.dtype)


def _remainder_integers(a: Array, b: Array) -> Array:
    safe = np.where(b == 0, b.dtype.type(1), b)
    return np.where(b == 0, a, np.fmod(a, safe))


BINARY: dict[str, tuple[Function, Function]] = {  # for integers, for floats
    "add": (np.add, np.add),
    "sub": (np.subtract, np.subtract),
    "min": (np.minimum, _minimum),
    "max": (np.maximum, _maximum),
    "div": (_divide_integers, np.divide),
    "rem": (_remainder_integers, np.fmod),
}


@builder("add", "sub", "min", "max", "div", "rem")
def build_binary(machine: Machine, ins: Instruction) -> Operation:
    kind, name = TYPES[ins.parts[-1]], ins.parts[0]
    if "cc" in ins.parts:
        return _with_carry(machine, ins, kind)
    function = BINARY[name][kind.is_float]
    if kind.is_float:
        if "NaN" in ins.parts:
            function = {"min": np.minimum, "max": np.maximum}[name]
        if "xorsign" in ins.parts or any(p in ins.parts for p in ("rz", "rm", "rp")):
            raise unknown(ins)
        function = with_modifiers(ins, function)
    elif "sat" in ins.parts:
        exact, bounds = function, np.iinfo(kind.compute)

        def function(a: Array, b: Array) -> Array:
            return np.clip(exact(a.astype(np.int64), b.astype(np.int64)), bounds.min, bounds.max).astype(kind.compute)

    types = [kind.name] * (len(ins.operands) - 1)
    if len(types) == 3:  # three-input min and max
        two = function
        return elementwise(machine, ins, lambda a, b, c: two(two(a, b), c), kind.name, *types)
    return elementwise(machine, ins, function, kind.name, *types)


def high(a: Array, b: Array) -> Array:
    """The upper half of a product."""
    if a.dtype.itemsize <= 4:
        wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(8 * a.dtype.itemsize)).astype(a.dtype)
    ua, ub = a.view(np.uint64), b.view(np.uint64)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = ua & low, ua >> shift, ub & low, ub >> shift
    middle = a1 * b0 + ((a0 * b0) >> shift)
    carry = a0 * b1 + (middle & low)
    top = a1 * b1 + (middle >> shift) + (carry >> shift)
    if a.dtype.kind == "i":
        top = top - np.where(a < 0, ub, np.uint64(0)) - np.where(b < 0, ua, np.uint64(0))
    return top.view(a.dtype)


@builder("mul", "mad", "mul24", "mad24")
def build_multiply(machine: Machine, ins: Instruction) -> Operation:
    kind = TYPES[ins.parts[-1]]
    if kind.is_float:
        if ins.parts[0] == "mad":
            return build_fma(machine, ins)
        return elementwise(machine, ins, with_modifiers(ins, np.multiply), kind.name, kind.name, kind.name)
    if "cc" in ins.parts:
        return _with_carry(machine, ins, kind)
    if "wide" in ins.parts:
        wide = WIDER[kind.name]
        to = TYPES[wide].compute
        if ins.parts[0] == "mul":
            return elementwise(machine, ins, lambda a, b: a.astype(to) * b.astype(to), wide, kind.name, kind.name)
        return elementwise(
            machine, ins, lambda a, b, c: a.astype(to) * b.astype(to) + c, wide, kind.name, kind.name, wide
        )
    if ins.parts[0].endswith("24"):
        raise unknown(ins)
    product = high if "hi" in ins.parts else np.multiply
    if ins.parts[0] == "mul":
        return elementwise(machine, ins, product, kind.name, kind.name, kind.name)
    return elementwise(machine, ins, lambda a, b, c: product(a, b) + c, kind.name, *[kind.name] * 3)


@builder("addc", "subc", "madc")
def _with_carry(machine: Machine, ins: Instruction, kind: Type | None = None) -> Operation:
    """The .cc family: the carry flag is a hidden register of every thread."""
    kind = TYPES[{"s": "u", "b": "u"}.get(ins.parts[-1][0], "u") + ins.parts[-1][1:]]
    name, reads = ins.parts[0], ins.parts[0].endswith("c")
    gets = [machine.read(o, kind.name) for o in ins.operands[1:]]
    put, one = machine.write(ins.operands[0], kind.name), kind.compute.type(1)
    state, none = machine.state, np.zeros(machine.threads, bool)

    def run(act: Mask) -> None:
        carry = state.get("carry", none) if reads else none
        values = [get(act) for get in gets]
        if name.startswith("mad"):
            product = high(*values[:2]) if "hi" in ins.parts else values[0] * values[1]
            values = [product, values[2]]
        a, b = values
        if name.startswith("sub"):
            result = a - b - carry * one
            flag = (a < b) | ((a == b) & carry)
        else:
            result = a + b + carry * one
            flag = (result < a) | ((result == a) & carry)
        put(result, act)
        if "cc" in ins.parts:
            state["carry"] = flag if act is None else np.where(act, flag, state.get("carry", none))

    return Operation(run)


@builder("fma")
def build_fma(machine: Machine, ins: Instruction) -> Operation:
    """fp32 through float64: the product is exact, the sum is rounded twice (to 53, then 24 bits), which differs from a
    fused operation in about one of 2^29 results. fp64 through the host's extended precision."""
    kind = TYPES[ins.parts[-1]]
    wide = np.longdouble if kind.name == "f64" else np.float64

    def function(a: Array, b: Array, c: Array) -> Array:
        return (a.astype(wide) * b + c).astype(kind.compute)

    return elementwise(machine, ins, with_modifiers(ins, function), *[kind.name] * 4)


COMPARE: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
LOGIC: dict[str, Function] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def compare(name: str, kind: Type) -> Function:
    """The comparison `name`; a trailing u (ltu, neu ...) is true for NaN, ne without it is false for NaN."""
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if kind.is_float and name.endswith("u"):
        base = COMPARE[name[:-1]]
        return lambda a, b: base(a, b) | np.isnan(a) | np.isnan(b)
    if kind.is_float and name == "ne":
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    return COMPARE[name]


@builder("setp", "set")
def build_setp(machine: Machine, ins: Instruction) -> Operation:
    kind = TYPES[ins.parts[-1]]
    function = compare(ins.parts[1], kind)
    if "ftz" in ins.parts:
        exact = function

        def function(a: Array, b: Array) -> Array:
            return exact(flush(a), flush(b))

    if kind.name.endswith("x2") or ins.parts[0] == "set" and ins.parts[-2] not in TYPES:
        raise unknown(ins)
    combine = LOGIC.get(ins.parts[2])
    a, b = (machine.read(o, kind.name) for o in ins.operands[1:3])
    extra = machine.read(ins.operands[3], "pred") if combine else None
    if ins.parts[0] == "set":
        out = TYPES[ins.parts[-2]]
        store = machine.write(ins.operands[0], out.name)
        true = out.compute.type(1) if out.is_float else np.array(-1).astype(out.compute)

        def run_set(act: Mask) -> None:
            result = function(a(act), b(act))
            if combine and extra:
                result = combine(result, extra(act))
            store(np.where(result, true, out.compute.type(0)), act)

        return Operation(run_set)
    puts = [machine.write(o) for o in pair(ins.operands[0])]

    def run(act: Mask) -> None:
        result = function(a(act), b(act))
        if combine and extra:
            other = extra(act)
            puts[0](combine(result, other), act)
            if len(puts) > 1:
                puts[1](combine(~result, other), act)
        else:
            puts[0](result, act)
            if len(puts) > 1:
                puts[1](~result, act)

    return Operation(run)


@builder("selp")
def build_selp(machine: Machine, ins: Instruction) -> Operation:
    bits = f"b{TYPES[ins.parts[-1]].bits}"
    kind = ins.parts[-1] if ins.parts[-1] in ("f32", "f64") else bits  # a literal of a float selp is a float
    return elementwise(machine, ins, lambda a, b, p: np.where(p, a, b), kind, kind, kind, "pred")


@builder("slct")
def build_slct(machine: Machine, ins: Instruction) -> Operation:
    kind, by = ins.parts[-2], ins.parts[-1]
    return elementwise(machine, ins, lambda a, b, c: np.where(c >= 0, a, b), kind, kind, kind, by)


@builder("and", "or", "xor")
def build_logic(machine: Machine, ins: Instruction) -> Operation:
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[ins.parts[0]]
    return elementwise(machine, ins, function, *[ins.parts[-1]] * 3)


@builder("not")
def build_not(machine: Machine, ins: Instruction) -> Operation:
    return elementwise(machine, ins, np.invert, ins.parts[-1], ins.parts[-1])


@builder("mov")
def build_mov(machine: Machine, ins: Instruction) -> Operation:
    kind = ins.parts[-1]
    to, source = ins.operands
    if isinstance(to, Vector) or isinstance(source, Vector):
        return _move_vector(machine, ins, kind)
    return elementwise(machine, ins, lambda a: a, kind, kind)


def _move_vector(machine: Machine, ins: Instruction, kind: str) -> Operation:
    """Split a register into parts, or join parts into one."""
    to, source = ins.operands
    if isinstance(to, Vector) and isinstance(source, Vector):
        raise unknown(ins)
    parts = to if isinstance(to, Vector) else source
    count = len(parts.items)  # type: ignore[union-attr]
    size = TYPES[kind].size // count
    small, whole = BITS[size], BITS[size * count]
    if isinstance(to, Vector):
        puts = machine.write_items(to, f"b{8 * size}")
        get = machine.read(source, f"b{8 * size * count}")

        def split(act: Mask) -> None:
            pieces = np.ascontiguousarray(get(act)).view(small).reshape(-1, count)
            for i, put in enumerate(puts):
                put(np.ascontiguousarray(pieces[:, i]), act)

        return Operation(split)
    gets, put = machine.read_items(source, f"b{8 * size}"), machine.write(to, f"b{8 * size * count}")

    def join(act: Mask) -> None:
        put(np.stack([g(act) for g in gets], axis=1).view(whole).reshape(-1), act)

    return Operation(join)


@builder("cvta")
def build_cvta(machine: Machine, ins: Instruction) -> Operation:
    """Between a state space and the generic one."""
    space = next((p.split("::")[0] for p in ins.parts if p.split("::")[0] in WINDOWS), None)
    if space is None:
        raise unknown(ins)
    window, get = np.int64(WINDOWS[space]), machine.read(ins.operands[1], "s64")
    sign = -1 if "to" in ins.parts else 1
    put = machine.write(ins.operands[0], "s64")
    return Operation(lambda act: put(get(act) + sign * window, act))
