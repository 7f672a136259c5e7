"""paper.py against the masks that the authors published, and against a plain restatement of their arithmetic."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import ClusterWarning, fcluster, linkage
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from cprune.decide.paper import (
    BatchClusters,
    decide_paper,
    global_clusters,
    global_stage,
    keep_coefficient,
    layer_clusters,
    layer_stage,
    vote,
)
from cprune.errors import CpruneError

FIXTURE = Path(__file__).with_name("golden_c_prune.json.gz")
GOLDEN = Path(__file__).resolve().parents[2] / "../shared/golden/c-prune-deepseek-v2-lite"
EXPERTS = 64
RATE = 0.1


def batches_of(published: list[list[list[float]]]) -> list[BatchClusters]:
    """[batch][expert] = [label, distance] -> BatchClusters."""
    tables = [np.array(batch, dtype=np.float64) for batch in published]
    return [BatchClusters(table[:, 0].astype(np.int64), table[:, 1]) for table in tables]


def replay_global(clusters: list[Any], layer_pruned: dict[str, list[int]]) -> dict[str, list[int]]:
    survivors = {
        layer: [j for j in range(EXPERTS) if j not in layer_pruned[layer]] for layer in sorted(layer_pruned, key=int)
    }
    return global_stage(batches_of(clusters), survivors, layer_pruned, rate=RATE, layer_rate=RATE, num_experts=EXPERTS)


def test_published_masks_of_the_bundled_slice() -> None:
    golden = json.loads(gzip.decompress(FIXTURE.read_bytes()))
    assert len(golden["layer_clusters"]) == 3
    for layer, clusters in golden["layer_clusters"].items():
        assert layer_stage(batches_of(clusters), RATE) == golden["layer_pruned"][layer]
    found = replay_global(golden["global_clusters"], golden["layer_pruned"])
    assert found == golden["global_pruned"]
    assert sum(map(len, found.values())) == 306


@pytest.mark.parametrize("data", ["MathInstruct", "code_alpaca_20k", "finance_alpaca"])
def test_published_masks_in_full(data: str) -> None:
    if not GOLDEN.is_dir():
        pytest.skip("needs ../shared/golden, the published masks in full")

    def read(part: str) -> Any:
        return json.loads((GOLDEN / f"{data}.{part}.json").read_text())

    layer_pruned = {layer: layer_stage(batches_of(c), RATE) for layer, c in read("layer.clusters").items()}
    assert layer_pruned == read("layer.pruned")
    assert len(layer_pruned) == 26
    assert replay_global(read("global.clusters"), layer_pruned) == read("global.pruned")


def random_outputs(num: int, sequences: int, width: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.rand(num, 1, 1, generator=generator) + 0.1
    return (torch.randn(num, sequences, width, generator=generator) * lengths * scale).half()


def restated(outputs: Tensor, clusters: int, batch: int) -> list[tuple[list[int], list[float]]]:
    """Labels and scores per batch, straight from the description: linkage is handed the square matrix."""
    result = []
    for start in range(0, outputs.shape[1], batch):
        part = outputs[:, start : start + batch].numpy()
        features = part.reshape(len(part), -1)
        with pytest.warns(ClusterWarning):
            tree = linkage(squareform(pdist(features)), "ward")
        labels = fcluster(tree, t=clusters, criterion="maxclust")
        centres = {label: np.mean(features[labels == label], axis=0) for label in set(labels.tolist())}
        with np.errstate(over="ignore"):
            scores = [float(np.linalg.norm(x - centres[label])) for x, label in zip(features, labels, strict=True)]
        result.append((labels.tolist(), scores))
    return result


@pytest.mark.parametrize(
    ("num", "sequences", "width", "scale", "clusters"),
    [(13, 32, 8, 1.0, 12), (64, 40, 48, 1.0, 12), (131, 70, 24, 5.0, 12), (300, 33, 16, 1.0, 6), (64, 32, 64, 40.0, 5)],
)
def test_layer_clusters_restated(num: int, sequences: int, width: int, scale: float, clusters: int) -> None:
    outputs = random_outputs(num, sequences, width, seed=num, scale=scale)
    outputs[3] = 0.0  # an expert that answers nothing
    outputs[7] = outputs[2]
    found = layer_clusters(outputs, clusters=clusters)
    expected = restated(outputs, clusters, 32)
    assert [(b.labels.tolist(), b.scores.tolist()) for b in found] == expected
    assert len(found) == math.ceil(sequences / 32)
    assert all(np.all(b.scores == b.scores.astype(np.float16)) for b in found)
    assert np.isinf(found[0].scores).any() == (scale == 40.0)


def test_layer_clusters_at_the_edges() -> None:
    (single,) = layer_clusters(torch.ones(1, 5, 3))
    assert (single.labels.tolist(), single.scores.tolist()) == ([1], [0.0])
    pair = layer_clusters(torch.tensor([[[1.0]], [[2.0]]]))[0]
    assert len(set(pair.labels.tolist())) == 2 and pair.scores.tolist() == [0.0, 0.0]
    few = layer_clusters(random_outputs(5, 4, 8, seed=0), clusters=12)[0]
    assert sorted(few.labels.tolist()) == [1, 2, 3, 4, 5]
    rounded = layer_clusters(random_outputs(20, 4, 8, seed=0).double() * (1 + 1e-6))[0]
    assert rounded.scores.tolist() == layer_clusters(random_outputs(20, 4, 8, seed=0))[0].scores.tolist()
    for values in (torch.full((3, 2, 2), float("nan")), torch.full((3, 2, 2), 1e6)):
        with pytest.raises(CpruneError, match="finite in float16"):
            layer_clusters(values)
    with pytest.raises(CpruneError, match=r"outputs must have shape \[N, S, H\] and not be empty, got \[3, 0, 2\]"):
        layer_clusters(torch.ones(3, 0, 2))


def test_global_clusters_are_layer_clusters_of_the_survivors_together() -> None:
    outputs = {name: random_outputs(12, 40, 8, seed=seed) for seed, name in enumerate(["c", "a", "b"])}
    survivors = {"c": [0, 3, 4, 11], "a": list(range(12)), "b": [1, 2, 5]}
    together = torch.cat([outputs[name][kept] for name, kept in survivors.items()])
    found, expected = global_clusters(outputs, survivors), layer_clusters(together, clusters=6)
    assert len(found) == len(expected) == 2
    for one, other in zip(found, expected, strict=True):
        assert one.labels.tolist() == other.labels.tolist() and one.scores.tolist() == other.scores.tolist()
    assert found[0].labels.max() == 6


@pytest.mark.parametrize(
    ("size", "share"),
    [(3, 1.27), (6, 1.22), (12, 1.11), (32, 0.80), (64, 0.425), (128, 0.06), (156, -0.001), (400, -0.098)],
)
def test_keep_coefficient(size: int, share: float) -> None:
    assert keep_coefficient(size, 64) == pytest.approx(share, abs=0.006 if share > 0.01 else 0.0006)


def test_votes_by_hand() -> None:
    inf = float("inf")
    # c(4/6) = .6 (e^-1/6 - 1 / (1 + e^-1/3)) + .5 = .6585, of 4 at rate .2: 2.107, two are kept
    first = BatchClusters(np.array([5, 5, 5, 5, 9, 9]), np.array([3.0, inf, 1.0, inf, 2.0, 2.0]))
    # c(6/6) = .6 (e^-.5 - e^.5 / (e^.5 + e^-.5)) + .5 = .4253, of 6 at rate .2: 2.04, two are kept, by index
    second = BatchClusters(np.ones(6, dtype=int), np.array([inf, inf, inf, inf, inf, inf]))
    assert vote([first], rate=0.2, population=6).tolist() == [1, 0, 1, 0, 1, 1]
    assert vote([second], rate=0.2, population=6).tolist() == [1, 1, 0, 0, 0, 0]
    assert vote([first, second], rate=0.2, population=6).tolist() == [2, 1, 1, 0, 1, 1]
    assert layer_stage([first, second], 0.2) == [3]
    # at rate .5 the counts are 1.3 and 1.3: experts 1 and 3 have no vote, and of those with one, 0 comes first
    assert vote([first, second], rate=0.5, population=6).tolist() == [1, 0, 1, 0, 1, 1]
    assert layer_stage([first, second], 0.5) == [0, 1, 3]
    assert layer_stage([first, second], 0.1) == []


def test_a_negative_count_keeps_all_but_the_farthest() -> None:
    # 40 experts in one cluster, 4 to a layer: c = -.09995, of 40 at rate .1: -3.598, so all but the last 3
    scores = np.random.default_rng(0).permutation(40).astype(float)
    votes = vote([BatchClusters(np.ones(40, dtype=int), scores)], rate=0.1, population=4)
    assert votes.tolist() == (scores < 37).astype(int).tolist()
    # 12 of them: c = -.0467, of 12 at rate .1: -.505, which is cut to 0: nobody is kept
    votes = vote([BatchClusters(np.ones(12, dtype=int), scores[:12])], rate=0.1, population=4)
    assert votes.tolist() == [0] * 12


def test_the_cap_cuts_the_list_of_the_global_stage() -> None:
    # b's survivors are in clusters of two and kept, a's nine in one: int(-.0999 * .5 * 9) = 0 votes.
    batches = [BatchClusters(np.array([1, 1, 2, 2, 3, 3, 4, 4, 5] + [6] * 9), np.arange(18.0))]
    assert vote(batches, rate=0.5, population=1).tolist() == [1] * 9 + [0] * 9
    survivors = {"b": list(range(9)), "a": list(range(1, 10))}
    lost = global_stage(batches, survivors, {"a": [0], "b": [9]}, rate=0.5, layer_rate=0.1, num_experts=1)
    # int(1 // .1 * .9) = int(9.0 * .9) = 8: of nine global losses eight stay, the one of the layer stage comes on top
    assert lost == {"b": [9], "a": [0, 1, 2, 3, 4, 5, 6, 7, 8]}
    assert list(lost) == ["b", "a"]


def test_the_cap_of_a_layer_that_lost_nothing_before() -> None:
    batches = [BatchClusters(np.array([1, 1, 2, 2, 3, 3, 4, 4, 5, 5] + [6] * 10), np.arange(20.0))]
    assert vote(batches, rate=0.8, population=10).tolist() == [1] * 10 + [0] * 10
    survivors = {"b": list(range(10)), "a": list(range(10))}
    lost = global_stage(batches, survivors, {"a": [], "b": []}, rate=0.8, layer_rate=0.05, num_experts=10)
    assert lost == {"b": [0, 1, 2, 3, 4, 5], "a": [0, 1, 2, 3, 4, 5, 6, 7, 8]}  # int(.9 * 10) of a's ten


def model(layers: int, num: int, sequences: int = 40, width: int = 8) -> dict[str, Tensor]:
    return {f"model.layers.{i}.mlp": random_outputs(num, sequences, width, seed=i) for i in range(1, layers + 1)}


@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.6])
def test_uniform_is_the_layer_stage_alone(ratio: float) -> None:
    outputs = model(3, 21)
    found = decide_paper(outputs, ratio=ratio, layer_rate=0.1, budget="uniform")
    assert list(found) == list(outputs)
    for name, decision in found.items():
        batches = layer_clusters(outputs[name])
        assert list(decision.pruned) == layer_stage(batches, ratio)
        assert len(decision.pruned) == int(21 * ratio)
        assert decision.votes == tuple(vote(batches, rate=ratio, population=21))
        labels = batches[0].labels.tolist()
        assert decision.cluster == tuple(list(dict.fromkeys(labels)).index(label) for label in labels)


def test_global_is_both_stages_in_turn() -> None:
    outputs = model(3, 20)
    found = decide_paper(outputs, ratio=0.28, layer_rate=0.1, budget="global")
    # 2 of 20 go in every layer; int(.28 * 60) = 16 in all, so 10 of the 54 survivors go in the global stage
    layer_batches = {name: layer_clusters(values) for name, values in outputs.items()}
    layer_pruned = {name: layer_stage(batches, 0.1) for name, batches in layer_batches.items()}
    survivors = {name: [j for j in range(20) if j not in gone] for name, gone in layer_pruned.items()}
    batches = global_clusters(outputs, survivors)
    expected = global_stage(batches, survivors, layer_pruned, rate=10 / 54, layer_rate=0.1, num_experts=20)
    assert {name: list(decision.pruned) for name, decision in found.items()} == expected
    assert sum(map(len, expected.values())) == 16
    global_votes = vote(batches, rate=10 / 54, population=20)
    for order, (name, kept) in enumerate(survivors.items()):
        votes = vote(layer_batches[name], rate=0.1, population=20)
        for position, expert in enumerate(kept):
            votes[expert] += global_votes[order * 18 + position]
        assert found[name].votes == tuple(votes)


@pytest.mark.parametrize(("layers", "num"), [(1, 6), (2, 8), (3, 17), (1, 54), (3, 58), (2, 131)])
@pytest.mark.parametrize("ratio", [0.03, 0.1, 0.13, 0.25, 0.29, 0.37, 0.5])
def test_global_removes_the_ratio_of_the_whole_model(layers: int, num: int, ratio: float) -> None:
    outputs = model(layers, num, sequences=5, width=4)
    found = decide_paper(outputs, ratio=ratio, layer_rate=0.1, budget="global")
    pruned = [decision.pruned for decision in found.values()]
    assert all(list(p) == sorted(set(p)) and set(p) <= set(range(num)) for p in pruned)
    assert all(len(p) >= int(min(ratio, 0.1) * num) for p in pruned)
    total = sum(map(len, pruned))
    wanted = int(ratio * num * layers)
    cap = int(int(min(ratio, 0.1) * num) // min(ratio, 0.1) * 0.9) or int(0.9 * num)
    assert total == wanted or (total < wanted and any(len(p) >= cap for p in pruned))
    assert found == decide_paper(outputs, ratio=ratio, layer_rate=0.1, budget="global")


@pytest.mark.parametrize(
    ("outputs", "options", "message"),
    [
        ({}, {}, "outputs must hold at least one layer, got none"),
        ({"a": torch.ones(4, 2, 3), "b": torch.ones(6, 2, 3)}, {}, r"got \[4, 2, 3\] in a and \[6, 2, 3\] in b"),
        ({"a": torch.ones(4, 2, 3)}, {"ratio": 1.0}, r"ratio must lie in \(0, 1\), got 1.0"),
        ({"a": torch.ones(4, 2, 3)}, {"layer_rate": 0.0}, r"layer_rate must lie in \(0, 1\), got 0.0"),
        ({"a": torch.ones(4, 2, 3)}, {"budget": "local"}, "budget must be global or uniform, got 'local'"),
        ({"a": torch.ones(4, 0, 3)}, {}, r"outputs must have shape \[N, S, H\] and not be empty"),
        ({"a": torch.full((4, 2, 3), float("inf"))}, {}, "outputs must be finite in float16"),
    ],
)
def test_refusals(outputs: dict[str, Tensor], options: dict[str, Any], message: str) -> None:
    with pytest.raises(CpruneError, match=message):
        decide_paper(outputs, **{"ratio": 0.25, "layer_rate": 0.1, "budget": "global", **options})
