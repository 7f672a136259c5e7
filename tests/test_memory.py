from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from cprune.memory import cache_few_kernels

CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
GIVEN_BACK = """
import sys, threading
from cprune.memory import return_memory, share_heap
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def work():
    both.wait()
    held = [bytes(50_000) for _ in range(1000)]
    both.wait()
if sys.argv[1] == "shared":
    share_heap()
bytes(30 << 20)  # glibc keeps more of what is free after so large a piece
both = threading.Barrier(2)
before = resident()
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
return_memory()
print(resident() - before)
"""


def kept(how: str) -> int:
    """Bytes that a process keeps of 100 MB that two threads have freed."""
    return int(subprocess.run([sys.executable, "-c", GIVEN_BACK, how], capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's heaps")
def test_what_threads_have_freed_is_given_back() -> None:
    assert kept("shared") < 5 << 20 < kept("apart")


def test_kernels_are_few_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, expected in (("", "8"), ("100", "100")):
        monkeypatch.setenv(CAPACITY, given)
        if not given:
            monkeypatch.delenv(CAPACITY)
        cache_few_kernels()
        assert os.environ[CAPACITY] == expected
