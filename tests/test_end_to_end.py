"""The main job and the single stages through the real command line, on tiny checkpoints of every family."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cprune import PruneConfig, PrunePlan, load, prune
from cprune.measure.data import pack, read_documents
from cprune.run import Run, main
from tests.tiny import FAMILIES, write_tiny

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
BUDGETS = ("uniform", "global")
IDS = torch.randint(0, 288, (4, 48), generator=torch.Generator().manual_seed(1))
WORDS = "the router sends every token to experts and other layers return what is left of hidden state".split()
SHORT = (
    "--tokens",
    "512",
    "--seq-len",
    "32",
    "--evaluate-tokens",
    "128",
    "--sample-tokens",
    "40",
    "--dtype",
    "float32",
)
EXACT = ("--repair", "none")  # what is kept stays as it was, so that outputs equal the masked original
WITHOUT_CPRUNE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("cprune", "cprune_kernels"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
try:
    import cprune
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("cprune must not be importable here")
import torch
from transformers import AutoModelForCausalLM
ids, results = torch.load(sys.argv[1]), {}
for folder in sys.argv[3:]:
    for trust in (False, True):
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, trust_remote_code=trust, output_loading_info=True, dtype="float32"
            )
            with torch.no_grad():
                result = {"logits": model(ids).logits, "info": {key: sorted(map(str, info[key])) for key in info}}
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        results[folder, trust] = result
torch.save(results, sys.argv[2])
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of two domains."""
    path, draw = tmp_path_factory.mktemp("text") / "text.jsonl", random.Random(0)
    lines = [{"text": " ".join(draw.choices(WORDS, k=40)), "domain": ("plain", "other")[i % 2]} for i in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def run(text: Path) -> Callable[..., Path]:
    """`run(model, out, *options)`: `python -m cprune.run` in this process, on little text; returns out."""

    def call(model: Path, out: Path, *options: str) -> Path:
        exact = () if "--repair" in options else EXACT
        given = [str(model), str(out), *SHORT, *exact, "--calibration", str(text), "--evaluate", str(text), *options]
        assert main(given, (Run,)) == 0
        return out

    return call


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: quieter_last_layer(write_tiny(family, folder / family)) for family in FAMILIES}


def quieter_last_layer(model: Path) -> Path:
    """Scale the experts of layer 2 down, so that a global budget takes more of them than of the others."""
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if re.search(r"layers\.2\..*experts\.(\d+\.)?(down_proj|w2)", name):
            tensor *= 0.25
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


def share(family: str, budget: str) -> float:
    """A quarter; 12 experts in 4 groups leave by four."""
    return 0.34 if (family, budget) == ("deepseek_v3", "uniform") else 0.25


@pytest.fixture(scope="module")
def outputs(
    originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, run: Callable[..., Path]
) -> Callable[[str, str], Path]:
    """A family pruned with a budget, when a test first asks for it."""
    folder = tmp_path_factory.mktemp("outputs")

    @functools.cache
    def pruned(family: str, budget: str) -> Path:
        options = ("--budget", budget, "--ratio", str(share(family, budget)))
        return run(originals[family], folder / f"{family}-{budget}", *options)

    return pruned


@pytest.fixture(scope="module")
def reloaded(
    outputs: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, bool], dict[str, Any]]:
    """{(folder, trust_remote_code): what plain transformers makes of it, in a process that cannot import cprune}."""
    folder = tmp_path_factory.mktemp("reloaded")
    torch.save(IDS, folder / "ids.pt")
    folders = [outputs(family, budget) for family in FAMILIES for budget in BUDGETS]
    subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_CPRUNE, folder / "ids.pt", folder / "results.pt", *folders],
        check=True,
        cwd=folder,
        env={**ONE_THREAD, "HF_MODULES_CACHE": str(folder / "modules")},
        capture_output=True,
    )
    return torch.load(folder / "results.pt")


