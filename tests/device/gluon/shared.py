"""Shared memory: nothing is used before it has landed, nor changed while it is read, nor by two that nothing orders."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import triton.language as tl
from triton.experimental.gluon.language._layouts import SharedLayout

from tests.device.gluon import layouts
from tests.device.gluon.scheduler import Clock, Cta, KernelError, RaceError, Task, merge
from tests.device.shim import poison

Span = tuple[int, int]  # first byte, and the one after the last


@dataclass(eq=False)
class Trace:
    """What was last done to some bytes."""

    writer: Task
    time: int
    copy: Copy | None  # that wrote, or is to write
    usual: bool  # written by threads: what is asynchronous, and reads it, needs a fence
    fenced: set[Task] = field(default_factory=set)  # who has fenced since
    readers: Clock = field(default_factory=dict)


class Memory:
    """One allocation of shared memory; it holds poison."""

    def __init__(self, dtype: tl.dtype, elements: int) -> None:
        self.bytes = poison(dtype, (elements,)).data.view(np.uint8)
        self.barriers: dict[int, Barrier] = {}
        self.traces: dict[Span, Trace] = {}
        self.held: dict[Any, list[Span]] = {}  # by the product or store that still reads them


def fence(cta: Cta, task: Task) -> None:
    """What was written as usual comes before what asynchronous copies and products of `task` do."""
    for memory in cta.memories:
        for trace in memory.traces.values():
            trace.fenced.add(task)


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
    def span(self) -> Span:
        if self.given is None:
            return self.start, self.start + self.size
        low, high = int(self.given.min()), int(self.given.max()) + 1
        return self.start + low * self.dtype.itemsize, self.start + high * self.dtype.itemsize

    @property
    def numbers(self) -> np.ndarray:
        """All from the start on."""
        return self.memory.bytes[self.start :].view(poison(self.dtype, ()).data.dtype)

    def read(self, task: Task, holder: Any = None) -> np.ndarray:
        """By threads; or by `holder`, asynchronously, who goes on to read until it is released."""
        for trace in self._overlapping():
            self._require(task, trace.writer, trace.time, "reads", trace.copy)
            if holder and trace.usual and not trace.fenced & {task, trace.writer}:
                raise KernelError(f"{task.name} reads asynchronously what threads wrote, and no fence is between")
            trace.readers[task] = task.time
        if holder:
            self.memory.held.setdefault(holder, []).append(self.span)
        return self.numbers[self.places]

    def release(self, holder: Any) -> None:
        self.memory.held.pop(holder, None)

    def write(self, values: np.ndarray, task: Task) -> None:
        self.claim(task)
        self.numbers[self.places] = values

    def claim(self, task: Task, copy: Copy | None = None) -> None:
        """Write, now, or by a copy that is yet to land."""
        for trace in self._overlapping():
            self._require(task, trace.writer, trace.time, "writes", trace.copy)
            for reader, time in trace.readers.items():
                self._require(task, reader, time, "writes")
        if any(_overlap(self.span, span) for spans in self.memory.held.values() for span in spans):
            raise RaceError(f"{task.name} writes what a product or a store still reads")
        first, last = self.span
        inside = [(low, high) for low, high in self.memory.traces if first <= low and high <= last]
        for span in inside:
            del self.memory.traces[span]
        self.memory.traces[self.span] = Trace(task, task.time, copy, copy is None)

    def _overlapping(self) -> Iterator[Trace]:
        return (trace for span, trace in self.memory.traces.items() if _overlap(self.span, span))

    @staticmethod
    def _require(task: Task, other: Task, time: int, does: str, copy: Copy | None = None) -> None:
        if copy is not None and not copy.landed:
            raise RaceError(f"{task.name} {does} what a copy has not landed in yet")
        if task.clock.get(other, 0) < time:
            raise RaceError(f"{task.name} {does} what {other.name} uses, and nothing orders them")


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


class Copy:
    """An asynchronous copy into shared memory: it reads memory, and lands, no earlier than somebody waits for it."""

    def __init__(self, view: View, fetch: Callable[[], np.ndarray], task: Task, *, usual: bool) -> None:
        self.view, self.fetch, self.usual, self.landed = view, fetch, usual, False
        view.claim(task, self)
        self.clock: Clock = {}
        task.tell(self.clock)

    def land(self) -> None:
        if not self.landed:
            self.landed = True
            self.view.numbers[self.view.places] = self.fetch()
            self.view.memory.traces[self.view.span].usual = self.usual


class Store:
    """An asynchronous copy out of shared memory, which reaches memory no earlier than somebody waits for that."""

    def __init__(self, view: View, put: Callable[[np.ndarray], None], task: Task) -> None:
        self.view, self.put, self.released = view, put, False
        self.data = view.read(task, self)

    def release(self) -> None:
        """It has read."""
        self.released = True
        self.view.release(self)

    def finish(self) -> None:
        self.release()
        self.put(self.data)


class Barrier:
    """An mbarrier. What it completes lands when somebody looks at it."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.phases = self.expected = self.coming = 0
        self.copies: list[Copy] = []
        self.told: Clock = {}  # by those who have arrived in this phase
        self.known: Clock = {}  # by those of all phases that are over

    def __str__(self) -> str:
        return f"{self.pending} of {self.count} arrivals, {self.expected - self.coming} bytes missing"

    def arrive(self, task: Task, count: int, *, expected: int = 0, copies: list[Copy] | None = None) -> None:
        self._settle()
        if count > self.pending:
            raise KernelError(f"{count} arrivals at a barrier with {self}")
        task.tell(self.told)
        self.copies += copies or []
        self.expected += expected
        self.pending -= count
        self._check()

    def bring(self, copy: Copy) -> None:
        """Bytes of a copy by a tensor descriptor."""
        self._settle()
        self.copies.append(copy)
        self.coming += copy.view.size
        self._check()

    def passed(self, parity: int) -> bool:
        """Whether the phase of that parity is over; one that need not be over yet for that is not."""
        if self.phases % 2 == parity:
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
            merge(self.known, copy.clock)
        merge(self.known, self.told)
        self.copies, self.told = [], {}
        self.phases += 1
        self.pending, self.expected, self.coming = self.count, 0, 0
