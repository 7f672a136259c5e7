"""rms_norm: the native kernel on a CPU, torch where gradients are wanted or it was not built."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cprune_kernels.rms_norm
from cprune_kernels.rms_norm import norms_natively, rms_norm, rms_norm_reference

SHAPES = [(3, 64), (131, 300), (2, 5, 4, 17), (1, 1), (0, 8), (40, 1024), (5, 8192)]


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = 10.0 ** torch.randint(-4, 3, (*shape[:-1], 1), generator=generator)
    x = torch.randn(shape, generator=generator) * sizes
    return x.to(dtype), torch.randn(shape[-1], generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = drawn(shape, dtype)
    expected, got = rms_norm_reference(x, weight, 1e-5), rms_norm(x, weight, 1e-5)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).smallest_normal)


def test_gradients_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cprune_kernels.rms_norm, "backend", lambda: "avx2")
    x, weight = drawn((3, 8), torch.float32)
    assert norms_natively(x, weight) and not norms_natively(x.double(), weight.double())
    for leaf in (x, weight):
        assert not norms_natively(*(y.detach().requires_grad_(y is leaf) for y in (x, weight)))
    x.requires_grad_()
    with torch.no_grad():
        assert norms_natively(x, weight)
    rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
    monkeypatch.setattr(cprune_kernels.rms_norm, "backend", lambda: "reference")
    assert not norms_natively(x.detach(), weight)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x, w: (x, w[1:], 1e-6), r"x must be floating \[..., N\] and weight \[N\]"),
        (lambda x, w: (x, w.bfloat16(), 1e-6), "of the same type, got torch.float32"),
        (lambda x, w: (x.long(), w.long(), 1e-6), "x must be floating"),
        (lambda x, w: (x, w, -1.0), "epsilon must be at least 0 and finite, got -1.0"),
        (lambda x, w: (x, w, float("nan")), "epsilon must be at least 0"),
    ],
)
def test_wrong_input_is_one_sentence(change, sentence: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=sentence):
        rms_norm(*change(*drawn((3, 16), torch.float32)))
