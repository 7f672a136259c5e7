"""Refused places to write, texts to read and plans to follow."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from threading import Lock
from typing import Any

import pytest

from cprune.run import Run, main
from tests.bad_input.refusal import SHORT, Refusal
from tests.tiny import write_tiny


def test_out_exists_and_is_not_empty(refusal: Refusal, model: Path, out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("precious")
    refusal([model, out], "OUT must not exist or be an empty folder", str(out))


def test_out_is_a_file(refusal: Refusal, model: Path, out: Path) -> None:
    out.write_text("precious")
    refusal([model, out], "OUT must not exist or be an empty folder", str(out))


def test_out_is_in_the_model_or_the_model(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    refusal([model, model / "out"], "OUT must lie outside MODEL")
    (model / "empty").mkdir()
    refusal([model, model / "empty"], "OUT must lie outside MODEL")
    refusal([model, model], "OUT must")
    (tmp_path / "link").symlink_to(model)
    refusal([model, tmp_path / "link" / "out"], "OUT must lie outside MODEL")


def test_out_is_a_finished_or_another_output(
    refusal: Refusal, model: Path, out: Path, text: Path, good_plan: dict[str, Any], tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(good_plan))
    assert main(["apply", str(model), str(plan), str(out)]) == 0
    options = ["--calibration", text, *SHORT]
    refusal([model, out, *options], "OUT must not exist")
    refusal([out, out, *options], "OUT must")
    assert main([str(model), str(out), "--plan", str(plan), "--evaluate", "none"], (Run,)) == 0  # proves what is there
    refusal([model, out, "--plan", plan, "--evaluate", "none"], "OUT must not exist")


def test_out_cannot_be_written(refusal: Refusal, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    refusal([model, tmp_path / "file" / "out"], "OUT must lie in a folder that can be written")
    locked, access = tmp_path / "locked", os.access
    locked.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked and access(path, mode))  # root may all
    refusal([model, locked / "out"], "OUT must lie in a folder that can be written")


def test_work_folder(refusal: Refusal, model: Path, out: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for work, words in (
        (model / "work", "outside MODEL"),
        (model, "outside MODEL"),
        (out, "outside OUT"),
        (out / "work", "outside OUT"),
        (tmp_path / "file" / "work", "must be writable"),
        (tmp_path / "file", "must be writable"),
    ):
        refusal([model, out, "--calibration", text, *SHORT, "--work-dir", work], "the work folder", words)
    plan = tmp_path / "plan.json"
    refusal(["plan", model, "-o", plan, "--work-dir", model / "work"], "outside MODEL", single=True)


def test_no_disk_space(refusal: Refusal, model: Path, out: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    refusal([model, out, "--calibration", text, *SHORT], "GB free", str(out))
    refusal(["plan", model, "-o", out, "--calibration", text, *SHORT], "GB free", f"{out}.work", single=True)
    refusal(["compare", model, "-o", out, "--calibration", text, *SHORT], "GB free", f"{out}.work", single=True)


def test_unknown_instructions(
    refusal: Refusal, model: Path, out: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPRUNE_MAX_ISA", "avx1024")
    refusal([model, out, "--calibration", text, *SHORT], "CPRUNE_MAX_ISA must be one of portable", "got 'avx1024'")


def test_disk_fills_up_while_writing(
    refusal: Refusal, model: Path, out: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cprune.checkpoint import writer

    copy, calls, failed, lock = writer._copy, [], [], Lock()

    def full(source: int, target: int, *rest: Any) -> None:
        with lock:  # two files are written at the same time
            calls.append(target)
            if len(calls) > 2:
                failed.append(target)
                raise OSError(28, "No space left on device")
        copy(source, target, *rest)

    monkeypatch.setattr(writer, "_copy", full)
    refusal([model, out, "--calibration", text, *SHORT], "No space left", str(out), leaves=("out.work",))
    assert len(calls) == 2 + len(failed) and 1 <= len(failed) <= writer.WRITERS  # once a file


# The text


@pytest.mark.parametrize("option", ["--calibration", "--evaluate"])
def test_texts(refusal: Refusal, model: Path, out: Path, text: Path, tmp_path: Path, option: str) -> None:
    file = tmp_path / "bad.jsonl"
    good = ["--calibration", text, "--evaluate", text]
    good[good.index(option) + 1] = file
    command = [model, out, *SHORT, *good]
    refusal(command, str(file))
    for content, words in (
        ("", ("at least one document", "got none")),
        ('{"text": "  "}\n', ("at least one document", "got none")),
        ('{"text": "one two"}\n', ("at least 32 tokens",)),
        ('{"text": "one"}\n{"text": \n', (f"{file}:2", "JSON")),
        ("[1]\n", (f"{file}:1", "object")),
        ('{"words": "one"}\n', (f"{file}:1", "words")),
    ):
        file.write_text(content)
        refusal(command, *words)
    file.write_bytes(b'{"text": "\xff\xfe"}\n')
    refusal(command, f"{file}:1", "UTF-8")
    good[good.index(file)] = tmp_path / "text.docx"
    (tmp_path / "text.docx").write_text("words")
    refusal([model, out, *SHORT, *good], "text.docx")
    refusal([model, out, *SHORT, option, "a.jsonl:0"], "a.jsonl:0")


# Plans


def damaged(plan: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**plan, **changes})


def layers_with(plan: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    return [{**plan["layers"][0], **changes}, *plan["layers"][1:]]


def test_plans(refusal: Refusal, model: Path, out: Path, good_plan: dict[str, Any], tmp_path: Path) -> None:
    file, layers = tmp_path / "plan.json", good_plan["layers"]
    first = layers[0]
    commands = ([[model, out, "--plan", file, "--evaluate", "none"], False], [["apply", model, file, out], True])
    for command, single in commands:
        refusal(command, "plan must be readable", str(file), single=single)
    for content, words in (
        ("{", ("must be JSON",)),
        ("[]", ("cprune plan",)),
        (damaged(good_plan, cprune_plan=99), ("version 1",)),
        (damaged(good_plan, fingerprint="0" * 64), ("of this checkpoint", "000000000000")),
        (damaged(good_plan, layers=[]), ("at least one layer",)),
        (damaged(good_plan, layers=7), ("every field",)),
        (damaged(good_plan, layers=layers[1:]), (first["layer"],)),
        (damaged(good_plan, layers=[*layers, first]), (first["layer"],)),
        (damaged(good_plan, layers=layers_with(good_plan, layer="model.layers.9.mlp")), ("model.layers.",)),
        (damaged(good_plan, layers=layers_with(good_plan, kept=[0, 1, 13])), ("13",)),
        (damaged(good_plan, layers=layers_with(good_plan, kept=[-1, 1, 2])), ("-1",)),
        (damaged(good_plan, layers=layers_with(good_plan, kept=[2, 1])), ("ascending",)),
        (damaged(good_plan, layers=layers_with(good_plan, kept=["a"])), ("every field",)),
        (damaged(good_plan, layers=layers_with(good_plan, kept=[])), ("at least one",)),
        (damaged(good_plan, layers=layers_with(good_plan, kept=[3], stand_in=[3] * 13)), ("2 experts a token uses",)),
        (damaged(good_plan, layers=layers_with(good_plan, score=[0.0])), ("13 entries",)),
        (damaged(good_plan, layers=[{k: v for k, v in first.items() if k != "kept"}]), ("kept",)),
        (damaged({k: v for k, v in good_plan.items() if k != "config"}), ("config",)),
    ):
        file.write_text(content)
        for command, single in commands:
            refusal(command, *words, single=single)
    file.write_bytes(b"\xff\xfe")
    for command, single in commands:
        refusal(command, str(file), single=single)


def test_a_plan_for_another_model(refusal: Refusal, out: Path, good_plan: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(good_plan))
    other = write_tiny("qwen3_moe", tmp_path / "other", seed=7, shards=2)
    refusal([other, out, "--plan", tmp_path / "plan.json", "--evaluate", "none"], "the plan must be of this checkpoint")
    refusal(["apply", other, tmp_path / "plan.json", out], "the plan must be of this checkpoint", single=True)
    refusal(["verify", other, write_tiny("olmoe", tmp_path / "no")], "must hold cprune_plan.json", single=True)


def test_single_stages_refuse_too(refusal: Refusal, model: Path, text: Path, tmp_path: Path) -> None:
    refusal(["inspect", tmp_path / "nowhere"], "MODEL must be", single=True)
    refusal(["evaluate", model, "--text", tmp_path / "no.jsonl"], "no.jsonl", single=True)
    refusal(["evaluate", model, "--text", "none"], "evaluate must", single=True)
    refusal(["evaluate", model, "--text", text, "--dtype", "int4"], "dtype must be one of", single=True)
    refusal(["plan", model, "-o", tmp_path / "no" / "plan.json"], "existing folder", single=True)
    refusal(["plan", model, "-o", tmp_path / "plan.json", "--ratio", "2"], "ratio must lie in (0, 1)", single=True)


def test_inspect_says_what_would_be_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    assert main(["inspect", str(model), "--ratio", "0.9"]) == 0
    shown = capsys.readouterr().out
    assert "ratio 0.9 must leave every layer" in shown and "must hold a tokenizer" in shown
