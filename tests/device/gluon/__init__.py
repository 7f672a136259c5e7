"""An interpreter of Gluon kernels for Hopper, which Triton 3.8 has none of: their source runs on the CPU in numpy.

The front end is Gluon's own (walker.py), so types, layouts and what it refuses are the compiler's; what it asks the
compiler's builder for, numpy computes at once (builder.py), on the repaired interpreter of `tests.device.shim`. Warps
that specialise take turns (machine.py), and each runs until it waits. What is asynchronous comes as late as a GPU may
let it come, so that what is used too early is wrong every time: a copy lands when somebody sees that its barrier has
completed, and until then its place holds poison; a product reads its operands when it is waited for, and so does a
store, which reaches memory when it is waited for as a whole, or at the end of the launch.

A barrier that cannot complete, bytes that no barrier expects, arrivals beyond its count, a missing fence between what
threads write and what is read asynchronously, and a result that is used before its wait raise `KernelError`.
"""

from __future__ import annotations

from triton.experimental.gluon._runtime import GluonJITFunction

from tests.device.gluon.scheduler import HangError, KernelError, RaceError
from tests.device.gluon.walker import launch

__all__ = ["HangError", "KernelError", "RaceError", "install"]


def install() -> None:
    """Interpret every Gluon kernel that this process launches; `shim.install` comes first."""
    GluonJITFunction.run = launch
