"""Shared memory that notices races between warps.

Between two synchronisations, no byte may be written by one warp and read or written by another, unless the write does
not change it (compilers store one value from several warps) or the accesses are atomic or volatile. Any barrier or
mbarrier wait that completes counts as a synchronisation of everything, so a race across one that joins only some of
the warps goes unseen; so does a race within a warp.
"""

from __future__ import annotations

import numpy as np

from tests.ptx.errors import RaceError
from tests.ptx.memory import FlatMemory, aligned_bytes
from tests.ptx.types import CARRIER, Array

_SEVERAL = 255


class SharedMemory(FlatMemory):
    """`plain` is the same memory without the checks."""

    def __init__(self, size: int, warps: int) -> None:
        super().__init__(size, "shared")
        self.plain = FlatMemory(size, "shared", self.bytes)
        self._checks = warps > 1
        shadow = aligned_bytes(2 * self.bytes.size)
        shadow[:] = 0
        self._shadow, self._dirty = shadow, False
        halves = shadow[: self.bytes.size], shadow[self.bytes.size :]  # the warp + 1 that wrote, and that read, a byte
        self._writer, self._reader = ({width: h.view(dtype) for width, dtype in CARRIER.items()} for h in halves)

    def poison(self) -> None:
        super().poison()
        self.synchronise()

    def synchronise(self) -> None:
        """Everything before happens before everything after."""
        if self._dirty:
            self._shadow[:] = 0
            self._dirty = False

    def load(self, addresses: Array, width: int, lanes: Array) -> Array:
        slots = self.slots(addresses, width, lanes)
        self.note_read(slots, width, lanes)
        return self._views[width][slots]

    def store(self, addresses: Array, data: Array, lanes: Array) -> None:
        width = data.dtype.itemsize
        slots = self.slots(addresses, width, lanes)
        self.note_write(slots, data, lanes)
        self._views[width][slots] = data
        if self._checks:
            self._check_collisions(slots, data, lanes)

    def note_read(self, slots: Array, width: int, lanes: Array) -> None:
        """The threads `lanes` read items of view(width)."""
        if not self._checks:
            return
        me = (lanes // 32 + 1).astype(np.uint8)[:, None]
        writer = self._writer[width][slots].view(np.uint8).reshape(-1, width)
        wrong = (writer != 0) & (writer != me)
        if wrong.any():
            self._fail(wrong, slots * width, lanes, "reads", writer)
        reader = self._reader[width][slots].view(np.uint8).reshape(-1, width)
        marks = np.where((reader == 0) | (reader == me), me, np.uint8(_SEVERAL))
        self._reader[width][slots] = marks.view(CARRIER[width]).reshape(-1)
        kept = self._reader[width][slots].view(np.uint8).reshape(-1, width)
        lost = (kept != marks).any(axis=1)  # another warp reads the same at the same time
        if lost.any():
            marks = np.where(kept != marks, np.uint8(_SEVERAL), marks)[lost]
            self._reader[width][slots[lost]] = marks.view(CARRIER[width]).reshape(-1)
        self._dirty = True

    def note_write(self, slots: Array, data: Array, lanes: Array) -> None:
        """The threads `lanes` are about to write items."""
        if not self._checks:
            return
        width = data.dtype.itemsize
        me = (lanes // 32 + 1).astype(np.uint8)[:, None]
        writer = self._writer[width][slots].view(np.uint8).reshape(-1, width)
        reader = self._reader[width][slots].view(np.uint8).reshape(-1, width)
        wrong = ((writer != 0) & (writer != me)) | ((reader != 0) & (reader != me))
        if wrong.any():
            before = self._views[width][slots].view(np.uint8).reshape(-1, width)
            wrong &= before != np.ascontiguousarray(data).view(np.uint8).reshape(-1, width)
            if wrong.any():
                self._fail(wrong, slots * width, lanes, "writes", np.where(reader != 0, reader, writer))
        marks = np.broadcast_to(me, (len(slots), width)).copy()
        self._writer[width][slots] = marks.view(CARRIER[width]).reshape(-1)
        self._dirty = True

    def _check_collisions(self, slots: Array, data: Array, lanes: Array) -> None:
        """Other warps may have written the same bytes in the same instruction."""
        width = data.dtype.itemsize
        me = (lanes // 32 + 1).astype(np.uint8)[:, None]
        writer = self._writer[width][slots].view(np.uint8).reshape(-1, width)
        wrong = writer != me
        if wrong.any():
            after = self._views[width][slots].view(np.uint8).reshape(-1, width)
            wrong &= after != np.ascontiguousarray(data).view(np.uint8).reshape(-1, width)
            if wrong.any():
                self._fail(wrong, slots * width, lanes, "writes", writer)

    def _fail(self, wrong: Array, starts: Array, lanes: Array, what: str, others: Array) -> None:
        i, byte = (int(x[0]) for x in np.nonzero(wrong))
        other = int(others[i, byte])
        who = "several warps" if other == _SEVERAL else f"warp {other - 1}"
        raise RaceError(
            f"thread {lanes[i]} (warp {lanes[i] // 32}) {what} shared memory at {int(starts[i]) + byte}, "
            f"which {who} used with no barrier in between"
        )
