"""The memories of a CTA. Every access is checked: inside its memory, aligned to its size, at an address that is known.

Addresses are int64 arrays, one per accessing thread. Global addresses are the host's own; shared, local and parameter
memory start at 0 in their own space and at a far window each in the generic space.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from tests.ptx.errors import AccessError
from tests.ptx.types import CARRIER, POISON, Array

SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = 1 << 56, 2 << 56, 3 << 56
WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW, "global": 0, "const": 0}
_MARK = {width: np.ones(width, np.uint8).view(dtype)[0] for width, dtype in CARRIER.items()}  # every byte is 1


class Space(Protocol):
    """Loads and stores of `width` bytes (1, 2, 4, 8 or 16) per thread, as items of CARRIER[width]."""

    def load(self, addresses: Array, width: int, lanes: Array) -> Array: ...

    def store(self, addresses: Array, data: Array, lanes: Array) -> None: ...


def aligned_bytes(size: int, alignment: int = 1024, phase: int = 0) -> Array:
    """`size` bytes whose address leaves the remainder `phase` (< alignment)."""
    raw = np.empty(size + 2 * alignment, np.uint8)
    start = (phase - raw.ctypes.data) % alignment
    return raw[start : start + size]


def check_aligned(addresses: Array, width: int, lanes: Array) -> None:
    wrong = addresses & (width - 1)
    if wrong.any():
        i = int(np.flatnonzero(wrong)[0])
        raise AccessError(f"thread {lanes[i]} accesses {width} bytes at the misaligned address {int(addresses[i]):#x}")


class FlatMemory:
    """A small memory that starts at address 0: shared memory, or parameters."""

    def __init__(self, size: int, name: str, data: Array | None = None) -> None:
        self.size, self.name = size, name
        self.bytes = aligned_bytes(-(-size // 16) * 16) if data is None else data
        self.bytes[:] = POISON
        self._views = {width: self.bytes.view(dtype) for width, dtype in CARRIER.items()}

    def poison(self) -> None:
        self.bytes[:] = POISON

    def view(self, width: int) -> Array:
        return self._views[width]

    def slots(self, addresses: Array, width: int, lanes: Array) -> Array:
        """Indices into view(width) of checked addresses."""
        check_aligned(addresses, width, lanes)
        if addresses.min() < 0 or addresses.max() + width > self.size:
            i = int(np.flatnonzero((addresses < 0) | (addresses + width > self.size))[0])
            raise AccessError(
                f"thread {lanes[i]} accesses {width} bytes at {int(addresses[i])}"
                f" of the {self.size} bytes of {self.name} memory"
            )
        return addresses // width

    def load(self, addresses: Array, width: int, lanes: Array) -> Array:
        return self._views[width][self.slots(addresses, width, lanes)]

    def store(self, addresses: Array, data: Array, lanes: Array) -> None:
        width = data.dtype.itemsize
        self._views[width][self.slots(addresses, width, lanes)] = data


class LocalMemory:
    """The same addresses for every thread, other bytes."""

    def __init__(self, size: int, threads: int) -> None:
        self.size, self._pitch = size, -(-size // 16) * 16
        self._flat = FlatMemory(self._pitch * threads, "local")

    def poison(self) -> None:
        self._flat.poison()

    def _address(self, addresses: Array, width: int, lanes: Array) -> Array:
        wrong = (addresses < 0) | (addresses + width > self.size)
        if wrong.any():
            i = int(np.flatnonzero(wrong)[0])
            raise AccessError(
                f"thread {lanes[i]} accesses {int(addresses[i])} of its {self.size} bytes of local memory"
            )
        return addresses + lanes * self._pitch

    def load(self, addresses: Array, width: int, lanes: Array) -> Array:
        return self._flat.load(self._address(addresses, width, lanes), width, lanes)

    def store(self, addresses: Array, data: Array, lanes: Array) -> None:
        self._flat.store(self._address(addresses, data.dtype.itemsize, lanes), data, lanes)


class Buffer:
    """One registered array, and which of its bytes were read and written."""

    def __init__(self, array: Array) -> None:
        if not array.flags.c_contiguous:
            raise ValueError(f"memory must be contiguous arrays, got strides {array.strides} for shape {array.shape}")
        self.bytes = array.reshape(-1).view(np.uint8)
        self.base, self.end = self.bytes.ctypes.data, self.bytes.ctypes.data + self.bytes.size
        self.read, self.written = (aligned_bytes(self.bytes.size, 16, self.base % 16) for _ in range(2))
        self.read[:], self.written[:] = 0, 0
        self._views: dict[tuple[str, int], tuple[Array, int]] = {}

    def view(self, what: str, width: int) -> tuple[Array, int]:
        """`what` ("bytes", "read" or "written") as aligned items, and the address of item 0."""
        if (what, width) not in self._views:
            skip = -self.base % width
            whole = getattr(self, what)[skip:]
            items = whole[: whole.size // width * width].view(CARRIER[width])
            self._views[what, width] = (items, self.base + skip)
        return self._views[what, width]

    def load(self, addresses: Array, width: int) -> Array:
        items, start = self.view("bytes", width)
        index = (addresses - start) // width
        self.view("read", width)[0][index] = _MARK[width]
        return items[index]

    def store(self, addresses: Array, data: Array) -> None:
        width = data.dtype.itemsize
        items, start = self.view("bytes", width)
        index = (addresses - start) // width
        self.view("written", width)[0][index] = _MARK[width]
        items[index] = data


class GlobalMemory:
    """The registered buffers and nothing else."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        self.buffers = [Buffer(a) for a in arrays]
        self.read_bytes = self.written_bytes = 0
        self._sorted = sorted((b for b in self.buffers if b.bytes.size), key=lambda b: b.base)
        self._bases = [b.base for b in self._sorted]

    def add(self, array: Array) -> Buffer:
        """Register an array later; the buffer that already holds all of its bytes where there is one."""
        low, high = np.lib.array_utils.byte_bounds(array)
        for buffer in self.buffers:
            if buffer.base <= low and high <= buffer.end:
                return buffer
        buffer = Buffer(array)
        self.buffers.append(buffer)
        self._sorted = sorted((b for b in self.buffers if b.bytes.size), key=lambda b: b.base)
        self._bases = [b.base for b in self._sorted]
        return buffer

    def _split(self, addresses: Array, width: int, lanes: Array) -> list[tuple[Buffer, Array | None]]:
        """The buffers that are accessed, and the accesses (None: all) that fall into each."""
        check_aligned(addresses, width, lanes)
        low, high = int(addresses.min()), int(addresses.max()) + width
        nearest = bisect_right(self._bases, low) - 1
        if nearest >= 0 and high <= self._sorted[nearest].end:
            return [(self._sorted[nearest], None)]
        parts: list[tuple[Buffer, Array | None]] = []
        left = np.ones(len(addresses), bool)
        for buffer in self._sorted:
            inside = left & (addresses >= buffer.base) & (addresses + width <= buffer.end)
            if inside.any():
                parts.append((buffer, inside))
                left &= ~inside
        if left.any():
            i = int(np.flatnonzero(left)[0])
            raise AccessError(
                f"thread {lanes[i]} accesses {width} bytes at {int(addresses[i]):#x}, outside all registered memory"
                f"{self._nearest(int(addresses[i]))}"
            )
        return parts

    def _nearest(self, address: int) -> str:
        if not self._sorted:
            return ""
        buffer = min(self._sorted, key=lambda b: max(b.base - address, address - b.end))
        return f" ({address - buffer.base:+d} from the start of the nearest buffer, of {buffer.bytes.size} bytes)"

    def load(self, addresses: Array, width: int, lanes: Array) -> Array:
        self.read_bytes += width * len(addresses)
        parts = self._split(addresses, width, lanes)
        if parts[0][1] is None:
            return parts[0][0].load(addresses, width)
        out = np.empty(len(addresses), CARRIER[width])
        for buffer, inside in parts:
            out[inside] = buffer.load(addresses[inside], width)
        return out

    def store(self, addresses: Array, data: Array, lanes: Array) -> None:
        self.written_bytes += data.dtype.itemsize * len(addresses)
        for buffer, inside in self._split(addresses, data.dtype.itemsize, lanes):
            every = slice(None) if inside is None else inside
            buffer.store(addresses[every], data[every])


class GenericMemory:
    """Sends each access to the space that its address lies in."""

    def __init__(self, spaces: dict[str, Space]) -> None:
        self._spaces = [(WINDOWS[name] >> 56, WINDOWS[name], space) for name, space in spaces.items()]

    def load(self, addresses: Array, width: int, lanes: Array) -> Array:
        out = np.empty(len(addresses), CARRIER[width])
        for inside, space, window in self._split(addresses):
            out[inside] = space.load(addresses[inside] - window, width, lanes[inside])
        return out

    def store(self, addresses: Array, data: Array, lanes: Array) -> None:
        for inside, space, window in self._split(addresses):
            space.store(addresses[inside] - window, data[inside], lanes[inside])

    def _split(self, addresses: Array) -> list[tuple[Array, Space, int]]:
        kinds = addresses >> 56
        known = [(kinds == kind, space, window) for kind, window, space in self._spaces]
        if not np.any([inside for inside, _, _ in known], axis=0).all():
            raise AccessError(f"no memory at the generic address {int(addresses[0]):#x}")
        return [(inside, space, window) for inside, space, window in known if inside.any()]
