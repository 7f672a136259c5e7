from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import cprune
from cprune.act.compact import apply_plan
from cprune.checkpoint import open_checkpoint
from cprune.prove.evaluate import Perplexity, generate, perplexity
from tests.synthetic import damaged, ragged_plan, refuses
from tests.tiny import FAMILIES

Tiny = Callable[..., Path]
IDS = torch.randint(0, 288, (5, 41), generator=torch.Generator().manual_seed(3))
MASK = torch.ones(5, 41, dtype=torch.bool)
MASK[1, 20:] = MASK[4, 1:] = False  # the last row has nothing to predict
DOMAINS = ("code", "prose", "code", "prose", "prose")


def evaluate(folder: Path, ids: Tensor = IDS, batch_tokens: int = 100) -> Perplexity:
    return perplexity(open_checkpoint(folder), ids, MASK, DOMAINS, dtype=torch.float32, batch_tokens=batch_tokens)


@torch.no_grad()
def plain(model: torch.nn.Module) -> dict[str, tuple[float, int]]:
    """(perplexity, predicted tokens) by domain, by transformers' own loss, a sequence at a time without padding."""
    totals: dict[str, list[float]] = {name: [0.0, 0] for name in DOMAINS}
    for ids, mask, domain in zip(IDS, MASK, DOMAINS, strict=True):
        ids = ids[mask].unsqueeze(0)
        if ids.shape[1] > 1:
            totals[domain][0] += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            totals[domain][1] += ids.shape[1] - 1
    return {name: (math.exp(loss / count), int(count)) for name, (loss, count) in totals.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_that_of_plain_transformers(tiny: Tiny, family: str) -> None:
    expected = plain(AutoModelForCausalLM.from_pretrained(tiny(family)))
    got = evaluate(tiny(family))
    assert got.tokens == {"code": 80, "prose": 59} == {name: count for name, (_, count) in expected.items()}
    assert got.by_domain == pytest.approx({name: value for name, (value, _) in expected.items()}, rel=1e-4)


def test_perplexity_of_layers_with_different_counts(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("deepseek_v2"))
    apply_plan(checkpoint, ragged_plan(checkpoint), tmp_path / "out")
    expected = plain(cprune.load(tmp_path / "out"))
    assert evaluate(tmp_path / "out").by_domain == pytest.approx({k: v for k, (v, _) in expected.items()}, rel=1e-4)


def test_padding_and_batches_make_no_difference(tiny: Tiny) -> None:
    expected = evaluate(tiny("olmoe"))
    other = torch.where(MASK, IDS, 9)
    for got in (evaluate(tiny("olmoe"), other), evaluate(tiny("olmoe"), batch_tokens=1)):
        assert got.tokens == expected.tokens and got.by_domain == pytest.approx(expected.by_domain, rel=1e-5)


def test_means_are_over_domains_and_over_tokens() -> None:
    result = Perplexity({"a": 4.0, "b": 16.0}, {"a": 300, "b": 100})
    assert result.mean == 10.0
    assert result.token_weighted == pytest.approx(math.exp((300 * math.log(4) + 100 * math.log(16)) / 400))


def test_domain_without_predictions_is_left_out(tiny: Tiny) -> None:
    domains = ("code", "code", "code", "code", "empty")
    got = perplexity(open_checkpoint(tiny("olmoe")), IDS, MASK, domains, dtype=torch.float32, batch_tokens=100)
    assert set(got.by_domain) == {"code"} == set(got.tokens)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_generation_is_the_greedy_one(tiny: Tiny, family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny(family))
    expected = model.generate(IDS[:1, :9], max_new_tokens=5, do_sample=False, eos_token_id=None, use_cache=False)
    got = generate(open_checkpoint(tiny(family)), IDS[0, :9], new_tokens=5, dtype=torch.float32)
    assert got.dtype == torch.int64 and torch.equal(got, expected[0, 9:])


def test_logits_that_are_not_finite_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = damaged(tiny("olmoe"), tmp_path / "m", lambda tensors: tensors["lm_head.weight"][3].fill_(torch.nan))
    with refuses("logits must be finite"):
        evaluate(folder)
    with refuses("logits must be finite"):
        generate(open_checkpoint(folder), IDS[0], new_tokens=1, dtype=torch.float32)
