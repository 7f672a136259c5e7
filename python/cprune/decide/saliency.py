"""What an expert is worth by itself: one function per saliency, ExpertStats -> [E] float64, larger is more important.

Notation as in `cprune.stats`: gate g, expert output f, N_j tokens routed to expert j; one never routed to scores 0.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import torch

from cprune.errors import CpruneError
from cprune.stats import ExpertStats


def contribution(stats: ExpertStats, seed: int) -> torch.Tensor:
    """sum_t g |f|: all that the expert adds to the residual stream (REAP, 2510.13999, without its mean over tokens)."""
    return stats.gated_norm_sum


def relative(stats: ExpertStats, seed: int) -> torch.Tensor:
    """sum_t g |f| over the layer's |h|: relative to the residual stream it is added to, so comparable across layers.

    |h| is one number per layer, the harmonic mean weighted by contribution: sum_jt g |f| / sum_jt (g |f| / |h|).
    Inside a layer the order is that of `contribution`; dividing token by token would make little of tokens with a
    large |h|, on which the model may depend.
    """
    return stats.gated_norm_sum * (stats.relative_sum.sum() / stats.gated_norm_sum.sum().clamp_min(1e-300))


def reap(stats: ExpertStats, seed: int) -> torch.Tensor:
    """sum_t g |f| / N_j (REAP, 2510.13999, eq. 9)."""
    return stats.gated_norm_sum / stats.count.clamp_min(1)


def frequency(stats: ExpertStats, seed: int) -> torch.Tensor:
    """N_j: tokens routed to the expert."""
    return stats.count.double()


def gate(stats: ExpertStats, seed: int) -> torch.Tensor:
    """sum_t g: gate mass routed to the expert (SEER-MoE, 2404.05089, soft counting)."""
    return stats.gate_sum


def ean(stats: ExpertStats, seed: int) -> torch.Tensor:
    """sum_t |f|: expert activation norm (EAN, 2504.06792)."""
    return stats.norm_sum


def random(stats: ExpertStats, seed: int) -> torch.Tensor:
    """Uniform in [0, 1), another draw for every layer and seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{stats.layer}".encode()))  # it takes 32 bits
    return torch.rand(stats.num_experts, dtype=torch.float64, generator=generator)


def parameters(stats: ExpertStats, seed: int) -> torch.Tensor:
    """Without data: |w_router| |W_gate| |W_up| |W_down| (Frobenius), over its layer's mean.

    The product of the projections' norms bounds the scale of the output of a gated expert, and the norm of the router's
    row how strongly it can be asked for.
    """
    norms = torch.diagonal(stats.weight_gram, dim1=1, dim2=2).clamp_min(0).sqrt().prod(0)
    score = norms * torch.diagonal(stats.router_gram).clamp_min(0).sqrt()
    return score / score.mean().clamp_min(1e-300)


Saliency = Callable[[ExpertStats, int], torch.Tensor]

SALIENCIES: Mapping[str, Saliency] = {
    "relative": relative,
    "contribution": contribution,
    "reap": reap,
    "frequency": frequency,
    "gate": gate,
    "ean": ean,
    "random": random,
}


def saliency(method: str, stats: ExpertStats, seed: int) -> torch.Tensor:
    """[E] float64 of `method` ("cprune" weighs by relative contribution, and without data by parameters).

    Raises CpruneError where the method needs tokens and the statistics are data-free.
    """
    if method == "cprune":
        return relative(stats, seed) if stats.tokens else parameters(stats, seed)
    if not stats.tokens and method != "random":
        raise CpruneError(f"method {method} must have calibration text, got --calibration none")
    return SALIENCIES[method](stats, seed)


def super_experts(stats: Mapping[str, ExpertStats]) -> dict[str, tuple[int, ...]]:
    """Experts with massive activations, by layer: removing one can destroy the model however rarely it is used.

    The criterion of 2507.23279 on max |f| (absolute): above the 99.5 % quantile of all experts of the model and above a
    tenth of the largest; and, since norms grow with depth in every model, ten times the median of its own layer.
    """
    largest = {name: layer.activation_absmax for name, layer in stats.items()}
    everything = torch.cat(list(largest.values()))
    bar = max(float(torch.quantile(everything, 0.995)), float(everything.max()) / 10)
    return {
        name: tuple(((values > bar) & (values > 10 * values.median())).nonzero().flatten().tolist())
        for name, values in largest.items()
    }
