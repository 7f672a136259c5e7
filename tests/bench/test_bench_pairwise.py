"""The bench of the pairwise operators runs, says what it timed, and times nothing that is wrong."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

Run = Callable[..., subprocess.CompletedProcess[str]]
MODELS = {"mixtral-8x7b", "qwen3-30b-a3b"}


def test_every_way_is_timed(bench: Path, run: Run) -> None:
    done = run("bench_pairwise.py", "--model", ",".join(MODELS), "--fraction", "1e-4", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert torch.cuda.is_available() or "not of the kernels" in done.stdout
    with (bench / "results" / "pairwise.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} > MODELS
    assert {"pairwise_gram", "8 windows", "library", "pairs", "pairwise_cka"} <= {row["what"] for row in rows}
    for row in rows:
        assert row["date"] and row["device"]
        assert all(float(row[name]) > 0 for name in ("us", "TFLOP/s", "GB/s"))


def test_a_wrong_result_is_not_timed(bench: Path, run: Run) -> None:
    source = (bench / "bench_pairwise.py").read_text()
    wrong = source.replace('"pairwise_gram": pairwise_gram', '"pairwise_gram": lambda x: 2 * pairwise_gram(x)', 1)
    assert wrong != source
    (bench / "bench_pairwise.py").write_text(wrong)
    done = run("bench_pairwise.py", "--model", "mixtral-8x7b", "--fraction", "1e-5", "--repeats", "1")
    assert done.returncode != 0 and "nothing was timed" in done.stderr
    assert not (bench / "results").exists()


def test_an_unknown_model_is_refused(bench: Path, run: Run) -> None:
    done = run("bench_pairwise.py", "--model", "gpt-2")
    assert done.returncode == 2 and "got gpt-2" in done.stderr
