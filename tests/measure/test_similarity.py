"""Similarity of experts: brute force, permutations of hidden units, near-copies, experts with nothing to compare."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from cprune.config import SIMILARITIES, parse_blend
from cprune.errors import CpruneError
from cprune.measure.similarity import WINDOW, similarity_matrix, unit_signatures, weight_grams
from cprune.stats import ExpertStats
from cprune_kernels.pairwise import cosine_from_gram, pairwise_cka, pairwise_gram

Experts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # gate, up [E, I, H], down [E, H, I]
UPCYCLED = Path(__file__).resolve().parents[2] / "../shared/models/qwen3_moe_upcycled"


def experts(num: int, hidden: int, inner: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Experts:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((num, inner, hidden), (num, inner, hidden), (num, hidden, inner))
    gate, up, down = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return gate, up, down


def permuted(weights: Experts, seed: int = 1) -> Experts:
    """The same experts, each with its hidden units in another order."""
    gate, up, down = (w.clone() for w in weights)
    generator = torch.Generator().manual_seed(seed)
    for e in range(gate.shape[0]):
        order = torch.randperm(gate.shape[1], generator=generator)
        gate[e], up[e], down[e] = gate[e][order], up[e][order], down[e][:, order]
    return gate, up, down


def unit_cosine(weights: Experts, **options: int) -> torch.Tensor:
    return cosine_from_gram(pairwise_gram(unit_signatures(*weights, **options)))


def stats_of(num: int = 131, tokens: int = 40, seed: int = 0) -> ExpertStats:
    """Statistics of random experts; expert 5 is dead: never routed to, no outputs, no weights."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(num, 17, 6, generator=generator)
    outputs[5] = 0
    routed = torch.rand(tokens, num, generator=generator) < 0.2
    routed[:, 5] = False
    coactivation = routed.T.double() @ routed.double()
    router = torch.randn(num, 6, generator=generator)
    gate, up, down = experts(num, 6, 7, seed)
    for weight in (gate, up, down):
        weight[5] = 0
    nothing = torch.zeros(num, dtype=torch.float64)
    return ExpertStats(
        layer="model.layers.0.mlp",
        tokens=tokens,
        count=routed.sum(0),
        **{
            name: nothing
            for name in (
                *("gate_sum", "gated_norm_sum", "gated_sq_sum", "relative_sum", "turning_sum"),
                *("norm_sum", "norm_sq_sum", "norm_max", "activation_max", "activation_absmax"),
            )
        },
        output_sum=outputs.double().sum(1),
        coactivation=coactivation.long(),
        domain_tokens=torch.tensor([tokens]),
        domain_gated_sum=nothing.unsqueeze(0),
        output_gram=pairwise_gram(outputs.flatten(1)),
        mean_gram=pairwise_gram(outputs.mean(1)),
        gated_gram=torch.zeros(num, num, dtype=torch.float64),
        cka=pairwise_cka(outputs),
        router_gram=pairwise_gram(router),
        weight_gram=weight_grams(gate, up, down),
        unit_gram=pairwise_gram(unit_signatures(gate, up, down)),
        sequence_outputs=torch.zeros(num, 0, 6, dtype=torch.float16),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weight_grams_are_inner_products_per_projection(dtype: torch.dtype) -> None:
    weights = experts(3, 300, 131, dtype=dtype)
    grams = weight_grams(*weights)
    assert grams.shape == (3, 3, 3)
    assert grams.dtype == torch.float64
    for gram, weight in zip(grams, weights, strict=True):
        flat = weight.double().flatten(1)
        norm = flat.norm(dim=1)
        error = (gram - flat @ flat.T) / torch.outer(norm, norm)
        assert error.abs().max() <= WINDOW**0.5 * torch.finfo(torch.float32).eps
        assert torch.equal(gram, gram.T)


def test_weight_grams_read_fused_interleaved_and_transposed_views() -> None:
    gate, up, down = (w.mul(4).round() for w in experts(3, 300, 131))  # whole numbers: float32 sums are exact
    expected = weight_grams(gate, up, down)
    fused = torch.cat([gate, up], dim=1)  # [E, 2I, H]
    interleaved = torch.stack([gate, up], dim=2).flatten(1, 2).transpose(1, 2).contiguous()  # [E, H, 2I], as gpt-oss
    down_t = down.transpose(1, 2).contiguous()
    assert torch.equal(weight_grams(fused[:, :131], fused[:, 131:], down_t.transpose(1, 2)), expected)
    views = interleaved[..., ::2].transpose(1, 2), interleaved[..., 1::2].transpose(1, 2), down
    assert torch.equal(weight_grams(*views), expected)


@pytest.mark.parametrize(("hidden", "inner"), [(192, 96), (300, 131), (17, 300), (5, 3)])
def test_signatures_do_not_depend_on_the_order_of_hidden_units(hidden: int, inner: int) -> None:
    weights = experts(4, hidden, inner)
    before, after = unit_signatures(*weights), unit_signatures(*permuted(weights))
    assert before.dtype == torch.float32
    assert before.shape == (4, 3 * min(28, hidden) ** 2)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(after, before, rtol=0, atol=8 * eps * before.abs().max().item())


def test_signature_is_the_projected_cross_moments() -> None:
    """With rank H the projections are rotations, so inner products of signatures are those of the H x H moments."""
    weights = experts(3, 11, 7)
    moments = []
    for gate, up, down in zip(*(w.double() for w in weights), strict=True):
        g, u, d = gate / gate.norm(), up / up.norm(), down.T / down.norm()
        blocks = [sum(torch.outer(a[i], b[i]) for i in range(7)) for a, b in ((g, u), (g, d), (u, d))]
        moments.append(torch.stack(blocks).flatten())
    brute = torch.stack(moments) @ torch.stack(moments).T
    gram = pairwise_gram(unit_signatures(*weights, rank=11))
    torch.testing.assert_close(gram, brute, rtol=0, atol=1e-5 * brute.max().item())


@pytest.mark.parametrize(("hidden", "inner"), [(192, 96), (64, 131), (300, 300)])
def test_permuted_near_copies_are_found_and_the_unrelated_are_not_alike(hidden: int, inner: int) -> None:
    num = 16
    weights = experts(num, hidden, inner)
    noise = experts(num, hidden, inner, seed=2)
    copies = permuted(tuple(w + 0.1 * n for w, n in zip(weights, noise, strict=True)))  # type: ignore[arg-type]
    both = tuple(torch.cat(pair).bfloat16() for pair in zip(weights, copies, strict=True))
    cosine = unit_cosine(both)  # type: ignore[arg-type]
    siblings = torch.arange(2 * num).roll(num)
    assert cosine[torch.arange(2 * num), siblings].min() > 0.8
    assert torch.equal(cosine.clone().fill_diagonal_(-1).argmax(1), siblings)
    unrelated = torch.ones(2 * num, 2 * num, dtype=torch.bool).fill_diagonal_(False)
    unrelated[torch.arange(2 * num), siblings] = False
    assert cosine[unrelated].abs().mean() < 0.3
    raw = cosine_from_gram(weight_grams(*both)).mean(0)  # raw weights do not see such copies
    assert raw[torch.arange(2 * num), siblings].max() < 0.3


def test_signatures_read_views_and_depend_on_the_seed_alone() -> None:
    gate, up, down = experts(3, 24, 131)
    fused = torch.cat([gate, up], dim=1)
    views = fused[:, :131], fused[:, 131:], down.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(unit_signatures(*views), unit_signatures(gate, up, down))
    assert torch.equal(unit_signatures(gate, up, down, seed=3), unit_signatures(gate, up, down, seed=3))
    assert not torch.allclose(unit_signatures(gate, up, down, seed=3), unit_signatures(gate, up, down, seed=4))


def test_signatures_do_not_depend_on_the_scale_of_a_projection() -> None:
    gate, up, down = experts(3, 24, 17)
    scaled = unit_signatures(gate * 100, up * 0.01, down * 3)
    torch.testing.assert_close(scaled, unit_signatures(gate, up, down))


def test_zero_expert_has_a_zero_signature() -> None:
    weights = experts(3, 24, 17)
    for w in weights:
        w[1] = 0
    assert unit_signatures(*weights)[1].count_nonzero() == 0
    assert unit_cosine(weights)[1].tolist() == [0.0, 1.0, 0.0]


def test_shapes_that_do_not_fit_are_refused() -> None:
    gate, up, down = experts(3, 24, 17)
    for refused in (weight_grams, unit_signatures):
        with pytest.raises(CpruneError, match=r"experts must be gate \[E, I, H\].*got \[3, 17, 24\].*\[3, 17, 24\]$"):
            refused(gate, up, down.transpose(1, 2))
    with pytest.raises(CpruneError, match="rank must be at least 1, got 0"):
        unit_signatures(gate, up, down, rank=0)


def brute_force(stats: ExpertStats, name: str, i: int, j: int) -> float:
    def cosine(gram: torch.Tensor) -> float:
        scale = float(gram[i, i]) ** 0.5 * float(gram[j, j]) ** 0.5
        return float(gram[i, j]) / scale if scale > 0 else 0.0

    if name == "cka":
        return float(stats.cka[i, j])
    if name == "weights":
        return sum(cosine(gram) for gram in stats.weight_gram) / 3
    if name == "router":
        return (cosine(stats.router_gram) + cosine(stats.coactivation)) / 2
    return cosine({"outputs": stats.output_gram, "units": stats.unit_gram}[name])


@pytest.mark.parametrize("spec", [*SIMILARITIES, "outputs:0.8,weights:0.2", "cka,units:3,router"])
def test_similarity_is_the_weighted_mean_of_its_definition(spec: str) -> None:
    stats, blend = stats_of(), parse_blend(spec)
    matrix = similarity_matrix(stats, blend)
    for i, j in ((0, 1), (1, 0), (7, 130), (5, 9), (64, 63)):
        expected = sum(weight * brute_force(stats, name, i, j) for name, weight in blend.items())
        assert matrix[i, j].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("spec", [*SIMILARITIES, "outputs:1,cka:1,weights:1,units:1,router:1"])
@pytest.mark.parametrize("num", [2, 131])
def test_similarity_is_symmetric_bounded_and_finite(spec: str, num: int) -> None:
    stats = stats_of(max(num, 6))
    matrix = similarity_matrix(stats, parse_blend(spec))
    assert matrix.shape == (stats.num_experts, stats.num_experts)
    assert matrix.dtype == torch.float64
    assert torch.equal(matrix, matrix.T)
    assert (matrix.diagonal() == 1.0).all()
    assert matrix.isfinite().all()
    assert matrix.abs().max() <= 1.0
    if spec in ("outputs", "cka", "weights", "units"):
        assert matrix[5].nonzero().flatten().tolist() == [5]


def test_similarity_leaves_the_statistics_alone_and_scales_weights() -> None:
    stats = stats_of()
    before = {name: getattr(stats, name).clone() for name in ("cka", "output_gram", "weight_gram", "unit_gram")}
    twice = similarity_matrix(stats, {"cka": 2.0, "outputs": 6.0, "units": 0.0})
    torch.testing.assert_close(twice, similarity_matrix(stats, {"cka": 0.25, "outputs": 0.75}), rtol=0, atol=1e-15)
    for name, value in before.items():
        assert torch.equal(getattr(stats, name), value)


def test_without_tokens_the_router_is_its_rows_and_outputs_are_refused() -> None:
    stats = dataclasses.replace(stats_of(), tokens=0)
    torch.testing.assert_close(similarity_matrix(stats, {"router": 1.0}), cosine_from_gram(stats.router_gram))
    for name in ("outputs", "cka"):
        with pytest.raises(CpruneError, match=f"similarity {name} .*--calibration none.*weights, units or router"):
            similarity_matrix(stats, {"weights": 0.5, name: 0.5})
    similarity_matrix(stats, {"weights": 1.0, "outputs": 0.0})


@pytest.mark.parametrize("blend", [{}, {"outputs": 0.0}, {"outputs": 2.0, "cka": -1.0}, {"cosine": 1.0}])
def test_blends_that_cannot_be_are_refused(blend: dict[str, float]) -> None:
    with pytest.raises(CpruneError, match="similarity must"):
        similarity_matrix(stats_of(), blend)


def test_siblings_of_an_upcycled_model_are_nearest() -> None:
    if not UPCYCLED.exists():
        pytest.skip("the upcycled model is not beside the repository")
    origin = torch.tensor(json.loads((UPCYCLED / "upcycled_from.json").read_text())["copies_of"])
    num = len(origin)
    with safe_open(UPCYCLED / "model.safetensors", "pt") as file:
        for layer in (0, 5):
            gate, up, down = (
                torch.stack(
                    [file.get_tensor(f"model.layers.{layer}.mlp.experts.{e}.{name}_proj.weight") for e in range(num)]
                )
                for name in ("gate", "up", "down")
            )
            cosine = unit_cosine(permuted((gate, up, down))).fill_diagonal_(-1)
            assert torch.equal(origin[cosine.argmax(1)], origin)
