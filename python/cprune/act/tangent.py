"""One expert as a linear function of its weights' change, and the step towards what its layer lacks.

An expert adds s D phi(G x, U x) to its token's residual stream, s its gate times the token's weight. Around its weights
that is linear: with a = phi and the slopes p = dphi/dG x, q = dphi/dU x, a change of (G, U, D) by (G', U', D') adds

    J d = s (D (p G' x + q U' x) + D' a)

and the change for what the layer lacks, r, is the d that minimises |r - J d|^2 + ridge_GU (|G'|^2 + |U'|^2) +
ridge_D |D'|^2 (Levenberg 1944, Marquardt 1963). Conjugate gradients (Hestenes & Stiefel 1952) solve for it, with the
Kronecker factors of J^T J as preconditioner (arXiv 1503.05671): E[s^2 (p, q)(p, q)^T] * D^T D on one side of (G', U')
and the diagonal of X^T X on the other, A^T A beside D', which makes that of D' alone exact in one step. Rows held back
from the fit say where to stop: more steps fit the calibration text, not the expert.

Products, and what they leave to fit, are in the model's type; weights, sums and solutions in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from cprune import hf
from cprune.act.least_squares import square

ITERATIONS = 8  # of conjugate gradients, at most
GAIN = 1e-4  # by which share of their error an iteration must better the held-back rows for there to be another


@dataclass(frozen=True)
class Step:
    """A change of one expert's weights, float32."""

    down: torch.Tensor  # [H, I]
    gate_up: torch.Tensor | None  # [2 I, H], gate before up; None where they stay

    @property
    def parts(self) -> list[torch.Tensor]:
        """What there is of it."""
        return [self.down] if self.gate_up is None else [self.down, self.gate_up]

    def times(self, factor: float) -> Step:
        """factor * self."""
        return Step(self.down * factor, None if self.gate_up is None else self.gate_up * factor)

    def add_(self, other: Step, factor: float = 1.0) -> Step:
        """self + factor * other, in place."""
        for one, another in zip(self.parts, other.parts, strict=True):
            one.add_(another, alpha=factor)
        return self

    def mul_(self, factor: float) -> Step:
        """factor * self, in place."""
        for one in self.parts:
            one.mul_(factor)
        return self

    def dot(self, other: Step, weights: tuple[float, float] = (1.0, 1.0)) -> float:
        """Inner product, that of down times weights[0], that of gate and up times weights[1]."""
        pairs = zip(weights, self.parts, other.parts, strict=False)
        return sum(weight * float((one * another).sum(dtype=torch.float64)) for weight, one, another in pairs)


class Ridges(NamedTuple):
    """What a step's squared length costs."""

    down: float
    gate_up: float


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


@dataclass(frozen=True)
class Rows:
    """The tokens of one expert: those that are fitted, those that judge, and those that do not count.

    There is room between and behind them for numbers of rows that the matrix library knows: token 0, times nothing.
    """

    tokens: torch.Tensor  # [P] int64
    scale: torch.Tensor  # [P, 1] float32: gate times weight, 0 in the room
    fitted: int  # how many of them are fitted, from the first on
    judging: slice  # those that judge
    others: slice  # those that judge and those that do not count

    @classmethod
    def of(cls, tokens: torch.Tensor, scale: torch.Tensor, fits: torch.Tensor, judges: torch.Tensor) -> Rows:
        """Sort the tokens of an expert, each kind in the order given.

        Args:
            tokens: [n] int64.
            scale: [n] float32.
            fits, judges: [n] bool; what is neither does not count.
        """
        fitted, judging, others = (which.nonzero().flatten() for which in (fits, judges, ~(fits | judges)))
        start = hf.padded_rows(len(fitted))  # of those that are not fitted
        stop = start + len(judging) + len(others)
        chosen = torch.cat([fitted, judging, others])
        places = torch.cat([torch.arange(len(fitted)), torch.arange(start, stop)]).to(tokens.device)
        size = hf.padded_rows(stop)
        return cls(
            tokens.new_zeros(size).index_copy_(0, places, tokens[chosen]),
            scale.new_zeros(size).index_copy_(0, places, scale[chosen]).unsqueeze(1),
            len(fitted),
            slice(start, start + len(judging)),
            slice(start, stop),
        )

    @property
    def fit(self) -> slice:
        """Those that are fitted, and the room behind them."""
        return slice(0, self.judging.start)

    def taken(self, residual: torch.Tensor) -> torch.Tensor:
        """Their rows [P, H] of a residual [T, H]; zero in the room."""
        rows = residual[self.tokens]
        rows[self.fitted : self.judging.start] = 0
        rows[self.others.stop :] = 0
        return rows

    def put(self, residual: torch.Tensor, rows: torch.Tensor) -> None:
        """The inverse of `taken`."""
        for part in (slice(0, self.fitted), self.others):
            residual.index_copy_(0, self.tokens[part], rows[part])

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """x [P, *] times scale, in x's type."""
        return (x.float() * self.scale).to(x.dtype)


