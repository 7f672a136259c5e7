"""The fit behind merging: ridge least squares on experts' down projections, one expert's at a time.

With rows p = w g a of an expert's activations (w the token's weight, g its gate) and the residual r of all tokens:

    minimise  |r - sum_e p_e D_e|^2 + sum_e ridge_e d |D_e|^2

by block coordinates (Gauss-Seidel over experts): each expert's change D_e is solved for by its Cholesky factor against
what the others leave. d is the mean diagonal of all experts' Gram matrices p^T p. Rows held back from the fit choose
every expert's ridge, or that it stays as it is, so that their error falls with every step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from cprune import hf

RIDGES = (0.3, 0.03)  # in units of d
SWEEPS = 2  # over the experts: a third one changed the error on held-back tokens by less than a thousandth
HELD_BACK = 8  # of so many sequences in a row, one is not fitted but judges


@dataclass(frozen=True)
class Activations:
    """What the down projection of one expert was given."""

    tokens: torch.Tensor  # [n] int64, ascending
    rows: torch.Tensor  # [n, I], times gate and token weight, in the model's type


@dataclass
class Change:
    """What to add to the down weights of one expert."""

    ridge: float
    delta: torch.Tensor  # [I, H] in the model's type


def judges(count: int) -> torch.Tensor:
    """[count] bool: the sequences, at least one of two or more, that are held back from every fit.

    One is drawn of every eight in a row: texts are taken in turn, and every eighth sequence could be of one text.
    """
    places = torch.arange(0, count, HELD_BACK)
    places += torch.randint(HELD_BACK, places.shape, generator=torch.Generator().manual_seed(3))
    held = torch.zeros(count, dtype=torch.bool)
    held[places[places < count]] = True
    if count < HELD_BACK:
        held[:] = False
        held[-1] = True
    return held


class Recorder:
    """Notes what the down projections of a layer are given (an `hf.ActivationObserver`)."""

    def __init__(self, weight: torch.Tensor, experts: Collection[int]) -> None:
        """weight [T] float32 of all tokens; only `experts` are noted."""
        self._weight, self._pieces = weight, {expert: [] for expert in sorted(experts)}
        self._first = self._next = 0

    def on_input(self, hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> None:
        """The next batch begins."""
        self._first, self._next = self._next, self._next + len(hidden)

    def on_activation(self, expert: int, tokens: torch.Tensor, gates: torch.Tensor, activation: torch.Tensor) -> None:
        """Keep the rows, weighted."""
        if expert in self._pieces:
            tokens = tokens + self._first
            scale = (gates.float() * self._weight[tokens]).unsqueeze(1)
            self._pieces[expert].append(Activations(tokens, (activation.float() * scale).to(activation.dtype)))

    def take(self) -> dict[int, Activations]:
        """{expert: all its pairs}, of experts that met a token; the recorder is empty afterwards."""
        taken = {}
        for expert in list(self._pieces):
            if pieces := self._pieces.pop(expert):
                columns = ([getattr(piece, name) for piece in pieces] for name in ("tokens", "rows"))
                taken[expert] = Activations(*(torch.cat(column) for column in columns))
        return taken


class Judge:
    """Which tokens fit and which judge, and the weight of each: those that judge are the last ones."""

    def __init__(self, expected: torch.Tensor, mask: torch.Tensor, sequences: int) -> None:
        """
        Args:
            expected: [T, H] hidden states of the original after the layer.
            mask: [N, S] bool with N S = T, the tokens that count.
            sequences: how many of the N, from the first on, are fitted.
        """
        self.counts = mask.flatten()
        self.first = sequences * mask.shape[1]
        norms = torch.linalg.vector_norm(expected, dim=1, dtype=torch.float32)
        median = norms[self.counts].median()
        self.weight = torch.where((norms > median) & (median > 0.0), median / norms, 1.0)  # [T], none of them 0
        self._held = self.counts[self.first :]
        self.scale = float((norms * self.weight)[self.first :][self._held].double().square().sum())

    def residual(self, expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
        """Weighted difference [n, H] float32 of the hidden states of the last n tokens."""
        difference = expected.to(torch.float32, copy=True)
        return difference.sub_(got).mul_(self.weight[len(self.weight) - len(got) :].unsqueeze(1))

    def hidden(self, expected: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, H] of which `residual` [T, H], overwritten, is left to `expected`, in the type of that."""
        return residual.div_(-self.weight.unsqueeze(1)).add_(expected).to(expected.dtype)

    def error(self, residual: torch.Tensor) -> float:
        """Squared error on the held-back tokens, of a residual [T, H] or of its rows from `first` on."""
        held = residual[len(residual) - len(self._held) :][self._held]
        return square(held)

    def relative(self, error: float) -> float:
        """A squared error as a share of the hidden states' norm."""
        return (error / max(self.scale, 1e-300)) ** 0.5

    def counted(self, pairs: Activations) -> tuple[Activations, int]:
        """The pairs of tokens that count, and how many of them, the first ones, are fitted."""
        keep = self.counts[pairs.tokens]
        if not bool(keep.all()):
            pairs = Activations(pairs.tokens[keep], pairs.rows[keep])
        return pairs, int((pairs.tokens < self.first).sum())


