from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cprune.act.align import Expert, average, match_units

UNITS, HIDDEN, TOKENS = 5, 7, 30


def draw(seed: int, *, biased: bool = False, units: int = UNITS) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(units, HIDDEN), (units, HIDDEN), (HIDDEN, units)] + [(units,), (units,), (HIDDEN,)] * biased
    return Expert(*(torch.randn(shape, generator=generator) for shape in shapes))


def activation(expert: Expert, x: Tensor) -> Tensor:
    return F.silu(F.linear(x, expert.gate, expert.gate_bias)) * F.linear(x, expert.up, expert.up_bias)


def shuffle(seed: int, units: int) -> Tensor:
    return torch.randperm(units, generator=torch.Generator().manual_seed(seed))


X = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("biased", [False, True])
def test_a_permuted_expert_computes_the_same(biased: bool) -> None:
    expert = draw(0, biased=biased)
    other = expert.permuted(shuffle(1, UNITS))
    one, two = (Expert(*(part if part is None else part.double() for part in e.parts())) for e in (expert, other))
    want, got = (F.linear(activation(e, X.double()), e.down) for e in (one, two))
    assert not torch.equal(expert.gate, other.gate)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)  # sums of float64 in another order


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.0, 2.0, 0.3), (1e6, 1e-6, 0.0)])
def test_shuffled_copies_average_to_the_expert_itself(weights: tuple[float, ...], biased: bool) -> None:
    first = draw(0, biased=biased, units=41)
    experts = [first, first.permuted(shuffle(1, 41)), first.permuted(shuffle(2, 41))]
    got = average(experts, [activation(expert, X) for expert in experts], weights)
    for one, other in zip(got.parts(), first.parts(), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("seed", range(5))
def test_the_matching_is_the_best_of_all_permutations(seed: int) -> None:
    one, other = draw(seed), draw(seed + 50)
    acts, others = activation(one, X), activation(other, X)

    def cosine(a: Tensor, b: Tensor) -> float:
        return float((a.double() @ b.double()) / (a.double().norm() * b.double().norm()))

    kinds = [(one.gate, other.gate), (one.up, other.up), (one.down.T, other.down.T)]
    norms = [(torch.cat(kind).double().square().sum()) ** 0.5 for kind in kinds]
    made = [torch.cat([kind[side].double() / n for kind, n in zip(kinds, norms, strict=True)], 1) for side in (0, 1)]
    value = [[cosine(acts[:, u], others[:, v]) + cosine(made[0][u], made[1][v]) for v in range(5)] for u in range(5)]
    best = max(itertools.permutations(range(5)), key=lambda order: sum(value[u][v] for u, v in enumerate(order)))
    assert match_units(one, other, acts, others).tolist() == list(best)


def test_the_average_is_weighted_after_alignment() -> None:
    first = draw(0)
    order = shuffle(3, UNITS)
    noisy = Expert(*(part + 0.01 for part in first.parts() if part is not None))
    experts = [first, noisy.permuted(order)]
    got = average(experts, [activation(expert, X) for expert in experts], [1.0, 3.0])
    for one, other in zip(got.parts()[:3], first.parts()[:3], strict=True):
        torch.testing.assert_close(one, other + 0.0075, rtol=0, atol=4 * 2.0**-23)  # a sum, a difference, a product