def plain(folder: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"], info
    return model.eval()


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Equal up to float32: 2^-24 a rounding, for some thousands of them in a chain, of the largest logit."""
    assert got.shape == expected.shape and (got - expected).abs().max() <= 2.0**-18 * expected.abs().max()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def plan_of(out: Path) -> PrunePlan:
    return PrunePlan.load(out / "cprune_plan.json")


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def masked_reference(model: Path, plan: PrunePlan) -> Tensor:
    """Logits of the original whose routers choose among the kept experts only, routing written out anew."""
    original = plain(model)
    config, layers = original.config, original.model.layers
    for layer in plan.layers:
        index = int(layer.layer.split(".")[2])
        if index < len(layers):
            block = next(child for child in layers[index].children() if hasattr(child, "experts"))
            router = getattr(block, "gate", None) or block.router
            dropped = torch.zeros(layer.num_experts, dtype=torch.bool)
            dropped[list(layer.dropped)] = True
            correction = getattr(router, "e_score_correction_bias", getattr(block, "e_score_correction_bias", None))
            router.forward = masked_routing(config, router, dropped, correction)
    return logits(original)


def masked_routing(config: Any, router: nn.Module, dropped: Tensor, correction: Tensor | None) -> Callable[..., Any]:
    top_k, num = config.num_experts_per_tok, len(dropped)
    groups, reach = getattr(config, "n_group", 1) or 1, getattr(config, "topk_group", 1) or 1

    def route(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        raw = F.linear(hidden.reshape(-1, hidden.shape[-1]).float(), router.weight, getattr(router, "bias", None))
        raw = raw.masked_fill(dropped, -torch.inf)
        if config.model_type == "gpt_oss":
            chosen = raw.sort(dim=1, descending=True).indices[:, :top_k]
            return raw, raw.gather(1, chosen).softmax(1), chosen
        scores = raw.softmax(1) if correction is None else raw.sigmoid()
        choice = (scores if correction is None else scores + correction).masked_fill(dropped, -torch.inf)
        if correction is not None and groups > 1:
            grouped = choice.view(-1, groups, num // groups)
            best = grouped.sort(dim=2, descending=True).values[:, :, :2].sum(2).sort(dim=1, descending=True).indices
            for row in range(len(grouped)):
                grouped[row, best[row, reach:]] = -torch.inf
            choice = grouped.reshape(-1, num)
        chosen = choice.sort(dim=1, descending=True).indices[:, :top_k]
        gates = scores.gather(1, chosen)
        if config.model_type in ("mixtral", "minimax_m2") or config.norm_topk_prob:
            gates = gates / gates.sum(1, keepdim=True)
        return raw, gates * getattr(config, "routed_scaling_factor", 1.0), chosen

    return route


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_routing_without_a_mask_is_the_model(family: str, originals: dict[str, Path]) -> None:
    everyone = PrunePlan.from_json(json.dumps(whole_plan(originals[family])))
    assert_close(masked_reference(originals[family], everyone), logits(plain(originals[family])))


def whole_plan(model: Path) -> dict[str, Any]:
    """A plan that keeps everything."""
    config, layers = json.loads((model / "config.json").read_text()), []
    num = next(config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config)
    for index in range(config.get("first_k_dense_replace", 0), config["num_hidden_layers"]):
        values = {"kept": list(range(num)), "cluster": [0] * num, "score": [0.0] * num}
        values |= {"stand_in": list(range(num)), "similarity": [1.0] * num}
        layers.append({"layer": f"model.layers.{index}.mlp", "num_experts": num, **values})
    return {
        "cprune_plan": 1,
        "fingerprint": "",
        "model_type": config["model_type"],
        "layers": layers,
        "config": {},
        "versions": {},
    }


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_reloads_with_plain_transformers_as_the_masked_original(
    family: str,
    budget: str,
    originals: dict[str, Path],
    outputs: Callable[[str, str], Path],
    reloaded: dict[tuple[str, bool], dict[str, Any]],
) -> None:
    out = outputs(family, budget)
    plan = plan_of(out)
    total = sum(layer.num_experts for layer in plan.layers)
    assert 0 < sum(len(layer.dropped) for layer in plan.layers) <= total * share(family, budget)
    expected = masked_reference(originals[family], plan)
    assert not torch.allclose(expected, logits(plain(originals[family])), rtol=1e-3, atol=1e-3)
    trusting = reloaded[str(out), True]
    assert "error" not in trusting, trusting
    assert not any(trusting["info"].values()), trusting["info"]
    assert_close(trusting["logits"], expected)
    assert_close(logits(load(out, dtype=torch.float32)), expected)
    stock = reloaded[str(out), False]
    if plan.uniform:
        assert_close(stock["logits"], expected)
        assert not any(stock["info"].values()) and not (out / "modeling_cprune.py").exists()
        assert "auto_map" not in json.loads((out / "config.json").read_text())
    else:
        assert "logits" not in stock, "a plain load of layers with different expert counts must not pass silently"


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_keeps_the_same_number_everywhere(family: str, outputs: Callable[[str, str], Path]) -> None:
    plan = plan_of(outputs(family, "uniform"))
    num = plan.layers[0].num_experts
    least = 4 * 2 if family == "deepseek_v3" else num - num // 4  # 12 experts in 4 groups step by 4
    assert {len(layer.kept) for layer in plan.layers} == {least}


@pytest.mark.parametrize("family", FAMILIES)
def test_global_takes_more_from_the_quieter_layer(family: str, outputs: Callable[[str, str], Path]) -> None:
    counts = [len(layer.kept) for layer in plan_of(outputs(family, "global")).layers]
    assert counts[-1] == min(counts) < max(counts)


def test_everything_beside_the_weights_comes_along(
    originals: dict[str, Path], outputs: Callable[[str, str], Path]
) -> None:
    source, out = originals["qwen3_moe"], outputs("qwen3_moe", "uniform")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    assert after == {**before, "num_experts": 10} and list(after) == list(before)
    assert not [path for path in out.parent.iterdir() if path.name.endswith(".partial")]


def test_report_says_what_happened(outputs: Callable[[str, str], Path]) -> None:
    report = json.loads((outputs("qwen3_moe", "uniform") / "report.json").read_text())
    assert report["before"]["experts"] == 39 and report["after"]["experts"] == 30
    assert set(report["kept_per_layer"].values()) == {10} and len(report["kept_per_layer"]) == 3
    tensors = load_file(outputs("qwen3_moe", "uniform") / "model.safetensors")
    assert report["after"]["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert report["after"]["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    for when in ("perplexity_before", "perplexity_after"):
        assert set(report[when]["by_domain"]) == {"plain", "other"}
        assert sum(report[when]["tokens"].values()) == 128 - 128 // 32
    assert report["verification"]["layers"] == 3 and report["verification"]["positions"] == 4 * 64
    assert set(report["seconds"]) == {"open", "measure", "decide", "act", "verify", "evaluate"}
    assert report["method"] == "cprune" and report["budget"] == "uniform" and report["ratio"] == 0.25
    assert report["calibration"].startswith("512 tokens of ") and isinstance(report["generated"], str)
    assert report["peak_memory"] > 1 << 20


def test_reported_perplexity_is_that_of_transformers(
    text: Path, originals: dict[str, Path], outputs: Callable[[str, str], Path]
) -> None:
    out = outputs("olmoe", "uniform")
    report = json.loads((out / "report.json").read_text())
    documents = read_documents(str(text), split="evaluation")
    rows = pack(documents, AutoTokenizer.from_pretrained(out), tokens=128, seq_len=32)
    for folder, when in ((originals["olmoe"], "perplexity_before"), (out, "perplexity_after")):
        with torch.no_grad():
            predicted = plain(folder)(rows.input_ids).logits[:, :-1].double().log_softmax(-1)
        loss = -predicted.gather(2, rows.input_ids[:, 1:, None])[..., 0]
        for domain in ("plain", "other"):
            chosen = torch.tensor([name == domain for name in rows.domain])
            assert report[when]["by_domain"][domain] == pytest.approx(float(loss[chosen].mean().exp()), rel=1e-5)


VARIANTS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "sharded": ("qwen3_moe", {"shards": 3}, ()),
    "fused on disk": ("qwen3_moe", {"fuse_on_disk": True}, ()),
    "bfloat16": ("qwen3_moe", {"dtype": "bfloat16"}, ()),
    "sharded bfloat16 gpt-oss": ("gpt_oss", {"dtype": "bfloat16", "shards": 2}, ()),
    "half removed": ("mixtral", {}, ("--ratio", "0.5")),
    "without data": ("qwen2_moe", {"tokenizer": False}, ("--calibration", "none", "--evaluate", "none")),
    "multiples": ("olmoe", {}, ("--multiple-of", "4")),
    "dense layers": ("qwen2_moe", {"mlp_only_layers": [1]}, ()),
    "prediction head": ("deepseek_v3", {"mtp": True}, ("--ratio", "0.34")),
    "prediction head, sharded": ("glm4_moe", {"mtp": True, "shards": 2}, ()),
    "tied": ("qwen3_moe", {"tie_word_embeddings": True}, ()),
    "not verified": ("olmoe", {}, ("--no-verify", "--evaluate", "none")),
    "no first position": ("olmoe", {}, ("--skip-first", "--protect", "none")),
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_the_masked_original(
    variant: str, budget: str, tmp_path: Path, run: Callable[..., Path]
) -> None:
    family, layout, options = VARIANTS[variant]
    model = write_tiny(family, tmp_path / "model", **layout)
    out = run(model, tmp_path / "out", "--budget", budget, *options)
    plan = plan_of(out)
    assert any(layer.dropped for layer in plan.layers)
    trunk = [layer for layer in plan.layers if not layer.layer.startswith("model.layers.3.")]
    if variant == "multiples":
        assert all(len(layer.kept) % 4 == 0 or len(layer.kept) == layer.num_experts for layer in trunk)
    compact = load(out, dtype=torch.float32)
    if layout.get("mtp"):  # plain transformers leaves the head out, so only its tensors can be looked at
        (head,) = (layer for layer in plan.layers if layer not in trunk)
        check_head(model, out, head)
        shutil.rmtree(model)
        model = write_tiny(family, model, **(layout | {"mtp": False}))
    assert_close(logits(compact), masked_reference(model, plan))


def check_head(model: Path, out: Path, head: Any) -> None:
    before, after = ({k: v for f in d.glob("*.safetensors") for k, v in load_file(f).items()} for d in (model, out))
    assert torch.equal(after[f"{head.layer}.gate.weight"], before[f"{head.layer}.gate.weight"][list(head.kept)])
    for new, old in enumerate(head.kept):
        for name in ("gate_proj", "up_proj", "down_proj"):
            expert = f"{head.layer}.experts.%d.{name}.weight"
            assert torch.equal(after[expert % new], before[expert % old])
    assert f"{head.layer}.experts.{len(head.kept)}.up_proj.weight" not in after
    assert torch.equal(after["model.layers.3.eh_proj.weight"], before["model.layers.3.eh_proj.weight"])


METHODS = ("cprune", "cprune-paper", "contribution", "reap", "frequency", "gate", "ean", "random")


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_method_from_one_measurement(
    budget: str, originals: dict[str, Path], tmp_path: Path, run: Callable[..., Path]
) -> None:
    model, work = originals["qwen2_moe"], tmp_path / "work"
    stamps = None
    for method in METHODS:
        options = ("--method", method, "--budget", budget, "--work-dir", str(work), "--evaluate", "none")
        out = run(model, tmp_path / method, *options)
        found = {path.name: path.stat().st_mtime_ns for path in work.glob("stats*")}
        assert len(found) == 4 and found == (stamps or found)
        stamps = found
        assert plan_of(out).config["method"] == method
        assert_close(logits(load(out, dtype=torch.float32)), masked_reference(model, plan_of(out)))


def test_another_ratio_or_method_does_not_measure_again(
    originals: dict[str, Path], tmp_path: Path, run: Callable[..., Path]
) -> None:
    work = tmp_path / "work"
    run(originals["olmoe"], tmp_path / "quarter", "--work-dir", str(work))
    stamps = {path.name: path.stat().st_mtime_ns for path in work.glob("stats*")}
    out = run(originals["olmoe"], tmp_path / "half", "--work-dir", str(work), "--ratio", "0.5")
    assert {path.name: path.stat().st_mtime_ns for path in work.glob("stats*")} == stamps and len(stamps) == 4
    assert json.loads((out / "report.json").read_text())["after"]["experts"] == 45 - 22
    run(originals["olmoe"], tmp_path / "longer", "--work-dir", str(work), "--tokens", "256")
    assert all(path.stat().st_mtime_ns != stamps[path.name] for path in work.glob("stats*"))


def test_two_runs_are_byte_identical(originals: dict[str, Path], tmp_path: Path, run: Callable[..., Path]) -> None:
    first, second = (run(originals["glm4_moe"], tmp_path / name) for name in ("first", "second"))
    assert (first / "cprune_plan.json").read_bytes() == (second / "cprune_plan.json").read_bytes()
    assert weights(first) == weights(second)


def test_a_replayed_plan_gives_the_same_bytes(
    originals: dict[str, Path], outputs: Callable[[str, str], Path], tmp_path: Path, run: Callable[..., Path]
) -> None:
    for budget in BUDGETS:
        out = outputs("qwen3_moe", budget)
        again = run(originals["qwen3_moe"], tmp_path / budget, "--plan", str(out / "cprune_plan.json"))
        assert weights(again) == weights(out) and not (tmp_path / f"{budget}.work").exists()
        assert (again / "cprune_plan.json").read_bytes() == (out / "cprune_plan.json").read_bytes()
        assert (again / "config.json").read_bytes() == (out / "config.json").read_bytes()


def test_configuration_from_yaml_and_the_command_line_over_it(
    originals: dict[str, Path], tmp_path: Path, run: Callable[..., Path]
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("ratio: 0.5\nbudget: uniform\nmethod: reap\nevaluate: none\n")
    config = plan_of(run(originals["olmoe"], tmp_path / "out", "--config", str(file), "--method", "ean")).config
    assert (config["ratio"], config["budget"], config["method"]) == (0.5, "uniform", "ean")


def test_python_api(originals: dict[str, Path], text: Path, tmp_path: Path) -> None:
    config = PruneConfig(
        ratio=0.5,
        calibration=str(text),
        tokens=256,
        seq_len=32,
        sample_tokens=40,
        evaluate="none",
        dtype="float32",
        repair="none",
    )
    report = prune(originals["mixtral"], tmp_path / "out", config)
    assert report.removed_share == pytest.approx(13 / 27) and report.perplexity_after is None
    assert report.verification is not None and report.verification.logits_error < 1e-5
    expected = masked_reference(originals["mixtral"], plan_of(tmp_path / "out"))
    assert_close(logits(load(tmp_path / "out")), expected)


def test_out_may_be_an_empty_working_folder(
    originals: dict[str, Path], tmp_path: Path, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run(originals["mixtral"], Path("."))
    assert {path.name for path in tmp_path.iterdir()} == {"here", "here.work"}
    assert_close(logits(load(tmp_path / "here")), masked_reference(originals["mixtral"], plan_of(tmp_path / "here")))


@pytest.mark.parametrize("again", BUDGETS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_pruning_a_pruned_model(
    budget: str,
    again: str,
    originals: dict[str, Path],
    outputs: Callable[[str, str], Path],
    tmp_path: Path,
    run: Callable[..., Path],
) -> None:
    once = outputs("qwen3_moe", budget)
    counts = {layer.layer: len(layer.kept) for layer in plan_of(once).layers}
    twice = run(once, tmp_path / "twice", "--budget", again, "--ratio", "0.2")
    first, second = plan_of(once), plan_of(twice)
    assert {layer.layer: layer.num_experts for layer in second.layers} == counts
    assert any(layer.dropped for layer in second.layers)
    assert (twice / "modeling_cprune.py").exists() == (not second.uniform)
    assert ("auto_map" in json.loads((twice / "config.json").read_text())) == (not second.uniform)
    assert_close(logits(load(twice)), masked_reference(originals["qwen3_moe"], composed(first, second)))


def composed(first: PrunePlan, second: PrunePlan) -> PrunePlan:
    """The plan that keeps of the first original what is left after both."""
    layers = []
    for layer in first.layers:
        kept = tuple(layer.kept[expert] for expert in second[layer.layer].kept)
        layers.append(dataclasses.replace(layer, kept=kept, stand_in=(kept[0],) * layer.num_experts))
    return dataclasses.replace(first, layers=tuple(layers))


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


def test_command_lines_as_processes(originals: dict[str, Path], text: Path, tmp_path: Path) -> None:
    options = [*SHORT, "--calibration", str(text), "--evaluate", str(text), "--budget", "uniform"]
    for number, command in enumerate((["cprune.run"], ["cprune", "run"])):
        out = tmp_path / str(number)
        done = subprocess.run(
            [sys.executable, "-m", *command, originals["olmoe"], out, *options],
            capture_output=True,
            text=True,
            env=ONE_THREAD,
        )
        assert done.returncode == 0, done.stderr
        assert "perplexity" in done.stdout and "verified" in done.stdout and "Traceback" not in done.stderr
    assert weights(tmp_path / "0") == weights(tmp_path / "1")
    help_text = subprocess.run(
        [sys.executable, "-m", "cprune", "--help"], capture_output=True, text=True, env=ONE_THREAD
    ).stdout
    assert all(name in help_text for name in ("run", "inspect", "plan", "apply", "verify", "evaluate"))


# Repair


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


VLLM = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    engine = LLM(model=sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=128)
    options = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    (answer,) = engine.generate([{"prompt_token_ids": list(range(5, 21))}], options)
    print("TOKENS", json.dumps(list(answer.outputs[0].token_ids)))
"""


def test_vllm_loads_a_uniform_output(tmp_path: Path, run: Callable[..., Path]) -> None:
    python = os.environ.get("CPRUNE_VLLM_PYTHON", "")
    if not python or subprocess.run([python, "-c", "import vllm"], capture_output=True).returncode:
        pytest.skip("CPRUNE_VLLM_PYTHON names no interpreter that has vllm")
    layout = {"hidden_size": 64, "head_dim": 32, "moe_intermediate_size": 32, "dtype": "bfloat16"}
    model = write_tiny("qwen3_moe", tmp_path / "model", **layout)
    out = run(model, tmp_path / "out", "--budget", "uniform")
    done = subprocess.run(
        [python, "-c", VLLM, out],
        capture_output=True,
        text=True,
        env={**ONE_THREAD, "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    tokens = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("TOKENS "))[7:])
    compact = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    with torch.no_grad():
        first = compact(torch.arange(5, 21).unsqueeze(0)).logits[0, -1].float()
    assert (
        len(tokens) == 8 and first.max() - first[tokens[0]] <= 2.0**-6 * first.abs().max()
    )  # a few bfloat16 roundings


TRANSFORMERS_4 = """
import sys, torch
from transformers import AutoModelForCausalLM
options = {"trust_remote_code": True} if sys.argv[2] == "global" else {}
model, info = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], torch_dtype=torch.float32, output_loading_info=True, **options
)
assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]), info
with torch.no_grad():
    torch.save(model(torch.arange(5, 45).unsqueeze(0)).logits, sys.argv[3])
"""


@pytest.mark.parametrize("budget", ["uniform", "global"])
def test_transformers_4_loads_outputs(outputs: Callable[[str, str], Path], budget: str, tmp_path: Path) -> None:
    python = os.environ.get("CPRUNE_TRANSFORMERS4_PYTHON", "")
    check = "import transformers; assert transformers.__version__.startswith('4.5')"
    if not python or subprocess.run([python, "-c", check], capture_output=True).returncode:
        pytest.skip("CPRUNE_TRANSFORMERS4_PYTHON names no interpreter that has transformers 4.5x")
    out, file = outputs("qwen3_moe", budget), tmp_path / "logits.pt"
    command = [python, "-c", TRANSFORMERS_4, out, budget, file]
    done = subprocess.run(command, capture_output=True, text=True, env={**ONE_THREAD, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-4000:]
    with torch.no_grad():
        expected = load(out, dtype=torch.float32)(torch.arange(5, 45).unsqueeze(0)).logits
    assert (torch.load(file) - expected).abs().max() <= 2.0**-16 * expected.abs().max()
