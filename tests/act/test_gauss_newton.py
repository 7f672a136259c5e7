from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cprune.act import gauss_newton
from cprune.act.gauss_newton import Seen, _ridges, _rows, refit
from cprune.act.least_squares import Judge
from cprune.act.tangent import Experts, Step, Tangent

TOKENS, H, I, E = 400, 10, 7, 3  # noqa: E741
LAYOUTS = {"qwen": (False, True, False), "gpt-oss": (True, False, True), "rows": (False, False, False)}


class Module(nn.Module):
    """Experts of transformers' contract in any layout: transposed, concatenated, with biases."""

    has_gate, num_experts = True, E

    def __init__(self, layout: str = "qwen", seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.is_transposed, self.is_concatenated, self.has_bias = LAYOUTS[layout]
        both, down = (torch.randn(E, *size, generator=generator) / 3 for size in ((2 * I, H), (H, I)))
        if self.is_transposed:
            both, down = both.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        self.gate_up_proj, self.down_proj = nn.Parameter(both, False), nn.Parameter(down, False)
        if self.has_bias:
            self.gate_up_proj_bias = nn.Parameter(torch.randn(E, 2 * I, generator=generator), False)

    def _apply_gate(self, z: Tensor) -> Tensor:
        gate, up = z.chunk(2, dim=-1) if self.is_concatenated else (z[..., ::2], z[..., 1::2])
        return F.silu(gate) * (up + 1)

    def output(self, expert: int, x: Tensor, both: Tensor | None = None, down: Tensor | None = None) -> Tensor:
        """f(x) in float64 by the module's own layout, with other weights where given."""
        both = self.gate_up_proj[expert].double() if both is None else both
        down = self.down_proj[expert].double() if down is None else down
        z = x.double() @ (both if self.is_transposed else both.T)
        if self.has_bias:
            z = z + self.gate_up_proj_bias[expert].double()
        return self._apply_gate(z) @ (down if self.is_transposed else down.T)


def case(sequences_held: int = 5) -> tuple[Seen, Judge]:
    """Tokens that all choose experts 0 and 2, in sequences of ten of which the last ones judge."""
    generator = torch.Generator().manual_seed(1)
    x, gates = torch.randn(TOKENS, H, generator=generator), torch.rand(TOKENS, 2, generator=generator)
    mask = torch.ones(TOKENS // 10, 10, dtype=torch.bool)
    judge = Judge(torch.randn(TOKENS, H, generator=generator), mask, TOKENS // 10 - sequences_held)
    return Seen(x, torch.tensor([0, 2], dtype=torch.int16).repeat(TOKENS, 1), gates), judge


def total(module: Module, seen: Seen) -> Tensor:
    """sum_e g_e f_e(x), [T, H] float64."""
    out = torch.zeros(TOKENS, H, dtype=torch.float64)
    for expert in range(E):
        gates = (seen.gates.double() * (seen.index == expert)).sum(1, keepdim=True)
        out += gates * module.output(expert, seen.hidden)
    return out


def lacking(module: Module, seen: Seen, judge: Judge, change: float = 0.1) -> Tensor:
    """What the layer lacks beside one whose experts 0 and 2 have other weights, weighted, float32."""
    other, generator = Module(seed=0), torch.Generator().manual_seed(2)
    other.__dict__.update({k: v for k, v in module.__dict__.items() if k != "_parameters"})
    other._parameters = {name: nn.Parameter(weight.clone(), False) for name, weight in module._parameters.items()}
    for weight in (other.gate_up_proj, other.down_proj):
        weight += change * torch.randn(weight.shape, generator=generator)
    return (judge.weight.double().unsqueeze(1) * (total(other, seen) - total(module, seen))).float()


def tangent(module: Module, seen: Seen, judge: Judge, *, whole: bool = True) -> Tangent:
    experts, rows = Experts(module, torch.float32), _rows(2, seen, judge)
    ridges = _ridges(experts, {2: rows}, seen.hidden, whole=whole)
    return Tangent(experts, 2, rows, seen.hidden[rows.tokens], ridges, whole=whole)


def random_step(seed: int) -> Step:
    generator = torch.Generator().manual_seed(seed)
    return Step(torch.randn(H, I, generator=generator), torch.randn(2 * I, H, generator=generator))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tangent_is_the_derivative(layout: str) -> None:
    module, (seen, judge) = Module(layout), case()
    step = random_step(3)
    both, down = step.gate_up.double(), step.down.double()
    if not module.is_concatenated:
        both = torch.stack(both.chunk(2), dim=1).flatten(0, 1)
    if module.is_transposed:
        both, down = both.T, down.T
    weights = module.gate_up_proj[2].double(), module.down_proj[2].double()
    _, expected = torch.func.jvp(lambda b, d: module.output(2, seen.hidden, b, d), weights, (both, down))
    expected = expected * (seen.gates[:, 1] * judge.weight).double().unsqueeze(1)
    linear, got = tangent(module, seen, judge), torch.zeros(TOKENS, H)
    linear.rows.put(got, linear.apply(step))
    got = got.double()
    # sums of 10 and 7 products in float32 after one another, of values up to the largest
    assert (got - expected).abs().max() < 64 * 2.0**-24 * expected.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_transpose_is_the_adjoint_over_fitted_rows(layout: str) -> None:
    module, (seen, judge) = Module(layout), case()
    linear, step = tangent(module, seen, judge), random_step(4)
    rows = torch.randn(TOKENS, H, generator=torch.Generator().manual_seed(5))
    rows[judge.first :] = 1e6  # judges have no part in it
    taken, fit = linear.rows.taken(rows), slice(0, linear.rows.fitted)
    moved = linear.apply(step)[fit].double()
    one = float((moved * taken[fit].double()).sum())
    other = step.dot(linear.transpose(taken))
    bound = float(moved.norm() * taken[fit].double().norm())
    assert one == pytest.approx(other, abs=64 * 2.0**-24 * bound)


def test_rows_are_taken_and_put_back_with_nothing_in_the_room() -> None:
    _, (seen, judge) = Module(), case()
    counts = torch.arange(TOKENS) % 7 != 3
    judge.counts &= counts
    rows = _rows(2, seen, judge)
    residual = torch.randn(TOKENS, H, generator=torch.Generator().manual_seed(7))
    taken = rows.taken(residual)
    assert rows.fitted == int(counts[: judge.first].sum()) and torch.equal(
        taken[: rows.fitted], residual[: judge.first][counts[: judge.first]]
    )
    assert torch.equal(taken[rows.judging], residual[judge.first :][counts[judge.first :]])
    room = torch.ones(len(taken), dtype=torch.bool)
    room[: rows.fitted] = room[rows.others] = False
    assert bool((taken[room] == 0).all()) and bool((rows.scale[room] == 0).all()) and bool(room.any())
    back = torch.full_like(residual, torch.nan)
    rows.put(back, taken)
    assert torch.equal(back, residual)


def test_the_down_projection_alone_is_ridge_least_squares() -> None:
    module, (seen, judge) = Module(), case()
    residual = lacking(module, seen, judge)
    linear = tangent(module, seen, judge, whole=False)
    step = linear.solve(linear.rows.taken(residual))
    rows = linear.activation[: judge.first].double()
    gram = rows.T @ rows + linear.ridges.down * torch.eye(I)
    expected = torch.linalg.solve(gram, rows.T @ residual[: judge.first].double()).T
    assert step.gate_up is None
    assert (step.down.double() - expected).abs().max() < 2.0**-24 * 64 * float(
        torch.linalg.cond(gram)
    ) * expected.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("written", [torch.float32, torch.bfloat16])
def test_what_is_lacking_is_given_back(layout: str, written: torch.dtype) -> None:
    module, (seen, judge) = Module(layout), case()
    for weight in (module.gate_up_proj, module.down_proj):
        weight.copy_(weight.to(written))
    untouched = module.gate_up_proj[1].clone(), module.down_proj[1].clone()
    residual = lacking(module, seen, judge)
    before, base, old = judge.error(residual), residual.double(), total(module, seen)
    assert refit(Experts(module, written), [0, 2], seen, residual, judge, whole=True) == [0, 2]
    assert judge.error(residual) < 0.25 * before  # squared: less than half of the error is left
    left = base - judge.weight.double().unsqueeze(1) * (total(module, seen) - old)
    assert (residual.double() - left).abs().max() < 500 * 2.0**-24 * base.abs().max()  # eight steps' float32 sums
    assert torch.equal(module.gate_up_proj[1], untouched[0]) and torch.equal(module.down_proj[1], untouched[1])
    for weight in (module.gate_up_proj, module.down_proj):
        assert torch.equal(weight, weight.to(written).float())


def test_all_projections_give_back_more_than_the_down_projection() -> None:
    errors = {}
    for whole in (False, True):
        module, (seen, judge) = Module(), case()
        residual = lacking(module, seen, judge)
        refit(Experts(module, torch.float32), [0, 2], seen, residual, judge, whole=whole)
        errors[whole] = judge.error(residual)
        assert whole or torch.equal(module.gate_up_proj, Module().gate_up_proj)
    assert errors[True] < 0.5 * errors[False]


def test_noise_is_not_fitted() -> None:
    module, (seen, judge) = Module(), case()
    noise = torch.randn(TOKENS, H, generator=torch.Generator().manual_seed(6))
    before = judge.error(noise)
    refit(Experts(module, torch.float32), [0, 2], seen, noise, judge, whole=True)
    assert 0.95 * before < judge.error(noise) <= before


def test_tokens_that_do_not_count_and_judges_are_not_fitted() -> None:
    module, (seen, judge) = Module(), case()
    mask = torch.ones(TOKENS // 10, 10, dtype=torch.bool)
    mask[:, 0] = False
    judge = Judge(torch.ones(TOKENS, H), mask, TOKENS // 10 - 5)
    residual = lacking(module, seen, judge)
    other = Module()
    rest = residual.clone()
    refit(Experts(other, torch.float32), [0, 2], seen, rest, judge, whole=True)
    residual[~mask.flatten()] = torch.nan
    assert refit(Experts(module, torch.float32), [0, 2], seen, residual, judge, whole=True) == [0, 2]
    assert torch.equal(module.gate_up_proj, other.gate_up_proj) and torch.equal(module.down_proj, other.down_proj)


def test_experts_without_tokens_or_judges_stay() -> None:
    module, (seen, judge) = Module(), case()
    index = seen.index.clone()
    index[judge.first :, 1] = -1  # none of expert 2 judges
    residual = lacking(module, seen, judge)
    assert refit(
        Experts(module, torch.float32), [0, 1, 2], replace(seen, index=index), residual, judge, whole=True
    ) == [0]
    assert refit(Experts(module, torch.float32), [1], seen, residual, judge, whole=True) == []


def test_dead_experts_stay() -> None:
    module, (seen, judge) = Module(), case()
    module.gate_up_proj.zero_()
    assert refit(Experts(module, torch.float32), [0, 2], seen, torch.ones(TOKENS, H), judge, whole=True) == []
    module.down_proj.zero_()
    assert refit(Experts(module, torch.float32), [0, 2], seen, torch.ones(TOKENS, H), judge, whole=True) == []


@pytest.mark.parametrize(("factor", "taken"), [(4.0, True), (-1.0, False)])
def test_too_long_a_step_is_halved_and_a_bad_one_is_not_taken(
    factor: float, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, (seen, judge) = Module(), case()
    residual = lacking(module, seen, judge)
    before = judge.error(residual)
    solve = Tangent.solve

    def scaled(self: Tangent, lacking: Tensor) -> Step:
        return solve(self, lacking).times(factor)

    monkeypatch.setattr(Tangent, "solve", scaled)
    monkeypatch.setattr(gauss_newton, "SWEEPS", 1)
    changed = refit(Experts(module, torch.float32), [0, 2], seen, residual, judge, whole=True)
    assert changed == ([0, 2] if taken else [])
    assert (judge.error(residual) < before) == taken
    assert taken or torch.equal(module.gate_up_proj, Module().gate_up_proj)
