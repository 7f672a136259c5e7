"""Launches of routing and grouping, with random logits that hold ties, and what the result must be by brute force."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cprune_kernels.launch import Launch
from cprune_kernels.picker import Arch
from cprune_kernels.routing import (
    RoutedTokens,
    Routing,
    Scoring,
)
from cprune_kernels.routing_launches import group_tokens_launches, remap_launches, route_launches
from tests.aot.gates import Gate

QWEN3 = Scoring("softmax_topk", renormalise=True)
OLMOE = Scoring("softmax_topk")
GPT_OSS = Scoring("topk_softmax")
MINIMAX = Scoring("sigmoid", renormalise=True)


def deepseek_v2(groups: int = 8, kept: int = 3) -> Scoring:
    return Scoring("softmax_topk", scale=16.0, groups=groups, groups_kept=kept, group_score="max")


def deepseek_v3(groups: int = 8, kept: int = 4) -> Scoring:
    return Scoring("sigmoid", renormalise=True, scale=2.5, groups=groups, groups_kept=kept, group_score="top2")


@dataclass(frozen=True)
class Case:
    """The arguments of `route`."""

    logits: Tensor  # [T, N]
    top_k: int
    scoring: Scoring
    bias: Tensor | None = None  # [N]
    expert_map: Tensor | None = None  # [N]
    num_experts: int | None = None

    def on(self, device: str) -> Case:
        moved = (None if x is None else x.to(device) for x in (self.logits, self.bias, self.expert_map))
        logits, bias, expert_map = moved
        return Case(logits, self.top_k, self.scoring, bias, expert_map, self.num_experts)

    def launches(self, arch: Arch) -> tuple[list[Launch], Routing]:
        return route_launches(self.logits, self.top_k, self.scoring, arch, self.bias, self.expert_map, self.num_experts)

    @property
    def named(self) -> dict[str, Tensor | int | None]:
        return {"bias": self.bias, "expert_map": self.expert_map, "num_experts": self.num_experts}


def make(
    tokens: int,
    experts: int,
    top_k: int,
    scoring: Scoring,
    *,
    biased: bool = False,
    kept: int | None = None,
    dropped: float = 0.2,
    ties: bool = False,
    dtype: torch.dtype = torch.float32,
    map_dtype: torch.dtype = torch.int32,
) -> Case:
    """Random logits, rounded to quarters where there shall be many ties; a map onto `kept` experts where given."""
    generator = torch.Generator().manual_seed(1000 * tokens + experts + top_k)
    logits = torch.randn(tokens, experts, generator=generator) * 2
    bias = torch.randn(experts, generator=generator) / 4 if biased else None
    if ties:
        logits = (logits * 2).round() / 4
        bias = None if bias is None else bias.round()
    expert_map = None
    if kept is not None:
        expert_map = torch.randint(kept, (experts,), generator=generator)
        expert_map[torch.rand(experts, generator=generator) < dropped] = -1
        expert_map = expert_map.to(map_dtype)
    return Case(logits.to(dtype), top_k, scoring, bias, expert_map, kept)


def route_by_hand(case: Case) -> tuple[list[list[int]], list[list[float]]]:
    """(index, gates) of each token, one expert after the other in Python's floats."""
    rows = [_route_token(row, case) for row in case.logits.double().tolist()]
    return [index for index, _ in rows], [gates for _, gates in rows]


