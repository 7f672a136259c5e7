from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.tiny import FAMILIES, tiny_config, tiny_model, write_tiny

IDS = torch.randint(0, 288, (8, 64), generator=torch.Generator().manual_seed(1))
LAYOUT = {  # the config key of the expert count, and some tensors of layer 1
    "mixtral": ("num_local_experts", "block_sparse_moe.gate.weight", "block_sparse_moe.experts.8.w2.weight"),
    "qwen2_moe": ("num_experts", "mlp.gate.weight", "mlp.shared_expert_gate.weight", "mlp.experts.10.down_proj.weight"),
    "qwen3_moe": ("num_experts", "mlp.gate.weight", "mlp.experts.12.gate_proj.weight"),
    "olmoe": ("num_experts", "mlp.gate.weight", "mlp.experts.14.up_proj.weight"),
    "deepseek_v2": ("n_routed_experts", "mlp.gate.weight", "mlp.shared_experts.up_proj.weight"),
    "deepseek_v3": ("n_routed_experts", "mlp.gate.e_score_correction_bias", "mlp.experts.11.down_proj.weight"),
    "glm4_moe": ("n_routed_experts", "mlp.gate.e_score_correction_bias", "mlp.experts.12.down_proj.weight"),
    "minimax_m2": ("num_local_experts", "block_sparse_moe.gate.weight", "block_sparse_moe.e_score_correction_bias"),
    "gpt_oss": ("num_local_experts", "mlp.router.bias", "mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj"),
}


def shapes(folder: Path) -> dict[str, list[int]]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
    return found


def load(folder: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loads_back_with_equal_logits_and_every_expert_used(family: str, dtype: str, tmp_path: Path) -> None:
    loaded, counts = load(write_tiny(family, tmp_path, seed=3, dtype=dtype)), []
    for module in loaded.modules():
        if type(module).__name__.lower().endswith("router"):
            module.register_forward_hook(lambda _, __, out: counts.append(torch.bincount(out[2].flatten())))
    config = tiny_config(family, dtype=dtype)
    assert loaded.dtype == getattr(torch, dtype)
    assert torch.equal(logits(loaded), logits(tiny_model(config, seed=3)))
    assert counts and all(len(count) == config[LAYOUT[family][0]] and count.min() > 0 for count in counts)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_config_are_those_of_the_hub(family: str, tmp_path: Path) -> None:
    config = json.loads((write_tiny(family, tmp_path) / "config.json").read_text())
    key, *names = LAYOUT[family]
    assert {"num_experts", "num_local_experts", "n_routed_experts"} & config.keys() == {key}
    layer = {name.removeprefix("model.layers.1.") for name in shapes(tmp_path) if name.startswith("model.layers.1.")}
    assert layer.issuperset(names)
    assert sum(".experts." in name for name in layer) == (4 if family == "gpt_oss" else 3 * config[key])


def test_shards_hold_every_tensor_once(tmp_path: Path) -> None:
    whole, split = write_tiny("olmoe", tmp_path / "whole"), write_tiny("olmoe", tmp_path / "split", shards=3)
    index = json.loads((split / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert shapes(split) == shapes(whole) and index["weight_map"].keys() == shapes(whole).keys()
    assert index["metadata"]["total_size"] == 4 * sum(torch.Size(shape).numel() for shape in shapes(whole).values())
    assert torch.equal(logits(load(split)), logits(load(whole)))


def test_fused_experts_load_as_the_same_model(tmp_path: Path) -> None:
    split = write_tiny("qwen3_moe", tmp_path / "split")
    fused = write_tiny("qwen3_moe", tmp_path / "fused", fuse_on_disk=True)
    assert shapes(fused)["model.layers.0.mlp.experts.gate_up_proj"] == [13, 48, 48]
    assert shapes(fused)["model.layers.0.mlp.experts.down_proj"] == [13, 48, 24]
    assert torch.equal(logits(load(fused)), logits(load(split)))


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_mtp_layer_is_the_one_transformers_drafts_with(family: str, tmp_path: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(write_tiny(family, tmp_path, mtp=True), output_loading_info=True)
    assert not info["missing_keys"] and all(name.startswith("model.layers.3.") for name in info["unexpected_keys"])
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.3.*"]  # transformers only knows the originals' numbers
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(IDS[:1], **options, use_mtp=True), model.generate(IDS[:1], **options))


@pytest.mark.parametrize(("key", "value", "layer"), [("mlp_only_layers", [0, 2], "1"), ("decoder_sparse_step", 3, "2")])
def test_qwen2_moe_with_dense_layers(key: str, value: int | list[int], layer: str, tmp_path: Path) -> None:
    folder = write_tiny("qwen2_moe", tmp_path, **{key: value})
    assert {name.split(".")[2] for name in shapes(folder) if ".experts." in name} == {layer}
    load(folder)


def test_text_survives_the_tokenizer(tmp_path: Path) -> None:
    text = "héllo the router\n\tx = [1,  2]  # 日本"
    tokenizer = AutoTokenizer.from_pretrained(write_tiny("olmoe", tmp_path))
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and max(ids) < tiny_config("olmoe")["vocab_size"]
