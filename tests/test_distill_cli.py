from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cprune.act.distill_steps import Training
from cprune.config import PruneConfig
from cprune.run import Run, main
from tests.synthetic import damaged, refuses, run_arguments, tensors_of, write_words

Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("text") / "text.jsonl", 60)


def arguments(model: Path, out: Path, text: Path, *options: str) -> list[str]:
    return run_arguments(model, out, text, "--steps", "3", *options, tokens=768)


def test_the_command_distils_verifies_and_says_so(
    tiny: Tiny, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tiny("qwen3_moe"), tmp_path / "out"
    assert main(arguments(source, out, text, "--distill", "experts", "--repair", "down", "--steps", "24"), (Run,)) == 0
    report, shown = json.loads((out / "report.json").read_text()), capsys.readouterr().out
    done = report["distillation"]
    assert (done["trained"], done["steps"], done["whole"]) == ("experts", 24, True) and done["after"] < done["before"]
    assert report["verification"]["distilled"] == 3 and report["repair"] and report["seconds"]["distill"] > 0
    assert f"{done['before']:.4f}" in shown and f"{done['after']:.4f}" in shown and "3 distilled layers" in shown
    assert [file.name for file in (tmp_path / "out.work").iterdir() if "repair" in file.name or file.is_dir()] == []
    assert main(["verify", str(source), str(out)]) == 0
    assert "with 3 distilled layers" in capsys.readouterr().out
    capsys.readouterr()
    applied = tmp_path / "applied"
    assert main(["apply", str(source), str(out / "cprune_plan.json"), str(applied)]) == 0
    assert not (applied / "cprune_repair.json").exists()


def test_a_killed_run_goes_on_with_its_training(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--distill", "router", "--repair", "none", "--no-verify"]
    whole = arguments(tiny("olmoe"), tmp_path / "whole", text, *options)
    killed = arguments(tiny("olmoe"), tmp_path / "killed", text, *options)
    assert main(whole, (Run,)) == 0
    taken: list[int] = []
    step = Training._step

    def kill(self: Training, backward: Callable[[int], None]) -> None:
        taken.append(self.done)
        if len(taken) == 2:
            raise KeyboardInterrupt
        step(self, backward)

    monkeypatch.setattr(Training, "_step", kill)
    assert main(killed, (Run,)) == 130 and not (tmp_path / "killed").exists()
    assert main(killed, (Run,)) == 0
    assert taken == [0, 1, 1, 2]
    one, other = (tensors_of(tmp_path / name) for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "distilled" in capsys.readouterr().out
    report = tmp_path / "killed" / "report.json"
    report.unlink()  # as if it had been killed while it was proved
    assert main(killed, (Run,)) == 0 and report.exists() and taken == [0, 1, 1, 2]
    report.unlink()
    assert main([*killed, "--steps", "4"], (Run,)) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--calibration", "none"], "calibration must name a text for --distill experts, got 'none'"),
        (
            ["--tokens", "32", "--repair", "none"],
            "--distill experts needs two calibration sequences, one to judge by, got 1",
        ),
        (["--steps", "0"], "steps must be at least 1, got 0"),
    ],
)
def test_refusals(
    tiny: Tiny, text: Path, options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(tiny("qwen3_moe"), tmp_path / "out", text, "--distill", "experts", *options)
    assert main([*given, "--work-dir", str(tmp_path / "work")], (Run,)) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not any(tmp_path.iterdir())


def test_quantised_weights_are_refused(
    tiny: Tiny, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def quantise(config: dict[str, object]) -> None:
        config["quantization_config"] = {"quant_method": "mxfp4"}

    source = damaged(tiny("qwen3_moe"), tmp_path / "q", config=quantise)
    assert main(arguments(source, tmp_path / "out", text, "--distill", "experts"), (Run,)) == 2
    assert "needs unquantised weights, got quantization 'mxfp4'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_little_memory(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cprune.act.distill_memory.available", lambda device: 10**4)
    assert main(arguments(tiny("qwen3_moe"), tmp_path / "out", text, "--distill", "experts"), (Run,)) == 2
    assert "of memory even layer by layer, got 0.00 GB" in capsys.readouterr().err.splitlines()[-1]
    assert not any(tmp_path.iterdir())


def test_a_router_that_keeps_its_rows_is_not_trained() -> None:
    with refuses("router must be fold for --distill router, got 'map'"):
        PruneConfig(action="merge", router="map", distill="router")
    assert PruneConfig(action="merge", router="map", distill="experts").steps == PruneConfig.steps
