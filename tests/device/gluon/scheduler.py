"""Tasks that take turns: one runs at a time, until it waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.device.gluon.shared import Copy, Memory, Store

PATIENCE = 200  # rounds in which every task that can run looks at memory and nothing changes
Clock = dict["Task", int]  # how much of what each task did comes before: of happened-before


class KernelError(RuntimeError):
    """The kernel does what is undefined, or can never finish, on a GPU."""


class RaceError(KernelError):
    """Two tasks use the same shared memory, one of them to write, with nothing to order them."""


class HangError(KernelError):
    """All tasks wait for what none of them will do."""


class _Stopped(BaseException):
    """Unwinds a task whose launch has failed."""


@dataclass(eq=False)
class Cta:
    program: tuple[int, int, int]
    memories: list[Memory] = field(default_factory=list)


@dataclass(eq=False)
class Task:
    """The warps that run one function: those of a kernel, or of one partition of it."""

    name: str
    warps: int
    cta: Cta
    copies: list[Copy] = field(default_factory=list)  # cp.async: issued, not landed
    groups: list[list[Copy]] = field(default_factory=list)
    products: list[Any] = field(default_factory=list)  # wgmma: issued, not waited for
    stores: list[Store] = field(default_factory=list)
    clock: Clock = field(default_factory=dict)
    result: Any = None
    done: bool = False
    waits_for: Callable[[], str] = lambda: "its turn"
    ready: Callable[[], bool] = lambda: True
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __post_init__(self) -> None:
        self.clock.setdefault(self, 1)

    @property
    def time(self) -> int:
        return self.clock[self]

    def tell(self, clock: Clock) -> None:
        """Whoever hears `clock` comes after all that this task has done so far."""
        merge(clock, self.clock)
        self.clock[self] += 1


def merge(clock: Clock, other: Clock) -> None:
    for task, time in other.items():
        clock[task] = max(clock.get(task, 0), time)


class Scheduler:
    """One task runs at a time, until it waits; then the next in turn that can."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.current: Task | None = None
        self.events = 0  # grows with whatever another task may wait for
        self._threads: list[threading.Thread] = []
        self._failure: BaseException | None = None
        self._stopping = False
        self._back = threading.Semaphore(0)

    def add(self, task: Task, body: Callable[[], Any]) -> None:
        def run() -> None:
            task.turn.acquire()
            try:
                if not self._stopping:
                    task.result = body()
            except _Stopped:
                pass
            except BaseException as error:  # noqa: BLE001 (raised again by the thread that runs the scheduler)
                error.add_note(f"in {task.name}")
                self._failure = self._failure or error
            task.done = True
            self._back.release()

        self.tasks.append(task)
        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()

    def wait_until(self, ready: Callable[[], bool], waits_for: Callable[[], str]) -> None:
        """Called by the running task: let others run, at least once, until `ready`."""
        task = self.current
        task.ready, task.waits_for = ready, waits_for
        self._back.release()
        task.turn.acquire()
        if self._stopping:
            raise _Stopped

    def run(self) -> None:
        """Until every task is done."""
        quiet = 0
        try:
            while any(not task.done for task in self.tasks):
                before, ran = self.events, False
                for task in list(self.tasks):
                    if not task.done and task.ready():
                        self._resume(task)
                        ran = True
                quiet = 0 if self.events != before else quiet + 1
                if not ran or quiet > PATIENCE:
                    waiting = (f"{task.name}: {task.waits_for()}" for task in self.tasks if not task.done)
                    raise HangError("nothing can go on: " + "; ".join(waiting))
        finally:
            self._stopping = True
            for task in self.tasks:
                if not task.done:
                    self._hand_over(task)
            for thread in self._threads:
                thread.join()

    def _resume(self, task: Task) -> None:
        self.current = task
        self._hand_over(task)
        self.events += task.done
        if self._failure:
            raise self._failure

    def _hand_over(self, task: Task) -> None:
        task.turn.release()
        self._back.acquire()
