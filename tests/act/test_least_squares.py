from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cprune import hf
from cprune.act.least_squares import RIDGES, Activations, Judge, Recorder, fit_down, judges


class Experts(torch.nn.Module):
    """Three experts of transformers' contract, gelu instead of a gated unit's product."""

    has_gate, has_bias, is_concatenated = True, False, True

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.is_transposed, self.num_experts = transposed, 3
        up, down = (torch.randn(3, *size, generator=generator) / 3 for size in ((14, 10), (10, 7)))
        self.gate_up_proj = torch.nn.Parameter(up.transpose(1, 2).contiguous() if transposed else up, False)
        self.down_proj = torch.nn.Parameter(down.transpose(1, 2).contiguous() if transposed else down, False)

    def _apply_gate(self, hidden: Tensor) -> Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up

    def activation(self, expert: int, x: Tensor) -> Tensor:
        weight = self.gate_up_proj[expert].double()
        gate, up = (x.double() @ (weight if self.is_transposed else weight.T)).chunk(2, dim=-1)
        return F.silu(gate) * up


def case(tokens: int = 400) -> tuple[Tensor, Tensor, Tensor, Judge]:
    """Inputs [T, 10], routing among experts 0 and 2 [T, 2], gates, and a judge over sequences of 10, the last five."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 10, generator=generator)
    index = torch.tensor([0, 2]).repeat(tokens, 1)
    gates = torch.rand(tokens, 2, generator=generator)
    mask = torch.ones(tokens // 10, 10, dtype=torch.bool)
    return x, index, gates, Judge(torch.randn(tokens, 10, generator=generator), mask, tokens // 10 - 5)


def recorded(experts: Experts, x: Tensor, index: Tensor, gates: Tensor, judge: Judge) -> dict[int, Activations]:
    """What a recorder takes from two batches through the observed experts, of which 1 is not asked for."""
    recorder = Recorder(judge.weight, [2, 0])
    experts.cprune_observer = recorder
    for part in zip(x.split(250), index.split(250), gates.split(250), strict=True):
        hf._observing_experts(experts, *part)
    return recorder.take()


def prediction(experts: Experts, changes: dict[int, Tensor], x: Tensor, index: Tensor, gates: Tensor) -> Tensor:
    """sum_e g_e a_e(x) D_e, float64."""
    out = torch.zeros(len(x), 10, dtype=torch.float64)
    for e, delta in changes.items():
        out += (gates.double() * (index == e)).sum(1, keepdim=True) * (experts.activation(e, x) @ delta.double())
    return out


@pytest.mark.parametrize("transposed", [False, True])
def test_activations_of_routed_pairs_are_recorded_with_their_weights(transposed: bool) -> None:
    experts, (x, index, gates, judge) = Experts(transposed), case()
    index[::3, 1] = 1  # not asked for
    judge.weight[7] = 0.5
    pairs = recorded(experts, x, index, gates, judge)
    assert list(pairs) == [0, 2]
    for e in (0, 2):
        tokens, slots = (index == e).nonzero(as_tuple=True)
        rows = experts.activation(e, x[tokens]) * (gates[tokens, slots] * judge.weight[tokens]).double().unsqueeze(1)
        assert torch.equal(pairs[e].tokens, tokens)
        torch.testing.assert_close(pairs[e].rows.double(), rows, rtol=0, atol=14 * 2.0**-24 * 10)  # sums of 10 and 7


@pytest.mark.parametrize("transposed", [False, True])
def test_a_loss_that_is_linear_in_the_activations_is_given_back(transposed: bool) -> None:
    experts, (x, index, gates, judge) = Experts(transposed), case()
    generator = torch.Generator().manual_seed(2)
    truth = {e: torch.randn(7, 10, generator=generator) for e in (0, 2)}
    weight = judge.weight.double().unsqueeze(1)
    residual = weight * prediction(experts, truth, x, index, gates)
    before, left = judge.error(residual), residual.float()
    changes = fit_down(recorded(experts, x, index, gates, judge), left, judge)
    assert {e: change.ridge for e, change in changes.items()} == {0: 0.03, 2: 0.03}
    deltas = {e: change.delta for e, change in changes.items()}
    expected = residual - weight * prediction(experts, deltas, x, index, gates)
    torch.testing.assert_close(left.double(), expected, rtol=0, atol=100 * 2.0**-24 * float(residual.abs().max()))
    assert judge.error(expected) < 0.05 * before  # what a ridge of 0.03 of the mean diagonal leaves of it


def test_sweeps_come_to_the_joint_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, (x, index, gates, judge) = Experts(), case()
    residual = torch.randn(len(x), 10, generator=torch.Generator().manual_seed(5))
    residual += prediction(experts, {0: torch.ones(7, 10), 2: -torch.ones(7, 10)}, x, index, gates).float()
    monkeypatch.setattr("cprune.act.least_squares.RIDGES", (0.3,))
    monkeypatch.setattr("cprune.act.least_squares.SWEEPS", 200)
    falling = iter(range(100000, 0, -1))
    monkeypatch.setattr("cprune.act.least_squares.square", lambda x: float(next(falling)))  # every step is liked
    pairs = recorded(experts, x, index, gates, judge)
    rows = torch.cat([pairs[e].rows.double()[: judge.first] for e in (0, 2)], dim=1)
    gram = rows.T @ rows
    monkeypatch.setattr("cprune.act.least_squares._mean_diagonal", lambda *args: float(gram.diagonal().mean()))
    target = residual[: judge.first].double()
    changes = fit_down(pairs, residual, judge)
    joint = torch.linalg.solve(gram + 0.3 * gram.diagonal().mean() * torch.eye(14), rows.T @ target)
    got = torch.cat([changes[0].delta, changes[2].delta]).double()
    # 200 float32 updates of one residual, each rounded to 2^-24 of it
    assert (got - joint).abs().max() < 200 * 2.0**-24 * joint.abs().max() * 10


def test_each_expert_has_the_ridge_that_held_back_tokens_like(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, (x, index, gates, judge) = Experts(), case()
    pairs = recorded(experts, x, index, gates, judge)
    residual = prediction(experts, {0: torch.ones(7, 10)}, x, index, gates).float()
    residual += 0.3 * torch.randn(residual.shape, generator=torch.Generator().manual_seed(6))
    monkeypatch.setattr("cprune.act.least_squares.SWEEPS", 1)
    mean = sum(float(p.rows[: judge.first].double().square().sum()) for p in pairs.values()) / 14
    p, r = pairs[0].rows.double(), residual.double()
    fit, errors = slice(0, judge.first), {}
    for ridge in RIDGES:
        delta = torch.linalg.solve(p[fit].T @ p[fit] + ridge * mean * torch.eye(7), p[fit].T @ r[fit])
        errors[ridge] = float((r - p @ delta)[judge.first :].square().sum())
    change = fit_down({0: pairs[0], 2: pairs[2]}, residual, judge)[0]
    assert change.ridge == min(errors, key=errors.__getitem__)


def test_noise_is_not_fitted() -> None:
    experts, (x, index, gates, judge) = Experts(), case()
    noise = torch.randn(len(x), 10, generator=torch.Generator().manual_seed(4))
    before = judge.error(noise)
    fit_down(recorded(experts, x, index, gates, judge), noise, judge)
    assert judge.error(noise) <= before and judge.error(noise) > 0.99 * before


def test_tokens_that_do_not_count_and_judges_are_not_fitted() -> None:
    experts, (x, index, gates, _) = Experts(), case()
    residual = prediction(experts, {0: torch.ones(7, 10)}, x, index, gates).float()
    mask = torch.ones(40, 10, dtype=torch.bool)
    mask[:, 0] = False
    judge = Judge(torch.ones(400, 10), mask, 35)
    pairs = recorded(experts, x, index, gates, judge)
    expected = fit_down(pairs, residual.clone(), judge)
    residual[~mask.flatten()] = torch.nan
    assert judge.error(residual) > 0
    got = fit_down(pairs, residual.clone(), judge)
    assert all(torch.equal(got[e].delta, expected[e].delta) for e in (0, 2)) and got.keys() == expected.keys()
    residual[350:] *= 1.01  # judges change what is chosen, not what is fitted
    got = fit_down(pairs, residual.clone(), judge)
    assert got[0].ridge == expected[0].ridge and torch.equal(got[0].delta, expected[0].delta)


def test_singular_gram_matrices_are_handled() -> None:
    experts, (x, index, gates, judge) = Experts(), case()
    experts.gate_up_proj[0, 1:7] = experts.gate_up_proj[0, :1]  # units of expert 0 are copies: rank 1
    experts.gate_up_proj[0, 8:] = experts.gate_up_proj[0, 7:8]
    residual = prediction(experts, {0: torch.ones(7, 10)}, x, index, gates).float()
    changes = fit_down(recorded(experts, x, index, gates, judge), residual, judge)
    assert 0 in changes and all(bool(torch.isfinite(change.delta).all()) for change in changes.values())
    experts.gate_up_proj.zero_()
    assert fit_down(recorded(experts, x, index, gates, judge), torch.ones(400, 10), judge) == {}
    assert fit_down({}, torch.ones(400, 10), judge) == {}


def test_massive_tokens_count_like_the_median() -> None:
    expected = torch.ones(80, 4)
    expected[::10] *= 1000.0
    judge = Judge(expected, torch.ones(8, 10, dtype=torch.bool), 7)
    assert torch.equal(judge.weight[::10], torch.full((8,), 1e-3)) and judge.weight[1] == 1
    assert judge.first == 70
    assert judge.relative(judge.error(judge.residual(expected, torch.zeros(80, 4)))) == pytest.approx(1.0)


def test_one_of_eight_sequences_judges_whatever_the_turn_of_the_texts() -> None:
    for count in (2, 3, 7):
        assert judges(count).nonzero().tolist() == [[count - 1]]
    for count in (8, 24, 128, 131):
        blocks = [int(block.sum()) for block in judges(count).split(8)]
        assert blocks[: count // 8] == [1] * (count // 8) and max(blocks) == 1
    for texts in (2, 4, 7, 8, 10):
        assert set((judges(256).nonzero().flatten() % texts).tolist()) == set(range(texts))
    assert torch.equal(judges(131), judges(131))
