"""Repair: refit the kept experts' down projections towards the original model, without back-propagation.

With routing, gates g and activations a_e(x) = act(gate_e x) * up_e x fixed, a layer's output is linear in its down
weights W_e, so what the dropped experts took away is given back by ridge least squares. Over calibration tokens t, with
h the original's hidden states after the layer and h' those of the compact model (whose earlier layers are repaired):

    minimise  sum_t w_t^2 | h(t) - h'(t) - sum_e g_e(t) D_e a_e(t) |^2 + ridge d sum_e |D_e|^2,    W_e += D_e

d is the mean diagonal of the experts' Gram matrices sum_t w^2 g^2 a a^T. The target is the original's residual stream
and not its MoE output, so that a layer also corrects what earlier layers lost: the asymmetric reconstruction of channel
pruning (arXiv 1707.06168). w_t = min(1, median |h| / |h(t)|) keeps tokens of massive norm, which the next normalisation
undoes, from being all that counts.

Solved by block coordinates, one expert's Cholesky factor at a time, from strong ridges to weak ones, each starting
where the last one ended. Sequences held back from the fit choose the ridge, and whether the layer is touched at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from cprune import hf
from cprune.checkpoint import Checkpoint, MoELayer
from cprune.config import DEFAULT, NONE, PruneConfig
from cprune.errors import CpruneError
from cprune.plan import PrunePlan
from cprune.repaired import LayerRepair, digest
from cprune.stream import Batch, StreamedModel, down_names, embed_all, put_down, resolve_dtype

RIDGES = (3.0, 1.0, 0.3, 0.1)  # in units of d, one sweep over the experts each
HELD_BACK = 8  # every so many sequences, one is not fitted but judges
MARGIN = 0.01  # a layer is changed only where the squared error on held-back tokens falls by this share
FLOATING = ("BF16", "F16", "F32")


def why_not(checkpoint: Checkpoint, config: PruneConfig, plan: PrunePlan | None = None) -> str | None:
    """Why a run with this configuration repairs nothing, as the end of a sentence; None where it repairs.

    With a plan made earlier, `auto` repairs on text that is named, or on the default text where the plan is of that
    too. Raises CpruneError where `down` is asked for and cannot be.
    """
    if config.repair == NONE:
        return "--repair none"
    reason = "--calibration none" if config.calibration == NONE else _not_floating(checkpoint)
    if config.repair == "down":
        if reason is not None:
            raise CpruneError(f"--repair down needs calibration text and floating-point weights, got {reason}")
    elif plan is not None and config.calibration == DEFAULT != plan.config.get("calibration", NONE):
        reason = f"a plan measured on {plan.config.get('calibration', NONE)} and no --calibration"
    return reason


def _not_floating(checkpoint: Checkpoint) -> str | None:
    if checkpoint.architecture.quantized is not None:
        return f"quantization {checkpoint.architecture.quantized!r}"
    for moe in checkpoint.moe_layers:
        for name in down_names(moe):
            if checkpoint.tensors[name].dtype not in FLOATING:
                return f"{checkpoint.tensors[name].dtype} in {name}"
    return None


class Inputs:
    """Notes what the experts of a layer are given (an `hf.Observer`)."""

    def __init__(self) -> None:
        self.hidden: list[torch.Tensor] = []  # [*, H] each
        self.index: list[torch.Tensor] = []  # [*, K] int64 each
        self.gates: list[torch.Tensor] = []  # [*, K] each

    def on_input(self, hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> None:
        self.hidden.append(hidden)
        self.index.append(index)
        self.gates.append(gates)

    def on_expert(self, expert: int, tokens: torch.Tensor, slots: torch.Tensor, output: torch.Tensor) -> None:
        """Outputs are of no use here."""

    def on_experts(self, seen: object) -> None:
        """Outputs are of no use here."""


class Judge:
    """Which tokens fit and which judge, and the weight of each."""

    def __init__(self, expected: torch.Tensor, mask: torch.Tensor) -> None:
        """
        Args:
            expected: [T, H] hidden states of the original after the layer.
            mask: [N, S] bool with N S = T, the tokens that count.
        """
        held = (torch.arange(len(mask)) % HELD_BACK == min(HELD_BACK, len(mask)) - 1).unsqueeze(1)
        self.counts = mask.flatten()
        self.held = (mask & held).flatten()
        norms = torch.linalg.vector_norm(expected, dim=1, dtype=torch.float32)
        median = norms[self.counts].median()
        self.weight = torch.where(norms > median, median / norms, 1.0)  # [T]
        self.scale = float((norms * self.weight)[self.held].double().square().sum())

    def residual(self, expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
        """Weighted difference [T, H] float32 of hidden states."""
        return (expected.float() - got.float()).mul_(self.weight.unsqueeze(1))

    def error(self, residual: torch.Tensor) -> float:
        """Squared error on the held-back tokens."""
        return float(torch.linalg.vector_norm(residual[self.held], dim=1).double().square().sum())

    def relative(self, error: float) -> float:
        """A squared error as a share of the hidden states' norm."""
        return (error / max(self.scale, 1e-300)) ** 0.5


