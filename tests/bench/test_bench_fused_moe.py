"""The bench of the experts forward runs, says what it timed, and times nothing that is wrong."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
MODELS = {"mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v2-lite", "deepseek-v3"}


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A copy, whose results land beside it."""
    for name in ("bench_fused_moe.py", "common.py"):
        shutil.copy(BENCH / name, tmp_path)
    return tmp_path


def run(bench: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, bench / "bench_fused_moe.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=bench)


def test_every_model(bench: Path) -> None:
    done = run(bench, "--model", ",".join(MODELS), "--tokens", "1,9", "--repeats", "1", "--experts", "4")
    assert done.returncode == 0, done.stderr
    assert torch.cuda.is_available() or "not of the kernels" in done.stdout
    with (bench / "results" / "fused_moe.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(MODELS) and {row["model"] for row in rows} == MODELS
    for row in rows:
        assert row["date"] and row["device"] and row["best alternative"]
        assert all(float(row[name]) > 0 for name in ("us", "TFLOP/s", "GB/s"))


def test_a_wrong_result_is_not_timed(bench: Path) -> None:
    source = (bench / "bench_fused_moe.py").read_text()
    wrong = source.replace("close(moe_forward(*tensors), expected)", "close(2 * moe_forward(*tensors), expected)", 1)
    assert wrong != source
    (bench / "bench_fused_moe.py").write_text(wrong)
    done = run(bench, "--model", "qwen3-30b-a3b", "--tokens", "9", "--repeats", "1")
    assert done.returncode != 0 and "nothing was timed" in done.stderr
    assert not (bench / "results").exists()


def test_an_unknown_model_is_refused(bench: Path) -> None:
    done = run(bench, "--model", "gpt-2")
    assert done.returncode == 2 and "got gpt-2" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="times the CPU")
def test_the_observing_operator_on_the_cpu(bench: Path) -> None:
    done = run(bench, "--tokens", "2", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert "moe_observe" in done.stdout and (bench / "results" / "fused_moe.json").exists()
