"""The fit behind `--repair router`: Gauss-Newton on the kept rows of a router, the experts as they are.

With gates g_k and outputs f_k of a token's chosen experts, a change of the logits z_l of those experts changes the
layer's output by sum_l d_l dz_l, where d_l = sum_k (d g_k / d z_l) f_k; with a renormalised softmax, for one, that is
g_l (f_l - out). dz_l = x . dW_l is linear in the rows, so

    minimise over dW   sum_t w_t^2 | r(t) - sum_l d_l(t) (x_t . dW_l) |^2 + ridge d |dW|^2

is least squares over all rows at once, by conjugate gradients; r, w and the tokens held back are as in `repair`. Of a
token it needs d_l . d_m and d_l . r alone, K x K and K numbers. The slopes of the gates come from automatic
differentiation through the model's own block, so that any scoring will do; the choice of experts is taken as given,
which holds for a small change, and what a changed router truly does is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cprune import hf
from cprune.act.gauss_newton import Seen
from cprune.act.least_squares import Judge

RIDGE = 0.1  # in units of the mean diagonal of the normal equations over rows
ITERATIONS = 16
TOKENS = 2048  # at a time


class Rows:
    """The kept rows of a router in memory, and the entries of its bias, rounded as they will be written."""

    def __init__(self, layer: nn.Module, kept: Sequence[int], dtypes: Mapping[str, torch.dtype]) -> None:
        """dtypes: on disk, of the router's parameters with a row or an entry for every expert."""
        router = hf.find_router(layer)
        self._kept, self._dtypes = list(kept), dtypes
        self._slots = {name: getattr(router, name) for name in dtypes}
        self._own = {name: slot.to(torch.float32, copy=True) for name, slot in self._slots.items()}

    def put(self, step: torch.Tensor | None) -> None:
        """Let the rows be their own and `step`, [E, H] or with the bias [E, H + 1]; their own without it."""
        for name, rows in self._moved(step).items():
            slot = self._slots[name]
            slot[self._kept] = rows[self._kept].to(self._dtypes[name]).to(slot.dtype)

    def take(self, step: torch.Tensor) -> None:
        """Let their own be what `put` makes of `step`."""
        self.put(step)
        self._own = {name: slot.to(torch.float32, copy=True) for name, slot in self._slots.items()}

    def _moved(self, step: torch.Tensor | None) -> dict[str, torch.Tensor]:
        if step is None:
            return self._own
        width = self._own["weight"].shape[1]
        parts = {"weight": step[:, :width], "bias": step[:, width:].flatten()}
        return {name: own + parts[name] for name, own in self._own.items()}


@dataclass(frozen=True)
class Slopes:
    """How a layer's output follows the logits of the chosen experts, for T tokens."""

    inputs: torch.Tensor  # [T, H] of the router, and a 1 beside them where it has a bias: [T, H + 1]
    index: torch.Tensor  # [T, K] int64
    gram: torch.Tensor  # [T, K, K] float32: w^2 d_l . d_m
    right: torch.Tensor  # [T, K] float32: w d_l . r


def router_step(layer: nn.Module, seen: Seen, residual: torch.Tensor, judge: Judge) -> torch.Tensor:
    """What to add to the router's rows, [E, H] or with its bias [E, H + 1], float32; 0 for those that nobody chose.

    Args:
        layer: routes as the compact one.
        seen: what its experts were given, T tokens, those that are held back last.
        residual: [T, H] float32, weighted: what the layer lacks.
    """
    return _solve(_slopes(layer, seen, residual, judge), hf.find_experts(layer).num_experts, judge)


def _slopes(layer: nn.Module, seen: Seen, residual: torch.Tensor, judge: Judge) -> Slopes:
    columns = []
    for tokens in torch.arange(len(seen.hidden)).split(TOKENS):
        inputs, index, of_gates = gate_slopes(layer, seen.hidden[tokens])
        weight = judge.weight[tokens, None, None]
        outputs = _outputs(hf.find_experts(layer), seen.hidden[tokens], index) * weight
        steps = of_gates.transpose(1, 2) @ outputs  # [n, K, H]: w d_l
        columns.append((inputs, index, steps @ steps.transpose(1, 2), (steps @ residual[tokens, :, None]).squeeze(2)))
    return Slopes(*(torch.cat(column) for column in zip(*columns, strict=True)))


