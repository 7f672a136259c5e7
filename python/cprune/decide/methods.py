"""From statistics to LayerPlans: the corrected C-Prune (default), the published one, single saliencies, selections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from cprune.checkpoint import Architecture
from cprune.config import NONE, PruneConfig
from cprune.decide.budget import Counts, RemovalOrder, allocate, allowed_counts, marginal_costs, removal_order
from cprune.decide.clustering import linkage_clusters, spherical_kmeans
from cprune.decide.known import Known, once
from cprune.decide.paper import decide_paper
from cprune.decide.saliency import saliency, super_experts, with_domain_floor
from cprune.decide.selection import SELECTIONS, select
from cprune.errors import CpruneError
from cprune.plan import LayerPlan
from cprune.stats import ExpertStats
from cprune_kernels.pairwise import cosine_from_gram

DATA_FREE = ("cprune", "random")  # the methods that parameters suffice for


def decide(
    stats: Mapping[str, ExpertStats],
    similarity: Mapping[str, torch.Tensor],
    architecture: Architecture,
    config: PruneConfig,
    known: Known | None = None,
) -> tuple[LayerPlan, ...]:
    """Decide which experts every layer keeps.

    Args:
        stats: by layer name, in order of depth.
        similarity: by layer name, [E, E] float64 in [-1, 1], symmetric, 1 on the diagonal.
        known: of other decisions on the same statistics; what this one finds is added.
    Raises CpruneError where the ratio and the constraints cannot both be met, or a method lacks its statistics.
    """
    known = {} if known is None else known
    if config.method == "cprune-paper":
        return _decide_paper(stats, similarity, architecture, config, known)
    protected = super_experts(stats) if config.protect == "super" else dict.fromkeys(stats, ())
    options = config.calibration, config.similarity, config.linkage, config.clusters, config.cluster_distance
    clusters = once(
        known,
        ("clusters", *options),
        lambda: {name: layer_clusters(matrix, config) for name, matrix in similarity.items()},
    )
    weights = {name: importance(layer, config) for name, layer in stats.items()}
    if config.global_clusters:
        leaders = cluster_leaders(stats, weights, config)
        protected = {name: tuple(sorted({*protected[name], *leaders[name]})) for name in stats}
    counts: dict[str, Counts] = {}
    orders: dict[str, RemovalOrder] = {}
    stand_in: dict[str, torch.Tensor] = {}
    for name, layer in stats.items():
        clustered = config.method == "cprune"
        stand_in[name] = stand_in_matrix(similarity[name], clusters[name] if clustered else None)
        counts[name] = allowed_counts(layer.num_experts, architecture, config, len(protected[name]))
        orders[name] = removal_order(weights[name], stand_in[name], counts=counts[name], protected=protected[name])
    removed = allocate(orders, counts, config)
    if config.method in SELECTIONS:
        plans = []
        for name, layer in stats.items():
            keep, groups = layer.num_experts - removed[name], architecture.n_group
            kept, labels = select(config.method, layer, weights[name], keep, groups=groups, protected=protected[name])
            plans.append(layer_plan(name, kept, weights[name].tolist(), similarity[name], labels, inside=True))
        return tuple(plans)
    return tuple(
        _layer_plan(name, orders[name], removed[name], weights[name], stand_in[name], similarity[name], clusters[name])
        for name in stats
    )


def importance(stats: ExpertStats, config: PruneConfig) -> torch.Tensor:
    """[E] float64: what the experts of a layer are worth by the method's saliency, with the floor for every domain.

    Raises CpruneError where the method needs tokens and the statistics are data-free.
    """
    selection = SELECTIONS.get(config.method)
    if selection is None:
        weights = saliency(config.method, stats, config.seed)
    elif stats.tokens:
        weights = selection.saliency(stats, config.seed)
    else:
        raise CpruneError(f"method {config.method} must have calibration text, got --calibration none")
    return with_domain_floor(weights, stats, config.domain_floor)


def cluster_leaders(
    stats: Mapping[str, ExpertStats], weights: Mapping[str, torch.Tensor], config: PruneConfig
) -> dict[str, tuple[int, ...]]:
    """The most important expert of each of `global_clusters` groups over the experts of all layers, by layer.

    All experts write into one residual stream, so their mean outputs are comparable across layers; FAISS groups their
    directions by spherical k-means. An expert that was never routed to has none and leads no group.
    """
    means = torch.cat([layer.output_sum / layer.count.clamp_min(1).unsqueeze(1) for layer in stats.values()])
    if config.global_clusters > len(means):
        raise CpruneError(f"global_clusters must be at most the {len(means)} experts, got {config.global_clusters}")
    labels = spherical_kmeans(means, config.global_clusters, seed=config.seed)
    everyone = [(name, expert) for name, layer in stats.items() for expert in range(layer.num_experts)]
    weight = torch.cat([weights[name] for name in stats])
    leaders: dict[str, list[int]] = {name: [] for name in stats}
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        leader = int(members[weight[members].argmax()])
        if weight[leader] > 0:
            name, expert = everyone[leader]
            leaders[name].append(expert)
    return {name: tuple(sorted(experts)) for name, experts in leaders.items()}


def check_method(sizes: Mapping[str, int], architecture: Architecture, config: PruneConfig) -> None:
    """Raise CpruneError where the method cannot work on layers of these sizes, or with this router or calibration."""
    if config.clusters is not None and config.clusters > min(sizes.values()):
        raise CpruneError(
            f"clusters must be at most the {min(sizes.values())} experts of a layer, got {config.clusters}"
        )
    if config.calibration == NONE:
        for option in ("global_clusters", "domain_floor"):
            if getattr(config, option):
                raise CpruneError(f"{option} must have calibration text, got --calibration none")
        if config.method not in DATA_FREE:
            raise CpruneError(f"method {config.method} must have calibration text, got --calibration none")
    if config.method != "cprune-paper":
        return
    default = PruneConfig()
    for option in ("slack", "min_keep", "multiple_of", "global_clusters", "domain_floor"):
        if getattr(config, option) != getattr(default, option):
            raise CpruneError(
                f"method cprune-paper must have {option} {getattr(default, option)}, since the published algorithm "
                f"knows no such constraint, got {getattr(config, option)}"
            )
    if architecture.n_group > 1:
        raise CpruneError(f"method cprune-paper must have a router without groups, got {architecture.n_group} groups")


def layer_clusters(similarity: torch.Tensor, config: PruneConfig) -> torch.Tensor:
    """[E] int64: the clusters of one layer by `config`'s linkage, number or distance."""
    return linkage_clusters(
        similarity, linkage=config.linkage, clusters=config.clusters, distance=config.cluster_distance
    )


