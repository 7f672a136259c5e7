from __future__ import annotations

import json
from pathlib import Path

import pytest

from cprune.config import PruneConfig
from cprune.plan import PLAN_VERSION, LayerPlan, PrunePlan
from tests.synthetic import layer_plan, refuses

LAYER = {
    "layer": "model.layers.1.mlp",
    "num_experts": 4,
    "kept": (0, 2),
    "cluster": (0, 0, 1, 1),
    "score": (1.5, 0.1, 2.25, 1 / 3),
    "stand_in": (0, 0, 2, 2),
    "similarity": (1.0, 0.75, 1.0, -0.5),
}
PLAN = PrunePlan(
    fingerprint="ab" * 32,
    model_type="olmoe",
    layers=(LayerPlan(**LAYER), layer_plan("model.layers.2.mlp", 6, [1, 3, 4])),
    config=PruneConfig(ratio=0.5).to_dict(),
    versions={"cprune": "0", "torch": "2"},
)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kept": ()}, "kept must be ascending"),
        ({"kept": (2, 0)}, "kept must be ascending"),
        ({"kept": (0, 0, 2)}, "kept must be ascending"),
        ({"kept": (-1, 0, 2)}, "kept must be ascending"),
        ({"kept": (0, 2, 4)}, "below 4"),
        ({"cluster": (0, 0, 1)}, "cluster must have 4 entries, got 3"),
        ({"score": (0.0,) * 5}, "score must have 4 entries, got 5"),
        ({"stand_in": (0, 0)}, "stand_in must have 4"),
        ({"similarity": ()}, "similarity must have 4"),
        ({"stand_in": (0, 1, 2, 2)}, r"stand_in must name kept experts, got \[1\]"),
    ],
)
def test_layer_that_contradicts_itself_is_refused(change: dict[str, object], match: str) -> None:
    with refuses(f"^model.layers.1.mlp: .*{match}"):
        LayerPlan(**{**LAYER, **change})  # type: ignore[arg-type]
    values = json.loads(PLAN.to_json())
    values["layers"][0] |= change
    with refuses(f"^plan.json must .*{match}"):
        PrunePlan.from_json(json.dumps(values), "plan.json")


def test_round_trips_exactly(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    loaded = PrunePlan.load(tmp_path / "plan.json")
    assert loaded == PLAN and PrunePlan.from_json(PLAN.to_json()).to_json() == PLAN.to_json()
    assert PruneConfig.from_dict(loaded.config).ratio == 0.5
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_text_is_json_with_a_line_per_list() -> None:
    lines = PLAN.to_json().splitlines()
    assert json.loads(PLAN.to_json())["layers"][0]["kept"] == [0, 2]
    assert '   "kept": [0, 2],' in lines and PLAN.to_json().endswith("}\n")
    assert len(lines) < 40


def test_shares_and_uniformity_are_those_of_the_layers() -> None:
    assert PLAN.removed_share == pytest.approx(5 / 10)
    assert not PLAN.uniform and PLAN["model.layers.1.mlp"].dropped == (1, 3)
    assert PrunePlan("f", "m", (layer_plan("a", 5, [0, 4]), layer_plan("b", 9, [1, 2]))).uniform
    with pytest.raises(KeyError, match="model.layers.3.mlp"):
        PLAN["model.layers.3.mlp"]


@pytest.mark.parametrize("text", ["", "{", '{"cprune_plan": 1', "kept: [1]", PLAN.to_json()[:-30]])
def test_corrupt_json_is_refused(text: str) -> None:
    with refuses("plan.json must be JSON"):
        PrunePlan.from_json(text, "plan.json")


@pytest.mark.parametrize("text", ["[]", "null", "3", "{}", '{"cprune_plan": 2}', '{"cprune_plan": "1"}'])
def test_other_versions_and_other_json_are_refused(text: str) -> None:
    with refuses(f"of version {PLAN_VERSION}"):
        PrunePlan.from_json(text, "plan.json")


@pytest.mark.parametrize("key", ["fingerprint", "model_type", "layers", "config", "versions"])
def test_plan_that_lacks_a_field_is_refused(key: str) -> None:
    values = json.loads(PLAN.to_json())
    del values[key]
    with refuses(f"plan.json must hold every field.*{key}"):
        PrunePlan.from_json(json.dumps(values), "plan.json")


@pytest.mark.parametrize("key", list(LAYER))
def test_layer_that_lacks_a_field_is_refused(key: str) -> None:
    values = json.loads(PLAN.to_json())
    del values["layers"][1][key]
    with refuses(f"plan.json must hold every field.*{key}"):
        PrunePlan.from_json(json.dumps(values), "plan.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kept", 3),
        ("kept", ["a"]),
        ("score", [None] * 4),
        ("num_experts", "many"),
        ("stand_in", None),
        ("cluster", [[]]),
    ],
)
def test_layer_with_a_foreign_value_is_refused(key: str, value: object) -> None:
    values = json.loads(PLAN.to_json())
    values["layers"][0][key] = value
    with refuses("plan.json must hold every field"):
        PrunePlan.from_json(json.dumps(values), "plan.json")


@pytest.mark.parametrize("value", [3, "model.layers.1.mlp", [3], [None], {"a": 1}])
def test_layers_of_another_shape_are_refused(value: object) -> None:
    with refuses("plan.json must hold every field"):
        PrunePlan.from_json(json.dumps({**json.loads(PLAN.to_json()), "layers": value}), "plan.json")


def test_plan_without_layers_is_refused() -> None:
    with refuses("at least one layer"):
        PrunePlan.from_json(json.dumps({**json.loads(PLAN.to_json()), "layers": []}))


def test_fields_of_later_versions_are_no_harm() -> None:
    values = json.loads(PLAN.to_json())
    values["merged"] = {}
    values["layers"][0]["weight"] = [1.0] * 4
    assert PrunePlan.from_json(json.dumps(values)) == PLAN


def test_file_that_is_not_text_or_not_there_is_refused(tmp_path: Path) -> None:
    with refuses("none.json"):
        PrunePlan.load(tmp_path / "none.json")
    with refuses(str(tmp_path)):
        PrunePlan.load(tmp_path)
    (tmp_path / "bytes.json").write_bytes(b"\x80\x81\xff")
    with refuses("bytes.json"):
        PrunePlan.load(tmp_path / "bytes.json")


def test_save_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refuses("the plan must be writable"):
        PLAN.save(tmp_path / "none" / "plan.json")
    PLAN.save(tmp_path / "plan.json")
    before = (tmp_path / "plan.json").read_text()

    def full(self: Path, text: str, **options: object) -> int:
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with refuses("No space left"):
        PrunePlan("other", "m", PLAN.layers).save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == before
