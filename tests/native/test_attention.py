"""cprune_native::causal_attention against float64, beside torch's own attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cprune_kernels
from cprune_kernels.attention import causal_attention_reference
from tests.kernels.test_attention import SHAPES, qkv

if cprune_kernels.backend() == "reference":
    pytest.skip("the native kernels were not built", allow_module_level=True)

ISA = "avx512_bf16"
if ISA not in torch.ops.cprune_native.isas().split():
    pytest.skip(f"the processor has no {ISA}", allow_module_level=True)

LARGE = [(1, 2, 1, 1100, 64, 64), (2, 2, 2, 97, 192, 128), (0, 2, 1, 5, 8, 8), (2, 2, 1, 0, 8, 8)]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    return torch.ops.cprune_native.causal_attention(q, k, v, q.shape[3] ** -0.5 if scale is None else scale, ISA)


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_errors_are_those_of_torch(shape: tuple[int, ...], spread: float) -> None:
    q, k, v = qkv(shape, torch.bfloat16)
    q = q * spread
    expected = causal_attention_reference(q.double(), k.double(), v.double())
    other = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    got = attend(q, k, v)
    assert got.shape == expected.shape and got.dtype == torch.bfloat16
    if got.numel():
        ours, theirs = ((x.double() - expected).square().mean().sqrt() for x in (got, other))
        assert float(ours) <= 2 * float(theirs)


def test_what_comes_later_changes_no_bit() -> None:
    q, k, v = qkv((1, 2, 1, 131, 24, 24), torch.bfloat16)
    before = attend(q, k, v)
    for token in (130, 60, 1):
        q[:, :, token:], k[:, :, token:], v[:, :, token:] = 3.0, -2.0, 5.0
        assert torch.equal(attend(q, k, v)[:, :token], before[:, :token])


def test_the_first_token_is_its_value() -> None:
    q, k, v = qkv(SHAPES[0], torch.bfloat16)
    assert torch.equal(attend(q, k, v)[:, 0], v[:, :, 0].repeat_interleave(2, dim=1))


def test_place_in_memory_changes_no_bit() -> None:
    q, k, v = qkv(SHAPES[3], torch.bfloat16)
    expected = attend(q, k, v)
    for x in (q, k, v):
        wide = torch.full([2 * size + 3 for size in x.shape], 77.0, dtype=x.dtype)
        view = wide[tuple(slice(1, 1 + size) for size in x.shape)]
        view.copy_(x)
        moved = [view if other is x else other for other in (q, k, v)]
        assert torch.equal(attend(*moved), expected)


def test_number_of_threads_changes_no_bit() -> None:
    inputs, before, results = qkv((1, 1, 1, 300, 40, 40), torch.bfloat16), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(attend(*inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_nan_stays_where_it_is_seen() -> None:
    q, k, v = qkv((1, 1, 1, 60, 16, 16), torch.bfloat16)
    k[:, :, 50] = float("nan")
    bad = attend(q, k, v).isnan().any(-1).flatten()
    assert not bool(bad[:50].any()) and bool(bad[50:].all())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda q, k, v: (q.float(), k.float(), v.float(), 1.0, ISA),
            "a type that avx512_bf16 attends in, got float32",
        ),
        (lambda q, k, v: (q, k, v, 1.0, "portable"), "a type that portable attends in, got bfloat16"),
        (lambda q, k, v: (q, k[:, :, 1:], v, 1.0, ISA), r"k must be \[2, 2, 131, 16\]"),
        (lambda q, k, v: (q[:, :3], k, v, 1.0, ISA), "a multiple of the heads of v, 2, got 3"),
        (lambda q, k, v: (q, k, v, 0.0, ISA), "scale must be above 0"),
    ],
)
def test_wrong_input_is_one_sentence(change, sentence: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RuntimeError, match=sentence):
        torch.ops.cprune_native.causal_attention(*change(*qkv(SHAPES[0], torch.bfloat16)))
