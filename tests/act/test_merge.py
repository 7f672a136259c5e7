from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from cprune import hf, load
from cprune.act.compact import REPAIR_NAME, apply_plan
from cprune.act.merge import check_merge, merge_experts
from cprune.checkpoint import Checkpoint, open_checkpoint
from cprune.config import PruneConfig
from cprune.merged import changed_names
from cprune.pipeline import check_request
from cprune.plan import PrunePlan
from cprune.prove.verify import VerifyReport, verification_tokens, verify
from cprune.repaired import Repairs
from cprune.run import Run, main
from cprune.work import WorkFolder
from tests.synthetic import (
    damaged,
    plan_for,
    ragged_plan,
    refuses,
    run_arguments,
    tensors_of,
    uniform_plan,
    write_words,
)
from tests.tiny import FAMILIES

Tiny = Callable[..., Path]
CONFIG = PruneConfig(action="merge", dtype="float32", batch_tokens=500)
ROUTERS = ("fold", "map")
IDS = torch.randint(0, 288, (40, 48), generator=torch.Generator().manual_seed(3))
MASK = torch.ones(IDS.shape, dtype=torch.bool)
PROBE = verification_tokens(288, None, seed=0)
# Sums of some thousand float32 products in another order, through the layers; logits are near 1.
ROUNDING = 1e-4


