"""Look through a checkpoint's weights for NaN and infinity before any work is built on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from threading import Event, Thread

import torch
from tqdm import tqdm

from cprune.checkpoint.reader import DTYPES, READERS, Checkpoint, TensorInfo, read_bytes
from cprune.errors import CpruneError

BLOCK_BYTES = 4 << 20  # at a time, which a core's cache holds; small tensors are looked at together
AHEAD_BYTES = 64 << 20  # beside other work in Python: whose turn it is changes a few times a block, each change costs
# The bits of infinity, below those of every NaN; what has no infinity begins with NaN.
NOT_FINITE = {
    "F64": 0x7FF0_0000_0000_0000,
    "F32": 0x7F80_0000,
    "F16": 0x7C00,
    "BF16": 0x7F80,
    "F8_E4M3": 0x7F,
    "F8_E5M2": 0x7C,
}


def check_finite(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> None:
    """Raise CpruneError, which names the tensor, where a floating-point weight is NaN or infinite.

    Args:
        names: tensors to look at; all where left out. They are read once, at the speed of the disk, but for those that
            are `checkpoint.finite`.
    """
    names = checkpoint.tensors if names is None else names
    tensors = _floating(checkpoint.tensors[name] for name in names if name not in checkpoint.finite)
    blocks = list(_blocks(tensors, BLOCK_BYTES))
    # Memory that every block uses again, since fresh pages cost more than the reading.
    buffers = [_buffer(BLOCK_BYTES) for _ in range(READERS)]

    def look(block: TensorInfo) -> bool:
        buffer = buffers.pop()
        try:
            return _is_finite(block, buffer)
        finally:
            buffers.append(buffer)

    total = sum(block.nbytes for block in blocks)
    bar = tqdm(total=total, desc="check weights", unit="B", unit_scale=True, disable=None)
    with closing(bar), ThreadPoolExecutor(READERS) as pool:
        results = [pool.submit(look, block) for block in blocks]
        try:
            for block, result in zip(blocks, results, strict=True):
                if not result.result():
                    name = next(info.name for info in tensors if _overlap(info, block) and not _whole(info))
                    raise CpruneError(f"weights must be finite, got NaN or infinity in {name}")
                bar.update(block.nbytes)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class Ahead:
    """Looks through weights beside other work, from its making until `stop`.

    It raises nothing: what it has not found to be finite, `check_finite` looks at.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._tensors = _floating(checkpoint.tensors.values())
        self._blocks = list(_blocks(self._tensors, AHEAD_BYTES))
        self._done = 0  # blocks, from the first
        self._ended = Event()
        self._thread = Thread(target=self._look, name="look ahead", daemon=True)
        self._thread.start()

    def stop(self) -> Checkpoint:
        """The checkpoint, which now says what of it is finite."""
        self._ended.set()
        self._thread.join()
        left = [(block.file, block.offset) for block in self._blocks[self._done : self._done + 1]]
        done = [info.name for info in self._tensors if not left or (info.file, info.offset + info.nbytes) <= left[0]]
        return replace(self._checkpoint, finite=frozenset(done))

    def _look(self) -> None:
        buffer = _buffer(AHEAD_BYTES)
        with suppress(CpruneError, OSError):
            for block in self._blocks:
                if self._ended.is_set() or not _is_finite(block, buffer):
                    break
                self._done += 1


def _floating(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    return [info for info in tensors if info.dtype in NOT_FINITE]


def _blocks(tensors: Iterable[TensorInfo], size: int) -> Iterator[TensorInfo]:
    """The bytes of all tensors, by file and place, neighbours of one type joined and what is long cut."""
    joined: list[TensorInfo] = []
    for info in sorted(tensors, key=lambda info: (info.file, info.offset)):
        last = joined[-1] if joined else None
        if last and (last.file, last.dtype, last.offset + last.nbytes) == (info.file, info.dtype, info.offset):
            joined[-1] = replace(last, nbytes=last.nbytes + info.nbytes)
        else:
            joined.append(info)
    for info in joined:
        for start in range(0, info.nbytes, size):
            yield replace(info, offset=info.offset + start, nbytes=min(size, info.nbytes - start))


def _overlap(one: TensorInfo, other: TensorInfo) -> bool:
    begin, end = max(one.offset, other.offset), min(one.offset + one.nbytes, other.offset + other.nbytes)
    return one.file == other.file and begin < end


def _whole(info: TensorInfo) -> bool:
    buffer = _buffer(BLOCK_BYTES)
    return all(_is_finite(block, buffer) for block in _blocks([info], BLOCK_BYTES))


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite, in one read: then their sum is finite, too, unless it overflows."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def _buffer(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


def _is_finite(block: TensorInfo, buffer: torch.Tensor) -> bool:
    """By numpy, which leaves other threads the interpreter and needs none of torch's."""
    data = buffer[: block.nbytes]
    with block.file.open("rb", buffering=0) as file:
        read_bytes(file, block, data)
    width, first = DTYPES[block.dtype].itemsize, NOT_FINITE[block.dtype]
    positive, negative = (data.numpy().view(f"{sign}{width}").max() for sign in "iu")
    return bool(positive < first and negative < first + (1 << 8 * width - 1))
