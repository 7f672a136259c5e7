"""The bench of the experts forward on a CPU runs, keeps its rows, and times nothing that is wrong."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cprune_kernels import backend

Run = Callable[..., subprocess.CompletedProcess[str]]
SMALL = ("bench_fused_moe_cpu.py", "--shrink", "16", "--repeats", "3")
SHAPES = {"OLMoE", "Qwen3-30B-A3B", "Qwen3-30B-A3B half", "DeepSeek-V2-Lite", "Mixtral quarter"}


def rows(bench: Path) -> list[dict[str, object]]:
    return json.loads((bench / "results" / f"fused_moe_cpu-{backend()}.json").read_text())["rows"]


def test_every_shape(bench: Path, run: Run) -> None:
    done = run(*SMALL, "--tokens", "1,9")
    assert done.returncode == 0, done.stderr
    found = rows(bench)
    assert [row["T"] for row in found] == [1, 9] * len(SHAPES) and {row["shape"] for row in found} == SHAPES
    for row in found:
        assert 0 <= row["x error"] <= 2 and row["best transformers"] in ("eager", "grouped_mm", "batched_mm")
        best = min(row[f"{way} ms"] for way in ("eager", "grouped_mm", "batched_mm") if f"{way} ms" in row)
        assert row["x transformers"] == pytest.approx(best / row["cprune ms"])
        assert row["x transformers at floor"] == pytest.approx(best / row["floor ms"])
        assert row["% of floor"] == pytest.approx(100 * row["floor ms"] / row["cprune ms"])
        assert all(row[name] > 0 for name in ("GB/s", "GFLOP/s", "% of floor", "read GB/s", "GEMM GFLOP/s"))


def test_a_later_run_replaces_its_own_rows(bench: Path, run: Run) -> None:
    assert run(*SMALL, "--shapes", "OLMoE", "--tokens", "1,9").returncode == 0
    path = bench / "results" / f"fused_moe_cpu-{backend()}.json"
    path.write_text(path.read_text().replace(rows(bench)[0]["date"], "2001-01-01"))
    before = rows(bench)
    assert run(*SMALL, "--shapes", "Mixtral quarter", "--tokens", "9").returncode == 0
    assert run(*SMALL, "--shapes", "OLMoE", "--tokens", "9").returncode == 0
    after = rows(bench)
    assert [(row["shape"], row["T"]) for row in after] == [("OLMoE", 1), ("OLMoE", 9), ("Mixtral quarter", 9)]
    assert after[0] == before[0] and after[1]["cprune ms"] != before[1]["cprune ms"]
    assert after[0]["date"] == "2001-01-01" != after[1]["date"]


def test_a_wrong_result_is_not_timed(bench: Path, run: Run) -> None:
    source = (bench / "bench_fused_moe_cpu.py").read_text()
    wrong = source.replace("error(moe_forward(*tensors), expected)", "error(1.1 * moe_forward(*tensors), expected)", 1)
    assert wrong != source
    (bench / "bench_fused_moe_cpu.py").write_text(wrong)
    done = run(*SMALL, "--shapes", "OLMoE", "--tokens", "9")
    assert done.returncode != 0 and "nothing was timed" in done.stderr
    assert not (bench / "results").exists()


def test_an_unknown_shape_is_refused(bench: Path, run: Run) -> None:
    done = run(*SMALL, "--shapes", "GPT-2")
    assert done.returncode == 2 and "got GPT-2" in done.stderr
