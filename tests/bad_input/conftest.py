"""Fixtures of the refusals."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from cprune.run import main
from tests.bad_input.refusal import SHORT, Refusal
from tests.pruned import WORDS
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, draw = tmp_path_factory.mktemp("text") / "text.jsonl", random.Random(0)
    path.write_text("".join(json.dumps({"text": " ".join(draw.choices(WORDS, k=40))}) + "\n" for _ in range(60)))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """13 experts a layer, top-2, 3 layers, in two shards."""
    return write_tiny("qwen3_moe", tmp_path / "model", shards=2)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="module")
def good_plan(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The plan of `model`, as JSON values."""
    folder = tmp_path_factory.mktemp("plan")
    source = write_tiny("qwen3_moe", folder / "model", shards=2)
    assert main(["plan", str(source), "-o", str(folder / "plan.json"), "--calibration", "none", *SHORT]) == 0
    return json.loads((folder / "plan.json").read_text())


@pytest.fixture
def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    return Refusal(tmp_path, capsys)
