"""The merge of one group: a kept expert and those that it stands in for become one that does what all of them did.

Over the tokens that the original routes to a member, with gates g_j and outputs f_j of the members,

    target(t) = sum_j g_j(t) f_j(x_t),    the merged expert's share is  (sum_j g_j(t)) (D a(x_t) + b)

For gate and up projections there are two candidates: the kept expert's own, and the average of all with their hidden
units aligned (`align`), weighted by what each contributes, sum_t g_j |f_j|. The down projection D of either is refitted
to the target by ridge least squares (`least_squares`): MergeMoE's merging in output space (arXiv 2510.14436). Tokens of
sequences held back from the fit choose the ridge and the candidate, or that the kept expert stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from cprune import hf
from cprune.act.align import Expert, average
from cprune.act.least_squares import Activations, Judge, fit_down, padded

ALIGNED_TOKENS = 512  # on which the units of two experts are compared


@dataclass(frozen=True)
class Routed:
    """The tokens that chose one expert."""

    tokens: torch.Tensor  # [n] int64, ascending
    gates: torch.Tensor  # [n] float32


class Inputs:
    """Notes what an experts module is called with (an `hf.Observer`)."""

    def __init__(self) -> None:
        self._calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def on_input(self, hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> None:
        """The next batch."""
        self._calls.append((hidden, index, gates))

    def on_expert(self, *_: object) -> None:
        """Of no interest here."""

    def on_experts(self, *_: object) -> None:
        """Of no interest here."""

    def take(self) -> tuple[torch.Tensor, dict[int, Routed]]:
        """(hidden [T, H], {expert: its tokens}, of experts that met one), and forget them."""
        hidden, index, gates = (torch.cat(parts) for parts in zip(*self._calls, strict=True))
        self._calls.clear()
        pairs = torch.argsort(index.flatten(), stable=True)
        counts = torch.bincount(index.flatten()).tolist()
        routed = {}
        for expert, pair in enumerate(pairs.split(counts)):
            if len(pair):
                routed[expert] = Routed(pair // index.shape[1], gates.flatten()[pair].float())
        return hidden, routed


@dataclass(frozen=True)
class Group:
    """What there is to know of a group of experts to merge it."""

    members: tuple[int, ...]  # the kept one first
    inputs: torch.Tensor  # [n, H] of the tokens that count and chose a member, those that are fitted first
    gates: torch.Tensor  # [n] float32, the sum of the members' gates
    weight: torch.Tensor  # [n] float32 of the tokens
    target: torch.Tensor  # [n, H] float32
    contribution: tuple[float, ...]  # of every member, sum g |f| over the fitted tokens
    fitted: int


def gather(
    experts: nn.Module, members: Sequence[int], hidden: torch.Tensor, routed: Mapping[int, Routed], judge: Judge
) -> Group:
    """Run the members of a group on the tokens that chose them.

    Args:
        members: the kept one first.
        hidden: [T, H], what the experts module was given for all tokens.
        routed: which of them chose whom.
    """
    none = Routed(torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    own = [routed.get(member, none) for member in members]
    tokens = torch.unique(torch.cat([part.tokens for part in own]))
    tokens = tokens[judge.counts[tokens]]
    fitted = int((tokens < judge.first).sum())
    inputs, gates = hidden[tokens], torch.zeros(len(tokens))
    target = torch.zeros(inputs.shape, dtype=torch.float32)
    contribution = []
    for member, part in zip(members, own, strict=True):
        counts = judge.counts[part.tokens]
        rows, gate = torch.searchsorted(tokens, part.tokens[counts]), part.gates[counts]
        output = in_few_shapes(hf.expert_output, experts, member, inputs[rows]).float() * gate.unsqueeze(1)
        target.index_add_(0, rows, output)
        gates.index_add_(0, rows, gate)
        contribution.append(float(torch.linalg.vector_norm(output[rows < fitted], dim=1).double().sum()))
    return Group(tuple(members), inputs, gates, judge.weight[tokens], target, tuple(contribution), fitted)


def merge_group(experts: nn.Module, group: Group, dtype: torch.dtype) -> Expert | None:
    """The merged expert; None where nothing does better on held-back tokens than the kept expert as it is.

    Args:
        dtype: of the weights on disk, to which candidates are rounded before they are judged.
    """
    kept, present = group.members[0], [place for place, share in enumerate(group.contribution) if share > 0.0]
    if not 0 < group.fitted < len(group.inputs) or not any(present):
        return None
    own = read_expert(experts, kept)
    sample = group.inputs[torch.linspace(0, group.fitted - 1, min(group.fitted, ALIGNED_TOKENS)).long()]
    places = sorted({0, *present})
    members, shares = [group.members[place] for place in places], [group.contribution[place] for place in places]
    mean = average(
        [read_expert(experts, member) for member in members],
        [hf.expert_activation(experts, member, sample) for member in members],
        shares,
    )
    judge = Judge(torch.ones(len(group.inputs), 1), torch.ones(len(group.inputs), 1, dtype=torch.bool), group.fitted)
    best, least = None, float("inf")
    for candidate in (own, mean):
        write_expert(experts, kept, candidate, dtype)
        activation = in_few_shapes(hf.expert_activation, experts, kept, group.inputs)
        down, bias = hf.projections(experts)[2][kept], candidate.down_bias
        output = F.linear(activation, down).float() + (0.0 if bias is None else bias)
        residual = (group.target - output * group.gates.unsqueeze(1)) * group.weight.unsqueeze(1)
        if candidate is own:
            least = judge.error(residual)
        rows = (activation.float() * (group.gates * group.weight).unsqueeze(1)).to(activation.dtype)
        change = fit_down({kept: Activations(torch.arange(len(rows)), rows)}, residual, judge).get(kept)
        if (error := judge.error(residual)) < least:
            least = error
            best = candidate if change is None else replace(candidate, down=candidate.down + change.delta.T)
    write_expert(experts, kept, own, dtype)
    return best


def in_few_shapes(run: Callable[..., torch.Tensor], experts: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    """`run(experts, expert, x)` for inputs [n, H], padded to a number of rows that the matrix library knows."""
    return run(experts, expert, padded(x))[: len(x)]


def read_expert(experts: nn.Module, expert: int) -> Expert:
    """The weights of an expert of a transformers 5 experts module of any layout, copied."""
    weights = [part[expert] for part in hf.projections(experts)]
    biases = [bias[expert] for bias in _biases(experts)]
    return Expert(*(part.detach().float().clone() for part in (*weights, *biases)))


def write_expert(experts: nn.Module, expert: int, weights: Expert, dtype: torch.dtype) -> None:
    """The inverse of `read_expert`, rounded to `dtype` and then to the module's own type."""
    targets = (*hf.projections(experts), *_biases(experts))
    for target, part in zip(targets, weights.parts(), strict=False):
        target[expert].copy_(part.to(dtype))


def _biases(experts: nn.Module) -> tuple[torch.Tensor, ...]:
    """(gate [E, I], up [E, I], down [E, H]): views of an experts module's biases; empty where it has none."""
    if not experts.has_bias:
        return ()
    fused = experts.gate_up_proj_bias
    gate, up = fused.chunk(2, dim=1) if experts.is_concatenated else (fused[:, ::2], fused[:, 1::2])
    return gate, up, experts.down_proj_bias
