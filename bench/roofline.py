"""What the kernels would take on a GPU, by analysis: the cost model of cprune_kernels/cost.py with the picker's tiles.

python bench/roofline.py [--arch H100] [--tokens 1,16,64,256,1024,4096,16384] [--models qwen3-30b-a3b,...]

No row is measured. The floor moves each byte once, at full bandwidth, or does each flop once, at the rate of a good
dense kernel, without padding or launches. "64 of 128" is a model whose experts were merged in pairs behind the router
as it was: a token that chose both of a pair visits their merger once. Routing is uniform. The rows of `other` hold a
time that another project published for its own kernel on the same shape: the model should come near it, or below.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from math import comb

import torch
from common import save_rows
from timing import FORWARD, MODELS

from cprune_kernels.cost import floor, forward_cost
from cprune_kernels.gpu import A100, B200, H100, Arch, l2_bandwidth, launch_seconds
from cprune_kernels.gram_launches import gram_seconds, gram_traffic
from cprune_kernels.load import Load, uniform_load
from cprune_kernels.picker import MoEShape, describe, pick_gram, pick_moe

TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
GRAM_GOAL, GRAM_GOALS = 1.05, ("deepseek-v3", "qwen3-30b-a3b")
PUBLISHED = (  # H, I, experts, top-k, T, us on one H100
    ("vLLM #24700", 4096, 7168, 8, 2, 1, 144.0),
    ("vLLM #24700", 4096, 7168, 8, 2, 16, 471.0),
    ("vLLM #24700", 4096, 7168, 8, 2, 256, 537.0),
    ("vLLM #24700", 4096, 7168, 8, 2, 1024, 834.0),
    ("vLLM #24700", 4096, 7168, 8, 2, 1536, 1123.0),
    ("Liger #1294", 2048, 768, 128, 8, 32768, 6 * 32768 * 8 * 2048 * 768 / 523e12 * 1e6),
)


def merged_load(experts: int, top_k: int, tokens: int) -> Load:
    """Rows of experts merged in pairs, where a token takes top_k of the `experts` there were."""
    share = 1 - comb(experts - 2, top_k) / comb(experts, top_k)
    return uniform_load(experts // 2, tokens, share)


def goal_of(tokens: int) -> float | None:
    if tokens <= 256:
        return 1.15
    return 1.25 if tokens >= 4096 else None


def forward_row(shape: MoEShape, tokens: int, arch: Arch, load: Load) -> dict[str, object]:
    config = pick_moe(shape, tokens, arch, load)
    cost, least = forward_cost(shape, tokens, arch, config, load), floor(shape, tokens, arch, load)
    goal, ratio = goal_of(tokens), cost.seconds / least.seconds
    return {
        "T": tokens,
        "floor us": least.seconds * 1e6,
        "modelled us": cost.seconds * 1e6,
        "x floor": round(ratio, 3),
        "goal": "" if goal is None else f"{goal}: {'holds' if ratio <= goal else 'missed'}",
        "floor's bound": least.bound,
        "bound": cost.bound,
        **{f"{part.name} us": part.seconds * 1e6 for part in cost.parts},
        "gate_up": describe(config.gate_up),
        "down": describe(config.down),
    }


def forward_rows(models: Sequence[str], tokens: Sequence[int], arch: Arch) -> Iterator[dict[str, object]]:
    for name in models:
        model = MODELS[name]
        experts, top_k = model.experts, model.top_k
        for kept in (experts, experts // 2):
            shape = MoEShape(kept, top_k, model.hidden, model.inner, torch.bfloat16)
            for count in tokens:
                full = uniform_load(experts, count, top_k / experts)
                load = full if kept == experts else merged_load(experts, top_k, count)
                what = {"what": "forward", "model": name, "of": experts, "experts": kept}
                yield what | forward_row(shape, count, arch, load)


def gram_rows(models: Sequence[str], arch: Arch) -> Iterator[dict[str, object]]:
    """All weights of a layer's experts as the rows of a Gram: layer by layer, as a checkpoint is read, and at once."""
    for name in models:
        experts, all_layers = MODELS[name].experts, MODELS[name].layers
        length = 3 * MODELS[name].hidden * MODELS[name].inner
        for layers in (1, all_layers):
            config = pick_gram(experts, length, layers, torch.bfloat16, arch)
            traffic = gram_traffic(experts, length, layers, torch.bfloat16, config)
            calls = all_layers // layers
            work = gram_seconds(traffic, length, layers, config, arch)
            taken = calls * (max(work, traffic.fetched / l2_bandwidth(arch)) + 3 * launch_seconds(arch))
            area = 2 * length * experts * (experts + 1) / 2
            bounds = {"HBM": traffic.read / arch.bandwidth, "tensor core": layers * area / arch.flops}
            times = {
                "HBM": traffic.total / arch.bandwidth,
                "L2": traffic.fetched / l2_bandwidth(arch),
                "tensor core": traffic.flops / arch.flops,
            }
            ratio = taken / (calls * max(bounds.values()))
            goal = name in GRAM_GOALS
            yield {
                "what": "gram",
                "model": name,
                "experts": experts,
                "layers": f"{calls} x {layers}",
                "floor us": calls * max(bounds.values()) * 1e6,
                "modelled us": taken * 1e6,
                "x floor": round(ratio, 3),
                "goal": f"{GRAM_GOAL}: {'holds' if ratio <= GRAM_GOAL else 'missed'}" if goal else "",
                "floor's bound": max(bounds, key=bounds.__getitem__),
                "bound": max(times, key=times.__getitem__),
                "tile": f"{config.blocks} blocks of {config.block}x{config.step}, chunks of {config.chunk}",
            }


def published_rows() -> Iterator[dict[str, object]]:
    for source, hidden, inner, experts, top_k, tokens, microseconds in PUBLISHED:
        shape = MoEShape(experts, top_k, hidden, inner, torch.bfloat16)
        row = forward_row(shape, tokens, H100, uniform_load(experts, tokens, top_k / experts))
        what = {"what": "other", "model": f"{source}: {experts} x {inner}", "of": experts, "experts": experts}
        yield what | row | {"goal": "", "published us": microseconds}


def rows_of(models: Sequence[str], tokens: Sequence[int], arch: Arch) -> Iterator[Mapping[str, object]]:
    yield from forward_rows([name for name in models if name in FORWARD], tokens, arch)
    yield from gram_rows(models, arch)
    if arch == H100:
        yield from published_rows()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=("A100", "H100", "B200"), default="H100")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--models", default=",".join(MODELS))
    args = parser.parse_args(arguments)
    arch = {"A100": A100, "H100": H100, "B200": B200}[args.arch]
    print(
        f"Analysis, not measurement: {arch.name}, {arch.bandwidth / 1e12} TB/s, {arch.flops / 1e12:.0f} TFLOP/s, bf16"
    )
    models = args.models.split(",")
    if unknown := set(models) - set(MODELS):
        sys.exit(f"--models must be among {', '.join(MODELS)}, got {', '.join(sorted(unknown))}")
    save_rows(
        "roofline" if arch == H100 else f"roofline-{arch.name}",
        rows_of(models, [int(count) for count in args.tokens.split(",")], arch),
    )


if __name__ == "__main__":
    main()
