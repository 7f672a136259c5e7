"""Look through a checkpoint's weights for NaN and infinity before any work is built on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import torch
from tqdm import tqdm

from cprune.checkpoint.reader import DTYPES, READERS, Checkpoint, TensorInfo, read_bytes
from cprune.errors import CpruneError

BLOCK_BYTES = 4 << 20  # at a time, which a core's cache holds; small tensors are looked at together


def check_finite(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> None:
    """Raise CpruneError, which names the tensor, where a floating-point weight is NaN or infinite.

    Args:
        names: tensors to look at; all where left out. They are read once, at the speed of the disk.
    """
    tensors = [checkpoint.tensors[name] for name in (checkpoint.tensors if names is None else names)]
    tensors = [info for info in tensors if info.dtype in DTYPES and DTYPES[info.dtype].is_floating_point]
    blocks = list(_blocks(tensors))
    # Memory that every block uses again, since fresh pages cost more than the reading.
    buffers = [torch.empty(BLOCK_BYTES, dtype=torch.uint8) for _ in range(READERS)]

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


def _blocks(tensors: Iterable[TensorInfo]) -> Iterator[TensorInfo]:
    """The bytes of all tensors, neighbours of one type joined and what is long cut."""
    joined: list[TensorInfo] = []
    for info in sorted(tensors, key=lambda info: (info.file, info.offset)):
        last = joined[-1] if joined else None
        if last and (last.file, last.dtype, last.offset + last.nbytes) == (info.file, info.dtype, info.offset):
            joined[-1] = replace(last, nbytes=last.nbytes + info.nbytes)
        else:
            joined.append(info)
    for info in joined:
        for start in range(0, info.nbytes, BLOCK_BYTES):
            yield replace(info, offset=info.offset + start, nbytes=min(BLOCK_BYTES, info.nbytes - start))


def _overlap(one: TensorInfo, other: TensorInfo) -> bool:
    begin, end = max(one.offset, other.offset), min(one.offset + one.nbytes, other.offset + other.nbytes)
    return one.file == other.file and begin < end


def _whole(info: TensorInfo) -> bool:
    buffer = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
    return all(_is_finite(block, buffer) for block in _blocks([info]))


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite, in one read: then their sum is finite, too, unless it overflows."""
    if values.dtype.itemsize == 1:
        values = values.float()  # torch cannot sum 8-bit types
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def _is_finite(block: TensorInfo, buffer: torch.Tensor) -> bool:
    data = buffer[: block.nbytes]
    with block.file.open("rb", buffering=0) as file:
        read_bytes(file, block, data)
    return all_finite(data.view(DTYPES[block.dtype]))
