from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from cprune import hf, load
from cprune.act.compact import apply_plan
from cprune.act.gauss_newton import Seen
from cprune.act.least_squares import Judge
from cprune.act.novices import RIDGES, fit_novices
from cprune.act.repair import check_novices, repair_experts
from cprune.checkpoint import Checkpoint, open_checkpoint
from cprune.config import PruneConfig
from cprune.pipeline import check_request
from cprune.plan import PrunePlan
from cprune.prove.verify import VerifyReport, verification_tokens, verify
from cprune.repaired import NOVICES, Repairs
from cprune.work import WorkFolder
from cprune_kernels import MergedExperts
from tests.synthetic import damaged, ragged_plan, refuses, tensors_of, uniform_plan
from tests.tiny import FAMILIES

Tiny = Callable[..., Path]
CONFIG = PruneConfig(router="map", dtype="float32", batch_tokens=500, repair="none")
IDS = torch.randint(0, 288, (64, 48), generator=torch.Generator().manual_seed(3))
MASK = torch.ones(IDS.shape, dtype=torch.bool)
PROBE = verification_tokens(288, None, seed=0)
ROUNDING = 1e-4  # sums of some thousand float32 products in another order, through the layers; logits are near 1


def written(checkpoint: Checkpoint, plan: PrunePlan, out: Path, repair: str = "none") -> Repairs:
    config = CONFIG.replace(repair=repair)
    work = WorkFolder(out.with_name(out.name + ".work"))
    repairs = work.repairs("source", lambda passed: repair_experts(checkpoint, plan, IDS, MASK, config, passed))
    apply_plan(checkpoint, plan, out, repairs)
    return repairs


def check(checkpoint: Checkpoint, plan: PrunePlan, out: Path) -> VerifyReport:
    return verify(checkpoint, open_checkpoint(out), plan, PROBE, Repairs.load(out / "cprune_repair.json").changed)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(PROBE).logits


def by_hand(source: Path, plan: PrunePlan, out: Path, repairs: Repairs) -> Tensor:
    """Logits of the original whose experts are computed pair by pair: those kept by `out`'s, the others by novices."""
    novel = {record.layer: record for record in repairs.layers if record.router == NOVICES}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    stored, stack = tensors_of(out), []
    small = load(out, dtype=torch.float32)
    for own in plan.layers:
        index = int(own.layer.split(".")[2])
        layer, compact = hf.decoder_layers(model)[index], hf.find_experts(hf.decoder_layers(small)[index])
        vectors = stored[f"{own.layer}.experts.novices"].float() if own.layer in novel else None

        def forward(hidden, chosen, gates, own=own, compact=compact, vectors=vectors):
            result = torch.zeros_like(hidden)
            for row in range(len(hidden)):
                for slot in range(chosen.shape[1]):
                    expert = int(chosen[row, slot])
                    if expert in own.kept:
                        given = hf.expert_output(compact, own.kept.index(expert), hidden[row : row + 1])[0]
                    else:
                        given = vectors[own.dropped.index(expert)]
                    result[row] += gates[row, slot] * given
            return result

        hf.find_experts(layer).forward = forward
        if vectors is None:
            stack.append(hf.masked_router(layer, torch.tensor(own.dropped, dtype=torch.int64)))
            stack[-1].__enter__()
    return logits(model)


# The fit