@torch.inference_mode()
def repair_down(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    config: PruneConfig,
    done: Mapping[str, Path | None] | None = None,
) -> Iterator[tuple[LayerRepair, dict[str, torch.Tensor]]]:
    """Walk the original and the compact model side by side and yield every trunk MoE layer's repair, in order of depth.

    The compact layer is the original's with the dropped experts masked out of its router, so one decoder layer is in
    memory at a time, with the hidden states of both models and one residual [T, H] float32.

    Args:
        input_ids: [N, S] int64 sequences, at least two.
        mask: [N, S] bool, False on padding.
        config: compute type of the models (the fit is in float32 and float64), tokens at a time, first positions.
        done: layers repaired earlier, {name: file of their tensors, None where unchanged}; they are not yielded again.
    Yields the record and the new down weights under their names and in their data type in the output, none where the
    layer stays as it is.
    Raises CpruneError where the weights are quantised or there is only one sequence.
    """
    if len(input_ids) < 2:
        raise CpruneError(f"repair needs two calibration sequences, one to judge by, got {len(input_ids)}")
    done = done or {}
    mask = mask.clone()
    if config.skip_first:
        mask[:, 0] = False
    model = StreamedModel(checkpoint, dtype=resolve_dtype(config.dtype, checkpoint))
    original = embed_all(model, input_ids, config.batch_tokens)
    compact = [Batch(batch.input_ids, batch.hidden, batch.arguments) for batch in original]
    for index in tqdm(range(len(model.layers)), desc="repair", unit="layer", disable=None):
        moe = model.moe_layer(index)
        with model.layer(index) as layer:
            for batch in original:
                batch.hidden = model.run_layer(index, layer, batch)
            if moe is None:
                _advance(compact, _run(model, index, layer, compact))
                continue
            kept, dropped = plan[moe.name].kept, torch.tensor(plan[moe.name].dropped, dtype=torch.int64)
            with hf.masked_router(layer, dropped):
                if moe.name in done:
                    if (file := done[moe.name]) is not None:
                        tensors = load_file(file)
                        put_down(layer, kept, [tensors[name] for name in output_names(moe, kept)])
                    _advance(compact, _run(model, index, layer, compact))
                    continue
                repaired = _repair_layer(model, index, layer, moe, kept, original, compact, mask)
            yield repaired


def _repair_layer(
    model: StreamedModel,
    index: int,
    layer: nn.Module,
    moe: MoELayer,
    kept: Sequence[int],
    original: list[Batch],
    compact: list[Batch],
    mask: torch.Tensor,
) -> tuple[LayerRepair, dict[str, torch.Tensor]]:
    """Repair one layer and pass the compact batches through it."""
    experts, inputs = hf.find_experts(layer), Inputs()
    experts.cprune_observer = inputs
    try:
        plain = _run(model, index, layer, compact)
    finally:
        del experts.cprune_observer
    expected = _joined(batch.hidden for batch in original)
    judge = Judge(expected, mask)
    residual = judge.residual(expected, _joined(plain))
    before = judge.error(residual)
    x, routing, gates = (torch.cat(part) for part in (inputs.hidden, inputs.index, inputs.gates))
    inputs = Inputs()
    ridge, change = fit_down(experts, kept, x, routing, gates, residual, judge)
    del x, residual
    if ridge is not None:
        tensors = _as_on_disk(model.checkpoint, moe, kept, change, transposed=experts.is_transposed)
        untouched = experts.down_proj[list(kept)]
        put_down(layer, kept, list(tensors.values()))
        better = _run(model, index, layer, compact)
        after = judge.error(judge.residual(expected, _joined(better)))
        if after <= (1.0 - MARGIN) * before:
            _advance(compact, better)
            relative = judge.relative(before), judge.relative(after)
            return LayerRepair(moe.name, ridge, *relative, digest(tensors.values())), tensors
        experts.down_proj[list(kept)] = untouched
    _advance(compact, plain)
    return LayerRepair(moe.name, None, judge.relative(before), judge.relative(before), ""), {}


