"""The bench of attention runs, keeps its rows, and times nothing that is wrong."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cprune_kernels import backend

Run = Callable[..., subprocess.CompletedProcess[str]]
SMALL = ("bench_attention.py", "--shapes", "2x33,1x70", "--depth", "16", "--repeats", "3")


def test_rows(bench: Path, run: Run) -> None:
    done = run(*SMALL)
    assert done.returncode == 0, done.stderr
    rows = json.loads((bench / "results" / f"attention-{backend()}.json").read_text())["rows"]
    assert [(row["B"], row["S"]) for row in rows] == [(2, 33), (1, 70)]
    for row in rows:
        assert row["x torch"] == pytest.approx(row["torch ms"] / row["ours ms"])
        assert 0 < row["x error"] <= 2


def test_a_wrong_attention_ends_it(bench: Path, run: Run) -> None:
    source = (bench / "bench_attention.py").read_text()
    wrong = source.replace("lambda: causal_attention(*drawn)", "lambda: causal_attention(*drawn) * 1.1")
    assert wrong != source
    (bench / "bench_attention.py").write_text(wrong)
    done = run(*SMALL)
    assert done.returncode == 1 and "nothing was timed" in done.stderr and not (bench / "results").exists()
