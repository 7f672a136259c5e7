"""How many experts each layer may keep, and who goes first: the solver under the constraints of router and engine.

Inside a layer, experts leave one by one, always the one whose leaving costs least (`removal_order`). The costs never
fall along that order, so ranking the heads of all layers' orders against each other (`allocate`) is the greedy over
the model.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from cprune.checkpoint import Architecture
from cprune.config import PruneConfig
from cprune.errors import CpruneError


@dataclass(frozen=True)
class Counts:
    """The numbers of experts that a layer may keep."""

    num_experts: int
    groups: int  # router groups, all of which keep the same number
    allowed: tuple[int, ...]  # descending, the first is num_experts

    def at_least(self, keep: int) -> int:
        """The smallest allowed count that is not below `keep`."""
        return min(count for count in self.allowed if count >= keep)


def allowed_counts(num_experts: int, architecture: Architecture, config: PruneConfig, protected: int) -> Counts:
    """Counts >= top-k + slack and >= min_keep that hold the protected, multiples of n_group and multiple_of.

    With router groups, the groups a token may reach must hold its top-k experts, and a group as many as score it.
    """
    groups = architecture.n_group
    least = max(architecture.top_k + config.slack, config.min_keep, protected)
    if groups > 1:
        per_group = max(math.ceil(architecture.top_k / architecture.topk_group), architecture.scored_groups)
        least = max(least, groups * per_group)
    step = math.lcm(groups, config.multiple_of)
    allowed = [num_experts] + [count for count in range(num_experts - 1, least - 1, -1) if count % step == 0]
    return Counts(num_experts, groups, tuple(allowed))


@dataclass(frozen=True)
class RemovalOrder:
    """Who leaves a layer, in order."""

    experts: tuple[int, ...]  # removable experts, first to leave first
    costs: tuple[float, ...]  # cost of each leaving, given the earlier ones have; never falls (up to group rounds)


def marginal_costs(weights: torch.Tensor, similarity: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
    """Cost of each kept expert leaving next, [len(kept)] float64.

    With w the weights and s(i, j) in [0, 1] how well j stands in for i, the loss of keeping S is
    L(S) = sum_i w_i (1 - max_{j in S} s(i, j)), the facility-location objective, and the cost of j is L(S - j) - L(S):
    its own weight as far as its best sibling does not stand in for it, and that of all removed experts that j stands in
    for.

    Args:
        weights: [E] float64, >= 0.
        similarity: [E, E] float64 in [0, 1], 1 on the diagonal; 0 between experts that may not stand in for each other.
    """
    coverage = similarity[:, list(kept)]  # [E, C]
    if len(kept) == 1:
        return (weights @ coverage).reshape(1)
    best = coverage.topk(2, dim=1)
    # of equal stand-ins, topk may name any; the difference is then 0, so the choice does not matter
    loss = weights * (best.values[:, 0] - best.values[:, 1])
    return torch.zeros(len(kept), dtype=torch.float64).index_add_(0, best.indices[:, 0], loss)


def removal_order(
    weights: torch.Tensor, similarity: torch.Tensor, *, counts: Counts, protected: Sequence[int] = ()
) -> RemovalOrder:
    """The greedy order in which the experts of a layer leave; ties to the smaller weight, then to the lower index.

    With router groups, rounds of one expert from each group. Stops at the smallest allowed count.
    """
    num, groups = counts.num_experts, counts.groups
    per_group = num // groups
    kept = list(range(num))
    order: list[int] = []
    costs: list[float] = []
    guarded = set(protected)
    weight = weights.tolist()
    alone = torch.equal(similarity, torch.eye(num, dtype=similarity.dtype))  # no one stands in: the cost is the weight
    while num - len(order) > min(counts.allowed):
        group = len(order) % groups
        marginal = [weight[expert] for expert in kept] if alone else marginal_costs(weights, similarity, kept).tolist()
        candidates = [
            (marginal[place], weight[expert], expert)
            for place, expert in enumerate(kept)
            if expert // per_group == group and expert not in guarded
        ]
        if not candidates:
            break
        cost, _, expert = min(candidates)
        kept.remove(expert)
        order.append(expert)
        costs.append(cost)
    return RemovalOrder(tuple(order), tuple(costs))


def allocate(orders: Mapping[str, RemovalOrder], counts: Mapping[str, Counts], config: PruneConfig) -> dict[str, int]:
    """Experts to remove from every layer.

    uniform: floor(E x ratio) everywhere, fewer where the constraints round it down. global: the layers' next steps
    compete by mean cost per expert, ties to the first, until floor(ratio x all experts) have left; a step is to the
    next allowed count.

    Raises CpruneError where the constraints leave too little to remove.
    """
    total = sum(count.num_experts for count in counts.values())
    if config.budget == "uniform":
        removed = {}
        for name, count in counts.items():
            keep = count.at_least(count.num_experts - math.floor(count.num_experts * config.ratio + 1e-9))
            removed[name] = count.num_experts - keep
        least = min(removed.values())  # the same everywhere, or the checkpoint would not be a stock one
        if least == 0 or any(len(orders[name].experts) < least for name in orders):
            spare = 0 if least == 0 else min(len(order.experts) for order in orders.values())
            raise CpruneError(_too_tight(config, counts, spare * len(counts)))
        return dict.fromkeys(removed, least)
    target = math.floor(config.ratio * total + 1e-9)
    reachable = sum(_reachable(orders[name], counts[name]) for name in counts)
    if reachable < target:
        raise CpruneError(_too_tight(config, counts, reachable))
    names, removed = list(counts), dict.fromkeys(counts, 0)
    heap = [step for place, name in enumerate(names) for step in _next_step(place, 0, orders[name], counts[name])]
    heapq.heapify(heap)
    left = target
    while heap:
        _, place, size = heapq.heappop(heap)
        if size > left:
            continue  # this layer's next step is too large for what is left; a smaller step elsewhere may fit
        name = names[place]
        removed[name] += size
        left -= size
        for step in _next_step(place, removed[name], orders[name], counts[name]):
            heapq.heappush(heap, step)
    if not any(removed.values()):
        raise CpruneError(_too_tight(config, counts, 0))
    return removed


def _reachable(order: RemovalOrder, count: Counts) -> int:
    return max(count.num_experts - keep for keep in count.allowed if count.num_experts - keep <= len(order.experts))


def _next_step(place: int, removed: int, order: RemovalOrder, count: Counts) -> list[tuple[float, int, int]]:
    """[(mean cost, layer's place, experts)] of the next allowed count below, or [] at the end."""
    lower = [keep for keep in count.allowed if keep < count.num_experts - removed]
    if not lower or count.num_experts - lower[0] > len(order.experts):
        return []
    size = count.num_experts - lower[0] - removed
    costs = order.costs[removed : removed + size]
    return [(sum(costs) / size, place, size)]


def _too_tight(config: PruneConfig, counts: Mapping[str, Counts], reachable: int) -> str:
    total = sum(count.num_experts for count in counts.values())
    return (
        f"ratio {config.ratio} must leave every layer its top-k, router groups, multiples and protected experts, "
        f"which let {reachable} of {total} experts go, got {math.floor(config.ratio * total + 1e-9)} to remove"
    )


def check_feasible(sizes: Mapping[str, int], architecture: Architecture, config: PruneConfig) -> int:
    """Experts that `config` would remove from layers of the given sizes; CpruneError where the constraints forbid it.

    Knows no statistics, so it can refuse before any work; experts protected for their activations may tighten it later.
    """
    for name, size in sizes.items():
        left = size - math.floor(size * config.ratio + 1e-9)
        if config.budget == "uniform" and left < architecture.top_k:
            raise CpruneError(
                f"ratio {config.ratio} must leave every layer the top-k of {architecture.top_k} experts, "
                f"got {left} of {size} in {name}"
            )
    counts = {name: allowed_counts(size, architecture, config, 0) for name, size in sizes.items()}
    orders = {
        name: RemovalOrder(tuple(range(size - min(counts[name].allowed))), (0.0,) * (size - min(counts[name].allowed)))
        for name, size in sizes.items()
    }
    return sum(allocate(orders, counts, config).values())