def fit_down(
    experts: nn.Module,
    kept: Sequence[int],
    x: torch.Tensor,
    index: torch.Tensor,
    gates: torch.Tensor,
    residual: torch.Tensor,
    judge: Judge,
) -> tuple[float | None, dict[int, torch.Tensor]]:
    """The ridge that serves held-back tokens best, and what to add to the down weights, {expert: [I, H] float32}.

    Args:
        experts: module of transformers' experts contract, any layout.
        x: [T, H] what the experts were given.
        index, gates: [T, K] int64 and floating: the routing.
        residual: [T, H] float32, weighted; overwritten.
    Returns (None, {}) where no ridge lowers the error on held-back tokens by more than `MARGIN`.
    """
    pairs = {e: pair for e in kept if len((pair := _pairs(index, e, judge))[0])}

    def activations(expert: int) -> torch.Tensor:
        tokens, slots = pairs[expert]
        rows = F.pad(tokens, (0, hf.padded_rows(len(tokens)) - len(tokens)))
        scale = gates[tokens, slots].float() * judge.weight[tokens]
        return hf.expert_activation(experts, expert, x[rows])[: len(tokens)].float() * scale.unsqueeze(1)

    fitted = {e: ~judge.held[tokens] for e, (tokens, _) in pairs.items()}
    diagonal = [float(activations(e)[fitted[e]].double().square().sum()) for e in pairs if bool(fitted[e].any())]
    mean = sum(diagonal) / (len(diagonal) * hf.projections(experts)[2].shape[2]) if diagonal else 0.0
    if not 0.0 < mean < float("inf"):
        return None, {}
    before = least = judge.error(residual)
    best: float | None = None
    chosen: dict[int, torch.Tensor] = {}
    change: dict[int, torch.Tensor] = {}  # {expert: [I, H] float32}
    for ridge in RIDGES:
        for expert, (tokens, _) in pairs.items():
            p, fit = activations(expert), fitted[expert]
            step = _solve(p[fit], residual[tokens[fit]], change.get(expert), ridge * mean)
            if step is not None:
                residual.index_add_(0, tokens, p @ step, alpha=-1)
                change[expert] = change[expert] + step if expert in change else step
        error = judge.error(residual)
        if not error < least:
            break
        least, best = error, ridge
        chosen = dict(change)
    return (best, chosen) if least <= (1.0 - MARGIN) * before else (None, {})


def _solve(p: torch.Tensor, residual: torch.Tensor, change: torch.Tensor | None, ridge: float) -> torch.Tensor | None:
    """argmin_D |residual - p D|^2 + ridge |change + D|^2, [I, H] float32; None without tokens or where singular."""
    if not len(p):
        return None
    gram = (p.T @ p).double()
    gram.diagonal().add_(ridge)
    right = (p.T @ residual).double()
    if change is not None:
        right.sub_(change.double(), alpha=ridge)
    factor, singular = torch.linalg.cholesky_ex(gram)
    return None if int(singular) else torch.cholesky_solve(right, factor).float()


def _pairs(index: torch.Tensor, expert: int, judge: Judge) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens [n], slots [n]) int64 that chose `expert` and count, tokens ascending."""
    tokens, slots = (index == expert).nonzero(as_tuple=True)
    counts = judge.counts[tokens]
    return tokens[counts], slots[counts]


def output_names(moe: MoELayer, kept: Sequence[int]) -> list[str]:
    """Names in the output of the kept experts' down weights: one per expert, or of one over all of them."""
    if moe.fused:
        return down_names(moe)
    return [f"{moe.name}.experts.{place}.{moe.projections[-1]}" for place in range(len(kept))]


def _as_on_disk(
    checkpoint: Checkpoint,
    moe: MoELayer,
    kept: Sequence[int],
    change: Mapping[int, torch.Tensor],
    *,
    transposed: bool,
) -> dict[str, torch.Tensor]:
    """The kept experts' down weights plus `change`, under their names and in their data type and layout on disk."""
    names = down_names(moe)
    if moe.fused:
        rows = whole = checkpoint.read(names[0])[list(kept)]
    else:
        rows = [checkpoint.read(names[expert]) for expert in kept]
    for place, expert in enumerate(kept):
        if expert in change:
            delta = change[expert] if moe.fused and transposed else change[expert].T
            rows[place] = (rows[place].float() + delta.cpu()).to(rows[place].dtype)
    return dict(zip(output_names(moe, kept), [whole] if moe.fused else rows, strict=True))


def _run(model: StreamedModel, index: int, layer: nn.Module, batches: list[Batch]) -> list[torch.Tensor]:
    return [model.run_layer(index, layer, batch) for batch in batches]


def _advance(batches: list[Batch], hidden: list[torch.Tensor]) -> None:
    for batch, after in zip(batches, hidden, strict=True):
        batch.hidden = after


def _joined(hidden: Iterator[torch.Tensor] | list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten(0, 1) for part in hidden])
