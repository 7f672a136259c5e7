"""Triton 3.8's interpreter, made to agree with compiled code on bfloat16 and on what compiled code leaves undefined.

The interpreter holds bfloat16 as uint16 and lets numpy compute on the bit patterns: products, sums, dots are garbage,
and casts from float32 truncate. `install` gives it dots in float32 and casts that round to nearest even, refuses every
other arithmetic on bfloat16 (a kernel must go through float32, as it should on a GPU too), fills the lanes that a load
masks off without `other=` with poison, and turns on the overflow checks of 32-bit integers. The language stays patched
once it is, so a process that called `install` compiles nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from torch.utils import deterministic
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

BF16 = tl.bfloat16
BF16_NAN = np.uint16(0x7FC0)
HALVES = (tl.float16, tl.bfloat16)
# Every operation that reads numbers; what is left moves bits (loads, selects, reshapes) and is right as it is.
ARITHMETIC = (
    "binary_op",
    "unary_op",
    "create_fma",
    "create_clampf",
    "create_erf",
    "create_rsqrt",
    "create_dot_scaled",
    "create_atomic_rmw",
)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) as float32; exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bit patterns (uint16), rounded to nearest, ties to even."""
    return torch.from_numpy(np.array(values, dtype=np.float32)).bfloat16().view(torch.uint16).numpy()


def _dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        return original(self, _float32(a), _float32(b), d, precision, imprecise)

    return create_dot


def _float32(operand: TensorHandle) -> TensorHandle:
    """Halves as float32 (products of halves are exact there); anything else unchanged."""
    if operand.dtype.scalar not in HALVES:
        return operand
    data = widen(operand.data) if operand.dtype.scalar == BF16 else operand.data.astype(np.float32)
    return TensorHandle(data, tl.float32)


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, source: Any, target: Any, *rest: Any) -> Any:
        pair = source.dtype.scalar, target.scalar
        if pair == (tl.float32, BF16):
            return TensorHandle(narrow(source.data), BF16)
        if pair == (BF16, tl.float32):
            return TensorHandle(widen(source.data), tl.float32)
        if BF16 in pair and pair[0] != pair[1]:
            raise TypeError(f"bfloat16 is cast from and to float32 only, got {pair[0]} to {pair[1]}")
        return original(self, source, target, *rest)

    return cast


def _refuse(original: Callable[..., Any]) -> Callable[..., Any]:
    def operation(self: Any, *operands: Any) -> Any:
        for operand in operands:
            if isinstance(operand, TensorHandle) and operand.dtype.scalar == BF16:
                raise TypeError("bfloat16 must be cast to float32 before arithmetic")
        return original(self, *operands)

    return operation


def _refuse_reduction(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, tensors: Any) -> Any:
        for tensor in tensors if isinstance(tensors, tuple) else (tensors,):
            if tensor.dtype == BF16:
                raise TypeError("bfloat16 must be cast to float32 before a reduction or scan")
        return original(self, tensors)

    return apply


def _masked_load(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        if other is None:
            other = poison(pointers.get_element_ty(), pointers.data.shape)
        return original(self, pointers, mask, other, *rest, **named)

    return create_masked_load


def poison(dtype: tl.dtype, shape: tuple[int, ...]) -> TensorHandle:
    """NaN for floats; for integers the largest value, which overflows in the first sum or product it meets."""
    numbers = interpreter._get_np_dtype(dtype)
    if dtype.scalar == BF16:
        value = BF16_NAN
    elif np.issubdtype(numbers, np.floating):
        value = np.nan
    else:
        value = True if numbers == np.bool_ else np.iinfo(numbers).max
    return TensorHandle(np.full(shape, value, dtype=numbers), dtype)


def get_bf16(self: Any, value: float) -> TensorHandle:
    """A bfloat16 constant, which the interpreter's builder lacks."""
    return TensorHandle(narrow(np.array([value])), BF16)


def install() -> None:
    """Repair the interpreter of this process; a second call changes nothing."""
    if interpreter.interpreter_builder.options.debug:
        return
    builder = InterpreterBuilder
    builder.get_bf16 = get_bf16
    builder.create_dot = _dot(builder.create_dot)
    builder.create_masked_load = _masked_load(builder.create_masked_load)
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(builder, name, _cast(getattr(builder, name)))
    for name in ARITHMETIC:
        setattr(builder, name, _refuse(getattr(builder, name)))
    reductions = interpreter.ReduceScanOpInterface
    reductions.apply = _refuse_reduction(reductions.apply)
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)
    for name in ("gdc_wait", "gdc_launch_dependents"):  # launches run one after the other here
        setattr(tl.extra.cuda, name, lambda: None)
    _patch_language_once()


def _patch_attr(target: Any, name: str, member: Callable[..., Any], builder: Any, scope: Any) -> None:
    """A builtin that needs no `_semantic`, and follows the one that it is given: Gluon's calls come with theirs."""
    if hasattr(member, "__wrapped_for_interpreter__"):
        return

    @functools.wraps(member)
    def call(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
        semantic = interpreter.interpreter_semantic if _semantic is None else _semantic
        return member(*args, _semantic=semantic, **kwargs)

    call.__wrapped_for_interpreter__ = True
    scope.set_attr(target, name, call)


def _patch_language_once() -> None:
    """Triton patches its whole language again at every call of a device function, which is a third of all the time."""
    interpreter._patch_attr = _patch_attr
    language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang(language)
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()  # nothing to put back after a launch


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside, torch.empty and its kin hold NaN, or the largest integer, instead of whatever the memory held."""
    algorithms, fill = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would otherwise refuse to run
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
