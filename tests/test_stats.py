from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cprune.stats import TENSOR_FIELDS, ExpertStats
from tests.synthetic import expert_stats, refuses


def test_round_trips_exactly(tmp_path: Path) -> None:
    stats = expert_stats(7, cka=torch.eye(7, dtype=torch.float64).T, weight_gram=torch.zeros(0, dtype=torch.float64))
    stats.save(tmp_path / "stats.safetensors")
    loaded = ExpertStats.load(tmp_path / "stats.safetensors")
    assert (loaded.layer, loaded.tokens, loaded.num_experts) == (stats.layer, stats.tokens, 7)
    for name in TENSOR_FIELDS:
        got, expected = getattr(loaded, name), getattr(stats, name)
        assert got.dtype == expected.dtype and torch.equal(got, expected), name
    assert [file.name for file in tmp_path.iterdir()] == ["stats.safetensors"]


def test_tensors_that_are_not_contiguous_are_saved(tmp_path: Path) -> None:
    gram = torch.rand(5, 5, dtype=torch.float64)
    expert_stats(router_gram=gram.T).save(tmp_path / "s.safetensors")
    assert torch.equal(ExpertStats.load(tmp_path / "s.safetensors").router_gram, gram.T)


def test_failing_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.safetensors"
    expert_stats(seed=1).save(path)
    before = path.read_bytes()

    def full(tensors: object, partial: Path, **options: object) -> None:
        partial.write_bytes(before[: len(before) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cprune.stats.save_file", full)
    with refuses("the work folder must be writable, got .*No space left on device"):
        expert_stats(seed=2).save(path)
    assert path.read_bytes() == before


def test_what_is_not_statistics_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    with refuses("s.safetensors must hold the statistics of a layer"):
        ExpertStats.load(path)
    path.write_bytes(b"{}")
    with refuses("statistics of a layer"):
        ExpertStats.load(path)
    save_file({"count": torch.ones(3)}, path)
    with refuses("statistics of a layer"):
        ExpertStats.load(path)
    stats = expert_stats()
    tensors = {name: getattr(stats, name).clone() for name in TENSOR_FIELDS}
    save_file(tensors, path)
    with refuses("statistics of a layer"):  # no header
        ExpertStats.load(path)
    header = {"stats": json.dumps({"layer": "model.layers.0.mlp", "tokens": 3})}
    save_file(tensors | {"later": torch.ones(1)}, path, header)
    with refuses("other tensors"):
        ExpertStats.load(path)
    save_file(tensors, path, header)
    assert ExpertStats.load(path).tokens == 3


@pytest.mark.parametrize("header", ["{", "[]", '"x"', "{}", '{"layer": "a"}'])
def test_foreign_headers_are_refused(tmp_path: Path, header: str) -> None:
    stats = expert_stats()
    tensors = {name: getattr(stats, name).clone() for name in TENSOR_FIELDS}
    save_file(tensors, tmp_path / "s.safetensors", {"stats": header})
    with refuses("statistics of a layer"):
        ExpertStats.load(tmp_path / "s.safetensors")


def test_half_written_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    expert_stats(9).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with refuses("statistics of a layer"):
        ExpertStats.load(path)


def test_fields_are_tensors_but_for_two() -> None:
    assert {field.name for field in dataclasses.fields(ExpertStats)} - set(TENSOR_FIELDS) == {"layer", "tokens"}
