from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cprune.checkpoint import open_checkpoint
from cprune.config import PruneConfig
from cprune.measure.calibrate import calibrate
from cprune.measure.gradients import add_mask_gradients, mask_gradients
from cprune.measure.packing import Sequences
from cprune.run import Compare, Run, main
from tests.synthetic import damaged, refuses
from tests.tiny import FAMILIES

Tiny = Callable[..., Path]
CONFIG = PruneConfig(dtype="float32", batch_tokens=80)


def sequences() -> Sequences:
    """7 x 33 tokens; the third row ends after 10, the fifth after one, the last is padding alone."""
    ids = torch.randint(0, 288, (7, 33), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(7, 33, dtype=torch.bool)
    mask[2, 10:] = mask[4, 1:] = mask[6] = False
    return Sequences(torch.where(mask, ids, 3), mask, ("b", "a", "c", "a", "b", "c", "c"))


def by_autograd(folder: Path, texts: Sequences, *, skip_first: bool = False) -> dict[str, Tensor]:
    """A [N, E]: every sequence alone, without its padding, through plain transformers in float64, a mask an expert."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    masks: dict[str, Tensor] = {}

    def masked(name: str) -> Callable[..., tuple[Tensor, ...]]:
        def hook(_module: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, index, gates = args
            own = masks[name][index]
            if skip_first:
                own = torch.cat([torch.ones_like(own[:1]), own[1:]])
            return hidden, index, gates * own

        return hook

    layers = open_checkpoint(folder).moe_layers
    for moe in layers:
        named = model.model.layers[moe.index].named_modules()
        experts = next(module for name, module in named if name.endswith("experts") and hasattr(module, "down_proj"))
        experts.register_forward_pre_hook(masked(moe.name))
    found = {moe.name: torch.zeros(len(texts.mask), moe.num_experts, dtype=torch.float64) for moe in layers}
    for row, (ids, mask) in enumerate(zip(texts.input_ids, texts.mask, strict=True)):
        if int(mask.sum()) > 1:
            for moe in layers:
                masks[moe.name] = torch.ones(moe.num_experts, dtype=torch.float64, requires_grad=True)
            ids = ids[mask]
            logits = model(ids.unsqueeze(0), use_cache=False).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").backward()
            for name, own in masks.items():
                found[name][row] = own.grad
    return found


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        # float32 against float64, through three layers and back: some hundred roundings of 6e-8 of the largest
        torch.testing.assert_close(got[name], values, rtol=0, atol=1e-5 * float(values.abs().max()), msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_autograd_over_the_whole_model(tiny: Tiny, family: str, tmp_path: Path) -> None:
    texts, folder = sequences(), tmp_path / "gradients"
    got = dict(mask_gradients(open_checkpoint(tiny(family)), texts, CONFIG, folder))
    assert_same(got, by_autograd(tiny(family), texts))
    assert not folder.exists()
    for values in got.values():
        assert values[[0, 1, 2, 3, 5]].any(1).all() and not values[[4, 6]].any()


def test_first_positions_may_be_left_out(tiny: Tiny, tmp_path: Path) -> None:
    texts, config = sequences(), CONFIG.replace(skip_first=True)
    got = dict(mask_gradients(open_checkpoint(tiny("qwen3_moe")), texts, config, tmp_path / "g"))
    assert_same(got, by_autograd(tiny("qwen3_moe"), texts, skip_first=True))


def test_statistics_are_completed(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint, texts = open_checkpoint(tiny("deepseek_v2")), sequences()
    stats = {layer.layer: layer for layer in calibrate(checkpoint, texts, CONFIG)}
    completed = add_mask_gradients(checkpoint, texts, CONFIG, stats, tmp_path / "g")
    assert list(completed) == list(stats)
    for name, values in by_autograd(tiny("deepseek_v2"), texts).items():
        layer = completed[name]
        torch.testing.assert_close(layer.mask_gradient_sq, values.square().sum(0), rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(layer.mask_gradient_abs, values.abs().sum(0), rtol=1e-3, atol=1e-6)
        assert torch.equal(layer.gated_norm_sum, stats[name].gated_norm_sum)


def test_a_gradient_that_is_not_finite_is_refused_and_nothing_is_left(tiny: Tiny, tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"].mul_(1e38)

    checkpoint = open_checkpoint(damaged(tiny("olmoe"), tmp_path / "m", enlarge))
    with refuses("gradients must be finite, got NaN or infinity in"):
        add_mask_gradients(checkpoint, sequences(), CONFIG, {}, tmp_path / "g")
    assert not (tmp_path / "g").exists()


def test_a_folder_that_cannot_be_written_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refuses("the work folder must be writable, got"):
        next(mask_gradients(open_checkpoint(tiny("olmoe")), sequences(), CONFIG, tmp_path / "file" / "g"))


def test_runs_by_gradients_measure_once(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the router sends the token to the experts and the experts return the rest " * 60)
    model, work = str(tiny("qwen3_moe")), ["--work-dir", str(tmp_path / "work")]
    common = [*work, "--calibration", str(text), "--tokens", "512", "--seq-len", "64", "--dtype", "float32"]
    job = [*common, "--evaluate", "none", "--repair", "none"]
    assert main([model, str(tmp_path / "plain"), *job], (Run,)) == 0
    assert main([model, str(tmp_path / "fisher"), "--method", "fisher", *job], (Run,)) == 0
    assert sorted(path.name for path in (tmp_path / "work").iterdir() if path.is_dir()) == []
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("stats-*")}
    monkeypatch.setattr("cprune.pipeline.calibrate", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr("cprune.pipeline.add_mask_gradients", lambda *_: pytest.fail("measured again"))
    assert main([model, str(tmp_path / "taylor"), "--method", "taylor", *job], (Run,)) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("stats-*")} == stamps
    job = [model, "-o", str(tmp_path / "c"), *common, "--evaluate", str(text), "--evaluate-tokens", "256"]
    assert main([*job, "--methods", "cprune,fisher,taylor", "--ratios", "0.3"], (Compare,)) == 0
    shown = capsys.readouterr().out
    assert "fisher" in shown and "taylor" in shown and "refused" not in shown
