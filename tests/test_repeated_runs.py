"""Runs after runs: nothing is measured twice, the same gives the same bytes, an output is pruned again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cprune import PrunePlan, load
from tests.pruned import BUDGETS, assert_close, logits, masked_reference, plan_of, weights

METHODS = ("cprune", "cprune-paper", "contribution", "reap", "frequency", "gate", "ean", "random")


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_method_from_one_measurement(
    budget: str, originals: dict[str, Path], tmp_path: Path, run: Callable[..., Path]
) -> None:
    model, work = originals["qwen2_moe"], tmp_path / "work"
    stamps = None
    for method in METHODS:
        options = ("--method", method, "--budget", budget, "--work-dir", str(work), "--evaluate", "none")
        out = run(model, tmp_path / method, *options)
        found = {path.name: path.stat().st_mtime_ns for path in work.glob("stats*")}
        assert len(found) == 4 and found == (stamps or found)
        stamps = found
        assert plan_of(out).config["method"] == method
        assert_close(logits(load(out, dtype=torch.float32)), masked_reference(model, plan_of(out)))


def test_another_ratio_or_method_does_not_measure_again(
    originals: dict[str, Path], tmp_path: Path, run: Callable[..., Path]
) -> None:
    work = tmp_path / "work"
    run(originals["olmoe"], tmp_path / "quarter", "--work-dir", str(work))
    stamps = {path.name: path.stat().st_mtime_ns for path in work.glob("stats*")}
    out = run(originals["olmoe"], tmp_path / "half", "--work-dir", str(work), "--ratio", "0.5")
    assert {path.name: path.stat().st_mtime_ns for path in work.glob("stats*")} == stamps and len(stamps) == 4
    assert json.loads((out / "report.json").read_text())["after"]["experts"] == 45 - 22
    run(originals["olmoe"], tmp_path / "longer", "--work-dir", str(work), "--tokens", "256")
    assert all(path.stat().st_mtime_ns != stamps[path.name] for path in work.glob("stats*"))


def test_two_runs_are_byte_identical(originals: dict[str, Path], tmp_path: Path, run: Callable[..., Path]) -> None:
    first, second = (run(originals["glm4_moe"], tmp_path / name) for name in ("first", "second"))
    assert (first / "cprune_plan.json").read_bytes() == (second / "cprune_plan.json").read_bytes()
    assert weights(first) == weights(second)


def test_a_replayed_plan_gives_the_same_bytes(
    originals: dict[str, Path], outputs: Callable[[str, str], Path], tmp_path: Path, run: Callable[..., Path]
) -> None:
    for budget in BUDGETS:
        out = outputs("qwen3_moe", budget)
        again = run(originals["qwen3_moe"], tmp_path / budget, "--plan", str(out / "cprune_plan.json"))
        assert weights(again) == weights(out) and not (tmp_path / f"{budget}.work").exists()
        assert (again / "cprune_plan.json").read_bytes() == (out / "cprune_plan.json").read_bytes()
        assert (again / "config.json").read_bytes() == (out / "config.json").read_bytes()


@pytest.mark.parametrize("again", BUDGETS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_pruning_a_pruned_model(
    budget: str,
    again: str,
    originals: dict[str, Path],
    outputs: Callable[[str, str], Path],
    tmp_path: Path,
    run: Callable[..., Path],
) -> None:
    once = outputs("qwen3_moe", budget)
    counts = {layer.layer: len(layer.kept) for layer in plan_of(once).layers}
    twice = run(once, tmp_path / "twice", "--budget", again, "--ratio", "0.2")
    first, second = plan_of(once), plan_of(twice)
    assert {layer.layer: layer.num_experts for layer in second.layers} == counts
    assert any(layer.dropped for layer in second.layers)
    assert (twice / "modeling_cprune.py").exists() == (not second.uniform)
    assert ("auto_map" in json.loads((twice / "config.json").read_text())) == (not second.uniform)
    assert_close(logits(load(twice)), masked_reference(originals["qwen3_moe"], composed(first, second)))


def composed(first: PrunePlan, second: PrunePlan) -> PrunePlan:
    """The plan that keeps of the first original what is left after both."""
    layers = []
    for layer in first.layers:
        kept = tuple(layer.kept[expert] for expert in second[layer.layer].kept)
        layers.append(dataclasses.replace(layer, kept=kept, stand_in=(kept[0],) * layer.num_experts))
    return dataclasses.replace(first, layers=tuple(layers))
