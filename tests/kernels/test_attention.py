"""causal_attention: torch's attention, or the native kernel where a processor has AVX-512-BF16 and no AMX."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cprune_kernels.attention
from cprune_kernels.attention import attends_natively, causal_attention, causal_attention_reference

SHAPES = [  # B, heads, shared, S, D, W
    (2, 4, 2, 131, 16, 16),
    (1, 6, 1, 300, 24, 40),
    (3, 2, 2, 1, 8, 8),
    (1, 3, 3, 49, 33, 7),
]


def qkv(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, shared, tokens, depth, width = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, depth), (shared, depth), (shared, width))
    return tuple(torch.randn(batch, tokens, *size, generator=generator).transpose(1, 2).to(dtype) for size in sizes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_softmax_over_what_came_before(shape: tuple[int, ...]) -> None:
    q, k, v = qkv(shape, torch.float64)
    got = causal_attention_reference(q, k, v)
    head, token = shape[1] - 1, shape[3] // 2
    of = head // (shape[1] // shape[2])
    weights = torch.stack([q[0, head, token] @ k[0, of, s] / shape[4] ** 0.5 for s in range(token + 1)]).softmax(0)
    torch.testing.assert_close(got[0, token, head], weights @ v[0, of, : token + 1])


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype, scale: float | None) -> None:
    q, k, v = qkv(shape, dtype)
    expected = causal_attention_reference(q.double(), k.double(), v.double(), scale)
    got = causal_attention(q, k, v, scale)
    # weights and output are rounded once each; a mean of values is at most their largest
    budget = (4 * torch.finfo(dtype).eps) * float(v.double().abs().max())
    assert got.dtype == dtype and got.shape == expected.shape
    assert float((got.double() - expected).abs().max()) <= budget


def test_gradients_and_other_types_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cprune_kernels.attention, "backend", lambda: "avx512_bf16")
    q, k, v = qkv(SHAPES[0], torch.bfloat16)
    assert attends_natively(q, k, v)
    assert not attends_natively(q.float(), k.float(), v.float())
    assert not attends_natively(q.requires_grad_(), k, v)
    with torch.no_grad():
        assert attends_natively(q, k, v)
    monkeypatch.setattr(cprune_kernels.attention, "backend", lambda: "amx_bf16")
    assert not attends_natively(q.detach(), k, v)
    causal_attention(q, k, v).float().sum().backward()
    assert q.grad is not None and bool(q.grad.isfinite().all())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda q, k, v: (q[0], k, v), r"q must be a floating \[B, heads, S, D\]"),
        (lambda q, k, v: (q.long(), k, v), "q must be a floating"),
        (lambda q, k, v: (q, k[:, :, 1:], v), r"k must be torch.bfloat16 \[2, a part of 4, 131, D\]"),
        (lambda q, k, v: (q, k, v.float()), r"v must be torch.bfloat16 .* got torch.float32"),
        (lambda q, k, v: (q[:, :3], k, v), "k must be torch.bfloat16 .2, a part of 3"),
        (lambda q, k, v: (q, k[:, :1], v), "k must have the heads of v, 2, and the D of q, 16"),
        (lambda q, k, v: (q, k[..., 1:], v), "k must have the heads of v, 2, and the D of q, 16"),
    ],
)
def test_wrong_shapes_are_one_sentence(change, sentence: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=sentence):
        causal_attention(*change(*qkv(SHAPES[0], torch.bfloat16)))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_none_is_one_sentence(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be above 0 and finite"):
        causal_attention(*qkv(SHAPES[0], torch.bfloat16), scale)