def _outputs(experts: nn.Module, hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """f of every chosen expert, [n, K, H] float32."""
    outputs = torch.zeros(*index.shape, hidden.shape[1])
    for expert in index.unique().tolist():
        tokens, slots = (index == expert).nonzero(as_tuple=True)
        rows = F.pad(tokens, (0, hf.padded_rows(len(tokens)) - len(tokens)))
        outputs[tokens, slots] = hf.expert_output(experts, expert, hidden[rows])[: len(tokens)].float()
    return outputs


def gate_slopes(layer: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a block's router is given [n, H], or with its bias [n, H + 1]; its choice [n, K]; the gates' slopes.

    slopes[t, k, l] = d g_k / d z_l of the logits z of the chosen experts, [n, K, K] float32.

    Args:
        hidden: [n, H] what the block is given.
    """
    block, router, experts = hf.find_block(layer), hf.find_router(layer), hf.find_experts(layer)
    taken: list[tuple[torch.Tensor, ...]] = []

    def take(given: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        taken.append((index, gates))
        return torch.zeros_like(given)

    forward = router.forward
    with torch.inference_mode(False), torch.enable_grad():
        logits = _Logits(experts.num_experts)

        def followed(*args: Any, **kwargs: Any) -> Any:
            with logits:
                return forward(*args, **kwargs)

        with hf.replaced_forward(router, followed), hf.replaced_forward(experts, take):
            block(hidden.clone().unsqueeze(0))
        index, gates = taken[0]
        totals = gates.sum(0)
        of_logits = [torch.autograd.grad(total, logits.leaf, retain_graph=True)[0] for total in totals]
    slopes = torch.stack([slope.gather(1, index.long()) for slope in of_logits], dim=1).float()
    return logits.inputs, index.long(), slopes


class _Logits(TorchFunctionMode):
    """Adds a leaf of zeros to the first projection to the experts, and keeps what that was given."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.leaf: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear or self.leaf is not None:
            return func(*args, **(kwargs or {}))
        with torch.no_grad():
            out = func(*args, **(kwargs or {}))
            if out.shape[-1] != self.num_experts:
                return out
            inputs = args[0].reshape(-1, args[0].shape[-1])
            biased = (len(args) > 2 and args[2] is not None) or (kwargs or {}).get("bias") is not None
            self.inputs = F.pad(inputs, (0, 1), value=1.0) if biased else inputs
        self.leaf = torch.zeros(out.shape, dtype=out.dtype, requires_grad=True)
        return out + self.leaf


def _solve(slopes: Slopes, num_experts: int, judge: Judge) -> torch.Tensor:
    """The step that held-back tokens like best of those on the way to the minimum."""
    width = slopes.inputs.shape[1]
    fits = (judge.counts & (torch.arange(len(slopes.index)) < judge.first)).float()
    held = judge.counts.float() - fits

    def scattered(values: torch.Tensor) -> torch.Tensor:
        """[E, H]: sum over fitted tokens of values [T, K] of their chosen experts, times the inputs."""
        total = torch.zeros(num_experts, width)
        for inputs, index, part in _parts(slopes.inputs, slopes.index, values * fits.unsqueeze(1)):
            total += torch.zeros(len(part), num_experts).scatter_add_(1, index, part).T @ inputs.float()
        return total

    def logits(rows: torch.Tensor) -> torch.Tensor:
        """[T, K]: the chosen experts' change of logits by a change of rows [E, H]."""
        parts = _parts(slopes.inputs, slopes.index)
        return torch.cat([(inputs.float() @ rows.T).gather(1, index) for inputs, index in parts])

    of_rows = torch.zeros(num_experts)
    for inputs, index, part, fit in _parts(slopes.inputs, slopes.index, slopes.gram.diagonal(dim1=1, dim2=2), fits):
        squares = inputs.float().square().mean(1) * fit
        of_rows.index_add_(0, index.flatten(), (part * squares.unsqueeze(1)).flatten())
    mean = float(of_rows[of_rows > 0].mean()) if bool((of_rows > 0).any()) else 0.0
    best = torch.zeros(num_experts, width)
    if not 0.0 < mean < float("inf"):
        return best
    ridge, step, moved = RIDGE * mean, best.clone(), torch.zeros(slopes.right.shape)
    left = scattered(slopes.right)
    scale = (of_rows + ridge).unsqueeze(1)
    direction = left / scale
    size, least = (left * direction).sum(), 0.0
    for _ in range(ITERATIONS):
        by_direction = logits(direction)
        onto = scattered((slopes.gram @ by_direction.unsqueeze(2)).squeeze(2)) + ridge * direction
        length = size / (direction * onto).sum()
        step, moved, left = step + length * direction, moved + length * by_direction, left - length * onto
        bent = (slopes.gram @ moved.unsqueeze(2)).squeeze(2)
        error = float(
            ((bent - 2.0 * slopes.right) * moved * held.unsqueeze(1)).double().sum()
        )  # beyond that of no step
        if not error < least:
            break
        best, least = step, error
        scaled = left / scale
        previous, size = size, (left * scaled).sum()
        direction = scaled + size / previous * direction
    return best


def _parts(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    yield from zip(*(tensor.split(TOKENS) for tensor in tensors), strict=True)
