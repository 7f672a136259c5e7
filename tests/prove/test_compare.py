from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from cprune import load
from cprune.act.compact import apply_plan
from cprune.checkpoint import open_checkpoint
from cprune.prove.compare import FEW, Estimate, Quality, Units, bootstrap, masked_losses
from cprune.prove.evaluate import by_domain, perplexity
from cprune.prove.pareto import Row, frontier, pareto_svg, render
from cprune.stream import StreamedModel
from tests.synthetic import ragged_plan, refuses, uniform_plan

Tiny = Callable[..., Path]
IDS = torch.randint(0, 288, (6, 41), generator=torch.Generator().manual_seed(3))
MASK = torch.ones(6, 41, dtype=torch.bool)
MASK[1, 20:] = MASK[4, 1:] = False  # the fifth has nothing to predict
DOMAINS = ("code", "prose", "code", "prose", "prose", "code")
UNITS = Units.of(MASK, DOMAINS)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_masked_losses_are_those_of_the_compact_models(tiny: Tiny, tmp_path: Path, family: str) -> None:
    checkpoint = open_checkpoint(tiny(family))
    plans = [uniform_plan(checkpoint), None, ragged_plan(checkpoint), uniform_plan(checkpoint, seed=1)]
    options = {"dtype": torch.float32, "batch_tokens": 90}
    losses = masked_losses(checkpoint, plans, IDS, MASK, UNITS, **options)
    assert losses.shape == (4, 6) and losses.dtype == torch.float64 and not losses[:, UNITS.tokens == 0].any()
    for place, plan in enumerate(plans):
        model = checkpoint
        if plan is not None:
            apply_plan(checkpoint, plan, tmp_path / str(place))
            model = open_checkpoint(tmp_path / str(place))
        expected = perplexity(model, IDS, MASK, DOMAINS, **options)
        assert by_domain(losses[place], UNITS.tokens, UNITS.domain).by_domain == pytest.approx(
            expected.by_domain, rel=1e-4
        )
    assert len({round(float(row.sum()), 6) for row in losses}) == 4


def test_plans_that_agree_so_far_run_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny("olmoe"))
    plan, other = uniform_plan(checkpoint), uniform_plan(checkpoint, seed=1)
    last = type(plan)(plan.fingerprint, plan.model_type, (*plan.layers[:-1], other.layers[-1]))
    runs: list[int] = []
    run_layer = StreamedModel.run_layer
    monkeypatch.setattr(
        StreamedModel, "run_layer", lambda self, index, *rest: runs.append(index) or run_layer(self, index, *rest)
    )
    losses = masked_losses(
        checkpoint, [plan, plan, last, None], IDS, MASK, UNITS, dtype=torch.float32, batch_tokens=10000
    )
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    assert runs == [0, 0, 1, 1, 2, 2, 2]  # the plan (twice), `last` (apart from it in layer 2), the whole model


