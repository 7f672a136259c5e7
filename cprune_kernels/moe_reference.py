"""What the experts forward computes, as plain torch: the activations, the views of the weights, an expert at a time."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Curve(enum.StrEnum):
    """f of the gate."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"


@dataclass(frozen=True)
class Activation:
    """f(min(gate, limit)) (clamp(up, -limit, limit) + shift); silu is g sigmoid(alpha g)."""

    curve: Curve = Curve.SILU
    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.curve, Curve):
            raise ValueError(f"curve must be a Curve, got {self.curve!r}")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"limit must be positive or None, got {self.limit}")
        if self.curve is not Curve.SILU and self.alpha != 1.0:
            raise ValueError(f"alpha must be 1 for {self.curve}, got {self.alpha}")

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self._curve(gate) * (up + self.shift)

    def backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of gate and of up, where `grad` is that of the result."""
        low, middle = gate, up
        if self.limit is not None:
            low, middle = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (
            grad * (middle + self.shift) * self._slope(low) * (low == gate),
            grad * self._curve(low) * (middle == up),
        )

    def _curve(self, gate: Tensor) -> Tensor:
        if self.curve is Curve.SILU:
            return F.silu(gate) if self.alpha == 1.0 else gate * torch.sigmoid(self.alpha * gate)
        return F.gelu(gate, approximate="tanh" if self.curve is Curve.GELU_TANH else "none")

    def _slope(self, gate: Tensor) -> Tensor:
        if self.curve is Curve.GELU:
            density = torch.exp(-0.5 * gate.square()) / math.sqrt(2 * math.pi)
            return 0.5 * (1 + torch.erf(gate / math.sqrt(2))) + gate * density
        if self.curve is Curve.SILU:
            inner, rate = self.alpha * gate, self.alpha
        else:  # gate sigmoid(inner)
            scale = 2 * math.sqrt(2 / math.pi)
            inner, rate = scale * (gate + 0.044715 * gate**3), scale * (1 + 3 * 0.044715 * gate.square())
        part = torch.sigmoid(inner)
        return part + gate * part * (1 - part) * rate


SILU = Activation()
GELU = Activation(Curve.GELU)
GELU_TANH = Activation(Curve.GELU_TANH)
SWIGLU_OAI = Activation(alpha=1.702, limit=7.0, shift=1.0)  # gpt-oss


class ExpertWeights(NamedTuple):
    """Views that every layout on disk has: the kernels read strides."""

    gate_up: Tensor  # [C, 2, I, H]
    down: Tensor  # [C, H, I]
    gate_up_bias: Tensor | None = None  # [C, 2, I]
    down_bias: Tensor | None = None  # [C, H]


class MoEObservation(NamedTuple):
    """The combined output of a layer, and of the outputs y before gates apply: all float32."""

    out: Tensor  # [T, H]
    norms: Tensor  # [T, K] |y|; 0 where the slot has no expert
    high: Tensor  # [E] greatest component of y over the valid tokens, -inf for an expert without one
    low: Tensor  # [E] smallest component, +inf for an expert without one
    sums: Tensor  # [E, H] sum of y over the valid tokens


class Run(NamedTuple):
    """One expert on its n tokens."""

    gate: Tensor  # [n, I]
    up: Tensor  # [n, I]
    act: Tensor  # [n, I], rounded to hidden's type
    y: Tensor  # [n, H]


def expert_views(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    transposed: bool,
    interleaved: bool,
) -> ExpertWeights:
    """The one form that everything behind it knows; raises ValueError where shapes or types do not fit one another."""
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be a floating [T, H], got {hidden.dtype} of shape {list(hidden.shape)}")
    width = hidden.shape[1]
    expected = f"[E, I, {width}]" if transposed else f"[E, {width}, I]"
    wide = down.dim() == 3 and down.shape[2 if transposed else 1] == width and 0 not in down.shape
    if not wide or down.dtype != hidden.dtype:
        raise ValueError(f"down must be a {hidden.dtype} {expected}, got {down.dtype} of shape {list(down.shape)}")
    experts, inner = down.shape[0], down.shape[1 if transposed else 2]
    fused = (experts, width, 2 * inner) if transposed else (experts, 2 * inner, width)
    if gate_up.shape != fused or gate_up.dtype != hidden.dtype:
        raise ValueError(
            f"gate_up must be a {hidden.dtype} {list(fused)}, got {gate_up.dtype} of shape {list(gate_up.shape)}"
        )
    for name, bias, size in (("gate_up_bias", gate_up_bias, 2 * inner), ("down_bias", down_bias, width)):
        if bias is not None and (bias.shape != (experts, size) or not bias.is_floating_point()):
            raise ValueError(
                f"{name} must be a floating {[experts, size]}, got {bias.dtype} of shape {list(bias.shape)}"
            )

    def halves(fused: Tensor) -> Tensor:  # [C, 2 I, ...] -> [C, 2, I, ...]
        return fused.unflatten(1, (inner, 2)).transpose(1, 2) if interleaved else fused.unflatten(1, (2, inner))

    return ExpertWeights(
        halves(gate_up.mT if transposed else gate_up),
        down.mT if transposed else down,
        None if gate_up_bias is None else halves(gate_up_bias),
        down_bias,
    )


def experts_of(
    hidden: Tensor, index: Tensor, weights: ExpertWeights, activation: Activation
) -> Iterator[tuple[int, Tensor, Tensor, Run]]:
    """(expert, tokens [n], slots [n], what it computed) of every expert with tokens; float32, or float64 of float64."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    for expert in range(len(weights.down)):
        token, slot = (index == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        both = hidden[token].to(wide) @ weights.gate_up[expert].flatten(0, 1).to(wide).T  # [n, 2 I]
        if weights.gate_up_bias is not None:
            both = both + weights.gate_up_bias[expert].flatten().to(wide)
        gate, up = both.chunk(2, dim=1)
        act = activation(gate, up).to(hidden.dtype).to(wide)
        y = act @ weights.down[expert].to(wide).T
        if weights.down_bias is not None:
            y = y + weights.down_bias[expert].to(wide)
        yield expert, token, slot, Run(gate, up, act, y)


def forward_reference(
    hidden: Tensor, index: Tensor, gates: Tensor, weights: ExpertWeights, activation: Activation
) -> Tensor:
    """The specification of `moe_forward`."""
    out = torch.zeros_like(hidden, dtype=torch.promote_types(hidden.dtype, torch.float32))
    for _, token, slot, run in experts_of(hidden, index, weights, activation):
        out.index_add_(0, token, run.y * gates[token, slot].to(run.y.dtype).unsqueeze(1))
    return out.to(hidden.dtype)


def backward_reference(
    grad: Tensor, hidden: Tensor, index: Tensor, gates: Tensor, weights: ExpertWeights, activation: Activation
) -> list[Tensor | None]:
    """The gradients of hidden, gates and the weights, where `grad` [T, H] is that of `forward_reference`.

    Roundings are passed by. Written out, because an operator's own kernel records no graph.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    tensors = (hidden, gates, *weights)
    found = [None if x is None else torch.zeros(x.shape, dtype=wide, device=x.device) for x in tensors]
    to_hidden, to_gates, to_gate_up, to_down, to_gate_up_bias, to_down_bias = found
    for expert, token, slot, run in experts_of(hidden, index, weights, activation):
        rows = grad[token].to(wide)
        to_gates[token, slot] = (rows * run.y).sum(1)
        rows = rows * gates[token, slot].to(wide).unsqueeze(1)  # of y
        to_down[expert] = rows.T @ run.act
        sides = activation.backward(rows @ weights.down[expert].to(wide), run.gate, run.up)
        x = hidden[token].to(wide)
        for side, part in enumerate(sides):
            to_gate_up[expert, side] = part.T @ x
            to_hidden.index_add_(0, token, part @ weights.gate_up[expert, side].to(wide))
            if to_gate_up_bias is not None:
                to_gate_up_bias[expert, side] = part.sum(0)
        if to_down_bias is not None:
            to_down_bias[expert] = rows.sum(0)
    return [None if x is None else x.to(like.dtype) for x, like in zip(found, tensors, strict=True)]


def observe_reference(
    hidden: Tensor, index: Tensor, gates: Tensor, weights: ExpertWeights, activation: Activation, valid: Tensor | None
) -> MoEObservation:
    """The specification of `moe_observe`."""
    (tokens, width), experts = hidden.shape, len(weights.down)
    out, norms = gates.new_zeros(tokens, width, dtype=torch.float32), torch.zeros_like(gates, dtype=torch.float32)
    high, low = out.new_full((experts,), -torch.inf), out.new_full((experts,), torch.inf)
    sums = out.new_zeros(experts, width)
    for expert, token, slot, run in experts_of(hidden, index, weights, activation):
        y = run.y
        out.index_add_(0, token, (y * gates[token, slot].to(y.dtype).unsqueeze(1)).float())
        norms[token, slot] = torch.linalg.vector_norm(y, dim=1).float()
        if valid is not None:
            y = y[valid[token]]
        if len(y):
            low[expert], high[expert] = y.aminmax()
            sums[expert] = y.sum(0)
    return MoEObservation(out, norms, high, low, sums)
