from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cprune.checkpoint import Architecture
from cprune.config import PruneConfig
from cprune.decide.budget import (
    Counts,
    RemovalOrder,
    allocate,
    allowed_counts,
    check_feasible,
    marginal_costs,
    removal_order,
)
from tests.synthetic import refuses


def architecture(num: int = 8, top_k: int = 2, **fields: object) -> Architecture:
    values = {"num_layers": 4, "n_group": 1, "topk_group": 1, "scored_groups": 2, "quantized": None, **fields}
    return Architecture(**{"model_type": "new", "num_experts": num, "top_k": top_k, "experts_per_layer": {}, **values})


def free(num: int, least: int = 1, groups: int = 1) -> Counts:
    return Counts(num, groups, tuple(range(num, least - 1, -1)))


def problem(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weights and similarities of `num` experts in clusters, some of them at odds (similarity 0)."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(num, dtype=torch.float64, generator=generator) * 10
    similarity = torch.rand(num, num, dtype=torch.float64, generator=generator)
    similarity = (similarity + similarity.T) / 2
    labels = torch.randint(0, 3, (num,), generator=generator)
    similarity *= labels.unsqueeze(0) == labels.unsqueeze(1)
    return weights, similarity.fill_diagonal_(1.0)


def loss(weights: Tensor, similarity: Tensor, kept: Sequence[int]) -> float:
    """L(S) = sum_i w_i (1 - max_{j in S} s(i, j)), term by term; everything is lost where nothing is kept."""
    total = 0.0
    for expert in range(len(weights)):
        best = max((float(similarity[expert, other]) for other in kept), default=0.0)
        total += float(weights[expert]) * (1.0 - best)
    return total


def leave_cost(weights: Tensor, similarity: Tensor, kept: Sequence[int], expert: int) -> float:
    left = [other for other in kept if other != expert]
    return loss(weights, similarity, left) - loss(weights, similarity, kept)


@pytest.mark.parametrize("seed", range(20))
def test_marginal_costs_are_differences_of_the_loss(seed: int) -> None:
    weights, similarity = problem(9, seed)
    for kept in (list(range(9)), [0, 3, 4, 8], [2, 7], [5]):
        got = marginal_costs(weights, similarity, kept).tolist()
        assert got == pytest.approx([leave_cost(weights, similarity, kept, j) for j in kept], abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_removal_order_is_the_exhaustive_greedy(seed: int) -> None:
    weights, similarity = problem(11, seed)
    protected = (3, 6) if seed % 2 else ()
    order = removal_order(weights, similarity, counts=free(11), protected=protected)
    kept = list(range(11))
    for expert, cost in zip(order.experts, order.costs, strict=True):
        costs = {j: leave_cost(weights, similarity, kept, j) for j in kept if j not in protected}
        assert cost == pytest.approx(costs[expert], abs=1e-12)
        assert costs[expert] <= min(costs.values()) + 1e-12
        kept.remove(expert)
    assert len(kept) == max(1, len(protected)) and set(protected) <= set(kept)


@pytest.mark.parametrize("seed", range(20))
def test_costs_never_fall_and_sum_to_the_loss(seed: int) -> None:
    weights, similarity = problem(13, seed)
    order = removal_order(weights, similarity, counts=free(13, least=2))
    assert all(later >= earlier - 1e-12 for earlier, later in zip(order.costs, order.costs[1:], strict=False))
    kept = [expert for expert in range(13) if expert not in order.experts]
    assert sum(order.costs) == pytest.approx(loss(weights, similarity, kept), abs=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_without_stand_ins_the_order_is_the_plain_ranking(seed: int) -> None:
    weights, _ = problem(300, seed)
    order = removal_order(weights, torch.eye(300, dtype=torch.float64), counts=free(300, least=8))
    ranking = sorted(range(300), key=lambda expert: float(weights[expert]))[:292]
    assert list(order.experts) == ranking and list(order.costs) == weights[ranking].tolist()


def test_ties_go_to_the_smaller_weight_and_then_to_the_lower_index() -> None:
    eye = torch.eye(5, dtype=torch.float64)
    zeros = torch.zeros(5, dtype=torch.float64)
    assert removal_order(zeros, eye, counts=free(5)).experts == (0, 1, 2, 3)
    weights = torch.tensor([4.0, 3.0, 9.0], dtype=torch.float64)
    copies = torch.ones(3, 3, dtype=torch.float64)  # each costs nothing while another is there
    assert removal_order(weights, copies, counts=free(3)) == RemovalOrder((1, 0), (0.0, 0.0))


def test_of_two_copies_the_second_to_leave_pays_for_both() -> None:
    weights = torch.tensor([1.0, 2.0, 2.5], dtype=torch.float64)
    similarity = torch.eye(3, dtype=torch.float64)
    similarity[0, 1] = similarity[1, 0] = 1.0
    order = removal_order(weights, similarity, counts=free(3))
    assert order == RemovalOrder((0, 2), (0.0, 2.5))  # 1 now carries 3.0, more than 2


@pytest.mark.parametrize("seed", range(5))
def test_groups_leave_in_rounds(seed: int) -> None:
    weights, similarity = problem(12, seed)
    counts = Counts(12, 4, (12, 8, 4))
    order = removal_order(weights, similarity, counts=counts)
    assert [expert // 3 for expert in order.experts] == [0, 1, 2, 3] * 2
    kept = list(range(12))
    for expert, cost in zip(order.experts, order.costs, strict=True):
        inside = {j: leave_cost(weights, similarity, kept, j) for j in kept if j // 3 == expert // 3}
        assert cost == pytest.approx(min(inside.values()), abs=1e-12) and inside[expert] <= min(inside.values()) + 1e-12
        kept.remove(expert)


def test_group_of_protected_experts_ends_the_order() -> None:
    weights = torch.arange(6, dtype=torch.float64)
    order = removal_order(weights, torch.eye(6, dtype=torch.float64), counts=Counts(6, 2, (6, 4, 2)), protected=(3, 4))
    assert order.experts == (0, 5, 1)  # the round after has nobody of the second group


# Counts


@pytest.mark.parametrize(
    ("num", "arch", "options", "protected", "expected"),
    [
        (8, {}, {}, 0, (8, 7, 6, 5, 4, 3, 2)),
        (8, {"top_k": 5}, {"slack": 2}, 0, (8, 7)),
        (8, {}, {"min_keep": 6}, 0, (8, 7, 6)),
        (8, {}, {}, 5, (8, 7, 6, 5)),
        (9, {}, {"multiple_of": 4}, 0, (9, 8, 4)),
        (8, {}, {"min_keep": 20}, 0, (8,)),
        (12, {"n_group": 4, "topk_group": 2}, {}, 0, (12, 8)),  # two score a group
        (12, {"n_group": 4, "topk_group": 2, "scored_groups": 1}, {}, 0, (12, 8, 4)),
        (12, {"n_group": 2, "topk_group": 1, "top_k": 5}, {}, 0, (12, 10)),  # one group must hold the top-5
        (24, {"n_group": 4, "topk_group": 4}, {"multiple_of": 6}, 0, (24, 12)),
    ],
)
def test_allowed_counts_meet_every_constraint(
    num: int, arch: dict[str, int], options: dict[str, int], protected: int, expected: tuple[int, ...]
) -> None:
    counts = allowed_counts(num, architecture(num, **arch), PruneConfig(**options), protected)
    assert counts.allowed == expected and counts.groups == arch.get("n_group", 1)
    assert counts.at_least(expected[-1]) == expected[-1] and counts.at_least(num) == num


# Allocation


def layers(sizes: Sequence[int], seed: int, **options: object) -> tuple[dict, dict, dict]:
    """{name: ...} of problems, counts and orders."""
    config = PruneConfig(**options)
    problems = {f"model.layers.{i}.mlp": problem(size, 100 * seed + i) for i, size in enumerate(sizes)}
    counts = {
        name: allowed_counts(len(weights), architecture(len(weights)), config, 0)
        for name, (weights, _) in problems.items()
    }
    orders = {name: removal_order(*problems[name], counts=counts[name]) for name in problems}
    return problems, counts, orders


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(6))
def test_global_allocation_is_the_greedy_over_all_layers(seed: int, ratio: float) -> None:
    problems, counts, orders = layers([9, 7, 11, 8], seed, ratio=ratio)
    kept = {name: list(range(len(weights))) for name, (weights, _) in problems.items()}
    for _ in range(math.floor(ratio * 35)):
        cost = {
            (name, expert): leave_cost(*problems[name], kept[name], expert)
            for name in kept
            for expert in kept[name]
            if len(kept[name]) > 2
        }
        name, expert = min(cost, key=lambda choice: (cost[choice], choice))
        kept[name].remove(expert)
    removed = allocate(orders, counts, PruneConfig(ratio=ratio))
    assert removed == {name: len(problems[name][0]) - len(kept[name]) for name in problems}
    for name, experts in kept.items():
        assert sorted(set(range(len(problems[name][0]))) - set(experts)) == sorted(
            orders[name].experts[: removed[name]]
        )


@pytest.mark.parametrize("ratio", [0.13, 0.25, 0.5])
def test_equal_layers_share_a_uniform_budget(ratio: float) -> None:
    _, counts, orders = layers([8, 8, 8], 0, ratio=ratio, budget="uniform")
    assert allocate(orders, counts, PruneConfig(ratio=ratio, budget="uniform")) == dict.fromkeys(counts, int(8 * ratio))


def test_uniform_budget_is_rounded_down_to_what_the_constraints_allow() -> None:
    options = {"ratio": 0.6, "budget": "uniform"}
    for extra, expected in (({"multiple_of": 3}, 3), ({"min_keep": 6}, 3), ({"slack": 5}, 2), ({}, 5)):
        _, counts, orders = layers([9, 9], 0, **options, **extra)
        assert set(allocate(orders, counts, PruneConfig(**options, **extra)).values()) == {expected}


def test_global_steps_are_as_large_as_the_constraints_ask() -> None:
    config = PruneConfig(ratio=0.5, multiple_of=4)
    _, counts, orders = layers([12, 12, 12], 3, ratio=0.5, multiple_of=4)
    removed = allocate(orders, counts, config)
    assert sum(removed.values()) == 16 and all(count % 4 == 0 for count in removed.values())  # 18 rounded to steps
    pairs = [
        (sum(orders[name].costs[first : first + 4]) / 4, place, name)
        for place, name in enumerate(orders)
        for first in (0, 4)
    ]
    taken: dict[str, int] = dict.fromkeys(orders, 0)
    for _, _, name in sorted(pairs)[:4]:
        taken[name] += 4
    assert removed == taken


def test_step_too_large_for_the_rest_makes_way_for_a_smaller_one() -> None:
    counts = {"a": Counts(8, 1, (8, 4)), "b": Counts(8, 1, (8, 7, 6))}
    orders = {"a": RemovalOrder((0, 1, 2, 3), (0.1,) * 4), "b": RemovalOrder((0, 1), (5.0, 6.0))}
    assert allocate(orders, counts, PruneConfig(ratio=0.19)) == {"a": 0, "b": 2}  # 3 of 16, and 4 do not fit


def test_equal_costs_go_to_the_first_layer() -> None:
    names = [f"model.layers.{index}.mlp" for index in range(12)]
    counts = {name: free(4, least=2) for name in names}
    orders = {name: RemovalOrder((0, 1), (0.0, 1.0)) for name in names}
    removed = allocate(orders, counts, PruneConfig(ratio=0.0625))
    assert [name for name in names if removed[name]] == names[:3]


@pytest.mark.parametrize(
    ("ratio", "expected"), [(1 / 3, 8), (0.7, 16), (2 / 3, 16), (0.29, 6), (0.1, 2), (0.999999, None)]
)
def test_ratio_is_met_to_the_expert(ratio: float, expected: int | None) -> None:
    counts = {name: free(12) for name in "ab"}
    orders = {name: RemovalOrder(tuple(range(11)), tuple(float(i) for i in range(11))) for name in "ab"}
    if expected is None:
        with refuses("ratio 0.999999 must leave every layer.*which let 22 of 24 experts go, got 23 to remove"):
            allocate(orders, counts, PruneConfig(ratio=ratio))
    else:
        assert sum(allocate(orders, counts, PruneConfig(ratio=ratio)).values()) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.8},
        {"ratio": 0.5, "slack": 4},
        {"ratio": 0.5, "min_keep": 7},
        {"ratio": 0.5, "multiple_of": 8},
        {"ratio": 0.01},
        {"ratio": 0.1, "budget": "uniform"},
        {"ratio": 0.6, "budget": "uniform", "min_keep": 8},
        {"ratio": 0.3, "multiple_of": 16},
    ],
)
def test_constraints_that_leave_too_little_are_refused(options: dict[str, object]) -> None:
    _, counts, orders = layers([8, 8, 8], 0, **options)
    config = PruneConfig(**options)
    with refuses(f"^ratio {config.ratio} must leave every layer its top-k"):
        allocate(orders, counts, config)
    with refuses(f"^ratio {config.ratio} must leave every layer its top-k"):
        check_feasible({name: 8 for name in counts}, architecture(8), config)


def test_protected_experts_can_tighten_the_budget() -> None:
    weights, similarity = problem(8, 0)
    counts = allowed_counts(8, architecture(8), PruneConfig(), 6)
    order = removal_order(weights, similarity, counts=counts, protected=tuple(range(6)))
    assert set(order.experts) == {6, 7}
    with refuses("which let 2 of 8 experts go, got 4 to remove"):
        allocate({"a": order}, {"a": counts}, PruneConfig(ratio=0.5))
    assert allocate({"a": order}, {"a": counts}, PruneConfig(ratio=0.25)) == {"a": 2}


@pytest.mark.parametrize("seed", range(12))
def test_what_is_found_feasible_beforehand_is_what_is_removed(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*values: object) -> object:
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    options = {
        "ratio": draw(0.1, 0.25, 0.4, 0.5),
        "budget": draw("global", "uniform"),
        "multiple_of": draw(1, 1, 2, 3),
        "slack": draw(0, 1),
        "min_keep": draw(1, 4),
    }
    sizes = [12, 12, 12] if options["budget"] == "uniform" else [12, 10, 13]
    _, counts, orders = layers(sizes, seed, **options)
    config = PruneConfig(**options)
    expected = check_feasible(dict(zip(counts, sizes, strict=True)), architecture(12), config)
    removed = allocate(orders, counts, config)
    target, step = math.floor(config.ratio * sum(sizes)), config.multiple_of
    if step == 1 and config.budget == "global":
        assert sum(removed.values()) == expected == target
    elif config.budget == "uniform":
        assert sum(removed.values()) == expected <= target
    else:  # what is left over at the end may be too small for a step, and that depends on who went first
        assert target - step < sum(removed.values()) <= target and target - step < expected <= target
    assert all(size - removed[name] in counts[name].allowed for name, size in zip(counts, sizes, strict=True))
