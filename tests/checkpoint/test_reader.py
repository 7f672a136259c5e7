from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cprune.checkpoint import open_checkpoint
from cprune.checkpoint.reader import DTYPES, INDEX_NAME, read_header
from tests.synthetic import refuses, tensors_of
from tests.tiny import FAMILIES

Tiny = Callable[..., Path]


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A checkpoint in three shards that a test may damage."""
    return Path(shutil.copytree(tiny("olmoe", shards=3), tmp_path / "model"))


@pytest.mark.parametrize("options", [{}, {"shards": 3, "dtype": "bfloat16"}], ids=["single", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_those_that_safetensors_reads(tiny: Tiny, family: str, options: dict[str, object]) -> None:
    source = tiny(family, **options)
    checkpoint, expected = open_checkpoint(source), tensors_of(source)
    assert checkpoint.tensors.keys() == expected.keys() and len(checkpoint.shards) == options.get("shards", 1)
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in expected.values())
    for name, tensor in expected.items():
        got = checkpoint.read(name)
        assert got.dtype == tensor.dtype and torch.equal(got, tensor), name
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)


def test_every_data_type_is_read(tmp_path: Path) -> None:
    values = torch.arange(1, 13).reshape(3, 4)
    tensors = {name: values.to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 4), "no_axes_of_one": torch.ones(1, 1, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        got = checkpoint.read(name)
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        assert torch.equal(got.view(torch.uint8) if got.ndim else got, tensor.view(torch.uint8) if got.ndim else tensor)


def test_header_gives_the_bytes_of_every_tensor(tiny: Tiny) -> None:
    path = tiny("olmoe") / "model.safetensors"
    raw, tensors, infos = path.read_bytes(), tensors_of(path.parent), read_header(path)
    assert [info.offset for info in infos] == sorted(info.offset for info in infos)
    assert infos[-1].offset + infos[-1].nbytes == len(raw)
    for info in infos:
        assert raw[info.offset : info.offset + info.nbytes] == tensors[info.name].numpy().tobytes(), info.name


def test_reads_into_other_types_and_strides(tiny: Tiny) -> None:
    checkpoint = open_checkpoint(tiny("qwen3_moe", dtype="bfloat16"))
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    expected = tensors_of(checkpoint.folder)[name]  # [24, 48] bfloat16
    for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.float16):
        whole = torch.full((4, 24, 48), torch.nan, dtype=dtype)
        checkpoint.read_into(name, whole[2])
        assert torch.equal(whole[2], expected.to(dtype)) and torch.isnan(whole[[0, 1, 3]]).all()
        strided = torch.full((24, 2, 48), torch.nan, dtype=dtype)
        checkpoint.read_into(name, strided[:, 1])
        assert torch.equal(strided[:, 1], expected.to(dtype)) and torch.isnan(strided[:, 0]).all()
        turned = torch.full((48, 24), torch.nan, dtype=dtype)
        checkpoint.read_into(name, turned.T)
        assert torch.equal(turned, expected.to(dtype).T)
    flat = torch.empty(24 * 48)
    checkpoint.read_into(name, flat)
    assert torch.equal(flat, expected.float().flatten())


@pytest.mark.parametrize("together", [0, 5000, 1 << 30])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_tensors_read_together_are_those_read_one_by_one(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, family: str, together: int
) -> None:
    monkeypatch.setattr("cprune.checkpoint.reader.RUN_BYTES", together)
    checkpoint = open_checkpoint(tiny(family, shards=3, dtype="bfloat16"))
    expected = tensors_of(checkpoint.folder)
    names = sorted(expected, reverse=True)[::2]  # not in the order of the disk
    targets = {}
    for number, name in enumerate(names):
        dtype = torch.float32 if number % 3 else torch.bfloat16
        targets[name] = torch.full((*expected[name].shape, 2), torch.nan, dtype=dtype)[..., number % 2]
    whole = {name: torch.empty_like(expected[name]) for name in expected if name not in targets}
    checkpoint.read_all_into({**targets, **whole})
    for name, target in {**targets, **whole}.items():
        assert torch.equal(target, expected[name].to(target.dtype)), name
    checkpoint.read_all_into({})


def test_what_is_read_is_its_owners(tiny: Tiny) -> None:
    checkpoint = open_checkpoint(tiny("olmoe"))
    first = checkpoint.read("model.norm.weight")
    expected = first.clone()
    first.zero_()
    assert torch.equal(checkpoint.read("model.norm.weight"), expected)


def test_prefetch_asks_for_every_byte(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, asked = open_checkpoint(folder), []
    names = [name for name in checkpoint.tensors if "layers.1." in name]
    monkeypatch.setattr("cprune.checkpoint.reader.PREFETCH_BYTES", 1000)
    monkeypatch.setattr("cprune.checkpoint.reader.PREFETCH_GAP", 100)

    def advise(descriptor: int, start: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED and 0 < size <= 1000
        asked.append((os.readlink(f"/proc/self/fd/{descriptor}"), start, start + size))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    checkpoint.prefetch(names).join()
    for name in names:
        info = checkpoint.tensors[name]
        parts = sorted((lo, hi) for path, lo, hi in asked if path == str(info.file))
        reached = info.offset
        for low, high in parts:
            reached = max(reached, high) if low <= reached else reached
        assert reached >= info.offset + info.nbytes, name
    wanted = sum(checkpoint.tensors[name].nbytes for name in names)
    assert wanted <= sum(high - low for _, low, high in asked) <= wanted + 100 * len(names)
    (folder / checkpoint.shards[0].name).unlink()
    checkpoint.prefetch(names).join()  # only a hint


def test_data_type_that_torch_lacks_is_refused_by_name(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    with refuses("w must have a data type.*F4"):
        checkpoint.read("w")


def test_truncated_shard_is_refused_by_name(folder: Path) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 5000, 100, 7, 0):
        shard.write_bytes(whole[:length])
        with refuses("model-00002-of-00003.safetensors must"):
            open_checkpoint(folder)


def test_shard_truncated_after_opening_is_refused(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    info = max(checkpoint.tensors.values(), key=lambda info: (info.file.name, info.offset))
    os.truncate(info.file, info.offset + 10)
    with refuses("ends early"):
        checkpoint.read(info.name)


def test_missing_shard_is_refused_with_and_without_an_index(folder: Path) -> None:
    (folder / "model-00003-of-00003.safetensors").unlink()
    with refuses("model-00003-of-00003.safetensors"):
        open_checkpoint(folder)
    (folder / INDEX_NAME).unlink()
    with refuses("all 3 shards, got 2"):
        open_checkpoint(folder)


def test_shards_open_without_an_index(folder: Path) -> None:
    names = open_checkpoint(folder).tensors.keys()
    (folder / INDEX_NAME).unlink()
    assert open_checkpoint(folder).tensors.keys() == names


def test_index_that_names_what_no_shard_holds_is_refused(folder: Path) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["model.layers.9.mlp.gate.weight"] = "model-00001-of-00003.safetensors"
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with refuses("got no model.layers.9.mlp.gate.weight"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_index_of_another_shape_is_refused(folder: Path, text: str) -> None:
    (folder / INDEX_NAME).write_text(text)
    with refuses(INDEX_NAME):
        open_checkpoint(folder)


def test_tensor_in_two_shards_is_refused(folder: Path) -> None:
    shutil.copyfile(folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors")
    with refuses("one shard, got .* in two"):
        open_checkpoint(folder)


def _file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 a pickle in a zip, as torch.save writes it",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        _file(b"not json"),
        _file(b"\xff\xfe\xfa"),
        _file([]),
        _file({"a": 3}),
        _file({"a": {"dtype": "F32", "shape": [1]}}),
        _file({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, b"abcd"),
        _file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"abcd"),
        _file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"abcd"),
        _file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]}}, b"abcd"),
    ],
)
def test_foreign_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    with refuses("model.safetensors"):
        open_checkpoint(tmp_path)


def test_folder_without_config_or_weights_is_refused(tmp_path: Path) -> None:
    with refuses("config.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with refuses("weights as safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with refuses("weights as safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_config_that_is_no_object_is_refused(tiny: Tiny, tmp_path: Path, text: str) -> None:
    folder = Path(shutil.copytree(tiny("olmoe"), tmp_path / "model"))
    (folder / "config.json").write_text(text)
    with refuses("config.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize("source", ["/nowhere/model", "./model", "model", "a/b/c", ""])
def test_what_is_neither_folder_nor_hub_id_is_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if source == "":
        (tmp_path / "config.json").write_text("[]")  # "" is the current folder
    with refuses("MODEL must be|config.json"):
        open_checkpoint(source)


def test_file_instead_of_a_folder_is_refused(tiny: Tiny) -> None:
    with refuses("got the file"):
        open_checkpoint(tiny("olmoe") / "model.safetensors")


def test_fingerprint_is_of_the_content(tiny: Tiny, tmp_path: Path) -> None:
    original = open_checkpoint(tiny("olmoe")).fingerprint
    copy = Path(shutil.copytree(tiny("olmoe"), tmp_path / "elsewhere" / "copy"))
    (copy / "README.md").write_text("a companion")
    assert open_checkpoint(copy).fingerprint == original and len(original) == 64
    file, config = copy / "model.safetensors", (copy / "config.json").read_text()
    tensors, raw = open_checkpoint(copy).tensors, bytearray(file.read_bytes())
    for name, share in (("model.layers.1.mlp.gate.weight", 0.9), ("model.layers.0.self_attn.q_proj.weight", 0.5)):
        place = tensors[name].offset + int(tensors[name].nbytes * share)
        raw[place] ^= 1  # one bit: anywhere in a router, in the middle of any other tensor
        file.write_bytes(raw)
        assert open_checkpoint(copy).fingerprint != original
        raw[place] ^= 1
        file.write_bytes(raw)
        assert open_checkpoint(copy).fingerprint == original
    (copy / "config.json").write_text(config.replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 3'))
    assert open_checkpoint(copy).fingerprint != original
    (copy / "config.json").write_text(json.dumps(json.loads(config)))  # other spaces, same values
    assert open_checkpoint(copy).fingerprint == original


def test_fingerprint_tells_models_apart_and_not_shardings(tiny: Tiny) -> None:
    sources = [tiny("olmoe"), tiny("olmoe", seed=1), tiny("mixtral")]
    assert len({open_checkpoint(source).fingerprint for source in sources}) == 3
    assert open_checkpoint(tiny("olmoe", shards=3)).fingerprint == open_checkpoint(tiny("olmoe")).fingerprint


def test_companions_are_all_but_weights_and_config(folder: Path) -> None:
    for name in ("LICENSE", "modeling_x.py", "pytorch_model.bin", "model.gguf", ".gitattributes", "x.index.json"):
        (folder / name).write_text("")
    (folder / "original").mkdir()
    (folder / "additional_chat_templates").mkdir()
    assert [path.name for path in open_checkpoint(folder).companions()] == [
        *(
            "LICENSE",
            "additional_chat_templates",
            "generation_config.json",
            "modeling_x.py",
            "tokenizer.json",
            "tokenizer_config.json",
        ),
    ]
