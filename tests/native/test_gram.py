"""cprune_native::gram against float64: float32 within windows of 1024 columns, float64 between them."""

from __future__ import annotations

import pytest
import torch

import cprune_kernels

if cprune_kernels.backend() == "reference":
    pytest.skip("the native kernels were not built", allow_module_level=True)

ISAS = torch.ops.cprune_native.isas().split()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WINDOW = 1024


def normal(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 0), (7, 131), (64, 1023), (67, 4100), (130, 300)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_products_are_those_of_float64(isa: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = normal(*shape, dtype=dtype)
    got = torch.ops.cprune_native.gram(x, isa)
    budget = (WINDOW + 2) * 2.0**-24 * (x.double().abs() @ x.double().abs().T)
    assert got.dtype == torch.float64 and torch.equal(got, got.T)
    assert bool(((got - x.double() @ x.double().T).abs() <= budget).all())


@pytest.mark.parametrize("isa", ISAS)
def test_a_long_chain_keeps_float64(isa: str) -> None:
    x = torch.ones(2, 2**25 + 3)  # one float32 sum would stop at 2^24
    assert torch.equal(torch.ops.cprune_native.gram(x, isa), torch.full((2, 2), 2.0**25 + 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_place_in_memory_changes_no_bit(isa: str, dtype: torch.dtype) -> None:
    x = normal(9, 3001, dtype=dtype)
    expected = torch.ops.cprune_native.gram(x, isa)
    wide = torch.full((18, 3010), 77.0).to(dtype)
    for view in (wide[::2, 3:3004], wide[:9, 1:3002], torch.empty(3001, 9, dtype=dtype).T):
        assert torch.equal(torch.ops.cprune_native.gram(view.copy_(x), isa), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_number_of_threads_changes_no_bit(isa: str) -> None:
    x, before, results = normal(9, 70001, dtype=torch.bfloat16), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.ops.cprune_native.gram(x, isa))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_operator_can_be_traced() -> None:
    torch.library.opcheck(torch.ops.cprune_native.gram.default, (normal(3, 40, dtype=torch.bfloat16),))


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    with pytest.raises(RuntimeError, match=r"x must be \[E, P\], got \[3\]"):
        torch.ops.cprune_native.gram(torch.zeros(3))
    with pytest.raises(RuntimeError, match="x must be bfloat16, float16 or float32"):
        torch.ops.cprune_native.gram(torch.zeros(3, 4, dtype=torch.float64))
