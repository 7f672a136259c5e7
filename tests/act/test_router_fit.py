from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from cprune import hf
from cprune.act import repair
from cprune.act.compact import apply_plan
from cprune.act.least_squares import Judge
from cprune.act.repair import repair_experts
from cprune.act.router_fit import RIDGE, Rows, Slopes, _solve, gate_slopes
from cprune.checkpoint import Checkpoint, open_checkpoint
from cprune.config import PruneConfig
from cprune.plan import PrunePlan
from cprune.prove.verify import verification_tokens, verify
from cprune.repaired import REFITTED, Repairs
from cprune.run import Run, main
from cprune.work import WorkFolder
from tests.synthetic import damaged, ragged_plan, refuses, run_arguments, tensors_of, uniform_plan, write_words
from tests.tiny import FAMILIES, tiny_config, tiny_model

Tiny = Callable[..., Path]
CONFIG = PruneConfig(repair="router", dtype="float32", batch_tokens=500)
IDS = torch.randint(0, 288, (64, 48), generator=torch.Generator().manual_seed(3))
MASK = torch.ones(IDS.shape, dtype=torch.bool)
PROBE = verification_tokens(288, None, seed=0)


class Shifted(TorchFunctionMode):
    """Adds to the logits of a router."""

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.shift = shift

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out + self.shift if func is F.linear and out.shape == self.shift.shape else out


