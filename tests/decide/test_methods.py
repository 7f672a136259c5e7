from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch
from torch import Tensor

from cprune.checkpoint import Architecture
from cprune.config import Method, PruneConfig
from cprune.decide.known import Known
from cprune.decide.methods import check_method, decide, rank_heads, stand_in_matrix
from cprune.decide.paper import decide_paper
from cprune.decide.saliency import saliency
from cprune.decide.selection import SELECTIONS
from cprune.measure.similarity import similarity_matrix
from cprune.plan import LayerPlan
from cprune.stats import ExpertStats
from tests.synthetic import expert_stats, refuses

NAMES = ("model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp")
NUM = 12


def architecture(**fields: object) -> Architecture:
    values = {"num_layers": 3, "n_group": 1, "topk_group": 1, "scored_groups": 2, "quantized": None, **fields}
    return Architecture(**{"model_type": "new", "num_experts": NUM, "top_k": 2, "experts_per_layer": {}, **values})


def near_copies(
    seed: int = 0, by: str = "outputs", **fields: object
) -> tuple[dict[str, ExpertStats], dict[str, Tensor]]:
    """Three layers of twelve experts whose outputs come in pairs (0, 6), (1, 7), ...: near-copies of each other."""
    generator = torch.Generator().manual_seed(seed)
    stats = {}
    for place, name in enumerate(NAMES):
        half = torch.randn(NUM // 2, 40, dtype=torch.float64, generator=generator)
        outputs = torch.cat([half, half + 0.05 * torch.randn(half.shape, dtype=torch.float64, generator=generator)])
        weights = torch.rand(NUM, dtype=torch.float64, generator=generator) + 1.0
        options = {"relative_sum": weights, "gated_norm_sum": weights, "output_gram": outputs @ outputs.T, **fields}
        stats[name] = expert_stats(NUM, layer=name, seed=100 * seed + place, **options)
    return stats, {name: similarity_matrix(layer, {by: 1.0}) for name, layer in stats.items()}


def check_invariants(plans: tuple[LayerPlan, ...], similarity: dict[str, Tensor], inside: bool = False) -> None:
    assert [plan.layer for plan in plans] == list(NAMES)
    for plan in plans:
        matrix = similarity[plan.layer]
        for expert in range(plan.num_experts):
            own = [other for other in plan.kept if plan.cluster[other] == plan.cluster[expert]]
            best = max(float(matrix[expert, other]) for other in (own if inside and own else plan.kept))
            if expert in plan.kept:
                assert (plan.stand_in[expert], plan.similarity[expert]) == (expert, 1.0)
            else:
                assert plan.stand_in[expert] == next(
                    j for j in (own if inside and own else plan.kept) if float(matrix[expert, j]) == best
                )
                assert plan.similarity[expert] == pytest.approx(best, abs=1e-6)
        assert set(plan.cluster) == set(range(max(plan.cluster) + 1))
        assert all(isinstance(value, float) for value in plan.score)


@pytest.mark.parametrize("linkage", ["average", "complete", "ward"])
@pytest.mark.parametrize("budget", ["global", "uniform"])
def test_one_of_each_pair_of_near_copies_stays(budget: str, linkage: str) -> None:
    stats, similarity = near_copies()
    config = PruneConfig(ratio=0.5, budget=budget, linkage=linkage)
    plans = decide(stats, similarity, architecture(), config)
    check_invariants(plans, similarity)
    for plan in plans:
        assert sorted(expert % 6 for expert in plan.kept) == list(range(6))
        weights = saliency("expected", stats[plan.layer], 0)
        for expert in plan.dropped:  # the lighter of the two went, and its twin stands in
            assert plan.stand_in[expert] == (expert + 6) % 12
            assert weights[expert] < weights[plan.stand_in[expert]] and plan.similarity[expert] > 0.95
        assert plan.cluster[:6] == plan.cluster[6:]


@pytest.mark.parametrize("budget", ["global", "uniform"])
def test_without_clusters_the_method_is_the_plain_ranking(budget: str) -> None:
    stats, similarity = near_copies(1)
    config = PruneConfig(ratio=0.5, budget=budget)
    plans = decide(stats, similarity, architecture(), config.replace(method="expected"))
    check_invariants(plans, similarity)
    weights = {(name, e): float(w) for name, x in stats.items() for e, w in enumerate(saliency("expected", x, 0))}
    if budget == "uniform":
        dropped = {key for name in NAMES for key in sorted((k for k in weights if k[0] == name), key=weights.get)[:6]}
    else:
        dropped = set(sorted(weights, key=weights.get)[:18])
    assert {(plan.layer, expert) for plan in plans for expert in plan.dropped} == dropped
    alone = decide(stats, similarity, architecture(), config.replace(clusters=NUM))
    assert [plan.kept for plan in alone] == [plan.kept for plan in plans]


def test_scores_rank_the_dropped_below_the_kept_across_layers() -> None:
    stats, similarity = near_copies(2)
    plans = decide(stats, similarity, architecture(), PruneConfig(ratio=0.4))
    gone = [plan.score[expert] for plan in plans for expert in plan.dropped]
    left = [plan.score[expert] for plan in plans for expert in plan.kept]
    assert len(gone) == 14 and max(gone) <= min(left)


@pytest.mark.parametrize("method", [name for name in get_args(Method) if name != "cprune-paper"])
def test_every_method_meets_ratio_and_constraints(method: str) -> None:
    stats, similarity = near_copies(3)
    config = PruneConfig(ratio=0.6, method=method, slack=1, multiple_of=2, seed=5)
    plans = decide(stats, similarity, architecture(), config)
    check_invariants(plans, similarity, inside=method in SELECTIONS)
    assert all(len(plan.kept) >= 3 and len(plan.kept) % 2 == 0 for plan in plans)
    assert sum(len(plan.dropped) for plan in plans) == 20  # 21.6 to a whole number of steps of two
    assert decide(stats, similarity, architecture(), config) == plans


def test_groups_keep_the_same_number() -> None:
    stats, similarity = near_copies(4)
    arch = architecture(n_group=3, topk_group=1)
    for budget in ("global", "uniform"):
        plans = decide(stats, similarity, arch, PruneConfig(ratio=0.4, budget=budget))
        for plan in plans:
            assert len({sum(expert // 4 == group for expert in plan.kept) for group in range(3)}) == 1
            assert len(plan.kept) >= 6


def test_super_experts_stay_unless_told_otherwise() -> None:
    loud = torch.ones(NUM, dtype=torch.float64)
    loud[7] = 500.0
    stats, similarity = near_copies(5, activation_absmax=torch.ones(NUM, dtype=torch.float64))
    weights = stats[NAMES[1]].relative_sum.clone()
    weights[7] = 0.0
    stats[NAMES[1]] = expert_stats(
        NUM, layer=NAMES[1], activation_absmax=loud, relative_sum=weights, gated_norm_sum=weights
    )
    config = PruneConfig(ratio=0.5, method="relative")
    assert 7 in decide(stats, similarity, architecture(), config)[1].kept
    assert 7 not in decide(stats, similarity, architecture(), config.replace(protect="none"))[1].kept


def test_data_free_statistics_rank_by_parameters() -> None:
    zeros = {
        name: torch.zeros(NUM, dtype=torch.float64) for name in ("relative_sum", "gated_norm_sum", "activation_absmax")
    }
    stats, similarity = near_copies(6, by="units", tokens=0, **zeros)
    config = PruneConfig(ratio=0.25, calibration="none", clusters=NUM)
    plans = decide(stats, similarity, architecture(), config)
    check_invariants(plans, similarity)
    assert sum(len(plan.dropped) for plan in plans) == 9
    for plan in plans:
        layer = stats[plan.layer]
        norms = layer.weight_gram.diagonal(dim1=1, dim2=2).sqrt().prod(0) * layer.router_gram.diagonal().sqrt()
        ranking = norms.argsort().tolist()
        assert set(plan.dropped) == set(ranking[: len(plan.dropped)])
    with refuses("method reap must have calibration text"):
        decide(stats, similarity, architecture(), config.replace(method="reap"))


@pytest.mark.parametrize("budget", ["global", "uniform"])
def test_paper_method_is_the_published_algorithm(budget: str) -> None:
    generator = torch.Generator().manual_seed(7)
    stats, similarity = near_copies(7)
    outputs = {name: torch.randn(NUM, 40, 6, generator=generator).half() for name in NAMES}
    stats = {name: expert_stats(NUM, layer=name, sequence_outputs=outputs[name]) for name in NAMES}
    config = PruneConfig(ratio=0.25, method="cprune-paper", budget=budget, paper_layer_rate=0.1)
    plans = decide(stats, similarity, architecture(), config)
    check_invariants(plans, similarity)
    expected = decide_paper(outputs, ratio=0.25, layer_rate=0.1, budget=budget)
    for plan in plans:
        assert plan.dropped == expected[plan.layer].pruned and plan.cluster == expected[plan.layer].cluster
        assert plan.score == expected[plan.layer].votes
    assert sum(len(plan.dropped) for plan in plans) == 9


def test_paper_method_that_leaves_too_few_is_refused() -> None:
    stats, similarity = near_copies(8)
    stats = {name: expert_stats(NUM, layer=name) for name in NAMES}
    config = PruneConfig(ratio=0.84, method="cprune-paper", budget="uniform")
    with refuses("ratio 0.84 must leave every layer its 3 experts per token, got 2 in model.layers.0.mlp"):
        decide(stats, similarity, architecture(top_k=3), config)
    assert [len(plan.kept) for plan in decide(stats, similarity, architecture(top_k=2), config)] == [2, 2, 2]


@pytest.mark.parametrize(
    ("options", "arch", "match"),
    [
        ({"clusters": 13}, {}, "clusters must be at most the 12 experts"),
        ({"method": "cprune-paper", "calibration": "none"}, {}, "cprune-paper must have calibration text"),
        ({"method": "cprune-paper"}, {"n_group": 2}, "router without groups, got 2"),
    ],
)
def test_what_a_method_cannot_do_is_refused_beforehand(
    options: dict[str, object], arch: dict[str, int], match: str
) -> None:
    sizes = dict.fromkeys(NAMES, NUM)
    with refuses(match):
        check_method(sizes, architecture(**arch), PruneConfig(**options))
    check_method(sizes, architecture(n_group=2), PruneConfig(clusters=12, calibration="none"))


def test_stand_ins_are_found_inside_clusters_only() -> None:
    similarity = torch.tensor([[1.0, 0.5, 0.9], [0.5, 1.0, -0.5], [0.9, -0.5, 1.0]])
    assert torch.equal(stand_in_matrix(similarity, None), torch.eye(3, dtype=torch.float64))
    got = stand_in_matrix(similarity, torch.tensor([0, 0, 1]))
    assert got.tolist() == [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]
    assert float(stand_in_matrix(similarity, torch.zeros(3))[1, 2]) == 0.0  # unlike experts do not stand in


def trunk() -> list[LayerPlan]:
    stats, similarity = near_copies(9)
    plans = decide(stats, similarity, architecture(), PruneConfig(ratio=0.25, budget="uniform"))
    assert {len(plan.kept) for plan in plans} == {9}
    return list(plans)


def test_prediction_head_keeps_as_many_as_a_uniform_trunk() -> None:
    rows = torch.randn(NUM, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    head = rank_heads("model.layers.3.mlp", rows, trunk(), architecture(), PruneConfig())
    assert head.layer == "model.layers.3.mlp"
    assert head.dropped == tuple(sorted(rows.norm(dim=1).argsort()[:3].tolist()))
    assert head.score == pytest.approx(rows.norm(dim=1).tolist())


def test_prediction_head_of_a_trunk_with_different_counts_is_left_whole() -> None:
    stats, similarity = near_copies(10)
    plans = decide(stats, similarity, architecture(), PruneConfig(ratio=0.4, method="random"))
    assert len({len(plan.kept) for plan in plans}) > 1
    rows = torch.randn(NUM, 6, dtype=torch.float64)
    head = rank_heads("model.layers.3.mlp", rows, plans, architecture(), PruneConfig())
    assert head.kept == tuple(range(NUM))


def test_prediction_head_with_groups_keeps_them_even() -> None:
    rows = torch.randn(NUM, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    head = rank_heads("model.layers.3.mlp", rows, trunk(), architecture(n_group=3), PruneConfig())
    assert len(head.kept) == 9 and all(sum(e // 4 == group for e in head.kept) == 3 for group in range(3))


def test_every_global_cluster_keeps_its_most_important_expert() -> None:
    directions = torch.eye(6, dtype=torch.float64)[:3]
    stats, similarity = {}, {}
    for scale, name in enumerate(NAMES[:2], 1):
        weights = torch.tensor([9.0, 8.0, 1.0, 7.0, 6.0, 0.5], dtype=torch.float64) * scale
        stats[name] = expert_stats(
            6,
            layer=name,
            count=torch.full((6,), 10),
            relative_sum=weights,
            gated_norm_sum=weights,
            output_sum=directions.repeat(2, 1) * 10,
        )
        similarity[name] = torch.eye(6, dtype=torch.float64)
    arch = architecture(num_experts=6, num_layers=2)
    plain = {plan.layer: plan.kept for plan in decide(stats, similarity, arch, PruneConfig(ratio=0.5))}
    config = PruneConfig(ratio=0.5, global_clusters=3)
    covered = {plan.layer: plan.kept for plan in decide(stats, similarity, arch, config)}
    assert not any(expert % 3 == 2 for kept in plain.values() for expert in kept)  # a direction is lost
    assert 2 in covered[NAMES[1]]  # its most important expert stands in the second layer
    assert sum(map(len, covered.values())) == sum(map(len, plain.values())) == 6
    with refuses("global_clusters"):
        decide(stats, similarity, arch, PruneConfig(ratio=0.5, global_clusters=13))
    with refuses("global_clusters"):
        check_method({NAMES[0]: 6}, arch, PruneConfig(global_clusters=3, calibration="none"))


def test_what_is_known_of_the_same_statistics_changes_no_decision() -> None:
    stats, similarity = near_copies()
    known: Known = {}
    methods = ("cprune", "reap", "cprune-paper")
    for linkage, ratio, method in itertools.product(("average", "ward"), (0.25, 0.5), methods):
        config = PruneConfig(linkage=linkage, ratio=ratio, method=method)
        alone = decide(stats, similarity, architecture(), config)
        assert decide(stats, similarity, architecture(), config, known) == alone
    assert sorted(map(len, known)) == [2, 3, 6, 6]  # the paper's two stages, clusters by two linkages