def test_bootstrap_draws_the_same_sequences_for_every_plan() -> None:
    """What costs every token the same factor increases perplexity without any doubt, though perplexity has some."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(40, 33, dtype=torch.bool)
    units = Units.of(mask, ["a"] * 20 + ["b"] * 20)
    whole = 32 * (3 + torch.rand(40, dtype=torch.float64, generator=generator))
    losses = torch.stack([whole, whole + 32 * math.log(1.25)])
    first, second = bootstrap(losses, units, seed=0)
    assert first.increase == Estimate(0.0, 0.0, 0.0)
    for value in (second.increase.value, second.increase.low, second.increase.high):
        assert value == pytest.approx(0.25, rel=1e-9)
    for quality in (first, second):
        span = quality.perplexity
        assert span.low < span.value < span.high
        assert span.value == pytest.approx(sum(quality.by_domain.values()) / 2)
    assert bootstrap(losses, units, seed=0) == [first, second] != bootstrap(losses, units, seed=1)


def test_bootstrap_interval_is_that_of_drawing_by_hand() -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 33, (30,), generator=generator)
    mask = torch.arange(33) < lengths.unsqueeze(1)
    tokens = (lengths - 1).tolist()
    rate = 2 + torch.rand(30, dtype=torch.float64, generator=generator)
    losses = (rate * torch.tensor(tokens)).unsqueeze(0)
    (got,) = bootstrap(losses, Units.of(mask, ["x"] * 30), seed=0)
    dice, means = random.Random(0), []
    for _ in range(4000):
        rows = [dice.randrange(30) for _ in range(30)]
        means.append(math.exp(sum(float(losses[0, r]) for r in rows) / sum(tokens[r] for r in rows)))
    means.sort()
    width = means[3899] - means[99]
    # of 1000 draws of about normal shape, the 2.5 % quantile scatters by 0.085 deviations: a 46th of the width
    assert abs(got.perplexity.low - means[99]) < 0.1 * width and abs(got.perplexity.high - means[3899]) < 0.1 * width
    assert got.perplexity.value == pytest.approx(math.exp(float(losses.sum()) / sum(tokens)))


def test_documents_are_drawn_whole_where_a_domain_has_enough_of_them() -> None:
    mask = torch.ones(6, 10, dtype=torch.bool)
    mask[5, 4:] = False
    many = torch.arange(40).view(4, 10) // 5  # eight documents, two a row
    many[1:3] = many[1:3].roll(1)  # and two across rows
    few = torch.tensor([[90] * 10, [91] * 4 + [95] * 6])
    units = Units.of(mask, ["many"] * 4 + ["few"] * 2, torch.cat([many, few]))
    assert FEW == 8 and units.domain == ("many",) * 8 + ("few",) * 2
    assert torch.equal(units.of_token[:4], many) and units.of_token[4:].tolist() == [[8] * 10, [9] * 10]
    for unit in range(10):
        assert units.tokens[unit] == int(((units.of_token == unit) & mask)[:, 1:].sum())
    assert int(units.tokens.sum()) == int(mask[:, 1:].sum())


def test_losses_of_documents_are_those_of_their_tokens(tiny: Tiny) -> None:
    checkpoint = open_checkpoint(tiny("olmoe"))
    options = {"dtype": torch.float32, "batch_tokens": 90}
    document = torch.arange(6 * 41).view(6, 41) // 11
    units = Units.of(MASK, ["one"] * 6, document)
    assert len(units.domain) == int(document.max()) + 1
    (got,) = masked_losses(checkpoint, [None], IDS, MASK, units, **options)
    model = load(checkpoint.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        nll = -model(IDS).logits[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None]).squeeze(2).double()
    for unit in range(len(got)):
        want = nll[(document[:, 1:] == unit) & MASK[:, 1:]].sum()
        assert float(got[unit]) == pytest.approx(float(want), abs=1e-3)


def test_domain_without_a_token_to_predict_is_left_out() -> None:
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[2, 1:] = False
    losses = torch.tensor([[8.0, 16.0, 0.0]], dtype=torch.float64)
    (got,) = bootstrap(losses, Units.of(mask, ["a", "a", "empty"]), seed=0)
    assert got.by_domain == pytest.approx({"a": math.exp(1.5)})
    with refuses("the evaluation text must have tokens to predict, got none"):
        bootstrap(losses[:, 2:], Units.of(mask[2:], ["empty"]), seed=0)


def row(method: str, removed: float, value: float) -> Row:
    span = Estimate(value, value * 0.95, value * 1.05)
    return Row(method, removed, removed, Quality(span, Estimate(value / 10 - 1, -0.1, 0.1), {"a": value}))


ROWS = [row("m<1>", 0.25, 12.0), row("m<1>", 0.5, 14.0), row("other", 0.25, 11.0), row("other", 0.5, 30.0)]
ROWS += [row("poor", 0.4, 14.0), Row("none", 0.9, 0.0, None, "it must be possible, got 0.9")]
WHOLE = Quality(Estimate(10.0, 9.5, 10.5), Estimate(0.0, 0.0, 0.0), {"a": 10.0})


def test_frontier_is_what_no_other_row_beats() -> None:
    for rows in (ROWS, ROWS[::-1]):
        assert [(best.method, best.removed) for best in frontier(rows)] == [("other", 0.25), ("m<1>", 0.5)]
    assert frontier([]) == []


def test_table_names_every_row_and_refusal() -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(WHOLE, ROWS))
    text = console.export_text()
    assert "10.00 [9.50, 10.50]" in text and "none at 0.9: it must be possible, got 0.9" in text
    starred = [line.split()[1] for line in text.splitlines() if line.split()[:1] == ["*"] and "%" in line]
    assert starred == ["m<1>", "other"]


def test_plot_is_xml_with_a_point_for_every_row_in_its_place() -> None:
    root = ElementTree.fromstring(pareto_svg(WHOLE, ROWS))
    space = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in root.iter(f"{space}text")]
    assert "m<1>" in texts and "other" in texts and "none" not in texts and "experts removed" in texts
    points = {(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{space}circle")}
    assert len(points) == 5 + 3  # one a row, and one a method in the legend
    assert all(0 <= x <= 760 and 0 <= y <= 440 for x, y in points)
    lines = [e.get("points").split() for e in root.iter(f"{space}polyline") if not e.get("stroke-dasharray")]
    (first, second) = ([tuple(map(float, point.split(","))) for point in line] for line in lines[:2])
    assert first[0][0] == second[0][0] < first[1][0] and first[1][1] < first[0][1]  # more removed lies to the right
    assert second[1][1] < first[1][1] < first[0][1] < second[0][1]  # a higher perplexity lies higher
