"""Tasks that take turns, and the shared memory between them, where asynchronous copies land as late as they may."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import triton.language as tl
from triton.experimental.gluon.language._layouts import SharedLayout

from tests.device.gluon import layouts
from tests.device.shim import poison

PATIENCE = 200  # rounds in which every task that can run looks at memory and nothing changes


class KernelError(RuntimeError):
    """The kernel does what is undefined, or can never finish, on a GPU."""


class HangError(KernelError):
    """All tasks wait for what none of them will do."""


class _Stopped(BaseException):
    """Unwinds a task whose launch has failed."""


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
    result: Any = None
    done: bool = False
    waits_for: str = ""
    ready: Callable[[], bool] = lambda: True
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


@dataclass(eq=False)
class Cta:
    program: tuple[int, int, int]
    memories: list[Memory] = field(default_factory=list)

    def fence(self, task: Task) -> None:
        """Order what was written as usual before what asynchronous copies and products of `task` do."""
        for memory in self.memories:
            for _, fenced in memory.written.values():
                fenced.add(task)


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

    def wait_until(self, ready: Callable[[], bool], waits_for: str) -> None:
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
                    waiting = (f"{task.name}: {task.waits_for}" for task in self.tasks if not task.done)
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


class Memory:
    """One allocation of shared memory; it holds poison."""

    def __init__(self, dtype: tl.dtype, elements: int) -> None:
        self.bytes = poison(dtype, (elements,)).data.view(np.uint8)
        self.barriers: dict[int, Barrier] = {}
        # By (first, last + 1) byte written as usual: by whom, and by whom that was fenced since.
        self.written: dict[tuple[int, int], tuple[Task, set[Task]]] = {}


@dataclass(frozen=True, eq=False)
class View:
    """What a shared memory descriptor stands for."""

    memory: Memory
    start: int  # bytes
    dtype: tl.dtype
    shape: tuple[int, ...]
    layout: SharedLayout
    given: np.ndarray | None = None  # places, where the layout alone does not tell

    @cached_property
    def places(self) -> np.ndarray:
        return layouts.places(self.layout, self.shape) if self.given is None else self.given

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @cached_property
    def span(self) -> tuple[int, int]:
        if self.given is None:
            return self.start, self.start + self.size
        low, high = int(self.given.min()), int(self.given.max()) + 1
        return self.start + low * self.dtype.itemsize, self.start + high * self.dtype.itemsize

    @property
    def _numbers(self) -> np.ndarray:
        return self.memory.bytes[self.start :].view(poison(self.dtype, ()).data.dtype)

    def read(self) -> np.ndarray:
        return self._numbers[self.places]

    def write(self, values: np.ndarray) -> None:
        self._numbers[self.places] = values

    def written_as_usual(self, task: Task) -> None:
        self.memory.written[self.span] = (task, set())

    def require_fence(self, task: Task) -> None:
        """Of what is read asynchronously: a fence since it was written, by who wrote or by who reads."""
        first, last = self.span
        for (low, high), (writer, fenced) in self.memory.written.items():
            if low < last and first < high and not fenced & {task, writer}:
                raise KernelError(f"{task.name} reads asynchronously what {writer.name} wrote, and no fence is between")


class Copy:
    """An asynchronous copy into shared memory: poison until it lands, and fetched no earlier."""

    def __init__(self, view: View, fetch: Callable[[], np.ndarray], task: Task | None) -> None:
        self.view, self.fetch, self.task, self.landed = view, fetch, task, False
        view.write(poison(view.dtype, ()).data)

    def land(self) -> None:
        if self.landed:
            return
        self.landed = True
        self.view.write(self.fetch())
        self.view.memory.written.pop(self.view.span, None)
        if self.task is not None:  # of threads: written as usual
            self.view.written_as_usual(self.task)


class Store:
    """An asynchronous copy out of shared memory, which is read, and stored, no earlier than one must know."""

    def __init__(self, view: View, put: Callable[[np.ndarray], None]) -> None:
        self.view, self.put, self.data = view, put, None

    def read(self) -> None:
        if self.data is None:
            self.data = self.view.read()

    def finish(self) -> None:
        self.read()
        self.put(self.data)


class Barrier:
    """An mbarrier. What it completes lands when somebody looks at it."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.phases = self.expected = self.coming = 0
        self.copies: list[Copy] = []

    def __str__(self) -> str:
        return f"{self.pending} of {self.count} arrivals, {self.expected - self.coming} bytes missing"

    def arrive(self, count: int, *, expected: int = 0, copies: list[Copy] | None = None) -> None:
        self._settle()
        if count > self.pending:
            raise KernelError(f"{count} arrivals at a barrier with {self}")
        self.copies += copies or []
        self.expected += expected
        self.pending -= count
        self._check()

    def bring(self, copy: Copy) -> None:
        self._settle()
        self.copies.append(copy)
        self.coming += copy.view.size
        self._check()

    def passed(self, parity: int) -> bool:
        """Whether the phase of that parity is over."""
        self._settle()
        return self.phases % 2 != parity

    def _check(self) -> None:
        if not self.pending and self.coming > self.expected:
            raise KernelError(f"{self.coming} bytes come to a barrier that expects {self.expected}")

    def _settle(self) -> None:
        if self.pending or self.coming != self.expected:
            return
        for copy in self.copies:
            copy.land()
        self.copies = []
        self.phases += 1
        self.pending, self.expected, self.coming = self.count, 0, 0
