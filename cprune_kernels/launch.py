"""One launch of a Triton kernel as data: the same object runs on a GPU, in the interpreter, and compiled in tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that its launch needs; nothing about it is decided later."""

    kernel: Any  # a triton.jit function
    grid: tuple[int, ...]
    args: Mapping[str, Any]  # run-time arguments by name: tensors, TensorDescriptors, ints, floats, None
    constants: Mapping[str, Any] = field(default_factory=dict)  # tl.constexpr by name
    num_warps: int = 4
    num_stages: int = 2
    early: bool = False  # may start while the launch before it runs; it waits itself (capability >= 90)

    def run(self) -> None:
        """Enqueue on the current stream of the tensors' device (the caller makes that device current)."""
        self.kernel[self.grid](**self.args, **self.constants, **self.options)

    @property
    def options(self) -> dict[str, int | bool]:
        """What the compiler takes beside arguments."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {**options, "launch_pdl": True} if self.early else options
