"""The bench of the pairwise operators runs, says what it timed, and times nothing that is wrong."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
MODELS = {"mixtral-8x7b", "qwen3-30b-a3b"}


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A copy, whose results land beside it."""
    for name in ("bench_pairwise.py", "common.py"):
        shutil.copy(BENCH / name, tmp_path)
    return tmp_path


def run(bench: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, bench / "bench_pairwise.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=bench)


def test_every_way_is_timed(bench: Path) -> None:
    done = run(bench, "--model", ",".join(MODELS), "--fraction", "1e-4", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert torch.cuda.is_available() or "not of the kernels" in done.stdout
    with (bench / "results" / "pairwise.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} > MODELS
    assert {"pairwise_gram", "8 windows", "library", "pairs", "pairwise_cka"} <= {row["what"] for row in rows}
    for row in rows:
        assert row["date"] and row["device"]
        assert all(float(row[name]) > 0 for name in ("us", "TFLOP/s", "GB/s"))


def test_a_wrong_result_is_not_timed(bench: Path) -> None:
    source = (bench / "bench_pairwise.py").read_text()
    wrong = source.replace('"pairwise_gram": pairwise_gram', '"pairwise_gram": lambda x: 2 * pairwise_gram(x)', 1)
    assert wrong != source
    (bench / "bench_pairwise.py").write_text(wrong)
    done = run(bench, "--model", "mixtral-8x7b", "--fraction", "1e-5", "--repeats", "1")
    assert done.returncode != 0 and "nothing was timed" in done.stderr
    assert not (bench / "results").exists()


def test_an_unknown_model_is_refused(bench: Path) -> None:
    done = run(bench, "--model", "gpt-2")
    assert done.returncode == 2 and "got gpt-2" in done.stderr
