"""Methods that choose a set of experts, once it is known how many a layer keeps: clusters, or the least error together.

A saliency ranks experts one by one; these look at them together. A layer is first told how many to keep (its own
floor(E x ratio), or by ranking all layers' experts by the method's saliency), then its experts are split into as many
groups, of which each keeps its best member. This is the form of the merging methods that removes experts as they are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor

from cprune.decide.clustering import canonical_labels
from cprune.decide.saliency import frequency, gate, reap, reconstruction, variability
from cprune.errors import CpruneError
from cprune.stats import ExpertStats
from cprune_kernels.pairwise import cosine_from_gram

EXHAUSTIVE = 20_000  # subsets of a layer that `least_error` compares; where there are more, it is greedy
LEAST_DOMAINS = 3  # of which a rank correlation of profiles can tell anything
REAM_GROUP = 16  # most experts of a group of REAM

Partition = Callable[[ExpertStats, Tensor, Tensor, int], Tensor]
"""(stats, weights [E], members [n], groups) -> labels [n]: exactly that many non-empty groups of the members."""

Choice = Callable[[ExpertStats, Tensor, Tensor, int], tuple[list[int], Tensor]]
"""(stats, weights [E], members [n], keep) -> (members kept, labels [n] of the members' groups)."""


@dataclass(frozen=True)
class Selection:
    """A method that chooses experts together."""

    saliency: Callable[[ExpertStats, int], Tensor]  # ranks layers against each other, and the members of a group
    choose: Choice


def select(
    method: str, stats: ExpertStats, weights: Tensor, keep: int, *, groups: int, protected: Sequence[int]
) -> tuple[list[int], Tensor]:
    """(experts kept, ascending; labels [E] int64, canonical) of one layer.

    Router groups are split one by one and keep the same number each; protected experts stay, each a group by itself.
    """
    per_group, guarded = stats.num_experts // groups, set(protected)
    kept, labels = list(guarded), torch.arange(stats.num_experts)
    for start in range(0, stats.num_experts, per_group):
        everyone = range(start, start + per_group)
        free = torch.tensor([expert for expert in everyone if expert not in guarded], dtype=torch.int64)
        wanted = keep // groups - (per_group - len(free))
        if wanted == len(free) or wanted <= 0:
            kept += free.tolist() if wanted else []
            continue
        chosen, own = SELECTIONS[method].choose(stats, weights, free, wanted)
        kept += chosen
        labels[free] = stats.num_experts * (start + 1) + own
    return sorted(kept), torch.from_numpy(canonical_labels(labels.numpy()))


def best_of_each(partition: Partition) -> Choice:
    """Keep the member with the greatest weight of each group (ties: the lowest)."""

    def choose(stats: ExpertStats, weights: Tensor, members: Tensor, keep: int) -> tuple[list[int], Tensor]:
        labels = partition(stats, weights, members, keep)
        groups = [members[labels == label] for label in labels.unique()]
        return [int(group[weights[group].argmax()]) for group in groups], labels

    return choose


def hc_smoe(stats: ExpertStats, weights: Tensor, members: Tensor, groups: int) -> Tensor:
    """HC-SMoE (ICML 2025): average linkage on the Euclidean distance of the experts' mean outputs over the sample."""
    gram = stats.mean_gram[members][:, members]
    squares = torch.diagonal(gram)
    return _agglomerated((squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * gram).clamp_min(0).sqrt(), groups)


def m_smoe(stats: ExpertStats, weights: Tensor, members: Tensor, groups: int) -> Tensor:
    """M-SMoE (ICLR 2024): the most used experts are dominant; the others join the one with the most alike routing.

    Routing policies compare by the cosine of the router's rows, that of the logits where inputs have no direction.
    """
    return _joined(cosine_from_gram(stats.router_gram)[members][:, members], weights[members], groups, len(members))


def ream(stats: ExpertStats, weights: Tensor, members: Tensor, groups: int) -> Tensor:
    """REAM (2604.04356): the most salient are centroids, which take in turn the most alike of the rest, 15 at most.

    Alike by the mean of the cosine of gated outputs over the sample, and of the router's rows, mapped to [0, 1].
    """
    alike = (cosine_from_gram(stats.gated_gram) + cosine_from_gram(stats.router_gram)) / 2
    return _joined((1 + alike[members][:, members]) / 2, weights[members], groups, REAM_GROUP)


def group_merge(stats: ExpertStats, weights: Tensor, members: Tensor, groups: int) -> Tensor:
    """Group & Merge (2407.09590): the graph of experts cut so that the disparity 1 - CKA inside groups is least.

    Average linkage, then experts move singly to another group for as long as that lowers the sum over all pairs of a
    group, the steepest move first.
    """
    return _cut(stats.cka[members][:, members], groups)


def group_merge_weights(stats: ExpertStats, weights: Tensor, members: Tensor, groups: int) -> Tensor:
    """Group & Merge (2407.09590) by the model instead of data: 1 - cosine of surrogates for the experts' weights.

    The surrogates are sketches of the products of an expert's projections, which the order of its hidden units does
    not change (`measure.similarity.unit_signatures`).
    """
    return _cut(cosine_from_gram(stats.unit_gram)[members][:, members], groups)


def mop(stats: ExpertStats, weights: Tensor, members: Tensor, groups: int) -> Tensor:
    """MoP (2511.19822): Ward linkage on 1 - Spearman's correlation of the experts' profiles over domains.

    A profile is the expert's sum_t g |f| per token of each domain, as its share among the layer's experts there.
    Raises CpruneError for fewer than three domains.
    """
    if len(stats.domain_tokens) < LEAST_DOMAINS:
        raise CpruneError(
            f"method mop must have text of at least {LEAST_DOMAINS} domains, "
            f"got {len(stats.domain_tokens)} (name more sources in --calibration)"
        )
    share = stats.domain_gated_sum / stats.domain_gated_sum.sum(1, keepdim=True).clamp_min(1e-300)  # [D, E]
    ranks = _ranks(share[:, members].T)
    ranks = ranks - ranks.mean(1, keepdim=True)
    return _agglomerated(1 - cosine_from_gram(ranks @ ranks.T), groups, "ward")


def least_error(stats: ExpertStats, weights: Tensor, members: Tensor, keep: int) -> tuple[list[int], Tensor]:
    """Keep the set whose output is nearest to that of all experts (NAEE, 2402.14800), by the sample's routing.

    For the dropped set D, |sum_{j in D} g_j f_j|^2 over the sample, 1_D' G 1_D with G the gated Gram: what the layer
    lacks before its router turns to others. All subsets are compared where there are at most 20000; else experts leave
    one by one, the one that adds the least error. Ties: the lower indices go.
    """
    gram, num = stats.gated_gram[members][:, members], len(members)
    if math.comb(num, keep) <= EXHAUSTIVE:
        dropped = torch.tensor(list(itertools.combinations(range(num), num - keep)), dtype=torch.int64)
        gone = torch.zeros(len(dropped), num, dtype=torch.float64).scatter_(1, dropped, 1.0)
        best = gone[int(((gone @ gram) * gone).sum(1).argmin())].bool()
    else:
        best, cross = torch.zeros(num, dtype=torch.bool), torch.zeros(num, dtype=torch.float64)
        for _ in range(num - keep):
            leaver = int((torch.diagonal(gram) + 2 * cross).masked_fill(best, torch.inf).argmin())
            best[leaver] = True
            cross += gram[leaver]
    return members[~best].tolist(), torch.arange(num)


SELECTIONS: Mapping[str, Selection] = {
    "hc-smoe": Selection(frequency, best_of_each(hc_smoe)),
    "m-smoe": Selection(frequency, best_of_each(m_smoe)),
    "ream": Selection(reap, best_of_each(ream)),
    "group-merge": Selection(gate, best_of_each(group_merge)),
    "group-merge-weights": Selection(gate, best_of_each(group_merge_weights)),
    "mop": Selection(variability, best_of_each(mop)),
    "naee": Selection(reconstruction, least_error),
}


def _agglomerated(distances: Tensor, groups: int, linkage: str = "average") -> Tensor:
    """Labels [n] of exactly `groups` clusters of [n, n] distances: the linkage's tree without its last merges."""
    condensed = squareform(distances.double().numpy(), checks=False)
    tree = hierarchy.linkage(condensed, method=linkage)
    labels = hierarchy.cut_tree(tree, n_clusters=groups).flatten()
    return torch.from_numpy(canonical_labels(labels.astype(np.int64)))


def _joined(alike: Tensor, weights: Tensor, groups: int, most: int) -> Tensor:
    """Labels [n]: the `groups` heaviest are centres; each of the rest goes to the most alike with fewer than `most`.

    The pairs are settled from the most alike down; where all groups are full, they grow beyond `most`.
    """
    num = len(weights)
    centres = torch.argsort(weights, descending=True, stable=True)[:groups].sort().values
    labels = torch.full((num,), -1, dtype=torch.int64)
    labels[centres] = torch.arange(groups)
    most = max(most, -(-num // groups))
    rest = (labels < 0).nonzero().flatten()
    for pair in torch.argsort(alike[rest][:, centres].flatten(), descending=True, stable=True).tolist():
        member, group = int(rest[pair // groups]), pair % groups
        if labels[member] < 0 and int((labels == group).sum()) < most:
            labels[member] = group
    return labels


def _cut(alike: Tensor, groups: int) -> Tensor:
    """Labels [n] of `groups` groups, with a disparity of 1 - alike [n, n] inside them that no single move lowers."""
    disparity = (1 - alike.double()).clamp_min(0)
    return _relocated(disparity.fill_diagonal_(0), _agglomerated(disparity, groups))


def _relocated(disparity: Tensor, labels: Tensor) -> Tensor:
    """Labels from which no single move lowers the disparity inside groups; no group is emptied."""
    num, groups = len(labels), int(labels.max()) + 1
    labels = labels.clone()
    for _ in range(num * num):  # every move lowers the sum, so it ends by itself long before
        inside = torch.nn.functional.one_hot(labels, groups).double()
        towards = disparity @ inside  # [n, groups]: the disparity of i with the members of a group
        gain = towards.gather(1, labels.unsqueeze(1)) - towards
        gain[inside.sum(0)[labels] == 1] = 0.0  # alone, it has to stay
        best = int(gain.argmax())
        if gain.flatten()[best] <= 1e-12 * disparity.sum():
            break
        labels[best // groups] = best % groups
    return torch.from_numpy(canonical_labels(labels.numpy()))


def _ranks(values: Tensor) -> Tensor:
    """Ranks along the rows of [n, D], float64, equal values sharing their mean rank."""
    less = (values.unsqueeze(1) < values.unsqueeze(2)).sum(2)
    same = (values.unsqueeze(1) == values.unsqueeze(2)).sum(2)
    return less.double() + (same.double() - 1) / 2
