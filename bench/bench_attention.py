"""Causal attention on a CPU, as the walk through a model asks for it, against torch's own.

python bench/bench_attention.py [--shapes 8x512,2x2048,1x4096] [--depth 64] [--repeats 9]

A shape is sequences x tokens, in bf16, with 16 heads that share 8 of keys and values. `x torch` is the time of
scaled_dot_product_attention over ours, `x error` our error against float64 over its. GFLOP/s counts the products of
what a token sees, 2 B heads S^2 D. Timed in turn, in changing order; medians. Nothing is timed unless our error is
within twice that of torch. Rows go to results/attention-I.json, for our instructions I.
"""

from __future__ import annotations

import argparse
import sys

import torch
from common import save_rows
from timing import medians
from torch import Tensor
from torch.nn import functional as F

from cprune_kernels import backend
from cprune_kernels.attention import attends_natively, causal_attention, causal_attention_reference

HEADS, SHARED = 16, 8
SECONDS = 20.0  # for the repeats of a row


def row_of(batch: int, tokens: int, depth: int, repeats: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((HEADS, depth), (SHARED, depth), (SHARED, depth))
    drawn = [torch.randn(batch, tokens, *size, generator=generator).transpose(1, 2).bfloat16() for size in sizes]
    ways = {
        "ours": lambda: causal_attention(*drawn),
        "torch": lambda: F.scaled_dot_product_attention(*drawn, is_causal=True, enable_gqa=True).transpose(1, 2),
    }
    expected = causal_attention_reference(*(x[:1].double() for x in drawn))
    errors = {way: _error(run()[:1], expected) for way, run in ways.items()}
    if errors["ours"] > 2 * errors["torch"]:
        sys.exit(f"nothing was timed: the error is {errors['ours']:.2g}, that of torch {errors['torch']:.2g}")
    times = medians(ways, repeats, SECONDS)
    row: dict[str, object] = {"B": batch, "S": tokens, "D": depth, "x torch": times["torch"] / times["ours"]}
    row |= {"x error": errors["ours"] / errors["torch"]}
    row |= {f"{way} ms": seconds * 1e3 for way, seconds in times.items()}
    row |= {"GFLOP/s": 2 * batch * HEADS * tokens**2 * depth / times["ours"] / 1e9}
    return row | {"native": attends_natively(*drawn), "threads": torch.get_num_threads()}


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="8x512,2x2048,1x4096")
    parser.add_argument("--depth", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    save_rows(f"attention-{backend()}", [row_of(*shape, args.depth, args.repeats) for shape in shapes])


if __name__ == "__main__":
    main()
