"""Which experts belong together: agglomeration inside a layer (scipy), k-means and neighbours across layers (FAISS).

Everything here is a pure function, deterministic for its arguments. Labels are canonical everywhere: numbered from 0 in
the order in which the clusters first appear, so cluster 0 holds expert 0. This is the only module that imports faiss.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor

from cprune.config import Linkage
from cprune.errors import CpruneError

LINKAGES: tuple[str, ...] = Linkage.__args__  # type: ignore[attr-defined]
TIED_ROWS = 256  # rows of a k-NN graph whose ties are resolved at a time


def linkage_clusters(similarity: Tensor, *, linkage: Linkage, clusters: int | None, distance: float) -> Tensor:
    """Cluster the experts of a layer by agglomeration; labels [E] int64, canonical.

    The distance of two experts is d = 1 - similarity, made symmetric, at least 0, and 1 where similarity is not finite.
    `average` and `complete` agglomerate d itself. `ward` is defined on Euclidean distances and agglomerates sqrt(2 d),
    which is the Euclidean distance of two unit vectors whose cosine is the similarity; `distance` is converted
    likewise.

    similarity: [E, E], any floating type, E >= 1; the diagonal is not read.
    clusters: form at most this many (fewer only where merges tie, such as exact copies). None: `distance` decides.
    distance: stop merging above this value of d; 0 takes the number of clusters in 2 .. E - 1 with the best silhouette
        of the agglomerated distances (the smaller number where two are equal), and every expert on its own where no
        silhouette is above 0.
    CpruneError where similarity is not square, linkage unknown, clusters outside 1 .. E or distance negative.
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1] or similarity.shape[0] == 0:
        raise CpruneError(f"similarity must be square and not empty, got shape {list(similarity.shape)}")
    if linkage not in LINKAGES:
        raise CpruneError(f"linkage must be one of {', '.join(LINKAGES)}, got {linkage!r}")
    num = similarity.shape[0]
    if clusters is not None and not 1 <= clusters <= num:
        raise CpruneError(f"clusters must lie in 1 .. {num}, the number of experts, got {clusters}")
    if not distance >= 0.0:
        raise CpruneError(f"distance must not be negative, got {distance}")
    if num == 1:
        return torch.zeros(1, dtype=torch.int64)

    distances = _distances(similarity)
    if linkage == "ward":
        distances, distance = np.sqrt(2.0 * distances), float(np.sqrt(2.0 * distance))
    tree = hierarchy.linkage(squareform(distances, checks=False), method=linkage)
    if clusters is not None:
        labels = hierarchy.fcluster(tree, clusters, criterion="maxclust")
    elif distance > 0.0:
        labels = hierarchy.fcluster(tree, distance, criterion="distance")
    else:
        labels = _best_silhouette(tree, distances)
    return torch.from_numpy(canonical_labels(labels))