def test_the_fit_is_ridge_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, width, top_k = 300, 11, 3
    index = torch.rand(tokens, 9, generator=generator).argsort(1)[:, :top_k]
    gates = torch.rand(tokens, top_k, generator=generator)
    mask = torch.rand(10, 30, generator=generator) > 0.1
    expected = torch.randn(tokens, width, generator=generator) * (1 + 9 * torch.rand(tokens, 1, generator=generator))
    judge = Judge(expected, mask, 8)
    dropped, truth = (1, 4, 8), torch.randn(3, width, generator=generator)
    of_dropped = torch.stack([(gates * (index == expert)).sum(1) for expert in dropped], dim=1)
    noise = 0.1 * torch.randn(tokens, width, generator=generator)
    residual = (of_dropped @ truth + noise) * judge.weight.unsqueeze(1)
    before = residual.clone()
    seen = Seen(torch.zeros(tokens, width), index.to(torch.int16), gates)
    novices, error = fit_novices(dropped, 9, seen, residual, judge, torch.float32)
    assert torch.equal(residual, before) and error < 0.1 * judge.error(residual)

    rows = (of_dropped * judge.weight.unsqueeze(1)).double()
    fits = mask.flatten() & (torch.arange(tokens) < 240)
    gram, right = rows[fits].T @ rows[fits], rows[fits].T @ residual[fits].double()
    solved = [torch.linalg.solve(gram + r * gram.diagonal().mean() * torch.eye(3), right) for r in RIDGES]
    held = mask.flatten() & ~(torch.arange(tokens) < 240)
    errors = [float((residual[held].double() - rows[held] @ one).square().sum()) for one in solved]
    best = min(range(len(RIDGES)), key=errors.__getitem__)
    torch.testing.assert_close(novices.double(), solved[best], rtol=1e-5, atol=1e-5)
    assert error == pytest.approx(errors[best], rel=1e-5)


def test_where_no_dropped_expert_is_chosen_novices_are_nothing() -> None:
    index, gates = torch.zeros(40, 1, dtype=torch.int16), torch.ones(40, 1)
    judge = Judge(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), torch.ones(4, 10).bool(), 3)
    residual = torch.ones(40, 5)
    novices, error = fit_novices((1, 2), 3, Seen(torch.zeros(40, 5), index, gates), residual, judge, torch.bfloat16)
    assert novices.dtype == torch.bfloat16 and not novices.any() and error == judge.error(residual)


# Whole models


@pytest.mark.parametrize(
    ("family", "options"), [(name, {}) for name in FAMILIES] + [("qwen3_moe", {"fuse_on_disk": 1})]
)
def test_outputs_of_every_family_are_verified_and_better(
    tiny: Tiny, family: str, options: dict[str, object], tmp_path: Path
) -> None:
    checkpoint, out = open_checkpoint(tiny(family, **options)), tmp_path / "out"
    plan = ragged_plan(checkpoint)
    repairs = written(checkpoint, plan, out)
    novel = [record for record in repairs.layers if record.router == NOVICES]
    assert novel and all(record.after < record.before and record.ridge is None for record in novel)
    assert check(checkpoint, plan, out).repaired == len(novel)
    config, stored = json.loads((out / "config.json").read_text()), tensors_of(out)
    plain = tensors_of(checkpoint.folder)
    for moe, layer in zip(checkpoint.moe_layers, plan.layers, strict=True):
        (first, axis), *others = moe.router.values()
        if any(record.layer == moe.name for record in novel):
            rows = [layer.kept.index(e) if e in layer.kept else -1 for e in range(layer.num_experts)]
            assert config["cprune"]["expert_map"][str(moe.index)] == rows
            assert all(torch.equal(stored[name], plain[name]) for name, _ in [(first, axis), *others])
            novices = stored[f"{moe.name}.experts.novices"]
            assert novices.shape == (len(layer.dropped), stored[first].shape[-1])
        else:
            assert str(moe.index) not in config["cprune"].get("expert_map", {})
            assert len(stored[first]) == len(layer.kept)
    with refuses("router row for each expert"):
        check_request(open_checkpoint(out), PruneConfig())


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_the_output_routes_as_the_original(tiny: Tiny, family: str, tmp_path: Path) -> None:
    checkpoint, out = open_checkpoint(tiny(family)), tmp_path / "out"
    plan = ragged_plan(checkpoint)
    want = by_hand(checkpoint.folder, plan, out, written(checkpoint, plan, out))
    for implementation in ("eager", "grouped_mm", "batched_mm", "cprune"):
        if family == "gpt_oss" and implementation == "grouped_mm":
            continue  # needs strides of 16 bytes, which its tiny checkpoint lacks
        got = logits(load(out, dtype=torch.float32, experts_implementation=implementation))
        torch.testing.assert_close(got, want, rtol=0, atol=ROUNDING)
    stock = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    torch.testing.assert_close(logits(stock), want, rtol=0, atol=ROUNDING)