def fit_down(pairs: Mapping[int, Activations], residual: torch.Tensor, judge: Judge) -> dict[int, Change]:
    """What to add to the experts' down weights, {expert: Change}; experts that held-back tokens want as they are lack.

    Products are in the rows' type with sums in float32, Gram matrices and solutions in float32: their errors are part
    of the residual that the next sweep fits.

    Args:
        pairs: {expert: its activations}.
        residual: [T, H] float32, weighted; overwritten with what is left.
    """
    mean = _mean_diagonal(pairs, judge)
    changes: dict[int, Change] = {}
    if not 0.0 < mean < float("inf"):
        return changes
    some = next(iter(pairs.values())).rows
    room = torch.empty(len(pairs), some.shape[1], residual.shape[1], dtype=some.dtype)  # at once: less memory in pieces
    for _ in range(SWEEPS):
        for place, expert in enumerate(pairs):
            counted, fitted = judge.counted(pairs[expert])
            if 0 < fitted < len(counted.tokens):
                change = changes.get(expert)
                ridge, step = _step(counted, fitted, residual, mean, change)
                if step is not None and change is not None:
                    change.delta += step
                elif step is not None:
                    changes[expert] = Change(ridge, room[place].copy_(step))
    return changes


def _step(
    pairs: Activations, fitted: int, residual: torch.Tensor, mean: float, change: Change | None
) -> tuple[float, torch.Tensor | None]:
    """Solve for one expert, with every ridge the first time, and take the step [I, H] that held-back rows like best."""
    before = residual[pairs.tokens]
    rows, held_rows = (padded(part) for part in (pairs.rows[:fitted], pairs.rows[fitted:]))
    gram = _gram(rows)
    right = (rows.T @ padded(before[:fitted].to(rows.dtype))).float()
    least, best, ridge = square(before[fitted:]), None, 0.0
    for candidate in RIDGES if change is None else (change.ridge,):
        step = _solve(gram, right, change, candidate * mean)
        if step is not None:
            step = step.to(rows.dtype)
            left = before[fitted:] - (held_rows @ step)[: len(before) - fitted]
            if (error := square(left)) < least:
                least, best, ridge, held = error, step, candidate, left
    if best is None:
        return ridge, None
    before[:fitted] -= (rows @ best)[:fitted]
    before[fitted:] = held
    residual.index_copy_(0, pairs.tokens, before)
    return ridge, best


def _solve(gram: torch.Tensor, right: torch.Tensor, change: Change | None, ridge: float) -> torch.Tensor | None:
    """argmin_D |r - p D|^2 + ridge |change + D|^2 from p^T p and p^T r: [I, H] float32; None where singular."""
    if change is not None:
        right = right - ridge * change.delta
    shifted = gram.clone()
    shifted.diagonal().add_(ridge)
    factor, singular = torch.linalg.cholesky_ex(shifted)
    return None if int(singular) else torch.cholesky_inverse(factor) @ right


def _gram(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.float()
    return rows.T @ rows


def padded(rows: torch.Tensor) -> torch.Tensor:
    """[n, *] with rows of zeros up to a size that the matrix library knows (`hf.padded_rows`)."""
    return F.pad(rows, (0, 0, 0, hf.padded_rows(len(rows)) - len(rows)))


def square(x: torch.Tensor) -> float:
    """Sum of squares of x [n, *], its rows' sums in float64."""
    return float(torch.linalg.vector_norm(x, dim=1).double().square().sum())


def _mean_diagonal(pairs: Mapping[int, Activations], judge: Judge) -> float:
    """Mean over experts and units of the diagonals of p^T p."""
    squares, units = 0.0, 0
    for expert in pairs:
        counted, fitted = judge.counted(pairs[expert])
        if fitted:
            squares += square(counted.rows[:fitted].float())
            units += counted.rows.shape[1]
    return squares / units if units else 0.0
