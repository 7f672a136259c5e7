"""The bench of routing runs, says what it timed, and times nothing that is wrong."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A copy, whose results land beside it."""
    for name in ("bench_routing.py", "common.py"):
        shutil.copy(BENCH / name, tmp_path)
    return tmp_path


def run(bench: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, bench / "bench_routing.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=bench)


def test_every_model(bench: Path) -> None:
    done = run(bench, "--tokens", "1,9", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert torch.cuda.is_available() or "not of the kernels" in done.stdout
    with (bench / "results" / "routing.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 2 * 2
    assert {row["what"] for row in rows} == {"route", "group_tokens"}
    assert all(row["date"] and row["device"] and float(row["us"]) > 0 for row in rows)


def test_a_wrong_result_is_not_timed(bench: Path) -> None:
    source = (bench / "bench_routing.py").read_text()
    wrong = source.replace("group_tokens(routing.index, kept, BLOCK_M)", "group_tokens(routing.index, kept, 16)", 1)
    assert wrong != source
    (bench / "bench_routing.py").write_text(wrong)
    done = run(bench, "--model", "qwen3-30b-a3b", "--tokens", "37", "--repeats", "1")
    assert done.returncode != 0 and "nothing was timed" in done.stderr
    assert not (bench / "results").exists()


def test_an_unknown_model_is_refused(bench: Path) -> None:
    done = run(bench, "--model", "gpt-2")
    assert done.returncode == 2 and "got gpt-2" in done.stderr
