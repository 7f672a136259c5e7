from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cprune.act.align import Expert, average
from cprune.act.groups import Group, Inputs, Routed, gather, merge_group, read_expert, write_expert
from cprune.act.least_squares import RIDGES, Judge

UNITS, HIDDEN, EXPERTS, TOKENS, LENGTH = 9, 6, 4, 400, 10
LAYOUTS = [(False, False, False), (True, False, True), (False, True, True), (True, True, False)]


class Experts(torch.nn.Module):
    """Gated experts of transformers' contract, in any of its layouts."""

    has_gate = True

    def __init__(self, transposed: bool = False, interleaved: bool = False, biased: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.is_transposed, self.is_concatenated, self.has_bias = transposed, not interleaved, biased
        self.num_experts = EXPERTS
        shapes = ((EXPERTS, 2 * UNITS, HIDDEN), (EXPERTS, HIDDEN, UNITS), (EXPERTS, 2 * UNITS), (EXPERTS, HIDDEN))
        up, down, up_bias, down_bias = (torch.randn(shape, generator=generator) / 2 for shape in shapes)
        if transposed:
            up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        self.gate_up_proj, self.down_proj = (torch.nn.Parameter(x, False) for x in (up, down))
        if biased:
            self.gate_up_proj_bias, self.down_proj_bias = (torch.nn.Parameter(x, False) for x in (up_bias, down_bias))

    def _apply_gate(self, hidden: Tensor) -> Tensor:
        gate, up = hidden.chunk(2, dim=-1) if self.is_concatenated else (hidden[..., ::2], hidden[..., 1::2])
        return F.silu(gate) * up


def activation(expert: Expert, x: Tensor) -> Tensor:
    weights = (None if part is None else part.double() for part in expert.parts())
    gate, up, _, gate_bias, up_bias, _ = weights
    return F.silu(F.linear(x.double(), gate, gate_bias)) * F.linear(x.double(), up, up_bias)


def output(expert: Expert, x: Tensor) -> Tensor:
    bias = None if expert.down_bias is None else expert.down_bias.double()
    return F.linear(activation(expert, x), expert.down.double(), bias)


def case(seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Judge]:
    """Inputs [T, H], choices [T, 2] that never name expert 3, gates, and a judge; every ninth position is padding."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    index = torch.rand(TOKENS, 3, generator=generator).argsort(1)[:, :2]
    gates = torch.rand(TOKENS, 2, generator=generator)
    mask = torch.ones(TOKENS // LENGTH, LENGTH, dtype=torch.bool)
    mask[:, 8] = False
    return x, index, gates, Judge(torch.randn(TOKENS, HIDDEN, generator=generator), mask, 30)


def routed(index: Tensor, gates: Tensor) -> dict[int, Routed]:
    found = {}
    for expert in range(3):
        tokens, slots = (index == expert).nonzero(as_tuple=True)
        found[expert] = Routed(tokens, gates[tokens, slots])
    return found


def test_inputs_are_noted_by_expert_over_batches() -> None:
    x, index, gates, _ = case()
    inputs = Inputs()
    for part in zip(x.split(150), index.split(150), gates.split(150), strict=True):
        inputs.on_input(*part)
    hidden, found = inputs.take()
    assert torch.equal(hidden, x) and found.keys() == {0, 1, 2}
    for expert, want in routed(index, gates).items():
        assert torch.equal(found[expert].tokens, want.tokens) and torch.equal(found[expert].gates, want.gates)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_expert_is_read_and_written_in_every_layout(layout: tuple[bool, bool, bool]) -> None:
    experts, others = Experts(*layout), Experts(*layout)
    x = torch.randn(5, HIDDEN)
    expert = read_expert(experts, 2)
    fused = experts.gate_up_proj[2].T if layout[0] else experts.gate_up_proj[2]
    hidden = F.linear(x, fused, experts.gate_up_proj_bias[2] if layout[2] else None)
    down = experts.down_proj[2].T if layout[0] else experts.down_proj[2]
    want = F.linear(experts._apply_gate(hidden), down, experts.down_proj_bias[2] if layout[2] else None)
    torch.testing.assert_close(output(expert, x).float(), want, rtol=0, atol=1e-5)  # sums of a dozen float32 near 1
    write_expert(others, 0, expert, torch.float32)
    for one, other in zip(others.parameters(), experts.parameters(), strict=True):
        assert torch.equal(one[0], other[2]) and torch.equal(one[1:], other[1:])
    write_expert(others, 0, expert, torch.bfloat16)
    assert torch.equal(others.down_proj[0], experts.down_proj[2].bfloat16().float())


def test_a_group_is_what_its_members_give(layout: tuple[bool, bool, bool] = (False, False, True)) -> None:
    experts, (x, index, gates, judge) = Experts(*layout), case()
    group = gather(experts, [1, 0, 3], x, routed(index, gates), judge)
    tokens = [t for t in range(TOKENS) if t % LENGTH != 8 and {0, 1} & set(index[t].tolist())]
    assert group.members == (1, 0, 3) and torch.equal(group.inputs, x[tokens])
    assert group.fitted == sum(t < 300 for t in tokens)
    shares = [0.0, 0.0, 0.0]
    for row, t in enumerate(tokens):
        want, total = torch.zeros(HIDDEN, dtype=torch.float64), 0.0
        for slot in range(2):
            if (expert := int(index[t, slot])) in (0, 1):
                share = gates[t, slot].double() * output(read_expert(experts, expert), x[t : t + 1])[0]
                want, total = want + share, total + float(gates[t, slot])
                shares[(1, 0, 3).index(expert)] += float(share.norm()) if t < 300 else 0.0
        torch.testing.assert_close(group.target[row].double(), want, rtol=0, atol=1e-5)
        assert float(group.gates[row]) == pytest.approx(total, rel=1e-6)
        assert group.weight[row] == judge.weight[t]
    assert group.contribution == pytest.approx(shares, rel=1e-5)


def reference(experts: Experts, group: Group, candidate: Expert) -> list[tuple[float, np.ndarray]]:
    """[(held-back error, down [H, I])] of a candidate: as it is, and by every ridge, by numpy's least squares."""
    scale = (group.gates * group.weight).double().numpy()[:, None]
    rows = activation(candidate, group.inputs).numpy() * scale
    bias = 0.0 if candidate.down_bias is None else candidate.down_bias.double().numpy()
    want = group.target.double().numpy() * group.weight.double().numpy()[:, None] - bias * scale
    start, fitted = candidate.down.double().numpy(), group.fitted
    mean = np.square(rows[:fitted]).sum() / UNITS
    found = [(np.square(want[fitted:] - rows[fitted:] @ start.T).sum(), start)]
    for ridge in RIDGES:
        system = np.concatenate([rows[:fitted], np.sqrt(ridge * mean) * np.eye(UNITS)])
        right = np.concatenate([want[:fitted] - rows[:fitted] @ start.T, np.zeros((UNITS, HIDDEN))])
        down = start + np.linalg.lstsq(system, right, rcond=None)[0].T
        found.append((np.square(want[fitted:] - rows[fitted:] @ down.T).sum(), down))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("alike", [True, False])
def test_the_merged_down_projection_is_the_least_squares_one(layout: tuple[bool, bool, bool], alike: bool) -> None:
    experts, (x, index, gates, judge) = Experts(*layout), case()
    if alike:  # so that the average of the two wins over the kept one's own units
        first, generator = read_expert(experts, 1), torch.Generator().manual_seed(5)
        near = [None if p is None else p + torch.randn(p.shape, generator=generator) / 5 for p in first.parts()]
        write_expert(experts, 0, Expert(*near).permuted(torch.arange(UNITS).flip(0)), torch.float32)
    before = [parameter.clone() for parameter in experts.parameters()]
    group = gather(experts, [1, 0], x, routed(index, gates), judge)
    got = merge_group(experts, group, torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(experts.parameters(), before, strict=True))
    own, other = read_expert(experts, 1), read_expert(experts, 0)
    fitted = group.inputs[: group.fitted]  # few enough for all of them to align by
    mean = average([own, other], [activation(e, fitted).float() for e in (own, other)], group.contribution)
    candidates = [(*found, candidate) for candidate in (own, mean) for found in reference(experts, group, candidate)]
    _, down, candidate = min(candidates, key=lambda found: found[0])
    assert got is not None and (candidate is mean or not alike)
    for one, want in zip(got.parts()[:2], candidate.parts()[:2], strict=True):
        torch.testing.assert_close(one, want, rtol=0, atol=4 * 2.0**-23)  # shares of contributions summed in float32
    # float32 normal equations: 2^-24 times their condition number, at most (I + ridge) / ridge of the mean diagonal,
    # and the rounding of activations and of the target
    budget = 2.0**-24 * (UNITS + RIDGES[-1]) / RIDGES[-1] * 8
    assert np.abs(got.down.double().numpy() - down).max() <= budget * np.abs(down).max()


def test_nobody_is_merged_without_tokens_to_judge_by() -> None:
    experts, (x, index, gates, judge) = Experts(), case()
    assert merge_group(experts, gather(experts, [3, 2], x, {}, judge), torch.float32) is None
    alone = gather(experts, [1, 3], x, routed(index, gates), judge)  # nobody chose 3
    assert merge_group(experts, alone, torch.float32) is None or alone.contribution[1] == 0.0
    early = {e: Routed(r.tokens[r.tokens < 300], r.gates[r.tokens < 300]) for e, r in routed(index, gates).items()}
    assert merge_group(experts, gather(experts, [1, 0], x, early, judge), torch.float32) is None
