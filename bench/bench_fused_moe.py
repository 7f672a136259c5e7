"""The routed experts of a layer with their statistics: the native operator against torch's linears, expert by expert.

python bench/bench_fused_moe.py [--tokens 4096] [--repeats 7]

`linears only` is the matrix products of the second, on inputs gathered beforehand: what the library's kernels reach.
GFLOP/s counts 6 T K H I, wall time; repeats alternate between the three; medians. Uniform routing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import save_rows
from torch import Tensor
from torch.nn import functional as F

from cprune_kernels import backend
from cprune_kernels.fused_moe import MoEObservation, moe_observe

SHAPES = {"bench model": (64, 8, 1024, 512), "OLMoE": (64, 8, 2048, 1024)}  # E, K, H, I


@dataclass(frozen=True)
class Layer:
    hidden: Tensor  # [T, H]
    index: Tensor  # [T, K]
    gates: Tensor  # [T, K]
    gate_up: Tensor  # [E, 2 I, H]
    down: Tensor  # [E, H, I]


def random_layer(tokens: int, experts: int, top_k: int, hidden: int, inner: int) -> Layer:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * std).bfloat16()

    gates, index = torch.rand(tokens, experts, generator=generator).topk(top_k)
    return Layer(
        normal(tokens, hidden),
        index,
        gates.softmax(-1),
        normal(experts, 2 * inner, hidden, std=hidden**-0.5),
        normal(experts, hidden, inner, std=inner**-0.5),
    )


def mlp(layer: Layer, expert: int, x: Tensor) -> Tensor:
    gate, up = F.linear(x, layer.gate_up[expert]).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, layer.down[expert])


def by_expert(layer: Layer) -> MoEObservation:
    """The same numbers with torch operations, statistics from the outputs in bf16."""
    experts, width = layer.down.shape[:2]
    out, norms = torch.zeros(layer.hidden.shape), torch.zeros(layer.index.shape)
    high, low, sums = torch.full((experts,), -torch.inf), torch.full((experts,), torch.inf), torch.zeros(experts, width)
    pairs = torch.argsort(layer.index.flatten(), stable=True)
    counts = torch.bincount(layer.index.flatten(), minlength=experts).tolist()
    for expert, pair in enumerate(pairs.split(counts)):
        token, slot = pair // layer.index.shape[1], pair % layer.index.shape[1]
        y = mlp(layer, expert, layer.hidden[token]).float()
        norms[token, slot] = torch.linalg.vector_norm(y, dim=1)
        low[expert], high[expert] = y.aminmax()
        sums[expert] = y.sum(0)
        out.index_add_(0, token, y.mul_(layer.gates[token, slot].unsqueeze(1)))
    return MoEObservation(out, norms, high, low, sums)


def linears(layer: Layer) -> Callable[[], None]:
    inputs = [layer.hidden[(layer.index == e).nonzero()[:, 0]] for e in range(len(layer.down))]
    inner = [x.new_ones(len(x), layer.down.shape[2]) for x in inputs]

    def run() -> None:
        for expert, (x, h) in enumerate(zip(inputs, inner, strict=True)):
            F.linear(x, layer.gate_up[expert]), F.linear(h, layer.down[expert])

    return run


def check(got: MoEObservation, expected: MoEObservation) -> None:
    """No timing of a kernel that is wrong: the two differ by the rounding of bf16 alone."""
    for name, value in expected._asdict().items():
        error = (getattr(got, name) - value).abs().max() / value.abs().max()
        assert error < 2.0**-5, (name, float(error))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    rows = []
    for name, (experts, top_k, hidden, inner) in SHAPES.items():
        layer = random_layer(args.tokens, experts, top_k, hidden, inner)
        tensors = (layer.hidden, layer.index, layer.gates, layer.gate_up, layer.down)
        check(moe_observe(*tensors), by_expert(layer))
        ways: dict[str, Callable[[], object]] = {
            f"moe_observe ({backend()})": lambda tensors=tensors: moe_observe(*tensors),
            "torch by expert": lambda layer=layer: by_expert(layer),
            "linears only": linears(layer),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(args.repeats + 1):
            for way, run in ways.items():
                start = time.perf_counter()
                run()
                if repeat:  # the first compiles and warms
                    seconds[way].append(time.perf_counter() - start)
        flop = 6 * args.tokens * top_k * hidden * inner
        first = statistics.median(next(iter(seconds.values())))
        for way, taken in seconds.items():
            median = statistics.median(taken)
            rows.append(
                {
                    "shape": name,
                    "E, K, H, I": f"{experts}, {top_k}, {hidden}, {inner}",
                    "T": args.tokens,
                    "threads": torch.get_num_threads(),
                    "what": way,
                    "ms": median * 1e3,
                    "GFLOP/s": flop / median / 1e9,
                    "x native": median / first,
                }
            )
    save_rows("fused_moe", rows)


if __name__ == "__main__":
    main()
