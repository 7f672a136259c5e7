"""Novices: what answers for a dropped expert whose row the router keeps, one vector n_d times the gate g_d.

MoNE (arXiv 2507.00390) takes an expert's mean output for it. Here it is what the layer lacks without the dropped
experts, which with rows that are chosen together, or after layers that were pruned too, is another vector:

    minimise over n   sum_t w_t^2 | r(t) - sum_d g_d(t) n_d |^2 + ridge d |n|^2

by least squares over all D dropped experts at once, where r is the residual to the original's hidden states, w a
token's weight (`repair`) and d the mean diagonal of the gates' Gram matrix: D equations for D vectors, and no dropped
expert has to be run. Tokens held back from the fit choose the ridge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from cprune.act.gauss_newton import Seen
from cprune.act.least_squares import Judge, square
from cprune.merged import gates_of

RIDGES = (1.0, 0.1, 0.01)
TOKENS = 4096  # at a time


def fit_novices(
    dropped: Sequence[int], num_experts: int, seen: Seen, residual: torch.Tensor, judge: Judge, dtype: torch.dtype
) -> tuple[torch.Tensor, float]:
    """Novices [D, H] of `dtype` of the D experts `dropped`, and the squared error on held-back tokens with them.

    Args:
        seen: what the router chose among `num_experts`, of all T tokens.
        residual: [T, H] float32, weighted, of the layer in which dropped experts give nothing; stays as it is.
    """
    gram = torch.zeros(len(dropped), len(dropped), dtype=torch.float64)
    right = torch.zeros(len(dropped), residual.shape[1], dtype=torch.float64)
    for tokens, gates in _gates(dropped, num_experts, seen, judge, slice(0, judge.first)):
        gram += gates.T.double() @ gates.double()
        right += gates.T.double() @ residual[tokens].double()
    best, least = torch.zeros(right.shape, dtype=dtype), judge.error(residual)
    mean = float(gram.diagonal().mean())
    for ridge in RIDGES if mean > 0.0 else ():
        shifted = gram.clone()
        shifted.diagonal().add_(ridge * mean)
        novices = torch.linalg.solve(shifted, right).to(dtype)
        error = sum(
            square(residual[tokens] - gates @ novices.float())
            for tokens, gates in _gates(dropped, num_experts, seen, judge, slice(judge.first, len(residual)))
        )
        if error < least:
            best, least = novices, error
    return best, least


def _gates(
    dropped: Sequence[int], num_experts: int, seen: Seen, judge: Judge, among: slice
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens [n] that count, their weighted gates [n, D] of the dropped experts), some thousand tokens at a time."""
    counted = judge.counts[among].nonzero().squeeze(1) + among.start
    for tokens in counted.split(TOKENS):
        gates = gates_of(dropped, seen.index[tokens], seen.gates[tokens], num_experts)
        yield tokens, gates * judge.weight[tokens].unsqueeze(1)
