"""C-Prune (arXiv 2504.07807) as its authors' public code computes it, which is not what the paper says.

An expert stands for its outputs on the mean inputs of S calibration sequences. Batch by batch of 32 sequences the
experts are clustered; inside each cluster the members nearest to the centre get a vote; the experts with the fewest
votes go. This runs once in every layer (12 clusters), then once over the survivors of all layers together (6 clusters).

Where code and paper part, the code is followed, because published masks can only be reproduced that way:
- An expert's feature is the concatenation of 32 outputs, not their mean (Eq. 4), compared by Euclidean distance at its
  raw scale, not by cosine (Eq. 7). Since outputs grow with depth, the global stage mostly separates layers by
  magnitude.
- Ward linkage on distance profiles (row i of the distance matrix is the observation i), not average linkage (Eq. 8-10).
- The number kept per cluster follows `keep_coefficient`, not a radius (Eq. 11). It turns negative for clusters of more
  than about 2.4 layers' worth of experts, and a negative count then keeps all members but the farthest so many.
- Distances to the centre are taken in float16 and overflow to infinity above 256; equals are taken by lowest index.
- Experts are only dropped; the merging and router update of Eq. 12-13 are absent.
`--method cprune` is the corrected form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from cprune.config import Budget
from cprune.decide.clustering import canonical_labels
from cprune.decide.known import Known, once
from cprune.errors import CpruneError

BATCH = 32  # sequences clustered at a time
LAYER_CLUSTERS = 12
GLOBAL_CLUSTERS = 6
CAP = 0.9  # share of a layer above which the global stage is cut short


@dataclass(frozen=True)
class BatchClusters:
    """The clusters that one batch of sequences gives N experts."""

    labels: np.ndarray  # [N] integer  cluster of each expert, numbered as the clustering did
    scores: np.ndarray  # [N] float64  distance to the mean of the expert's cluster; may be infinite


@dataclass(frozen=True)
class PaperDecision:
    """What the algorithm decides for one layer of E experts."""

    pruned: tuple[int, ...]  # experts to drop, ascending
    cluster: tuple[int, ...]  # [E] layer-stage cluster in the first batch, numbered from 0 by first appearance
    votes: tuple[float, ...]  # [E] votes of the layer stage, and for its survivors those of the global stage on top


def layer_clusters(outputs: Tensor, *, clusters: int = LAYER_CLUSTERS, batch: int = BATCH) -> list[BatchClusters]:
    """Cluster the experts of a layer once per batch of sequences.

    Feature of an expert: its outputs on the sequences of the batch, concatenated, [batch * H] in float16. With D the
    Euclidean distances of the features, the rows of D are clustered by Ward linkage and cut into at most min(clusters,
    N) clusters. Score: |feature - mean feature of its cluster|, every step rounded to float16.

    outputs: [N, S, H], used as float16. The last batch may be shorter.
    CpruneError where outputs is empty or not finite in float16.
    """
    if outputs.ndim != 3 or 0 in outputs.shape:
        raise CpruneError(f"outputs must have shape [N, S, H] and not be empty, got {list(outputs.shape)}")
    return [_cluster_features(part, clusters) for part in outputs.split(batch, dim=1)]


def global_clusters(
    outputs: Mapping[str, Tensor],
    survivors: Mapping[str, Sequence[int]],
    *,
    clusters: int = GLOBAL_CLUSTERS,
    batch: int = BATCH,
) -> list[BatchClusters]:
    """`layer_clusters` of the survivors of all layers together, in the order of `survivors`.

    outputs: per layer [E, S, H], used as float16, S and H the same in all layers. survivors: per layer, expert numbers.
    """
    sequences = next(iter(outputs.values())).shape[1]
    result = []
    for start in range(0, sequences, batch):
        part = torch.cat([outputs[name][list(kept), start : start + batch] for name, kept in survivors.items()])
        result.append(_cluster_features(part, clusters))
    return result


def keep_coefficient(size: int, population: int) -> float:
    """c(p) = 0.6 [e^(.5-p) - e^(p-.5) / (e^(p-.5) + e^(.5-p))] + 0.5 with p = size / population.

    Of a cluster of `size` experts `vote` keeps the share c(p) (1 - rate). The bracket reads like tanh(.5 - p) with the
    parentheses misplaced, so c runs from above 1 (small clusters are kept whole) to below 0.
    """
    excess = size / population - 0.5
    rising, falling = math.exp(excess), math.exp(-excess)
    return 0.6 * (falling - rising / (rising + falling)) + 0.5


def vote(batches: Sequence[BatchClusters], *, rate: float, population: int) -> np.ndarray:
    """Votes [N] int64: in how many batches each expert was among those kept of its cluster.

    A cluster of L < 3 keeps all; else the int(c(L / population) (1 - rate) L) members of lowest score, equals by lowest
    index. Where that number is negative, -m, all but the last m are kept.

    population: experts in a layer, in the global stage too.
    """
    votes = np.zeros(len(batches[0].labels), dtype=np.int64)
    for clusters in batches:
        scores = clusters.scores.tolist()
        for label in np.unique(clusters.labels):
            members = np.flatnonzero(clusters.labels == label).tolist()
            size = len(members)
            if size >= 3:
                count = int(keep_coefficient(size, population) * (1 - rate) * size)
                members = sorted(members, key=scores.__getitem__)[:count]
            votes[members] += 1
    return votes


def layer_stage(batches: Sequence[BatchClusters], rate: float) -> list[int]:
    """The int(rate N) of a layer's N experts with the fewest votes, equals by lowest index; ascending."""
    num = len(batches[0].labels)
    return sorted(_fewest(vote(batches, rate=rate, population=num), int(rate * num)))


