"""The bench of decoding runs on the bundled model, keeps its rows, and times nothing that is wrong."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cprune_kernels import backend

Run = Callable[..., subprocess.CompletedProcess[str]]
MODEL = Path(__file__).parents[2] / "examples" / "tiny-moe"
SMALL = ("bench_decode.py", "--models", str(MODEL), "--tokens", "2", "--repeats", "3", "--seconds", "1")


def test_rows(bench: Path, run: Run) -> None:
    done = run(*SMALL, "--batches", "1,5")
    assert done.returncode == 0, done.stderr
    rows = json.loads((bench / "results" / f"decode-{backend()}.json").read_text())["rows"]
    assert [(row["dtype"], row["batch"]) for row in rows] == [
        ("bfloat16", 1), ("bfloat16", 5), ("float32", 1), ("float32", 5)
    ]  # fmt: skip
    for row in rows:
        best = min(row[f"{way} ms"] for way in ("eager", "grouped_mm", "batched_mm"))
        assert row["x transformers"] == pytest.approx(best / row["cprune ms"])


def test_wrong_logits_end_it(bench: Path, run: Run) -> None:
    source = (bench / "bench_decode.py").read_text()
    wrong = source.replace("    error = float(", "    got += 1\n    error = float(", 1)
    assert wrong != source
    (bench / "bench_decode.py").write_text(wrong)
    done = run(*SMALL, "--batches", "1")
    assert done.returncode == 1 and "nothing was timed" in done.stderr and not (bench / "results").exists()
