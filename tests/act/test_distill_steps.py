from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cprune.act.distill_steps import RATE, Text, Training
from cprune.act.least_squares import judges
from cprune.config import PruneConfig

CONFIG = PruneConfig(dtype="float32", batch_tokens=100, distill="experts", steps=6)
IDS = torch.randint(0, 288, (24, 32), generator=torch.Generator().manual_seed(3))
MASK = torch.ones(IDS.shape, dtype=torch.bool)
HELD = judges(24)


class Valley(nn.Module):
    """(x - 3)^2 over two elements of one parameter, whose length of step is relative to where it begins."""

    def __init__(self, start: float = 1.0) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.full((2,), start))

    def error(self) -> Tensor:
        return (self.x - 3.0).square().sum()


def walk(valley: Valley, steps: int, rate: float = RATE, file: Path | None = None, stop: int = 10**9) -> Training:
    training = Training({"x": valley.x}, {"x": torch.bfloat16}, steps=steps, accelerator=Accelerator())
    training.rate = rate
    for done in training.run(lambda step: valley.error().backward(), lambda: float(valley.error().detach()), file):
        if done == stop:
            break
    return training


def test_steps_are_relative_to_the_tensor() -> None:
    for start in (1.0, 1e-4):
        valley = Valley(start)
        walk(valley, 1)
        # Adam's first step is the learning rate, towards 3; the result is rounded to bfloat16
        assert valley.x.tolist() == pytest.approx([start * (1 + RATE)] * 2, rel=2.0**-8)


def test_a_rate_that_diverges_leaves_the_untrained_weights() -> None:
    for rate in (1e30, math.nan):
        valley = Valley(3.03125)
        training = walk(valley, 24, rate)
        assert training.best_step == 0 and valley.x.tolist() == [3.03125] * 2 and training.least == training.untrained
        assert training.rate == rate / 2**12 or math.isnan(rate)


def test_it_goes_back_and_on_at_a_lower_rate() -> None:
    valley = Valley(2.0)
    training = walk(valley, 60, 64.0)  # to 14 and beyond at first
    assert training.rate < 64.0 and 0 < training.best_step and training.least < training.untrained
    assert float(valley.error().detach()) == training.least


def test_what_is_judged_is_what_is_written() -> None:
    valley, seen = Valley(), []
    training = Training({"x": valley.x}, {"x": torch.bfloat16}, steps=5, accelerator=Accelerator())
    for _ in training.run(
        lambda step: valley.error().backward(), lambda: seen.append(valley.x.detach().clone()) or -float(len(seen))
    ):
        pass
    assert len(seen) == 6 and all(torch.equal(x, x.bfloat16().float()) for x in seen)
    assert torch.equal(valley.x, seen[-1]) and torch.equal(training.best["x"].float(), seen[-1])


def test_a_long_gradient_is_cut() -> None:
    valley = Valley()
    training = Training({"x": valley.x}, {"x": torch.float32}, steps=6, accelerator=Accelerator())
    norms = []

    def backward(step: int) -> None:
        (valley.x.sum() * (1.0 if step < 4 else 1e6)).backward()

    for _ in training.run(backward, lambda: 1.0):
        norms.append(float(training.masters["x"].grad.norm()))
    assert norms[:4] == pytest.approx([2**0.5] * 4) and norms[4] == pytest.approx(2 * 2**0.5)


def test_every_sequence_has_its_turn_and_judges_never() -> None:
    text = Text.of(IDS, MASK, CONFIG.replace(steps=21), joined=False)  # 8 times round
    assert text.held.tolist() == HELD.nonzero().flatten().tolist() and text.size == 8 and text.input_ids is IDS
    turns = torch.cat([text.rows_of_step(step) for step in range(21)])
    for turn in turns.split(21):
        assert sorted(turn.tolist()) == [row for row in range(24) if not HELD[row]]
    assert not torch.equal(turns[:21], turns[21:42])
    two = Text.of(IDS[:2], MASK[:2], CONFIG.replace(skip_first=True), joined=False)
    assert (two.order.tolist(), two.held.tolist(), two.tokens(two.held)) == ([0] * 6, [1], 31)


def test_text_is_joined_anew_after_the_first_time_round() -> None:
    mask = MASK.clone()
    mask[5, 20:] = False
    plain, text = (Text.of(IDS, mask, CONFIG.replace(steps=6), joined=joined) for joined in (False, True))
    assert text.input_ids.shape == (6 * 8 + 3, 32) and text.order.tolist() == list(range(48))
    assert torch.equal(text.input_ids[text.held], IDS[HELD]) and torch.equal(text.mask[text.held], mask[HELD])
    assert torch.equal(text.input_ids[:21], IDS[plain.order[:21]]) and torch.equal(
        text.mask[:21], mask[plain.order[:21]]
    )
    for row in range(21, 48):
        end = int(plain.order[row])
        found = [
            (cut, begin)
            for cut in range(1, 32)
            for begin in range(24)
            if torch.equal(text.input_ids[row], torch.cat([IDS[end, cut:], IDS[begin, :cut]]))
        ]
        assert len(found) == 1 and not HELD[found[0][1]]  # a judge teaches nothing
        cut, begin = found[0]
        assert torch.equal(text.mask[row], torch.cat([mask[end, cut:], mask[begin, :cut]]))
