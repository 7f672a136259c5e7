"""cprune_native::centred_grams on every instruction set of this processor, against float64."""

from __future__ import annotations

import pytest
import torch

import cprune_kernels

if cprune_kernels.backend() == "reference":
    pytest.skip("the native kernels were not built", allow_module_level=True)

ISAS = torch.ops.cprune_native.isas().split()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(1, 1, 1), (2, 131, 300), (3, 48, 64), (1, 300, 17), (2, 97, 1030), (2, 2, 5)]
UNIT = 2.0**-24
grams = torch.ops.cprune_native.centred_grams


def outputs(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Far from their mean being 0, and of another size for every expert."""
    y = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 3.0
    return (y * 10.0 ** torch.arange(-2, shape[0] - 2).view(-1, 1, 1)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_they_are_those_of_float64(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    y = outputs(*shape, dtype=dtype)
    got, samples, columns = grams(y, isa), shape[1], shape[2]
    assert got.dtype == torch.float32 and torch.equal(got, got.mT)
    apart = y.double() - y.double()[:, :1]
    centred = apart - apart.mean(1, keepdim=True)
    peak = centred.abs().amax((1, 2), keepdim=True)
    factor = torch.where(peak > 0, 2.0 ** -peak.log2().floor(), 1.0)
    centred, apart = centred * factor, (apart * factor).abs()
    exact = centred @ centred.mT
    # Of a number: two differences, and a mean by runs of 32; of a product: a chain of `columns`.
    unsure = UNIT * (2 * apart + (36 + samples / 32) * apart.mean(1, keepdim=True))
    once = unsure @ centred.abs().mT
    budget = once + once.mT + (columns + 2) * UNIT * (centred.abs() @ centred.abs().mT)
    assert bool(((got - exact).abs() <= 1.01 * budget).all())


@pytest.mark.parametrize("isa", ISAS)
def test_equal_rows_give_zero_and_large_ones_no_infinity(isa: str) -> None:
    y = outputs(4, 60, 40, dtype=torch.float32)
    y[1] = y[1, :1] * 1000 + 0.1
    y[2] *= 2.0**120
    y[3] *= 2.0**-130
    got = grams(y, isa)
    assert not got[1].any() and bool(got.isfinite().all())
    assert torch.equal(got[2], grams(y[2:3] * 2.0**-120, isa)[0])
    assert bool((got[3].diagonal() > 0).all())


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_a_number_stays_with_its_expert(isa: str) -> None:
    y = outputs(3, 50, 30, dtype=torch.bfloat16)
    y[1, 7, 3] = float("nan")
    got = grams(y, isa)
    assert bool(got[1].isnan().any())
    assert torch.equal(got[::2], grams(y[::2].contiguous(), isa))


def test_number_of_threads_and_strides_change_no_bit() -> None:
    y, before, results = outputs(7, 100, 96, dtype=torch.bfloat16), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(grams(y))
    finally:
        torch.set_num_threads(before)
    wide = torch.full((100, 7, 101), 77.0, dtype=y.dtype)
    wide[:, :, 3:99] = y.transpose(0, 1)
    results += [grams(wide[:, :, 3:99].transpose(0, 1)), grams(y.mT.contiguous().mT)]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0)], ids=str)
def test_nothing_gives_nothing(shape: tuple[int, int, int]) -> None:
    assert torch.equal(grams(torch.zeros(shape)), torch.zeros(shape[0], shape[1], shape[1]))


def test_operator_can_be_traced() -> None:
    torch.library.opcheck(grams.default, (outputs(3, 10, 20, dtype=torch.bfloat16),))


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    with pytest.raises(RuntimeError, match=r"y must be \[E, S, H\], got \[3\]"):
        grams(torch.zeros(3))
    with pytest.raises(RuntimeError, match="y must be bfloat16, float16 or float32"):
        grams(torch.zeros(3, 4, 5, dtype=torch.float64))
