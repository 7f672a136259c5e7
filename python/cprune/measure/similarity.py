"""Similarity of the experts of a layer: Grams of their parameters, and one [E, E] matrix out of ExpertStats."""

from __future__ import annotations

import torch
from torch import Tensor

from cprune.config import SIMILARITIES
from cprune.errors import CpruneError
from cprune.stats import ExpertStats
from cprune_kernels.pairwise import cosine_from_gram, pairwise_gram

NEEDS_OUTPUTS = ("outputs", "cka")  # the similarities that a data-free measurement cannot give
WINDOW = 32768  # elements of a projection, per expert, in work at a time


def weight_grams(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Inner products of the experts' weights, projection by projection.

    gate, up: [E, I, H], down: [E, H, I], of any floating type and any strides: views of fused, transposed or
    interleaved weights are read in place. Returns [3, E, E] float64 in the order gate, up, down; see `pairwise_gram`.
    Raises CpruneError where the shapes do not fit.
    """
    _check_experts(gate, up, down)
    return torch.stack([_projection_gram(weight) for weight in (gate, up, down)])


def _projection_gram(weight: Tensor) -> Tensor:
    """<W_i, W_j> of [E, A, B], some rows of every expert at a time: flattening the whole would copy a strided view."""
    windows = weight.split(max(1, WINDOW // max(1, weight.shape[2])), dim=1)
    return torch.stack([pairwise_gram(window.flatten(1)) for window in windows]).sum(dim=0)


def unit_signatures(gate: Tensor, up: Tensor, down: Tensor, *, rank: int = 28, seed: int = 0) -> Tensor:
    """A vector per expert that does not depend on the order of its hidden units, whose cosine compares experts.

    A gated expert is a set of hidden units, each three vectors of R^H: a row a of gate, a row b of up, a column c of
    down. With every projection divided by its Frobenius norm, the three cross moments

        sum a b^T = gate^T up,   sum a c^T = gate^T down^T,   sum b c^T = up^T down^T      over the I units, each [H, H]

    are the same for every order of the units. They are seen through random P_a, P_b, P_c [r, H] with orthonormal rows,
    r = min(rank, H), which keep inner products up to a factor on average: P_a gate^T up P_b^T, and so on. The moments
    of a projection with itself (gate^T gate, ...) are left out: they say which residual channels the layer uses, which
    all its experts share. On a trained model of near-copies with shuffled units, unrelated experts have a mean |cosine|
    of 0.03 without them and 0.21 with them, near-copies 0.97 and 0.98.

    gate, up: [E, I, H], down: [E, H, I], of any floating type and any strides; one expert at a time is held in float32.
    Returns [E, 3 r^2] float32; a projection that is all zero leaves its two moments zero.
    Deterministic for a seed. Raises CpruneError where rank is below 1 or the shapes do not fit.
    """
    _check_experts(gate, up, down)
    if rank < 1:
        raise CpruneError(f"rank must be at least 1, got {rank}")
    num_experts, _, hidden = gate.shape
    rank = min(rank, hidden)
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(3, hidden, rank, generator=generator, dtype=torch.float64)
    project = torch.linalg.qr(gaussian)[0].float().to(gate.device)  # [3, H, r]
    signatures = torch.empty(num_experts, 3 * rank * rank, dtype=torch.float32, device=gate.device)
    for expert in range(num_experts):
        units = (gate[expert].float(), up[expert].float(), down[expert].float().T)  # each [I, H], a unit a row
        a, b, c = (_over_norm(w @ p, w) for w, p in zip(units, project, strict=True))  # each [I, r] float64
        signatures[expert] = torch.stack([a.T @ b, a.T @ c, b.T @ c]).flatten()
    return signatures


def _over_norm(projected: Tensor, weight: Tensor) -> Tensor:
    """`projected` in float64, over the Frobenius norm of `weight`; zero where that is zero."""
    norm = weight.norm()
    return projected.double() / norm.where(norm > 0, 1.0)


def similarity_matrix(stats: ExpertStats, blend: dict[str, float]) -> Tensor:
    """Similarity of all pairs of experts of a layer, as a weighted mean of named similarities.

    Names, each in [-1, 1] with 1 on the diagonal:
      outputs  cosine of the experts' outputs, flattened over the shared sample of tokens
      cka      linear CKA of the same outputs
      weights  mean over gate, up and down of the cosine of the raw weights, so that each projection counts the same
               whatever its scale (`cosine_from_gram(stats.weight_gram)` gives the three singly)
      units    cosine of `unit_signatures`: weights, with the order of hidden units left out of account
      router   mean of the cosine of the router's rows and of co-activation n_ij / sqrt(n_i n_j), with n_ij the tokens
               routed to both; without tokens the cosine alone

    blend: name -> weight >= 0, as `parse_blend` gives it; scaled to sum 1. Returns [E, E] float64, exactly symmetric,
    exactly 1 on the diagonal, in [-1, 1]; an expert that gives nothing to compare has similarity 0 by that name.
    Raises CpruneError on an unknown name, no weight above 0, or a name that needs outputs where stats.tokens is 0.
    """
    blend = {name: weight for name, weight in blend.items() if weight != 0}
    unknown = [name for name in blend if name not in SIMILARITIES]
    if unknown:
        raise CpruneError(f"similarity must be of {', '.join(SIMILARITIES)}, got {', '.join(unknown)}")
    total = sum(blend.values())
    if not 0.0 < total < float("inf") or min(blend.values()) < 0.0:
        raise CpruneError(f"similarity must have finite weights >= 0 and one above 0, got {blend}")
    for name in NEEDS_OUTPUTS:
        if name in blend and stats.tokens == 0:
            raise CpruneError(
                f"similarity {name} must have calibration text, got --calibration none, which measures parameters "
                "only: use --similarity weights, units or router"
            )
    matrix = sum(_SIMILARITY[name](stats) * (weight / total) for name, weight in sorted(blend.items()))
    assert isinstance(matrix, Tensor)
    matrix = matrix.clamp(-1.0, 1.0)
    return matrix.fill_diagonal_(1.0)


def _outputs(stats: ExpertStats) -> Tensor:
    return cosine_from_gram(stats.output_gram)


def _cka(stats: ExpertStats) -> Tensor:
    return stats.cka.double()


def _weights(stats: ExpertStats) -> Tensor:
    return cosine_from_gram(stats.weight_gram).mean(dim=0)


def _units(stats: ExpertStats) -> Tensor:
    return cosine_from_gram(stats.unit_gram)


def _router(stats: ExpertStats) -> Tensor:
    rows = cosine_from_gram(stats.router_gram)
    return rows if stats.tokens == 0 else (rows + cosine_from_gram(stats.coactivation)) / 2


_SIMILARITY = {"outputs": _outputs, "cka": _cka, "weights": _weights, "units": _units, "router": _router}


def _check_experts(gate: Tensor, up: Tensor, down: Tensor) -> None:
    if gate.dim() != 3 or up.shape != gate.shape or down.shape != (gate.shape[0], gate.shape[2], gate.shape[1]):
        raise CpruneError(
            "experts must be gate [E, I, H], up [E, I, H] and down [E, H, I], "
            f"got {list(gate.shape)}, {list(up.shape)} and {list(down.shape)}"
        )
