"""Open a safetensors checkpoint: names, shapes, dtypes and byte ranges; tensors are read one at a time, when asked for.

Tensors are read with `readinto` rather than through a memory map, so that the memory in use is what was asked for and
nothing else, and so that compaction can copy byte ranges of any data type.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from threading import Thread

import torch

from cprune.checkpoint.families import Architecture, MoELayer, find_moe_layers, read_architecture
from cprune.errors import CpruneError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
READERS = 3  # reads at the same time: a read waits for the disk, and copies on one core
RUN_BYTES = 8 << 20  # of a file that one thread reads in one go
PREFETCH_BYTES = 8 << 20  # asked for at a time
PREFETCH_GAP = 1 << 20  # between tensors, so small that what lies there is asked for, too
INDEX_NAME = "model.safetensors.index.json"
WEIGHT_PATTERNS = ("*.safetensors", INDEX_NAME)
# What a hub download needs: the weights, the configuration, the tokenizer and what stands beside them.
HUB_PATTERNS = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "additional_chat_templates/*",
    "*.model",
    "*.txt",
    "*.py",
    "LICENSE*",
    "README.md",
)
COMPANION_FOLDERS = ("additional_chat_templates",)
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies."""

    name: str
    dtype: str  # safetensors' name, e.g. "BF16"
    shape: tuple[int, ...]
    file: Path
    offset: int  # of its first byte in the file
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, opened: nothing is loaded until `read`."""

    folder: Path
    config: dict[str, object]  # config.json as it stands
    tensors: dict[str, TensorInfo]  # by name, in file order
    shards: tuple[Path, ...]
    finite: frozenset[str] = frozenset()  # tensors that are known to hold no NaN and no infinity

    @cached_property
    def architecture(self) -> Architecture:
        """What config.json says of the experts; CpruneError for a dense model."""
        return read_architecture(self.config, has_experts=any(".experts." in name for name in self.tensors))

    @cached_property
    def moe_layers(self) -> tuple[MoELayer, ...]:
        """The MoE layers in order of depth; CpruneError where the tensors match no known layout."""
        shapes = {name: info.shape for name, info in self.tensors.items()}
        return find_moe_layers(shapes, self.architecture)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over config.json, every tensor's name, type and shape, 64 bytes from its middle, and routers whole."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        routers = {name for layer in self.moe_layers for name, _ in layer.router.values()}
        with ExitStack() as stack:
            files = {shard: stack.enter_context(shard.open("rb", buffering=0)) for shard in self.shards}
            for name, info in sorted(self.tensors.items()):
                size = info.nbytes if name in routers else min(64, info.nbytes)
                data = os.pread(files[info.file].fileno(), size, info.offset + (info.nbytes - size) // 2)
                digest.update(f"{name} {info.dtype} {info.shape} ".encode() + data)
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, in its own dtype and shape, in memory of its own."""
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise CpruneError(f"{name} must have a data type that torch can hold, got {info.dtype}")
        out = torch.empty(info.shape, dtype=DTYPES[info.dtype])
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Read `name` into `out` (same number of elements), converting where `out` has another dtype or stride.

        Args:
            out: preallocated CPU tensor of the tensor's shape, or of the same number of elements in the same order.
        """
        self._read_run([self.tensors[name]], {name: out})

    def read_all_into(self, targets: Mapping[str, torch.Tensor]) -> None:
        """`read_into` for every (name, tensor), in the order of the disk, several at a time."""
        inference = torch.is_inference_mode_enabled()  # which threads do not inherit

        def read(run: Sequence[TensorInfo]) -> None:
            with torch.inference_mode(inference):
                self._read_run(run, targets)

        with ThreadPoolExecutor(READERS) as pool:
            for _ in pool.map(read, _runs(self.tensors[name] for name in targets)):
                pass

    def _read_run(self, run: Sequence[TensorInfo], targets: Mapping[str, torch.Tensor]) -> None:
        """`read_into` for tensors of one file."""
        with run[0].file.open("rb", buffering=0) as file:
            for info in run:
                out = target = targets[info.name]
                if out.dtype != DTYPES[info.dtype] or not out.is_contiguous() or out.device.type != "cpu":
                    target = torch.empty(info.shape, dtype=DTYPES[info.dtype])
                if info.nbytes:
                    read_bytes(file, info, target.reshape(-1).view(torch.uint8))
                if target is not out:
                    out.copy_(target.reshape(out.shape))

    def prefetch(self, names: Iterable[str]) -> Thread:
        """Ask the system to read these tensors from disk meanwhile, which costs this process no memory.

        Returns the thread that asks, which nobody need wait for. Asks nothing where the system cannot be asked.
        """
        ranges: list[tuple[Path, int, int]] = []  # file, first byte, last byte + 1
        for info in sorted((self.tensors[name] for name in names), key=lambda info: (info.file, info.offset)):
            if ranges and ranges[-1][0] == info.file and info.offset - ranges[-1][2] < PREFETCH_GAP:
                ranges[-1] = (info.file, ranges[-1][1], info.offset + info.nbytes)
            else:
                ranges.append((info.file, info.offset, info.offset + info.nbytes))

        def advise() -> None:
            for path, begin, end in ranges if hasattr(os, "posix_fadvise") else ():
                with suppress(OSError), path.open("rb", buffering=0) as file:  # a hint: the read itself will say
                    for start in range(begin, end, PREFETCH_BYTES):
                        size = min(PREFETCH_BYTES, end - start)
                        os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)

        thread = Thread(target=advise, name="prefetch", daemon=True)  # since a full disk queue makes the asking wait
        thread.start()
        return thread

    def companions(self) -> list[Path]:
        """The files beside the weights that an output needs too: tokenizer, generation config, code, licence."""
        weights = {path for pattern in WEIGHT_PATTERNS for path in self.folder.glob(pattern)}
        other_weights = {".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
        return sorted(
            path
            for path in self.folder.iterdir()
            if (path.is_file() or path.name in COMPANION_FOLDERS)
            and path not in weights
            and path.name != "config.json"
            and path.suffix not in other_weights
            and not path.name.endswith(".index.json")
            and not path.name.startswith(".")
        )


def read_bytes(file: FileIO, place: TensorInfo, out: torch.Tensor) -> None:
    """Read the bytes of a place in its open file into `out` [nbytes] uint8; CpruneError where the file ends early."""
    view = memoryview(out.numpy())
    file.seek(place.offset)
    done = 0
    while done < place.nbytes:  # one read call moves at most 2 GiB
        got = file.readinto(view[done:])
        if not got:
            raise CpruneError(f"{place.file} must hold all of {place.name}, got a file that ends early")
        done += got


def _runs(tensors: Iterable[TensorInfo]) -> list[list[TensorInfo]]:
    """Tensors in the order of the disk, those of `RUN_BYTES` of a file together."""
    runs: list[list[TensorInfo]] = []
    for info in sorted(tensors, key=lambda info: (info.file, info.offset)):
        end = info.offset + info.nbytes
        if runs and runs[-1][0].file == info.file and end - runs[-1][0].offset <= RUN_BYTES:
            runs[-1].append(info)
        else:
            runs.append([info])
    return runs


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Open a local folder or a hub id.

    Raises CpruneError where the folder or a file in it is missing, a shard is truncated or not safetensors, or the
    index names tensors that no shard holds.
    """
    folder = _resolve(source)
    config = _read_json(folder / "config.json", f"{folder} must be a checkpoint folder with a config.json")
    shards = _shard_paths(folder)
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for info in read_header(shard):
            if info.name in tensors:
                raise CpruneError(f"every tensor must stand in one shard, got {info.name} in two")
            tensors[info.name] = info
    _check_index(folder, tensors)
    return Checkpoint(folder=folder, config=config, tensors=tensors, shards=shards)


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file, by offset. Raises CpruneError for a truncated or foreign file."""
    length = _header_length(path)
    with path.open("rb") as file:
        file.seek(8)
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CpruneError(f"{path} must be a safetensors file, got a header that is not JSON") from error
    start, size, infos = 8 + length, path.stat().st_size, []
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end:
                raise ValueError(f"{name} at {begin} to {end}")
            infos.append(TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path, start + begin, end - begin))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CpruneError(f"{path} must be a safetensors file, got another header ({error})") from error
    infos.sort(key=lambda info: info.offset)
    expected = max((info.offset + info.nbytes for info in infos), default=start)
    if size < expected:
        raise CpruneError(f"{path} must hold {expected} bytes, got {size}: the shard is truncated")
    for info in infos:
        itemsize = DTYPES[info.dtype].itemsize if info.dtype in DTYPES else None
        if itemsize is not None and math.prod(info.shape) * itemsize != info.nbytes:
            raise CpruneError(
                f"{path}: {info.name} must hold {math.prod(info.shape) * itemsize} bytes, got {info.nbytes}"
            )
    return infos


def _header_length(path: Path) -> int:
    with path.open("rb") as file:
        head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > MAX_HEADER_BYTES or path.stat().st_size < 8 + length:
        raise CpruneError(f"{path} must be a whole safetensors file, got a truncated or foreign one")
    return length


def _resolve(source: str | os.PathLike[str]) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise CpruneError(f"MODEL must be a checkpoint folder or a hub id, got the file {source}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith((".", "/")):
        raise CpruneError(f"MODEL must be an existing checkpoint folder or a hub id, got {source}")
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(HUB_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        raise CpruneError(
            f"MODEL must be an existing checkpoint folder or a reachable hub id, got {source} ({type(error).__name__})"
        ) from error


def _read_json(path: Path, must: str) -> dict[str, object]:
    if not path.is_file():
        raise CpruneError(f"{must}, got none at {path}")
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CpruneError(f"{path} must be JSON, got {error}") from error
    if not isinstance(values, dict):
        raise CpruneError(f"{path} must hold a JSON object, got a {type(values).__name__}")
    return values


def _shard_paths(folder: Path) -> tuple[Path, ...]:
    index_path = folder / INDEX_NAME
    if index_path.is_file():
        weight_map = _read_json(index_path, "the index must be readable").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CpruneError(f"{index_path} must hold a weight_map of file names, got none")
        shards = tuple(folder / name for name in dict.fromkeys(weight_map.values()))
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise CpruneError(
                f"{folder} must hold every shard that its index names, got no {', '.join(sorted(missing))}"
            )
        return tuple(sorted(shards))
    single = folder / "model.safetensors"
    shards = (single,) if single.is_file() else tuple(sorted(folder.glob("*.safetensors")))
    if not shards:
        raise CpruneError(f"{folder} must hold weights as safetensors, got none")
    for shard in shards:
        numbered = re.search(r"-of-(\d+)\.safetensors$", shard.name)
        if numbered and int(numbered[1]) != len(shards):
            raise CpruneError(f"{folder} must hold all {int(numbered[1])} shards, got {len(shards)}")
    return shards


def _check_index(folder: Path, tensors: dict[str, TensorInfo]) -> None:
    index_path = folder / INDEX_NAME
    if not index_path.is_file():
        return
    weight_map = _read_json(index_path, "the index must be readable")["weight_map"]
    missing = sorted(name for name in weight_map if name not in tensors)  # type: ignore[attr-defined]
    if missing:
        raise CpruneError(f"{folder}: the shards must hold every tensor of the index, got no {missing[0]}")
