"""What a kernel can do wrong while it is executed; every message names the thread and the instruction."""

from __future__ import annotations


class ExecutionError(RuntimeError):
    """The kernel did something that is undefined, or can never finish, on a GPU."""


class AccessError(ExecutionError):
    """An address outside the registered memory, a misaligned one, or a register that was never written."""


class RaceError(ExecutionError):
    """Two warps used the same shared memory, one of them to write, with nothing to order them."""


class HangError(ExecutionError):
    """Threads wait for something that no thread can bring about any more."""
