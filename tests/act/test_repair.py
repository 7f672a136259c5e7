from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from cprune import load
from cprune.act.compact import REPAIR_NAME, apply_plan
from cprune.act.least_squares import Judge, judges
from cprune.act.repair import repair_experts, why_not
from cprune.checkpoint import Checkpoint, open_checkpoint
from cprune.config import PruneConfig
from cprune.plan import PrunePlan
from cprune.prove.verify import verification_tokens, verify
from cprune.repaired import LayerRepair, Passed, Repairs
from cprune.work import WorkFolder
from tests.synthetic import damaged, plan_for, ragged_plan, refuses, tensors_of, uniform_plan
from tests.tiny import FAMILIES

Tiny = Callable[..., Path]
CONFIG = PruneConfig(dtype="float32", batch_tokens=500)
IDS = torch.randint(0, 288, (64, 48), generator=torch.Generator().manual_seed(3))
MASK = torch.ones(IDS.shape, dtype=torch.bool)
DOWN = ("down_proj", "down_proj.weight", "w2.weight")


def repaired(checkpoint: Checkpoint, plan: PrunePlan, work: Path, config: PruneConfig = CONFIG) -> Repairs:
    folder = WorkFolder(work)
    return folder.repairs("source", lambda passed: repair_experts(checkpoint, plan, IDS, MASK, config, passed))


def killed_after(layers: int, checkpoint: Checkpoint, plan: PrunePlan, work: Path) -> None:
    def killed(passed: Passed | None) -> Iterator[tuple[LayerRepair, dict[str, Tensor], Passed]]:
        yield from islice(repair_experts(checkpoint, plan, IDS, MASK, CONFIG, passed), layers)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        WorkFolder(work).repairs("source", killed)


def hidden_states(folder: Path) -> list[Tensor]:
    """Hidden states after every decoder layer, by plain transformers."""
    model, layers = load(folder, dtype=torch.float32).eval(), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, _args, out: layers.append(out))
    with torch.no_grad():
        model(IDS)
    return layers


def records_tell_the_true_error(repairs: Repairs, source: Path, out: Path, mask: Tensor) -> None:
    """The error of every layer's record is that of the outputs of plain transformers."""
    originals, compacts = hidden_states(source), hidden_states(out)
    held = judges(64)
    order = torch.cat([(~held).nonzero(), held.nonzero()]).flatten()
    for layer in repairs.layers:
        index = int(layer.layer.split(".")[2])
        expected, got = (states[index][order].flatten(0, 1) for states in (originals, compacts))
        judge = Judge(expected, mask[order], 56)
        error = judge.error(judge.residual(expected, got))
        assert judge.relative(error) == pytest.approx(layer.after, rel=1e-3)  # two float32 passes and their ties


# Whole models


@pytest.mark.parametrize(
    ("family", "options"), [(name, {}) for name in FAMILIES] + [("qwen3_moe", {"fuse_on_disk": 1})]
)
@pytest.mark.parametrize(("shape", "repair"), [("uniform", "down"), ("ragged", "experts")])
def test_outputs_of_every_family(
    tiny: Tiny, family: str, options: dict[str, object], shape: str, repair: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny(family, **options))
    plan = (uniform_plan if shape == "uniform" else ragged_plan)(checkpoint)
    repairs = repaired(checkpoint, plan, tmp_path / "work", CONFIG.replace(repair=repair))
    assert [layer.layer for layer in repairs.layers] == [moe.name for moe in checkpoint.moe_layers]
    assert repairs.changed and all(layer.after <= layer.before for layer in repairs.layers)
    apply_plan(checkpoint, plan, tmp_path / "out", repairs)
    apply_plan(checkpoint, plan, tmp_path / "plain")
    before, after = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.shape == after[name].shape
        block = next((layer for layer in repairs.changed if name.startswith(f"{layer}.experts")), None)
        may_differ = block is not None and (repair == "experts" or name.endswith(DOWN))
        assert may_differ or torch.equal(tensor, after[name]), name
    assert Repairs.load(tmp_path / "out" / REPAIR_NAME) == replace(repairs, files=())
    records_tell_the_true_error(repairs, checkpoint.folder, tmp_path / "out", MASK)
    changed = repairs.changed
    report = verify(
        checkpoint, open_checkpoint(tmp_path / "out"), plan, verification_tokens(288, None, seed=0), changed
    )
    assert report.repaired == len(changed)


