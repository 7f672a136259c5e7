from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from cprune import hf, load
from cprune.act.compact import REPAIR_NAME, apply_plan
from cprune.act.least_squares import RIDGES, Activations, Judge, fit_down
from cprune.act.repair import MARGIN, Recorder, repair_down, why_not
from cprune.checkpoint import Checkpoint, open_checkpoint
from cprune.config import PruneConfig
from cprune.plan import PrunePlan
from cprune.prove.verify import verification_tokens, verify
from cprune.repaired import LayerRepair, Repairs
from cprune.work import WorkFolder
from tests.synthetic import damaged, plan_for, ragged_plan, refuses, tensors_of, uniform_plan
from tests.tiny import FAMILIES

Tiny = Callable[..., Path]
CONFIG = PruneConfig(dtype="float32", batch_tokens=500)
IDS = torch.randint(0, 288, (64, 48), generator=torch.Generator().manual_seed(3))
MASK = torch.ones(IDS.shape, dtype=torch.bool)


def repaired(checkpoint: Checkpoint, plan: PrunePlan, work: Path, config: PruneConfig = CONFIG) -> Repairs:
    folder = WorkFolder(work)
    return folder.repairs("source", lambda done: repair_down(checkpoint, plan, IDS, MASK, config, done))


def hidden_states(folder: Path) -> list[Tensor]:
    """Hidden states after every decoder layer, by plain transformers."""
    model, layers = load(folder, dtype=torch.float32).eval(), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, _args, out: layers.append(out))
    with torch.no_grad():
        model(IDS)
    return layers


# The fit


class Experts(torch.nn.Module):
    """Three experts of transformers' contract, gelu instead of a gated unit's product."""

    has_gate, has_bias, is_concatenated = True, False, True

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.is_transposed, self.num_experts = transposed, 3
        up, down = (torch.randn(3, *size, generator=generator) / 3 for size in ((14, 10), (10, 7)))
        self.gate_up_proj = torch.nn.Parameter(up.transpose(1, 2).contiguous() if transposed else up, False)
        self.down_proj = torch.nn.Parameter(down.transpose(1, 2).contiguous() if transposed else down, False)

    def _apply_gate(self, hidden: Tensor) -> Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up

    def activation(self, expert: int, x: Tensor) -> Tensor:
        weight = self.gate_up_proj[expert].double()
        gate, up = (x.double() @ (weight if self.is_transposed else weight.T)).chunk(2, dim=-1)
        return F.silu(gate) * up


