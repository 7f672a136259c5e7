"""The whole job on a random Qwen3-MoE of 1.25 B parameters: seconds and peak memory, against a dense observer.

python bench/bench_run.py [--folder DIR] [--repeats 3] [--reap CHECKOUT --reap-python PYTHON]

The model (12 layers, 64 experts, top-8, H = 1024, I = 512, bf16, 13 shards) is written on first use. `cprune` rows are
`python -m cprune.run` at ratio 0.25 on 8192 tokens, from process start to exit. The `dense observer` does what public
observers do, in this file's own words: the whole model in memory through transformers, every expert on every token,
norms from the dense [E, T, H] outputs of a layer; it only observes. With a checkout of CerebrasResearch/reap and the
Python of an environment with transformers 4.5x, on which that runs, its own observer takes its place, on the same
number of tokens, with pruning and save_pretrained after it. `measuring s` is the part of it in which experts are
measured: all forward passes of the others, without loading; of ours the whole stage, with all reading of weights. Jobs
alternate, each with nothing left to be written by the one before; medians of the repeats. Rows go to
results/run-I.json, for our instructions I.
"""

from __future__ import annotations

import argparse
import compileall
import os
import re
import statistics
import tempfile
from pathlib import Path

from common import measure, python, save_rows, write_random_qwen3_moe

import cprune
import cprune_kernels
from cprune_kernels import backend

OBSERVER = """
import sys, time, torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
tokens = torch.randint(0, 2000, (16, 512), generator=torch.Generator().manual_seed(0))
sums = []
def observe(module, args, output):
    x = args[0].reshape(-1, args[0].shape[-1])
    experts, (_, weights, index) = module.experts, module.gate(x)
    dense = torch.empty(experts.num_experts, *x.shape)
    for e in range(experts.num_experts):
        gate, up = F.linear(x, experts.gate_up_proj[e]).chunk(2, -1)
        dense[e] = F.linear(experts.act_fn(gate) * up, experts.down_proj[e])
    norms = dense.norm(dim=-1)
    gates = torch.zeros(len(x), experts.num_experts).scatter_(1, index, weights.float())
    sums.append((norms.T * gates).sum(0) / (gates > 0).sum(0).clamp_min(1))
for layer in model.model.layers:
    layer.mlp.register_forward_hook(observe)
begin = time.monotonic()
with torch.inference_mode():
    for rows in tokens.split(4):
        model.model(input_ids=rows, use_cache=False)
print("measure", time.monotonic() - begin)
"""

REAP = """
import sys, time, torch
sys.path.insert(0, sys.argv[2] + "/src")
from reap.observer import MoETransformerObserver, Qwen3MoEObserverHookConfig
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype="auto")
observer = MoETransformerObserver(model, Qwen3MoEObserverHookConfig(record_pruning_metrics_only=True))
tokens = torch.randint(0, 2000, (16, 512), generator=torch.Generator().manual_seed(0))
begin = time.monotonic()
with torch.no_grad():
    for rows in tokens.split(4):
        model(rows)
print("measure", time.monotonic() - begin)
for number, state in observer.report_state().items():
    block = model.model.layers[number].mlp
    kept = state["reap"].topk(48).indices.sort().values
    block.experts = torch.nn.ModuleList([block.experts[i] for i in kept.tolist()])
    block.gate.weight.data = block.gate.weight.data[kept]
model.config.num_experts = 48
model.save_pretrained(sys.argv[3])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "cprune-bench-1.25b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reap", type=Path)
    parser.add_argument("--reap-python", type=Path)
    args = parser.parse_args()
    for package in (cprune, cprune_kernels):  # as pip does where it installs one
        compileall.compile_dir(Path(package.__file__).parent, quiet=1)
    model = write_random_qwen3_moe(args.folder)
    job = python("-m", "cprune.run", model, "{out}", "--ratio", "0.25", "--tokens", "8192", "--budget", "uniform")
    bare = ["--repair", "none", "--evaluate", "none"]
    commands = {
        "cprune, measure to write": [*job, *bare, "--no-verify"],
        "cprune, with verify": [*job, *bare],
        "cprune, with repair and verify": [*job, "--evaluate", "none"],
        "cprune, all by default": job,
    }
    if args.reap is None:
        commands["dense observer"] = python("-c", OBSERVER, model)
    else:
        commands["REAP, observe to save"] = [args.reap_python, "-c", REAP, model, args.reap, "{out}"]
    baseline = list(commands)[-1]
    results: dict[str, list[tuple[float, float, int]]] = {name: [] for name in commands}
    for _ in range(args.repeats):
        for name, command in commands.items():
            with tempfile.TemporaryDirectory(dir=args.folder.parent) as folder:
                os.sync()  # or it waits for what the job before it wrote
                measured = measure([str(part).replace("{out}", f"{folder}/out") for part in command])
            stage = re.search(r"measure ([\d.]+)", measured.output)
            assert stage, measured.output
            results[name].append((measured.seconds, float(stage[1]), measured.peak_bytes))
    medians = {
        name: [statistics.median(column) for column in zip(*values, strict=True)] for name, values in results.items()
    }
    other, (slowest, watching, _) = baseline.split(",")[0], medians[baseline]
    save_rows(
        f"run-{backend()}",
        [
            {
                "job": name,
                "seconds": round(seconds, 2),
                "measuring s": round(measuring, 2),
                "peak GB": round(max(peak for _, _, peak in results[name]) / 1e9, 3),
                f"x {other}": round(slowest / seconds, 2),
                f"x {other}, measuring": round(watching / measuring, 2),
            }
            for name, (seconds, measuring, _) in medians.items()
        ],
    )


if __name__ == "__main__":
    main()
