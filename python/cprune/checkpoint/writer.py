"""Write a checkpoint folder whole or not at all: byte ranges of the source are copied, tensor after tensor.

Nothing is decoded, so every data type passes through unchanged, and the speed is that of copying files. The folder is
built under a temporary name beside OUT and renamed at the very end.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock

from tqdm import tqdm

from cprune.checkpoint.reader import INDEX_NAME
from cprune.errors import CpruneError

COPY_CHUNK = 32 << 20  # at a time, after which a copy learns that another has failed
WRITERS = 2  # files written at the same time: what is in memory is copied on one core a file
SPARE_BYTES = 32 << 20  # asked for beyond the tensors: headers, tokenizer, file system overhead


@dataclass(frozen=True)
class Piece:
    """A byte range of a source file."""

    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write: its name, type and shape, and the source bytes that make it up, in order."""

    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


@dataclass(frozen=True)
class _Progress:
    """The bar of files that are written at the same time, and what ends all of them."""

    bar: tqdm
    stopped: Event = field(default_factory=Event)
    lock: Lock = field(default_factory=Lock)

    def advance(self, nbytes: int) -> None:
        """Count `nbytes` more; raises CancelledError where there is no need to go on."""
        if self.stopped.is_set():
            raise CancelledError
        with self.lock:
            self.bar.update(nbytes)


def check_output(out: Path, source: Path) -> None:
    """Raise CpruneError unless OUT is a new or empty folder, outside the source, that can be made."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CpruneError(f"OUT must not exist or be an empty folder, got {out}")
    if out.is_symlink() or os.path.ismount(out):
        raise CpruneError(f"OUT must not be a link or a mount point, since it is renamed into place, got {out}")
    resolved, source = out.resolve(), source.resolve()
    if resolved == source or source in resolved.parents:
        raise CpruneError(f"OUT must lie outside MODEL, got {out} in {source}")
    parent = _existing_parent(resolved)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CpruneError(f"OUT must lie in a folder that can be written, got {out}")


def check_space(out: Path, nbytes: int) -> None:
    """Raise CpruneError where the file system of OUT has no room for `nbytes` of tensors."""
    free = shutil.disk_usage(_existing_parent(out.resolve())).free
    if free < nbytes + SPARE_BYTES:
        raise CpruneError(
            f"the disk of OUT must have {(nbytes + SPARE_BYTES) / 1e9:.2f} GB free, got {free / 1e9:.2f} GB at {out}"
        )


def write_checkpoint(
    out: Path,
    shards: Sequence[Sequence[OutputTensor]],
    config: Mapping[str, object],
    companions: Sequence[Path],
    texts: Mapping[str, str],
) -> int:
    """Write a checkpoint folder; OUT is whole or absent, whatever happens.

    Args:
        shards: tensors per output file; empty shards are left out and the others numbered.
        config: content of config.json.
        companions: files and folders copied as they are (tokenizer and so on).
        texts: further files, {name: content}.
    Returns the bytes of all tensors. Raises CpruneError where the disk fills up or OUT appears meanwhile.
    """
    shards = [shard for shard in shards if shard]
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    check_space(out, total)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir()
    try:
        single, count = len(shards) == 1, len(shards)
        names = [
            "model.safetensors" if single else f"model-{number:05d}-of-{count:05d}.safetensors"
            for number in range(1, count + 1)
        ]
        with tqdm(total=total, desc="write", unit="B", unit_scale=True, disable=None) as bar:
            _write_shards({partial / name: shard for name, shard in zip(names, shards, strict=True)}, _Progress(bar))
        if not single:
            weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (partial / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        for path in companions:
            if path.is_dir():
                shutil.copytree(path, partial / path.name)
            else:
                shutil.copyfile(path, partial / path.name)
        for name, text in texts.items():
            (partial / name).write_text(text)
        (partial / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        if out.exists():
            out.rmdir()  # empty, as checked; fails where it is not any more
        partial.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOTEMPTY, errno.EEXIST):
            raise CpruneError(
                f"OUT must be writable to the end, got {error.strerror} at {out}; nothing was left"
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return total


def _write_shards(files: Mapping[Path, Sequence[OutputTensor]], progress: _Progress) -> None:
    """Write files, several at the same time; all of them end where one fails."""
    with ThreadPoolExecutor(WRITERS) as pool:
        results = [pool.submit(_write_shard, path, tensors, progress) for path, tensors in files.items()]
        try:
            for result in as_completed(results):
                result.result()
        finally:
            progress.stopped.set()
            pool.shutdown(cancel_futures=True)


def _write_shard(path: Path, tensors: Sequence[OutputTensor], progress: _Progress) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for piece in _merged([piece for tensor in tensors for piece in tensor.pieces]):
            with piece.file.open("rb", buffering=0) as source:
                _copy(source.fileno(), target.fileno(), piece, progress)


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbouring ranges of one file joined, so that few system calls copy much."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if last is not None and last.file == piece.file and last.offset + last.nbytes == piece.offset:
            merged[-1] = Piece(last.file, last.offset, last.nbytes + piece.nbytes)
        else:
            merged.append(piece)
    return merged


def _copy(source: int, target: int, piece: Piece, progress: _Progress) -> None:
    """Append a byte range: in the kernel where it can (sharing blocks on file systems that do), else by hand."""
    offset, left = piece.offset, piece.nbytes
    in_kernel = hasattr(os, "copy_file_range")
    while left:
        step = min(left, COPY_CHUNK)
        if in_kernel:
            try:
                done = os.copy_file_range(source, target, step, offset_src=offset)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
                    raise
                in_kernel = False
                continue
        else:
            done = os.write(target, os.pread(source, step, offset))
        if not done:
            raise CpruneError(f"{piece.file} must hold {piece.offset + piece.nbytes} bytes, got a file that ends early")
        offset, left = offset + done, left - done
        progress.advance(done)


def _existing_parent(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