def case(tokens: int = 400) -> tuple[Tensor, Tensor, Tensor, Judge]:
    """Inputs [T, 10], routing among experts 0 and 2 [T, 2], gates, and a judge over sequences of 10, the last five."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 10, generator=generator)
    index = torch.tensor([0, 2]).repeat(tokens, 1)
    gates = torch.rand(tokens, 2, generator=generator)
    mask = torch.ones(tokens // 10, 10, dtype=torch.bool)
    return x, index, gates, Judge(torch.randn(tokens, 10, generator=generator), mask, tokens // 10 - 5)


def recorded(experts: Experts, x: Tensor, index: Tensor, gates: Tensor, judge: Judge) -> dict[int, Activations]:
    """What a recorder takes from two batches through the observed experts, of which 1 is not asked for."""
    recorder = Recorder(judge.weight, [2, 0])
    experts.cprune_observer = recorder
    for part in zip(x.split(250), index.split(250), gates.split(250), strict=True):
        hf._observing_experts(experts, *part)
    return recorder.take()


def prediction(experts: Experts, changes: dict[int, Tensor], x: Tensor, index: Tensor, gates: Tensor) -> Tensor:
    """sum_e g_e a_e(x) D_e, float64."""
    out = torch.zeros(len(x), 10, dtype=torch.float64)
    for e, delta in changes.items():
        out += (gates.double() * (index == e)).sum(1, keepdim=True) * (experts.activation(e, x) @ delta.double())
    return out


@pytest.mark.parametrize("transposed", [False, True])
def test_activations_of_routed_pairs_are_recorded_with_their_weights(transposed: bool) -> None:
    experts, (x, index, gates, judge) = Experts(transposed), case()
    index[::3, 1] = 1  # not asked for
    judge.weight[7] = 0.5
    pairs = recorded(experts, x, index, gates, judge)
    assert list(pairs) == [0, 2]
    for e in (0, 2):
        tokens, slots = (index == e).nonzero(as_tuple=True)
        rows = experts.activation(e, x[tokens]) * (gates[tokens, slots] * judge.weight[tokens]).double().unsqueeze(1)
        assert torch.equal(pairs[e].tokens, tokens)
        torch.testing.assert_close(pairs[e].rows.double(), rows, rtol=0, atol=14 * 2.0**-24 * 10)  # sums of 10 and 7


@pytest.mark.parametrize("transposed", [False, True])
def test_a_loss_that_is_linear_in_the_activations_is_given_back(transposed: bool) -> None:
    experts, (x, index, gates, judge) = Experts(transposed), case()
    generator = torch.Generator().manual_seed(2)
    truth = {e: torch.randn(7, 10, generator=generator) for e in (0, 2)}
    weight = judge.weight.double().unsqueeze(1)
    residual = weight * prediction(experts, truth, x, index, gates)
    before, left = judge.error(residual), residual.float()
    changes = fit_down(recorded(experts, x, index, gates, judge), left, judge)
    assert {e: change.ridge for e, change in changes.items()} == {0: 0.03, 2: 0.03}
    deltas = {e: change.delta for e, change in changes.items()}
    expected = residual - weight * prediction(experts, deltas, x, index, gates)
    torch.testing.assert_close(left.double(), expected, rtol=0, atol=100 * 2.0**-24 * float(residual.abs().max()))
    assert judge.error(expected) < 0.05 * before  # what a ridge of 0.03 of the mean diagonal leaves of it


def test_sweeps_come_to_the_joint_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, (x, index, gates, judge) = Experts(), case()
    residual = torch.randn(len(x), 10, generator=torch.Generator().manual_seed(5))
    residual += prediction(experts, {0: torch.ones(7, 10), 2: -torch.ones(7, 10)}, x, index, gates).float()
    monkeypatch.setattr("cprune.act.least_squares.RIDGES", (0.3,))
    monkeypatch.setattr("cprune.act.least_squares.SWEEPS", 200)
    falling = iter(range(100000, 0, -1))
    monkeypatch.setattr("cprune.act.least_squares._square", lambda x: float(next(falling)))  # every step is liked
    pairs = recorded(experts, x, index, gates, judge)
    rows = torch.cat([pairs[e].rows.double()[: judge.first] for e in (0, 2)], dim=1)
    gram = rows.T @ rows
    monkeypatch.setattr("cprune.act.least_squares._mean_diagonal", lambda *args: float(gram.diagonal().mean()))
    target = residual[: judge.first].double()
    changes = fit_down(pairs, residual, judge)
    joint = torch.linalg.solve(gram + 0.3 * gram.diagonal().mean() * torch.eye(14), rows.T @ target)
    got = torch.cat([changes[0].delta, changes[2].delta]).double()
    # 200 float32 updates of one residual, each rounded to 2^-24 of it
    assert (got - joint).abs().max() < 200 * 2.0**-24 * joint.abs().max() * 10


def test_each_expert_has_the_ridge_that_held_back_tokens_like(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, (x, index, gates, judge) = Experts(), case()
    pairs = recorded(experts, x, index, gates, judge)
    residual = prediction(experts, {0: torch.ones(7, 10)}, x, index, gates).float()
    residual += 0.3 * torch.randn(residual.shape, generator=torch.Generator().manual_seed(6))
    monkeypatch.setattr("cprune.act.least_squares.SWEEPS", 1)
    mean = sum(float(p.rows[: judge.first].double().square().sum()) for p in pairs.values()) / 14
    p, r = pairs[0].rows.double(), residual.double()
    fit, errors = slice(0, judge.first), {}
    for ridge in RIDGES:
        delta = torch.linalg.solve(p[fit].T @ p[fit] + ridge * mean * torch.eye(7), p[fit].T @ r[fit])
        errors[ridge] = float((r - p @ delta)[judge.first :].square().sum())
    change = fit_down({0: pairs[0], 2: pairs[2]}, residual, judge)[0]
    assert change.ridge == min(errors, key=errors.__getitem__)


def test_noise_is_not_fitted() -> None:
    experts, (x, index, gates, judge) = Experts(), case()
    noise = torch.randn(len(x), 10, generator=torch.Generator().manual_seed(4))
    before = judge.error(noise)
    fit_down(recorded(experts, x, index, gates, judge), noise, judge)
    assert judge.error(noise) <= before and judge.error(noise) > (1 - MARGIN) * before


def test_tokens_that_do_not_count_and_judges_are_not_fitted() -> None:
    experts, (x, index, gates, _) = Experts(), case()
    residual = prediction(experts, {0: torch.ones(7, 10)}, x, index, gates).float()
    mask = torch.ones(40, 10, dtype=torch.bool)
    mask[:, 0] = False
    judge = Judge(torch.ones(400, 10), mask, 35)
    pairs = recorded(experts, x, index, gates, judge)
    expected = fit_down(pairs, residual.clone(), judge)
    residual[~mask.flatten()] = torch.nan
    assert judge.error(residual) > 0
    got = fit_down(pairs, residual.clone(), judge)
    assert all(torch.equal(got[e].delta, expected[e].delta) for e in (0, 2)) and got.keys() == expected.keys()
    residual[350:] *= 1.01  # judges change what is chosen, not what is fitted
    got = fit_down(pairs, residual.clone(), judge)
    assert got[0].ridge == expected[0].ridge and torch.equal(got[0].delta, expected[0].delta)


def test_singular_gram_matrices_are_handled() -> None:
    experts, (x, index, gates, judge) = Experts(), case()
    experts.gate_up_proj[0, 1:7] = experts.gate_up_proj[0, :1]  # units of expert 0 are copies: rank 1
    experts.gate_up_proj[0, 8:] = experts.gate_up_proj[0, 7:8]
    residual = prediction(experts, {0: torch.ones(7, 10)}, x, index, gates).float()
    changes = fit_down(recorded(experts, x, index, gates, judge), residual, judge)
    assert 0 in changes and all(bool(torch.isfinite(change.delta).all()) for change in changes.values())
    experts.gate_up_proj.zero_()
    assert fit_down(recorded(experts, x, index, gates, judge), torch.ones(400, 10), judge) == {}
    assert fit_down({}, torch.ones(400, 10), judge) == {}


def test_massive_tokens_count_like_the_median() -> None:
    expected = torch.ones(80, 4)
    expected[::10] *= 1000.0
    judge = Judge(expected, torch.ones(8, 10, dtype=torch.bool), 7)
    assert torch.equal(judge.weight[::10], torch.full((8,), 1e-3)) and judge.weight[1] == 1
    assert judge.first == 70
    assert judge.relative(judge.error(judge.residual(expected, torch.zeros(80, 4)))) == pytest.approx(1.0)


# Whole models


@pytest.mark.parametrize(
    ("family", "options"), [(name, {}) for name in FAMILIES] + [("qwen3_moe", {"fuse_on_disk": 1})]
)
@pytest.mark.parametrize("shape", ["uniform", "ragged"])
def test_outputs_of_every_family(
    tiny: Tiny, family: str, options: dict[str, object], shape: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny(family, **options))
    plan = (uniform_plan if shape == "uniform" else ragged_plan)(checkpoint)
    repairs = repaired(checkpoint, plan, tmp_path / "work")
    assert [layer.layer for layer in repairs.layers] == [moe.name for moe in checkpoint.moe_layers]
    assert repairs.changed and all(layer.after <= layer.before for layer in repairs.layers)
    apply_plan(checkpoint, plan, tmp_path / "out", repairs)
    apply_plan(checkpoint, plan, tmp_path / "plain")
    before, after = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.shape == after[name].shape
        block = next((layer for layer in repairs.changed if name.startswith(f"{layer}.experts")), None)
        may_differ = block is not None and name.endswith(("down_proj", "down_proj.weight", "w2.weight"))
        assert may_differ or torch.equal(tensor, after[name]), name
    assert Repairs.load(tmp_path / "out" / REPAIR_NAME) == replace(repairs, files=())
    # the error that the record tells, on the outputs of plain transformers
    originals, compacts = hidden_states(checkpoint.folder), hidden_states(tmp_path / "out")
    held = torch.arange(64) % 8 == 7
    order = torch.cat([(~held).nonzero(), held.nonzero()]).flatten()
    for layer in repairs.layers:
        index = int(layer.layer.split(".")[2])
        expected, got = (states[index][order].flatten(0, 1) for states in (originals, compacts))
        judge = Judge(expected, MASK, 56)
        error = judge.error(judge.residual(expected, got))
        assert judge.relative(error) == pytest.approx(layer.after, rel=1e-3)  # two float32 passes and their ties
    changed = {name: layer.digest for name, layer in repairs.changed.items()}
    report = verify(
        checkpoint, open_checkpoint(tmp_path / "out"), plan, verification_tokens(288, None, seed=0), changed
    )
    assert report.repaired == len(changed)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_bfloat16_weights_stay_bfloat16(tiny: Tiny, family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny(family, dtype="bfloat16"))
    plan = uniform_plan(checkpoint)
    repairs = repaired(checkpoint, plan, tmp_path / "work", CONFIG.replace(dtype="auto"))
    apply_plan(checkpoint, plan, tmp_path / "out", repairs)
    assert repairs.changed
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and model.dtype == torch.bfloat16
    down = {name: tensor for name, tensor in tensors_of(tmp_path / "out").items() if "down_proj" in name}
    assert {tensor.dtype for tensor in down.values()} == {torch.bfloat16}


def test_a_killed_repair_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("qwen3_moe"))
    plan = ragged_plan(checkpoint)
    whole = repaired(checkpoint, plan, tmp_path / "whole")
    walked: list[str] = []

    def killed(done: dict[str, Path | None]) -> object:
        for record, tensors in repair_down(checkpoint, plan, IDS, MASK, CONFIG, done):
            if walked:
                raise KeyboardInterrupt
            walked.append(record.layer)
            yield record, tensors

    with pytest.raises(KeyboardInterrupt):
        WorkFolder(tmp_path / "work").repairs("source", killed)
    stamp = (tmp_path / "work" / "repair-000.safetensors").stat().st_mtime_ns
    again = repaired(checkpoint, plan, tmp_path / "work")
    assert again.layers == whole.layers and len(again.files) == len(whole.files) == 3
    assert (tmp_path / "work" / "repair-000.safetensors").stat().st_mtime_ns == stamp
    for one, other in zip(again.files, whole.files, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert WorkFolder(tmp_path / "work").repairs("source", lambda done: pytest.fail("finished")) == again
    other = WorkFolder(tmp_path / "work").repairs("another", lambda done: iter(()) if not done else pytest.fail("old"))
    assert other.layers == () and not list((tmp_path / "work").glob("*.safetensors"))


def test_a_broken_record_is_made_again(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("olmoe"))
    whole = repaired(checkpoint, uniform_plan(checkpoint), tmp_path)
    for fault in ("", "{}", json.dumps({"cprune_repairs": 1, "key": "", "layers": [{}]})):
        (tmp_path / "repair.json").write_text(fault)
        assert repaired(checkpoint, uniform_plan(checkpoint), tmp_path) == whole
    whole.files[1].unlink()
    assert repaired(checkpoint, uniform_plan(checkpoint), tmp_path) == whole
    WorkFolder(tmp_path).forget_repairs()
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_keeps_all_is_left_alone(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("olmoe"))
    plan = plan_for(checkpoint, {moe.name: range(15) for moe in checkpoint.moe_layers})
    assert repaired(checkpoint, plan, tmp_path).changed == {}


def test_verify_knows_the_repaired_weights_by_their_digest(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("olmoe"))
    plan = uniform_plan(checkpoint)
    repairs = repaired(checkpoint, plan, tmp_path / "work")
    apply_plan(checkpoint, plan, tmp_path / "out", repairs)
    changed = {name: layer.digest for name, layer in repairs.changed.items()}
    ids = verification_tokens(288, None, seed=0)
    with refuses("must keep expert 1 as it is in the original|must keep expert 0"):
        verify(checkpoint, open_checkpoint(tmp_path / "out"), plan, ids)

    def swap(name: str) -> Callable[[dict[str, Tensor]], None]:
        def fault(tensors: dict[str, Tensor]) -> None:
            one, other = (f"model.layers.1.mlp.experts.{expert}.{name}.weight" for expert in (2, 5))
            tensors[one], tensors[other] = tensors[other], tensors[one]

        return fault

    for name, message in (
        ("down_proj", "must hold the down projections that its repair wrote"),
        ("up_proj", "must keep"),
    ):
        broken = open_checkpoint(damaged(tmp_path / "out", tmp_path / name, swap(name)))
        with refuses(f"model.layers.1.mlp {message}"):
            verify(checkpoint, broken, plan, ids, changed)

    def shift(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.gate.weight"] = tensors["model.layers.1.mlp.gate.weight"].roll(1, 0)

    with refuses("after decoder layer 1"):
        verify(checkpoint, open_checkpoint(damaged(tmp_path / "out", tmp_path / "r", shift)), plan, ids, changed)


def test_replacement_of_another_shape_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("olmoe"))
    name = "model.layers.0.mlp.experts.0.down_proj.weight"
    save_file({name: torch.zeros(3, 4)}, tmp_path / "repair-000.safetensors")
    repairs = Repairs(
        "", (LayerRepair("model.layers.0.mlp", 1.0, 1.0, 0.5, "x"),), (tmp_path / "repair-000.safetensors",)
    )
    with refuses(f"{name} must be replaced by F32"):
        apply_plan(checkpoint, uniform_plan(checkpoint), tmp_path / "out", repairs)
    assert not (tmp_path / "out").exists()


# When there is one


def test_when_a_run_repairs(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("olmoe"))
    plan = replace(uniform_plan(checkpoint), config={"calibration": "default"})
    other = replace(plan, config={"calibration": "task.jsonl"})
    assert why_not(checkpoint, CONFIG) is None and why_not(checkpoint, CONFIG, plan) is None
    assert why_not(checkpoint, CONFIG.replace(repair="none")) == "--repair none"
    assert why_not(checkpoint, CONFIG.replace(calibration="none")) == "--calibration none"
    assert "task.jsonl" in str(why_not(checkpoint, CONFIG, other))
    assert why_not(checkpoint, CONFIG.replace(calibration="task.jsonl"), other) is None
    assert why_not(checkpoint, CONFIG.replace(repair="down"), other) is None
    with refuses("--repair down needs calibration text and floating-point weights, got --calibration none"):
        why_not(checkpoint, CONFIG.replace(repair="down", calibration="none"))

    def quantise(config: dict[str, object]) -> None:
        config["quantization_config"] = {"quant_method": "mxfp4"}

    quantised = open_checkpoint(damaged(checkpoint.folder, tmp_path / "q", config=quantise))
    assert why_not(quantised, CONFIG) == "quantization 'mxfp4'"
    with refuses("got quantization 'mxfp4'"):
        why_not(quantised, CONFIG.replace(repair="down"))

    def to_integers(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "down_proj" in name]:
            tensors[name] = tensors[name].to(torch.int8)

    assert "I8 in model.layers.0" in str(
        why_not(open_checkpoint(damaged(checkpoint.folder, tmp_path / "i", to_integers)), CONFIG)
    )


def test_one_sequence_cannot_judge_itself(tiny: Tiny) -> None:
    checkpoint = open_checkpoint(tiny("olmoe"))
    with refuses("repair needs two calibration sequences, one to judge by, got 1"):
        next(repair_down(checkpoint, uniform_plan(checkpoint), IDS[:1], MASK[:1], CONFIG))
