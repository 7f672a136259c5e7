from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from cprune.decide import selection
from cprune.decide.selection import (
    SELECTIONS,
    Partition,
    group_merge,
    group_merge_weights,
    hc_smoe,
    least_error,
    m_smoe,
    mop,
    ream,
    select,
)
from tests.synthetic import expert_stats, refuses

NUM = 8


def everyone(num: int = NUM) -> Tensor:
    return torch.arange(num)


def gram_of(rows: Tensor) -> Tensor:
    return rows.double() @ rows.double().T


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def groups_of(labels: Tensor) -> set[frozenset[int]]:
    return {frozenset((labels == label).nonzero().flatten().tolist()) for label in labels.unique()}


def agglomerate(distance: Tensor, groups: int) -> set[frozenset[int]]:
    """Average linkage from its definition: the two clusters with the least mean distance merge, again and again."""
    clusters = [frozenset([expert]) for expert in range(len(distance))]
    while len(clusters) > groups:
        one, other = min(
            itertools.combinations(clusters, 2),
            key=lambda pair: sum(float(distance[i, j]) for i in pair[0] for j in pair[1]) / len(pair[0]) / len(pair[1]),
        )
        clusters = [cluster for cluster in clusters if cluster not in (one, other)] + [one | other]
    return set(clusters)


def partitions(items: Sequence[int], groups: int) -> Iterator[list[list[int]]]:
    """Every way to split the items into so many groups."""
    if not items:
        if groups == 0:
            yield []
        return
    first, rest = items[0], items[1:]
    for split in partitions(rest, groups - 1):
        yield [[first], *split]
    for split in partitions(rest, groups):
        for place in range(len(split)):
            yield [*split[:place], [first, *split[place]], *split[place + 1 :]]


@pytest.mark.parametrize("groups", [1, 2, 5, 7, 8])
def test_hc_smoe_agglomerates_mean_outputs(groups: int) -> None:
    for seed in range(5):
        means = draw(NUM, 6, seed=seed)
        labels = hc_smoe(expert_stats(NUM, mean_gram=gram_of(means)), torch.ones(NUM), everyone(), groups)
        assert groups_of(labels) == agglomerate(torch.cdist(means, means), groups)


def test_copies_still_make_the_number_of_groups_asked_for() -> None:
    means = draw(2, 6)[torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])]
    for groups in range(1, NUM + 1):
        labels = hc_smoe(expert_stats(NUM, mean_gram=gram_of(means)), torch.ones(NUM), everyone(), groups)
        assert len(groups_of(labels)) == groups
    assert groups_of(hc_smoe(expert_stats(NUM, mean_gram=gram_of(means)), torch.ones(NUM), everyone(), 2)) == {
        frozenset(range(4)),
        frozenset(range(4, 8)),
    }


def test_m_smoe_joins_the_dominant_expert_with_the_most_alike_router_row() -> None:
    for seed in range(5):
        rows, weights = draw(NUM, 5, seed=seed), torch.rand(NUM, dtype=torch.float64)
        stats = expert_stats(NUM, router_gram=gram_of(rows))
        labels = m_smoe(stats, weights, everyone(), 3)
        dominant = sorted(range(NUM), key=lambda e: -float(weights[e]))[:3]
        for expert in range(NUM):
            nearest = max(dominant, key=lambda d: float(torch.cosine_similarity(rows[expert], rows[d], dim=0)))
            assert labels[expert] == labels[expert if expert in dominant else nearest]
        kept, _ = SELECTIONS["m-smoe"].choose(stats, weights, everyone(), 3)
        assert sorted(kept) == sorted(dominant)


def test_ream_keeps_the_salient_and_fills_no_group_beyond_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "REAM_GROUP", 3)
    outputs, rows, weights = draw(NUM, 9, seed=1), draw(NUM, 5, seed=2), torch.arange(NUM).double()
    stats = expert_stats(NUM, gated_gram=gram_of(outputs), router_gram=gram_of(rows))
    labels = ream(stats, weights, everyone(), 4)
    alike = {
        (i, j): float(torch.cosine_similarity(outputs[i], outputs[j], dim=0))
        + float(torch.cosine_similarity(rows[i], rows[j], dim=0))
        for i in range(4)
        for j in range(4, NUM)
    }
    group = {centre: [centre] for centre in range(4, NUM)}
    for member, centre in sorted(alike, key=alike.get, reverse=True):
        if not any(member in members for members in group.values()) and len(group[centre]) < 3:
            group[centre].append(member)
    assert groups_of(labels) == {frozenset(members) for members in group.values()}


