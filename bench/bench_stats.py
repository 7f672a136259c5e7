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
from collections.abc import Iterable, Sequence

import torch
from timing import FORWARD, MODELS, Model, Work, here, names, save_csv
from torch import Tensor

from cprune_kernels import picker
from cprune_kernels.stats import ExpertSums, expert_statistics, expert_statistics_reference


def forward_bytes(model: Model, tokens: int) -> int:
    """Of the experts forward in bfloat16: weights, hidden states in and out, activations and outputs twice."""
    pairs = tokens * model.top_k
    weights = min(model.experts, pairs) * 3 * model.hidden * model.inner
    return 2 * (weights + 2 * tokens * model.hidden + 2 * pairs * (model.hidden + model.inner))


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


def works(model: Model, tokens: int, device: torch.device) -> list[Work]:
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(tokens, model.experts, generator=generator).topk(model.top_k).indices.int().to(device)
    gates, norms = (torch.rand(tokens, model.top_k, generator=generator).to(device) for _ in range(2))
    scale = (torch.rand(tokens, generator=generator) + 1).to(device)
    valid = (torch.rand(tokens, generator=generator) < 0.9).to(device)
    inputs = index, gates, norms, scale, valid
    expected = expert_statistics_reference(*inputs, model.experts)
    found = [
        Work(
            "expert_statistics",
            lambda: expert_statistics(*inputs, model.experts),
            lambda: composed(*inputs, model.experts),
            expected,
            sum(x.nbytes for x in (*inputs, *expected)),
        )
    ]
    if device.type == "cuda":
        found.append(_outputs(model, index, valid))
    return found


def _outputs(model: Model, index: Tensor, valid: Tensor) -> Work:
    from cprune_kernels.output_stats import expert_output_launches, expert_output_reference
    from cprune_kernels.routing import group_tokens

    rows = torch.randn(index.numel(), model.hidden, device=index.device).bfloat16()
    routed = group_tokens(index, model.experts, 128)
    expected = expert_output_reference(rows, routed.order, routed.offsets, valid, model.top_k)
    launches, out = expert_output_launches(rows, routed, valid, model.experts, picker.arch_of(index.device))

    def ours() -> Sequence[Tensor]:
        for launch in launches:
            launch.run()
        return out

    def by_segment() -> None:
        kept = valid[routed.order.long() // model.top_k]
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


def rows(models: Iterable[str], tokens: Iterable[int], repeats: int, device: torch.device) -> list[dict[str, object]]:
    found = []
    for model in models:
        for count in tokens:
            for work in works(MODELS[model], count, device):
                check(work)
                share = round(100 * work.nbytes / forward_bytes(MODELS[model], count), 3)
                found.append({"model": model, "T": count, **work.row(repeats, device), "% of forward": share})
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=",".join(FORWARD))
    parser.add_argument("--tokens", default="256,4096,16384")
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    models = names(parser, "--model", args.model, FORWARD)
    device = here("torch operations on the CPU")
    save_csv("stats", rows(models, [int(count) for count in args.tokens.split(",")], args.repeats, device))


if __name__ == "__main__":
    main()
