"""Routing and grouping of tokens: `route` with a map that merges half of the experts, and `group_tokens` of its result.

python bench/bench_routing.py [--model qwen3-30b-a3b,deepseek-v3] [--tokens 1,16,256,4096,16384] [--repeats 50]

The alternative to each is the same in torch operations: a router as transformers writes it and a map by comparison of
slots; a stable sort with counts. `% of floor` is the time that the bytes of arguments and results take at the GPU's
bandwidth; at these sizes launches cost more, so microseconds are what matters. Nothing is multiplied, hence no TFLOP/s.
Without a GPU both run on the CPU, where the operators are torch operations too: it shows that the bench works, no more.
Medians; the alternatives run on the same tensors. Rows go to results/routing.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from timing import Work, here, names, save_csv
from torch import Tensor

from cprune_kernels.routing import (
    Routing,
    Scoring,
    group_tokens,
    group_tokens_reference,
    remap_reference,
    route,
    route_reference,
)


@dataclass(frozen=True)
class Router:
    experts: int  # N
    top_k: int
    scoring: Scoring
    biased: bool = False


MODELS = {
    "mixtral-8x7b": Router(8, 2, Scoring("softmax_topk", renormalise=True)),
    "qwen3-30b-a3b": Router(128, 8, Scoring("softmax_topk", renormalise=True)),
    "deepseek-v2-lite": Router(64, 6, Scoring("softmax_topk")),
    "gpt-oss-120b": Router(128, 4, Scoring("topk_softmax")),
    "deepseek-v3": Router(256, 8, Scoring("sigmoid", True, 2.5, 8, 4, "top2"), biased=True),
}
BLOCK_M = 64


def composed(logits: Tensor, router: Router, bias: Tensor | None, expert_map: Tensor, kept: int) -> Routing:
    """Routing as the modeling files of transformers write it; of equal scores it may choose another than `route`."""
    how = router.scoring
    logits = logits.float()
    scores = {"sigmoid": logits.sigmoid, "softmax_topk": lambda: logits.softmax(-1), "topk_softmax": lambda: logits}
    score = scores[how.kind]()
    choice = score if bias is None else score + bias
    if how.limited:
        groups = choice.view(len(logits), how.groups, -1)
        worth = groups.amax(-1) if how.group_score == "max" else groups.topk(2, dim=-1).values.sum(-1)
        mask = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, worth.topk(how.groups_kept, dim=-1).indices, True)
        choice = groups.masked_fill(~mask.unsqueeze(-1), -torch.inf).view_as(choice)
    index = choice.topk(router.top_k, dim=-1).indices
    gates = score.gather(1, index)
    if how.kind == "topk_softmax":
        gates = gates.softmax(-1)
    if how.renormalise:
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
    return remap_reference(index, gates * how.scale, expert_map, kept)


def nbytes(*tensors: Tensor | None) -> int:
    return sum(x.nbytes for x in tensors if x is not None)


def works(router: Router, tokens: int, device: torch.device) -> list[Work]:
    generator = torch.Generator().manual_seed(0)
    kept = router.experts // 2
    logits = torch.randn(tokens, router.experts, generator=generator).to(device)
    bias = torch.randn(router.experts, generator=generator).to(device) / 8 if router.biased else None
    expert_map = torch.randint(kept, (router.experts,), generator=generator).int().to(device)
    named = {"bias": bias, "expert_map": expert_map, "num_experts": kept}
    routing = route_reference(logits, router.top_k, router.scoring, **named)
    grouped = group_tokens_reference(routing.index, kept, BLOCK_M)
    return [
        Work(
            "route",
            lambda: route(logits, router.top_k, router.scoring, **named),
            lambda: composed(logits, router, bias, expert_map, kept),
            routing,
            nbytes(logits, bias, expert_map, *routing),
        ),
        Work(
            "group_tokens",
            lambda: group_tokens(routing.index, kept, BLOCK_M),
            lambda: group_tokens_reference(routing.index, kept, BLOCK_M),
            grouped,
            nbytes(routing.index, *grouped),
        ),
    ]


def check(work: Work) -> None:
    """No timing of a kernel that is wrong: integers are equal, gates but for the rounding of float32."""
    for name, expected in work.expected._asdict().items():
        got = getattr(work.ours(), name)
        same = torch.equal(got, expected)
        if not same and not (expected.is_floating_point() and torch.allclose(got, expected, rtol=1e-5, atol=0)):
            raise SystemExit(f"{work.name} gives another {name} than its reference; nothing was timed")


def rows(models: Iterable[str], tokens: Iterable[int], repeats: int, device: torch.device) -> list[dict[str, object]]:
    found = []
    for model in models:
        for count in tokens:
            for work in works(MODELS[model], count, device):
                check(work)
                found.append({"model": model, "T": count, **work.row(repeats, device)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=",".join(MODELS))
    parser.add_argument("--tokens", default="1,16,256,4096,16384")
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    models = names(parser, "--model", args.model, MODELS)
    device = here("torch operations on the CPU")
    save_csv("routing", rows(models, [int(count) for count in args.tokens.split(",")], args.repeats, device))


if __name__ == "__main__":
    main()