@pytest.mark.parametrize(("partition", "field"), [(group_merge, "cka"), (group_merge_weights, "unit_gram")])
@pytest.mark.parametrize("groups", [2, 3, 4])
def test_group_merge_cuts_the_graph_where_no_single_move_helps(groups: int, partition: Partition, field: str) -> None:
    def inside(split: set[frozenset[int]], disparity: Tensor) -> float:
        return sum(float(disparity[i, j]) for group in split for i, j in itertools.combinations(sorted(group), 2))

    for seed in range(8):
        blocks = torch.arange(7) % groups
        apart = (blocks.unsqueeze(0) != blocks.unsqueeze(1)).double()
        noise = torch.rand(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for strength in (0.1, 1.0):
            disparity = (0.6 * apart + strength * 0.4 * (noise + noise.T) / 2).fill_diagonal_(0)
            split = groups_of(partition(expert_stats(7, **{field: 1 - disparity}), torch.ones(7), everyone(7), groups))
            assert len(split) == groups
            best = min(inside({frozenset(g) for g in p}, disparity) for p in partitions(range(7), groups))
            if strength < 1:  # the blocks are plain to see
                assert inside(split, disparity) == pytest.approx(best)
            for group in split:
                for expert in group if len(group) > 1 else ():
                    for other in split - {group}:
                        moved = (split - {group, other}) | {group - {expert}, other | {expert}}
                        assert inside(moved, disparity) >= inside(split, disparity) - 1e-9


def test_mop_tells_profiles_over_domains_apart_by_rank() -> None:
    """Experts of even number rise over the domains, the others fall: scale and curvature do not matter."""
    rise = torch.tensor([1.0, 2.0, 5.0, 9.0], dtype=torch.float64)
    profiles = torch.stack([(rise if e % 2 == 0 else rise.flip(0)) ** (1 + e % 3) * 10.0**e for e in range(6)], dim=1)
    stats = expert_stats(6, domain_tokens=torch.tensor([9, 9, 9, 9]), domain_gated_sum=profiles)
    share = (profiles / profiles.sum(1, keepdim=True)).numpy()
    expected = np.array([[spearmanr(share[:, i], share[:, j]).statistic for j in range(6)] for i in range(6)])
    ranks = selection._ranks(torch.from_numpy(share).T)
    ranks = ranks - ranks.mean(1, keepdim=True)
    assert np.allclose(selection.cosine_from_gram(ranks @ ranks.T).numpy(), expected, atol=1e-12)
    together = groups_of(mop(stats, torch.ones(6), everyone(6), 2))
    assert max(abs(expected[i, j] - 1) for group in together for i in group for j in group) < 1.0
    with refuses("method mop must have text of at least 3 domains, got 1 "):
        mop(expert_stats(6, domain_tokens=torch.tensor([9])), torch.ones(6), everyone(6), 2)


def test_ranks_share_the_mean_of_equals() -> None:
    assert selection._ranks(torch.tensor([[3.0, 1.0, 3.0, 2.0]])).tolist() == [[2.5, 0.0, 2.5, 1.0]]


def routed_outputs(seed: int, num: int = NUM, tokens: int = 40) -> Tensor:
    """[T, E, H]: gated outputs, three experts a token."""
    outputs = draw(tokens, num, 5, seed=seed)
    order = torch.rand(tokens, num, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return outputs * (order < 3).unsqueeze(2)


def error_without(outputs: Tensor, dropped: Sequence[int]) -> float:
    return float(outputs[:, list(dropped)].sum(1).square().sum())


@pytest.mark.parametrize("keep", [2, 5, 7])
def test_naee_finds_the_subset_of_least_error(keep: int) -> None:
    for seed in range(5):
        outputs = routed_outputs(seed)
        stats = expert_stats(NUM, gated_gram=torch.einsum("tih,tjh->ij", outputs, outputs))
        kept, _ = least_error(stats, torch.ones(NUM), everyone(), keep)
        best = min(itertools.combinations(range(NUM), NUM - keep), key=lambda gone: error_without(outputs, gone))
        assert kept == [expert for expert in range(NUM) if expert not in best]


def test_naee_is_greedy_where_subsets_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = routed_outputs(9)
    stats = expert_stats(NUM, gated_gram=torch.einsum("tih,tjh->ij", outputs, outputs))
    monkeypatch.setattr(selection, "EXHAUSTIVE", math.comb(NUM, 4) - 1)
    gone: list[int] = []
    for _ in range(4):
        rest = [expert for expert in range(NUM) if expert not in gone]
        gone.append(min(rest, key=lambda expert: error_without(outputs, [*gone, expert])))
    kept, _ = least_error(stats, torch.ones(NUM), everyone(), 4)
    assert kept == sorted(set(range(NUM)) - set(gone))


@pytest.mark.parametrize("method", sorted(SELECTIONS))
def test_selection_keeps_the_heaviest_of_each_group_and_what_is_protected(method: str) -> None:
    stats = expert_stats(12, seed=3)
    weights = SELECTIONS[method].saliency(stats, 0)
    for groups, keep in ((1, 5), (3, 6), (2, 4), (1, 12), (1, 2)):
        kept, labels = select(method, stats, weights, keep, groups=groups, protected=[4, 9])
        assert len(kept) == keep == len(set(kept)) and kept == sorted(kept) and {4, 9} <= set(kept)
        assert len({sum(e // (12 // groups) == g for e in kept) for g in range(groups)}) == 1
        assert labels.tolist()[0] == 0 and set(labels.tolist()) == set(range(int(labels.max()) + 1))
        for expert in (4, 9):
            assert int((labels == labels[expert]).sum()) == 1
        if method != "naee" and keep > 2:
            for label in labels.unique():
                members = (labels == label).nonzero().flatten()
                assert sum(e in kept for e in members.tolist()) == 1
                assert weights[[e for e in kept if labels[e] == label][0]] == weights[members].max()
