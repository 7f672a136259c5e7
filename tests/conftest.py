"""Fixtures of the whole suite."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small only wait for threads on a busy machine
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`write_tiny` without its folder argument; each checkpoint is written once a session, so nobody may change it."""
    from tests.tiny import write_tiny  # imports transformers, which most processes that read this file never need

    @functools.cache
    def write(family: str, **options: object) -> Path:
        return write_tiny(family, tmp_path_factory.mktemp(family), **options)

    return write


@pytest.fixture(autouse=True, scope="module")
def sigterm_handler() -> Iterator[None]:
    """The command line sets a SIGTERM handler; it is put back after the tests that called it in this process."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
