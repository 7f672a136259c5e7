"""An interpreter of Gluon kernels for Hopper, which Triton 3.8 has none of: their source runs on the CPU in numpy.

The front end is Gluon's own (walker.py), so types, layouts and what it refuses are the compiler's; what it asks the
compiler's builder for, numpy computes at once (builder.py), on the repaired interpreter of `tests.device.shim`. The
CTAs of a launch run side by side, and so do warps that specialise: they take turns (scheduler.py), and each runs until
it waits. Shared memory holds its bytes where the layout puts them (layouts.py, shared.py), at first poison.

`KernelError` is raised by
- a copy, product or store whose place is used before somebody has waited for it, or whose result is;
- two tasks that use the same place, one of them to write it, with no barrier between them: a race, whoever is first;
- threads that write what is then read asynchronously without a fence;
- bytes that a barrier does not expect, arrivals beyond its count, tasks that all wait.
What is asynchronous does its work as late as it may: a copy reads memory when its barrier is looked at, and a store
reaches memory when it is waited for as a whole, or at the end of the launch.
"""

from __future__ import annotations

from triton.experimental.gluon._runtime import GluonJITFunction

from tests.device.gluon.scheduler import HangError, KernelError, RaceError
from tests.device.gluon.walker import launch

__all__ = ["HangError", "KernelError", "RaceError", "install"]


def install() -> None:
    """Interpret every Gluon kernel that this process launches; `shim.install` comes first."""
    GluonJITFunction.run = launch
