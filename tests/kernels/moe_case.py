"""Seeded inputs of the experts forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Layer:
    hidden: Tensor
    index: Tensor
    gates: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass
class Case(Layer):
    valid: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.hidden, self.index, self.gates, self.gate_up, self.down, self.valid


def draw(
    generator: torch.Generator,
    tokens: int,
    top_k: int,
    experts: int,
    hidden: int,
    inner: int,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """Tokens, their routing and the weights of a layer, by their names in a case."""

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    return {
        "hidden": normal(tokens, hidden).to(dtype),
        "index": torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k].contiguous(),
        "gates": normal(tokens, top_k),
        "gate_up": (normal(experts, 2 * inner, hidden) * hidden**-0.5).to(dtype),
        "down": (normal(experts, hidden, inner) * inner**-0.5).to(dtype),
    }


def make(tokens: int, top_k: int, experts: int, hidden: int, inner: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    layer = draw(generator, tokens, top_k, experts, hidden, inner)
    return Case(**layer, valid=torch.rand(tokens, generator=generator) < 0.8)
