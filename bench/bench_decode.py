"""Decoding a whole model on a CPU with `experts_implementation="cprune"` against what transformers has.

python bench/bench_decode.py [--models DIR,...] [--batches 1,8,64] [--dtypes bfloat16,float32] [--prompt 16]
    [--tokens 16] [--repeats 15] [--seconds 20]

A greedy step with a cache, the mean over --tokens of them after a prompt of random tokens: the whole model, attention,
norms and head too. All ways of a row are timed in turn, in changing order; medians. `x transformers` is the best of
eager, grouped_mm and batched_mm over ours, below 1 where ours loses. Nothing is timed unless the logits of the prompt
agree with eager's. Rows go to results/decode-I.json, for our instructions I. By default the bundled model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import ROOT, save_rows
from timing import medians
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import cprune.hf  # noqa: F401  registers the implementation
from cprune_kernels import backend

WAYS = ("cprune", "eager", "grouped_mm", "batched_mm")
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 1e-4}  # of the norm of the logits


def decode(model: PreTrainedModel, way: str, prompt: Tensor, tokens: int) -> Tensor:
    """The logits of the prompt's last token [batch, vocabulary], and `tokens` greedy steps after it."""
    model.set_experts_implementation(way)
    out = model(prompt, use_cache=True, logits_to_keep=1)
    first = out.logits[:, -1]
    for _ in range(tokens):
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    return first


def row_of(model: PreTrainedModel, name: str, prompt: Tensor, args: argparse.Namespace) -> dict[str, object]:
    got, expected = (decode(model, way, prompt, 0).double() for way in ("cprune", "eager"))
    error = float((got - expected).norm() / expected.norm())
    if not error <= TOLERANCE[model.dtype]:
        raise SystemExit(f"cprune's logits of {name} differ from eager's by {error:.2g}; nothing was timed")
    ways = {way: lambda way=way: decode(model, way, prompt, args.tokens) for way in WAYS}
    prompts = {f"{way}, prompt": lambda way=way: decode(model, way, prompt, 0) for way in WAYS}
    times = medians(ways | prompts, args.repeats, args.seconds)
    steps = {way: (times[way] - times[f"{way}, prompt"]) / args.tokens for way in WAYS}
    best = min(WAYS[1:], key=steps.__getitem__)
    row: dict[str, object] = {"model": name, "dtype": str(model.dtype).removeprefix("torch."), "batch": len(prompt)}
    row |= {"x transformers": steps[best] / steps["cprune"], "best transformers": best}
    row |= {f"{way} ms": seconds * 1e3 for way, seconds in steps.items()}
    return row | {"difference": error, "instructions": backend(), "threads": torch.get_num_threads()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=str(ROOT / "examples" / "tiny-moe"), help="folders of checkpoints")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=16, help="tokens decoded")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=20.0, help="for the repeats of a row")
    args = parser.parse_args()
    rows = []
    for folder in args.models.split(","):
        for dtype in args.dtypes.split(","):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
            for batch in map(int, args.batches.split(",")):
                generator = torch.Generator().manual_seed(batch)
                prompt = torch.randint(1, model.config.vocab_size, (batch, args.prompt), generator=generator)
                rows.append(row_of(model, Path(folder).name, prompt, args))
    save_rows(f"decode-{backend()}", rows)


if __name__ == "__main__":
    main()
