"""Repair: refit the kept experts' down projections towards the original model, without back-propagation.

With routing, gates g and activations a_e(x) = act(gate_e x) * up_e x fixed, a layer's output is linear in its down
weights W_e, so what the dropped experts took away is given back by ridge least squares (`least_squares`). Over
calibration tokens t, with h the original's hidden states after the layer and h' those of the compact model (whose
earlier layers are repaired):

    minimise  sum_t w_t^2 | h(t) - h'(t) - sum_e g_e(t) D_e a_e(t) |^2 + sum_e ridge_e |D_e|^2,    W_e += D_e

The target is the original's residual stream and not its MoE output, so that a layer also corrects what earlier layers
lost: the asymmetric reconstruction of channel pruning (arXiv 1707.06168). w_t = min(1, median |h| / |h(t)|) keeps
tokens of massive norm, which the next normalisation undoes, from being all that counts.

Sequences held back from the fit choose the ridges, and whether the layer is touched at all.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from cprune import hf
from cprune.act.least_squares import Activations, Change, Judge, fit_down, padded
from cprune.act.sides import Sides, advance, held_back, run
from cprune.checkpoint import Checkpoint, MoELayer
from cprune.config import DEFAULT, NONE, PruneConfig
from cprune.errors import CpruneError
from cprune.memory import return_memory
from cprune.plan import PrunePlan
from cprune.repaired import LayerRepair, digest
from cprune.stream import Batch, StreamedModel, down_names, put_down

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
    done, sides = done or {}, Sides.start(checkpoint, input_ids, mask, config)
    model, original, compact = sides.model, sides.original, sides.compact
    for index in tqdm(range(len(model.layers)), desc="repair", unit="layer", disable=None):
        moe = model.moe_layer(index)
        with model.layer(index) as layer:
            expected = run(model, index, layer, original)
            advance(original, expected)
            return_memory()
            if moe is None:
                advance(compact, run(model, index, layer, compact))
                continue
            kept, dropped = plan[moe.name].kept, torch.tensor(plan[moe.name].dropped, dtype=torch.int64)
            walk = _Layer(model, index, layer, moe, kept, compact, expected, Judge(expected, sides.mask, sides.fitted))
            with hf.masked_router(layer, dropped):
                if moe.name in done:
                    walk.follow(done[moe.name])
                    continue
                repaired = walk.repair()
            del walk, expected
            return_memory()
            yield repaired


class _Layer:
    """One layer of the compact model: its batches, run as it stands, and what its down projections were given."""

    def __init__(
        self,
        model: StreamedModel,
        index: int,
        layer: nn.Module,
        moe: MoELayer,
        kept: Sequence[int],
        batches: list[Batch],
        expected: torch.Tensor,
        judge: Judge,
    ) -> None:
        self.model, self.index, self.layer, self.moe, self.kept = model, index, layer, moe, kept
        self.batches, self.expected, self.judge = batches, expected, judge
        self.experts = hf.find_experts(layer)

    def follow(self, file: Path | None) -> None:
        """Pass the batches through the layer with the tensors of an earlier repair, None where it changed nothing."""
        plain, pairs = self._observe()
        if file is not None:
            tensors = load_file(file)
            plain = self._moved(plain, pairs, [tensors[name] for name in output_names(self.moe, self.kept)])
        advance(self.batches, plain)

    def repair(self) -> tuple[LayerRepair, dict[str, torch.Tensor]]:
        """Fit, judge, and pass the batches through the layer as it is from now on."""
        plain, pairs = self._observe()
        residual = self.judge.residual(self.expected, plain)
        before = self.judge.error(residual)
        changes = fit_down(pairs, residual, self.judge)
        fitted = self.judge.error(residual)
        del residual
        if changes and fitted <= (1.0 - MARGIN) * before:
            ridge = statistics.median(change.ridge for change in changes.values())
            tensors = _as_on_disk(self.model.checkpoint, self.moe, self.kept, changes, transposed=self._transposed)
            moved = self._moved(plain, pairs, list(tensors.values()))
            pairs.clear()
            put_down(self.layer, self.kept, list(tensors.values()))
            after = self.judge.error(self._held_residual())
            if after <= (1.0 - MARGIN) * before:
                advance(self.batches, moved)
                relative = self.judge.relative(before), self.judge.relative(after)
                return LayerRepair(self.moe.name, ridge, *relative, digest(tensors.values())), tensors
        advance(self.batches, plain)
        relative = self.judge.relative(before)
        return LayerRepair(self.moe.name, None, relative, relative, ""), {}

    @property
    def _transposed(self) -> bool:
        return self.experts.is_transposed

    def _observe(self) -> tuple[torch.Tensor, dict[int, Activations]]:
        """Hidden states [T, H] after the layer as it stands, and the kept experts' activations."""
        recorder = Recorder(self.judge.weight, self.kept)
        self.experts.cprune_observer = recorder
        try:
            plain = run(self.model, self.index, self.layer, self.batches)
        finally:
            del self.experts.cprune_observer
        taken = recorder.take()
        return_memory()
        return plain, taken

    def _held_residual(self) -> torch.Tensor:
        """Residual [*, H] of the held-back tokens, by the layer itself."""
        got = run(self.model, self.index, self.layer, held_back(self.batches, self.judge))
        return self.judge.residual(self.expected[len(self.expected) - len(got) :], got)

    def _moved(
        self, plain: torch.Tensor, pairs: Mapping[int, Activations], tensors: list[torch.Tensor]
    ) -> torch.Tensor:
        """`plain` [T, H] as it is with other down projections (`put_down`), in which what the layer gives is linear.

        A pass through the layer would differ by the rounding of its own sums; attention and routing are spared here.
        """
        rows = tensors[0] if tensors[0].ndim == self.experts.down_proj.ndim else tensors
        residual = self.judge.residual(self.expected, plain)
        for place, expert in enumerate(self.kept):
            if expert in pairs:
                down = self.experts.down_proj[expert]
                delta = rows[place].to(down.dtype).float() - down.float()
                step = (delta if self._transposed else delta.T).to(pairs[expert].rows.dtype)
                tokens, rows_in = pairs[expert].tokens, padded(pairs[expert].rows)
                residual.index_add_(0, tokens, (rows_in @ step)[: len(tokens)].float(), alpha=-1)
        return residual.div_(self.judge.weight.unsqueeze(1)).neg_().add_(self.expected).to(plain.dtype)


def output_names(moe: MoELayer, kept: Sequence[int]) -> list[str]:
    """Names in the output of the kept experts' down weights: one per expert, or of one over all of them."""
    if moe.fused:
        return down_names(moe)
    return [f"{moe.name}.experts.{place}.{moe.projections[-1]}" for place in range(len(kept))]


def _as_on_disk(
    checkpoint: Checkpoint,
    moe: MoELayer,
    kept: Sequence[int],
    changes: dict[int, Change],
    *,
    transposed: bool,
) -> dict[str, torch.Tensor]:
    """The kept experts' down weights plus `changes`, which are used up, as the output has them on disk, by name."""
    names = down_names(moe)
    if moe.fused:
        rows = whole = checkpoint.read(names[0])[list(kept)]
    else:
        rows = [checkpoint.read(names[expert]) for expert in kept]
    for place, expert in enumerate(kept):
        if expert in changes:
            change = changes.pop(expert).delta
            delta = change if moe.fused and transposed else change.T
            rows[place] = (rows[place].float() + delta).to(rows[place].dtype)
    return dict(zip(output_names(moe, kept), [whole] if moe.fused else rows, strict=True))
