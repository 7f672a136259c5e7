"""The average of experts: hidden units aligned first, since a gated expert is the same in any order of its units.

An expert is down · (act(gate x) * (up x)): a permutation of its I units moves the rows of gate and up, the entries of
their biases and the columns of down together and changes nothing. Units of two experts are matched one to one by the
Hungarian algorithm on how alike they act and what they are made of (as REAM, arXiv 2604.04356, and Git Re-Basin,
2209.04836, match them):

    maximise over permutations p   sum_u  cos(a_1[:, u], a_2[:, p(u)]) + cos(v_1[u], v_2[p(u)])

a are activations on shared tokens, v_u = (gate row, up row, down column), each scaled by the mean norm of its kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F


@dataclass(frozen=True)
class Expert:
    """The weights of one expert, in one layout and type for all models."""

    gate: torch.Tensor  # [I, H] float32
    up: torch.Tensor  # [I, H] float32
    down: torch.Tensor  # [H, I] float32
    gate_bias: torch.Tensor | None = None  # [I] float32
    up_bias: torch.Tensor | None = None  # [I] float32
    down_bias: torch.Tensor | None = None  # [H] float32

    def parts(self) -> tuple[torch.Tensor | None, ...]:
        """The tensors, in the order of the fields."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def to(self, dtype: torch.dtype) -> Expert:
        """The same in another type."""
        return Expert(*(None if part is None else part.to(dtype) for part in self.parts()))

    def permuted(self, order: torch.Tensor) -> Expert:
        """The same function with unit order[u] in place u; order [I] int64."""
        gate_bias, up_bias = (None if bias is None else bias[order] for bias in (self.gate_bias, self.up_bias))
        return Expert(self.gate[order], self.up[order], self.down[:, order], gate_bias, up_bias, self.down_bias)


def match_units(first: Expert, second: Expert, acts: torch.Tensor, other_acts: torch.Tensor) -> torch.Tensor:
    """order [I] int64: the unit of `second` that belongs in each place of `first`.

    Args:
        acts, other_acts: [n, I] activations of the two on the same n tokens.
    """
    kinds = [(first.gate, second.gate), (first.up, second.up), (first.down.T, second.down.T)]
    scales = [(one.square().sum() + two.square().sum()).sqrt().clamp_min(1e-30) for one, two in kinds]
    own, other = (
        torch.cat([pair[side] / scale for pair, scale in zip(kinds, scales, strict=True)], dim=1) for side in (0, 1)
    )
    alike = F.normalize(acts.float(), dim=0).T @ F.normalize(other_acts.float(), dim=0)
    alike += F.normalize(own, dim=1) @ F.normalize(other, dim=1).T
    return torch.from_numpy(linear_sum_assignment(alike.double().numpy(), maximize=True)[1])


def average(experts: Sequence[Expert], acts: Sequence[torch.Tensor], weights: Sequence[float]) -> Expert:
    """sum_j w_j theta_j / sum_j w_j, units aligned to those of the first expert. Equal experts stay as they are.

    Args:
        acts: [n, I] of every expert, on the same tokens.
        weights: not negative, with a sum above 0.
    """
    total, first = sum(weights), experts[0]
    parts = list(first.parts())
    for expert, own, weight in zip(experts[1:], acts[1:], weights[1:], strict=True):
        aligned = expert.permuted(match_units(first, expert, acts[0], own))
        for place, (base, part) in enumerate(zip(first.parts(), aligned.parts(), strict=True)):
            if base is not None:
                parts[place] = parts[place] + (weight / total) * (part - base)
    return Expert(*parts)
