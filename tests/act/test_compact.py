from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cprune.act.compact import MODELING_NAME, PLAN_NAME, apply_plan, check_plan, output_config, output_shards
from cprune.checkpoint import Checkpoint, open_checkpoint
from cprune.plan import PrunePlan
from tests.synthetic import damaged, layer_plan, plan_for, ragged_plan, refuses, tensors_of, uniform_plan
from tests.tiny import FAMILIES

Tiny = Callable[..., Path]
COUNT_KEYS = {"num_experts", "num_local_experts", "n_routed_experts"}
ROUTER = re.compile(
    r"(mlp|block_sparse_moe)\.((gate|router)\.(weight|bias|e_score_correction_bias)|e_score_correction_bias)"
)


def sliced(tensors: dict[str, Tensor], plan: PrunePlan) -> dict[str, Tensor]:
    """What must come out, by the names alone."""
    expected = {}
    for name, tensor in tensors.items():
        block = re.match(r"(model\.layers\.\d+\.(?:mlp|block_sparse_moe))\.(.+)", name)
        layers = {layer.layer: layer for layer in plan.layers}
        if block is None or block[1] not in layers:
            expected[name] = tensor
            continue
        kept = list(layers[block[1]].kept)
        expert = re.match(r"experts\.(\d+)\.(.+)", block[2])
        if expert:
            if int(expert[1]) in kept:
                expected[f"{block[1]}.experts.{kept.index(int(expert[1]))}.{expert[2]}"] = tensor
        elif block[2].startswith("experts.") or ROUTER.search(name):
            expected[name] = tensor[kept]
        else:
            expected[name] = tensor
    return expected


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def compact(checkpoint: Checkpoint, plan: PrunePlan, out: Path) -> dict[str, object]:
    """Apply, and give config.json of the output."""
    written = apply_plan(checkpoint, plan, out)
    tensors = tensors_of(out)
    assert written == sum(tensor.nbytes for tensor in tensors.values()) < checkpoint.nbytes
    assert_equal(tensors, sliced(tensors_of(checkpoint.folder), plan))
    assert PrunePlan.load(out / PLAN_NAME) == plan
    return json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("shape", ["uniform", "ragged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_slices_are_exact_in_every_family(tiny: Tiny, family: str, shape: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny(family))
    plan = (uniform_plan if shape == "uniform" else ragged_plan)(checkpoint)
    config = compact(checkpoint, plan, tmp_path / "out")
    counts = {moe.index: len(plan[moe.name].kept) for moe in checkpoint.moe_layers}
    expected = {k: max(counts.values()) if k in COUNT_KEYS else v for k, v in checkpoint.config.items()}
    if shape == "ragged":
        expected["cprune"] = {"experts_per_layer": {str(index): count for index, count in counts.items()}}
        expected["auto_map"] = {"AutoModelForCausalLM": "modeling_cprune.CpruneForCausalLM"}
    assert config == expected and list(config) == list(expected)
    assert (tmp_path / "out" / MODELING_NAME).exists() == (shape == "ragged") != plan.uniform
    for path in checkpoint.companions():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    again = open_checkpoint(tmp_path / "out")
    assert {moe.index: moe.num_experts for moe in again.moe_layers} == counts


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("deepseek_v3", {"dtype": "bfloat16", "shards": 3}),  # float32 score corrections among bfloat16
        ("gpt_oss", {"dtype": "bfloat16", "shards": 2}),
        ("qwen3_moe", {"fuse_on_disk": True}),
        ("qwen2_moe", {"decoder_sparse_step": 2, "shards": 4}),
        ("deepseek_v3", {"mtp": True}),
        ("glm4_moe", {"mtp": True, "shards": 3}),
    ],
)
def test_slices_are_exact_in_other_layouts(tiny: Tiny, family: str, options: dict[str, object], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny(family, **options))
    compact(checkpoint, uniform_plan(checkpoint), tmp_path / "uniform")
    compact(checkpoint, ragged_plan(checkpoint), tmp_path / "ragged")