def global_stage(
    batches: Sequence[BatchClusters],
    survivors: Mapping[str, Sequence[int]],
    layer_pruned: Mapping[str, Sequence[int]],
    *,
    rate: float,
    layer_rate: float,
    num_experts: int,
) -> dict[str, list[int]]:
    """All experts to drop after both stages, ascending per layer, layers in the order of `survivors`.

    Of the N survivors the int(rate N) with the fewest votes go too, equals by layer and then by index. Where a layer
    would lose more than int(n // layer_rate * 0.9) in all, n of them in the layer stage, only that many of its global
    losses, fewest votes first, are taken (the layer stage's come on top). A layer with n = 0 has the limit int(0.9
    num_experts); the published code allows such a layer no loss at all.

    batches: of `global_clusters`. num_experts: E, the population of the votes.
    """
    owner = [(name, expert) for name, kept in survivors.items() for expert in kept]
    fewest = _fewest(vote(batches, rate=rate, population=num_experts), int(rate * len(owner)))
    lost: dict[str, list[int]] = {name: [] for name in survivors}
    for position in fewest:
        name, expert = owner[position]
        lost[name].append(expert)
    for name, experts in lost.items():
        before = list(layer_pruned[name])
        cap = int(len(before) // layer_rate * CAP) if before else int(CAP * num_experts)
        if len(experts) + len(before) > cap:
            experts = experts[:cap]
        lost[name] = sorted(experts + before)
    return lost


def decide_paper(
    outputs: Mapping[str, Tensor], *, ratio: float, layer_rate: float, budget: Budget, known: Known | None = None
) -> dict[str, PaperDecision]:
    """Both stages for a whole model, layer by layer of `outputs`.

    uniform: the layer stage alone, at rate = ratio, drops int(ratio E) of every layer.
    global: the layer stage at min(layer_rate, ratio) drops n = int(rate E) of every layer; the global stage then runs
    at the rate that completes the ratio, 1 - (1 - ratio) / (1 - n / E), rounded so that both together drop exactly
    int(ratio L E) of the L layers' experts. Only where the limit of `global_stage` binds do fewer go.
    The algorithm knows nothing of top-k: at high ratios a layer may keep fewer experts than the router needs, or none.

    outputs: per layer [E, S, H], used as float16: the output of every expert on the mean input of each of S sequences.
    known: of other decisions on the same outputs.
    CpruneError where layers differ in shape, are empty or not finite in float16, or a rate is outside (0, 1).
    """
    _check(outputs, ratio, layer_rate, budget)
    num = next(iter(outputs.values())).shape[0]
    rate = ratio if budget == "uniform" else min(layer_rate, ratio)
    known = {} if known is None else known
    batches = once(known, ("paper", "layers"), lambda: {name: layer_clusters(x) for name, x in outputs.items()})
    votes = {name: vote(clusters, rate=rate, population=num) for name, clusters in batches.items()}
    pruned = {name: layer_stage(clusters, rate) for name, clusters in batches.items()}

    survivors = {name: [j for j in range(num) if j not in gone] for name, gone in pruned.items()}
    remaining = sum(map(len, survivors.values()))
    wanted = int(ratio * num * len(outputs)) - (num * len(outputs) - remaining)
    if budget == "global" and wanted > 0:
        global_batches = once(known, ("paper", "global", rate), lambda: global_clusters(outputs, survivors))
        global_rate = _rate_of(wanted, remaining)
        pruned = global_stage(global_batches, survivors, pruned, rate=global_rate, layer_rate=rate, num_experts=num)
        global_votes = iter(vote(global_batches, rate=global_rate, population=num))
        for name, kept in survivors.items():
            votes[name][kept] += [next(global_votes) for _ in kept]

    return {
        name: PaperDecision(
            pruned=tuple(pruned[name]),
            cluster=tuple(canonical_labels(batches[name][0].labels).tolist()),
            votes=tuple(map(float, votes[name])),
        )
        for name in outputs
    }


def _check(outputs: Mapping[str, Tensor], ratio: float, layer_rate: float, budget: str) -> None:
    if not outputs:
        raise CpruneError("outputs must hold at least one layer, got none")
    shapes = {name: list(values.shape) for name, values in outputs.items()}
    first = next(iter(shapes))
    for name, shape in shapes.items():
        if shape != shapes[first]:
            raise CpruneError(
                f"cprune-paper must have the same experts, sequences and hidden size in all layers, "
                f"got {shapes[first]} in {first} and {shape} in {name}"
            )
    for field, value in (("ratio", ratio), ("layer_rate", layer_rate)):
        if not 0.0 < value < 1.0:
            raise CpruneError(f"{field} must lie in (0, 1), got {value}")
    if budget not in Budget.__args__:  # type: ignore[attr-defined]
        raise CpruneError(f"budget must be global or uniform, got {budget!r}")


def _cluster_features(outputs: Tensor, clusters: int) -> BatchClusters:
    """[N, B, H] -> the clusters of one batch, labels as scipy numbers them (from 1)."""
    features = outputs.detach().to("cpu", torch.float16).flatten(1).numpy()
    if not np.isfinite(features).all():
        raise CpruneError("outputs must be finite in float16, got values that are not")
    num = len(features)
    if num == 1:
        return BatchClusters(np.ones(1, dtype=np.int32), np.zeros(1))
    profiles = squareform(pdist(features))
    labels = fcluster(linkage(pdist(profiles), method="ward"), min(clusters, num), criterion="maxclust")
    scores = np.empty(num)
    with np.errstate(over="ignore"):
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            centre = features[members].mean(axis=0)
            scores[members] = [np.linalg.norm(features[member] - centre) for member in members]
    return BatchClusters(labels, scores)


def _fewest(votes: np.ndarray, count: int) -> list[int]:
    return np.argsort(votes, kind="stable")[:count].tolist()


def _rate_of(count: int, total: int) -> float:
    """The rate of which int(rate * total) is count, however the division rounds."""
    rate = count / total
    return rate if int(rate * total) == count else math.nextafter(rate, 1.0)
