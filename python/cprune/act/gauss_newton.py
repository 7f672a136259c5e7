"""The fit behind repair: Gauss-Newton on the projections of the kept experts, one expert at a time.

An expert adds s D phi(G x, U x) to its token's residual stream, s its gate times the token's weight. Around its weights
that is linear: with a = phi and the slopes p = dphi/dG x, q = dphi/dU x, a change of (G, U, D) by (G', U', D') adds

    J d = s (D (p G' x + q U' x) + D' a)

and the change for what the layer lacks, r, is the d that minimises |r - J d|^2 + ridge_GU (|G'|^2 + |U'|^2) +
ridge_D |D'|^2 (Levenberg 1944, Marquardt 1963). Conjugate gradients (Hestenes & Stiefel 1952) solve for it, with the
Kronecker factors of J^T J as preconditioner (arXiv 1503.05671): E[s^2 (p, q)(p, q)^T] * D^T D on one side of (G', U')
and the diagonal of X^T X on the other, A^T A beside D', which makes that of D' alone exact in one step. Rows held back
from the fit say where to stop: more steps fit the calibration text, not the expert. What is taken is what the changed
expert truly gives, weights rounded to the type they will be written in, and only where held-back rows are nearer to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from cprune import hf
from cprune.act.least_squares import Judge, padded, square

SWEEPS = 3  # over the experts, each of which meets what those before it left
ITERATIONS = 3  # of conjugate gradients, at most: what others do meanwhile counts for more than a fourth
GAIN = 1e-3  # by which share of their error an iteration must better the held-back rows for there to be another
RIDGE = 0.1  # in units of the mean diagonal of J^T J over experts
# Of the down projections alone, which change where there is little text: in one sweep, since a second one bettered
# perplexity by 0.3 % at most, and with more ridge.
DOWN_SWEEPS, DOWN_RIDGE = 1, 0.2
SAMPLE = 512  # tokens of an expert, about, by which the mean diagonal is known
HALVINGS = 2  # of a step that is too long for the slopes to hold


@dataclass(frozen=True)
class Seen:
    """What the experts of a layer were given."""

    hidden: torch.Tensor  # [T, H] in the model's type
    index: torch.Tensor  # [T, K] experts
    gates: torch.Tensor  # [T, K]


@dataclass(frozen=True)
class Step:
    """A change of one expert's weights, float32."""

    down: torch.Tensor  # [H, I]
    gate_up: torch.Tensor | None  # [2 I, H], gate before up; None where they stay

    def plus(self, other: Step, factor: float) -> Step:
        """self + factor * other."""
        both = None if self.gate_up is None else self.gate_up.add(other.gate_up, alpha=factor)
        return Step(self.down.add(other.down, alpha=factor), both)

    def dot(self, other: Step) -> float:
        """Inner product, summed in float64."""
        return sum(
            float((one * another).sum(dtype=torch.float64))
            for one, another in ((self.down, other.down), (self.gate_up, other.gate_up))
            if one is not None and another is not None
        )