def silhouette(distances: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette (Rousseeuw, 1987) of a clustering, in [-1, 1]; higher is better.

    s_i = (b_i - a_i) / max(a_i, b_i), where a_i is the mean distance of i to the others of its cluster and b_i the
    least mean distance to another cluster. A member that is alone has s_i = 0, as has one with a_i = b_i = 0; one
    single cluster has 0.

    distances: [N, N] float64, symmetric, 0 on the diagonal. labels: [N] integers.
    """
    _, own = np.unique(labels, return_inverse=True)
    sizes = np.bincount(own)
    if len(sizes) < 2:
        return 0.0
    rows = np.arange(len(own))
    by_cluster = distances[:, np.argsort(own, kind="stable")]
    sums = np.add.reduceat(by_cluster, np.cumsum(sizes) - sizes, axis=1)  # [N, clusters]
    within = sums[rows, own] / np.maximum(sizes[own] - 1, 1)
    means = sums / sizes
    means[rows, own] = np.inf
    between = means.min(axis=1)
    largest = np.maximum(within, between)
    scored = (sizes[own] > 1) & (largest > 0.0)
    return float(np.where(scored, (between - within) / np.where(scored, largest, 1.0), 0.0).mean())


def canonical_labels(labels: np.ndarray) -> np.ndarray:
    """Renumber labels [N] from 0 by first appearance; int64."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def spherical_kmeans(vectors: Tensor, clusters: int, *, seed: int, iterations: int = 25) -> Tensor:
    """Cluster by direction: k-means under the cosine, centroids of length 1 (FAISS); labels [N] int64, canonical.

    Runs on a GPU where FAISS has one. Vectors of length zero have no direction: where there are any, one of the
    clusters is theirs alone (with clusters = 1 all share it). Fewer than `clusters` labels may appear where directions
    coincide.

    vectors: [N, D], any floating type; values that are not finite count as 0.
    CpruneError where clusters is outside 1 .. N, or FAISS is not installed.
    """
    directions = _directions(vectors)
    num, width = directions.shape
    if not 1 <= clusters <= num:
        raise CpruneError(f"clusters must lie in 1 .. {num}, the number of vectors, got {clusters}")
    faiss = _faiss()
    live = directions.any(axis=1)
    moving = directions[live]
    centroids = min(clusters - int(not live.all()), len(moving))
    labels = np.full(num, -1, dtype=np.int64)
    if centroids > 0:
        kmeans = faiss.Kmeans(
            width,
            centroids,
            niter=iterations,
            seed=seed,
            spherical=True,
            gpu=faiss.get_num_gpus() > 0,
            min_points_per_centroid=1,  # by default FAISS warns below 39
            max_points_per_centroid=num,  # by default FAISS trains on a sample above 256
        )
        kmeans.train(moving)
        labels[live] = kmeans.assign(moving)[1]
    return torch.from_numpy(canonical_labels(labels))


def knn_graph(vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest other vectors of each by cosine, nearest first, equals by lowest index (FAISS, exact search).

    vectors: [N, D], any floating type; values that are not finite count as 0, and a vector of length zero has cosine 0
    to all.
    Returns similarity [N, k] float32 and index [N, k] int64.
    CpruneError where k is outside 1 .. N - 1, or FAISS is not installed.
    """
    directions = _directions(vectors)
    num, width = directions.shape
    if not 1 <= k <= num - 1:
        raise CpruneError(f"k must lie in 1 .. {num - 1}, the number of other vectors, got {k}")
    faiss = _faiss()
    index = faiss.IndexFlatIP(width)
    if faiss.get_num_gpus() > 0:
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(directions)
    # Beside the k wanted: the vector itself, and one more to see whether equals were left out.
    similarity, neighbour = _ranked(*index.search(directions, min(k + 2, num)))
    if k + 2 <= num:
        tied = np.flatnonzero(similarity[:, k] == similarity[:, k - 1])
        for rows in np.split(tied, range(TIED_ROWS, len(tied), TIED_ROWS)):
            everyone = np.broadcast_to(np.arange(num), (len(rows), num))
            full = _ranked(directions[rows] @ directions.T, everyone, rows)
            similarity[rows, :k], neighbour[rows, :k] = full[0][:, :k], full[1][:, :k]
    return torch.from_numpy(similarity[:, :k].copy()), torch.from_numpy(neighbour[:, :k].copy())


def _distances(similarity: Tensor) -> np.ndarray:
    """d = 1 - similarity, [E, E] float64: symmetric, finite, at least 0, and 0 on the diagonal."""
    values = similarity.detach().to("cpu", torch.float64)
    distances = (1.0 - (values + values.T) / 2).numpy()
    distances = np.where(np.isfinite(distances), np.maximum(distances, 0.0), 1.0)
    np.fill_diagonal(distances, 0.0)
    return distances


def _best_silhouette(tree: np.ndarray, distances: np.ndarray) -> np.ndarray:
    best, labels = 0.0, np.arange(len(distances))
    for count in range(2, len(distances)):
        candidate = hierarchy.fcluster(tree, count, criterion="maxclust")
        score = silhouette(distances, candidate)
        if score > best:
            best, labels = score, candidate
    return labels


def _directions(vectors: Tensor) -> np.ndarray:
    """Rows scaled to length 1 (zero rows stay zero), [N, D] float32, contiguous."""
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise CpruneError(f"vectors must have shape [N, D] and not be empty, got {list(vectors.shape)}")
    values = vectors.detach().to("cpu", torch.float64)
    values = torch.where(torch.isfinite(values), values, 0.0)
    return torch.nn.functional.normalize(values, eps=1e-300).to(torch.float32).contiguous().numpy()


def _ranked(
    similarity: np.ndarray, neighbour: np.ndarray, rows: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sort every row by falling similarity, then rising index, with the row's own vector at the end."""
    rows = np.arange(len(similarity)) if rows is None else rows
    similarity = np.where(neighbour == rows[:, None], -np.inf, similarity).astype(np.float32)
    order = np.lexsort((neighbour, -similarity), axis=1)
    return np.take_along_axis(similarity, order, axis=1), np.take_along_axis(neighbour, order, axis=1)


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise CpruneError(
            "k-means and k-NN graphs must have FAISS (pip install faiss-cpu, or faiss-gpu), got no module named faiss"
        ) from error
    return faiss
