"""The interpreter of Gluon keeps the language's meaning and rules, and a GPU's layout of shared memory."""

from __future__ import annotations

import os

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("about the interpreter itself", allow_module_level=True)

from tests.device.gluon import KernelError, layouts
from tests.device.test_gluon import SWIZZLED, numbers


@gluon.jit
def _steps(x, first, ROUNDS: gl.constexpr):
    """A value and a count, from inside a loop."""
    count = 0
    for i in range(first, 100, 3):
        two: gl.constexpr = 2
        if i % two == 0:
            x += i
        elif ROUNDS is None:
            x -= 1
        count += 1
        if count == 7 and x > 0:
            return x, count
    return x, -1


@gluon.jit
def _language(out_ptr, first, x_ptr, ABSENT: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    value, count = _steps(10, first, ABSENT)
    gl.store(out_ptr, value)
    gl.store(out_ptr + 1, count if x_ptr is None else -count)
    row, column = gl.arange(0, 8, gl.SliceLayout(1, layout)), gl.arange(0, 16, gl.SliceLayout(0, layout))
    x = row[:, None] * 16 + column[None, :]
    left, right = x.reshape([8, 2, 8]).permute([0, 2, 1]).split()  # 8 columns apart
    both = gl.join(right, left).permute([0, 2, 1]).reshape([8, 16])
    gl.static_assert(both.type.layout != layout)
    at = gl.convert_layout(x, both.type.layout)
    gl.store(out_ptr + 2 + at, both)
    gl.store(out_ptr + 130 + row, gl.sum(x, 1))
    gl.store(out_ptr + 138 + column, gl.max(x, 0))
    gl.store(out_ptr + 154, gl.sum(gl.sum(x, 1), 0))


def test_the_language_means_what_it_says() -> None:
    out = torch.zeros(155, dtype=torch.int32)
    _language[(1,)](out, 4, None, None)
    value, count = 10, 0
    for i in range(4, 100, 3):
        value, count = value + i if i % 2 == 0 else value - 1, count + 1
        if count == 7 and value > 0:
            break
    x = torch.arange(128, dtype=torch.int32).view(8, 16)
    swapped = torch.cat([x[:, 8:], x[:, :8]], dim=1)
    expected = [torch.tensor([value, count]), swapped.flatten(), x.sum(1), x.amax(0), x.sum().view(1)]
    assert torch.equal(out, torch.cat(expected).int())


@gluon.jit
def _wrong(x_ptr, size, WHAT: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    other: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    i = gl.arange(0, 128, layout)
    x = gl.load(x_ptr + i)
    if WHAT == "overflow":
        gl.store(x_ptr + i * size, x)
    elif WHAT == "bfloat16":
        gl.store(x_ptr + i, x + x)
    elif WHAT == "layouts":
        gl.store(x_ptr + gl.arange(0, 128, other), x)
    elif WHAT == "conversion":
        gl.store(x_ptr + i, gl.convert_layout(gl.load(x_ptr + gl.arange(0, 128, other)), layout, assert_trivial=True))
    elif WHAT == "assembly":
        gl.inline_asm_elementwise("fence.proxy.async.global; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    elif WHAT == "index":
        gl.allocate_shared_memory(gl.float32, [2, 4], gl.SwizzledSharedLayout(1, 1, 1, [0])).index(size).load(other)
    elif WHAT == "uninitialised":
        gl.store(
            x_ptr + i, gl.allocate_shared_memory(x.dtype, [128], gl.SwizzledSharedLayout(1, 1, 1, [0])).load(layout)
        )


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("overflow", "int32 overflow detected for operation mul"),
        ("bfloat16", "bfloat16 must be cast"),
        ("layouts", "[Ll]ayout"),
        ("conversion", "is not trivial"),
        ("assembly", "fence.proxy.async.global"),
        ("index", "index 30000000 of shared memory"),
    ],
)
def test_what_is_wrong_is_refused(what: str, said: str) -> None:
    with pytest.raises((KernelError, TypeError, ValueError, NotImplementedError), match=said):
        _wrong[(1,)](numbers(128, dtype=torch.bfloat16), 30_000_000, what)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int32])
def test_shared_memory_holds_poison(dtype: torch.dtype) -> None:
    x = torch.zeros(128, dtype=dtype)
    _wrong[(1,)](x, 0, "uninitialised")
    assert x.isnan().all() if dtype.is_floating_point else (x == torch.iinfo(dtype).max).all()


def test_shared_memory_is_laid_out_as_on_a_gpu() -> None:
    """Swizzled by 128 bytes: the 16-byte chunks of a row change places by the row's number."""
    row, column = torch.arange(64)[:, None], torch.arange(64)[None, :]
    expected = 64 * row + ((column // 8) ^ (row % 8)) * 8 + column % 8
    assert torch.equal(torch.from_numpy(layouts.places(SWIZZLED, (64, 64)).copy()), expected)
    two = torch.from_numpy(layouts.places(SWIZZLED, (2, 64, 64)).copy())
    assert torch.equal(two, torch.stack([expected, 4096 + expected]))
    plain = layouts.places(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]), (8, 4))
    assert plain.flatten().tolist() == list(range(32))
