"""What a refusal is: status 2, one sentence, before any work, and nothing is left behind or lost."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from cprune.run import Run, main
from tests.pruned import LITTLE, ONE_THREAD

SHORT = ("--tokens", "256", *LITTLE)
UNBUFFERED = {**ONE_THREAD, "PYTHONUNBUFFERED": "1"}


def as_in_a_terminal() -> None:
    """A shell starts its background jobs, and so perhaps this test suite, with interrupts ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


STAGES = ("open …", "measure …", "decide …", "act …", "verify …", "evaluate …")


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Everything in a folder: kind, size and time of change."""
    stats = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*")}
    return {name: (stat.st_mode, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


class Refusal:
    """`refusal(arguments, *words)`: the command must refuse in one sentence that has the words, and leave no trace."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys

    def __call__(
        self,
        arguments: list[str | Path],
        *words: str,
        stage: str = "open",
        single: bool = False,
        leaves: tuple[str, ...] = (),
    ) -> None:
        before = snapshot(self.folder)
        self.capsys.readouterr()
        status = main([str(argument) for argument in arguments], *(() if single else ((Run,),)))
        shown = self.capsys.readouterr()
        lines = [line for line in shown.err.splitlines() if line not in STAGES]
        assert status == 2 and shown.out == ""
        assert len(lines) == 1 and lines[0].startswith("cprune: "), shown.err
        assert all(word in lines[0] for word in words), lines[0]
        after = {name: stat for name, stat in snapshot(self.folder).items() if name.partition("/")[0] not in leaves}
        assert after == before
        assert not any(path.name.endswith(".partial") for path in self.folder.rglob("*"))
