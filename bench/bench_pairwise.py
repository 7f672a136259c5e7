"""The Gram of a layer's experts, whole and in column windows, and linear CKA: against torch and against pairs.

python bench/bench_pairwise.py [--model deepseek-v3,qwen3-30b-a3b] [--fraction 1.0] [--repeats 7] [--dtype bfloat16]

On a GPU the shapes are the models' own and times come from CUDA events; on a CPU the columns are cut down to 1/512 and
the rows say so: they time the CPU. `% of floor` is the time of one read of x at the memory's speed over the time taken,
on GPUs that the model of the picker knows. Every way is compared with sums in float64 over a slice before anything is
timed: one that is wrong ends the bench. Repeats alternate between the ways; medians. Rows go to results/pairwise.csv.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from timing import MODELS, here, names, save_csv, seconds
from torch import Tensor

from cprune_kernels.pairwise import CHAIN, GramAccumulator, pairwise_cka, pairwise_gram
from cprune_kernels.picker import arch_of

CPU_FRACTION = 1 / 512
PAIRS = 64  # experts up to which the pairs are timed one after the other
WINDOWS = 8
Way = Callable[[Tensor], Tensor]


def windows(x: Tensor) -> Tensor:
    total = GramAccumulator(len(x), x.device, x.dtype)
    width = max(4096, x.shape[1] // WINDOWS // 4096 * 4096)
    for window in x.split(width, dim=1):
        total.add(window)
    return total.result()


def library(x: Tensor) -> Tensor:
    """One product of the library: a float32 chain as long as the row, and for halves a rounded result."""
    return x @ x.T


def library_windows(x: Tensor) -> Tensor:
    """The library's product of a float32 copy, in windows of the length that the kernel sums in float32."""
    gram = x.new_zeros(len(x), len(x), dtype=torch.float64)
    for window in x.split(CHAIN, dim=1):
        gram += window.float() @ window.float().T
    return gram


def pairs(x: Tensor) -> Tensor:
    """A dot product for each pair, as similarity is commonly written: each row is read E times."""
    gram = x.new_zeros(len(x), len(x), dtype=torch.float32)
    for i in range(len(x)):
        for j in range(i, len(x)):
            gram[i, j] = gram[j, i] = torch.dot(x[i].float(), x[j].float())
    return gram


def check(name: str, got: Tensor, exact: Tensor, tolerance: float) -> None:
    """No timing of a way that is wrong."""
    norm = exact.diagonal().sqrt()
    error = ((got.double() - exact) / torch.outer(norm, norm)).abs().max().item()
    if not error <= tolerance:
        raise SystemExit(f"{name} is wrong by {error:.2g} of the norms, at most {tolerance:.2g}: nothing was timed")


def rows_of(model: str, x: Tensor, ways: dict[str, Way], repeats: int) -> list[dict[str, object]]:
    part = x[:, :CHAIN].contiguous()
    exact = part.double() @ part.double().T
    for name, way in ways.items():  # float32 sums; the library rounds its result to the type of x
        rounded = torch.finfo(x.dtype).eps if name == "library" else 0.0
        check(name, way(part), exact, CHAIN * torch.finfo(torch.float32).eps / 8 + rounded)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            once = seconds(lambda way=way: way(x), x.device)
            if repeat:  # the first compiles and warms
                taken[name].append(once)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    floor = x.nbytes / arch_of(x.device).bandwidth if x.device.type == "cuda" else None
    flops = len(x) * (len(x) + 1) * x.shape[1]
    return [
        {
            "model": model,
            "E": len(x),
            "P": x.shape[1],
            "what": name,
            "us": median * 1e6,
            "TFLOP/s": flops / median / 1e12,
            "GB/s": x.nbytes / median / 1e9,
            "% of floor": 100 * floor / median if floor else "",
            "x best alternative": min(t for other, t in medians.items() if other != name) / median,
        }
        for name, median in medians.items()
    ]


def cka_rows(experts: int, samples: int, hidden: int, device: torch.device, repeats: int) -> list[dict[str, object]]:
    y = torch.randn(experts, samples, hidden, device=device).bfloat16()
    centred = y.double() - y.double().mean(1, keepdim=True)
    kernels = (centred @ centred.mT).flatten(1)
    exact = kernels @ kernels.T
    norm = exact.diagonal().sqrt()
    error = (pairwise_cka(y) - exact / torch.outer(norm, norm)).abs().max().item()
    if not error <= (samples + hidden) * torch.finfo(torch.float32).eps:
        raise SystemExit(f"pairwise_cka is wrong by {error:.2g}: nothing was timed")
    taken = statistics.median(seconds(lambda: pairwise_cka(y), device) for _ in range(repeats))
    flops = experts * (samples + 1) * samples * hidden + experts * (experts + 1) * samples**2
    return [
        {
            "model": f"outputs [{experts}, {samples}, {hidden}]",
            "E": experts,
            "P": samples**2,
            "what": "pairwise_cka",
            "us": taken * 1e6,
            "TFLOP/s": flops / taken / 1e12,
            "GB/s": y.nbytes / taken / 1e9,
            "% of floor": "",
            "x best alternative": "",
        }
    ]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mixtral-8x7b,deepseek-v2-lite,qwen3-30b-a3b,deepseek-v3")
    parser.add_argument("--fraction", type=float, help="of the columns; by default all of them, and 1/512 on a CPU")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    models = names(parser, "--model", args.model, MODELS)
    device = here("the CPU on few columns")
    fraction = args.fraction or (1.0 if device.type == "cuda" else CPU_FRACTION)
    rows: list[dict[str, object]] = []
    for model in models:
        experts, whole = MODELS[model].experts, 3 * MODELS[model].hidden * MODELS[model].inner
        length = max(64, int(whole * fraction) // 64 * 64)
        x = torch.randn(experts, length, device=device, dtype=getattr(torch, args.dtype))
        ways: dict[str, Way] = {
            "pairwise_gram": pairwise_gram,
            f"{WINDOWS} windows": windows,
            "library": library,
            "library, float32 windows": library_windows,
        }
        if experts <= PAIRS:
            ways["pairs"] = pairs
        rows += rows_of(model, x, ways, args.repeats)
    samples, hidden = (512, 2048) if device.type == "cuda" else (48, 256)
    rows += cka_rows(64, samples, hidden, device, args.repeats)
    save_csv("pairwise", rows)


if __name__ == "__main__":
    main()
