"""Handled, not refused: experts without tokens, interruptions, damaged statistics, outputs that fail verification."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cprune import CpruneError, PrunePlan
from cprune.run import Run, main
from tests.bad_input.refusal import SHORT, UNBUFFERED, Refusal, as_in_a_terminal, snapshot
from tests.tiny import write_tiny, write_tokenizer


@pytest.mark.parametrize("budget", ["global", "uniform"])
def test_experts_never_routed_to(
    out: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    budget: str,
) -> None:
    model = write_tiny("glm4_moe", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"][[2, 5, 11]] = -100.0
    tensors["model.layers.2.mlp.gate.e_score_correction_bias"][2:] = -100.0  # all but the top-2
    save_file(tensors, model / "model.safetensors")
    options = ["--calibration", str(text), "--evaluate", str(text), "--budget", budget, *SHORT]
    assert main([str(model), str(out), *options], (Run,)) == 0
    plan = PrunePlan.load(out / "cprune_plan.json")
    assert "model.layers.1.mlp: 3 of 13 experts saw no calibration token" in caplog.text
    assert "model.layers.2.mlp: 11 of 13 experts saw no calibration token" in caplog.text
    assert {2, 5, 11} <= set(plan["model.layers.1.mlp"].dropped) or budget == "global"
    assert {0, 1} <= set(plan["model.layers.2.mlp"].kept)


# Stopped and started again


def command(model: Path, out: Path, text: Path, *options: str) -> list[str]:
    given = [*SHORT, "--calibration", str(text), "--evaluate", str(text), *options]
    return [sys.executable, "-m", "cprune.run", str(model), str(out), *given]


def interrupted_in(stage: str, arguments: list[str]) -> None:
    """Start a process, send it SIGINT as soon as it announces a stage, and check how it goes."""
    process = subprocess.Popen(
        arguments,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=UNBUFFERED,
        preexec_fn=as_in_a_terminal,
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith(f"{stage} "):
            process.send_signal(signal.SIGINT)
            break
    shown, rest = process.communicate(timeout=120)
    assert process.returncode == 130, (lines, rest)
    assert rest.splitlines()[-1].startswith("cprune: interrupted;") and "Traceback" not in rest and shown == ""


def test_interrupted_while_measuring_and_evaluating(model: Path, out: Path, text: Path, tmp_path: Path) -> None:
    arguments = command(model, out, text, "--tokens", "2048", "--evaluate-tokens", "1024")
    source = snapshot(model)
    interrupted_in("measure", arguments)
    assert not out.exists() and not (tmp_path / "out.work" / "stats.json").exists()
    interrupted_in("evaluate", arguments)
    assert (out / "config.json").exists() and not (out / "report.json").exists()
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.work").glob("stats*")}
    written = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    done = subprocess.run(arguments, capture_output=True, text=True, env=UNBUFFERED)
    assert done.returncode == 0, done.stderr
    assert len(stamps) == 4
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.work").glob("stats*")} == stamps
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != "report.json"} == written
    assert json.loads((out / "report.json").read_text())["perplexity_after"] is not None
    assert snapshot(model) == source and not list(tmp_path.glob(".*"))


KILLED = """
import os, signal, sys
from cprune.checkpoint import writer
from cprune.run import Run, main
copy, calls = writer._copy, []
def copy_and_die(*arguments):
    calls.append(arguments)
    copy(*arguments)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.{name})
writer._copy = copy_and_die
sys.exit(main(sys.argv[1:], (Run,)))
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_killed_while_writing(
    model: Path, out: Path, text: Path, tmp_path: Path, name: str, run_again: Callable[..., None]
) -> None:
    arguments = command(model, out, text)
    dying = [sys.executable, "-c", KILLED.replace("{name}", name), *arguments[3:]]
    done = subprocess.run(dying, capture_output=True, text=True, env=UNBUFFERED, preexec_fn=as_in_a_terminal)
    assert done.returncode == (-signal.SIGKILL if name == "SIGKILL" else 130), done.stderr
    assert not out.exists() and (tmp_path / ".out.partial").exists() == (name == "SIGKILL")
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.work").glob("stats*")}
    run_again(arguments[3:])
    assert (out / "report.json").exists() and not (tmp_path / ".out.partial").exists()
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.work").glob("stats*")} == stamps


@pytest.fixture
def run_again() -> Callable[..., None]:
    def call(arguments: list[str]) -> None:
        assert main(arguments, (Run,)) == 0

    return call


def test_damaged_statistics(refusal: Refusal, model: Path, out: Path, text: Path, tmp_path: Path) -> None:
    arguments = command(model, out, text, "--evaluate", "none")[3:]
    assert main(arguments, (Run,)) == 0
    shutil.rmtree(out)
    stats = tmp_path / "out.work" / "stats-001.safetensors"
    whole = stats.read_bytes()
    stats.write_bytes(whole[:100])
    assert main(arguments, (Run,)) == 0 and len(stats.read_bytes()) == len(whole)


def test_out_as_a_link(model: Path, out: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    out.symlink_to(tmp_path / "elsewhere")
    assert main(command(model, out, text)[3:], (Run,)) == 2
    assert out.is_symlink() and not any((tmp_path / "elsewhere").iterdir())


def test_output_that_fails_verification_is_moved_aside(
    model: Path, out: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*args: object) -> None:
        raise CpruneError("the compact model must equal the masked original, got something else")

    monkeypatch.setattr("cprune.proving.verify", wrong)
    assert main(command(model, out, text)[3:], (Run,)) == 2
    assert not out.exists() and (out.parent / "out.failed" / "config.json").is_file()
    assert "the output was moved to" in capsys.readouterr().err


def test_refusals_as_a_process(model: Path, out: Path, text: Path) -> None:
    done = subprocess.run(command(model, out, text, "--ratio", "1.5"), capture_output=True, text=True, env=UNBUFFERED)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "cprune: ratio must lie in (0, 1), got 1.5\n"
    for file in model.glob("tokenizer*"):
        file.unlink()
    done = subprocess.run(command(model, out, text), capture_output=True, text=True, env=UNBUFFERED)
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout, lines[0]) == (2, "", "open …") and len(lines) == 2
    assert lines[1].startswith("cprune: ") and "tokenizer" in lines[1] and not out.exists()


def test_a_tokenizer_alone_does_not_make_a_model(refusal: Refusal, out: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_tokenizer(tmp_path / "model")
    refusal([tmp_path / "model", out], "config.json")
