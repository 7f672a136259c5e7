from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cprune.checkpoint import open_checkpoint
from cprune.checkpoint.families import Architecture, find_moe_layers, read_architecture
from tests.synthetic import damaged, refuses
from tests.tiny import FAMILIES, tiny_config

Tiny = Callable[..., Path]
MLP, SPARSE = "model.layers.{}.mlp", "model.layers.{}.block_sparse_moe"
EXPECTED = {  # block, its layers, E, names of (gate, up, down), suffixes of the router, groups
    "mixtral": (SPARSE, (0, 1, 2), 9, ("w1", "w3", "w2"), ["gate.weight"], 1),
    "qwen2_moe": (MLP, (0, 1, 2), 11, ("gate_proj", "up_proj", "down_proj"), ["gate.weight"], 1),
    "qwen3_moe": (MLP, (0, 1, 2), 13, ("gate_proj", "up_proj", "down_proj"), ["gate.weight"], 1),
    "olmoe": (MLP, (0, 1, 2), 15, ("gate_proj", "up_proj", "down_proj"), ["gate.weight"], 1),
    "deepseek_v2": (MLP, (1, 2), 11, ("gate_proj", "up_proj", "down_proj"), ["gate.weight"], 1),
    "deepseek_v3": (
        *(MLP, (1, 2), 12, ("gate_proj", "up_proj", "down_proj")),
        *(["gate.weight", "gate.e_score_correction_bias"], 4),
    ),
    "glm4_moe": (
        *(MLP, (1, 2), 13, ("gate_proj", "up_proj", "down_proj")),
        *(["gate.weight", "gate.e_score_correction_bias"], 1),
    ),
    "minimax_m2": (SPARSE, (0, 1, 2), 11, ("w1", "w3", "w2"), ["gate.weight", "e_score_correction_bias"], 1),
    "gpt_oss": (MLP, (0, 1, 2), 9, (), ["router.weight", "router.bias"], 1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_found(tiny: Tiny, family: str) -> None:
    block, indices, num, names, router, groups = EXPECTED[family]
    checkpoint = open_checkpoint(tiny(family))
    arch, layers = checkpoint.architecture, checkpoint.moe_layers
    assert (arch.model_type, arch.num_experts, arch.top_k, arch.num_layers) == (family, num, 2, 3)
    assert (arch.n_group, arch.quantized, dict(arch.experts_per_layer)) == (groups, None, {})
    assert [layer.name for layer in layers] == [block.format(index) for index in indices]
    claimed = set()
    for layer, index in zip(layers, indices, strict=True):
        assert (layer.index, layer.num_experts, layer.trunk) == (index, num, True)
        assert {suffix: name for suffix, (name, _) in layer.router.items()} == {
            suffix: f"{layer.name}.{suffix}" for suffix in router
        }
        assert {axis for _, axis in layer.router.values()} == {0}
        if family == "gpt_oss":
            suffixes = ("down_proj", "down_proj_bias", "gate_up_proj", "gate_up_proj_bias")
            assert dict(layer.fused) == {suffix: f"{layer.name}.experts.{suffix}" for suffix in suffixes}
            assert layer.experts == () and layer.projections == ("gate_up_proj", "down_proj")
        else:
            assert layer.projections == tuple(f"{name}.weight" for name in names) and not layer.fused
            assert [dict(expert) for expert in layer.experts] == [
                {f"{name}.weight": f"{layer.name}.experts.{expert}.{name}.weight" for name in sorted(names)}
                | {f"{name}.weight": f"{layer.name}.experts.{expert}.{name}.weight" for name in names}
                for expert in range(num)
            ]
        claimed |= set(layer.expert_tensors())
    assert claimed == {name for name in checkpoint.tensors if ".experts." in name}


def test_fused_on_disk_is_found_in_any_family(tiny: Tiny) -> None:
    layer = open_checkpoint(tiny("qwen3_moe", fuse_on_disk=True)).moe_layers[0]
    assert layer.projections == ("gate_up_proj", "down_proj") and set(layer.fused) == set(layer.projections)
    assert layer.experts == () and layer.num_experts == 13


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_prediction_head_is_no_part_of_the_trunk(tiny: Tiny, family: str) -> None:
    layers = open_checkpoint(tiny(family, mtp=True)).moe_layers
    assert [(layer.index, layer.trunk) for layer in layers] == [(1, True), (2, True), (3, False)]


def test_layers_come_in_order_of_depth(tiny: Tiny) -> None:
    layers = open_checkpoint(tiny("olmoe", num_hidden_layers=12, shards=2)).moe_layers
    assert [layer.index for layer in layers] == list(range(12))


def test_dense_layers_between_are_left_alone(tiny: Tiny) -> None:
    assert [layer.index for layer in open_checkpoint(tiny("qwen2_moe", decoder_sparse_step=3)).moe_layers] == [2]


# What follows needs names and shapes only.


def architecture(num: int = 4, **fields: object) -> Architecture:
    values = {"num_layers": 2, "n_group": 1, "topk_group": 1, "scored_groups": 2, "quantized": None, **fields}
    return Architecture(**{"model_type": "new", "num_experts": num, "top_k": 2, "experts_per_layer": {}, **values})


def block(num: int = 4, layer: int = 0, names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")) -> dict:
    """Shapes of one MoE block: H = 6, I = 3."""
    prefix = f"model.layers.{layer}.mlp"
    shapes = {
        f"{prefix}.experts.{expert}.{name}.weight": (6, 3) if name == names[-1] else (3, 6)
        for expert in range(num)
        for name in names
    }
    return shapes | {f"{prefix}.gate.weight": (num, 6)}


def test_unknown_architecture_with_known_names_needs_nothing() -> None:
    shapes = {**block(), **block(layer=1), "model.layers.0.mlp.shared_experts.up_proj.weight": (4, 6)}
    assert [layer.name for layer in find_moe_layers(shapes, architecture())] == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]


def test_router_stored_the_other_way_round_is_sliced_along_the_other_axis() -> None:
    shapes = {**block(), "model.layers.0.mlp.gate.weight": (6, 4)}
    assert find_moe_layers(shapes, architecture())[0].router == {"gate.weight": ("model.layers.0.mlp.gate.weight", 1)}


def test_scales_ride_along_with_the_weights() -> None:
    shapes = block(2) | {name.replace(".weight", ".weight_scale"): (1,) for name in block(2) if ".experts." in name}
    layer = find_moe_layers(shapes, architecture(2))[0]
    assert layer.projections == ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    assert len(layer.expert_tensors()) == 12


def _without(name: str) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in block().items() if key != f"model.layers.0.mlp.{name}"}


REFUSED = {
    "other projections": (block(names=("fc1", "fc2", "fc3")), "model.layers.0.mlp.*got fc1, fc2, fc3"),
    "two projections": (block(names=("up_proj", "down_proj")), "got down_proj, up_proj"),
    "other names under experts": (
        {**block(), "model.layers.0.mlp.experts.wi": (4, 6)},
        "got model.layers.0.mlp.experts.wi",
    ),
    "an expert fewer": (block(3), "experts 0 to 3 as config.json says, got 3"),
    "an expert more": (block(5), "got 5"),
    "a hole": ({k: v for k, v in block(5).items() if ".experts.1." not in k}, "experts 0 to 3.*got 4"),
    "a tensor missing": (_without("experts.2.up_proj.weight"), "up_proj.weight not in both 0 and 2"),
    "a tensor missing in the first": (_without("experts.0.up_proj.weight"), "got up_proj.weight"),
    "no router": (_without("gate.weight"), "model.layers.0.mlp must have a router"),
    "a router of another name": ({**_without("gate.weight"), "model.layers.0.mlp.wg.weight": (4, 6)}, "got none"),
    "a router of another size": (
        {**block(), "model.layers.0.mlp.gate.weight": (5, 6)},
        r"4 experts, got shape \[5, 6\]",
    ),
    "a bias of another size": ({**block(), "model.layers.0.mlp.gate.bias": (3,)}, "gate.bias must have one row"),
    "one more over the experts": ({**block(), "model.layers.0.mlp.expert_scale": (4,)}, "got .*expert_scale of shape"),
    "no layer number": (
        {name.replace("layers.0", "encoder"): shape for name, shape in block().items()},
        "numbered decoder layers.*model.encoder.mlp",
    ),
    "one by one and fused": ({**block(), "model.layers.0.mlp.experts.gate_up_proj": (4, 6, 6)}, "got both"),
    "fused without down": (
        {"model.layers.0.mlp.experts.gate_up_proj": (4, 6, 6), "model.layers.0.mlp.gate.weight": (4, 6)},
        "must hold gate_up_proj and down_proj, got gate_up_proj",
    ),
    "fused of another size": (
        {
            "model.layers.0.mlp.experts.gate_up_proj": (4, 6, 6),
            "model.layers.0.mlp.experts.down_proj": (5, 6, 3),
            "model.layers.0.mlp.gate.weight": (4, 6),
        },
        r"down_proj must have 4 experts on axis 0, got shape \[5, 6, 3\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_saying_what_was_found(case: str) -> None:
    shapes, match = REFUSED[case]
    with refuses(match):
        find_moe_layers(shapes, architecture())


def test_layers_of_different_counts_need_the_config_to_say_so(tiny: Tiny, tmp_path: Path) -> None:
    shapes = {**block(3), **block(4, layer=1)}
    with refuses("model.layers.0.mlp must hold experts 0 to 3"):
        find_moe_layers(shapes, architecture())
    layers = find_moe_layers(shapes, architecture(experts_per_layer={0: 3}))
    assert [layer.num_experts for layer in layers] == [3, 4]
    config = {**tiny_config("olmoe"), "cprune": {"experts_per_layer": {"0": 12, "2": 9}}}
    arch = read_architecture(config, has_experts=True)
    assert [arch.experts_in(index) for index in range(3)] == [12, 15, 9]


def test_dense_model_is_refused_by_its_type(tiny: Tiny, tmp_path: Path) -> None:
    def drop_experts(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]

    checkpoint = open_checkpoint(damaged(tiny("olmoe"), tmp_path / "dense", drop_experts))
    with refuses("experts must be tensors named .* in a model of type 'olmoe' whose config.json says num_experts = 15"):
        checkpoint.moe_layers  # noqa: B018
    with refuses("dense model type 'llama'"):
        read_architecture({"model_type": "llama", "num_hidden_layers": 2}, has_experts=False)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({}, "got neither for 'new'"),
        ({"num_experts": 8}, "got num_experts for"),
        ({"num_experts_per_tok": 8}, "got num_experts_per_tok for"),
        ({"num_experts": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, "one number of experts, got"),
        ({"num_experts": [8, 4], "num_experts_per_tok": 2}, "got num_experts_per_tok"),
    ],
)
def test_config_that_does_not_give_the_counts_is_refused(config: dict[str, object], match: str) -> None:
    with refuses(match):
        read_architecture({"model_type": "new", **config}, has_experts=True)


def test_config_is_read_under_every_name() -> None:
    for count in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        for top_k in ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k"):
            arch = read_architecture({count: 8, top_k: 3}, has_experts=True)
            assert (arch.num_experts, arch.top_k, arch.n_group, arch.topk_group) == (8, 3, 1, 1)


def test_nested_text_config_and_quantization_are_read() -> None:
    text = {"num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 5, "n_group": 4, "topk_group": 2}
    config = {"model_type": "vl", "text_config": text, "quantization_config": {"quant_method": "fp8"}}
    arch = read_architecture(json.loads(json.dumps(config)), has_experts=True)
    assert (arch.num_experts, arch.num_layers, arch.n_group, arch.topk_group) == (8, 5, 4, 2)
    assert arch.quantized == "fp8" and arch.model_type == "vl" and arch.scored_groups == 2
    text["topk_method"] = "group_limited_greedy"
    assert read_architecture({"text_config": text}, has_experts=True).scored_groups == 1
