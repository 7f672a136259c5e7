"""Tiny random checkpoints of every supported family, in the layout their originals have on the hub.

config.json is the table below, not a saved config object: transformers 5 renames keys (`num_experts`, `rope_theta`) as
it saves. The tensors have the names that `save_pretrained` gives them, which are the hub's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

EOS = "<|endoftext|>"
TRAINING_TEXT = "the router sends the token to the experts and the experts of the other layers return the rest\n" * 4

# fmt: off
COMMON: dict[str, Any] = {
    "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 48, "intermediate_size": 40,
    "max_position_embeddings": 512, "num_attention_heads": 4, "num_experts_per_tok": 2, "num_hidden_layers": 3,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "transformers_version": "4.57.0", "use_cache": True, "vocab_size": 307,
}
DEEPSEEK: dict[str, Any] = {
    "first_k_dense_replace": 1, "kv_lora_rank": 16, "moe_intermediate_size": 24, "moe_layer_freq": 1,
    "num_key_value_heads": 4, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 9, "sliding_window": None},
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"], "decoder_sparse_step": 1, "mlp_only_layers": [], "num_experts": 11,
        "moe_intermediate_size": 24, "norm_topk_prob": False, "shared_expert_intermediate_size": 36,
        "sliding_window": 512, "use_sliding_window": False,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1, "mlp_only_layers": [], "num_experts": 13,
        "attention_bias": False, "head_dim": 16, "moe_intermediate_size": 24, "norm_topk_prob": True,
    },
    "olmoe": {
        "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "clip_qkv": None, "intermediate_size": 24,
        "norm_topk_prob": False, "num_experts": 15, "pad_token_id": 1,
    },
    "deepseek_v2": DEEPSEEK | {
        "architectures": ["DeepseekV2ForCausalLM"], "n_group": 1, "n_routed_experts": 11, "n_shared_experts": 2,
        "norm_topk_prob": False, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_group": 1,
        "topk_method": "greedy",
    },
    "deepseek_v3": DEEPSEEK | {
        "architectures": ["DeepseekV3ForCausalLM"], "n_group": 4, "n_routed_experts": 12, "n_shared_experts": 1,
        "norm_topk_prob": True, "num_nextn_predict_layers": 0, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "topk_group": 2, "topk_method": "noaux_tc",
    },
    "glm4_moe": {
        "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "first_k_dense_replace": 1, "head_dim": 16,
        "moe_intermediate_size": 24, "n_group": 1, "n_routed_experts": 13, "n_shared_experts": 1,
        "norm_topk_prob": True, "num_nextn_predict_layers": 0, "partial_rotary_factor": 0.5,
        "routed_scaling_factor": 1.0, "topk_group": 1, "use_qk_norm": True,
    },
    "minimax_m2": {
        "architectures": ["MiniMaxM2ForCausalLM"], "head_dim": 16, "num_local_experts": 11, "rotary_dim": 8,
        "qk_norm_type": "per_layer", "scoring_func": "sigmoid", "use_qk_norm": True, "use_routing_bias": True,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"], "attention_bias": True, "head_dim": 16, "initial_context_length": 16,
        "layer_types": ["sliding_attention", "full_attention"], "num_local_experts": 9, "sliding_window": 8,
        "swiglu_limit": 7.0, "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 16,
            "rope_type": "yarn", "truncate": False,
        },
    },
}
SCALES: tuple[tuple[str, float, float], ...] = (  # name, mean, deviation; all else is 1 / sqrt(its last dimension)
    (r"norm\.weight$", 1.0, 0.1),
    (r"e_score_correction_bias$", 0.0, 0.05),
    (r"mlp\.(gate|router)\.(weight|bias)$", 0.0, 0.5),  # router logits have a deviation of about 3
    (r"(embed_tokens\.weight|sinks)$", 0.0, 1.0), (r"bias$", 0.0, 0.1),
)
# fmt: on
FAMILIES: tuple[str, ...] = tuple(CONFIGS)


def write_tiny(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    shards: int = 1,
    tokenizer: bool = True,
    fuse_on_disk: bool = False,
    mtp: bool = False,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint of `family` into `folder` as the hub has it and return `folder`.

    `overrides` replace config keys; `dtype` is "float32" (the default) or "bfloat16". `fuse_on_disk`, where experts are
    `mlp.experts`, writes `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I] instead of a tensor per expert.
    `mtp`, for DeepSeek-V3 and GLM-4.5, adds their multi-token-prediction layer, `model.layers.{num_hidden_layers}`.
    """
    if mtp:
        overrides["num_nextn_predict_layers"] = 1
    config = tiny_config(family, **overrides)
    tensors = hub_tensors(tiny_model(config, seed), fused=fuse_on_disk)
    if mtp:
        tensors |= mtp_tensors(tensors, config, seed, fused=fuse_on_disk)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0})
    write_shards(folder, tensors, shards)
    if tokenizer:
        write_tokenizer(folder)
    return folder


