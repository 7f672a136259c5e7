"""Other ways in: single stages, a configuration file, the working folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cprune import PrunePlan, load
from cprune.run import main
from tests.pruned import SHORT, assert_close, logits, masked_reference, plan_of


def test_configuration_from_yaml_and_the_command_line_over_it(
    originals: dict[str, Path], tmp_path: Path, run: Callable[..., Path]
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("ratio: 0.5\nbudget: uniform\nmethod: reap\nevaluate: none\n")
    config = plan_of(run(originals["olmoe"], tmp_path / "out", "--config", str(file), "--method", "ean")).config
    assert (config["ratio"], config["budget"], config["method"]) == (0.5, "uniform", "ean")


def test_out_may_be_an_empty_working_folder(
    originals: dict[str, Path], tmp_path: Path, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run(originals["mixtral"], Path("."))
    assert {path.name for path in tmp_path.iterdir()} == {"here", "here.work"}
    assert_close(logits(load(tmp_path / "here")), masked_reference(originals["mixtral"], plan_of(tmp_path / "here")))


def test_single_stages_as_subcommands(
    originals: dict[str, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, plan, out = str(originals["qwen3_moe"]), str(tmp_path / "plan.json"), str(tmp_path / "out")
    assert main(["inspect", model]) == 0
    shown = capsys.readouterr().out
    assert "qwen3_moe" in shown and "13" in shown
    assert main(["plan", model, "-o", plan, "--calibration", str(text), *SHORT]) == 0
    assert PrunePlan.load(plan).removed_share == pytest.approx(9 / 39) and not Path(out).exists()
    assert main(["apply", model, plan, out]) == 0
    assert plan_of(Path(out)) == PrunePlan.load(plan)
    capsys.readouterr()
    assert main(["verify", model, out]) == 0
    assert "equals the masked original: 3 layers x 512 tokens" in capsys.readouterr().out
    assert main(["evaluate", out, "--text", str(text), "--tokens", "128", "--seq-len", "32"]) == 0
    shown = capsys.readouterr().out
    assert "plain (62 tokens)" in shown and "mean over domains" in shown
    assert_close(logits(load(out)), masked_reference(originals["qwen3_moe"], plan_of(Path(out))))


def test_verify_finds_a_swapped_expert(
    originals: dict[str, Path], outputs: Callable[[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(outputs("qwen3_moe", "uniform"), broken)
    file = broken / "model.safetensors"
    tensors = load_file(file)
    one, two = (f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in (0, 1))
    tensors[one], tensors[two] = tensors[two], tensors[one]
    save_file(tensors, file)
    assert main(["verify", str(originals["qwen3_moe"]), str(broken)]) == 2
    assert "model.layers.1.mlp must keep expert" in capsys.readouterr().err


AS_PROCESS = """
import atexit, sys
from cprune.run import process
atexit.register(print, "taken down", file=sys.stderr)
process()
"""


@pytest.mark.parametrize("ratio, status", [("0.25", 0), ("1.5", 2)])
def test_a_process_ends_once_all_is_said(originals: dict[str, Path], tmp_path: Path, ratio: str, status: int) -> None:
    command = [sys.executable, "-c", AS_PROCESS, "inspect", str(originals["olmoe"]), "--ratio", ratio]
    with (tmp_path / "shown").open("w") as file:  # which is buffered, unlike a terminal
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True)
    assert done.returncode == status and "taken down" not in done.stderr
    assert ("olmoe" in (tmp_path / "shown").read_text()) == (status == 0)
    assert ("ratio must lie in (0, 1)" in done.stderr) == (status == 2)


def test_a_reader_that_has_gone_is_reported_as_ever(originals: dict[str, Path]) -> None:
    command = [sys.executable, "-c", AS_PROCESS, "inspect", str(originals["olmoe"])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as going:
        assert going.stdout is not None and going.stderr is not None
        going.stdout.close()
        assert "taken down" in going.stderr.read()
    assert going.returncode not in (0, None)
