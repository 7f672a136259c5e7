"""`--router map` without a merge, through the command line: the router keeps its rows, and novices answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cprune.act import repair
from cprune.run import Run, main
from tests.pruned import weights
from tests.synthetic import run_arguments, tensors_of, write_words

Tiny = Callable[..., Path]
NOVICES = "experts.novices"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("text") / "text.jsonl", 90)


ALONE = ("--repair", "none")


def arguments(model: Path, out: Path, text: Path, *options: str) -> list[str]:
    return run_arguments(model, out, text, "--router", "map", *options, tokens=2048)


def test_the_command_writes_novices_verifies_and_says_so(
    tiny: Tiny, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tiny("qwen3_moe"), tmp_path / "out"
    assert main(arguments(source, out, text, *ALONE, "--budget", "uniform"), (Run,)) == 0
    report, shown = json.loads((out / "report.json").read_text()), capsys.readouterr().out
    novel = [layer for layer in report["repair"] if layer["router"] == "novices"]
    assert novel and f"{len(novel)} of 3 layers ({len(novel)} with novices)" in " ".join(shown.split())
    assert report["verification"]["repaired"] == len(novel)
    assert main(["verify", str(source), str(out)]) == 0
    assert main(["evaluate", str(out), "--text", str(text)]) == 0
    stock, info = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()) and sum(NOVICES in name for name, _ in stock.named_parameters()) == len(novel)
    experts, original = (
        {name: tensor for name, tensor in tensors_of(folder).items() if ".experts." in name and NOVICES not in name}
        for folder in (out, source)
    )
    known = {bytes(tensor.view(torch.uint8).flatten().tolist()) for tensor in original.values()}
    assert all(bytes(tensor.view(torch.uint8).flatten().tolist()) in known for tensor in experts.values())
    capsys.readouterr()
    applied = tmp_path / "applied"
    assert main(["apply", str(source), str(out / "cprune_plan.json"), str(applied)]) == 0
    assert not any(NOVICES in name for name in tensors_of(applied))
    again = [*arguments(source, tmp_path / "again", text, *ALONE), "--plan", str(out / "cprune_plan.json")]
    assert main(again, (Run,)) == 0
    assert weights(tmp_path / "again") == weights(out)


def test_each_routing_is_repaired_before_one_is_chosen(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    reports = {}
    for router in ("fold", "map"):
        given = arguments(tiny("qwen3_moe"), tmp_path / router, text, "--repair", "down", "--router", router)
        assert main(given, (Run,)) == 0
        reports[router] = json.loads((tmp_path / router / "report.json").read_text())["repair"]
    fold, mapped = (reports[router][0] for router in ("fold", "map"))  # the first layer is given the same by both
    assert mapped["before"] == fold["before"] and mapped["after"] <= fold["after"]


def test_a_killed_run_goes_on(tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, killed = (
        arguments(tiny("olmoe"), tmp_path / name, text, *ALONE, "--no-verify") for name in ("whole", "killed")
    )
    assert main(whole, (Run,)) == 0
    fit, calls = repair.fit_novices, []

    def once(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(*args)

    monkeypatch.setattr(repair, "fit_novices", once)
    assert main(killed, (Run,)) == 130 and not (tmp_path / "killed").exists()
    assert main(killed, (Run,)) == 0
    assert len(calls) < 2 * 3 + 1 and weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_experts_are_trained_beside_them(
    tiny: Tiny, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tiny("qwen3_moe"), tmp_path / "out"
    plain = arguments(source, tmp_path / "plain", text, *ALONE)
    assert main(plain, (Run,)) == 0
    given = arguments(source, out, text, *ALONE, "--distill", "experts", "--steps", "16")
    assert main(given, (Run,)) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["distillation"]["after"] < report["distillation"]["before"]
    assert report["verification"]["distilled"] == 3
    one, other = tensors_of(tmp_path / "plain"), tensors_of(out)
    novel = [name for name in one if NOVICES in name]
    assert novel and all(torch.equal(one[name], other[name]) for name in novel)
    assert main(["verify", str(source), str(out)]) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--calibration", "none"], "calibration must name a text for --router map, got 'none'"),
        (["--tokens", "32"], "--router map needs two calibration sequences, one to judge by, got 1"),
        (["--distill", "router"], "router must be fold for --distill router, got 'map'"),
    ],
)
def test_the_command_refuses_before_any_work(
    tiny: Tiny, text: Path, options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*arguments(tiny("qwen3_moe"), tmp_path / "out", text, *options), "--work-dir", str(tmp_path / "work")]
    assert main(given, (Run,)) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not any(tmp_path.iterdir())
