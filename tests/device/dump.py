"""Outputs of cases from the interpreter, for tests that compile: `python -m tests.device.dump OUT`.

For every line `module/case@arch` that comes in, their outputs are saved to OUT and the line goes out again.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated: before any import of one

import torch

from cprune_kernels import picker
from tests.cases import case_modules
from tests.device import gluon, shim


def outputs(case: str) -> dict[str, torch.Tensor] | str:
    """By name, of `module/case@arch`; or what went wrong, so that one broken case hides no other."""
    path, _, arch = case.partition("@")
    name, _, entry = path.partition("/")
    try:
        launches, tensors = case_modules()[name].EXECUTED[entry](getattr(picker, arch))
        for launch in launches:
            launch.run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


if __name__ == "__main__":
    shim.install()
    gluon.install()
    torch.set_num_threads(1)
    with shim.poisoned_empty():
        for line in sys.stdin:
            torch.save(outputs(line.rstrip("\n")), sys.argv[1])
            print(line, end="", flush=True)
