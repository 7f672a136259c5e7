"""The bench of the experts forward on a CPU runs, keeps its rows, and times nothing that is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
SHAPES = {"OLMoE", "Qwen3-30B-A3B", "Qwen3-30B-A3B half", "DeepSeek-V2-Lite", "Mixtral quarter"}


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A copy, whose results land beside it."""
    for name in ("bench_fused_moe_cpu.py", "bench_fused_moe.py", "common.py"):
        shutil.copy(BENCH / name, tmp_path)
    return tmp_path


def run(bench: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, bench / "bench_fused_moe_cpu.py", "--shrink", "16", "--repeats", "3", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=bench)


def rows(bench: Path) -> list[dict[str, object]]:
    return json.loads((bench / "results" / "fused_moe_cpu.json").read_text())["rows"]


def test_every_shape(bench: Path) -> None:
    done = run(bench, "--tokens", "1,9")
    assert done.returncode == 0, done.stderr
    found = rows(bench)
    assert [row["T"] for row in found] == [1, 9] * len(SHAPES) and {row["shape"] for row in found} == SHAPES
    for row in found:
        assert 0 <= row["x error"] <= 2 and row["best transformers"] in ("eager", "grouped_mm", "batched_mm")
        best = min(row[f"{way} ms"] for way in ("eager", "grouped_mm", "batched_mm") if f"{way} ms" in row)
        assert row["x transformers"] == pytest.approx(best / row["cprune ms"])
        assert all(row[name] > 0 for name in ("GB/s", "GFLOP/s", "% of floor", "read GB/s", "GEMM GFLOP/s"))


def test_a_later_run_replaces_its_own_rows(bench: Path) -> None:
    assert run(bench, "--shapes", "OLMoE", "--tokens", "1,9").returncode == 0
    before = rows(bench)
    assert run(bench, "--shapes", "Mixtral quarter", "--tokens", "9").returncode == 0
    assert run(bench, "--shapes", "OLMoE", "--tokens", "9").returncode == 0
    after = rows(bench)
    assert [(row["shape"], row["T"]) for row in after] == [("OLMoE", 1), ("OLMoE", 9), ("Mixtral quarter", 9)]
    assert after[0] == before[0] and after[1]["cprune ms"] != before[1]["cprune ms"]


def test_a_wrong_result_is_not_timed(bench: Path) -> None:
    source = (bench / "bench_fused_moe_cpu.py").read_text()
    wrong = source.replace("error(moe_forward(*tensors), expected)", "error(1.1 * moe_forward(*tensors), expected)", 1)
    assert wrong != source
    (bench / "bench_fused_moe_cpu.py").write_text(wrong)
    done = run(bench, "--shapes", "OLMoE", "--tokens", "9")
    assert done.returncode != 0 and "nothing was timed" in done.stderr
    assert not (bench / "results").exists()


def test_an_unknown_shape_is_refused(bench: Path) -> None:
    done = run(bench, "--shapes", "GPT-2")
    assert done.returncode == 2 and "got GPT-2" in done.stderr
