from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cprune import hf, load
from cprune.act import distill as distilling
from cprune.act.compact import REPAIR_NAME, apply_plan
from cprune.act.distill import check_distill, distill
from cprune.act.distill_memory import layers_bytes, whole_bytes, whole_or_layers
from cprune.act.distill_steps import Text, Training
from cprune.act.least_squares import judges
from cprune.act.merge import merge_experts
from cprune.act.repair import repair_experts
from cprune.checkpoint import Checkpoint, open_checkpoint
from cprune.config import PruneConfig
from cprune.plan import PrunePlan
from cprune.prove.verify import verification_tokens, verify
from cprune.repaired import Passed, Repairs
from cprune.work import WorkFolder
from tests.synthetic import damaged, ragged_plan, refuses, tensors_of, uniform_plan

Tiny = Callable[..., Path]
CONFIG = PruneConfig(dtype="float32", batch_tokens=100, distill="experts", steps=6)
IDS = torch.randint(0, 288, (24, 32), generator=torch.Generator().manual_seed(3))
MASK = torch.ones(IDS.shape, dtype=torch.bool)
HELD = judges(24)
PROBE = verification_tokens(288, None, seed=0)


def careful(which: str, monkeypatch: pytest.MonkeyPatch, rate: float = 2e-3) -> PruneConfig:
    """The routers of random models gain little from few sequences, and not at any rate."""
    if which == "router":
        monkeypatch.setattr("cprune.act.distill_steps.RATE", rate)
    return CONFIG.replace(distill=which, steps=6 if which == "experts" else 24)


def trained(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    folder: Path,
    config: PruneConfig = CONFIG,
    repairs: Repairs | None = None,
    *,
    key: str = "key",
) -> Repairs:
    """The record of a training whose output is written to `folder` / out."""
    found = distill(checkpoint, plan, repairs, IDS, MASK, config, folder / "work", key)
    apply_plan(checkpoint, plan, folder / "out", found)
    return found


@pytest.fixture
def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distilling, "whole_or_layers", lambda *args: False)


@torch.no_grad()
def divergence(original: Path, compact: Path) -> float:
    """KL(original || compact) on the sequences held back, by plain transformers in float64 after the logits."""
    expected, got = (
        load(folder, dtype=torch.float32).eval()(IDS[HELD]).logits.double().log_softmax(-1)
        for folder in (original, compact)
    )
    return float((expected.exp() * (expected - got)).sum(-1).mean())


CASES = [
    ("qwen3_moe", {}, "ragged", "experts", "whole"),
    ("qwen3_moe", {}, "ragged", "experts", "layers"),
    ("qwen3_moe", {"fuse_on_disk": True}, "uniform", "experts", "whole"),
    ("qwen3_moe", {}, "ragged", "router", "whole"),
    ("mixtral", {}, "uniform", "experts", "whole"),
    ("qwen3_moe", {}, "uniform", "router", "layers"),
    ("deepseek_v3", {"mtp": True}, "uniform", "experts", "layers"),
    ("deepseek_v3", {}, "ragged", "router", "whole"),
    ("gpt_oss", {}, "ragged", "experts", "whole"),
    ("gpt_oss", {"dtype": "bfloat16"}, "uniform", "experts", "layers"),
    ("gpt_oss", {}, "uniform", "router", "whole"),
]


@pytest.mark.parametrize(("family", "options", "shape", "which", "way"), CASES)
def test_held_back_text_is_better_and_only_what_was_asked_for_changes(
    tiny: Tiny,
    family: str,
    options: dict[str, object],
    shape: str,
    which: str,
    way: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distilling, "whole_or_layers", lambda *args: way == "whole")
    checkpoint = open_checkpoint(tiny(family, **options))
    plan = (uniform_plan if shape == "uniform" else ragged_plan)(checkpoint)
    rate = 5e-3 if family == "gpt_oss" else 2e-3
    done = trained(checkpoint, plan, tmp_path, careful(which, monkeypatch, rate))
    apply_plan(checkpoint, plan, tmp_path / "plain")
    what = done.distillation
    assert what.whole == (way == "whole") and what.trained == which and what.after < what.before
    kl = [divergence(checkpoint.folder, tmp_path / name) for name in ("plain", "out")]
    # float32 logits of size 10 differ by 2^-24 x 10 x sqrt(48) between two passes, and log-probabilities with them
    assert [what.before, what.after] == pytest.approx(kl, abs=1e-5, rel=1e-3)
    before, after = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all((before[name].dtype, before[name].shape) == (after[name].dtype, after[name].shape) for name in before)
    wanted = ".experts." if which == "experts" else ("gate.weight", "router.weight", "router.bias")
    assert changed and all(wanted in name if which == "experts" else name.endswith(wanted) for name in changed)
    assert {moe.name for moe in checkpoint.moe_layers if any(n.startswith(f"{moe.name}.") for n in changed)} == set(
        what.digests
    )
    assert Repairs.load(tmp_path / "out" / REPAIR_NAME) == replace(done, files=())
    report = verify(checkpoint, open_checkpoint(tmp_path / "out"), plan, PROBE, done.changed)
    assert (report.distilled, report.repaired, report.merged) == (len(what.digests), 0, 0)


