"""The main job through the real command line, on tiny checkpoints of every family."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from cprune import PruneConfig, PrunePlan, load, prune
from cprune.measure.documents import read_documents
from cprune.measure.packing import pack
from tests.pruned import (
    BUDGETS,
    IDS,
    ONE_THREAD,
    SHORT,
    assert_close,
    logits,
    masked_reference,
    plain,
    plan_of,
    share,
    weights,
)
from tests.tiny import FAMILIES, write_tiny

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
