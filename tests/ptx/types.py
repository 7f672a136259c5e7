"""PTX types: how the bits of a register become numbers and back.

A register holds unsigned integers of its width (predicates hold bools). 16-bit floats are computed in float32, which is
exact up to the final rounding for add, sub and mul (24 bits >= 2 p + 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray  # one value per thread, or [threads, 2] for packed types
Mask = NDArray | None  # the threads that execute; None means all of them

BITS: dict[int, np.dtype] = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
CARRIER: dict[int, np.dtype] = {**BITS, 16: np.dtype(np.complex128)}  # 16 bytes moved as one item, never computed with
POISON = 0xFF  # every byte that nothing has written: NaN in all float types


def bf16_to_f32(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: Array) -> Array:
    """Round to nearest even; NaN becomes 0x7FFF, as the hardware does it."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def f16_to_f32(bits: Array) -> Array:
    return bits.view(np.float16).astype(np.float32)


def f32_to_f16(values: Array) -> Array:
    bits = np.ascontiguousarray(values).astype(np.float16).view(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), bits)


def truncate_to_tf32(bits: Array) -> Array:
    """What the tensor cores read of a 32-bit register: the low 13 bits are ignored."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


@dataclass(frozen=True)
class Type:
    """One PTX type: its size in bytes, and the numpy type that values of it are computed in."""

    name: str
    size: int
    compute: np.dtype
    decode: Callable[[Array], Array]  # register bits -> values
    encode: Callable[[Array], Array]  # values -> register bits

    @property
    def is_float(self) -> bool:
        return self.compute.kind == "f"

    @property
    def is_signed(self) -> bool:
        return self.compute.kind == "i"

    @property
    def bits(self) -> int:
        return 8 * self.size


def _viewed(name: str, dtype: str) -> Type:
    compute = np.dtype(dtype)
    bits = BITS[compute.itemsize]
    return Type(
        name, compute.itemsize, compute, lambda v: v.view(compute), lambda v: np.ascontiguousarray(v).view(bits)
    )


def _halves(decode: Callable[[Array], Array], encode: Callable[[Array], Array]) -> tuple[Callable, Callable]:
    def unpack(bits: Array) -> Array:
        return decode(np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 2))

    def pack(values: Array) -> Array:
        return np.ascontiguousarray(encode(values)).view(np.uint32).reshape(-1)

    return unpack, pack


_F32 = np.dtype(np.float32)
TYPES: dict[str, Type] = {
    **{f"{kind}{8 * size}": _viewed(f"{kind}{8 * size}", f"u{size}") for kind in "bu" for size in (1, 2, 4, 8)},
    **{f"s{8 * size}": _viewed(f"s{8 * size}", f"i{size}") for size in (1, 2, 4, 8)},
    "f32": _viewed("f32", "f4"),
    "f64": _viewed("f64", "f8"),
    "pred": Type("pred", 1, np.dtype(bool), lambda v: v, lambda v: v),
    "f16": Type("f16", 2, _F32, f16_to_f32, f32_to_f16),
    "bf16": Type("bf16", 2, _F32, bf16_to_f32, f32_to_bf16),
    "f16x2": Type("f16x2", 4, _F32, *_halves(f16_to_f32, f32_to_f16)),
    "bf16x2": Type("bf16x2", 4, _F32, *_halves(bf16_to_f32, f32_to_bf16)),
    "u16x2": Type("u16x2", 4, np.dtype("u2"), *_halves(lambda v: v, lambda v: v)),
    "s16x2": Type("s16x2", 4, np.dtype("i2"), *_halves(lambda v: v.view("i2"), lambda v: v.view("u2"))),
}
WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def register_dtype(name: str) -> np.dtype:
    """The numpy type of a register declared as `.reg .name`."""
    return np.dtype(bool) if name == "pred" else BITS[TYPES[name].size]
