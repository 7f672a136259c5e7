"""clustering.py against brute-force agglomeration, silhouettes and neighbours."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from cprune.decide.clustering import canonical_labels, knn_graph, linkage_clusters, silhouette, spherical_kmeans
from cprune.errors import CpruneError


def random_similarity(num: int, seed: int) -> Tensor:
    """Cosines of random vectors: [E, E] float64, no two distances equal."""
    unit = torch.nn.functional.normalize(
        torch.randn(num, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    )
    return unit @ unit.T


def blobs(sizes: list[int], width: int, spread: float, seed: int) -> tuple[Tensor, np.ndarray]:
    """Vectors of random length around orthogonal directions, shuffled; and which direction each came from."""
    rng = np.random.default_rng(seed)
    source = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    vectors = np.eye(len(sizes), width)[source] + spread * rng.standard_normal((len(source), width))
    return torch.from_numpy(vectors * rng.uniform(0.1, 30.0, (len(source), 1))), source


def first_appearance(labels: list[int] | np.ndarray) -> list[int]:
    seen: dict[int, int] = {}
    return [seen.setdefault(int(label), len(seen)) for label in labels]


def agglomerate(distances: np.ndarray, kind: str, clusters: int, threshold: float) -> list[int]:
    """Merge the closest two groups until `clusters` are left, or none are within `threshold`."""
    groups = [[i] for i in range(len(distances))]
    reduce = {"average": np.mean, "complete": np.max}[kind]
    while len(groups) > clusters:
        apart = {
            (a, b): reduce([distances[i, j] for i in groups[a] for j in groups[b]])
            for a in range(len(groups))
            for b in range(a)
        }
        a, b = min(apart, key=lambda pair: apart[pair])
        if apart[a, b] > threshold:
            break
        groups[b] += groups.pop(a)
    owner = {i: number for number, group in enumerate(groups) for i in group}
    return first_appearance([owner[i] for i in range(len(distances))])


def plain_silhouette(distances: np.ndarray, labels: list[int]) -> float:
    num, total = len(labels), 0.0
    for i in range(num):
        mean_to = {
            other: np.mean([distances[i, j] for j in range(num) if labels[j] == other and j != i])
            for other in set(labels)
            if any(labels[j] == other and j != i for j in range(num))
        }
        if labels[i] in mean_to:
            a, b = mean_to.pop(labels[i]), min(mean_to.values())
            total += (b - a) / max(a, b) if max(a, b) > 0 else 0.0
    return total / num


@pytest.mark.parametrize("kind", ["average", "complete"])
@pytest.mark.parametrize("num", [2, 9, 14])
def test_agglomeration_agrees_with_brute_force(kind: str, num: int) -> None:
    similarity = random_similarity(num, seed=num)
    distances = 1.0 - similarity.numpy()
    for clusters in range(1, num + 1):
        found = linkage_clusters(similarity, linkage=kind, clusters=clusters, distance=0.5)
        assert found.dtype == torch.int64
        assert found.tolist() == agglomerate(distances, kind, clusters, np.inf)
    for threshold in (0.05, 0.3, 0.5, 0.9, 1.3, 2.0):
        found = linkage_clusters(similarity, linkage=kind, clusters=None, distance=threshold)
        assert found.tolist() == agglomerate(distances, kind, 1, threshold)


@pytest.mark.parametrize("num", [7, 131])
def test_ward_of_similarities_is_ward_of_the_unit_vectors(num: int) -> None:
    unit = torch.nn.functional.normalize(
        torch.randn(num, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    )
    tree = linkage(unit.numpy(), method="ward")
    for clusters in (1, 2, 5, num // 2, num):
        found = linkage_clusters(unit @ unit.T, linkage="ward", clusters=clusters, distance=0.5)
        assert found.tolist() == first_appearance(fcluster(tree, clusters, criterion="maxclust"))
    for threshold in (0.02, 0.3, 1.1):
        found = linkage_clusters(unit @ unit.T, linkage="ward", clusters=None, distance=threshold)
        assert found.tolist() == first_appearance(fcluster(tree, (2 * threshold) ** 0.5, criterion="distance"))


def test_silhouette_by_hand_and_by_loop() -> None:
    line = np.array([0.0, 1.0, 5.0, 6.0, 20.0])
    distances = np.abs(line[:, None] - line[None])
    pairs = (4.5 / 5.5 + 3.5 / 4.5) * 2  # outer and inner members of {0, 1} and {5, 6}
    assert silhouette(distances, np.array([4, 4, 1, 1, 7])) == pytest.approx(pairs / 5)
    assert silhouette(distances, np.zeros(5, dtype=int)) == 0.0
    assert silhouette(np.zeros((4, 4)), np.array([0, 0, 1, 1])) == 0.0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        distances = 1.0 - random_similarity(23, seed).numpy()
        np.fill_diagonal(distances, 0.0)
        labels = rng.integers(0, 2 + 2 * seed, 23)
        assert silhouette(distances, labels) == pytest.approx(plain_silhouette(distances, labels.tolist()), abs=1e-12)


@pytest.mark.parametrize("kind", ["average", "complete"])
def test_silhouette_chooses_the_best_number(kind: str) -> None:
    similarity = random_similarity(15, seed=8)
    distances = 1.0 - similarity.numpy()
    candidates = [agglomerate(distances, kind, count, np.inf) for count in range(2, 15)]
    scores = [plain_silhouette(distances, labels) for labels in candidates]
    found = linkage_clusters(similarity, linkage=kind, clusters=None, distance=0.0)
    assert found.tolist() == candidates[int(np.argmax(scores))]


@pytest.mark.parametrize("kind", ["average", "complete", "ward"])
def test_silhouette_finds_planted_groups_and_leaves_strangers_alone(kind: str) -> None:
    vectors, source = blobs([3, 8, 5, 2], width=24, spread=0.02, seed=1)
    unit = torch.nn.functional.normalize(vectors)
    found = linkage_clusters((unit @ unit.T).float(), linkage=kind, clusters=None, distance=0.0)
    assert found.tolist() == first_appearance(source)
    assert linkage_clusters(torch.eye(9), linkage=kind, clusters=None, distance=0.0).tolist() == list(range(9))


@pytest.mark.parametrize("kind", ["average", "complete", "ward"])
@pytest.mark.parametrize("num", [131, 300])
def test_ragged_sizes_with_dead_experts_and_copies(kind: str, num: int) -> None:
    similarity = random_similarity(num, seed=num)
    similarity[:, 7] = similarity[7, :] = float("nan")
    similarity[:, 11] = similarity[11, :] = float("-inf")
    similarity[5], similarity[:, 5], similarity[5, 5] = similarity[90], similarity[:, 90], 1.0
    similarity[5, 90] = similarity[90, 5] = 1.0 + 1e-9
    for clusters, distance in ((20, 0.5), (None, 0.3), (None, 0.0)):
        labels = linkage_clusters(similarity, linkage=kind, clusters=clusters, distance=distance)
        again = linkage_clusters(similarity.clone(), linkage=kind, clusters=clusters, distance=distance)
        assert labels.tolist() == again.tolist() == first_appearance(labels.numpy())
        assert labels[5] == labels[90]
        if clusters is not None:
            assert int(labels.max()) == clusters - 1
        if distance == 0.3 and kind != "ward":  # not finite stands for distance 1, beyond the threshold
            assert (labels == labels[7]).sum() == 1 and (labels == labels[11]).sum() == 1


def test_values_that_are_not_finite_are_at_distance_one() -> None:
    similarity = torch.tensor([[1.0, 0.9, float("nan")], [0.9, 1.0, float("inf")], [0.0, float("-inf"), 1.0]])
    plain = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
    for threshold in (0.5, 0.99, 1.0):
        found = linkage_clusters(similarity, linkage="average", clusters=None, distance=threshold)
        assert found.tolist() == linkage_clusters(plain, linkage="average", clusters=None, distance=threshold).tolist()
    assert found.tolist() == [0, 0, 0]


def test_one_sided_similarity_is_averaged() -> None:
    similarity = torch.tensor([[1.0, 0.9, 0.1], [0.1, 1.0, 0.6], [0.1, 0.6, 1.0]])
    assert linkage_clusters(similarity, linkage="complete", clusters=2, distance=0.5).tolist() == [0, 1, 1]


def test_few_experts_and_only_copies() -> None:
    for clusters, distance in ((1, 0.5), (None, 0.5), (None, 0.0)):
        assert linkage_clusters(torch.ones(1, 1), linkage="ward", clusters=clusters, distance=distance).tolist() == [0]
    copies = torch.ones(6, 6)
    assert linkage_clusters(copies, linkage="average", clusters=None, distance=0.1).tolist() == [0] * 6
    assert linkage_clusters(copies, linkage="average", clusters=4, distance=0.1).unique().tolist() == [0]
    assert linkage_clusters(copies, linkage="average", clusters=None, distance=0.0).tolist() == list(range(6))
    assert linkage_clusters(torch.eye(2), linkage="ward", clusters=None, distance=0.0).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("similarity", "options", "message"),
    [
        (torch.eye(4), {"clusters": 5}, "clusters must lie in 1 .. 4.* got 5"),
        (torch.eye(4), {"clusters": 0}, "clusters must lie in 1 .. 4.* got 0"),
        (torch.eye(4), {"distance": -0.1}, "distance must not be negative, got -0.1"),
        (torch.eye(4), {"distance": float("nan")}, "distance must not be negative, got nan"),
        (torch.eye(4), {"linkage": "single"}, "linkage must be one of average, complete, ward, got 'single'"),
        (torch.ones(4, 3), {}, "similarity must be square and not empty, got shape"),
        (torch.ones(0, 0), {}, "similarity must be square and not empty, got shape"),
    ],
)
def test_linkage_refusals(similarity: Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(CpruneError, match=message):
        linkage_clusters(similarity, **{"linkage": "average", "clusters": None, "distance": 0.5, **options})


def test_canonical_labels_follow_first_appearance() -> None:
    for seed in range(10):
        labels = np.random.default_rng(seed).integers(-3, 9, 131)
        assert canonical_labels(labels).tolist() == first_appearance(labels)


def test_kmeans_groups_by_direction_not_by_length(capfd: pytest.CaptureFixture[str]) -> None:
    vectors, source = blobs([9, 40], width=16, spread=0.02, seed=5)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert spherical_kmeans(vectors.to(dtype), 2, seed=0).tolist() == first_appearance(source)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("num", "clusters"), [(131, 10), (300, 7), (2000, 3)])
def test_kmeans_converges_on_all_vectors_and_repeats(num: int, clusters: int) -> None:
    vectors = torch.randn(num, 4, generator=torch.Generator().manual_seed(num))
    labels = spherical_kmeans(vectors, clusters, seed=4, iterations=200)
    assert labels.dtype == torch.int64
    assert labels.tolist() == spherical_kmeans(vectors, clusters, seed=4, iterations=200).tolist()
    assert labels.tolist() == first_appearance(labels.numpy())
    assert int(labels.max()) == clusters - 1
    unit = torch.nn.functional.normalize(vectors.double())
    centres = torch.nn.functional.normalize(torch.stack([unit[labels == c].sum(0) for c in range(clusters)]))
    assert ((unit @ centres.T).argmax(1) == labels).all()  # nobody would rather be elsewhere


def test_kmeans_seed_matters() -> None:
    vectors = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    assert len({tuple(spherical_kmeans(vectors, 20, seed=seed).tolist()) for seed in range(4)}) > 1


def test_kmeans_dead_vectors_share_a_cluster_of_their_own() -> None:
    vectors, source = blobs([6, 25], width=8, spread=0.02, seed=2)
    vectors = torch.cat([vectors, torch.zeros(3, 8, dtype=torch.float64)])
    vectors[2], source[2] = float("nan"), 2
    assert spherical_kmeans(vectors, 3, seed=1).tolist() == first_appearance([*source, 2, 2, 2])
    assert spherical_kmeans(vectors, 1, seed=1).unique().tolist() == [0]
    assert spherical_kmeans(torch.zeros(5, 3), 4, seed=1).tolist() == [0] * 5


def test_kmeans_as_many_clusters_as_vectors_and_copies() -> None:
    assert sorted(spherical_kmeans(torch.eye(7), 7, seed=0).tolist()) == list(range(7))
    assert spherical_kmeans(torch.ones(1, 3), 1, seed=0).tolist() == [0]
    assert spherical_kmeans(torch.ones(9, 3), 1, seed=0).tolist() == [0] * 9
    copies = spherical_kmeans(torch.eye(2).repeat(20, 1), 5, seed=0)
    assert copies[0] != copies[1]
    with pytest.raises(CpruneError, match="clusters must lie in 1 .. 7, the number of vectors, got 8"):
        spherical_kmeans(torch.eye(7), 8, seed=0)
    with pytest.raises(CpruneError, match="clusters must lie in 1 .. 7, the number of vectors, got 0"):
        spherical_kmeans(torch.eye(7), 0, seed=0)
    with pytest.raises(CpruneError, match=r"vectors must have shape \[N, D\]"):
        spherical_kmeans(torch.ones(4, 3, 2), 2, seed=0)


def neighbours(vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    similarity = unit @ unit.T
    index = np.array(
        [
            sorted((j for j in range(len(unit)) if j != i), key=lambda j: (-row[j], j))[:k]
            for i, row in enumerate(similarity)
        ]
    )
    return np.take_along_axis(similarity, index, axis=1), index


@pytest.mark.parametrize(("num", "k"), [(2, 1), (9, 8), (131, 1), (131, 5), (131, 130), (600, 120)])
def test_knn_of_tied_vectors_takes_the_lowest_index(num: int, k: int) -> None:
    # One or four entries of eight, so that every cosine is exact and most of them are equal; every tenth is dead.
    rng = np.random.default_rng(num)
    vectors = np.zeros((num, 8))
    for row in range(num):
        vectors[row, rng.permutation(8)[: rng.choice([1, 4])]] = rng.choice([0.5, -2.0])
    vectors[::10] = 0.0
    similarity, index = knn_graph(torch.from_numpy(vectors), k)
    expected_similarity, expected_index = neighbours(vectors, k)
    assert similarity.dtype == torch.float32 and index.dtype == torch.int64
    assert index.tolist() == expected_index.tolist()
    assert similarity.tolist() == expected_similarity.tolist()


@pytest.mark.parametrize(("num", "k"), [(131, 7), (300, 25)])
def test_knn_of_random_vectors(num: int, k: int) -> None:
    vectors = torch.randn(num, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(num))
    similarity, index = knn_graph(vectors * torch.linspace(0.01, 50, num)[:, None], k)
    expected_similarity, expected_index = neighbours(vectors.numpy(), k)
    assert index.tolist() == expected_index.tolist()
    assert torch.allclose(similarity.double(), torch.from_numpy(expected_similarity), rtol=0, atol=1e-6)
    assert (index != torch.arange(num)[:, None]).all()


def test_knn_refusals() -> None:
    for k in (0, 4, 9):
        with pytest.raises(CpruneError, match=f"k must lie in 1 .. 3, the number of other vectors, got {k}"):
            knn_graph(torch.eye(4), k)
    with pytest.raises(CpruneError, match="k must lie in"):
        knn_graph(torch.ones(1, 3), 1)


def test_faiss_missing_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    for call in (lambda: spherical_kmeans(torch.eye(4), 2, seed=0), lambda: knn_graph(torch.eye(4), 2)):
        with pytest.raises(CpruneError, match="pip install faiss-cpu, or faiss-gpu"):
            call()
    assert linkage_clusters(torch.eye(4), linkage="average", clusters=2, distance=0.5).shape == (4,)
