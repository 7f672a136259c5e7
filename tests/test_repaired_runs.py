"""Repair through the command line: the output is the masked original with other experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cprune import load
from cprune.run import main
from tests.pruned import BUDGETS, assert_close, logits, masked_reference, plain, plan_of, weights


@pytest.fixture(scope="module")
def repaired(
    originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, run: Callable[..., Path]
) -> dict[str, Path]:
    """Qwen3-MoE with a third removed and the rest repaired, by both budgets."""
    folder = tmp_path_factory.mktemp("repaired")
    options = ("--repair", "auto", "--tokens", "2048", "--ratio", "0.34", "--budget")
    return {budget: run(originals["qwen3_moe"], folder / budget, *options, budget) for budget in BUDGETS}


@pytest.mark.parametrize("budget", BUDGETS)
def test_repaired_output_is_the_masked_original_with_other_experts(
    budget: str,
    originals: dict[str, Path],
    repaired: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, model = repaired[budget], originals["qwen3_moe"]
    plan, report = plan_of(out), json.loads((out / "report.json").read_text())
    changed = [layer["layer"] for layer in report["repair"] if layer["ridge"] is not None]
    assert len(report["repair"]) == 3 and changed and report["verification"]["repaired"] == len(changed)
    assert set(report["seconds"]) == {"open", "measure", "decide", "repair", "act", "verify", "evaluate"}
    assert {path.name for path in out.with_name(f"{budget}.work").iterdir()} == {
        *("plan.json", "stats.json"),
        *(f"stats-{number:03d}.safetensors" for number in range(3)),
    }
    with_new_experts = shutil.copytree(model, tmp_path / "model")
    tensors, written = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    for layer in plan.layers:
        for new, old in enumerate(layer.kept):
            for name in ("gate_proj", "up_proj", "down_proj"):
                one, other = f"{layer.layer}.experts.{new}.{name}.weight", f"{layer.layer}.experts.{old}.{name}.weight"
                differs = not torch.equal(written[one], tensors[other])
                assert not differs or layer.layer in changed
                tensors[other] = written[one]
    save_file(tensors, with_new_experts / "model.safetensors", {"format": "pt"})
    assert_close(logits(load(out, dtype=torch.float32)), masked_reference(with_new_experts, plan))
    if budget == "uniform":
        assert_close(logits(plain(out)), masked_reference(with_new_experts, plan))
    capsys.readouterr()
    assert main(["verify", str(model), str(out)]) == 0
    assert f"equals the masked original, with {len(changed)} repaired layers: 3 layers" in capsys.readouterr().out


def test_repair_is_that_of_the_plan_and_the_text(
    originals: dict[str, Path],
    repaired: dict[str, Path],
    tmp_path: Path,
    run: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, plan = originals["qwen3_moe"], str(repaired["global"] / "cprune_plan.json")
    again = run(model, tmp_path / "again", "--plan", plan, "--repair", "experts", "--tokens", "2048")
    assert weights(again) == weights(repaired["global"])
    assert list((tmp_path / "again.work").iterdir()) == []
    caplog.set_level("INFO")
    assert main(["apply", str(model), plan, str(tmp_path / "applied")]) == 0
    assert "applying without repair, which needs text" in caplog.text
    without = run(model, tmp_path / "without", "--plan", plan, "--repair", "none")
    assert weights(tmp_path / "applied") == weights(without) != weights(again)
    caplog.clear()
    options = ("--plan", plan, "--repair", "auto", "--calibration", "none")
    assert weights(run(model, tmp_path / "no-text", *options)) == weights(without)
    assert "applying without repair" in caplog.text and "got --calibration none" in caplog.text


def test_a_repaired_output_that_was_not_proved_is_proved(
    originals: dict[str, Path], repaired: dict[str, Path], tmp_path: Path, run: Callable[..., Path]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(repaired["uniform"], out)
    report = json.loads((out / "report.json").read_text())
    (out / "report.json").unlink()
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    options = ("--repair", "auto", "--tokens", "2048", "--ratio", "0.34", "--budget", "uniform")
    run(originals["qwen3_moe"], out, *options)
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    assert json.loads((out / "report.json").read_text())["repair"] == report["repair"]
