"""Triton's sm_80 and sm_90a code on the executor, against torch: products, reductions, scans, sorts, atomics, loops."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, which an interpreting process cannot", allow_module_level=True)

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from cprune_kernels.launch import Launch
from cprune_kernels.picker import A100, H100, Arch
from tests.ptx.errors import AccessError
from tests.ptx.launching import execute

ARCHS = pytest.mark.parametrize("arch", [A100, H100], ids=lambda arch: arch.name)
NAN = float("nan")


@triton.jit
def product(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        inside = start + k < K
        x = tl.load(a + m[:, None] * K + start + k[None, :], mask=(m < M)[:, None] & inside[None, :], other=0.0)
        y = tl.load(b + (start + k)[:, None] * N + n[None, :], mask=(n < N)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    tl.store(c + m[:, None] * N + n[None, :], total.to(c.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def close(actual: torch.Tensor, expected: torch.Tensor, terms: int, eps: float = 0.0) -> bool:
    """float32 sums of `terms` products in any order, then one rounding to the output's type: 2^-8 of a value for
    bf16, 2^-11 for fp16. `eps` is the relative error of each product, where inputs are rounded first (TF32: 2^-10)."""
    out = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(actual.dtype, 0.0)
    budget = (terms * 2.0**-24 + eps + out) * expected.abs().max()
    return bool(((actual.double() - expected.double()).abs() <= budget).all())


@ARCHS
@pytest.mark.parametrize(
    "dtype, precision", [("bfloat16", "ieee"), ("float16", "ieee"), ("float32", "tf32"), ("float32", "ieee")]
)
def test_product_by_pointers(arch: Arch, dtype: str, precision: str) -> None:
    torch.manual_seed(0)
    m, n, k = 100, 80, 112
    a, b = (torch.randn(shape).to(getattr(torch, dtype)) for shape in ((m, k), (k, n)))
    c = torch.full((m, n), NAN, dtype=a.dtype)
    constants = {"BM": 64, "BN": 64, "BK": 32, "PRECISION": precision}
    launch = Launch(product, (2, 2), {"a": a, "b": b, "c": c, "M": m, "N": n, "K": k}, constants, 4, 3)
    stats = execute(launch, arch)
    assert close(c, a.double() @ b.double(), k, 2.0**-10 if precision == "tf32" else 0.0)
    assert stats.distinct_read[:2] == (a.nbytes, b.nbytes) and stats.distinct_written[2] == c.nbytes
    assert (stats.count("wgmma.mma") if arch is H100 else stats.count("mma.sync")) or precision == "ieee" and k
    short = Launch(product, (2, 2), {**launch.args, "b": b[:-1]}, constants, 4, 3)
    with pytest.raises(AccessError):
        execute(short, arch)


@triton.jit
def described_product(
    a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, WS: tl.constexpr
):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    total = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK, warp_specialize=WS):
        y = b.load([n, k]).T if ROWS else b.load([k, n])
        total = tl.dot(a.load([m, k]), y, total)
    c.store([m, n], total.to(c.dtype))


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize(
    "dtype, tile, warps",
    [
        (torch.bfloat16, (128, 128, 64), 8),
        (torch.bfloat16, (64, 32, 32), 4),
        (torch.float16, (64, 64, 16), 4),
        (torch.float32, (128, 64, 32), 8),
    ],
)
def test_product_by_descriptors(dtype: torch.dtype, rows: bool, tile: tuple[int, int, int], warps: int) -> None:
    """TMA loads and stores, wgmma with operands along and across K, swizzles of 128, 64 and 32 bytes."""
    torch.manual_seed(1)
    bm, bn, bk = tile
    m, n, k = bm + 24, bn + 8, 2 * bk + 8
    a, b = torch.randn(m, k).to(dtype), torch.randn((n, k) if rows else (k, n)).to(dtype)
    c = torch.full((m, n), NAN, dtype=dtype)
    args = {
        "a": TensorDescriptor.from_tensor(a, [bm, bk]),
        "b": TensorDescriptor.from_tensor(b, [bn, bk] if rows else [bk, bn]),
        "c": TensorDescriptor.from_tensor(c, [bm, bn]),
        "K": k,
    }
    stats = execute(
        Launch(described_product, (2, 2), args, dict(BM=bm, BN=bn, BK=bk, ROWS=rows, WS=False), warps, 3), H100
    )
    expected = a.double() @ (b.double().T if rows else b.double())
    assert close(c, expected, k, 2.0**-9 if dtype == torch.float32 else 0.0)
    assert stats.count("wgmma.mma_async") and stats.count("cp.async.bulk.tensor") > 0
    assert stats.distinct_written[2] == c.nbytes


def test_specialised_warps() -> None:
    torch.manual_seed(2)
    a, b = torch.randn(64, 320).bfloat16(), torch.randn(128, 320).bfloat16()
    c = torch.full((64, 128), NAN, dtype=torch.bfloat16)
    args = {
        "a": TensorDescriptor.from_tensor(a, [64, 64]),
        "b": TensorDescriptor.from_tensor(b, [128, 64]),
        "c": TensorDescriptor.from_tensor(c, [64, 128]),
        "K": 320,
    }
    launch = Launch(described_product, (1,), args, {"BM": 64, "BN": 128, "BK": 64, "ROWS": True, "WS": True}, 4, 3)
    stats = execute(launch, H100)
    assert stats.count("setmaxnreg") and close(c, a.double() @ b.double().T, 320)


@triton.jit
def register_operand(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        x = (a.load([0, k]).to(tl.float32) * 2).to(tl.bfloat16)
        total = tl.dot(x, b.load([0, k]).T, total)
    tl.store(c + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :], total)


def test_an_operand_from_registers() -> None:
    torch.manual_seed(3)
    a, b, c = torch.randn(128, 192).bfloat16(), torch.randn(64, 192).bfloat16(), torch.full((128, 64), NAN)
    args = {"a": TensorDescriptor.from_tensor(a, [128, 64]), "b": TensorDescriptor.from_tensor(b, [64, 64]), "c": c}
    execute(Launch(register_operand, (1,), {**args, "K": 192}, {"BM": 128, "BN": 64, "BK": 64}, 8, 3), H100)
    assert close(c, 2 * a.double() @ b.double().T, 192)


@triton.jit
def orders(x, sums, arg, ordered, top, n, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i, mask=i < n, other=-1e9)
    tl.store(sums + i, tl.cumsum(v, 0), mask=i < n)
    tl.store(sums + N + i, tl.cumsum(v, 0, reverse=True))
    tl.store(arg, tl.argmax(v, 0))
    tl.store(arg + 1, tl.argmin(v, 0))
    tl.store(ordered + i, tl.sort(v, descending=True))
    grid = tl.reshape(v, (N // 8, 8))
    tl.store(top + tl.arange(0, N // 8), tl.max(grid, 1))


@ARCHS
@pytest.mark.parametrize("warps", [1, 4])
def test_reductions_scans_and_sorts(arch: Arch, warps: int) -> None:
    n, size = 100, 128
    x = torch.randperm(n, generator=torch.Generator().manual_seed(0)).float() - 70
    x[[50, 80]] = 400.0  # the lowest index wins
    sums, ordered, top = torch.full((2 * size,), NAN), torch.full((size,), NAN), torch.full((size // 8,), NAN)
    arg = torch.full((2,), -1, dtype=torch.int32)
    args = {"x": x, "sums": sums, "arg": arg, "ordered": ordered, "top": top, "n": n}
    execute(Launch(orders, (1,), args, {"N": size}, warps), arch)
    padded = torch.cat([x, torch.full((size - n,), -1e9)])
    assert torch.equal(sums[:n], x.cumsum(0))
    assert arg.tolist() == [50, 100]
    assert torch.equal(ordered, padded.sort(descending=True).values)
    assert torch.equal(top, padded.view(-1, 8).amax(1))
    assert torch.allclose(sums[size:].double(), padded.double().flip(0).cumsum(0).flip(0), rtol=size * 2.0**-24)


@triton.jit
def _combine(a, x, b, y):
    return a * b, x * b + y


@triton.jit
def counting(keys, values, bins, slots, recurrence, total, n, N: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    key = tl.load(keys + i, mask=i < n, other=0)
    v = tl.load(values + i, mask=i < n, other=0.0)
    tl.atomic_add(bins + tl.arange(0, B), tl.histogram(key, B, mask=i < n))
    tl.store(slots + i, tl.atomic_add(bins + B + key, 1, mask=i < n), mask=i < n)
    tl.atomic_max(bins + 2 * B + key, i, mask=i < n)
    tl.atomic_add(total, tl.sum(v))
    _, r = tl.associative_scan((tl.full((N,), 0.5, tl.float32), v), 0, _combine)
    tl.store(recurrence + i, r, mask=i < n)


@ARCHS
def test_histograms_atomics_and_scans(arch: Arch) -> None:
    generator = torch.Generator().manual_seed(0)
    n, size, bins = 300, 128, 32
    keys = torch.randint(0, bins, (n,), generator=generator, dtype=torch.int32)
    values = torch.randint(-8, 8, (n,), generator=generator).float()
    counts, slots = torch.zeros(3, bins, dtype=torch.int32), torch.full((n,), -1, dtype=torch.int32)
    recurrence, total = torch.full((n,), NAN), torch.zeros(1)
    args = {"keys": keys, "values": values, "bins": counts, "slots": slots, "recurrence": recurrence, "total": total}
    execute(Launch(counting, (3,), {**args, "n": n}, {"N": size, "B": bins}), arch)
    expected = torch.bincount(keys.long(), minlength=bins)
    assert torch.equal(counts[0].long(), expected) and torch.equal(counts[1].long(), expected)
    assert total.item() == values.sum()
    for bin in range(bins):
        where = (keys == bin).nonzero().reshape(-1)
        assert sorted(slots[where].tolist()) == list(range(len(where)))
        assert counts[2, bin] == (where.max() if len(where) else 0)
    state = 0.0
    for i in range(n):
        state = 0.5 * (state if i % size else 0.0) + float(values[i])
        assert abs(recurrence[i].item() - state) <= 8 * 2.0**-22  # values below 16, a few roundings of them


@triton.jit
def ragged(starts, x, y, lengths, N: tl.constexpr):
    """A loop and branches whose conditions are data; 16-bit arithmetic, division, random numbers."""
    row = tl.program_id(0)
    first, last = tl.load(starts + row), tl.load(starts + row + 1)
    total = tl.zeros((N,), tl.float32)
    for i in range(first, last):
        v = tl.load(x + i * N + tl.arange(0, N)).to(tl.float32)
        if i % 2 == 0:
            total += tl.where(v > 0, tl.exp(v), tl.sqrt(-v))
        else:
            total += v / 3
    steps = last - first
    while steps > 3:
        steps = steps // 2
        total = total * 0.5
    tl.store(y + row * N + tl.arange(0, N), total)
    tl.store(lengths + row, steps)


@ARCHS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_loops_over_ragged_rows(arch: Arch, dtype: torch.dtype) -> None:
    starts = torch.tensor([0, 0, 1, 9, 12, 12], dtype=torch.int32)
    x = torch.randn(12, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    y, lengths = torch.full((5, 64), NAN), torch.full((5,), -1, dtype=torch.int32)
    execute(Launch(ragged, (5,), {"starts": starts, "x": x, "y": y, "lengths": lengths}, {"N": 64}, 2), arch)
    v = x.double()
    even = torch.where(v > 0, v.exp(), (-v).clamp(min=0).sqrt())
    terms = torch.where(torch.arange(12)[:, None] % 2 == 0, even, v / 3)
    for row in range(5):
        expected, steps = terms[starts[row] : starts[row + 1]].sum(0), int(starts[row + 1] - starts[row])
        while steps > 3:
            steps, expected = steps // 2, expected * 0.5
        assert lengths[row] == steps and close(y[row], expected, 32)
