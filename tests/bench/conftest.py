"""A bench as a user runs it: a copy of the folder, whose results land beside it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    for path in BENCH.glob("*.py"):
        shutil.copy(path, tmp_path)
    return tmp_path


@pytest.fixture
def run(bench: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """run(script, *arguments): the ended process, whatever its status."""

    def ended(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, bench / script, *arguments], capture_output=True, text=True, cwd=bench)

    return ended