def tiny_config(family: str, *, dtype: str = "float32", **overrides: Any) -> dict[str, Any]:
    """The config.json of `write_tiny` as a dict."""
    config = {**COMMON, **CONFIGS[family], "model_type": family, "torch_dtype": dtype, **overrides}
    if family == "gpt_oss":  # keys that repeat or depend on others
        config["experts_per_token"] = config["num_experts_per_tok"]
        config["layer_types"] = (config["layer_types"] * config["num_hidden_layers"])[: config["num_hidden_layers"]]
    return config


def tiny_model(config: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """The transformers model of `config` with every parameter and persistent buffer random, in eval mode."""
    with torch.random.fork_rng(devices=[]):  # transformers initialises the weights from the global generator first
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=config["torch_dtype"])
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(model.state_dict().items()):
        scales = ((mean, std) for pattern, mean, std in SCALES if re.search(pattern, name))
        mean, std = next(scales, (0.0, tensor.shape[-1] ** -0.5))
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def hub_tensors(model: PreTrainedModel, *, fused: bool = False) -> dict[str, Tensor]:
    """The tensors of `model` under their names on the hub: one per expert, or fused over the experts."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    tensors = state if fused else revert_weight_conversion(model, state)
    # score corrections are float32 on the hub even where the rest is bfloat16
    return {k: (v.float() if k.endswith("e_score_correction_bias") else v).contiguous() for k, v in tensors.items()}


def mtp_tensors(main: dict[str, Tensor], config: dict[str, Any], seed: int, *, fused: bool) -> dict[str, Tensor]:
    """A multi-token-prediction layer: one decoder layer more, what feeds it, and copies of embedding and head."""
    layer, hidden, dtype = config["num_hidden_layers"], config["hidden_size"], main["lm_head.weight"].dtype
    prefix = f"model.layers.{layer}."
    donor = hub_tensors(tiny_model({**config, "num_hidden_layers": layer + 1}, seed + 1), fused=fused)
    generator = torch.Generator().manual_seed(seed + 2)
    extra = {f"{name}.weight": torch.ones(hidden, dtype=dtype) for name in ("enorm", "hnorm", "shared_head.norm")}
    extra["eh_proj.weight"] = torch.randn(hidden, 2 * hidden, generator=generator).to(dtype) / (2 * hidden) ** 0.5
    extra["embed_tokens.weight"] = main["model.embed_tokens.weight"].clone()
    extra["shared_head.head.weight"] = main["lm_head.weight"].clone()
    block = {name: tensor for name, tensor in donor.items() if name.startswith(prefix)}
    return block | {prefix + name: tensor for name, tensor in extra.items()}


def write_shards(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """`model.safetensors`, or an index and `shards` files of about equally many tensors: layers straddle files."""
    names = sorted(tensors, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    files = files if shards > 1 else ["model.safetensors"]
    weight_map = {name: files[i * shards // len(names)] for i, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file, {"format": "pt"})
    if shards > 1:
        metadata = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
        write_json(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 288 tokens, fewer than the models' vocab_size as on the hub: any text decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=288, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": EOS, "eos_token": EOS, "pad_token": EOS, "model_max_length": 512}
    write_json(folder / "tokenizer_config.json", {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
