"""What the command line refuses: status 2, one sentence, before any work, and nothing is left behind or lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from cprune import CpruneError, PrunePlan
from cprune.run import Run, main
from tests.tiny import write_json, write_tiny, write_tokenizer

WORDS = "the router sends every token to experts and other layers return what is left of hidden state".split()
SHORT = (
    "--tokens",
    "256",
    "--seq-len",
    "32",
    "--evaluate-tokens",
    "128",
    "--sample-tokens",
    "40",
    "--dtype",
    "float32",
)
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def as_in_a_terminal() -> None:
    """A shell starts its background jobs, and so perhaps this test suite, with interrupts ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


STAGES = ("open …", "measure …", "decide …", "act …", "verify …", "evaluate …")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, draw = tmp_path_factory.mktemp("text") / "text.jsonl", random.Random(0)
    path.write_text("".join(json.dumps({"text": " ".join(draw.choices(WORDS, k=40))}) + "\n" for _ in range(60)))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """13 experts a layer, top-2, 3 layers, in two shards."""
    return write_tiny("qwen3_moe", tmp_path / "model", shards=2)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="module")
def good_plan(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The plan of `model`, as JSON values."""
    folder = tmp_path_factory.mktemp("plan")
    source = write_tiny("qwen3_moe", folder / "model", shards=2)
    assert main(["plan", str(source), "-o", str(folder / "plan.json"), "--calibration", "none", *SHORT]) == 0
    return json.loads((folder / "plan.json").read_text())


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Everything in a folder: kind, size and time of change."""
    stats = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*")}
    return {name: (stat.st_mode, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


class Refusal:
    """`refusal(arguments, *words)`: the command must refuse in one sentence that has the words, and leave no trace."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys

    def __call__(
        self,
        arguments: list[str | Path],
        *words: str,
        stage: str = "open",
        single: bool = False,
        leaves: tuple[str, ...] = (),
    ) -> None:
        before = snapshot(self.folder)
        self.capsys.readouterr()
        status = main([str(argument) for argument in arguments], *(() if single else ((Run,),)))
        shown = self.capsys.readouterr()
        lines = [line for line in shown.err.splitlines() if line not in STAGES]
        assert status == 2 and shown.out == ""
        assert len(lines) == 1 and lines[0].startswith("cprune: "), shown.err
        assert all(word in lines[0] for word in words), lines[0]
        after = {name: stat for name, stat in snapshot(self.folder).items() if name.partition("/")[0] not in leaves}
        assert after == before
        assert not any(path.name.endswith(".partial") for path in self.folder.rglob("*"))


@pytest.fixture
def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    return Refusal(tmp_path, capsys)


# The model


def test_model_path_is_missing(refusal: Refusal, out: Path, tmp_path: Path) -> None:
    refusal([tmp_path / "nowhere", out], "MODEL must be", str(tmp_path / "nowhere"))
    refusal(["nowhere", out], "MODEL must be", "nowhere")


def test_model_is_a_file(refusal: Refusal, model: Path, out: Path) -> None:
    refusal([model / "config.json", out], "MODEL must be", "config.json")


def test_model_is_an_empty_folder(refusal: Refusal, out: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refusal([tmp_path / "empty", out], "config.json")


def test_config_is_not_json(refusal: Refusal, model: Path, out: Path) -> None:
    (model / "config.json").write_text("{")
    refusal([model, out], "config.json must be JSON")


def test_weights_are_missing(refusal: Refusal, model: Path, out: Path) -> None:
    for shard in model.glob("*.safetensors*"):
        shard.unlink()
    refusal([model, out], "safetensors, got none")


@pytest.mark.parametrize("indexed", [True, False])
def test_a_shard_is_missing(refusal: Refusal, model: Path, out: Path, indexed: bool) -> None:
    (model / "model-00002-of-00002.safetensors").unlink()
    if not indexed:
        (model / "model.safetensors.index.json").unlink()
    refusal([model, out], "shard")


def test_a_tensor_of_the_index_is_missing(refusal: Refusal, model: Path, out: Path) -> None:
    shard = model / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    name = next(name for name in tensors if ".experts." in name)
    del tensors[name]
    save_file(tensors, shard)
    refusal([model, out], name)


def test_a_weight_of_the_model_is_missing(refusal: Refusal, out: Path, text: Path, tmp_path: Path) -> None:
    model = write_tiny("olmoe", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, model / "model.safetensors")
    refusal([model, out, "--calibration", text, *SHORT], "must hold every weight", leaves=("out.work",))


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_a_shard_is_truncated(refusal: Refusal, model: Path, out: Path, keep: int) -> None:
    shard = model / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    refusal([model, out], shard.name, "truncated")


FOREIGN = {
    "text": b"This is not a safetensors file, whatever its name says." * 20,
    "pickle": b"PK\x03\x04" + bytes(400),
    "no JSON": (64).to_bytes(8, "little") + bytes(range(64)),
    "a list": (8).to_bytes(8, "little") + b"[1,2,3] ",
    "other keys": (16).to_bytes(8, "little") + b'{"a": {"b": 1}} ',
    "a number": (8).to_bytes(8, "little") + b'{"a": 1}',
}


@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_file_named_safetensors(refusal: Refusal, model: Path, out: Path, content: str) -> None:
    shard = model / "model-00001-of-00002.safetensors"
    shard.write_bytes(FOREIGN[content])
    refusal([model, out], shard.name, "safetensors file")


@pytest.mark.parametrize("calibration", ["text", "none"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_are_not_finite(
    refusal: Refusal, out: Path, text: Path, tmp_path: Path, value: float, calibration: str
) -> None:
    model = write_tiny("olmoe", tmp_path / "model")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors = load_file(model / "model.safetensors")
    tensors[name][2, 5] = value
    save_file(tensors, model / "model.safetensors")
    source = text if calibration == "text" else "none"
    refusal([model, out, "--calibration", source, *SHORT], "weights must be finite", name)
    refusal(["plan", model, "-o", tmp_path / "plan.json", "--calibration", source], name, single=True)
    refusal(
        ["compare", model, "-o", tmp_path / "compare", "--calibration", source], name, single=True, leaves=("compare",)
    )


def test_dense_model(refusal: Refusal, out: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "llama")
    refusal([tmp_path / "llama", out], "Mixture-of-Experts", "dense", "llama")


def edit_config(model: Path, **values: Any) -> None:
    write_json(model / "config.json", {**json.loads((model / "config.json").read_text()), **values})


def test_unknown_model_type(refusal: Refusal, model: Path, out: Path) -> None:
    edit_config(model, model_type="marvin_moe")
    refusal([model, out], "model type", "marvin_moe")


@pytest.mark.parametrize(("new", "shown"), [("experts.%d.dense_h_to_4h", "dense_h_to_4h"), ("experts.x%d.up", ".x0.")])
def test_unknown_expert_naming(refusal: Refusal, out: Path, tmp_path: Path, new: str, shown: str) -> None:
    model = write_tiny("olmoe", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    for expert in range(15):
        old = f"model.layers.0.mlp.experts.{expert}.up_proj.weight"
        tensors[f"model.layers.0.mlp.{new % expert}.weight"] = tensors.pop(old)
    save_file(tensors, model / "model.safetensors")
    refusal([model, out], "named", shown)


def test_router_without_a_row_for_every_expert(refusal: Refusal, out: Path, tmp_path: Path) -> None:
    model = write_tiny("olmoe", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.gate.weight"] = tensors["model.layers.2.mlp.gate.weight"][:9].contiguous()
    save_file(tensors, model / "model.safetensors")
    refusal([model, out], "model.layers.2.mlp.gate.weight", "[9, 48]")


def test_config_with_another_number_of_experts(refusal: Refusal, model: Path, out: Path) -> None:
    edit_config(model, num_experts=12)
    refusal([model, out], "experts 0 to 11", "got 13")


def test_quantized(refusal: Refusal, model: Path, out: Path) -> None:
    edit_config(model, quantization_config={"quant_method": "fp8"})
    refusal([model, out], "unquantised", "fp8")


def test_tokenizer_is_missing(refusal: Refusal, out: Path, text: Path, tmp_path: Path) -> None:
    model = write_tiny("olmoe", tmp_path / "model", tokenizer=False)
    refusal([model, out, "--calibration", text, *SHORT], "tokenizer", "got none")
    refusal([model, out, "--calibration", "none", *SHORT], "tokenizer", "--evaluate none")


# The options


@pytest.mark.parametrize("ratio", ["0", "1", "1.5", "-0.25", "nan", "inf"])
def test_ratio_outside(refusal: Refusal, model: Path, out: Path, ratio: str) -> None:
    refusal([model, out, "--ratio", ratio], "ratio must lie in (0, 1), got")
    refusal(["run", model, out, "--ratio", ratio], "ratio must lie in (0, 1), got", single=True)


@pytest.mark.parametrize(
    "options", [("--ratio", "text"), ("--nonsense",), ("--budget", "nonsense"), ("--tokens", "1.5")]
)
def test_usage_errors_are_the_parser_s(
    model: Path, out: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(model), str(out), *options], (Run,))
    assert stop.value.code == 2 and options[0] in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    ("ratio", "budget", "reason"), [("0.9", "global", "top-k"), ("0.97", "uniform", "top-k"), ("0.05", "uniform", "0")]
)
def test_ratio_that_leaves_too_few(
    refusal: Refusal, model: Path, out: Path, ratio: str, budget: str, reason: str
) -> None:
    refusal([model, out, "--ratio", ratio, "--budget", budget], f"ratio {ratio}", reason)


@pytest.mark.parametrize(
    "options",
    [("--slack", "10"), ("--min-keep", "12"), ("--multiple-of", "14")],
)
def test_constraints_that_leave_nothing_to_remove(
    refusal: Refusal, model: Path, out: Path, options: tuple[str, str]
) -> None:
    refusal([model, out, "--ratio", "0.25", *options], "ratio 0.25 must leave")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--similarity", "nonsense"), ("similarity", "'nonsense'")),
        (("--similarity", "outputs:-1"), ("similarity", "'outputs:-1'")),
        (("--clusters", "0"), ("clusters must be at least 1, got 0",)),
        (("--clusters", "14"), ("clusters", "13", "got 14")),
        (("--method", "cprune-paper", "--calibration", "none"), ("cprune-paper", "calibration")),
        (("--similarity", "cka,weights", "--calibration", "none"), ("similarity cka", "calibration")),
        (("--calibration", " "), ("calibration",)),
        (("--seq-len", "1"), ("seq_len must be at least 2, got 1",)),
        (("--seed", "-1"), ("seed",)),
    ],
)
def test_options_that_cannot_work(
    refusal: Refusal, model: Path, out: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refusal([model, out, *options], *words)


def test_paper_method_with_router_groups(refusal: Refusal, out: Path, text: Path, tmp_path: Path) -> None:
    model = write_tiny("deepseek_v3", tmp_path / "model")
    refusal([model, out, "--method", "cprune-paper", "--calibration", text, *SHORT], "cprune-paper", "4 groups")


def test_yaml(refusal: Refusal, model: Path, out: Path, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    refusal([model, out, "--config", file], "configuration file must be readable", str(file))
    for content, words in (
        ("nonsense: 3\nratio: 0.5\n", ("nonsense",)),
        ("ratio: 1.5\n", ("ratio must lie in (0, 1), got 1.5",)),
        ("ratio: half\n", ("ratio", "'half'")),
        ("verify: 1\n", ("verify", "bool")),
        ("[1, 2]\n", ("mapping",)),
        ("ratio: [\n", ("must be YAML",)),
    ):
        file.write_text(content)
        refusal([model, out, "--config", file], *words)
        refusal(["run", model, out, "--config", file], *words, single=True)
    file.write_bytes(b"\xff\xfe\x00ratio")
    refusal([model, out, "--config", file], str(file))


# OUT


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


def test_disk_fills_up_while_writing(
    refusal: Refusal, model: Path, out: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cprune.checkpoint import writer

    copy, calls = writer._copy, []

    def full(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        copy(*arguments)

    monkeypatch.setattr(writer, "_copy", full)
    refusal([model, out, "--calibration", text, *SHORT], "No space left", str(out), leaves=("out.work",))
    assert len(calls) == 3


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


# Handled, not refused


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
        env=ONE_THREAD,
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
    done = subprocess.run(arguments, capture_output=True, text=True, env=ONE_THREAD)
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
    done = subprocess.run(dying, capture_output=True, text=True, env=ONE_THREAD, preexec_fn=as_in_a_terminal)
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
    done = subprocess.run(command(model, out, text, "--ratio", "1.5"), capture_output=True, text=True, env=ONE_THREAD)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "cprune: ratio must lie in (0, 1), got 1.5\n"
    for file in model.glob("tokenizer*"):
        file.unlink()
    done = subprocess.run(command(model, out, text), capture_output=True, text=True, env=ONE_THREAD)
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout, lines[0]) == (2, "", "open …") and len(lines) == 2
    assert lines[1].startswith("cprune: ") and "tokenizer" in lines[1] and not out.exists()


def test_a_tokenizer_alone_does_not_make_a_model(refusal: Refusal, out: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_tokenizer(tmp_path / "model")
    refusal([tmp_path / "model", out], "config.json")
