"""The bench of the Gram on a CPU runs, keeps its rows, and times nothing that is wrong."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cprune_kernels import backend

Run = Callable[..., subprocess.CompletedProcess[str]]
SMALL = ("bench_gram_cpu.py", "--experts", "7", "--columns", "4096", "--repeats", "3")


def test_rows(bench: Path, run: Run) -> None:
    done = run(*SMALL)
    assert done.returncode == 0, done.stderr
    rows = json.loads((bench / "results" / f"gram_cpu-{backend()}.json").read_text())["rows"]
    assert [row["dtype"] for row in rows] == ["bfloat16", "float16", "float32"]
    for row in rows:
        assert row["x read"] == pytest.approx(row["read ms"] / row["ours ms"])
        assert row["x read at floor"] == pytest.approx(min(1.0, row["read ms"] / row["products ms"]))
        assert row["ours GB/s"] == pytest.approx(
            row["E"] * row["P"] * (4 if "32" in row["dtype"] else 2) / row["ours ms"] / 1e6
        )


def test_a_wrong_gram_ends_it(bench: Path, run: Run) -> None:
    source = (bench / "bench_gram_cpu.py").read_text()
    wrong = source.replace("pairwise_gram(part),", "pairwise_gram(part) * 1.001,")
    assert wrong != source
    (bench / "bench_gram_cpu.py").write_text(wrong)
    done = run(*SMALL)
    assert done.returncode == 1 and "nothing was timed" in done.stderr and not (bench / "results").exists()
