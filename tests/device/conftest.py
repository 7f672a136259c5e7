"""Kernels on a device: a GPU, or Triton's interpreter on the CPU (TRITON_INTERPRET=1 in a process of its own)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cprune_kernels.picker import A100, B200, H100, Arch
from tests.device import gluon, shim

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ABSENT = "needs a GPU, or the interpreter: TRITON_INTERPRET=1 pytest tests/device"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not INTERPRETED and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=ABSENT))


@pytest.fixture(autouse=True, scope="session")
def repaired_interpreter() -> None:
    if INTERPRETED:
        shim.install()
        gluon.install()


@pytest.fixture(autouse=True)
def poisoned_empty() -> Iterator[None]:
    with shim.poisoned_empty():
        yield


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(scope="session")
def arch() -> Arch:
    """The GPU that is present; under the interpreter the one whose kernels use most of what Triton has."""
    if INTERPRETED:
        return H100
    major, _ = torch.cuda.get_device_capability()
    return {8: A100, 9: H100, 10: B200}[major]
