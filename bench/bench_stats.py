"""The statistics of calibration: `expert_statistics` of routed pairs, on a GPU also the reduction of experts' outputs.

python bench/bench_stats.py [--model qwen3-30b-a3b,deepseek-v3] [--tokens 256,4096,16384] [--repeats 50]

The alternatives are the same in torch operations: one-hot products and index_add; segment_reduce in float32.
`% of floor` is the time that the bytes of arguments and results take at the GPU's bandwidth. `% of forward` is what
these bytes are of those that the forward of the experts moves in bfloat16 (weights of all experts, inputs, activations,
outputs); of the reduction of outputs it is large, since that reads every output once more. Nothing is multiplied, hence
no TFLOP/s. Without a GPU `expert_statistics` runs on the CPU, where it is torch operations: it shows that the bench
works, no more. Medians; the alternatives run on the same tensors. Rows go to results/stats.csv.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from common import ROWS, machine
from torch import Tensor

from cprune_kernels import picker
from cprune_kernels.stats import ExpertSums, expert_statistics, expert_statistics_reference


@dataclass(frozen=True)
class Shape:
    experts: int
    top_k: int
    hidden: int
    inner: int

    def forward_bytes(self, tokens: int) -> int:
        """Of the experts forward in bfloat16: weights, hidden states in and out, activations and outputs twice."""
        pairs = tokens * self.top_k
        weights = min(self.experts, pairs) * 3 * self.hidden * self.inner
        return 2 * (weights + 2 * tokens * self.hidden + 2 * pairs * (self.hidden + self.inner))


MODELS = {
    "mixtral-8x7b": Shape(8, 2, 4096, 14336),
    "qwen3-30b-a3b": Shape(128, 8, 2048, 768),
    "deepseek-v2-lite": Shape(64, 6, 2048, 1408),
    "deepseek-v3": Shape(256, 8, 7168, 2048),
}


@dataclass(frozen=True)
class Work:
    """One operation on one input, and what it is compared with."""

    name: str
    ours: Callable[[], Sequence[Tensor]]
    alternative: Callable[[], object]
    expected: Sequence[Tensor]
    nbytes: int


def composed(index: Tensor, gates: Tensor, norms: Tensor, scale: Tensor, valid: Tensor, experts: int) -> ExpertSums:
    """The sums by one-hot products, as calibration code on a GPU would write them; every slot has an expert."""
    index, gates, norms = index[valid].long(), gates[valid].double(), norms[valid].double()
    gated = gates * norms
    fields = (gates, gated, gated.square(), gated / scale[valid].double().unsqueeze(1), norms, norms.square())
    zeros = gates.new_zeros(experts)
    sums = [zeros.index_add(0, index.flatten(), field.flatten()) for field in fields]
    chosen = torch.zeros(len(index), experts, device=index.device).scatter_(1, index, 1.0)
    return ExpertSums(
        torch.bincount(index.flatten(), minlength=experts),
        *sums,
        zeros.scatter_reduce(0, index.flatten(), norms.flatten(), "amax"),
        (chosen.T @ chosen).long(),
    )


def works(shape: Shape, tokens: int, device: torch.device) -> list[Work]:
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(tokens, shape.experts, generator=generator).topk(shape.top_k).indices.int().to(device)
    gates, norms = (torch.rand(tokens, shape.top_k, generator=generator).to(device) for _ in range(2))
    scale = (torch.rand(tokens, generator=generator) + 1).to(device)
    valid = (torch.rand(tokens, generator=generator) < 0.9).to(device)
    inputs = index, gates, norms, scale, valid
    expected = expert_statistics_reference(*inputs, shape.experts)
    found = [
        Work(
            "expert_statistics",
            lambda: expert_statistics(*inputs, shape.experts),
            lambda: composed(*inputs, shape.experts),
            expected,
            sum(x.nbytes for x in (*inputs, *expected)),
        )
    ]
    if device.type == "cuda":
        found.append(_outputs(shape, index, valid))
    return found


def _outputs(shape: Shape, index: Tensor, valid: Tensor) -> Work:
    from cprune_kernels.output_stats import expert_output_launches, expert_output_reference
    from cprune_kernels.routing import group_tokens

    rows = torch.randn(index.numel(), shape.hidden, device=index.device).bfloat16()
    routed = group_tokens(index, shape.experts, 128)
    expected = expert_output_reference(rows, routed.order, routed.offsets, valid, shape.top_k)
    launches, out = expert_output_launches(rows, routed, valid, shape.experts, picker.arch_of(index.device))

    def ours() -> Sequence[Tensor]:
        for launch in launches:
            launch.run()
        return out

    def by_segment() -> None:
        kept = valid[routed.order.long() // shape.top_k]
        wide = torch.where(kept.unsqueeze(1), rows.float(), 0.0)
        torch.segment_reduce(wide, "sum", offsets=routed.offsets.long())
        for kind, worst in (("amax", -torch.inf), ("amin", torch.inf)):
            extremes = getattr(rows, kind)(1).float()
            torch.segment_reduce(torch.where(kept, extremes, worst), kind[1:], offsets=routed.offsets.long())

    nbytes = sum(x.nbytes for x in (rows, routed.order, routed.offsets, valid, *expected))
    return Work("expert outputs", ours, by_segment, expected, nbytes)


def check(work: Work) -> None:
    """No timing of a kernel that is wrong: integers are equal, sums but for the rounding of float32."""
    for place, (got, expected) in enumerate(zip(work.ours(), work.expected, strict=True)):
        if expected.is_floating_point():
            error = (got - expected).abs()[got != expected].max().item() if bool((got != expected).any()) else 0.0
            same = error <= 2.0**-16 * expected.abs().max().item()
        else:
            same = torch.equal(got, expected)
        if not same:
            raise SystemExit(f"{work.name} differs from its reference in result {place}; nothing was timed")


def microseconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    taken = []
    for repeat in range(repeats + 3):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            elapsed = start.elapsed_time(end) * 1e3
        else:
            begin = time.perf_counter()
            run()
            elapsed = (time.perf_counter() - begin) * 1e6
        if repeat >= 3:  # the first compile and warm
            taken.append(elapsed)
    return statistics.median(taken)


def rows(models: Iterable[str], tokens: Iterable[int], repeats: int, device: torch.device) -> list[dict[str, object]]:
    found = []
    for model in models:
        for count in tokens:
            for work in works(MODELS[model], count, device):
                check(work)
                ours = microseconds(work.ours, repeats, device)
                floor = None
                if device.type == "cuda":
                    floor = work.nbytes / picker.arch_of(device).bandwidth * 1e6
                found.append(
                    {
                        "model": model,
                        "T": count,
                        "what": work.name,
                        "us": round(ours, 2),
                        "GB/s": round(work.nbytes / ours / 1e3, 3),
                        "% of floor": "" if floor is None else round(100 * floor / ours, 2),
                        "% of forward": round(100 * work.nbytes / MODELS[model].forward_bytes(count), 3),
                        "x best alternative": round(microseconds(work.alternative, repeats, device) / ours, 2),
                    }
                )
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=",".join(MODELS))
    parser.add_argument("--tokens", default="256,4096,16384")
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    models = args.model.split(",")
    if unknown := sorted(set(models) - set(MODELS)):
        parser.error(f"--model must name some of {', '.join(MODELS)}, got {', '.join(unknown)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("No GPU: these are times of torch operations on the CPU, not of the kernels.")
    found = rows(models, [int(count) for count in args.tokens.split(",")], args.repeats, device)
    where = {key: value for key, value in machine().items() if key in ("device", "cpu", "torch", "date")}
    ROWS.mkdir(exist_ok=True)
    with (ROWS / "stats.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*found[0], *where])
        writer.writeheader()
        writer.writerows({**row, **where} for row in found)
    print("  ".join(f"{name:>18}" for name in found[0]))
    for row in found:
        print("  ".join(f"{value!s:>18}" for value in row.values()))


if __name__ == "__main__":
    main()
