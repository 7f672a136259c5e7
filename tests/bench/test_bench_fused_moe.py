"""The bench of the experts forward runs, says what it timed, and times nothing that is wrong."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

Run = Callable[..., subprocess.CompletedProcess[str]]
MODELS = {"mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v2-lite", "deepseek-v3"}


def test_every_model(bench: Path, run: Run) -> None:
    done = run("bench_fused_moe.py", "--model", ",".join(MODELS), "--tokens", "1,9", "--repeats", "1", "--experts", "4")
    assert done.returncode == 0, done.stderr
    assert torch.cuda.is_available() or "not of the kernels" in done.stdout
    with (bench / "results" / "fused_moe.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(MODELS) and {row["model"] for row in rows} == MODELS
    for row in rows:
        assert row["date"] and row["device"] and row["best alternative"]
        assert all(float(row[name]) > 0 for name in ("us", "TFLOP/s", "GB/s"))


def test_a_wrong_result_is_not_timed(bench: Path, run: Run) -> None:
    source = (bench / "bench_fused_moe.py").read_text()
    wrong = source.replace("close(moe_forward(*tensors), expected)", "close(2 * moe_forward(*tensors), expected)", 1)
    assert wrong != source
    (bench / "bench_fused_moe.py").write_text(wrong)
    done = run("bench_fused_moe.py", "--model", "qwen3-30b-a3b", "--tokens", "9", "--repeats", "1")
    assert done.returncode != 0 and "nothing was timed" in done.stderr
    assert not (bench / "results").exists()


def test_an_unknown_model_is_refused(bench: Path, run: Run) -> None:
    done = run("bench_fused_moe.py", "--model", "gpt-2")
    assert done.returncode == 2 and "got gpt-2" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="times the CPU")
def test_the_observing_operator_on_the_cpu(bench: Path, run: Run) -> None:
    done = run("bench_fused_moe.py", "--tokens", "2", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert "moe_observe" in done.stdout and (bench / "results" / "fused_moe.json").exists()
