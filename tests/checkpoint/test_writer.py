from __future__ import annotations

import collections
import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cprune.checkpoint import Checkpoint, open_checkpoint, writer
from cprune.checkpoint.reader import INDEX_NAME
from cprune.checkpoint.writer import (
    SPARE_BYTES,
    OutputTensor,
    Piece,
    check_output,
    check_space,
    write_checkpoint,
)
from tests.synthetic import refuses, tensors_of

Tiny = Callable[..., Path]


@pytest.fixture
def source(tiny: Tiny) -> Checkpoint:
    return open_checkpoint(tiny("qwen2_moe", shards=3, dtype="bfloat16"))


def whole(checkpoint: Checkpoint) -> list[list[OutputTensor]]:
    """Every tensor of every shard, as it is."""
    shards: dict[Path, list[OutputTensor]] = {shard: [] for shard in checkpoint.shards}
    for info in checkpoint.tensors.values():
        piece = Piece(info.file, info.offset, info.nbytes)
        shards[info.file].append(OutputTensor(info.name, info.dtype, info.shape, (piece,)))
    return list(shards.values())


def write(checkpoint: Checkpoint, out: Path) -> int:
    return write_checkpoint(out, whole(checkpoint), checkpoint.config, checkpoint.companions(), {"note.txt": "ä\n"})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_load_with_safetensors_and_the_index_is_right(source: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    assert write(source, out) == source.nbytes
    expected, got = tensors_of(source.folder), tensors_of(out)
    assert got.keys() == expected.keys()
    assert all(got[name].dtype == tensor.dtype and torch.equal(got[name], tensor) for name, tensor in expected.items())
    index = json.loads((out / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert index["weight_map"] == {
        name: file.name for file in sorted(out.glob("*.safetensors")) for name in load_file(file)
    }
    assert json.loads((out / "config.json").read_text()) == source.config and (out / "note.txt").read_text() == "ä\n"
    for path in source.companions():
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_data_begins_on_a_multiple_of_eight_bytes(source: Checkpoint, tmp_path: Path) -> None:
    write(source, tmp_path / "out")
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_one_file_has_no_index_and_empty_shards_leave_no_gap(source: Checkpoint, tmp_path: Path) -> None:
    first, second, third = whole(source)
    write_checkpoint(tmp_path / "one", [[], second, []], source.config, [], {})
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["config.json", "model.safetensors"]
    assert load_file(tmp_path / "one" / "model.safetensors").keys() == {tensor.name for tensor in second}
    write_checkpoint(tmp_path / "two", [first, [], third], source.config, [], {})
    names = sorted(path.name for path in (tmp_path / "two").glob("*.safetensors"))
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert open_checkpoint(tmp_path / "two").tensors.keys() == {tensor.name for tensor in first + third}


def test_pieces_are_joined_in_the_order_given(source: Checkpoint, tmp_path: Path) -> None:
    info = source.tensors["model.embed_tokens.weight"]
    row = info.nbytes // info.shape[0]
    rows = [5, 6, 7, 2, 300, 1, 0]
    pieces = tuple(Piece(info.file, info.offset + r * row, row) for r in rows)
    tensor = OutputTensor("rows", info.dtype, (len(rows), info.shape[1]), pieces)
    write_checkpoint(tmp_path / "out", [[tensor]], {}, [], {})
    got = load_file(tmp_path / "out" / "model.safetensors")["rows"]
    assert torch.equal(got, source.read("model.embed_tokens.weight")[rows])


@pytest.mark.parametrize("how", ["absent", *(errno.errorcode[n] for n in (errno.EXDEV, errno.ENOSYS, errno.EINVAL))])
def test_copying_by_hand_gives_the_same_bytes(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    write(source, tmp_path / "kernel")

    def refuse(*args: object, **options: object) -> int:
        raise OSError(getattr(errno, how), how)

    if how == "absent":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    else:
        monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    monkeypatch.setattr(writer, "COPY_CHUNK", 1000)  # several steps a range
    write(source, tmp_path / "hand")
    assert content(tmp_path / "hand") == content(tmp_path / "kernel")


def test_short_copies_are_continued(source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(source, tmp_path / "whole")
    copy = os.pread

    def few(target: int, data: bytes) -> int:
        return write_bytes(target, data[: max(1, len(data) // 2)])

    def in_kernel(src: int, target: int, count: int, offset_src: int) -> int:
        return few(target, copy(src, count, offset_src))

    write_bytes = os.write
    monkeypatch.setattr(os, "copy_file_range", in_kernel, raising=False)
    write(source, tmp_path / "short")
    assert content(tmp_path / "short") == content(tmp_path / "whole")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("fault"), OSError(errno.EIO, "I/O error")])
def test_whatever_happens_midway_leaves_nothing(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    steps = iter(range(2))
    monkeypatch.setattr(writer, "_copy", _failing_copy(error, steps))
    with pytest.raises(type(error)):
        write(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _failing_copy(error: BaseException, steps: Any) -> Callable[..., None]:
    copy = writer._copy

    def failing(*args: Any) -> None:
        if next(steps, None) is None:
            raise error
        copy(*args)

    return failing


def test_files_are_written_at_the_same_time_and_end_together(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_begun = threading.Barrier(writer.WRITERS, timeout=60)
    waited: set[int] = set()
    steps: list[int] = []

    def copy(src: int, target: int, count: int, offset_src: int) -> int:
        if target not in waited:
            waited.add(target)
            if both_begun.wait() == 0:
                raise OSError(errno.EIO, "I/O error")
        steps.append(target)
        time.sleep(0.01)
        return os.write(target, os.pread(src, count, offset_src))

    monkeypatch.setattr(os, "copy_file_range", copy, raising=False)
    monkeypatch.setattr(writer, "COPY_CHUNK", 100)
    with pytest.raises(OSError, match="I/O error"):
        write(source, tmp_path / "out")
    assert 1 <= len(steps) < 100 < source.nbytes / len(source.shards) / writer.COPY_CHUNK
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_disk_that_fills_up_is_one_sentence_and_leaves_nothing(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    steps = iter(range(2))

    def copy(src: int, target: int, count: int, offset_src: int) -> int:
        if next(steps, None) is None:
            raise OSError(number, os.strerror(number))
        return os.write(target, os.pread(src, count, offset_src))

    monkeypatch.setattr(os, "copy_file_range", copy, raising=False)
    with refuses(os.strerror(number)):
        write(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_disk_without_room_is_refused_before_anything_is_written(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = collections.namedtuple("usage", "total used free")
    asked: list[Path] = []

    def disk_usage(path: Path) -> object:
        asked.append(Path(path))
        return usage(0, 0, source.nbytes + SPARE_BYTES - 1)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    out = tmp_path / "deep" / "er" / "out"
    with refuses("GB free, got"):
        write(source, out)
    assert asked == [tmp_path] and list(tmp_path.iterdir()) == []
    check_space(out, source.nbytes - 1)  # one byte less fits


def test_what_a_killed_run_left_is_cleared_away(source: Checkpoint, tmp_path: Path) -> None:
    stale = tmp_path / ".out.partial"
    stale.mkdir()
    (stale / "model-00009-of-00009.safetensors").write_bytes(b"x" * 100)
    write(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "model-00009-of-00009.safetensors" not in content(tmp_path / "out")


def test_empty_folder_is_taken_and_one_filled_meanwhile_is_left(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    write(source, tmp_path / "empty")
    out = tmp_path / "out"
    copyfile = shutil.copyfile

    def meanwhile(src: Path, target: Path) -> Path:
        out.mkdir(exist_ok=True)
        (out / "theirs").write_text("kept")
        return copyfile(src, target)

    monkeypatch.setattr(shutil, "copyfile", meanwhile)
    with refuses("OUT must be writable to the end"):
        write(source, out)
    assert [path.name for path in out.iterdir()] == ["theirs"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out"]


def test_source_that_ends_early_is_refused(source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = tmp_path / "short"
    short.write_bytes(b"x" * 100)
    tensor = OutputTensor("w", "U8", (200,), (Piece(short, 0, 200),))
    for how in ("kernel", "hand"):
        if how == "hand":
            monkeypatch.delattr(os, "copy_file_range", raising=False)
        with refuses("must hold 200 bytes, got a file that ends early"):
            write_checkpoint(tmp_path / "out", [[tensor]], {}, [], {})
        assert [path.name for path in tmp_path.iterdir()] == ["short"]


def test_output_must_be_new_outside_the_source_and_writable(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_output(tmp_path, source.folder)
    check_output(tmp_path / "a" / "b", source.folder)
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file"):
        with refuses("OUT must not exist or be an empty folder"):
            check_output(out, source.folder)
    with refuses("OUT must not exist"):
        check_output(source.folder, source.folder)
    with refuses("OUT must lie outside MODEL"):
        check_output(source.folder / "out", source.folder)
    (tmp_path / "link").symlink_to(source.folder)
    with refuses("OUT must lie outside MODEL"):
        check_output(tmp_path / "link" / "a" / "out", source.folder)
    with refuses("OUT must lie in a folder that can be written"):
        check_output(tmp_path / "file" / "out", source.folder)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with refuses("OUT must lie in a folder that can be written"):
        check_output(tmp_path / "out", source.folder)


def test_output_beside_a_source_of_the_same_beginning_is_fine(source: Checkpoint) -> None:
    check_output(source.folder.with_name(source.folder.name + "-small"), source.folder)