class Tangent:
    """One expert as it is now, on its rows."""

    def __init__(
        self, experts: Experts, expert: int, rows: Rows, x: torch.Tensor, ridges: Ridges, *, whole: bool
    ) -> None:
        """x [P, H]: what it is given."""
        activation, slopes = experts.linearised(expert, x, whole=whole)
        self.experts, self.expert, self.rows, self.x, self.ridges = experts, expert, rows, x, ridges
        self.weights = experts.weights(expert)
        self.slopes = None if slopes is None else rows.scaled(slopes)  # None: the down projection alone changes
        # what stands before down projections: the activation, and room for what a change of gate and up makes of it
        units = activation.shape[1]
        self._before = x.new_empty(len(x), 2 * units if whole else units)
        self.activation, self._moved = self._before[:, :units], self._before[:, units:]
        self.activation.copy_(rows.scaled(activation))
        self._factors = self._kronecker()

    @property
    def down(self) -> torch.Tensor:
        """[H, I], as it was at the time."""
        return self.weights[2]

    def take(self, step: Step | None) -> None:
        """Change the expert by a step; None makes it what it was."""
        self.experts.put(self.expert, self.weights, step)

    def solve(self, lacking: torch.Tensor) -> Step | None:
        """The step after as many iterations as the held-back rows of `lacking` [P, H] like; None for none."""
        if self._factors is None:
            return None
        left = lacking.to(self.x.dtype, copy=True)
        gradient = self.transpose(left)
        precise = self._precondition(gradient)
        if self.slopes is None:
            return precise  # what is linear is solved
        direction, slope, least = precise, gradient.dot(precise), square(left[self.rows.judging])
        step: Step | None = None
        for iteration in range(ITERATIONS):
            moved = self.apply(direction)
            curvature = square(moved[self.rows.fit]) + direction.dot(direction, self.ridges)
            if not 0.0 < curvature < float("inf"):
                break
            length = slope / curvature
            held = square(left.sub_(moved, alpha=length)[self.rows.judging])
            if not held < least:
                break
            step = direction.times(length) if step is None else step.add_(direction, length)
            enough, least = held > (1.0 - GAIN) * least, held
            if enough or iteration == ITERATIONS - 1:
                break
            gradient = self.transpose(left)
            for one, another, ridge in zip(gradient.parts, step.parts, self.ridges, strict=True):
                one.sub_(another, alpha=ridge)
            precise = self._precondition(gradient)
            next_slope = gradient.dot(precise)
            direction, slope = direction.mul_(next_slope / slope).add_(precise), next_slope
        return step

    def gains(self) -> torch.Tensor:
        """What the expert, whose weights have changed since, gives more on its rows: [P, H]."""
        now = self.experts.down[self.expert]
        if self.slopes is None:
            return self.activation @ (now - self.down).T
        activation = self.experts.activate(self.experts.inner(self.expert, self.x))
        self._moved.copy_(self.rows.scaled(activation))
        return self._before @ torch.cat([-self.down, now], dim=1).T

    def apply(self, step: Step) -> torch.Tensor:
        """J d: [P, H]."""
        type_ = self.x.dtype
        if step.gate_up is None or self.slopes is None:
            return self.activation @ step.down.to(type_).T
        units = self.activation.shape[1]
        moved = (self.x @ step.gate_up.to(type_).T).mul_(self.slopes)
        torch.add(moved[:, :units], moved[:, units:], out=self._moved)
        return self._before @ torch.cat([step.down.to(type_), self.down], dim=1).T

    def transpose(self, left: torch.Tensor) -> Step:
        """J^T r of the fitted rows of r [P, H] of the model's type, zero in the room."""
        fit = self.rows.fit
        down = (left[fit].T @ self.activation[fit]).float()
        if self.slopes is None:
            return Step(down, None)
        inner = (left[fit] @ self.down).unsqueeze(1) * self.slopes[fit].unflatten(1, (2, -1))
        return Step(down, (inner.flatten(1).T @ self.x[fit]).float())

    def _kronecker(self) -> _Factors | None:
        """None where one is singular."""
        fit = self.rows.fit
        activation = self.activation[fit].float()
        beside = activation.T @ activation
        beside.diagonal().add_(self.ridges.down)
        beside, singular = torch.linalg.cholesky_ex(beside)
        if self.slopes is None or int(singular):
            return None if int(singular) else _Factors(beside, None, None)
        slopes, down = self.slopes[fit].float(), self.down.float()
        outer = (slopes.T @ slopes).mul_((down.T @ down).repeat(2, 2)).div_(self.rows.fitted)
        inner = self.x[: self.rows.fitted].float().square().sum(0)
        balance = (outer.diagonal().mean() / inner.mean()).clamp_min(1e-30).sqrt()
        outer.diagonal().add_(self.ridges.gate_up**0.5 * balance)
        outer, singular = torch.linalg.cholesky_ex(outer)
        return None if int(singular) else _Factors(beside, outer, inner.add_(self.ridges.gate_up**0.5 / balance))

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