def test_the_layer_stands_alone(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint, out = open_checkpoint(tiny("qwen3_moe")), tmp_path / "out"
    plan = uniform_plan(checkpoint)
    written(checkpoint, plan, out)
    model = load(out, dtype=torch.float32, experts_implementation="cprune")
    rows = json.loads((out / "config.json").read_text())["cprune"]["expert_map"]
    index, expert_map = next(iter(rows.items()))
    experts = hf.find_experts(hf.decoder_layers(model)[int(index)])
    alone = MergedExperts.from_experts(experts, torch.tensor(expert_map), experts.novices)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(131, experts.down_proj.shape[1], generator=generator)
    chosen = torch.rand(131, len(expert_map), generator=generator).argsort(1)[:, :4]
    gates = torch.rand(131, 4, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(alone(hidden, chosen, gates), experts(hidden, chosen, gates))


def test_a_model_with_novices_compiles(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint, out = open_checkpoint(tiny("qwen3_moe")), tmp_path / "out"
    written(checkpoint, uniform_plan(checkpoint), out)
    model = load(out, dtype=torch.float32, experts_implementation="cprune").requires_grad_(False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(model))


def test_bfloat16_models_take_them_in_their_type(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint, out = open_checkpoint(tiny("olmoe", dtype="bfloat16")), tmp_path / "out"
    plan = uniform_plan(checkpoint)
    written(checkpoint, plan, out)
    assert check(checkpoint, plan, out).repaired
    model, info = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()) and {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("repair", ["down", "experts"])
def test_experts_are_refitted_beside_them(tiny: Tiny, repair: str, tmp_path: Path) -> None:
    checkpoint, out = open_checkpoint(tiny("qwen3_moe")), tmp_path / "out"
    plan = ragged_plan(checkpoint)
    repairs = written(checkpoint, plan, out, repair)
    alone = written(checkpoint, plan, tmp_path / "alone")
    assert any(record.router == NOVICES for record in repairs.layers)
    assert all(record.ridge is not None for record in repairs.layers)
    assert repairs.layers[0].after < alone.layers[0].after
    assert check(checkpoint, plan, out).repaired == len(repairs.layers)


def test_other_novices_are_caught(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint, out = open_checkpoint(tiny("qwen3_moe")), tmp_path / "out"
    plan = ragged_plan(checkpoint)
    record = next(one for one in written(checkpoint, plan, out).layers if one.router == NOVICES)

    def turn(tensors: dict[str, Tensor]) -> None:
        name = f"{record.layer}.experts.novices"
        tensors[name] = -tensors[name]

    with refuses(f"{record.layer} must hold the tensors that its repair wrote, got others in .*novices"):
        check(checkpoint, plan, damaged(out, tmp_path / "turned", turn))

    def swap(config: dict[str, object]) -> None:
        rows = config["cprune"]["expert_map"][record.layer.split(".")[2]]
        first, last = rows.index(-1), rows.index(0)
        rows[first], rows[last] = 0, -1

    with refuses(f"after decoder layer {record.layer.split('.')[2]}"):
        check(checkpoint, plan, damaged(out, tmp_path / "swapped", config=swap))


# Bad input


def test_what_cannot_be_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("olmoe"))

    def quantise(config: dict[str, object]) -> None:
        config["quantization_config"] = {"quant_method": "mxfp4"}

    quantised = open_checkpoint(damaged(checkpoint.folder, tmp_path / "q", config=quantise))
    check_novices(quantised, PruneConfig())
    with refuses("--router map needs floating-point weights, got quantization 'mxfp4'"):
        check_novices(quantised, CONFIG)
    assert replace(CONFIG, action="merge").router == "map"
