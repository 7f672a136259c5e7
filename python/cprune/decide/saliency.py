"""What an expert is worth by itself: one function per saliency, ExpertStats -> [E] float64, larger is more important.

Notation as in `cprune.stats`: gate g, expert output f, N_j tokens routed to expert j; one never routed to scores 0.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import torch

from cprune.errors import CpruneError
from cprune.stats import ExpertStats

PRIOR = 0.2  # of the calibration text: what equal use of all experts weighs against the use that was seen


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


def expected(stats: ExpertStats, seed: int) -> torch.Tensor:
    """(N_j + PRIOR mean_i N_i) times the mean over its tokens of `relative`: what it is expected to add on other text.

    Calibration text is a sample, and the experts that it uses least are those of which it says least. The share of the
    tokens that an expert meets is estimated as under a Dirichlet prior of equal shares worth PRIOR of the text; so a
    specialist that gives much whenever it is asked outlives one that gives little as often. Where experts are used a
    lot the order is that of `relative`.
    """
    count = stats.count.double()
    return relative(stats, seed) * (1 + PRIOR * count.mean() / count.clamp_min(1))


def reap(stats: ExpertStats, seed: int) -> torch.Tensor:
    """sum_t g |f| / N_j (REAP, 2510.13999, eq. 9)."""
    return stats.gated_norm_sum / stats.count.clamp_min(1)


def frequency(stats: ExpertStats, seed: int) -> torch.Tensor:
    """N_j: tokens routed to the expert."""
    return stats.count.double()


def gate(stats: ExpertStats, seed: int) -> torch.Tensor:
    """sum_t g: gate mass routed to the expert, the soft count of heavy hitters (SEER-MoE, 2404.05089)."""
    return stats.gate_sum


def ean(stats: ExpertStats, seed: int) -> torch.Tensor:
    """sum_t |f|: expert activation norm (EAN, compared in 2510.13999)."""
    return stats.norm_sum


def ean_mean(stats: ExpertStats, seed: int) -> torch.Tensor:
    """sum_t |f| / N_j: the mean of EAN (2510.13999), which 2606.15716 calls mean activation norm (MAN)."""
    return stats.norm_sum / stats.count.clamp_min(1)


def msan(stats: ExpertStats, seed: int) -> torch.Tensor:
    """sum_t |f|^2 / N_j: mean squared activation norm (MSAN, 2606.15716)."""
    return stats.norm_sq_sum / stats.count.clamp_min(1)


def easy_ep(stats: ExpertStats, seed: int) -> torch.Tensor:
    """sum_t g |f| (1 - cos(h before the layer, h after it)): tokens that the layer turns count more (2504.06792)."""
    return stats.turning_sum


def mone(stats: ExpertStats, seed: int) -> torch.Tensor:
    """N_j |std f|: frequency x variability of the output (MoNE, 2507.00390).

    |std f|^2 = sum_t |f - mean f|^2 / (N_j - 1), the unbiased variances of all components together. An expert that
    gives every token the same output scores 0, since a constant could replace it.
    """
    count = stats.count.double()
    mean = stats.output_sum / count.clamp_min(1).unsqueeze(1)
    spread = (stats.norm_sq_sum - count * mean.square().sum(1)).clamp_min(0)
    return count * (spread / (count - 1).clamp_min(1)).sqrt()


def variability(stats: ExpertStats, seed: int) -> torch.Tensor:
    """std_t g |f| over the tokens routed to the expert: how much its activation varies (after MoP, 2511.19822)."""
    count = stats.count.double()
    spread = (stats.gated_sq_sum - stats.gated_norm_sum.square() / count.clamp_min(1)).clamp_min(0)
    return (spread / (count - 1).clamp_min(1)).sqrt()


def reconstruction(stats: ExpertStats, seed: int) -> torch.Tensor:
    """sum_t g^2 |f|^2 over sum_t |sum_j g f|^2, on the sample: error of the layer's output without this one expert.

    Relative to the output, so that layers compare; `selection.least_error` has the error without several experts.
    """
    return torch.diagonal(stats.gated_gram) / stats.gated_gram.sum().clamp_min(1e-300)


def fisher(stats: ExpertStats, seed: int) -> torch.Tensor:
    """sum_s A^2, A = sum_t g <dL/dy, f> over the tokens of sequence s: Fisher information of a mask (2204.09656)."""
    return _of_gradients("fisher", stats.mask_gradient_sq, stats.num_experts)


def taylor(stats: ExpertStats, seed: int) -> torch.Tensor:
    """sum_s |A|, A as for `fisher`: first-order change of the loss without the expert (Taylor, 1906.10771)."""
    return _of_gradients("taylor", stats.mask_gradient_abs, stats.num_experts)


def _of_gradients(method: str, values: torch.Tensor, num: int) -> torch.Tensor:
    if len(values) != num:
        raise CpruneError(f"method {method} must have gradients (--method {method} measures them), got none")
    return values


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


GRADIENT_METHODS = frozenset({"fisher", "taylor"})  # which need a backward pass
Saliency = Callable[[ExpertStats, int], torch.Tensor]

SALIENCIES: Mapping[str, Saliency] = {
    "expected": expected,
    "relative": relative,
    "contribution": contribution,
    "reap": reap,
    "frequency": frequency,
    "gate": gate,
    "seer": gate,
    "ean": ean,
    "ean-mean": ean_mean,
    "man": ean_mean,
    "msan": msan,
    "easy-ep": easy_ep,
    "mone": mone,
    "fisher": fisher,
    "taylor": taylor,
    "random": random,
}


def saliency(method: str, stats: ExpertStats, seed: int) -> torch.Tensor:
    """[E] float64 of `method` ("cprune" weighs by the expected contribution, and without data by parameters).

    Raises CpruneError where the method needs tokens and the statistics are data-free.
    """
    if method == "cprune":
        return expected(stats, seed) if stats.tokens else parameters(stats, seed)
    if not stats.tokens and method != "random":
        raise CpruneError(f"method {method} must have calibration text, got --calibration none")
    return SALIENCIES[method](stats, seed)


def with_domain_floor(weights: torch.Tensor, stats: ExpertStats, floor: float) -> torch.Tensor:
    """[E] float64: importances raised to at least `floor` times what they would be if all text were of one domain.

    With c_jd = sum_t g |f| per token of domain d and c_j that over all tokens, w_j max(1, floor max_d c_jd / c_j). So
    the experts of a rare domain do not vanish among the rest; 0 changes nothing.
    Raises CpruneError where the statistics are data-free.
    """
    if not floor:
        return weights
    if not stats.tokens:
        raise CpruneError(f"domain_floor {floor} must have calibration text, got --calibration none")
    tokens = stats.domain_tokens.double().clamp_min(1)
    mean = stats.domain_gated_sum.sum(0) / stats.tokens
    peak = (stats.domain_gated_sum / tokens.unsqueeze(1)).amax(0) / mean.clamp_min(1e-300)
    return weights * (floor * peak).clamp_min(1.0)


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
