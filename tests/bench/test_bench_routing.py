"""The bench of routing runs, says what it timed, and times nothing that is wrong."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_every_model(bench: Path, run: Run) -> None:
    done = run("bench_routing.py", "--tokens", "1,9", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert torch.cuda.is_available() or "not of the kernels" in done.stdout
    with (bench / "results" / "routing.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 2 * 2
    assert {row["what"] for row in rows} == {"route", "group_tokens"}
    assert all(row["date"] and row["device"] and float(row["us"]) > 0 for row in rows)


def test_a_wrong_result_is_not_timed(bench: Path, run: Run) -> None:
    source = (bench / "bench_routing.py").read_text()
    wrong = source.replace("group_tokens(routing.index, kept, BLOCK_M)", "group_tokens(routing.index, kept, 16)", 1)
    assert wrong != source
    (bench / "bench_routing.py").write_text(wrong)
    done = run("bench_routing.py", "--model", "qwen3-30b-a3b", "--tokens", "37", "--repeats", "1")
    assert done.returncode != 0 and "nothing was timed" in done.stderr
    assert not (bench / "results").exists()


def test_an_unknown_model_is_refused(bench: Path, run: Run) -> None:
    done = run("bench_routing.py", "--model", "gpt-2")
    assert done.returncode == 2 and "got gpt-2" in done.stderr