def stand_in_matrix(similarity: torch.Tensor, clusters: torch.Tensor | None) -> torch.Tensor:
    """[E, E] float64 in [0, 1]: how well j stands in for i; only inside a cluster, and not at all without clusters."""
    num = similarity.shape[0]
    if clusters is None:
        return torch.eye(num, dtype=torch.float64)
    together = clusters.unsqueeze(0) == clusters.unsqueeze(1)
    return torch.where(together, similarity.double().clamp(0.0, 1.0), 0.0).fill_diagonal_(1.0)


def _layer_plan(
    name: str,
    order: RemovalOrder,
    removed: int,
    weights: torch.Tensor,
    stand_in: torch.Tensor,
    similarity: torch.Tensor,
    clusters: torch.Tensor,
) -> LayerPlan:
    gone = set(order.experts[:removed])
    kept = [expert for expert in range(len(weights)) if expert not in gone]
    score = torch.zeros(len(weights), dtype=torch.float64)
    score[kept] = marginal_costs(weights, stand_in, kept)
    for expert, cost in zip(order.experts[:removed], order.costs, strict=False):
        score[expert] = cost
    return layer_plan(name, kept, score.tolist(), similarity, clusters)


def layer_plan(
    name: str,
    kept: list[int],
    score: list[float],
    similarity: torch.Tensor,
    clusters: torch.Tensor,
    *,
    inside: bool = False,
) -> LayerPlan:
    """A LayerPlan with every expert's stand-in: itself where kept, else the most similar kept one (ties: lowest).

    Args:
        inside: look for the stand-in in the expert's own cluster first.
    """
    num = similarity.shape[0]
    apart = (clusters.unsqueeze(0) != clusters.unsqueeze(1)).to(similarity.dtype) * (4.0 * inside)  # more than 1 - -1
    nearest = (similarity - apart)[:, kept].argmax(dim=1).tolist()  # the first of equals
    stand_in = [expert if expert in set(kept) else kept[nearest[expert]] for expert in range(num)]
    return LayerPlan(
        layer=name,
        num_experts=num,
        kept=tuple(kept),
        cluster=tuple(clusters.tolist()),
        score=tuple(score),
        stand_in=tuple(stand_in),
        similarity=tuple(round(float(similarity[expert, other]), 6) for expert, other in enumerate(stand_in)),
    )


def _decide_paper(
    stats: Mapping[str, ExpertStats],
    similarity: Mapping[str, torch.Tensor],
    architecture: Architecture,
    config: PruneConfig,
    known: Known,
) -> tuple[LayerPlan, ...]:
    decisions = decide_paper(
        {name: layer.sequence_outputs for name, layer in stats.items()},
        ratio=config.ratio,
        layer_rate=config.paper_layer_rate,
        budget=config.budget,
        known=known,
    )
    plans = []
    for name, decision in decisions.items():
        kept = [expert for expert in range(stats[name].num_experts) if expert not in set(decision.pruned)]
        if len(kept) < architecture.top_k:
            raise CpruneError(
                f"ratio {config.ratio} must leave every layer its {architecture.top_k} experts per token, "
                f"got {len(kept)} in {name} by cprune-paper"
            )
        plans.append(layer_plan(name, kept, list(decision.votes), similarity[name], torch.tensor(decision.cluster)))
    return tuple(plans)


def rank_heads(
    name: str, rows: torch.Tensor, trunk: Sequence[LayerPlan], architecture: Architecture, config: PruneConfig
) -> LayerPlan:
    """Plan for a multi-token-prediction head, which no forward pass runs: ranked by its router's row norms [E, H].

    Engines read one expert count for trunk and heads, so a head keeps what the trunk keeps where that is one number;
    with per-layer counts it is left whole.
    """
    num = rows.shape[0]
    kept_counts = {len(layer.kept) for layer in trunk}
    keep = kept_counts.pop() if len(kept_counts) == 1 else num
    unit = cosine_from_gram(rows @ rows.T)
    counts = Counts(num, architecture.n_group, tuple(range(num, keep - 1, -1)))
    order = removal_order(rows.norm(dim=1), torch.eye(num, dtype=torch.float64), counts=counts)
    return _layer_plan(
        name,
        order,
        num - keep,
        rows.norm(dim=1),
        torch.eye(num, dtype=torch.float64),
        unit,
        layer_clusters(unit, config),
    )
