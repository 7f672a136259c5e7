"""The implementation "cprune" against transformers' own, for every architecture that has the experts contract."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

import cprune
from cprune import hf
from cprune.act.compact import apply_plan
from cprune.checkpoint import open_checkpoint
from cprune.experts import SERVE, served_activation
from cprune.ragged import resize_experts
from cprune_kernels.fused_moe import GELU_TANH, SILU, SWIGLU_OAI, Activation
from tests.synthetic import ragged_plan
from tests.test_hf import IDS, assert_close, load, logits
from tests.tiny import FAMILIES

Tiny = Callable[..., Path]
MODELS = Path(transformers.__file__).parent / "models"
DECORATOR = re.compile(r"^@use_experts_implementation(?:\(.*?\))?\s+class (\w+)", re.MULTILINE)
SIZES: dict[str, Any] = {  # of whatever a configuration or an experts module asks for
    "vocab_size": 307, "hidden_size": 48, "intermediate_size": 40, "moe_intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 9, "num_local_experts": 9,
    "n_routed_experts": 9, "moe_num_experts": 9, "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k": 2,
    "num_experts_per_token": 2, "max_position_embeddings": 512, "kv_lora_rank": 16, "q_lora_rank": 24,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 0, "n_shared_experts": 1, "shared_expert_intermediate_size": 36, "pad_token_id": 0,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LATENT = {"num_key_value_heads": 4}
LINEAR = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "layer_types": ["linear_attention", "full_attention"],
}
ARCHITECTURES: dict[str, dict[str, Any]] = {  # beside the families of tests/tiny.py
    **dict.fromkeys(
        ("aria_text", "cohere2_moe", "deepseek_v4", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo"), {}
    ),
    **dict.fromkeys(("granitemoe", "granitemoe_swa", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4"), {}),
    **dict.fromkeys(("inkling_text", "kolibri1", "laguna", "mellum", "mimo_v2_flash", "minimax", "phimoe"), {}),
    **dict.fromkeys(("minimax_m3_vl_text", "solar_open"), {}),
    **dict.fromkeys(("axk1", "axk2", "deepseek_v32", "dots3_note_text", "glm4_moe_lite", "glm_moe_dsa"), LATENT),
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe_text"), LINEAR),
    "beam": {"mlp_layer_types": ["sparse", "sparse"]},
    "flint": {"mlp_only_layers": []},
    "afmoe": {"num_dense_layers": 0},
    "gemma4_text": {
        **{"enable_moe_block": True, "vocab_size_per_layer_input": 307, "hidden_size_per_layer_input": 8},
        **{"top_k_experts": 2, "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 16},
    },
    "granitemoehybrid": {
        **{"layer_types": ["attention", "attention"], "mamba_n_heads": 4, "mamba_d_head": 24},
        "shared_intermediate_size": 24,
    },
    "jamba": {
        **{"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 0, "expert_layer_period": 1},
        "use_mamba_kernels": False,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    "nemotron_h": {"layers_block_type": ["moe", "attention"], "moe_latent_size": None},
    "zaya": {"num_experts_per_tok": 1},
}
# What has no place in the kernels runs as it is, which is said by what it has.
OTHERS = {
    "Inkling2Experts": "experts must apply silu, gelu, gelu_tanh to their gate, got Inkling2Experts with act_fn",
    "MuseSparkExperts": "experts must end with their down projection, got MuseSparkExperts with a norm behind it",
    "NemotronHExperts": "experts must have a gate, got NemotronHExperts with an up projection alone",
}
CLAMPED = dict.fromkeys(("DeepseekV4Experts", "Glm5NextTextExperts", "HYV4Experts"), Activation(limit=7.0))
ACTIVATIONS = {
    **CLAMPED,
    **dict.fromkeys(("GptOssExperts", "MiniMaxM3VLExperts", "OpenAIPrivacyFilterExperts"), SWIGLU_OAI),
}


def contracts() -> dict[str, str]:
    """{class name: module} of every experts class of transformers with the decorator of the contract."""
    found = {}
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        for name in DECORATOR.findall(file.read_text(encoding="utf-8")):
            found[name] = f"transformers.models.{file.parent.name}.{file.stem}"
    return found


CONTRACTS = contracts()


class Sizes:
    """A configuration that has every name: the numbers above, a silu, a clamp like gpt-oss's, None for the rest."""

    _experts_implementation = "eager"
    hidden_act, hidden_activation, mlp_hidden_act = "silu", "silu", "silu"
    swiglu_limit, swiglu_alpha = 7.0, 1.702
    mlp_gate_softcap, mlp_up_softcap, post_norm_eps, rms_norm_eps = 10.0, 10.0, 1e-6, 1e-6
    moe_hidden_size, moe_latent_size, mlp_bias = 48, None, False

    def __getattr__(self, name: str) -> Any:
        return SIZES.get(name)


