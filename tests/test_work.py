from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cprune.stats import ExpertStats
from cprune.work import WorkFolder
from tests.synthetic import expert_stats, refuses

NAMES = tuple(f"model.layers.{index}.mlp" for index in (1, 2, 10))


class Measurement:
    """Statistics of three layers; counts how often it was asked."""

    def __init__(self, seed: int = 0, fail_after: int | None = None) -> None:
        self.calls, self.seed, self.fail_after = 0, seed, fail_after

    def __call__(self) -> Iterator[ExpertStats]:
        self.calls += 1
        for place, name in enumerate(NAMES):
            if place == self.fail_after:
                raise KeyboardInterrupt
            yield expert_stats(4 + place, layer=name, seed=self.seed + place)


def test_statistics_are_measured_once(tmp_path: Path) -> None:
    measure, work = Measurement(), WorkFolder(tmp_path / "a" / "out.work")
    first = work.stats("source", measure)
    again = WorkFolder(work.path).stats("source", measure)
    assert measure.calls == 1 and list(first) == list(again) == list(NAMES)
    for place, name in enumerate(NAMES):
        expected = expert_stats(4 + place, layer=name, seed=place)
        assert again[name].layer == name and torch.equal(again[name].norm_sum, expected.norm_sum)


def test_another_source_replaces_them(tmp_path: Path) -> None:
    work, other = WorkFolder(tmp_path), Measurement(seed=7)
    work.stats("source", Measurement())
    assert torch.equal(work.stats("other", other)[NAMES[0]].norm_sum, expert_stats(4, seed=7).norm_sum)
    again = Measurement()
    work.stats("source", again)
    assert (other.calls, again.calls) == (1, 1)


def test_interrupted_measurement_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path)
    work.stats("source", Measurement(seed=3))
    with pytest.raises(KeyboardInterrupt):
        work.stats("other", Measurement(fail_after=2))
    for source in ("source", "other"):  # the first layers on disk are of the other by now
        measure = Measurement(seed=3)
        assert torch.equal(work.stats(source, measure)[NAMES[2]].norm_sum, expert_stats(6, seed=5).norm_sum)
        assert measure.calls == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"key": 3}'])
def test_index_that_is_none_means_measuring_again(tmp_path: Path, text: str) -> None:
    work, measure = WorkFolder(tmp_path), Measurement()
    work.stats("source", Measurement())
    (tmp_path / "stats.json").write_text(text)
    assert list(work.stats("source", measure)) == list(NAMES) and measure.calls == 1


def test_damaged_statistics_are_measured_again(tmp_path: Path) -> None:
    work, measure = WorkFolder(tmp_path), Measurement()
    work.stats("source", Measurement())
    (tmp_path / "stats-001.safetensors").write_bytes(b"x")
    assert list(work.stats("source", measure)) == list(NAMES) and measure.calls == 1


def test_outputs_on_sequences_stay_on_disk_unless_asked_for(tmp_path: Path) -> None:
    work, measure = WorkFolder(tmp_path), Measurement()
    lean = work.stats("source", measure)
    assert all(layer.sequence_outputs.shape[1] == 0 for layer in lean.values())
    whole = work.stats("source", measure, sequences=True)
    assert measure.calls == 1
    for layer in Measurement()():
        assert whole[layer.layer].sequence_outputs.shape[1] == 3
        assert torch.equal(whole[layer.layer].sequence_outputs, layer.sequence_outputs)


def test_completed_statistics_stay(tmp_path: Path) -> None:
    work, measure = WorkFolder(tmp_path), Measurement()
    stats = work.stats("source", measure)
    other = {name: expert_stats(layer.num_experts, layer=name, seed=50) for name, layer in stats.items()}
    work.complete_stats(other, ("weight_gram", "unit_gram"))
    found = work.stats("source", measure, sequences=True)[NAMES[1]]
    assert measure.calls == 1 and torch.equal(found.unit_gram, other[NAMES[1]].unit_gram)
    assert torch.equal(found.weight_gram, other[NAMES[1]].weight_gram)
    assert torch.equal(found.relative_sum, stats[NAMES[1]].relative_sum)  # the rest is as it was
    assert found.sequence_outputs.shape[1] == 3


def test_folder_that_cannot_be_made_is_refused_before_measuring(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    measure = Measurement()
    with refuses("the work folder must be writable"):
        WorkFolder(tmp_path / "file" / "work").stats("source", measure)
    assert measure.calls == 0