def shared_out(checkpoint: Checkpoint, plan: PrunePlan) -> PrunePlan:
    """The plan with the dropped experts shared out among the kept ones of their own router group."""
    groups = checkpoint.architecture.n_group
    layers = []
    for layer in plan.layers:
        per = layer.num_experts // groups
        own = {group: [e for e in layer.kept if e // per == group] for group in range(groups)}
        stand_in = tuple(
            e if e in layer.kept else own[e // per][e % len(own[e // per])] for e in range(layer.num_experts)
        )
        layers.append(replace(layer, stand_in=stand_in))
    return replace(plan, layers=tuple(layers))


def merge(
    checkpoint: Checkpoint, plan: PrunePlan, out: Path, router: str, *, refit: bool = False, mask: Tensor = MASK
) -> Repairs:
    config = CONFIG.replace(router=router)
    work = WorkFolder(out.with_name(out.name + ".work"))
    repairs = work.repairs(
        "source", lambda passed: merge_experts(checkpoint, plan, IDS, mask, config, passed, refit=refit)
    )
    apply_plan(checkpoint, plan, out, repairs)
    return repairs


def check(source: Path, out: Path) -> VerifyReport:
    records, plan = Repairs.load(out / REPAIR_NAME), PrunePlan.load(out / "cprune_plan.json")
    return verify(open_checkpoint(source), open_checkpoint(out), plan, PROBE, records.changed)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(PROBE).logits


def by_hand(source: Path, plan: PrunePlan, out: Path, repairs: Repairs) -> Tensor:
    """Logits of the original model whose experts are computed pair by pair with those of `out`: `map`, spelt out."""
    records = {record.layer: record for record in repairs.layers}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    merged, stack = load(out, dtype=torch.float32), ExitStack()
    for layer, other in zip(hf.decoder_layers(model), hf.decoder_layers(merged), strict=True):
        experts, small = hf.find_experts(layer), hf.find_experts(other)
        if experts is None:
            continue
        index = list(hf.decoder_layers(model)).index(layer)
        own = next(x for x in plan.layers if f".layers.{index}." in x.layer)

        def forward(hidden, chosen, gates, own=own, small=small):
            result = torch.zeros_like(hidden)
            for row in range(len(hidden)):
                for slot in range(chosen.shape[1]):
                    expert = own.kept.index(own.stand_in[int(chosen[row, slot])])
                    result[row] += gates[row, slot] * hf.expert_output(small, expert, hidden[row : row + 1])[0]
            return result

        experts.forward = forward
        gone = [expert for expert in own.dropped if expert not in records[own.layer].mapped]
        stack.enter_context(hf.masked_router(layer, torch.tensor(gone, dtype=torch.int64)))
    with stack:
        return logits(model)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "deepseek_v3"])
def test_merged_models_of_every_family_are_verified_and_smaller(
    tiny: Tiny, family: str, router: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny(family))
    plan = shared_out(checkpoint, (uniform_plan if router == "fold" else ragged_plan)(checkpoint))
    repairs = merge(checkpoint, plan, tmp_path / "out", router)
    report = check(checkpoint.folder, tmp_path / "out")
    assert report.merged == len(repairs.changed) and report.ties == 0
    assert any(layer.merged for layer in repairs.layers) or (router, family) == ("fold", "deepseek_v2")
    assert all(layer.after <= layer.before for layer in repairs.layers if router == "fold")
    out = open_checkpoint(tmp_path / "out")
    assert [moe.num_experts for moe in out.moe_layers] == [len(layer.kept) for layer in plan.layers]
    saved = sum(tensor.nbytes for name, tensor in tensors_of(checkpoint.folder).items() if ".experts" in name)
    left = sum(tensor.nbytes for name, tensor in tensors_of(out.folder).items() if ".experts" in name)
    kept = sum(len(layer.kept) for layer in plan.layers) / sum(layer.num_experts for layer in plan.layers)
    assert left == pytest.approx(saved * kept)
    if router == "fold":
        stock = AutoModelForCausalLM.from_pretrained(out.folder, dtype=torch.float32)
        assert torch.equal(logits(stock), logits(load(out.folder, dtype=torch.float32)))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_map_is_the_original_routing_to_fewer_experts(tiny: Tiny, family: str, tmp_path: Path) -> None:
    checkpoint, out = open_checkpoint(tiny(family)), tmp_path / "out"
    plan = shared_out(checkpoint, ragged_plan(checkpoint))
    repairs = merge(checkpoint, plan, out, "map")
    assert any(record.mapped for record in repairs.layers)
    want = by_hand(checkpoint.folder, plan, out, repairs)
    for implementation in ("eager", "grouped_mm", "cprune"):
        if family == "gpt_oss" and implementation == "grouped_mm":
            continue  # needs strides of 16 bytes, which its tiny checkpoint lacks
        got = logits(load(out, dtype=torch.float32, experts_implementation=implementation))
        torch.testing.assert_close(got, want, rtol=0, atol=ROUNDING)
    config = json.loads((out / "config.json").read_text())
    for moe, record, layer in zip(checkpoint.moe_layers, repairs.layers, plan.layers, strict=True):
        rows = config["cprune"]["expert_map"].get(str(moe.index), layer.kept)
        assert len(rows) == len(layer.kept) + len(record.mapped)
        router = tensors_of(out)[next(iter(moe.router.values()))[0]]
        assert len(router) == len(rows)
    plain = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    torch.testing.assert_close(logits(plain), want, rtol=0, atol=ROUNDING)
    with refuses("router row for each expert"):
        check_request(open_checkpoint(out), PruneConfig())


def copies(tiny: Tiny, folder: Path) -> Path:
    """Experts 2 i + 1 are experts 2 i with their hidden units in another order; routers tell them apart."""

    def pair_up(tensors: dict[str, Tensor]) -> None:
        order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
        for name in [name for name in tensors if ".experts." in name]:
            block, rest = name.split(".experts.")
            number, suffix = rest.split(".", 1)
            if int(number) % 2:
                first = tensors[f"{block}.experts.{int(number) - 1}.{suffix}"]
                tensors[name] = first[:, order] if "down" in name else first[order]

    return damaged(tiny("qwen3_moe"), folder, tensors=pair_up)


def test_a_map_of_shuffled_copies_loses_nothing(tiny: Tiny, tmp_path: Path) -> None:
    source = copies(tiny, tmp_path / "source")
    checkpoint = open_checkpoint(source)
    plan = plan_for(checkpoint, {moe.name: [0, 2, 4, 6, 8, 10, 12] for moe in checkpoint.moe_layers})
    stand_in = tuple(expert - expert % 2 for expert in range(13))
    plan = replace(plan, layers=tuple(replace(layer, stand_in=stand_in) for layer in plan.layers))
    repairs = merge(checkpoint, plan, tmp_path / "out", "map")
    want = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    torch.testing.assert_close(logits(load(tmp_path / "out", dtype=torch.float32)), want, rtol=0, atol=ROUNDING)
    assert all(layer.after < 1e-5 < layer.before for layer in repairs.layers)


@pytest.mark.parametrize("router", ROUTERS)
def test_repair_comes_closer_still_and_is_verified(tiny: Tiny, router: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("qwen3_moe"))
    plan = shared_out(checkpoint, ragged_plan(checkpoint))
    plain = merge(checkpoint, plan, tmp_path / "plain", router)
    refitted = merge(checkpoint, plan, tmp_path / "refitted", router, refit=True)
    assert refitted.layers[0].after < plain.layers[0].after
    assert any(layer.ridge is not None for layer in refitted.layers)
    assert check(checkpoint.folder, tmp_path / "refitted").merged == len(refitted.changed) > 0


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"fuse_on_disk": True}])
def test_other_types_and_layouts(tiny: Tiny, options: dict[str, object], router: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("qwen3_moe", **options))
    plan = shared_out(checkpoint, uniform_plan(checkpoint))
    repairs = merge(checkpoint, plan, tmp_path / "out", router, refit=True)
    assert check(checkpoint.folder, tmp_path / "out").merged == len(repairs.changed) > 0
    before, after = tensors_of(checkpoint.folder), tensors_of(tmp_path / "out")
    assert all(tensor.dtype == before[name].dtype for name, tensor in after.items())


