"""bench/roofline.py runs, says that it is analysis, and holds the goals that it says hold."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def roofline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("common", "roofline"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("roofline")
    monkeypatch.setattr(sys.modules["common"], "ROWS", tmp_path)
    return module


def rows(module: ModuleType, capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> list[dict]:
    module.main(arguments)
    assert capsys.readouterr().out.startswith("Analysis, not measurement: ")
    [file] = folder.glob("roofline*.json")
    return json.loads(file.read_text())["rows"]


def test_decode_holds_its_goal(roofline: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = rows(roofline, capsys, tmp_path, "--tokens", "16,256")
    forward = [row for row in table if row["what"] == "forward"]
    assert {row["model"] for row in forward} == set(roofline.FORWARD)
    assert len(forward) == 2 * 2 * len(roofline.FORWARD)
    for row in forward:
        assert 1 <= row["x floor"] <= 1.15 and row["goal"] == "1.15: holds"
        parts = row["group us"] + row["gate_up us"] + row["down us"] + row["combine us"]
        assert parts == pytest.approx(row["modelled us"])
        assert row["modelled us"] >= row["floor us"]


def test_prefill_holds_its_goal(roofline: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = rows(roofline, capsys, tmp_path, "--tokens", "4096,16384")
    forward = [row for row in table if row["what"] == "forward"]
    assert len(forward) == 2 * 2 * len(roofline.FORWARD)
    for row in forward:
        assert 1 <= row["x floor"] <= 1.25 and row["goal"] == "1.25: holds"


def test_one_token_takes_two_launches(roofline: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = rows(roofline, capsys, tmp_path, "--tokens", "1", "--models", "deepseek-v2-lite")
    for row in (row for row in table if row["what"] == "forward"):
        assert row["goal"] == "1.15: holds" and "group us" not in row and "combine us" not in row
        assert row["gate_up us"] + row["down us"] == pytest.approx(row["modelled us"])


def test_a_goal_that_is_missed_is_said(
    roofline: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    table = rows(roofline, capsys, tmp_path, "--arch", "B200", "--tokens", "1", "--models", "qwen3-30b-a3b")
    [full, half] = [row for row in table if row["what"] == "forward"]
    assert full["goal"] == half["goal"] == "1.15: missed"  # launches and latencies weigh against 10 us of bytes
    assert (full["experts"], half["experts"]) == (128, 64)


def test_merging_pairs_keeps_the_rows_that_do_not_meet(roofline: ModuleType) -> None:
    """The expected number of distinct pairs that two of eight experts fall into, by listing."""
    meetings = [len({i // 2, j // 2}) for i in range(8) for j in range(i)]
    load = roofline.merged_load(8, 2, 100)
    assert load.pairs == pytest.approx(100 * sum(meetings) / len(meetings), rel=1e-6)


def test_an_unknown_model_is_refused(roofline: ModuleType) -> None:
    with pytest.raises(SystemExit, match="must be among .*got gpt-2"):
        roofline.main(["--models", "gpt-2"])


def test_the_gram_holds_its_goals(roofline: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = [row for row in rows(roofline, capsys, tmp_path, "--tokens", "1") if row["what"] == "gram"]
    assert {row["model"] for row in table} == set(roofline.MODELS)
    assert all(row["x floor"] >= 1 for row in table)
    by_layer = {row["model"]: row for row in table if not row["layers"].startswith("1 x")}
    assert by_layer["deepseek-v3"]["floor us"] / 58e3 == pytest.approx(7.52, rel=0.01)  # 22.55 GB at 3.0 TB/s
    assert by_layer["deepseek-v3"]["x floor"] <= 1.05
    assert by_layer["qwen3-30b-a3b"]["x floor"] <= 1.05
    assert by_layer["qwen3-30b-a3b"]["modelled us"] <= 20.3e3