@pytest.mark.parametrize(("which", "dtype"), [("experts", "float32"), ("experts", "bfloat16"), ("router", "bfloat16")])
def test_sixteen_bits(tiny: Tiny, which: str, dtype: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("qwen3_moe", dtype=dtype))
    plan = uniform_plan(checkpoint)
    done = trained(checkpoint, plan, tmp_path, CONFIG.replace(distill=which, dtype="bfloat16"))
    assert done.distillation.after <= done.distillation.before
    verify(checkpoint, open_checkpoint(tmp_path / "out"), plan, PROBE, done.changed)
    apply_plan(checkpoint, plan, tmp_path / "plain")
    if which == "experts":
        kl = [divergence(checkpoint.folder, tmp_path / name) for name in ("plain", "out")]
        assert kl[1] < kl[0]


def repaired(checkpoint: Checkpoint, plan: PrunePlan, work: Path, how: str) -> Repairs:
    def make(passed: Passed | None) -> object:
        if how == "repair":
            return repair_experts(checkpoint, plan, IDS, MASK, CONFIG.replace(repair="down"), passed)
        return merge_experts(
            checkpoint, plan, IDS, MASK, CONFIG.replace(action="merge", router=how), passed, refit=True
        )

    return WorkFolder(work).repairs("source", make)


@pytest.mark.parametrize(
    ("how", "which"), [("repair", "experts"), ("repair", "router"), ("fold", "experts"), ("map", "experts")]
)
def test_on_top_of_a_repair_or_a_merge(
    tiny: Tiny, how: str, which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny("qwen3_moe"))
    plan = uniform_plan(checkpoint)
    repairs = repaired(checkpoint, plan, tmp_path / "repair", how)
    apply_plan(checkpoint, plan, tmp_path / "before", repairs)
    done = trained(checkpoint, plan, tmp_path, careful(which, monkeypatch), repairs)
    assert done.layers == repairs.layers and done.distillation.digests
    before, after = tensors_of(tmp_path / "before"), tensors_of(tmp_path / "out")
    wanted = ".experts." if which == "experts" else "gate.weight"
    assert {n for n in before if not torch.equal(before[n], after[n])} <= {n for n in before if wanted in n}
    kl = [divergence(checkpoint.folder, tmp_path / name) for name in ("before", "out")]
    assert [done.distillation.before, done.distillation.after] == pytest.approx(kl, abs=1e-5, rel=1e-3)
    verify(checkpoint, open_checkpoint(tmp_path / "out"), plan, PROBE, done.changed)


def test_padding_teaches_nothing(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("olmoe"))
    plan, mask, ids = uniform_plan(checkpoint), MASK.clone(), IDS.clone()
    mask[:, 20:] = False
    one = distill(checkpoint, plan, None, ids, mask, CONFIG.replace(steps=2), tmp_path / "one", "key")
    ids[:, 20:] = 5
    two = distill(checkpoint, plan, None, ids, mask, CONFIG.replace(steps=2), tmp_path / "two", "key")
    assert one.distillation.after == pytest.approx(two.distillation.after, rel=1e-4)


# Killed and run again