@pytest.mark.parametrize("router", ROUTERS)
def test_a_prediction_head_is_pruned_beside_a_merged_trunk(tiny: Tiny, router: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("glm4_moe", mtp=True))
    plan = shared_out(checkpoint, uniform_plan(checkpoint))
    repairs = merge(checkpoint, plan, tmp_path / "out", router)
    assert check(checkpoint.folder, tmp_path / "out").merged == len(repairs.changed) > 0
    head, own = open_checkpoint(tmp_path / "out").moe_layers[-1], plan.layers[-1]
    assert not head.trunk and head.num_experts == len(own.kept)
    got, want = tensors_of(tmp_path / "out"), tensors_of(checkpoint.folder)
    assert torch.equal(got[f"{head.name}.gate.weight"], want[f"{head.name}.gate.weight"][list(own.kept)])


def test_fused_and_single_experts_merge_alike(tiny: Tiny, tmp_path: Path) -> None:
    results = []
    for fused in (False, True):
        checkpoint = open_checkpoint(tiny("qwen3_moe", fuse_on_disk=fused))
        plan = shared_out(checkpoint, uniform_plan(checkpoint))
        merge(checkpoint, plan, tmp_path / str(fused), "fold", refit=True)
        results.append(logits(load(tmp_path / str(fused), dtype=torch.float32)))
    assert torch.equal(*results)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_killed_merge_goes_on_where_it_was(tiny: Tiny, router: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("olmoe"))
    plan, config = shared_out(checkpoint, uniform_plan(checkpoint)), CONFIG.replace(router=router)
    whole = merge(checkpoint, plan, tmp_path / "whole", router, refit=True)
    work = WorkFolder(tmp_path / "work")

    def killed(passed):
        yield from islice(merge_experts(checkpoint, plan, IDS, MASK, config, passed, refit=True), 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work.repairs("source", killed)
    seen = []

    def rest(passed):
        for merged in merge_experts(checkpoint, plan, IDS, MASK, config, passed, refit=True):
            seen.append(merged[0].layer)
            yield merged

    assert work.repairs("source", rest).layers == whole.layers
    assert seen == [plan.layers[2].layer]


def test_padding_decides_nothing(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, mask = open_checkpoint(tiny("qwen3_moe")), MASK.clone()
    mask[::3, 30:] = False
    plan = shared_out(checkpoint, uniform_plan(checkpoint))
    first = merge(checkpoint, plan, tmp_path / "one", "fold", mask=mask)
    monkeypatch.setattr(f"{__name__}.IDS", torch.where(mask, IDS, 7))
    second = merge(checkpoint, plan, tmp_path / "two", "fold", mask=mask)
    assert [layer.merged for layer in first.layers] == [layer.merged for layer in second.layers]
    for one, two in zip(first.layers, second.layers, strict=True):  # rows are summed in other numbers of padded ones
        assert two.after == pytest.approx(one.after, rel=1e-4) and two.router == one.router


def test_only_what_changed_is_written(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("qwen3_moe"))
    plan = uniform_plan(checkpoint)  # all that is dropped goes to the first kept expert
    work = WorkFolder(tmp_path / "work")
    config = CONFIG.replace(router="map")
    repairs = work.repairs("source", lambda passed: merge_experts(checkpoint, plan, IDS, MASK, config, passed))
    for record, moe, layer in zip(repairs.layers, checkpoint.moe_layers, plan.layers, strict=True):
        assert record.merged in ((), (layer.kept[0],))
        names = [f"{moe.name}.experts.0.{p}_proj.weight" for p in ("down", "gate", "up")] if record.merged else []
        assert changed_names(moe, layer, record) == names
    stored = [name for file in repairs.files for name in load_file(file)]
    assert len(stored) == 3 * sum(bool(record.merged) for record in repairs.layers) > 0


# Faults


def shift_map(config: dict) -> None:
    rows = config["cprune"]["expert_map"]["1"]
    config["cprune"]["expert_map"]["1"] = rows[1:] + rows[:1]


def scale_expert(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        if ".1.mlp.experts." in name and "gate_proj" in name:
            tensors[name] = tensors[name] * 1.01


@pytest.mark.parametrize(("router", "change"), [("map", "config"), ("map", "tensors"), ("fold", "tensors")])
def test_verification_finds_faults(tiny: Tiny, router: str, change: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("qwen3_moe"))
    plan = shared_out(checkpoint, uniform_plan(checkpoint))
    merge(checkpoint, plan, tmp_path / "out", router)
    check(checkpoint.folder, tmp_path / "out")
    edits = {"config": {"config": shift_map}, "tensors": {"tensors": scale_expert}}[change]
    broken = damaged(tmp_path / "out", tmp_path / "broken", **edits)
    with refuses("must equal" if change == "config" else "wrote"):
        check(checkpoint.folder, broken)


# Refusals


def test_what_cannot_be_merged(tiny: Tiny, tmp_path: Path) -> None:
    with refuses("router fold must not mix router groups, got n_group 4"):
        check_merge(open_checkpoint(tiny("deepseek_v3")), CONFIG)
    check_merge(open_checkpoint(tiny("deepseek_v3")), CONFIG.replace(router="map"))

    def one_in_half(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.1.mlp.experts.3.up_proj.weight"
        tensors[name] = tensors[name].bfloat16()

    mixed = open_checkpoint(damaged(tiny("qwen3_moe"), tmp_path / "mixed", tensors=one_in_half))
    with refuses("experts of one floating-point type in a layer, got BF16 in .*experts.3.up_proj"):
        check_merge(mixed, CONFIG)
    quantized = open_checkpoint(
        damaged(
            tiny("qwen3_moe"), tmp_path / "q", config=lambda c: c.update(quantization_config={"quant_method": "fp8"})
        )
    )
    with refuses("floating-point weights, got quantization 'fp8'"):
        check_merge(quantized, CONFIG)
    checkpoint = open_checkpoint(tiny("qwen3_moe"))
    with refuses("two calibration sequences, one to judge by, got 1"):
        next(merge_experts(checkpoint, uniform_plan(checkpoint), IDS[:1], MASK[:1], CONFIG))


# Through the command line


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("text") / "text.jsonl", 60)


def arguments(model: Path, out: Path, text: Path, *options: str) -> list[str]:
    return run_arguments(model, out, text, "--action", "merge", *options, tokens=1024)


@pytest.mark.parametrize("repair", ["none", "auto"])
@pytest.mark.parametrize("router", ROUTERS)
def test_the_command_merges_verifies_and_says_so(
    tiny: Tiny, text: Path, router: str, repair: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = copies(tiny, tmp_path / "source"), tmp_path / "out"
    options = ["--router", router, "--repair", repair, "--budget", "uniform"]
    assert main(arguments(source, out, text, *options), (Run,)) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["verification"]["merged"] >= 1 and "merged" in capsys.readouterr().out
    stock = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=router == "map", dtype=torch.float32)
    assert torch.isfinite(logits(stock)).all()
    assert hf.find_experts(hf.decoder_layers(stock)[0]).num_experts == 8
    assert not (tmp_path / "out.work" / "repair.json").exists()
    assert main(["verify", str(source), str(out)]) == 0
    assert "merged layers" in capsys.readouterr().out


def test_a_plan_can_be_merged_later(tiny: Tiny, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, plan = copies(tiny, tmp_path / "source"), tmp_path / "plan.json"
    few = arguments(source, tmp_path / "one", text, "--router", "map")
    assert main(few, (Run,)) == 0
    plan.write_text((tmp_path / "one" / "cprune_plan.json").read_text())
    assert main([*arguments(source, tmp_path / "two", text, "--router", "map"), "--plan", str(plan)], (Run,)) == 0
    one, two = (tensors_of(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    capsys.readouterr()
    assert main(["apply", str(source), str(plan), str(tmp_path / "three")]) == 2
    assert "needs a plan of --action prune" in capsys.readouterr().err
    assert main([str(source), str(tmp_path / "four"), "--plan", str(plan)], (Run,)) == 2
    assert "--action must be merge for a plan that was made to merge, got prune" in capsys.readouterr().err
    assert not (tmp_path / "four").exists() and not (tmp_path / "four.work").exists()


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("qwen3_moe", ["--calibration", "none"], "calibration must name a text for --action merge"),
        ("deepseek_v3", ["--ratio", "0.34"], "must not mix router groups, got n_group 4"),
        ("qwen3_moe", ["--tokens", "32"], "two calibration sequences"),
    ],
)
def test_the_command_refuses_before_any_work(
    tiny: Tiny,
    text: Path,
    family: str,
    options: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [*arguments(tiny(family), tmp_path / "out", text, *options), "--work-dir", str(tmp_path / "work")]
    assert main(given, (Run,)) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not any(tmp_path.iterdir())
