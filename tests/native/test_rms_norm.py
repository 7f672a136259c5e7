"""cprune_native::rms_norm on every instruction set of this processor, against float64."""

from __future__ import annotations

import pytest
import torch

import cprune_kernels
from tests.kernels.test_rms_norm import SHAPES, drawn

if cprune_kernels.backend() == "reference":
    pytest.skip("the native kernels were not built", allow_module_level=True)

ISAS = torch.ops.cprune_native.isas().split()
norm = torch.ops.cprune_native.rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_rounds_where_models_do(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = drawn(shape, dtype)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    got = norm(x, weight, 1e-6, isa)
    assert got.shape == x.shape and got.dtype == dtype
    # a sum of N squares in float32, a root and two products; then what is between the product and its rounding
    slack = (shape[-1] + 8) * 2.0**-24
    unit = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    rounded = exact.to(dtype).double() if unit else exact
    bound = exact.abs() * (2 * unit + slack) * weight.double().abs() * (1 + unit) + torch.finfo(dtype).smallest_normal
    assert bool(((got.double() - exact * weight.double()).abs() <= bound + (rounded * weight).abs() * unit).all())
    if unit and got.numel():  # but for sums that lie next to the middle of two numbers
        assert float((got == (rounded * weight.double()).to(dtype)).double().mean()) >= 0.98


@pytest.mark.parametrize("isa", ISAS)
def test_rows_do_not_know_one_another(isa: str) -> None:
    x, weight = drawn((300, 131), torch.bfloat16)
    whole = norm(x, weight, 1e-5, isa)
    x[5] = float("nan")
    again = norm(x, weight, 1e-5, isa)
    assert bool(again[5].isnan().all())
    assert torch.equal(torch.cat([again[:5], again[6:]]), torch.cat([whole[:5], whole[6:]]))


def test_number_of_threads_and_strides_change_no_bit() -> None:
    x, weight = drawn((700, 96), torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(norm(x, weight, 1e-6))
    finally:
        torch.set_num_threads(before)
    wide = torch.zeros(700, 200, dtype=x.dtype)
    wide[:, 3:99] = x
    results += [norm(wide[:, 3:99], weight, 1e-6), norm(x, torch.stack([weight, weight], 1)[:, 0], 1e-6)]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x, w: (x, w[1:], 0.0), r"weight must be \[16\], got \[15\]"),
        (lambda x, w: (x, w.float(), 0.0), "weight must be bfloat16, got float32"),
        (lambda x, w: (x.double(), w, 0.0), "x must be bfloat16, float16 or float32"),
        (lambda x, w: (x, w, -1.0), "epsilon must be at least 0"),
    ],
)
def test_wrong_input_is_one_sentence(change, sentence: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RuntimeError, match=sentence):
        norm(*change(*drawn((3, 16), torch.bfloat16)))