def test_a_killed_training_goes_on_where_it_was(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny("qwen3_moe"))
    plan = uniform_plan(checkpoint)
    whole = trained(checkpoint, plan, tmp_path / "whole")
    taken: list[int] = []
    step = Training._step

    def killed(self: Training, backward: Callable[[int], None]) -> None:
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(self.done)
        step(self, backward)

    monkeypatch.setattr(Training, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(checkpoint, plan, tmp_path / "killed")
    assert (tmp_path / "killed" / "work" / "state.pt").is_file()
    taken.clear()
    monkeypatch.setattr(Training, "_step", lambda self, backward: (taken.append(self.done), step(self, backward)))
    again = trained(checkpoint, plan, tmp_path / "killed")
    assert taken == list(range(3, 6))  # judged, and so kept, after every step
    assert again.distillation == whole.distillation and not (tmp_path / "killed" / "work" / "state.pt").exists()
    one, other = tensors_of(tmp_path / "whole" / "out"), tensors_of(tmp_path / "killed" / "out")
    assert all(torch.equal(one[name], other[name]) for name in one)  # the same sums in the same order
    taken.clear()
    assert distill(checkpoint, plan, None, IDS, MASK, CONFIG, tmp_path / "whole" / "work", "key") == whole
    assert taken == []
    distill(checkpoint, plan, None, IDS, MASK, CONFIG.replace(steps=1), tmp_path / "whole" / "work", "another key")
    assert taken == [0]


def test_a_broken_state_is_not_taken(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("olmoe"))
    plan, config = uniform_plan(checkpoint), CONFIG.replace(steps=2)
    whole = trained(checkpoint, plan, tmp_path / "one", config)
    (tmp_path / "two" / "work").mkdir(parents=True)
    (tmp_path / "two" / "work" / "key.txt").write_text("key")
    (tmp_path / "two" / "work" / "state.pt").write_bytes(b"PK broken")
    assert trained(checkpoint, plan, tmp_path / "two", config).distillation == whole.distillation


def test_killed_layer_by_layer(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer_by_layer: None
) -> None:
    checkpoint = open_checkpoint(tiny("qwen3_moe"))
    plan, config = ragged_plan(checkpoint), CONFIG.replace(steps=3)
    whole = trained(checkpoint, plan, tmp_path / "whole", config)
    taken: list[int] = []
    step = Training._step

    def killed(self: Training, backward: Callable[[int], None]) -> None:
        taken.append(self.done)
        if len(taken) == 5:
            raise KeyboardInterrupt
        step(self, backward)

    monkeypatch.setattr(Training, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(checkpoint, plan, tmp_path / "killed", config)
    again = trained(checkpoint, plan, tmp_path / "killed", config)
    assert taken[5:] == [0, 1, 2] * 2 and again.distillation == whole.distillation
    one, other = tensors_of(tmp_path / "whole" / "out"), tensors_of(tmp_path / "killed" / "out")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("way", ["whole", "layers"])
def test_never_worse(tiny: Tiny, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distilling, "whole_or_layers", lambda *args: way == "whole")
    monkeypatch.setattr("cprune.act.distill_steps.RATE", 1e4)
    checkpoint = open_checkpoint(tiny("qwen3_moe"))
    plan = uniform_plan(checkpoint)
    done = trained(checkpoint, plan, tmp_path, CONFIG.replace(steps=2))
    assert done.distillation.digests == {} and done.distillation.after == done.distillation.before
    apply_plan(checkpoint, plan, tmp_path / "plain")
    before, after = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before) and done.files == ()


# Faults and refusals


def test_verification_finds_faults(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("qwen3_moe"))
    plan = uniform_plan(checkpoint)
    done = trained(checkpoint, plan, tmp_path, CONFIG.replace(steps=2))

    def fault(pattern: str) -> Callable[[dict[str, Tensor]], None]:
        def scale(tensors: dict[str, Tensor]) -> None:
            name = next(name for name in sorted(tensors) if ".1." in name and pattern in name)
            tensors[name] = tensors[name] * 1.01

        return scale

    for pattern, message in (
        ("experts.4.gate_proj", "model.layers.1.mlp must hold the tensors that its training wrote"),
        ("mlp.gate.weight", "after decoder layer 1"),
        ("o_proj", "after decoder layer 1"),
    ):
        broken = damaged(tmp_path / "out", tmp_path / pattern, fault(pattern))
        with refuses(message):
            verify(checkpoint, open_checkpoint(broken), plan, PROBE, done.changed)


def test_what_cannot_be_trained(tiny: Tiny, tmp_path: Path) -> None:
    def quantise(config: dict[str, object]) -> None:
        config["quantization_config"] = {"quant_method": "mxfp4"}

    checkpoint = open_checkpoint(tiny("olmoe"))
    with refuses("--distill needs unquantised weights, got quantization 'mxfp4'"):
        check_distill(open_checkpoint(damaged(checkpoint.folder, tmp_path / "q", config=quantise)), CONFIG)

    def one_in_half(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.1.mlp.experts.3.up_proj.weight"
        tensors[name] = tensors[name].bfloat16()

    mixed = open_checkpoint(damaged(checkpoint.folder, tmp_path / "m", one_in_half))
    with refuses("--distill needs weights of one floating-point type in a layer, got BF16, F32 in model.layers.1.mlp"):
        check_distill(mixed, CONFIG)
    check_distill(mixed, CONFIG.replace(distill="router"))
    check_distill(mixed, CONFIG.replace(distill="none"))
    with refuses("--distill needs two calibration sequences, one to judge by, got 1"):
        distill(checkpoint, uniform_plan(checkpoint), None, IDS[:1], MASK[:1], CONFIG, tmp_path / "w", "key")
    assert not (tmp_path / "w").exists()


def test_memory_decides(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny("qwen3_moe", num_hidden_layers=9))
    plan = uniform_plan(checkpoint)
    apply_plan(checkpoint, plan, tmp_path / "out")
    compact, shape, cpu = open_checkpoint(tmp_path / "out"), tuple(IDS.shape), torch.device("cpu")
    whole, layers = (of(checkpoint, compact, CONFIG, shape) for of in (whole_bytes, layers_bytes))
    of_experts = sum(
        math.prod(compact.tensors[name].shape) for moe in compact.moe_layers for name in moe.expert_tensors()
    )
    assert whole > 4 * sum(math.prod(info.shape) for info in compact.tensors.values()) + 16 * of_experts
    assert layers < whole and layers_bytes(checkpoint, compact, CONFIG, (1000 * shape[0], shape[1])) > layers
    room = {}
    monkeypatch.setattr("cprune.act.distill_memory.available", lambda device: room["bytes"])
    for nbytes, expected in ((1.2 * whole, True), (0.9 * whole, False), (1.2 * layers, False)):
        room["bytes"] = int(nbytes)
        assert whole_or_layers(checkpoint, compact, CONFIG, shape, cpu) is expected
    room["bytes"] = layers
    with refuses("--distill needs about 0.0. GB of memory even layer by layer, got 0.0. GB"):
        whole_or_layers(checkpoint, compact, CONFIG, shape, cpu)


def test_the_teacher_is_the_original(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("deepseek_v3"))
    text = Text.of(IDS, MASK, CONFIG, joined=False)
    hidden = distilling.last_hidden_states(checkpoint, text, CONFIG, torch.float32, torch.device("cpu"))
    model = load(checkpoint.folder, dtype=torch.float32).eval()
    with torch.no_grad(), distilling._only_the_head(model, hidden[3:5]):
        got = model(IDS[3:5], use_cache=False).logits
    with torch.no_grad():
        torch.testing.assert_close(got, model(IDS[3:5], use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_divergence(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny("qwen3_moe"))
    plan = uniform_plan(checkpoint)
    seen: dict[str, Tensor] = {}

    def note(self: Training, backward: Callable[[int], None]) -> None:
        backward(self.done)
        seen.update({name: p.grad.clone() for name, p in self.parameters.items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(Training, "_step", note)
    with pytest.raises(KeyboardInterrupt):
        distill(checkpoint, plan, None, IDS, MASK, CONFIG, tmp_path / "work", "key")
    student = load(tmp_path / "work" / "student", dtype=torch.float64, experts_implementation="eager").eval()
    teacher = load(checkpoint.folder, dtype=torch.float64, experts_implementation="eager").eval()
    rows = IDS[Text.of(IDS, MASK, CONFIG, joined=False).rows_of_step(0)]
    expected = teacher(rows).logits.detach().log_softmax(-1)
    got = student(rows).logits.log_softmax(-1)
    ((expected.exp() * (expected - got)).sum() / rows.numel()).backward()
    for moe in open_checkpoint(tmp_path / "work" / "student").moe_layers:
        experts = hf.find_experts(hf.decoder_layers(student)[moe.index])
        for name, parameter in experts.named_parameters():
            scale = float(parameter.grad.abs().max())
            error = (seen[f"{moe.name}.{name}"].double() - parameter.grad).abs().max()
            assert error < scale * 2.0**-24 * 2**9  # sums over 256 tokens in float32, after as many layers


def test_the_record_is_plain(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("olmoe"))
    trained(checkpoint, uniform_plan(checkpoint), tmp_path, CONFIG.replace(steps=1))
    record = json.loads((tmp_path / "out" / REPAIR_NAME).read_text())
    assert record["layers"] == [] and record["distillation"]["trained"] == "experts"
    files = sorted((tmp_path / "work").glob("*.safetensors"))
    assert len(files) == 3 and all(".experts." in name for file in files for name in load_file(file))
