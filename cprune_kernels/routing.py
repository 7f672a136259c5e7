"""Which experts a token visits, with what weight, and the (token, expert) pairs sorted by expert.

route         gates = scale norm(score(logits))[top-k of score + bias], then the map from router experts to those kept
remap         the map alone: a token visits a merged expert once, with the sum of the gates that led there
group_tokens  the pairs sorted stably by expert, and which expert and rows each tile of a grouped product works on

All three move a few bytes per pair and are bound by launches; as kernels they are one to three each, and none waits for
the host. They are in routing_kernels.py. Nothing outside a tensor is read for any index or map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from cprune_kernels.launch import Launch
from cprune_kernels.native import backend
from cprune_kernels.picker import arch_of

Kind = Literal["softmax_topk", "topk_softmax", "sigmoid"]
GroupScore = Literal["max", "top2"]
INTEGERS = (torch.int32, torch.int64)
MAX_EXPERTS = 512


@dataclass(frozen=True)
class Scoring:
    """How a family turns router logits into gates.

    kind: "softmax_topk" scores by softmax over all experts (Qwen, Mixtral, OLMoE, DeepSeek-V2), "sigmoid" one by one
        (DeepSeek-V3, GLM-4, MiniMax-M2); the gates of "topk_softmax" are the softmax of the chosen logits (gpt-oss).
    renormalise: gates of a token are divided by their sum + 1e-20 (`norm_topk_prob`).
    scale: gates are multiplied by it, last (`routed_scaling_factor`).
    groups, groups_kept: experts are `groups` runs of equal length (`n_group`), of which a token may choose from the
        `groups_kept` best (`topk_group`). A group counts by its best score + bias, or by the sum of its two best
        (group_score "max": DeepSeek-V2, "top2": DeepSeek-V3).
    """

    kind: Kind = "softmax_topk"
    renormalise: bool = False
    scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    group_score: GroupScore = "max"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if self.group_score not in get_args(GroupScore):
            raise ValueError(f"group_score must be one of {', '.join(get_args(GroupScore))}, got {self.group_score!r}")
        if not 1 <= self.groups_kept <= self.groups:
            raise ValueError(f"groups_kept must lie in [1, groups = {self.groups}], got {self.groups_kept}")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite, got {self.scale}")

    def chooses_by_score(self, biased: bool) -> bool:
        """False where logits have the order of the scores, so that rounding of the scores cannot change a choice."""
        return self.kind != "topk_softmax" and (biased or (self.limited and self.group_score == "top2"))

    @property
    def limited(self) -> bool:
        return self.groups_kept < self.groups


class Routing(NamedTuple):
    """What a layer of experts is called with; an expert occurs at most once in a row."""

    index: Tensor  # [T, K] int32, -1 for a slot without expert
    gates: Tensor  # [T, K] float32, 0 for a slot without expert


class RoutedTokens(NamedTuple):
    """Pairs of token and slot, pair t K + k, sorted by expert and within one by pair; all int32.

    A tile is the rows [tile_row, min(tile_row + block_m, offsets[tile_expert + 1])) of the sorted order; tiles go from
    the first expert to the last. M = max_tiles(T K, C, block_m) entries exist, of which the first tile_count are used.
    """

    order: Tensor  # [T K] the pair at each place, -1 from offsets[C] on
    offsets: Tensor  # [C + 1] the first place of each expert, and the count of routed pairs
    position: Tensor  # [T K] the place of each pair, -1 for one without expert
    tile_expert: Tensor  # [M] -1 past tile_count
    tile_row: Tensor  # [M] first place of the tile, 0 past tile_count
    tile_count: Tensor  # [1]


def max_tiles(pairs: int, num_experts: int, block_m: int) -> int:
    """The most tiles of `block_m` rows that `pairs` pairs can need: one per expert, then one per full tile more."""
    started = min(pairs, num_experts)
    return started + (pairs - started) // block_m


def route_reference(
    logits: Tensor,
    top_k: int,
    scoring: Scoring,
    bias: Tensor | None = None,
    expert_map: Tensor | None = None,
    num_experts: int | None = None,
) -> Routing:
    """The specification of `route`."""
    logits = logits.float()
    tokens, experts = logits.shape
    scores = {"softmax_topk": lambda: logits.softmax(1), "sigmoid": logits.sigmoid, "topk_softmax": lambda: logits}
    score = scores[scoring.kind]()
    choice = score if scoring.chooses_by_score(bias is not None) else logits
    if bias is not None:
        choice = choice + bias.float()
    choice = choice.masked_fill(choice.isnan(), -torch.inf)
    if scoring.limited:
        groups = choice.view(tokens, scoring.groups, experts // scoring.groups)
        worth = groups.amax(2) if scoring.group_score == "max" else groups.topk(2).values.sum(2)
        best = _descending(worth.masked_fill(worth.isnan(), -torch.inf))[:, : scoring.groups_kept]
        kept = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, best, True)
        choice = groups.masked_fill(~kept.unsqueeze(2), -torch.inf).view(tokens, experts)
    index = _descending(choice)[:, :top_k]
    gates = score.gather(1, index)
    if scoring.kind == "topk_softmax":
        gates = gates.softmax(1)
    if scoring.renormalise:
        gates = gates / (gates.sum(1, keepdim=True) + 1e-20)
    gates = gates * scoring.scale
    if expert_map is not None:
        return remap_reference(index, gates, expert_map, experts if num_experts is None else num_experts)
    return Routing(index.int(), gates.contiguous())


def _descending(values: Tensor) -> Tensor:
    """Columns in the order of falling values; of equal ones the lowest first."""
    return values.sort(dim=1, descending=True, stable=True).indices


def remap_reference(index: Tensor, gates: Tensor, expert_map: Tensor, num_experts: int) -> Routing:
    """The specification of `remap`."""
    inside = (index >= 0) & (index < len(expert_map))
    expert = expert_map.long()[torch.where(inside, index, 0).long()]
    expert = torch.where(inside & (expert >= 0) & (expert < num_experts), expert, -1)
    total, repeated = torch.zeros(gates.shape, device=gates.device), torch.zeros_like(inside)
    slots = torch.arange(expert.shape[1], device=expert.device)
    for slot in range(expert.shape[1]):
        same = expert == expert[:, slot : slot + 1]
        total += torch.where(same, gates[:, slot : slot + 1].float(), 0.0)
        repeated |= same & (slots > slot)
    kept = (expert >= 0) & ~repeated
    return Routing(torch.where(kept, expert, -1).int(), torch.where(kept, total, 0.0))


def group_tokens_reference(index: Tensor, num_experts: int, block_m: int) -> RoutedTokens:
    """The specification of `group_tokens`."""
    expert = index.reshape(-1).long()
    pairs = torch.arange(len(expert), device=expert.device)
    expert = torch.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    order = expert.argsort(stable=True)
    last = expert.bincount(minlength=num_experts + 1)[:num_experts].cumsum(0)
    position = torch.empty_like(order).scatter_(0, order, pairs)
    offsets = torch.nn.functional.pad(last, (1, 0)).int()
    return RoutedTokens(
        torch.where(pairs < last[-1], order, -1).int(),
        offsets,
        torch.where(expert < num_experts, position, -1).int(),
        *_tile_map(offsets, len(expert), block_m),
    )


def _tile_map(offsets: Tensor, pairs: int, block_m: int) -> tuple[Tensor, Tensor, Tensor]:
    """(tile_expert, tile_row, tile_count) of `RoutedTokens`, from its offsets [C + 1]."""
    first, last = offsets[:-1].long(), offsets[1:].long()
    tiles = torch.arange(max_tiles(pairs, len(first), block_m), device=offsets.device)
    own = (last - first + block_m - 1) // block_m
    last_tile = own.cumsum(0)
    used = tiles < last_tile[-1]
    of = torch.searchsorted(last_tile, tiles, right=True).clamp(max=len(first) - 1)
    row = first[of] + (tiles - (last_tile - own)[of]) * block_m
    return torch.where(used, of, -1).int(), torch.where(used, row, 0).int(), last_tile[-1:].int()


def empty_routing(like: Tensor, tokens: int, top_k: int) -> Routing:
    return Routing(*(like.new_empty((tokens, top_k), dtype=dtype) for dtype in (torch.int32, torch.float32)))


def empty_groups(index: Tensor, num_experts: int, block_m: int) -> RoutedTokens:
    pairs = index.numel()
    tiles = max_tiles(pairs, num_experts, block_m)
    sizes = (pairs, num_experts + 1, pairs, tiles, tiles, 1)
    return RoutedTokens(*(index.new_empty((size,), dtype=torch.int32) for size in sizes))


def route(
    logits: Tensor,
    top_k: int,
    scoring: Scoring,
    *,
    bias: Tensor | None = None,
    expert_map: Tensor | None = None,
    num_experts: int | None = None,
) -> Routing:
    """Choose the experts of each token. Not differentiable.

    Args:
        logits: [T, N] floating, N up to 512; scored in float32.
        top_k: K, in [1, N]. Slots hold falling scores, of equal ones the lowest expert first; a NaN counts as -inf.
        bias: [N] floating, added to the scores (the logits of "topk_softmax") for the choice, never in the gates.
        expert_map: [N] int32 or int64, the expert kept in place of each, or -1 for none; see `remap`.
        num_experts: C, the experts kept; N by default.

    Raises ValueError, in one sentence, for a wrong shape, type or device, and on a CPU for NaN logits and a map outside
    [-1, C); a GPU is not asked, so there NaN comes back as NaN gates and an expert outside [0, C) counts as none.
    Choices by score + bias that lie within the rounding of float32 can differ between devices.
    """
    _check(logits.dim() == 2 and logits.is_floating_point(), "logits", "a floating [T, N]", logits)
    experts = logits.shape[1]
    _check_range("N, the experts of the router,", experts, MAX_EXPERTS)
    _check_range("top_k", top_k, experts)
    if experts % scoring.groups:
        raise ValueError(f"groups must divide N = {experts}, got {scoring.groups}")
    if scoring.limited:
        size = experts // scoring.groups
        if top_k > scoring.groups_kept * size:
            raise ValueError(
                f"top_k must be at most the {scoring.groups_kept * size} experts of the kept groups, got {top_k}"
            )
        if scoring.group_score == "top2" and size < 2:
            raise ValueError("groups must hold at least 2 experts to count by the best two, got 1")
    if bias is not None:
        _check(bias.shape == (experts,) and bias.is_floating_point(), "bias", f"a floating [{experts}]", bias)
    if expert_map is not None:
        _check_map(expert_map)
        _check(expert_map.shape == (experts,), "expert_map", f"an integer [{experts}]", expert_map)
    elif num_experts not in (None, experts):
        raise ValueError(f"num_experts must be N = {experts} without expert_map, got {num_experts}")
    kept = experts if num_experts is None else num_experts
    _check_range("num_experts", kept, MAX_EXPERTS)
    _check_devices(logits, bias, expert_map)
    how = (
        scoring.kind,
        scoring.renormalise,
        float(scoring.scale),
        scoring.groups,
        scoring.groups_kept,
        scoring.group_score,
    )
    return Routing(*torch.ops.cprune.route(logits, top_k, *how, bias, expert_map, kept))


@torch.library.custom_op("cprune::route", mutates_args=(), device_types="cuda")
def _route(
    logits: Tensor,
    top_k: int,
    kind: str,
    renormalise: bool,
    scale: float,
    groups: int,
    groups_kept: int,
    group_score: str,
    bias: Tensor | None,
    expert_map: Tensor | None,
    num_experts: int,
) -> tuple[Tensor, Tensor]:
    scoring = Scoring(kind, renormalise, scale, groups, groups_kept, group_score)
    bias, expert_map = (None if x is None else x.contiguous() for x in (bias, expert_map))
    arch = arch_of(logits.device)
    from cprune_kernels.routing_launches import route_launches  # Triton is imported where there is a GPU

    return _run(logits, *route_launches(logits.contiguous(), top_k, scoring, arch, bias, expert_map, num_experts))


@_route.register_kernel("cpu")
def _(logits, top_k, kind, renormalise, scale, groups, groups_kept, group_score, bias, expert_map, num_experts):
    if logits.isnan().any():
        raise ValueError(f"logits must hold no NaN, got {int(logits.isnan().sum())} of them")
    if expert_map is not None:
        _check_map_values(expert_map, num_experts)
    scoring = Scoring(kind, renormalise, scale, groups, groups_kept, group_score)
    return tuple(route_reference(logits, top_k, scoring, bias, expert_map, num_experts))


@_route.register_fake
def _(logits, top_k, *_):
    return tuple(empty_routing(logits, logits.shape[0], top_k))


def remap(index: Tensor, gates: Tensor, expert_map: Tensor, num_experts: int) -> Routing:
    """Send each slot to the expert kept in place of its own, once per token. Not differentiable.

    Args:
        index: [T, K] int32 or int64, the chosen experts in [0, N); a slot outside has none.
        gates: [T, K] floating.
        expert_map: [N] int32 or int64 in [-1, num_experts); -1 drops an expert and its gate.
        num_experts: C, the experts kept, up to 512.

    Where several slots of a token lead to one expert, the first gets the float32 sum of their gates in the order of the
    slots; the others, as those of dropped experts, get index -1 and gate 0.
    Raises ValueError, in one sentence, for a wrong shape, type or device, and on a CPU for a map outside [-1, C).
    """
    _check(index.dim() == 2 and index.dtype in INTEGERS, "index", "an int32 or int64 [T, K]", index)
    shape = list(index.shape)
    _check(gates.shape == index.shape and gates.is_floating_point(), "gates", f"a floating {shape}", gates)
    _check_map(expert_map)
    _check_range("num_experts", num_experts, MAX_EXPERTS)
    _check_devices(index, gates, expert_map)
    return Routing(*torch.ops.cprune.remap(index, gates, expert_map, num_experts))


@torch.library.custom_op("cprune::remap", mutates_args=(), device_types="cuda")
def _remap(index: Tensor, gates: Tensor, expert_map: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    tensors = (x.contiguous() for x in (index, gates, expert_map))
    from cprune_kernels.routing_launches import remap_launches

    return _run(index, *remap_launches(*tensors, num_experts, arch_of(index.device)))


@_remap.register_kernel("cpu")
def _(index, gates, expert_map, num_experts):
    _check_map_values(expert_map, num_experts)
    return tuple(remap_reference(index, gates, expert_map, num_experts))


@_remap.register_fake
def _(index, gates, expert_map, num_experts):
    return tuple(empty_routing(index, *index.shape))


def group_tokens(index: Tensor, num_experts: int, block_m: int) -> RoutedTokens:
    """Sort the pairs of token and slot by expert, stably, and map tiles of a grouped product onto them.

    Args:
        index: [T, K] int32 or int64, T K < 2^31; a slot outside [0, num_experts) has no expert and no place.
        num_experts: C, up to 512.
        block_m: rows of a tile, at least 1.

    The shapes of the result, and so memory and grids, depend on those of the arguments alone.
    Raises ValueError, in one sentence, for a wrong shape or type.
    """
    _check(index.dim() == 2 and index.dtype in INTEGERS, "index", "an int32 or int64 [T, K]", index)
    _check_range("num_experts", num_experts, MAX_EXPERTS)
    _check_range("T K", index.numel(), 2**31 - 1, low=0)
    _check_range("block_m", block_m, 2**16)
    return RoutedTokens(*torch.ops.cprune.group_tokens(index, num_experts, block_m))


@torch.library.custom_op("cprune::group_tokens", mutates_args=(), device_types="cuda")
def _group_tokens(
    index: Tensor, num_experts: int, block_m: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    arch = arch_of(index.device)
    from cprune_kernels.routing_launches import group_tokens_launches

    return _run(index, *group_tokens_launches(index.contiguous(), num_experts, block_m, arch))


@_group_tokens.register_kernel("cpu")
def _(index, num_experts, block_m):
    if backend() == "reference":
        return tuple(group_tokens_reference(index, num_experts, block_m))
    order, offsets, position = torch.ops.cprune_native.group_tokens(index, num_experts)
    return order, offsets, position, *_tile_map(offsets, index.numel(), block_m)


@_group_tokens.register_fake
def _(index, num_experts, block_m):
    return tuple(empty_groups(index, num_experts, block_m))


def _run(like: Tensor, launches: list[Launch], outputs: Routing | RoutedTokens) -> tuple[Tensor, ...]:
    with torch.cuda.device(like.device):
        for launch in launches:
            launch.run()
    return tuple(outputs)


def _check(holds: bool, name: str, what: str, given: Tensor) -> None:
    if not holds:
        raise ValueError(f"{name} must be {what}, got {given.dtype} of shape {list(given.shape)}")


def _check_map(expert_map: Tensor) -> None:
    fits = expert_map.dim() == 1 and len(expert_map) > 0 and expert_map.dtype in INTEGERS
    _check(fits, "expert_map", "an int32 or int64 [N]", expert_map)


def _check_map_values(expert_map: Tensor, num_experts: int) -> None:
    low, high = (int(x) for x in expert_map.aminmax())
    if low < -1 or high >= num_experts:
        raise ValueError(f"expert_map must lie in [-1, {num_experts}), got {low if low < -1 else high}")


def _check_range(name: str, value: int, high: int, low: int = 1) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")


def _check_devices(*tensors: Tensor | None) -> None:
    devices = sorted({str(x.device) for x in tensors if x is not None})
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {' and '.join(devices)}")