@pytest.mark.parametrize("repair", ["down", "experts"])
def test_tokens_that_do_not_count_go_on_changed(tiny: Tiny, repair: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("qwen3_moe"))
    plan = uniform_plan(checkpoint)
    repairs = repaired(checkpoint, plan, tmp_path / "work", CONFIG.replace(repair=repair, skip_first=True))
    assert len(repairs.changed) > 1
    apply_plan(checkpoint, plan, tmp_path / "out", repairs)
    mask = MASK.clone()
    mask[:, 0] = False
    records_tell_the_true_error(repairs, checkpoint.folder, tmp_path / "out", mask)


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
    killed_after(1, checkpoint, plan, tmp_path / "work")
    stamp = (tmp_path / "work" / "repair-000.safetensors").stat().st_mtime_ns
    again = repaired(checkpoint, plan, tmp_path / "work")
    assert len(again.files) == 3 and again.layers == whole.layers  # digests too: the same bytes
    assert (tmp_path / "work" / "repair-000.safetensors").stat().st_mtime_ns == stamp
    assert [file.read_bytes() for file in again.files] == [file.read_bytes() for file in whole.files]
    assert WorkFolder(tmp_path / "work").repairs("source", lambda passed: pytest.fail("finished")) == again
    assert not list((tmp_path / "work").glob("repair-hidden*"))
    other = WorkFolder(tmp_path / "work").repairs("another", lambda passed: pytest.fail("old") if passed else iter(()))
    assert other.layers == () and not list((tmp_path / "work").glob("*.safetensors"))


@pytest.mark.parametrize("fault", ["gone", "cut short"])
def test_without_its_hidden_states_a_killed_repair_begins_again(tiny: Tiny, fault: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("qwen3_moe"))
    plan = ragged_plan(checkpoint)
    whole = repaired(checkpoint, plan, tmp_path / "whole")
    killed_after(2, checkpoint, plan, tmp_path / "work")
    (kept,) = (tmp_path / "work").glob("repair-hidden*")
    kept.unlink() if fault == "gone" else kept.write_bytes(kept.read_bytes()[:-5])
    assert repaired(checkpoint, plan, tmp_path / "work").layers == whole.layers


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


@pytest.mark.parametrize("repair", ["down", "experts"])
def test_verify_knows_the_repaired_weights_by_their_digest(tiny: Tiny, repair: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("olmoe"))
    plan = uniform_plan(checkpoint)
    repairs = repaired(checkpoint, plan, tmp_path / "work", CONFIG.replace(repair=repair))
    apply_plan(checkpoint, plan, tmp_path / "out", repairs)
    changed = repairs.changed
    ids = verification_tokens(288, None, seed=0)
    with refuses("must keep expert 1 as it is in the original|must keep expert 0"):
        verify(checkpoint, open_checkpoint(tmp_path / "out"), plan, ids)

    def swap(name: str) -> Callable[[dict[str, Tensor]], None]:
        def fault(tensors: dict[str, Tensor]) -> None:
            one, other = (f"model.layers.1.mlp.experts.{expert}.{name}.weight" for expert in (2, 5))
            tensors[one], tensors[other] = tensors[other], tensors[one]

        return fault

    for name, message in (
        ("down_proj", "must hold the tensors that its repair wrote"),
        ("up_proj", "must keep" if repair == "down" else "must hold the tensors that its repair wrote"),
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
        next(repair_experts(checkpoint, uniform_plan(checkpoint), IDS[:1], MASK[:1], CONFIG))


def test_auto_refits_what_the_text_determines(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("olmoe"))
    plan, wide = uniform_plan(checkpoint), checkpoint.tensors[checkpoint.moe_layers[0].expert_tensors()[0]]
    kept, inner = len(plan.layers[0].kept), min(wide.shape)
    for rows in (8, 64):
        config, mask = CONFIG.replace(repair="auto"), MASK[:rows]
        records = [record for record, _, _ in repair_experts(checkpoint, plan, IDS[:rows], mask, config)]
        met = rows * 7 // 8 * 48 * checkpoint.architecture.top_k / kept
        assert {record.whole for record in records if record.digest} <= {met >= 3 * inner}
        assert rows == 8 or all(record.digest for record in records)
    assert met >= 3 * inner > met / 8
