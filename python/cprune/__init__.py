"""cprune: smaller Mixture-of-Experts checkpoints that route the same way.

>>> from cprune import PruneConfig, prune, load
>>> report = prune("Qwen/Qwen3-30B-A3B", "out", PruneConfig(ratio=0.25, calibration="task.jsonl"))
>>> model = load("out")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cprune.config import PruneConfig
from cprune.errors import CpruneError
from cprune.plan import PrunePlan

if TYPE_CHECKING:
    from cprune.hf import load
    from cprune.pipeline import prune

__all__ = ["CpruneError", "PruneConfig", "PrunePlan", "load", "prune"]

_LATE = {"load": "cprune.hf", "prune": "cprune.pipeline"}  # these import transformers, which takes seconds


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
