"""Outputs in other libraries, where interpreters that have them are named: vLLM and transformers 4."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cprune import load
from tests.pruned import ONE_THREAD
from tests.tiny import write_tiny

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
