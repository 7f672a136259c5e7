"""The bench of the statistics runs, says what it timed, and times nothing that is wrong."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_every_model(bench: Path, run: Run) -> None:
    done = run("bench_stats.py", "--tokens", "9,256", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert torch.cuda.is_available() or "not of the kernels" in done.stdout
    with (bench / "results" / "stats.csv").open() as file:
        rows = list(csv.DictReader(file))
    sums = [row for row in rows if row["what"] == "expert_statistics"]
    assert len(sums) == 4 * 2 and all(row["date"] and row["device"] and float(row["us"]) > 0 for row in rows)
    assert all(float(row["% of forward"]) < 0.1 for row in sums if row["T"] == "256")


def test_a_wrong_result_is_not_timed(bench: Path, run: Run) -> None:
    source = (bench / "bench_stats.py").read_text()
    wrong = source.replace("lambda: expert_statistics(*inputs,", "lambda: expert_statistics(*inputs[:4], None,", 1)
    assert wrong != source
    (bench / "bench_stats.py").write_text(wrong)
    done = run("bench_stats.py", "--model", "qwen3-30b-a3b", "--tokens", "37", "--repeats", "1")
    assert done.returncode != 0 and "nothing was timed" in done.stderr
    assert not (bench / "results").exists()


def test_an_unknown_model_is_refused(bench: Path, run: Run) -> None:
    done = run("bench_stats.py", "--model", "gpt-2")
    assert done.returncode == 2 and "got gpt-2" in done.stderr