class Experts:
    """The experts of a layer in memory, whatever their layout, as gate, up and down projections."""

    def __init__(self, module: nn.Module, written: torch.dtype) -> None:
        """written: the type in which weights are stored; those that change are rounded to it."""
        self.module, self.written = module, written
        self.gate, self.up, self.down = hf.projections(module)

    def inner(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """What the activation is given, [n, 2 I], gate before up."""
        z = hf.expert_linear(self.module, expert, x, "gate_up_proj")
        return z if self.module.is_concatenated else torch.cat([z[:, ::2], z[:, 1::2]], dim=1)

    def activate(self, z: torch.Tensor) -> torch.Tensor:
        """phi: [n, 2 I] -> [n, I]."""
        if not self.module.is_concatenated:
            z = torch.stack(z.chunk(2, dim=1), dim=2).flatten(1)
        return self.module._apply_gate(z)

    def linearised(self, expert: int, x: torch.Tensor, *, whole: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """phi [n, I] and, where asked for, its slopes [n, 2 I]: a unit's activation is of its own two inputs only."""
        z = self.inner(expert, x)
        if not whole:
            return self.activate(z), None
        with torch.inference_mode(False), torch.enable_grad():
            z = z.clone().requires_grad_()
            out = self.activate(z)
            (slopes,) = torch.autograd.grad(out.sum(), z)
        return out.detach(), slopes

    def weights(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Copies of gate, up and down, to `put` back."""
        return self.gate[expert].clone(), self.up[expert].clone(), self.down[expert].clone()

    def put(self, expert: int, weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor], step: Step | None) -> None:
        """Set the expert's weights plus a step, rounded to the type in which they are written."""
        changes = (None, None, None)
        if step is not None:
            changes = (*(step.gate_up.chunk(2) if step.gate_up is not None else (None, None)), step.down)
        for place, weight, change in zip((self.gate, self.up, self.down), weights, changes, strict=True):
            place[expert].copy_(weight if change is None else (weight.float() + change).to(self.written))


def refit(
    experts: Experts, kept: Sequence[int], seen: Seen, residual: torch.Tensor, judge: Judge, *, whole: bool
) -> list[int]:
    """Change the kept experts, in place, towards what the layer lacks; returns those that were changed, ascending.

    Args:
        seen: of all T tokens, those that are held back last.
        residual: [T, H] float32, weighted; overwritten with what is left, of tokens that do not count, too.
        whole: all three projections; else the down projections alone, which is ridge least squares.
    """
    pairs = {expert: rows for expert in kept if (rows := _pairs(expert, seen, judge)) is not None}
    ridges = _ridges(experts, pairs, seen.hidden, whole=whole)
    changed: set[int] = set()
    if ridges is None:
        return []
    for _ in range(SWEEPS if whole else DOWN_SWEEPS):
        for expert, rows in pairs.items():
            if _refit_one(experts, expert, rows, seen.hidden, residual, ridges, whole=whole):
                changed.add(expert)
    return sorted(changed)


@dataclass(frozen=True)
class _Rows:
    """The tokens of one expert: those that are fitted, those that judge, and those that do not count."""

    tokens: torch.Tensor  # [n] int64
    scale: torch.Tensor  # [n, 1] float32: gate times weight
    fitted: int  # how many of them are fitted
    counted: int  # how many of them are fitted or judge

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """x [padded n, *] times scale, in x's type; zero where padded."""
        out = x.new_zeros(x.shape)
        n = len(self.tokens)
        out[:n] = x[:n].float() * self.scale
        return out

    @property
    def judging(self) -> slice:
        """The rows that are held back from the fit."""
        return slice(self.fitted, self.counted)


def _pairs(expert: int, seen: Seen, judge: Judge) -> _Rows | None:
    """None where no token is fitted or none judges."""
    tokens, slots = (seen.index == expert).nonzero(as_tuple=True)
    counts = judge.counts[tokens]
    fits = counts & (tokens < judge.first)
    fitted, counted = int(fits.sum()), int(counts.sum())
    if not 0 < fitted < counted:
        return None
    if counted < len(tokens):  # those that do not count, last; those fitted stand before those that judge as it is
        order = torch.argsort(~counts, stable=True)
        tokens, slots = tokens[order], slots[order]
    scale = (seen.gates[tokens, slots].float() * judge.weight[tokens]).unsqueeze(1)
    return _Rows(tokens, scale, fitted, counted)


def _ridges(
    experts: Experts, pairs: dict[int, _Rows], hidden: torch.Tensor, *, whole: bool
) -> tuple[float, float] | None:
    """Ridges of gate and up, and of down; None where there is nothing to fit."""
    inner, outer = 0.0, 0.0
    for expert, rows in pairs.items():
        sampled = slice(0, rows.fitted, 1 + rows.fitted // SAMPLE)
        x, scale = padded(hidden[rows.tokens[sampled]]), rows.scale[sampled]
        activation, slopes = experts.linearised(expert, x, whole=whole)
        outer += rows.fitted * float((activation[: len(scale)] * scale).square().mean())
        if slopes is not None:
            columns = experts.down[expert].float().square().sum(0).repeat(2)
            of_units = (slopes[: len(scale)] * scale).square().mean(0) * columns
            inner += rows.fitted * float(of_units.mean() * x[: len(scale)].float().square().mean())
    for total in (outer, inner) if whole else (outer,):
        if not 0.0 < total < float("inf"):
            return None
    ridge = RIDGE if whole else DOWN_RIDGE
    return ridge * inner / len(pairs), ridge * outer / len(pairs)


def _refit_one(
    experts: Experts,
    expert: int,
    rows: _Rows,
    hidden: torch.Tensor,
    residual: torch.Tensor,
    ridges: tuple[float, float],
    *,
    whole: bool,
) -> bool:
    """Take the step that its rows ask for, shorter where it is too long; whether one was taken."""
    x, lacking = padded(hidden[rows.tokens]), residual[rows.tokens]
    tangent = _Tangent(experts, expert, rows, x, ridges, whole=whole)
    step = tangent.solve(lacking)
    if step is None:
        return False
    weights, judging = experts.weights(expert), rows.judging
    before = square(lacking[judging])
    for halving in range(HALVINGS + 1):
        factor = 0.5**halving
        experts.put(expert, weights, step.plus(step, factor - 1.0))
        if square(lacking[judging] - tangent.gains(experts, expert, weights[2], judging)) < before:
            lacking -= tangent.gains(experts, expert, weights[2], slice(0, len(lacking)))
            residual.index_copy_(0, rows.tokens, lacking)
            return True
    experts.put(expert, weights, None)
    return False


class _Tangent:
    """One expert as a linear function of its weights' change."""

    def __init__(
        self,
        experts: Experts,
        expert: int,
        rows: _Rows,
        x: torch.Tensor,
        ridges: tuple[float, float],
        *,
        whole: bool,
    ) -> None:
        activation, slopes = experts.linearised(expert, x, whole=whole)
        self.x, self.rows, self.down, self.ridges = x, rows, experts.down[expert], ridges
        self.activation = rows.scaled(activation)
        self.slopes = None if slopes is None else rows.scaled(slopes)
        self._factors = self._kronecker()

    def solve(self, lacking: torch.Tensor) -> Step | None:
        """The step after as many iterations as the held-back rows of `lacking` [n, H] float32 like; None for none."""
        if self._factors is None:
            return None
        gradient = self.transpose(lacking)
        direction = precise = self._precondition(gradient)
        if self.slopes is None:
            return precise  # what is linear is solved
        n, fitted = len(lacking), self.rows.fitted
        best, least, left, step = None, square(lacking[self.rows.judging]), lacking, None
        slope = gradient.dot(precise)
        for iteration in range(ITERATIONS):
            moved = self.apply(direction)[:n]
            curvature = square(moved[:fitted]) + self._ridge(direction, direction)
            if not 0.0 < curvature < float("inf"):
                break
            length = slope / curvature
            step = step.plus(direction, length) if step is not None else direction.plus(direction, length - 1.0)
            left = left - length * moved
            held = square(left[self.rows.judging])
            enough = held > (1.0 - GAIN) * least
            if held < least:
                best, least = step, held
            if enough or iteration == ITERATIONS - 1:
                break
            gradient = self._pulled(self.transpose(left), step)
            precise = self._precondition(gradient)
            next_slope = gradient.dot(precise)
            direction, slope = precise.plus(direction, next_slope / slope), next_slope
        return best

    def gains(self, experts: Experts, expert: int, down: torch.Tensor, which: slice) -> torch.Tensor:
        """What the expert, whose weights have changed since, gives more on some of the rows: [n, H].

        Args:
            down: its down projection [H, I] at the time of the tangent.
        """
        count = which.stop - which.start
        activation = padded(self.activation[which])
        if self.slopes is None:  # only the down projection has changed, and less is rounded of the difference
            return (activation @ (experts.down[expert] - down).T)[:count]
        inner = experts.activate(experts.inner(expert, padded(self.x[which])))
        inner[:count] = inner[:count].float() * self.rows.scale[which]
        return (inner @ experts.down[expert].T)[:count].float() - (activation @ down.T)[:count].float()

    def apply(self, step: Step) -> torch.Tensor:
        """J d: [padded n, H] float32."""
        type_ = self.x.dtype
        out = (self.activation @ step.down.to(type_).T).float()
        if step.gate_up is not None:
            moved = self.slopes * (self.x @ step.gate_up.to(type_).T)
            gate, up = moved.chunk(2, dim=1)
            out += (gate + up) @ self.down.T
        return out

    def transpose(self, lacking: torch.Tensor) -> Step:
        """J^T r of the fitted rows of r [n, H] float32."""
        fitted = self.rows.fitted
        rows = self.x.new_zeros(len(self.x), lacking.shape[1])
        rows[:fitted] = lacking[:fitted]
        down = (rows.T @ self.activation).float()
        if self.slopes is None:
            return Step(down, None)
        inner = (rows @ self.down).unsqueeze(1) * self.slopes.view(len(rows), 2, -1)
        return Step(down, (inner.flatten(1).T @ self.x).float())

    def _ridge(self, one: Step, other: Step) -> float:
        total = self.ridges[1] * float((one.down * other.down).sum(dtype=torch.float64))
        if one.gate_up is not None:
            total += self.ridges[0] * float((one.gate_up * other.gate_up).sum(dtype=torch.float64))
        return total

    def _pulled(self, gradient: Step, step: Step) -> Step:
        """The gradient with the ridges' share."""
        both = None if gradient.gate_up is None else gradient.gate_up.sub(step.gate_up, alpha=self.ridges[0])
        return Step(gradient.down.sub(step.down, alpha=self.ridges[1]), both)

    def _kronecker(self) -> _Factors | None:
        """None where one is singular."""
        fitted = slice(0, self.rows.fitted)
        activation = self.activation[fitted].float()
        beside = activation.T @ activation
        beside.diagonal().add_(self.ridges[1])
        beside, singular = torch.linalg.cholesky_ex(beside)
        if self.slopes is None or int(singular):
            return None if int(singular) else _Factors(beside, None, None)
        slopes, down = self.slopes[fitted].float(), self.down.float()
        outer = (slopes.T @ slopes).mul_((down.T @ down).repeat(2, 2)).div_(self.rows.fitted)
        inner = self.x[fitted].float().square().sum(0)
        balance = (outer.diagonal().mean() / inner.mean()).clamp_min(1e-30).sqrt()
        outer.diagonal().add_(self.ridges[0] ** 0.5 * balance)
        outer, singular = torch.linalg.cholesky_ex(outer)
        return None if int(singular) else _Factors(beside, outer, inner.add_(self.ridges[0] ** 0.5 / balance))

    def _precondition(self, gradient: Step) -> Step:
        assert self._factors is not None
        beside, outer, inner = self._factors
        down = torch.cholesky_solve(gradient.down.T, beside).T
        if gradient.gate_up is None:
            return Step(down, None)
        return Step(down, torch.cholesky_solve(gradient.gate_up, outer).div_(inner))


class _Factors(NamedTuple):
    """What a gradient is divided by."""

    beside: torch.Tensor  # [I, I] Cholesky factor, of what stands beside D'
    outer: torch.Tensor | None  # [2 I, 2 I] Cholesky factor, of what stands before (G', U')
    inner: torch.Tensor | None  # [H] of what stands behind it
