"""Each repair of the interpreter, seen from a kernel; without the repair the test fails."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

interpreter_only = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="about the interpreter itself")
BF16 = torch.bfloat16


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + n[None, :] * K + k[:, None])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(a, b, input_precision="ieee"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_dot_sums_products_of_the_numbers(device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 64, generator=generator).to(device, dtype) for rows in (32, 16))
    out = torch.empty(32, 16, device=device)
    _dot[(1,)](a, b, out, 32, 16, 64)
    # 64 terms of size 1 in float32: one rounding of 2^-24 each, in any order
    torch.testing.assert_close(out.double(), a.double() @ b.double().T, rtol=0, atol=64 * 64 * 2**-24)


@triton.jit
def _narrow(x_ptr, out_ptr, N: tl.constexpr, EXPLICIT: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    if EXPLICIT:
        x = x.to(tl.bfloat16)
    tl.store(out_ptr + i, x)


@pytest.mark.parametrize("explicit", [True, False])
def test_a_cast_to_bf16_rounds_to_nearest_even(device: str, explicit: bool) -> None:
    ties = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 2**-126 * (1 + 2**-8)]  # halfway: down, up, down, down
    special = [0.0, -0.0, 3.4e38, float("inf"), float("-inf"), 2**-133, 2**-149, 1 + 2**-8 + 2**-20]
    x = torch.cat([torch.tensor(ties + special), torch.randn(244, generator=torch.Generator().manual_seed(1))]).to(
        device
    )
    out = torch.empty(256, device=device, dtype=BF16)
    _narrow[(1,)](x, out, 256, explicit)
    assert torch.equal(out.view(torch.int16), x.bfloat16().view(torch.int16))
    assert out[:2].tolist() == [1.0, 1 + 2**-6]


def test_a_cast_to_bf16_keeps_nan(device: str) -> None:
    out = torch.empty(16, device=device, dtype=BF16)
    x = torch.full((16,), 0x7F800001, dtype=torch.int32, device=device).view(torch.float32)  # truncated it is infinite
    _narrow[(1,)](x, out, 16, True)
    assert out.isnan().all()


@triton.jit
def _widen(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.float32))


def test_every_bf16_number_is_read_as_it_is(device: str) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device).view(BF16)
    out = torch.empty(2**16, device=device)
    _widen[(1,)](x, out, 2**16)
    assert torch.equal(out.nan_to_num(7.0), x.float().nan_to_num(7.0))


@triton.jit
def _masked(x_ptr, out_ptr, count, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < count))


@interpreter_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64])
def test_lanes_that_a_load_masks_off_hold_poison(dtype: torch.dtype) -> None:
    out = torch.zeros(8, dtype=dtype)
    _masked[(1,)](torch.ones(8, dtype=dtype), out, 5, 8)
    assert (out[:5] == 1).all()
    assert out[5:].isnan().all() if dtype.is_floating_point else (out[5:] == torch.iinfo(dtype).max).all()


@triton.jit
def _masked_other(x_ptr, out_ptr, count, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < count, other=2.0))


def test_lanes_that_a_load_fills_hold_the_fill(device: str) -> None:
    out = torch.empty(8, dtype=BF16, device=device)
    _masked_other[(1,)](torch.ones(8, dtype=BF16, device=device), out, 5, 8)
    assert out.tolist() == [1.0] * 5 + [2.0] * 3


@triton.jit
def _arithmetic(x_ptr, out_ptr, counts_ptr, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    if OP == "add":
        x = x + x
    elif OP == "negative":
        x = -x
    elif OP == "compare":
        x = tl.where(x > x, x, x)
    elif OP == "fma":
        x = tl.fma(x, x, x)
    elif OP == "exp":
        x = tl.exp(x)
    elif OP == "sum":
        x = tl.sum(x, 0)
    elif OP == "atomic":
        tl.atomic_add(out_ptr + i, x)
    elif OP == "from int":
        x = tl.load(counts_ptr + i).to(tl.bfloat16)
    tl.store(out_ptr + i, x)


@interpreter_only
@pytest.mark.parametrize("op", ["add", "negative", "compare", "fma", "exp", "sum", "atomic", "from int"])
def test_arithmetic_on_bf16_is_refused(op: str) -> None:
    x, counts = torch.ones(16, dtype=BF16), torch.ones(16, dtype=torch.int32)
    with pytest.raises(InterpreterError, match="bfloat16|bf16"):  # of exp, triton itself refuses the argument
        _arithmetic[(1,)](x, torch.empty_like(x), counts, op, 16)


@triton.jit
def _promoted(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, tl.maximum(x, -2.0))
    tl.store(out_ptr + N + i, tl.where(i > 3, x, 0.5))
    tl.store(out_ptr + 2 * N + i, tl.cumsum(x, 0))
    tl.store(out_ptr + 3 * N + i, tl.max(x, 0))


def test_operations_that_triton_itself_does_in_float32_are_right(device: str) -> None:
    x = -torch.arange(1, 9, device=device).to(BF16)
    out = torch.empty(4, 8, device=device, dtype=BF16)
    _promoted[(1,)](x, out, 8)
    half = torch.where(torch.arange(8, device=device) > 3, x, 0.5)
    assert torch.equal(out, torch.stack([x.clamp(min=-2), half, x.cumsum(0), x.max().expand(8)]))


@triton.jit
def _offset(row_ptr, out_ptr, stride, WIDE: tl.constexpr):
    row = tl.load(row_ptr)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(out_ptr, row * stride)


@interpreter_only
def test_overflow_of_a_32_bit_offset_is_seen() -> None:
    row, out = torch.tensor([300], dtype=torch.int32), torch.empty(1, dtype=torch.int64)
    _offset[(1,)](row, out, 10_000_000, True)
    assert out.item() == 3_000_000_000
    with pytest.raises(InterpreterError, match="overflow"):
        _offset[(1,)](row, out, 10_000_000, False)


def test_empty_tensors_hold_poison(device: str) -> None:
    assert torch.empty(100, device=device, dtype=BF16).isnan().all()
    assert torch.ones(3, device=device).new_empty(100).isnan().all()
    assert (torch.empty(100, device=device, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
