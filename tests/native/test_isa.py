"""Which instructions the native kernels use: the best of the processor, or less where CPRUNE_MAX_ISA says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cprune_kernels
from cprune_kernels.native import ISAS

if cprune_kernels.backend() == "reference":
    pytest.skip("the native kernels were not built", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
SUPPORTED = torch.ops.cprune_native.isas().split()


def backend(most: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import cprune_kernels; print(cprune_kernels.backend())"],
        env={**os.environ, "CPRUNE_MAX_ISA": most},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_names_are_those_of_the_library() -> None:
    assert [name for name in ISAS if name in SUPPORTED] == SUPPORTED


@pytest.mark.parametrize("most", ["", "portable", "avx512", "amx_bf16"])
def test_the_best_up_to_the_one_named(most: str) -> None:
    allowed = [name for name in SUPPORTED if ISAS.index(name) <= ISAS.index(most or ISAS[-1])]
    assert backend(most).stdout.strip() == allowed[-1]


def test_other_names_are_refused() -> None:
    run = backend("avx1024")
    assert run.returncode != 0
    assert "CPRUNE_MAX_ISA must be one of portable, avx2, avx512, avx512_bf16, amx_bf16, got 'avx1024'" in run.stderr
