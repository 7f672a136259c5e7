"""What the checks of the compiled kernels run: one module per kernel file, each found by being here.

A module may define
- `EXECUTED: dict[str, Callable[[Arch], tuple[list[Launch], dict[str, Tensor]]]]`: seeded launches on CPU tensors and
  their outputs by name; run in the interpreter and as compiled PTX, which must agree (tests/ptx/test_kernels.py);
- `COMPILED: dict[str, Callable[[Arch], list[Launch]]]`: launches of production size on meta tensors; compiled for every
  architecture and held to what their machine code must look like (tests/aot/test_gates.py);
- `GATES: dict[str, Gate]`: by the name of a kernel or of a COMPILED case, where `Gate()` is not what holds.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def case_modules() -> dict[str, ModuleType]:
    """{name: module} of every file in this folder, by name."""
    names = sorted(found.name for found in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def case_names(table: str) -> list[str]:
    """`module/case` of every entry of that table ("EXECUTED" or "COMPILED")."""
    return [f"{name}/{case}" for name, module in case_modules().items() for case in getattr(module, table, {})]
