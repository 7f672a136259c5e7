"""Pairwise inner products, cosines and CKA against brute force in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cprune_kernels.pairwise import cosine_from_gram, pairwise_cka, pairwise_gram

EPS32 = torch.finfo(torch.float32).eps
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gram_brute(x: torch.Tensor) -> np.ndarray:
    rows = x.double().numpy()
    return np.array([[np.dot(a, b) for b in rows] for a in rows])


def cka_brute(y: torch.Tensor) -> np.ndarray:
    """The definition, through H x H cross covariances."""
    experts = [e - e.mean(0) for e in y.double().numpy()]
    out = np.eye(len(experts))
    for i, a in enumerate(experts):
        for j, b in enumerate(experts):
            scale = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
            if i != j:
                out[i, j] = np.linalg.norm(a.T @ b) ** 2 / scale if scale > 0 else 0.0
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_experts", "length"), [(2, 300), (3, 100_000), (131, 300), (131, 4097)])
def test_gram_is_the_inner_product(dtype: torch.dtype, num_experts: int, length: int) -> None:
    x = random(num_experts, length, dtype=dtype)
    gram = pairwise_gram(x)
    brute = gram_brute(x)
    norm = np.sqrt(np.diag(brute))
    assert gram.dtype == torch.float64
    assert torch.equal(gram, gram.T)
    assert np.abs((gram.numpy() - brute) / np.outer(norm, norm)).max() <= min(length, 32768) ** 0.5 * EPS32


@pytest.mark.parametrize("chain", [1, 7, 299, 300, 1000])
def test_any_window_gives_the_same_gram(chain: int) -> None:
    x = torch.randint(-8, 9, (3, 300), generator=torch.Generator().manual_seed(1)).float()
    np.testing.assert_array_equal(pairwise_gram(x, chain=chain).numpy(), gram_brute(x))


def test_windows_are_added_in_float64() -> None:
    x = torch.ones(2, 8)
    x[:, 0] = 2.0**13  # 2^26 + 7 has no float32
    assert pairwise_gram(x, chain=1).tolist() == [[2.0**26 + 7] * 2] * 2


def test_float16_squares_do_not_overflow() -> None:
    x = torch.full((2, 300), 32768.0, dtype=torch.float16)
    assert pairwise_gram(x).tolist() == [[300 * 2.0**30] * 2] * 2


def test_float64_keeps_its_digits() -> None:
    x = random(3, 300).double() + 1e-9
    np.testing.assert_allclose(pairwise_gram(x, chain=64).numpy(), gram_brute(x), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_input_gives_the_gram_of_its_copy(dtype: torch.dtype) -> None:
    wide = random(300, 3 * 131, seed=2, dtype=dtype)
    for view in (wide[::2, 5:], wide.T[1::3], wide.view(300, 131, 3)[:131, :, 1]):
        assert not view.is_contiguous()
        torch.testing.assert_close(pairwise_gram(view, chain=50), pairwise_gram(view.contiguous(), chain=50))


def test_zero_expert_and_empty_rows() -> None:
    x = random(3, 300)
    x[1] = 0
    assert pairwise_gram(x)[1].tolist() == [0.0, 0.0, 0.0]
    assert pairwise_gram(torch.zeros(2, 0)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("x", [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)])
def test_gram_refuses_other_shapes_and_types(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be a floating \[E, P\]"):
        pairwise_gram(x)
    with pytest.raises(ValueError, match="chain must be at least 1, got 0"):
        pairwise_gram(torch.zeros(2, 3), chain=0)


@pytest.mark.parametrize("num_experts", [2, 3, 131])
def test_cosine_is_the_angle(num_experts: int) -> None:
    x = random(num_experts, 300, seed=3).double()
    x[1] = -2 * x[0]
    cosine = cosine_from_gram(pairwise_gram(x))
    unit = x / x.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(cosine.numpy(), (unit @ unit.T).numpy(), atol=1e-12)
    assert torch.equal(cosine, cosine.T)
    assert (cosine.diagonal() == 1.0).all()
    assert cosine.min() >= -1.0
    assert cosine.max() <= 1.0


def test_cosine_of_zero_rows_is_zero_and_leading_axes_are_kept() -> None:
    x = random(131, 300, seed=4)
    x[[5, 130]] = 0
    gram = torch.stack([pairwise_gram(x), pairwise_gram(torch.zeros_like(x)), pairwise_gram(x * 1e-12)])
    cosine = cosine_from_gram(gram)
    assert cosine.shape == (3, 131, 131)
    assert cosine.isfinite().all()
    assert cosine[0, 5].nonzero().flatten().tolist() == [5]
    assert torch.equal(cosine[1], torch.eye(131, dtype=torch.float64))
    torch.testing.assert_close(cosine[2], cosine[0], atol=1e-6, rtol=0)


def test_cosine_of_integer_counts() -> None:
    counts = torch.tensor([[4, 2, 0], [2, 9, 0], [0, 0, 0]])
    assert cosine_from_gram(counts).tolist() == [[1.0, 2 / 6, 0.0], [2 / 6, 1.0, 0.0], [0.0, 0.0, 1.0]]


def test_cosine_is_clipped_and_leaves_its_input_alone() -> None:
    gram = torch.tensor([[1.0, 1.5], [1.5, 1.0]], dtype=torch.float64)
    assert cosine_from_gram(gram).tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert gram.tolist() == [[1.0, 1.5], [1.5, 1.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_experts", "samples", "hidden"), [(2, 300, 17), (3, 17, 300), (17, 131, 24)])
def test_cka_is_its_definition(dtype: torch.dtype, num_experts: int, samples: int, hidden: int) -> None:
    y = (random(num_experts, samples, hidden, seed=5) + 3.0).to(dtype)
    y[1] = y[0] * 2 + (random(samples, hidden, seed=6) * 0.5).to(dtype)
    cka = pairwise_cka(y)
    assert cka.dtype == torch.float64
    assert torch.equal(cka, cka.T)
    assert (cka.diagonal() == 1.0).all()
    np.testing.assert_allclose(cka.numpy(), cka_brute(y), atol=samples * EPS32)


def test_cka_ignores_rotation_scale_and_shift() -> None:
    y = random(131, 40, seed=7)
    rotation = torch.linalg.qr(random(40, 40, seed=8))[0]
    cka = pairwise_cka(torch.stack([y, 1e6 * (y @ rotation) + 1e6, 1e-20 * y]))
    np.testing.assert_allclose(cka.numpy(), 1.0, atol=1e-4)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_cka_of_constant_outputs_is_zero(dtype: torch.dtype) -> None:
    y = random(4, 131, 24, seed=9).to(dtype)
    y[1] = 0
    y[2] = random(24, seed=10).to(dtype) * 1000 + 0.1
    cka = pairwise_cka(y)
    for dead in (1, 2):
        assert cka[dead].nonzero().flatten().tolist() == [dead]
    assert cka[0, 3] > 0


def test_cka_reads_strided_input_and_refuses_others() -> None:
    y = random(131, 3, 24, seed=11).transpose(0, 1)
    torch.testing.assert_close(pairwise_cka(y), pairwise_cka(y.contiguous()))
    with pytest.raises(ValueError, match=r"must be a floating \[E, S, H\]"):
        pairwise_cka(torch.zeros(3, 4))
