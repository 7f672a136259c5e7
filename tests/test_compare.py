"""`cprune compare` through the command line: every method on a tiny model, from one pass over the text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from cprune import compare as module
from cprune import pipeline
from cprune.compare import compare, variant
from cprune.config import Method, PruneConfig
from cprune.run import main
from tests.pruned import WORDS
from tests.synthetic import refuses

Tiny = Callable[..., Path]
CONFIG = PruneConfig(seq_len=32, tokens=512, sample_tokens=40, evaluate_tokens=256, dtype="float32")


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """A file of four domains."""
    path = tmp_path / "texts.jsonl"
    lines = []
    for number in range(64):
        turned = WORDS[number % len(WORDS) :] + WORDS[: number % len(WORDS)]
        lines.append(json.dumps({"text": " ".join(turned[: 8 + number % 5]), "domain": "abcd"[number % 4]}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def config_of(texts: str, **changes: object) -> PruneConfig:
    return CONFIG.replace(calibration=texts, evaluate=texts, **changes)


def test_all_methods_come_from_one_pass(
    tiny: Tiny, tmp_path: Path, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    calibrate = pipeline.calibrate
    monkeypatch.setattr(pipeline, "calibrate", lambda *args: passes.append(1) or calibrate(*args))
    methods = [*get_args(Method), "cprune:budget=uniform", "cprune:similarity=units:domain-floor=0.5"]
    found = compare(tiny("olmoe"), tmp_path / "out", methods, [0.2, 0.4], config_of(texts))
    assert passes == [1]
    assert [(row.method, row.ratio) for row in found.rows] == [(name, r) for name in methods for r in (0.2, 0.4)]
    for row in found.rows:
        assert row.refused is None and row.quality.perplexity.low <= row.quality.perplexity.high
        assert row.removed == pytest.approx({0.2: 9, 0.4: 18}[row.ratio] / 45)
    written = json.loads((tmp_path / "out/compare.json").read_text())
    assert len(written["rows"]) == len(found.rows) and sum(row["pareto"] for row in written["rows"]) in (1, 2)
    assert written["whole"]["perplexity"]["value"] == found.whole.perplexity.value
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.json", "compare.svg"]
    compare(tiny("olmoe"), tmp_path / "out", ["reap"], [0.3], config_of(texts))
    assert passes == [1]  # the statistics are still there


def test_quality_is_that_of_the_pruned_model(tiny: Tiny, tmp_path: Path, texts: str) -> None:
    config = config_of(texts, method="reap", ratio=0.4, verify=False, repair="none")
    report = pipeline.prune(tiny("qwen3_moe"), tmp_path / "pruned", config)
    found = compare(tiny("qwen3_moe"), tmp_path / "out", ["reap"], [0.4], config)
    assert found.whole.perplexity.value == pytest.approx(report.perplexity_before.mean, rel=1e-4)
    assert found.rows[0].quality.perplexity.value == pytest.approx(report.perplexity_after.mean, rel=1e-4)
    assert found.rows[0].removed == pytest.approx(report.removed_share)


def test_command_line_prints_the_table(
    tiny: Tiny, tmp_path: Path, texts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--calibration", texts, "--evaluate", texts, "--tokens", "256", "--evaluate-tokens", "128"]
    options += ["--seq-len", "32", "--dtype", "float32", "--methods", "reap,cprune-paper:slack=1", "--ratios", "0.25"]
    assert main(["compare", str(tiny("olmoe")), "-o", str(tmp_path / "out"), *options]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "reap 24.4%" in out and "refused" in out
    assert "cprune-paper:slack=1 at 0.25: method cprune-paper must have slack 0" in out
    assert main(["compare", str(tiny("olmoe")), "-o", str(tmp_path / "out"), *options[:-1], "a,b"]) == 2
    assert "ratios must be numbers with commas between them, got 'a,b'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("methods", "ratios", "changes", "match"),
    [
        (["reap"], [0.25], {"evaluate": "none"}, "compare must have a text to evaluate on"),
        ([], [0.25], {}, "at least one method and one ratio"),
        (["best"], [0.25], {}, "method must be one of"),
        (["reap"], [1.5], {}, "ratio must lie in"),
        (["reap:tokens=9"], [0.25], {}, "options that only deciding depends on, got 'reap:tokens=9'"),
        (["reap:colour=9"], [0.25], {}, "options that only deciding depends on"),
        (["reap:slack"], [0.25], {}, "options that only deciding depends on"),
        (["reap", "hc-smoe"], [0.25], {"calibration": "none"}, "method reap must have calibration text"),
        (["cprune"], [0.95], {}, "ratio 0.95 must leave every layer"),
        (["cprune"], [0.2], {"action": "merge"}, "compare must have --action prune, .*, got merge"),
        (["cprune:action=merge"], [0.2], {}, "options that only deciding depends on"),
    ],
)
def test_request_that_makes_no_sense_is_refused_before_any_work(
    tiny: Tiny, tmp_path: Path, texts: str, monkeypatch: pytest.MonkeyPatch, methods: list[str], ratios: list[float],
    changes: dict[str, object], match: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "observe", None)
    with refuses(match):
        compare(tiny("olmoe"), tmp_path / "out", methods, ratios, config_of(texts).replace(**changes))


def test_method_without_its_statistics_is_a_row_that_names_the_option(tiny: Tiny, tmp_path: Path, texts: str) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(WORDS[i:]), "domain": "a"}) + "\n" for i in range(6)))
    config = config_of(texts).replace(calibration=str(path))
    found = compare(tiny("olmoe"), tmp_path / "out", ["mop", "reap"], [0.2], config)
    assert "method mop must have text of at least 3 domains, got 1" in found.rows[0].refused
    assert "--calibration" in found.rows[0].refused and found.rows[1].refused is None


def test_folder_inside_the_model_is_refused(tiny: Tiny, texts: str) -> None:
    with refuses("the (comparison|work folder) must (be written|lie) outside MODEL"):
        compare(tiny("olmoe"), tiny("olmoe") / "out", ["reap"], [0.2], config_of(texts))
    assert not (tiny("olmoe") / "out").exists()


def test_options_of_a_method() -> None:
    got = variant("cprune:budget=uniform:cluster-distance=0.25", 0.3, PruneConfig(seed=4))
    assert got == PruneConfig(seed=4, ratio=0.3, method="cprune", budget="uniform", cluster_distance=0.25)