def test_bytes_of_not_a_number_pass_unchanged(tiny: Tiny, tmp_path: Path) -> None:
    def poison(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.experts.2.up_proj.weight"].view(torch.int32)[:] = 0x7FA00001  # a signalling NaN
        tensors["model.layers.0.mlp.gate.weight"].view(torch.int32)[2] = 0x7FA00001

    checkpoint = open_checkpoint(damaged(tiny("olmoe"), tmp_path / "model", poison))
    plan = plan_for(checkpoint, {moe.name: [0, 2, 5] for moe in checkpoint.moe_layers})
    apply_plan(checkpoint, plan, tmp_path / "out")
    got = tensors_of(tmp_path / "out")
    assert (got["model.layers.0.mlp.experts.1.up_proj.weight"].view(torch.int32) == 0x7FA00001).all()
    assert (got["model.layers.0.mlp.gate.weight"].view(torch.int32)[1] == 0x7FA00001).all()


def test_tensors_keep_their_shards_and_their_order(tiny: Tiny) -> None:
    checkpoint = open_checkpoint(tiny("olmoe", shards=3))
    plan = uniform_plan(checkpoint)
    shards = output_shards(checkpoint, plan)
    for path, shard in zip(checkpoint.shards, shards, strict=True):
        sources = [info.offset for info in checkpoint.tensors.values() if info.file == path]
        offsets = [piece.offset for tensor in shard for piece in tensor.pieces]
        assert all(piece.file == path for tensor in shard for piece in tensor.pieces)
        assert offsets == sorted(offsets) and set(offsets) <= set(range(min(sources), path.stat().st_size))


def test_router_stored_the_other_way_round_loses_columns(tiny: Tiny, tmp_path: Path) -> None:
    def turn(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("mlp.gate.weight")]:
            tensors[name] = tensors[name].T

    checkpoint = open_checkpoint(damaged(tiny("olmoe"), tmp_path / "model", turn))
    plan = plan_for(checkpoint, {moe.name: [1, 4, 14] for moe in checkpoint.moe_layers})
    apply_plan(checkpoint, plan, tmp_path / "out")
    name = "model.layers.1.mlp.gate.weight"
    assert torch.equal(tensors_of(tmp_path / "out")[name], tensors_of(checkpoint.folder)[name][:, [1, 4, 14]])


# config.json


def test_every_synonym_and_the_nested_config_are_edited_in_place(tiny: Tiny, tmp_path: Path) -> None:
    def nest(config: dict[str, object]) -> None:
        text = dict(config)
        config.clear()
        config |= {
            "model_type": "olmoe",
            "text_config": text | {"num_local_experts": 15, "extra": [15, {"num_experts": 15}]},
        }
        config |= {"vision_config": {"num_experts": 15}, "z": "é"}

    checkpoint = open_checkpoint(damaged(tiny("olmoe"), tmp_path / "model", config=nest))
    got = compact(checkpoint, uniform_plan(checkpoint), tmp_path / "out")
    source = json.loads((checkpoint.folder / "config.json").read_text())
    text = source["text_config"]
    assert text["num_experts"] == text["num_local_experts"] == 15
    text["num_experts"] = text["num_local_experts"] = 12
    assert got == source
    assert list(got) == list(source) and list(got["text_config"]) == list(text)
    assert "é" in (tmp_path / "out" / "config.json").read_text()


def test_source_config_is_not_touched(tiny: Tiny) -> None:
    checkpoint = open_checkpoint(tiny("olmoe"))
    before = json.dumps(checkpoint.config)
    assert output_config(checkpoint, ragged_plan(checkpoint))["num_experts"] == 14
    assert json.dumps(checkpoint.config) == before


def test_auto_map_of_the_source_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    def map_tokenizer(config: dict[str, object]) -> None:
        config["auto_map"] = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}

    checkpoint = open_checkpoint(damaged(tiny("olmoe"), tmp_path / "model", config=map_tokenizer))
    assert output_config(checkpoint, uniform_plan(checkpoint))["auto_map"] == checkpoint.config["auto_map"]
    ragged = output_config(checkpoint, ragged_plan(checkpoint))["auto_map"]
    assert ragged == {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_cprune.CpruneForCausalLM"}


def test_output_can_be_pruned_again(tiny: Tiny, tmp_path: Path) -> None:
    first = open_checkpoint(tiny("olmoe"))
    compact(first, ragged_plan(first), tmp_path / "one")  # 14, 13, 12 experts
    (tmp_path / "one" / "report.json").write_text("{}")
    second = open_checkpoint(tmp_path / "one")
    config = compact(second, ragged_plan(second, seed=1), tmp_path / "two")
    assert config["cprune"] == {"experts_per_layer": {"0": 13, "1": 11, "2": 9}} and config["num_experts"] == 13
    even = plan_for(second, {moe.name: range(1, 10) for moe in second.moe_layers})
    config = compact(second, even, tmp_path / "even")
    assert config == {**first.config, "num_experts": 9}
    assert {path.name for path in (tmp_path / "even").iterdir()} == {
        *(path.name for path in first.folder.iterdir()),
        PLAN_NAME,
    }


def test_modeling_file_imports_torch_and_transformers_alone(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("mixtral"))
    apply_plan(checkpoint, ragged_plan(checkpoint), tmp_path / "out")
    code = (tmp_path / "out" / MODELING_NAME).read_text()
    compile(code, MODELING_NAME, "exec")
    assert set(re.findall(r"^\s*(?:from|import) (\w+)", code, re.MULTILINE)) == {"copy", "torch", "transformers"}
    assert "class CpruneForCausalLM(MixtralForCausalLM)" in code


def test_ragged_output_needs_the_name_of_the_architecture(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(damaged(tiny("olmoe"), tmp_path / "m", config=lambda c: c.pop("architectures")))
    with refuses("config.json must name its architectures"):
        apply_plan(checkpoint, ragged_plan(checkpoint), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    apply_plan(checkpoint, uniform_plan(checkpoint), tmp_path / "out")


# Prediction heads


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_prediction_head_follows_a_uniform_trunk(tiny: Tiny, family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny(family, mtp=True))
    config = compact(checkpoint, uniform_plan(checkpoint), tmp_path / "out")
    assert "cprune" not in config and config["num_nextn_predict_layers"] == 1
    assert len({moe.num_experts for moe in open_checkpoint(tmp_path / "out").moe_layers}) == 1


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_prediction_head_of_a_ragged_trunk_opens_again(tiny: Tiny, family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny(family, mtp=True))
    plan = ragged_plan(checkpoint)
    compact(checkpoint, plan, tmp_path / "out")
    counts = [len(layer.kept) for layer in plan.layers]
    again = open_checkpoint(tmp_path / "out")
    assert [moe.num_experts for moe in again.moe_layers] == counts and counts[-1] == checkpoint.moe_layers[
        -1
    ].num_experts
    assert [moe.trunk for moe in again.moe_layers] == [True, True, False]
    check_plan(again, plan_for(again, {moe.name: range(moe.num_experts) for moe in again.moe_layers}))


# Plans that do not fit


@pytest.fixture
def olmoe(tiny: Tiny) -> Checkpoint:
    return open_checkpoint(tiny("olmoe"))


def changed(plan: PrunePlan, **fields: object) -> PrunePlan:
    return PrunePlan(**{**plan.__dict__, **fields})


def test_plan_of_another_checkpoint_is_refused(tiny: Tiny, olmoe: Checkpoint, tmp_path: Path) -> None:
    for other in (tiny("olmoe", seed=1), tiny("mixtral")):
        plan = uniform_plan(open_checkpoint(other))
        with refuses("the plan must be of this checkpoint"):
            apply_plan(olmoe, plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_plan_must_name_every_layer_once(olmoe: Checkpoint) -> None:
    plan = uniform_plan(olmoe)
    for layers in (plan.layers[:2], (*plan.layers, plan.layers[0]), (*plan.layers[:2], layer_plan("x", 15, [0, 1]))):
        with refuses("the plan must name every MoE layer once, got (model.layers.[02].mlp|x)"):
            check_plan(olmoe, changed(plan, layers=layers))
    check_plan(olmoe, changed(plan, layers=plan.layers[::-1]))


def test_plan_must_know_the_number_of_experts_and_leave_top_k(olmoe: Checkpoint) -> None:
    plan = uniform_plan(olmoe)
    first = plan.layers[0].layer
    with refuses("must have 16 experts as planned, got 15"):
        check_plan(olmoe, changed(plan, layers=(layer_plan(first, 16, [0, 1]), *plan.layers[1:])))
    with refuses("must keep at least the 2 experts a token uses, got 1"):
        check_plan(olmoe, changed(plan, layers=(layer_plan(first, 15, [3]), *plan.layers[1:])))


def test_plan_must_keep_router_groups_even(tiny: Tiny) -> None:
    checkpoint = open_checkpoint(tiny("deepseek_v3"))  # 12 experts in 4 groups
    kept = {moe.name: [0, 1, 3, 4, 6, 7, 9, 10] for moe in checkpoint.moe_layers}
    check_plan(checkpoint, plan_for(checkpoint, kept))
    for uneven in ([0, 1, 2, 4, 6, 7, 9, 10], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 3, 4, 6, 7, 9]):
        with refuses("as many experts in each of 4 router groups"):
            check_plan(checkpoint, plan_for(checkpoint, {**kept, "model.layers.2.mlp": uneven}))
    with refuses("the 2 experts by which a router group is scored"):
        check_plan(checkpoint, plan_for(checkpoint, {**kept, "model.layers.2.mlp": [0, 3, 6, 9]}))


def test_output_in_the_way_is_refused(olmoe: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("theirs")
    with refuses("OUT must not exist or be an empty folder"):
        apply_plan(olmoe, uniform_plan(olmoe), tmp_path)
    with refuses("OUT must lie outside MODEL"):
        apply_plan(olmoe, uniform_plan(olmoe), olmoe.folder / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_fault_midway_leaves_nothing(olmoe: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", interrupt)
    with pytest.raises(KeyboardInterrupt):
        apply_plan(olmoe, uniform_plan(olmoe), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