def _route_token(logits: list[float], case: Case) -> tuple[list[int], list[float]]:
    how, experts = case.scoring, range(len(logits))
    score = list(logits)
    if how.kind == "sigmoid":
        score = [1 / (1 + math.exp(-x)) for x in logits]
    elif how.kind == "softmax_topk":
        score = _softmax(logits)
    bias = [0.0] * len(logits) if case.bias is None else case.bias.double().tolist()
    choice = [s + b for s, b in zip(score, bias, strict=True)]
    size = len(logits) // how.groups

    def worth(group: int) -> float:
        best = sorted(choice[group * size : (group + 1) * size], reverse=True)
        return best[0] if how.group_score == "max" else best[0] + best[1]

    groups = sorted(range(how.groups), key=lambda g: (-worth(g), g))[: how.groups_kept]
    allowed = [e for e in experts if e // size in groups]
    chosen = sorted(allowed, key=lambda e: (-choice[e], e))[: case.top_k]
    gates = [score[e] for e in chosen]
    if how.kind == "topk_softmax":
        gates = _softmax(gates)
    if how.renormalise:
        gates = [g / sum(gates) for g in gates]
    gates = [g * how.scale for g in gates]
    return (chosen, gates) if case.expert_map is None else remap_by_hand(chosen, gates, case.expert_map.tolist())


def _softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def remap_by_hand(index: list[int], gates: list[float], expert_map: list[int]) -> tuple[list[int], list[float]]:
    """The map of one token's slots; an index outside the map has no expert."""
    new, total = [-1] * len(index), [0.0] * len(index)
    for expert, gate in zip(index, gates, strict=True):
        target = expert_map[expert] if 0 <= expert < len(expert_map) else -1
        if target >= 0:
            slot = next(s for s, old in enumerate(index) if 0 <= old < len(expert_map) and expert_map[old] == target)
            new[slot], total[slot] = target, total[slot] + gate
    return new, total


def level_tiles(first: int, rows: int, block_m: int) -> list[tuple[int, int]]:
    """(thirds, first row) of an expert's tiles: as many as there would be of block_m rows, the higher ones first."""
    third = block_m // 3
    thirds, tiles = -(-rows // third), -(-rows // block_m)
    found = []
    for left in range(tiles, 0, -1):
        height = -(-thirds // left)
        found.append((height, first))
        thirds, first = thirds - height, first + height * third
    return found


def group_by_hand(index: Tensor, experts: int, block_m: int, level: bool = False) -> dict[str, list[int]]:
    """The used parts of `RoutedTokens`: lists of pairs and tiles, an expert at a time."""
    flat = index.flatten().tolist()
    order: list[int] = []
    offsets, tiles = [0], []
    for expert in range(experts):
        order += [pair for pair, own in enumerate(flat) if own == expert]
        rows = range(offsets[-1], len(order), block_m)
        cut = level_tiles(offsets[-1], len(order) - offsets[-1], block_m) if level else [(0, row) for row in rows]
        tiles += [(expert, row) for _, row in cut]
        offsets.append(len(order))
    position = [-1] * len(flat)
    for place, pair in enumerate(order):
        position[pair] = place
    return {
        "order": order,
        "offsets": offsets,
        "position": position,
        "tile_expert": [expert for expert, _ in tiles],
        "tile_row": [row for _, row in tiles],
        "tile_count": [len(tiles)],
    }


def assert_grouped(got: RoutedTokens, index: Tensor, experts: int, block_m: int, level: bool = False) -> None:
    """All of it equals the brute force; -1 (rows of tiles: 0) behind the used part."""
    for name, expected in group_by_hand(index, experts, block_m, level).items():
        values = getattr(got, name)
        assert values.dtype == torch.int32, name
        values = values.tolist()
        assert values[: len(expected)] == expected, name
        assert set(values[len(expected) :]) <= {0 if name == "tile_row" else -1}, name


def random_index(tokens: int, top_k: int, experts: int, empty: float = 0.1) -> Tensor:
    """[T, K] int32 of distinct experts a token where there are enough, some slots without one."""
    generator = torch.Generator().manual_seed(tokens + experts)
    index = torch.rand(tokens, max(experts, top_k), generator=generator).argsort(1)[:, :top_k]
    index[torch.rand(index.shape, generator=generator) < empty] = -1
    return torch.where(index < experts, index, -1).int().contiguous()


def _executed_route(case: Case, arch: Arch) -> tuple[list[Launch], dict[str, Tensor]]:
    launches, out = case.launches(arch)
    return launches, out._asdict()


def _executed_remap(arch: Arch) -> tuple[list[Launch], dict[str, Tensor]]:
    index = random_index(37, 6, 12)
    case = make(37, 12, 6, OLMOE, kept=4, map_dtype=torch.int64)
    gates = case.logits[:, :6].bfloat16().contiguous()
    launches, out = remap_launches(index.long(), gates, case.expert_map, 4, arch)
    return launches, out._asdict()


def _executed_group(
    index: Tensor, experts: int, block_m: int, arch: Arch, level: bool = False, zeros: int = 0
) -> tuple[list[Launch], dict[str, Tensor]]:
    counters = torch.full((zeros,), 7, dtype=torch.int32) if zeros else None
    launches, out = group_tokens_launches(index, experts, block_m, arch, level, counters)
    return launches, out._asdict() | ({} if counters is None else {"zeros": counters})


EXECUTED: dict[str, Callable[[Arch], tuple[list[Launch], dict[str, Tensor]]]] = {
    "route-qwen3": partial(_executed_route, make(21, 128, 8, QWEN3, dtype=torch.bfloat16)),
    "route-olmoe-map": partial(_executed_route, make(9, 60, 4, OLMOE, kept=17, ties=True)),
    "route-gpt-oss": partial(_executed_route, make(9, 131, 4, GPT_OSS, kept=60, map_dtype=torch.int64)),
    "route-deepseek-v2": partial(_executed_route, make(5, 160, 6, deepseek_v2(), kept=80)),
    "route-deepseek-v3": partial(_executed_route, make(5, 256, 8, deepseek_v3(), biased=True, kept=128)),
    "remap": _executed_remap,
    "group-one": partial(_executed_group, random_index(1, 8, 131), 131, 16),
    "group-at-once": partial(_executed_group, random_index(131, 6, 13), 13, 16),
    "group-level": partial(_executed_group, random_index(131, 6, 13), 13, 48, level=True, zeros=70),
    "group-level-blocks": partial(_executed_group, random_index(700, 6, 13), 13, 192, level=True, zeros=1),
    "group-blocks": partial(_executed_group, random_index(700, 6, 13), 13, 64),
}


def _meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _compiled_route(
    experts: int, top_k: int, scoring: Scoring, biased: bool, dtype: torch.dtype, arch: Arch
) -> list[Launch]:
    bias = _meta(experts) if biased else None
    logits, expert_map = _meta(4096, experts, dtype=dtype), _meta(experts, dtype=torch.int32)
    return route_launches(logits, top_k, scoring, arch, bias, expert_map, experts // 2)[0]


def _compiled_remap(arch: Arch) -> list[Launch]:
    index, gates = _meta(4096, 8, dtype=torch.int64), _meta(4096, 8, dtype=torch.bfloat16)
    return remap_launches(index, gates, _meta(128, dtype=torch.int32), 64, arch)[0]


def _compiled_group(tokens: int, top_k: int, experts: int, block_m: int, arch: Arch) -> list[Launch]:
    index = _meta(tokens, top_k, dtype=torch.int32)
    level, counters = block_m == 192 and arch.capability == 90, _meta(2 + tokens, dtype=torch.int32)
    return group_tokens_launches(index, experts, block_m, arch, level, counters if level else None)[0]


BF16, FP32 = torch.bfloat16, torch.float32
COMPILED: dict[str, Callable[[Arch], list[Launch]]] = {
    "route-mixtral-8x7b": partial(_compiled_route, 8, 2, QWEN3, False, BF16),
    "route-qwen3-30b-a3b": partial(_compiled_route, 128, 8, QWEN3, False, BF16),
    "route-qwen3-30b-a3b-odd": partial(_compiled_route, 77, 8, QWEN3, False, BF16),
    "route-gpt-oss-120b": partial(_compiled_route, 128, 4, GPT_OSS, False, BF16),
    "route-minimax-m2": partial(_compiled_route, 256, 8, MINIMAX, True, FP32),
    "route-deepseek-v2": partial(_compiled_route, 160, 6, deepseek_v2(), False, FP32),
    "route-deepseek-v3": partial(_compiled_route, 256, 8, deepseek_v3(), True, FP32),
    "route-kimi-k2": partial(_compiled_route, 384, 8, MINIMAX, True, FP32),
    "route-widest": partial(_compiled_route, 512, 32, MINIMAX, True, FP32),
    "remap": _compiled_remap,
    **{
        f"group-{tokens}x{top_k}-of-{experts}-by-{block_m}": partial(_compiled_group, tokens, top_k, experts, block_m)
        for experts, top_k in ((4, 2), (64, 6), (128, 8), (192, 8), (512, 8))
        for tokens, block_m in ((1, 16), (256, 16), (16384, 128), (256, 192), (16384, 192))
    },
}
GATES: dict[str, Gate] = {
    "route_kernel": Gate(registers=128, ctas_per_sm=16),
    "remap_kernel": Gate(registers=96, ctas_per_sm=16),
    "count_pairs_kernel": Gate(registers=128, ctas_per_sm=2),
    "scan_pairs_kernel": Gate(registers=64, ctas_per_sm=8, narrow_loads=0),
    "scatter_pairs_kernel": Gate(registers=128, ctas_per_sm=2),
}