def routed(layer: nn.Module, hidden: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """(choice [n, K], gates [n, K]) with logits that are shifted by [n, E]."""
    block, experts, router = hf.find_block(layer), hf.find_experts(layer), hf.find_router(layer)
    seen: list[tuple[Tensor, Tensor]] = []
    forward = router.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        with Shifted(shift):
            return forward(*args, **kwargs)

    def take(given: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        seen.append((index, gates))
        return torch.zeros_like(given)

    with torch.no_grad(), hf.replaced_forward(router, shifted), hf.replaced_forward(experts, take):
        block(hidden.unsqueeze(0))
    return seen[0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_slopes_are_those_of_the_models_own_scoring(family: str, masked: bool) -> None:
    model = tiny_model(tiny_config(family)).eval()
    layer = hf.decoder_layers(model)[2]
    experts = hf.find_experts(layer)
    hidden = torch.randn(131, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with hf.masked_router(layer, torch.tensor([1])) if masked else nullcontext(), torch.inference_mode():
        inputs, index, slopes = gate_slopes(layer, hidden)
        assert not slopes.requires_grad and slopes.dtype == torch.float32
        want_index, gates = routed(layer, hidden, torch.zeros(131, experts.num_experts))
        assert torch.equal(index, want_index.long()) and not (masked and bool((index == 1).any()))
        router = hf.find_router(layer)
        bias = getattr(router, "bias", None)
        own = F.linear(inputs[:, : hidden.shape[1]].float(), router.weight.float(), bias)
        assert inputs.shape[1] == hidden.shape[1] + (bias is not None)
        assert bias is None or bool((inputs[:, -1] == 1).all())
        assert own.isfinite().all()
        eps, top_k = 3e-3, index.shape[1]
        for place in range(top_k):
            shift = torch.zeros(131, experts.num_experts).scatter_(1, index[:, place : place + 1], eps)
            (up_index, up), (down_index, down) = routed(layer, hidden, shift), routed(layer, hidden, -shift)
            same = ((up_index == want_index) & (down_index == want_index)).all(1)
            assert int(same.sum()) > 60
            want = (up - down).float() / (2 * eps)
            scale = float(gates.float().abs().max())
            torch.testing.assert_close(slopes[same, :, place], want[same], rtol=0, atol=2e-4 * scale)


def test_the_step_is_ridge_least_squares_until_held_back_tokens_dislike_it() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, width, num, top_k = 2600, 6, 5, 2
    inputs = torch.randn(tokens, width, generator=generator)
    index = torch.rand(tokens, num - 1, generator=generator).argsort(1)[:, :top_k]  # nobody chooses the last
    directions = torch.randn(tokens, top_k, 9, generator=generator)
    truth = 0.3 * torch.randn(num, width, generator=generator)
    moved = (inputs @ truth.T).gather(1, index)
    residual = (directions * moved.unsqueeze(2)).sum(1) + 0.5 * torch.randn(tokens, 9, generator=generator)
    mask = torch.rand(26, 100, generator=generator) > 0.1
    judge = Judge(torch.ones(tokens, 9), mask, 20)
    gram = directions @ directions.transpose(1, 2)
    slopes = Slopes(inputs, index, gram, (directions @ residual.unsqueeze(2)).squeeze(2))
    step = _solve(slopes, num, judge)

    fits = mask.flatten() & (torch.arange(tokens) < 2000)
    rows = torch.zeros(tokens, 9, num, width, dtype=torch.float64)
    for slot in range(top_k):
        part = directions[:, slot, :, None].double() * inputs[:, None, :].double()
        rows[torch.arange(tokens), :, index[:, slot]] += part
    flat = rows[fits].flatten(2).flatten(0, 1)
    normal = flat.T @ flat
    diagonal = torch.stack([normal.diagonal().view(num, width)[e].mean() for e in range(num - 1)]).mean()
    want = torch.linalg.solve(
        normal + RIDGE * diagonal * torch.eye(num * width), flat.T @ residual[fits].double().flatten()
    )
    torch.testing.assert_close(step.double(), want.view(num, width), rtol=0, atol=1e-3)
    assert not step[-1].any()

    noise = Slopes(inputs, index, gram, torch.randn(slopes.right.shape, generator=generator))
    held = mask.flatten() & (torch.arange(tokens) >= 2000)
    delta = (inputs @ _solve(noise, num, judge).T).gather(1, index)[held]
    change = ((gram[held] @ delta.unsqueeze(2)).squeeze(2) - 2 * noise.right[held]) * delta
    assert float(change.sum()) <= 0.0


def test_rows_are_rounded_as_they_will_be_written(tiny: Tiny) -> None:
    model = tiny_model(tiny_config("gpt_oss"))
    layer = hf.decoder_layers(model)[1]
    router = hf.find_router(layer)
    weight, bias = router.weight.detach().clone(), router.bias.detach().clone()
    step = torch.full((len(weight), weight.shape[1] + 1), 0.1)
    with torch.no_grad():
        rows = Rows(layer, (1, 3), {"weight": torch.bfloat16, "bias": torch.float32})
        rows.put(step)
        assert torch.equal(router.weight[[1, 3]], (weight[[1, 3]] + 0.1).bfloat16().float())
        assert torch.equal(router.bias[[1, 3]], bias[[1, 3]] + 0.1)
        rows.put(None)
        others = [expert for expert in range(len(weight)) if expert not in (1, 3)]
        assert torch.equal(router.weight[others], weight[others]) and torch.equal(router.bias, bias)
        rows.take(step)
        rows.put(step)
        assert torch.equal(router.bias[[1, 3]], bias[[1, 3]] + 0.1 + 0.1)


# Whole models


def repaired(checkpoint: Checkpoint, plan: PrunePlan, out: Path, config: PruneConfig = CONFIG) -> Repairs:
    work = WorkFolder(out.with_name(out.name + ".work"))
    repairs = work.repairs("source", lambda passed: repair_experts(checkpoint, plan, IDS, MASK, config, passed))
    apply_plan(checkpoint, plan, out, repairs)
    return repairs


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_of_every_family(tiny: Tiny, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "MARGIN", 1e-4)  # gates of random models hardly matter
    checkpoint, out = open_checkpoint(tiny(family)), tmp_path / "out"
    plan = uniform_plan(checkpoint)
    repairs = repaired(checkpoint, plan, out)
    apply_plan(checkpoint, plan, tmp_path / "plain")
    changed = repairs.changed
    assert changed and all(record.router == REFITTED and record.ridge is None for record in changed.values())
    assert all(record.after < record.before for record in changed.values())
    before, after = tensors_of(tmp_path / "plain"), tensors_of(out)
    assert before.keys() == after.keys()
    rows = {
        name
        for moe in checkpoint.moe_layers
        if moe.name in changed
        for suffix, (name, _) in moe.router.items()
        if suffix.rpartition(".")[2] in ("weight", "bias")
    }
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.shape == after[name].shape
        assert torch.equal(tensor, after[name]) == (name not in rows), name
    report = verify(checkpoint, open_checkpoint(out), plan, PROBE, changed)
    assert report.repaired == len(changed) and report.merged == 0
    AutoModelForCausalLM.from_pretrained(out)


def test_bfloat16_rows_in_ragged_layers(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "MARGIN", 1e-4)
    checkpoint, out = open_checkpoint(tiny("qwen3_moe", dtype="bfloat16")), tmp_path / "out"
    plan = ragged_plan(checkpoint)
    repairs = repaired(checkpoint, plan, out, CONFIG.replace(dtype="auto"))
    assert repairs.changed
    assert verify(checkpoint, open_checkpoint(out), plan, PROBE, repairs.changed).repaired == len(repairs.changed)

    def shift(tensors: dict[str, Tensor]) -> None:
        name = f"{next(iter(repairs.changed))}.gate.weight"
        tensors[name] = tensors[name] * 1.5

    with refuses("must hold the tensors that its repair wrote, got others in .*gate.weight"):
        verify(checkpoint, open_checkpoint(damaged(out, tmp_path / "other", shift)), plan, PROBE, repairs.changed)


def test_the_command_refits_the_router_and_says_so(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = write_words(tmp_path / "text.jsonl", 90), tmp_path / "out"
    given = run_arguments(tiny("qwen3_moe"), out, text, tokens=2048)
    assert main([*given, "--repair", "router"], (Run,)) == 0
    report, shown = json.loads((out / "report.json").read_text()), " ".join(capsys.readouterr().out.split())
    changed = [record for record in report["repair"] if record["router"] == REFITTED]
    assert changed and f"repaired {len(changed)} of 3 layers, error" in shown
    assert report["verification"]["repaired"] == len(changed)
    assert main(["verify", str(tiny("qwen3_moe")), str(out)]) == 0


def test_what_cannot_be_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with refuses("router must be fold for --repair router, got 'map'"):
        PruneConfig(repair="router", router="map")
    with refuses("repair must be auto, down or none for --action merge, got 'router'"):
        PruneConfig(repair="router", action="merge")
    given = [str(tiny("olmoe")), str(tmp_path / "out"), "--repair", "router", "--calibration", "none"]
    assert main([*given, "--evaluate", "none"], (Run,)) == 2
