from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cprune.act.compact import apply_plan
from cprune.checkpoint import open_checkpoint
from cprune.plan import PrunePlan
from cprune.prove.verify import RELATIVE_BUDGET, VerifyReport, verification_tokens, verify
from tests.synthetic import damaged, plan_for, ragged_plan, refuses, uniform_plan
from tests.tiny import FAMILIES

Tiny = Callable[..., Path]
IDS = verification_tokens(288, None, seed=0)


def check(source: Path, out: Path) -> VerifyReport:
    return verify(open_checkpoint(source), open_checkpoint(out), PrunePlan.load(out / "cprune_plan.json"), IDS)


@pytest.mark.parametrize("shape", ["uniform", "ragged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_of_every_family_pass(tiny: Tiny, family: str, shape: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny(family))
    apply_plan(checkpoint, (uniform_plan if shape == "uniform" else ragged_plan)(checkpoint), tmp_path / "out")
    report = check(tiny(family), tmp_path / "out")
    assert (report.layers, report.positions, report.ties) == (3, 256, 0)
    assert report.max_error < RELATIVE_BUDGET / 16 and report.logits_error < RELATIVE_BUDGET / 16


@pytest.mark.parametrize(("family", "options"), [("deepseek_v3", {"mtp": True}), ("gpt_oss", {"dtype": "bfloat16"})])
def test_outputs_of_other_layouts_pass(tiny: Tiny, family: str, options: dict[str, object], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny(family, **options))
    apply_plan(checkpoint, uniform_plan(checkpoint), tmp_path / "out")
    assert check(checkpoint.folder, tmp_path / "out").ties == 0


# Faults


@pytest.fixture(scope="module")
def outputs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A good output of a family, by a uniform plan."""
    folder = tmp_path_factory.mktemp("outputs")

    def output(family: str) -> Path:
        if not (folder / family).exists():
            checkpoint = open_checkpoint(tiny(family))
            apply_plan(checkpoint, uniform_plan(checkpoint), folder / family)
        return folder / family

    return output


def swap_experts(tensors: dict[str, Tensor]) -> None:
    for name in ("gate_proj", "up_proj", "down_proj"):
        one, other = (f"model.layers.1.mlp.experts.{expert}.{name}.weight" for expert in (2, 5))
        tensors[one], tensors[other] = tensors[other], tensors[one]


def swap_one_projection(tensors: dict[str, Tensor]) -> None:
    one, other = (f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in (2, 5))
    tensors[one], tensors[other] = tensors[other], tensors[one]


def shift_router(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.gate.weight"] = tensors["model.layers.1.mlp.gate.weight"].roll(1, 0)


def repeat_a_row(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.gate.weight"][3] = tensors["model.layers.1.mlp.gate.weight"][4]


def shift_correction(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[name] = tensors[name].roll(1)


def change_norm(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.post_attention_layernorm.weight"][7] += 0.05


def change_attention(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.self_attn.o_proj.weight"][0] += 0.05


def swap_fused(tensors: dict[str, Tensor]) -> None:
    for name in ("gate_up_proj", "down_proj"):
        weights = tensors[f"model.layers.1.mlp.experts.{name}"]
        weights[[1, 2]] = weights[[2, 1]]


def shift_fused_bias(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.1.mlp.experts.down_proj_bias"
    tensors[name] = tensors[name].roll(1, 0)


def shift_router_bias(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.router.bias"] = tensors["model.layers.1.mlp.router.bias"].roll(1)


def not_a_number(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.experts.0.up_proj.weight"][0, 0] = torch.nan


EXPERT_FAULTS = (swap_experts, swap_one_projection, not_a_number, swap_fused, shift_fused_bias)


@pytest.mark.parametrize(
    ("family", "fault"),
    [
        ("qwen3_moe", swap_experts),
        ("qwen3_moe", swap_one_projection),
        ("qwen3_moe", shift_router),
        ("qwen3_moe", repeat_a_row),
        ("qwen3_moe", change_norm),
        ("qwen3_moe", change_attention),
        ("qwen3_moe", not_a_number),
        ("deepseek_v3", swap_experts),
        ("deepseek_v3", shift_router),
        ("deepseek_v3", shift_correction),
        ("gpt_oss", swap_fused),
        ("gpt_oss", shift_fused_bias),
        ("gpt_oss", shift_router_bias),
    ],
)
def test_fault_is_caught_in_its_layer(
    tiny: Tiny, outputs: Callable[[str], Path], family: str, fault: Callable[..., None], tmp_path: Path
) -> None:
    of_experts = r"^model.layers.1.mlp must keep expert \d+ as it is in the original"
    of_the_rest = r"equal the masked original up to rounding, got .* after decoder layer 1 \("
    with refuses(of_experts if fault in EXPERT_FAULTS else of_the_rest):
        check(tiny(family), damaged(outputs(family), tmp_path / "out", fault))


def test_one_wrong_weight_of_an_expert_that_no_token_meets_is_caught(
    tiny: Tiny, outputs: Callable[[str], Path], tmp_path: Path
) -> None:
    def flip(tensors: dict[str, Tensor]) -> None:
        for name in ("gate_proj", "up_proj", "down_proj"):
            tensors[f"model.layers.1.mlp.experts.4.{name}.weight"][2, 3] *= -1

    with refuses("model.layers.1.mlp must keep expert"):
        check(tiny("qwen3_moe"), damaged(outputs("qwen3_moe"), tmp_path / "out", flip))


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.embed_tokens.weight", "the embedding"),
        ("lm_head.weight", "the logits"),
        ("model.norm.weight", "the logits"),
    ],
)
def test_fault_outside_the_layers_is_caught(
    tiny: Tiny, outputs: Callable[[str], Path], name: str, where: str, tmp_path: Path
) -> None:
    folder = damaged(outputs("olmoe"), tmp_path / "out", lambda tensors: tensors[name][:40].mul_(1.01))
    with refuses(f"after {where}"):
        check(tiny("olmoe"), folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.2.self_attn.q_norm.weight",
        "lm_head.weight",
    ],
)
def test_missing_tensor_is_caught_by_name(
    tiny: Tiny, outputs: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    folder = damaged(outputs("olmoe"), tmp_path / "out", lambda tensors: tensors.pop(name))
    with refuses(re.sub(r"^model\.layers\.\d+\.", "", name)):
        check(tiny("olmoe"), folder)


def test_experts_kept_in_other_places_are_caught(tiny: Tiny, outputs: Callable[[str], Path]) -> None:
    original, out = open_checkpoint(tiny("olmoe")), open_checkpoint(outputs("olmoe"))
    other = uniform_plan(original, seed=9)
    assert other != PrunePlan.load(outputs("olmoe") / "cprune_plan.json")
    with refuses("model.layers.0.mlp must keep expert"):
        verify(original, out, other, IDS)


def test_other_depth_is_caught(tiny: Tiny, outputs: Callable[[str], Path]) -> None:
    original = open_checkpoint(tiny("olmoe", num_hidden_layers=2))
    plan = plan_for(original, {moe.name: range(12) for moe in original.moe_layers})
    with refuses("must have 2 decoder layers, got 3"):
        verify(original, open_checkpoint(outputs("olmoe")), plan, IDS)


def test_tokens_are_random_and_real(tiny: Tiny) -> None:
    text = torch.arange(6 * 100).reshape(6, 100)
    tokens = verification_tokens(300, text, seed=0)
    assert tokens.shape == (8, 64) and torch.equal(tokens[4:], text[:4, :64])
    assert 0 <= tokens[:4].min() and tokens[:4].max() < 300 and tokens[:4].unique().numel() > 100
    assert torch.equal(verification_tokens(300, None, seed=0), tokens[:4])
    assert torch.equal(verification_tokens(300, text[:, :63], seed=0), tokens[:, :63])  # as long as the text is
    assert not torch.equal(verification_tokens(300, None, seed=1), tokens[:4])