def random_experts(name: str) -> nn.Module:
    kind = getattr(importlib.import_module(CONTRACTS[name]), name)
    own = {"intermediate_size": 24, "num_experts": 9, "hidden_size": 48, "layer_idx": 0}
    arguments = list(inspect.signature(kind.__init__.__wrapped__).parameters.values())[2:]
    required = {x.name: own[x.name] for x in arguments if x.default is x.empty and x.name in own}
    experts = kind(Sizes(), **required)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    return experts.eval().requires_grad_(False)


def run(experts: nn.Module, implementation: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(31, experts.down_proj.shape[1 if not experts.is_transposed else 2], generator=generator) * 3
    gates, index = torch.rand(31, experts.down_proj.shape[0], generator=generator).topk(2)
    experts.config._experts_implementation = implementation
    return experts(hidden, index, gates)


def test_the_contract_is_found_in_all_architectures() -> None:
    assert len(CONTRACTS) > 60 and set(OTHERS) | set(ACTIVATIONS) <= set(CONTRACTS)


@pytest.mark.parametrize("name", CONTRACTS)
def test_every_experts_module_is_served(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    experts = random_experts(name)
    cprune.experts._say_once.cache_clear()
    expected = run(experts, "eager")
    if name in OTHERS:
        monkeypatch.setattr(cprune.experts, "moe_forward", None)
        assert torch.equal(run(experts, SERVE), expected)
    for _ in range(2):
        assert_close(run(experts, SERVE), expected)
    assert served_activation(experts) == (None if name in OTHERS else ACTIVATIONS.get(name, SILU))
    said = [record.getMessage() for record in caplog.records if record.name == "cprune.experts"]
    assert len(said) == (name in OTHERS) and all(OTHERS[name] in sentence for sentence in said)


def whole_model(name: str) -> PreTrainedModel:
    """A random model of one of ARCHITECTURES, its experts eager."""
    kind = CONFIG_MAPPING[name]
    known = {k: v for k, v in SIZES.items() if k in kind.__dataclass_fields__ or k in kind.attribute_map}
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(kind(**(known | ARCHITECTURES[name]))).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whole_models_give_the_logits_of_eager_experts(name: str) -> None:
    model = whole_model(name)
    expected = logits(model)
    model.set_experts_implementation(SERVE)
    assert_close(logits(model), expected)
    experts = [module for module in model.modules() if hasattr(module, "is_transposed")]
    assert experts and all(hasattr(module, "cprune_activation") for module in experts)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_give_the_logits_of_eager_experts(tiny: Tiny, family: str) -> None:
    assert_close(logits(load(tiny(family), SERVE)), logits(load(tiny(family))))


@torch.no_grad()
def greedy(model: PreTrainedModel) -> Tensor:
    return model.generate(IDS[:1, :9], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_generate_what_eager_experts_generate(tiny: Tiny, family: str) -> None:
    assert torch.equal(greedy(load(tiny(family), SERVE)), greedy(load(tiny(family))))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_families_in_half_precision_are_as_near_to_float32_as_eager_experts(
    tiny: Tiny, family: str, dtype: torch.dtype
) -> None:
    model, exact = load(tiny(family), SERVE), load(tiny(family))
    experts = [module for module in model.modules() if hasattr(module, "is_transposed")]
    twins = [module for module in exact.modules() if hasattr(module, "is_transposed")]
    generator = torch.Generator().manual_seed(2)
    for served, twin in zip(experts, twins, strict=True):
        hidden = torch.randn(131, 48, generator=generator).to(dtype)
        gates, index = torch.rand(131, served.num_experts, generator=generator).topk(2)
        served.to(dtype)
        twin.to(dtype).float()  # the same weights
        want = twin(hidden.float(), index, gates)
        error = (served(hidden, index, gates).float() - want).abs().max()
        twin.to(dtype)
        assert error <= 2 * (twin(hidden, index, gates.to(dtype)).float() - want).abs().max()


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_whole_models_compile_without_a_break(tiny: Tiny, family: str) -> None:
    torch._dynamo.reset()
    model = load(tiny(family), SERVE)
    assert_close(logits(torch.compile(model, fullgraph=True, backend="aot_eager")), logits(model))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_ragged_models_are_served(tiny: Tiny, family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny(family))
    apply_plan(checkpoint, ragged_plan(checkpoint), tmp_path / "out")
    served = cprune.load(tmp_path / "out", experts_implementation=SERVE)
    assert len({hf.find_experts(layer).num_experts for layer in hf.decoder_layers(served)[1:]}) > 1
    assert_close(logits(served), logits(cprune.load(tmp_path / "out", experts_implementation="eager")))


def test_training_gives_the_gradients_of_eager_experts(tiny: Tiny) -> None:
    models = [load(tiny("gpt_oss"), implementation) for implementation in (SERVE, "eager")]
    for model in models:
        model(IDS).logits.square().mean().backward()
    for (name, served), eager in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert served.grad is not None and eager.grad is not None, name
        assert (served.grad - eager.grad).abs().max() <= 2.0**-12 * eager.grad.abs().max(), name


def test_slots_of_other_ranks_contribute_nothing(tiny: Tiny) -> None:
    """Expert parallelism marks them by an index past the last expert."""
    experts = hf.find_experts(hf.decoder_layers(load(tiny("mixtral"), SERVE))[0])
    generator = torch.Generator().manual_seed(0)
    hidden, gates = torch.randn(31, 48, generator=generator), torch.rand(31, 2, generator=generator)
    index = torch.randint(0, 9, (31, 2), generator=generator)
    alone = gates.clone()
    alone[::3, 1] = 0.0
    want = experts(hidden, index, alone)
    index[::3, 1] = 9
    assert_close(experts(hidden, index, gates), want)


def test_the_curve_is_found_by_what_it_computes(tiny: Tiny) -> None:
    experts = hf.find_experts(hf.decoder_layers(load(tiny("mixtral"), SERVE))[0])
    for act, activation in ((nn.SiLU(), SILU), (nn.GELU("tanh"), GELU_TANH), (torch.nn.functional.silu, SILU)):
        experts.__dict__.pop("cprune_activation", None)
        experts._modules.pop("act_fn", None)
        experts.__dict__["act_fn"] = act
        assert served_activation(experts) == activation
    for act in (
        nn.ReLU(),
        nn.Hardswish(),
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: nn.SiLU()(x).clamp(max=50),
    ):
        del experts.cprune_activation
        experts.__dict__["act_fn"] = act
        assert served_activation(experts) is None


def test_a_merged_expert_is_visited_once_with_the_sum_of_its_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG_MAPPING["mixtral"](**{**SIZES, "num_experts_per_tok": 3})
    model = AutoModelForCausalLM.from_config(config, experts_implementation=SERVE)
    resize_experts(model, {"1": 2}, {"1": [place % 2 for place in range(9)]})
    experts, visits = hf.find_experts(hf.decoder_layers(model)[1]), []
    for parameter in experts.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.shape[1]))
    forward = cprune.experts.moe_forward

    def spy(hidden: Tensor, index: Tensor, gates: Tensor, *weights: Tensor, **options: Any) -> Tensor:
        visits.append((index.tolist(), gates.tolist()))
        return forward(hidden, index, gates, *weights, **options)

    monkeypatch.setattr(cprune.experts, "moe_forward", spy)
    index, gates = torch.tensor([[0, 2, 3], [8, 4, 6]]), torch.tensor([[0.5, 0.25, 0.125], [1.0, 2.0, 4.0]])
    x = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = experts(x, index, gates)
    assert visits == [([[0, -1, 1], [0, -1, -1]], [[0.75, 0.0, 0.125], [7.0, 0.0, 0.0]])]
    gates.requires_grad_()
    trained = experts(x, index, gates)  # a gradient flows to every gate
    torch.testing.assert_close(trained.detach(), got)
    trained.sum().backward()
    assert len(visits) == 2 and bool((gates.grad != 0).all())
