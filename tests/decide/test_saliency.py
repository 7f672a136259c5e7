from __future__ import annotations

import math
import statistics
from typing import get_args

import pytest
import torch

from cprune.config import Method
from cprune.decide.saliency import (
    SALIENCIES,
    reconstruction,
    saliency,
    super_experts,
    variability,
    with_domain_floor,
)
from cprune.decide.selection import SELECTIONS
from cprune.stats import ExpertStats
from tests.synthetic import expert_stats, refuses

TOKENS, TOP_K, EXPERTS, HIDDEN = 131, 3, 7, 6


class Routed:
    """Tokens, their experts and gates, and what the experts gave; expert 4 is never routed to."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        alive = torch.tensor([0, 1, 2, 3, 5, 6])
        order = torch.rand(TOKENS, len(alive), generator=generator).argsort(dim=1)
        self.index = alive[order[:, :TOP_K]]
        self.gates = torch.rand(TOKENS, TOP_K, dtype=torch.float64, generator=generator)
        self.outputs = torch.randn(TOKENS, TOP_K, HIDDEN, dtype=torch.float64, generator=generator)
        self.stream = 1.0 + torch.rand(TOKENS, dtype=torch.float64, generator=generator)  # |h| after the layer
        self.turning = torch.rand(TOKENS, dtype=torch.float64, generator=generator)  # 1 - cos(before, after)

    def stats(self) -> ExpertStats:
        chosen = torch.nn.functional.one_hot(self.index, EXPERTS).double()  # [T, K, E]
        norms = self.outputs.norm(dim=-1)
        return expert_stats(
            EXPERTS,
            tokens=TOKENS,
            count=chosen.sum((0, 1)).long(),
            gate_sum=torch.einsum("tke,tk->e", chosen, self.gates),
            norm_sum=torch.einsum("tke,tk->e", chosen, norms),
            gated_norm_sum=torch.einsum("tke,tk->e", chosen, norms * self.gates),
            gated_sq_sum=torch.einsum("tke,tk->e", chosen, (norms * self.gates).square()),
            norm_sq_sum=torch.einsum("tke,tk->e", chosen, norms.square()),
            output_sum=torch.einsum("tke,tkh->eh", chosen, self.outputs),
            relative_sum=torch.einsum("tke,tk,t->e", chosen, norms * self.gates, 1 / self.stream),
            turning_sum=torch.einsum("tke,tk,t->e", chosen, norms * self.gates, self.turning),
            gated_gram=self.gated_gram(),
        )

    def gated_gram(self) -> torch.Tensor:
        """As if every token were in the sample."""
        dense = torch.zeros(TOKENS, EXPERTS, HIDDEN, dtype=torch.float64)
        dense[torch.arange(TOKENS).unsqueeze(1), self.index] = self.outputs * self.gates.unsqueeze(2)
        return torch.einsum("tih,tjh->ij", dense, dense)


def by_hand(method: str, routed: Routed) -> list[float]:
    """The definitions, a token and an expert at a time."""
    scores, seen, total, total_relative = [0.0] * EXPERTS, [0] * EXPERTS, 0.0, 0.0
    for token in range(TOKENS):
        for slot in range(TOP_K):
            expert, gate = int(routed.index[token, slot]), float(routed.gates[token, slot])
            norm = math.sqrt(sum(float(value) ** 2 for value in routed.outputs[token, slot]))
            gated = {"contribution": gate * norm, "reap": gate * norm, "frequency": 1.0, "gate": gate, "ean": norm}
            gated |= {
                "relative": gate * norm,
                "expected": gate * norm,
                "seer": gate,
                "ean-mean": norm,
                "man": norm,
                "msan": norm**2,
            }
            gated["easy-ep"] = gate * norm * float(routed.turning[token])
            total += gate * norm
            total_relative += gate * norm / float(routed.stream[token])
            scores[expert] += gated[method]
            seen[expert] += 1
    if method in ("relative", "expected"):
        relative = [score * total_relative / total for score in scores]
        extra = 0.2 * TOKENS * TOP_K / EXPERTS
        credit = [(n + extra) / n if n and method == "expected" else 1.0 for n in seen]
        return [score * factor for score, factor in zip(relative, credit, strict=True)]
    if method in ("reap", "ean-mean", "man", "msan"):
        return [score / count if count else 0.0 for score, count in zip(scores, seen, strict=True)]
    return scores


METHODS = [
    "expected",
    "relative",
    "contribution",
    "reap",
    "frequency",
    "gate",
    "seer",
    "ean",
    "ean-mean",
    "man",
    "msan",
    "easy-ep",
]


@pytest.mark.parametrize("method", METHODS)
def test_saliency_is_the_loop_over_tokens(method: str) -> None:
    routed = Routed()
    got = saliency(method, routed.stats(), 0)
    assert got.dtype == torch.float64 and got.tolist() == pytest.approx(by_hand(method, routed), rel=1e-12)
    assert got[4] == 0.0 and (got[[0, 1, 2, 3, 5, 6]] > 0).all()


def outputs_of(routed: Routed, expert: int) -> list[torch.Tensor]:
    """[H] float64 gated outputs of an expert, token by token."""
    found = (routed.index == expert).nonzero().tolist()
    return [routed.outputs[token, slot] for token, slot in found]


def test_mone_is_frequency_times_the_spread_of_outputs() -> None:
    routed = Routed(2)
    got = saliency("mone", routed.stats(), 0)
    for expert in range(EXPERTS):
        outputs = outputs_of(routed, expert)
        expected = 0.0
        if outputs:
            columns = [[float(x[h]) for x in outputs] for h in range(HIDDEN)]
            expected = len(outputs) * math.sqrt(sum(statistics.variance(column) for column in columns))
        assert float(got[expert]) == pytest.approx(expected, rel=1e-9)
    constant = expert_stats(
        1,
        count=torch.tensor([9]),
        norm_sq_sum=torch.tensor([9 * 14.0], dtype=torch.float64),
        output_sum=9 * torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64),
    )
    assert saliency("mone", constant, 0).tolist() == [0.0]


def test_variability_is_the_deviation_of_gated_norms() -> None:
    routed = Routed(3)
    got = variability(routed.stats(), 0)
    for expert in range(EXPERTS):
        found = (routed.index == expert).nonzero().tolist()
        norms = [float(routed.gates[t, k] * routed.outputs[t, k].norm()) for t, k in found]
        assert float(got[expert]) == pytest.approx(statistics.stdev(norms) if norms else 0.0, rel=1e-9)


def test_reconstruction_is_the_relative_error_of_leaving_one_out() -> None:
    routed = Routed(4)
    got = reconstruction(routed.stats(), 0)
    whole = (routed.outputs * routed.gates.unsqueeze(2)).sum(1)
    for expert in range(EXPERTS):
        kept = (routed.index != expert).double()
        without = (routed.outputs * (routed.gates * kept).unsqueeze(2)).sum(1)
        expected = float((whole - without).square().sum() / whole.square().sum())
        assert float(got[expert]) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_domain_floor_lifts_the_experts_of_a_rare_domain() -> None:
    by_domain = torch.tensor([[900.0, 50.0, 0.0], [0.0, 50.0, 0.0]], dtype=torch.float64)
    stats = expert_stats(
        3,
        tokens=1000,
        domain_tokens=torch.tensor([900, 100]),
        domain_gated_sum=by_domain,
        gated_norm_sum=by_domain.sum(0),
    )
    weights = torch.tensor([900.0, 100.0, 7.0], dtype=torch.float64)
    assert torch.equal(with_domain_floor(weights, stats, 0.0), weights)
    for floor in (0.1, 0.5, 1.0):
        expected = []
        for expert, weight in enumerate(weights.tolist()):
            mean = float(by_domain[:, expert].sum()) / 1000
            best = max(float(by_domain[d, expert]) / (900, 100)[d] for d in range(2))
            expected.append(max(weight, floor * weight * best / mean) if mean else weight)
        assert with_domain_floor(weights, stats, floor).tolist() == pytest.approx(expected, rel=1e-12)
    assert with_domain_floor(weights, stats, 1.0)[1] == pytest.approx(500.0)  # were all text of the second domain
    with refuses("domain_floor 0.5 must have calibration text"):
        with_domain_floor(weights, expert_stats(3, tokens=0), 0.5)


def test_every_method_that_can_be_asked_for_is_there_and_no_other() -> None:
    assert sorted({"cprune", "cprune-paper", *SALIENCIES, *SELECTIONS}) == sorted(get_args(Method))


def test_cprune_weighs_by_expected_contribution() -> None:
    stats = Routed(1).stats()
    assert torch.equal(saliency("cprune", stats, 0), saliency("expected", stats, 0))


def test_random_differs_by_seed_and_layer_only() -> None:
    stats = expert_stats(300, seed=1)
    draw = saliency("random", stats, 3)
    assert draw.shape == (300,) and draw.dtype == torch.float64 and 0 <= draw.min() and draw.max() < 1
    assert 0.4 < draw.mean() < 0.6 and draw.unique().numel() == 300
    assert torch.equal(draw, saliency("random", expert_stats(300, seed=2), 3))
    assert not torch.equal(draw, saliency("random", stats, 4))
    assert not torch.equal(draw, saliency("random", expert_stats(300, layer="model.layers.1.mlp"), 3))
    state = torch.get_rng_state()
    saliency("random", stats, 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_parameters_are_products_of_norms_over_the_layers_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(5, 30, dtype=torch.float64, generator=generator) for _ in range(3))
    rows = torch.randn(5, 6, dtype=torch.float64, generator=generator)
    grams = torch.stack([w @ w.T for w in (gate, up, down)])
    stats = expert_stats(5, tokens=0, weight_gram=grams, router_gram=rows @ rows.T)
    products = [
        math.prod(math.sqrt(sum(float(x) ** 2 for x in w[expert])) for w in (gate, up, down, rows))
        for expert in range(5)
    ]
    expected = [product / (sum(products) / 5) for product in products]
    assert saliency("cprune", stats, 0).tolist() == pytest.approx(expected, rel=1e-12)


def test_parameters_of_nothing_are_zero_and_finite() -> None:
    stats = expert_stats(3, tokens=0, weight_gram=torch.zeros(3, 3, 3, dtype=torch.float64))
    assert saliency("cprune", stats, 0).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("method", sorted(SALIENCIES))
def test_without_tokens_only_chance_works(method: str) -> None:
    stats = expert_stats(tokens=0)
    if method == "random":
        assert saliency(method, stats, 0).shape == (5,)
    else:
        with refuses(f"method {method} must have calibration text"):
            saliency(method, stats, 0)


def test_super_experts_stand_out_of_the_model_and_of_their_layer() -> None:
    values = {f"model.layers.{index}.mlp": torch.rand(64, dtype=torch.float64) + 1 for index in range(4)}
    names = list(values)
    values[names[0]][5] = 1000.0
    values[names[1]][7] = 150.0  # above a tenth of the largest
    values[names[2]][9] = 60.0  # below a tenth of the largest
    values[names[3]] *= 200  # a loud layer, in which none stands out
    stats = {name: expert_stats(64, layer=name, activation_absmax=value) for name, value in values.items()}
    found = super_experts(stats)
    assert found[names[3]] == () and found[names[2]] == ()
    bar = torch.cat(list(values.values())).quantile(0.995)
    assert found[names[0]] == (5,)
    assert found[names[1]] == ((7,) if 150 > bar else ())


def test_no_super_expert_among_equals() -> None:
    stats = {"a": expert_stats(16, activation_absmax=torch.ones(16, dtype=torch.float64))}
    assert super_experts(stats) == {"a": ()}
