"""Memory that is free but still counted as this process's."""

from __future__ import annotations

import contextlib
import ctypes
import os

M_ARENA_MAX = -8  # of malloc.h


def share_heap() -> None:
    """Let all threads take memory from one heap: what is free at the end of another, `return_memory` leaves there.

    To be called before there are threads.
    """
    with contextlib.suppress(AttributeError):  # only glibc has a heap for every thread, and this against it
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def cache_few_kernels() -> None:
    """Let oneDNN keep a few of the kernels that it compiles for every shape, not a thousand, a tenth of a gigabyte.

    To be called before its first product; what the environment says already stays.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8")


def return_memory() -> None:
    """Give freed memory back to the system, so that what is left behind does not add to the peak of what follows."""
    with contextlib.suppress(AttributeError):  # only glibc keeps it, and has this to make it let go
        ctypes.CDLL(None).malloc_trim(0)
