from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from cprune.config import MEASURE_FIELDS, PruneConfig, parse_blend
from tests.synthetic import refuses

REFUSED = [
    ("ratio", 0.0),
    ("ratio", 1.0),
    ("ratio", -0.25),
    ("ratio", float("nan")),
    ("ratio", "0.5"),
    ("ratio", True),
    ("paper_layer_rate", 0),
    ("paper_layer_rate", 1.5),
    ("method", "c-prune"),
    ("budget", "layer"),
    ("repair", "up"),
    ("action", "fuse"),
    ("action", None),
    ("router", "keep"),
    ("distill", "all"),
    ("steps", 0),
    ("steps", 1.5),
    ("linkage", "single"),
    ("dtype", "float16"),
    ("protect", "all"),
    ("tokens", 0),
    ("tokens", 10.5),
    ("tokens", "all"),
    ("tokens", True),
    ("seq_len", 1),
    ("batch_tokens", 0),
    ("sample_tokens", 0),
    ("sample_sequences", 0),
    ("multiple_of", 0),
    ("min_keep", 0),
    ("slack", -1),
    ("clusters", 0),
    ("clusters", 2.0),
    ("cluster_distance", -0.1),
    ("cluster_distance", 2.1),
    ("cluster_distance", float("nan")),
    ("seed", -1),
    ("evaluate_tokens", 1),
    ("calibration", "  "),
    ("calibration", None),
    ("evaluate", ""),
    ("similarity", "output"),
    ("similarity", "outputs:-1"),
    ("similarity", "outputs:x"),
    ("similarity", "outputs:inf"),
    ("similarity", "outputs:0,cka:0"),
    ("similarity", ""),
    ("skip_first", 1),
    ("verify", "no"),
    ("work_dir", 3),
]


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_value_that_no_model_can_use_is_refused(field: str, value: object) -> None:
    with refuses(f"^{field} must "):
        PruneConfig(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ratio", 1e-9),
        ("ratio", 0.999),
        ("cluster_distance", 0),
        ("cluster_distance", 2),
        ("clusters", 1),
        ("slack", 0),
    ],
)
def test_values_at_the_edge_are_taken(field: str, value: object) -> None:
    assert getattr(PruneConfig(**{field: value}), field) == value  # type: ignore[arg-type]


def test_every_field_is_checked_for_its_type() -> None:
    for field in dataclasses.fields(PruneConfig):
        with refuses(f"^{field.name} must "):
            PruneConfig(**{field.name: object()})  # type: ignore[arg-type]


def test_round_trips_through_plain_json() -> None:
    config = PruneConfig(
        ratio=0.5, method="reap", clusters=7, work_dir="w", similarity="outputs:3,cka", skip_first=True
    )
    assert PruneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with refuses("got ratios, z"):
        PruneConfig.from_dict({"ratios": 0.5, "z": 1, "ratio": 0.5})


def test_replace_checks_again_and_leaves_the_original() -> None:
    config = PruneConfig()
    assert config.replace(ratio=0.5).ratio == 0.5 and config.ratio == PruneConfig.ratio
    with refuses("ratio"):
        config.replace(ratio=2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.ratio = 0.5  # type: ignore[misc]


def test_yaml_takes_dashes_and_underscores(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("ratio: 0.5\nseq-len: 128\nskip_first: true\n")
    assert PruneConfig.from_yaml(file) == PruneConfig(ratio=0.5, seq_len=128, skip_first=True)
    file.write_text("")
    assert PruneConfig.from_yaml(file) == PruneConfig()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("- ratio\n", "mapping"),
        ("ratio: [0.5\n", "must be YAML"),
        ("ratios: 0.5\n", "ratios"),
        ("ratio: half\n", "ratio must"),
        ("1: 2\n", "got 1"),
    ],
)
def test_yaml_that_is_not_options_is_refused(tmp_path: Path, text: str, match: str) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    with refuses(match):
        PruneConfig.from_yaml(file)


def test_yaml_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with refuses("none.yaml"):
        PruneConfig.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa ratio")
    with refuses("bytes.yaml"):
        PruneConfig.from_yaml(tmp_path / "bytes.yaml")


def test_measure_key_tells_measurements_apart_and_nothing_else() -> None:
    other = {"calibration": "x.txt", "skip_first": True, "dtype": "float32"}
    config = PruneConfig()
    for field in dataclasses.fields(PruneConfig):
        value = getattr(config, field.name)
        if field.name in MEASURE_FIELDS:
            changed = (
                config.replace(**{field.name: other.get(field.name, value if value is None else -1)})
                if (field.name in other)
                else config.replace(**{field.name: value + 2})
            )
            assert changed.measure_key() != config.measure_key(), field.name
    same = config.replace(ratio=0.5, method="reap", budget="uniform", similarity="cka", slack=3, evaluate="none")
    assert same.measure_key() == config.measure_key()


def test_blend_weights_sum_to_one() -> None:
    assert parse_blend("outputs") == {"outputs": 1.0}
    assert parse_blend("outputs:0.8, weights:0.2") == pytest.approx({"outputs": 0.8, "weights": 0.2})
    assert parse_blend("cka:3,units") == pytest.approx({"cka": 0.75, "units": 0.25})
    assert parse_blend("cka,cka,units:2") == pytest.approx({"cka": 0.5, "units": 0.5})


def test_a_merge_and_a_map_need_text() -> None:
    assert PruneConfig(action="merge", router="map").router == "map"
    with refuses("calibration must name a text for --action merge, got 'none'"):
        PruneConfig(action="merge", calibration="none")
    with refuses("repair must be auto, down or none for --action merge, got 'experts'"):
        PruneConfig(action="merge", repair="experts")
    with refuses("calibration must name a text for --router map, got 'none'"):
        PruneConfig(router="map", calibration="none")
    assert PruneConfig().measure_key() == PruneConfig(action="merge").measure_key()
