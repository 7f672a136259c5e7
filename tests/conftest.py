"""Fixtures of the whole suite."""

from __future__ import annotations

import functools
import json
import random
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


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of two domains."""
    from tests.pruned import WORDS

    path, draw = tmp_path_factory.mktemp("text") / "text.jsonl", random.Random(0)
    lines = [{"text": " ".join(draw.choices(WORDS, k=40)), "domain": ("plain", "other")[i % 2]} for i in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def run(text: Path) -> Callable[..., Path]:
    """`run(model, out, *options)`: `python -m cprune.run` in this process, on little text; returns out."""
    from cprune.run import Run, main
    from tests.pruned import EXACT, SHORT

    def call(model: Path, out: Path, *options: str) -> Path:
        exact = () if "--repair" in options else EXACT
        given = [str(model), str(out), *SHORT, *exact, "--calibration", str(text), "--evaluate", str(text), *options]
        assert main(given, (Run,)) == 0
        return out

    return call


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of every family; nobody may change them."""
    from tests.pruned import quieter_last_layer
    from tests.tiny import FAMILIES, write_tiny

    folder = tmp_path_factory.mktemp("models")
    return {family: quieter_last_layer(write_tiny(family, folder / family)) for family in FAMILIES}


@pytest.fixture(scope="session")
def outputs(
    originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, run: Callable[..., Path]
) -> Callable[[str, str], Path]:
    """A family pruned with a budget, when a test first asks for it; nobody may change it."""
    from tests.pruned import share

    folder = tmp_path_factory.mktemp("outputs")

    @functools.cache
    def pruned(family: str, budget: str) -> Path:
        options = ("--budget", budget, "--ratio", str(share(family, budget)))
        return run(originals[family], folder / f"{family}-{budget}", *options)

    return pruned


@pytest.fixture(autouse=True, scope="module")
def sigterm_handler() -> Iterator[None]:
    """The command line sets a SIGTERM handler; it is put back after the tests that called it in this process."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
