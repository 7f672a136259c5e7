"""Refused models: not a checkpoint, a damaged one, one that nobody can prune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.bad_input.refusal import SHORT, Refusal
from tests.tiny import write_json, write_tiny


def test_model_path_is_missing(refusal: Refusal, out: Path, tmp_path: Path) -> None:
    refusal([tmp_path / "nowhere", out], "MODEL must be", str(tmp_path / "nowhere"))
    refusal(["nowhere", out], "MODEL must be", "nowhere")


def test_model_is_a_file(refusal: Refusal, model: Path, out: Path) -> None:
    refusal([model / "config.json", out], "MODEL must be", "config.json")


def test_model_is_an_empty_folder(refusal: Refusal, out: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refusal([tmp_path / "empty", out], "config.json")


def test_config_is_not_json(refusal: Refusal, model: Path, out: Path) -> None:
    (model / "config.json").write_text("{")
    refusal([model, out], "config.json must be JSON")


def test_weights_are_missing(refusal: Refusal, model: Path, out: Path) -> None:
    for shard in model.glob("*.safetensors*"):
        shard.unlink()
    refusal([model, out], "safetensors, got none")


@pytest.mark.parametrize("indexed", [True, False])
def test_a_shard_is_missing(refusal: Refusal, model: Path, out: Path, indexed: bool) -> None:
    (model / "model-00002-of-00002.safetensors").unlink()
    if not indexed:
        (model / "model.safetensors.index.json").unlink()
    refusal([model, out], "shard")


def test_a_tensor_of_the_index_is_missing(refusal: Refusal, model: Path, out: Path) -> None:
    shard = model / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    name = next(name for name in tensors if ".experts." in name)
    del tensors[name]
    save_file(tensors, shard)
    refusal([model, out], name)


def test_a_weight_of_the_model_is_missing(refusal: Refusal, out: Path, text: Path, tmp_path: Path) -> None:
    model = write_tiny("olmoe", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, model / "model.safetensors")
    refusal([model, out, "--calibration", text, *SHORT], "must hold every weight", leaves=("out.work",))


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_a_shard_is_truncated(refusal: Refusal, model: Path, out: Path, keep: int) -> None:
    shard = model / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    refusal([model, out], shard.name, "truncated")


FOREIGN = {
    "text": b"This is not a safetensors file, whatever its name says." * 20,
    "pickle": b"PK\x03\x04" + bytes(400),
    "no JSON": (64).to_bytes(8, "little") + bytes(range(64)),
    "a list": (8).to_bytes(8, "little") + b"[1,2,3] ",
    "other keys": (16).to_bytes(8, "little") + b'{"a": {"b": 1}} ',
    "a number": (8).to_bytes(8, "little") + b'{"a": 1}',
}


@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_file_named_safetensors(refusal: Refusal, model: Path, out: Path, content: str) -> None:
    shard = model / "model-00001-of-00002.safetensors"
    shard.write_bytes(FOREIGN[content])
    refusal([model, out], shard.name, "safetensors file")


@pytest.mark.parametrize("calibration", ["text", "none"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_are_not_finite(
    refusal: Refusal, out: Path, text: Path, tmp_path: Path, value: float, calibration: str
) -> None:
    model = write_tiny("olmoe", tmp_path / "model")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors = load_file(model / "model.safetensors")
    tensors[name][2, 5] = value
    save_file(tensors, model / "model.safetensors")
    source = text if calibration == "text" else "none"
    refusal([model, out, "--calibration", source, *SHORT], "weights must be finite", name)
    refusal(["plan", model, "-o", tmp_path / "plan.json", "--calibration", source], name, single=True)
    refusal(
        ["compare", model, "-o", tmp_path / "compare", "--calibration", source], name, single=True, leaves=("compare",)
    )


def test_dense_model(refusal: Refusal, out: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "llama")
    refusal([tmp_path / "llama", out], "Mixture-of-Experts", "dense", "llama")


def edit_config(model: Path, **values: Any) -> None:
    write_json(model / "config.json", {**json.loads((model / "config.json").read_text()), **values})


def test_unknown_model_type(refusal: Refusal, model: Path, out: Path) -> None:
    edit_config(model, model_type="marvin_moe")
    refusal([model, out], "model type", "marvin_moe")


@pytest.mark.parametrize(("new", "shown"), [("experts.%d.dense_h_to_4h", "dense_h_to_4h"), ("experts.x%d.up", ".x0.")])
def test_unknown_expert_naming(refusal: Refusal, out: Path, tmp_path: Path, new: str, shown: str) -> None:
    model = write_tiny("olmoe", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    for expert in range(15):
        old = f"model.layers.0.mlp.experts.{expert}.up_proj.weight"
        tensors[f"model.layers.0.mlp.{new % expert}.weight"] = tensors.pop(old)
    save_file(tensors, model / "model.safetensors")
    refusal([model, out], "named", shown)


def test_router_without_a_row_for_every_expert(refusal: Refusal, out: Path, tmp_path: Path) -> None:
    model = write_tiny("olmoe", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.gate.weight"] = tensors["model.layers.2.mlp.gate.weight"][:9].contiguous()
    save_file(tensors, model / "model.safetensors")
    refusal([model, out], "model.layers.2.mlp.gate.weight", "[9, 48]")


def test_config_with_another_number_of_experts(refusal: Refusal, model: Path, out: Path) -> None:
    edit_config(model, num_experts=12)
    refusal([model, out], "experts 0 to 11", "got 13")


def test_quantized(refusal: Refusal, model: Path, out: Path) -> None:
    edit_config(model, quantization_config={"quant_method": "fp8"})
    refusal([model, out], "unquantised", "fp8")


def test_tokenizer_is_missing(refusal: Refusal, out: Path, text: Path, tmp_path: Path) -> None:
    model = write_tiny("olmoe", tmp_path / "model", tokenizer=False)
    refusal([model, out, "--calibration", text, *SHORT], "tokenizer", "got none")
    refusal([model, out, "--calibration", "none", *SHORT], "tokenizer", "--evaluate none")
