"""Repair: refit the kept experts' projections towards the original model, without back-propagation.

With routing and gates g as they are, what the dropped experts took away is asked of the kept ones. Over calibration
tokens t, with h the original's hidden states after a layer and h' those of the compact model (whose earlier layers are
repaired), the change f_e -> f_e + d f_e of the kept experts is to

    minimise  sum_t w_t^2 | h(t) - h'(t) - sum_e g_e(t) d f_e(x(t)) |^2

by Gauss-Newton on gate, up and down projections, or on the down projections alone, in which it is linear
(`gauss_newton`). The target is the original's residual stream and not its MoE output, so that a layer also corrects
what earlier layers lost: the asymmetric reconstruction of channel pruning (arXiv 1707.06168). w_t = min(1, median |h| /
|h(t)|) keeps tokens of massive norm, which the next normalisation undoes, from being all that counts.

Sequences held back from the fit say how far it goes, and whether the layer is touched at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from cprune import hf
from cprune.act.gauss_newton import DOWN_RIDGE, RIDGE, Seen, refit
from cprune.act.least_squares import Judge
from cprune.act.sides import Sides, advance, run
from cprune.act.tangent import Experts
from cprune.checkpoint import Checkpoint, MoELayer
from cprune.checkpoint.reader import DTYPES
from cprune.config import DEFAULT, NONE, PruneConfig
from cprune.errors import CpruneError
from cprune.memory import return_memory
from cprune.merged import changed_names, of_one_expert, slots
from cprune.plan import LayerPlan, PrunePlan
from cprune.repaired import LayerRepair, Passed, digest
from cprune.stream import Batch, StreamedModel, down_names
from cprune_kernels.fused_moe import MoEObservation

PROJECTIONS = 3  # of an expert: gate, up and down
MARGIN = 0.01  # a layer is changed only where the squared error on held-back tokens falls by this share
FLOATING = ("BF16", "F16", "F32")


def why_not(checkpoint: Checkpoint, config: PruneConfig, plan: PrunePlan | None = None) -> str | None:
    """Why a run with this configuration repairs nothing, as the end of a sentence; None where it repairs.

    With a plan made earlier, `auto` repairs on text that is named, or on the default text where the plan is of that
    too. Raises CpruneError where a repair is asked for by name and cannot be.
    """
    if config.repair == NONE:
        return "--repair none"
    reason = "--calibration none" if config.calibration == NONE else _not_floating(checkpoint)
    if config.repair in ("experts", "down"):
        if reason is not None:
            raise CpruneError(
                f"--repair {config.repair} needs calibration text and floating-point weights, got {reason}"
            )
    elif plan is not None and config.calibration == DEFAULT != plan.config.get("calibration", NONE):
        reason = f"a plan measured on {plan.config.get('calibration', NONE)} and no --calibration"
    return reason


def _not_floating(checkpoint: Checkpoint) -> str | None:
    if checkpoint.architecture.quantized is not None:
        return f"quantization {checkpoint.architecture.quantized!r}"
    for moe in checkpoint.moe_layers:
        for name in moe.expert_tensors():
            if checkpoint.tensors[name].dtype not in FLOATING:
                return f"{checkpoint.tensors[name].dtype} in {name}"
    return None


@torch.inference_mode()
def repair_experts(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    config: PruneConfig,
    passed: Passed | None = None,
) -> Iterator[tuple[LayerRepair, dict[str, torch.Tensor], Passed]]:
    """Walk the original and the compact model side by side and yield every trunk MoE layer's repair, in order of depth.

    The compact layer is the original's with the dropped experts masked out of its router, so one decoder layer is in
    memory at a time, with the hidden states of both models and one residual [T, H] float32.

    Args:
        input_ids: [N, S] int64 sequences, at least two.
        mask: [N, S] bool, False on padding.
        config: compute type of the models (the fit is in float32 and float64), tokens at a time, first positions.
        passed: where an earlier walk with the same arguments stopped; only the layers after that are yielded.
    Yields the record, the kept experts' weights under their names and in their data type in the output, none where the
    layer stays as it is, and where the walk is.
    Raises CpruneError where the weights are quantised or there is only one sequence.
    """
    if len(input_ids) < 2:
        raise CpruneError(f"repair needs two calibration sequences, one to judge by, got {len(input_ids)}")
    sides = Sides.start(checkpoint, input_ids, mask, config, passed)
    model, original, compact = sides.model, sides.original, sides.compact
    for index in sides.layers("repair"):
        moe = model.moe_layer(index)
        with model.layer(index) as layer:
            expected = run(model, index, layer, original)
            advance(original, expected)
            return_memory()
            if moe is None:
                advance(compact, run(model, index, layer, compact))
                continue
            dropped, judge = (
                torch.tensor(plan[moe.name].dropped, dtype=torch.int64),
                Judge(expected, sides.mask, sides.fitted),
            )
            walk = _Layer(model, index, layer, moe, plan[moe.name], compact, expected, judge)
            with hf.masked_router(layer, dropped):
                record, tensors = walk.repair(config.repair)
            del walk, expected
            return_memory()
            yield record, tensors, sides.passed(moe.name)


class _Layer:
    """One layer of the compact model: its batches, run as it stands, and what its experts were given."""

    def __init__(
        self,
        model: StreamedModel,
        index: int,
        layer: nn.Module,
        moe: MoELayer,
        plan: LayerPlan,
        batches: list[Batch],
        expected: torch.Tensor,
        judge: Judge,
    ) -> None:
        self.model, self.index, self.layer, self.moe, self.plan = model, index, layer, moe, plan
        self.batches, self.expected, self.judge = batches, expected, judge
        self.module = hf.find_experts(layer)

    def repair(self, projections: str) -> tuple[LayerRepair, dict[str, torch.Tensor]]:
        """Pass the batches through the layer, fit, judge, and add what it has changed to their hidden states.

        Args:
            projections: experts (all three), down, or auto: all three where an expert meets as many tokens, on average,
                as it has weights for each of the H numbers that a token comes with, so that they are determined.
        """
        plain, seen = self._observe()
        advance(self.batches, plain)
        met = int(self.judge.counts[: self.judge.first].sum()) * seen.index.shape[1] / len(self.plan.kept)
        determined = met >= PROJECTIONS * hf.projections(self.module)[0].shape[1]
        whole = projections == "experts" or (projections != "down" and determined)
        residual = self.judge.residual(self.expected, plain)
        del plain
        before = self.judge.error(residual)
        experts = Experts(self.module, DTYPES[self.model.checkpoint.tensors[down_names(self.moe)[0]].dtype])
        changed = refit(experts, self.plan.kept, seen, residual, self.judge, whole=whole)
        after = self.judge.error(residual)
        del seen
        errors = {"before": self.judge.relative(before), "after": self.judge.relative(after)}
        if not changed or after > (1.0 - MARGIN) * before:
            return LayerRepair(self.moe.name, None, errors["before"], errors["before"], ""), {}
        advance(self.batches, self.judge.hidden(self.expected, residual))
        record = LayerRepair(self.moe.name, RIDGE if whole else DOWN_RIDGE, **errors, digest="", whole=whole)
        tensors = self._written(changed_names(self.moe, self.plan, record))
        return replace(record, digest=digest(tensors.values())), tensors

    def _observe(self) -> tuple[torch.Tensor, Seen]:
        """Hidden states [T, H] after the layer as it stands, and what its experts were given."""
        observer = self.module.cprune_observer = _Inputs()
        try:
            plain = run(self.model, self.index, self.layer, self.batches)
        finally:
            del self.module.cprune_observer
        return plain, observer.take()

    def _written(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tensors of the output as they are on disk in the original, plus what their slots in memory have changed by.

        So a weight of more digits than the model computes with keeps them.
        """
        written = {}
        for name in names:
            source, memory = self._source(name), slots(self.layer, self.moe, self.plan, name)
            for row, slot in zip([source] if of_one_expert(self.moe, name) else source, memory, strict=True):
                row.copy_((row.float() + (slot.float() - row.to(slot.dtype).float())).to(row.dtype))
            written[name] = source
        return written

    def _source(self, name: str) -> torch.Tensor:
        """The original's tensor, of the kept experts, for a tensor of the output."""
        checkpoint = self.model.checkpoint
        if not of_one_expert(self.moe, name):
            return checkpoint.read(name)[list(self.plan.kept)]
        place, suffix = name.removeprefix(f"{self.moe.name}.experts.").split(".", 1)
        return checkpoint.read(self.moe.experts[self.plan.kept[int(place)]][suffix])


class _Inputs:
    """Notes what the experts of a layer are given (an `hf.Observer`)."""

    def __init__(self) -> None:
        self._pieces: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def on_input(self, hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> None:
        """The next batch begins."""
        self._pieces.append((hidden, index.to(torch.int16), gates))

    def on_expert(self, expert: int, tokens: torch.Tensor, slots: torch.Tensor, output: torch.Tensor) -> None:
        """Outputs follow from the inputs."""

    def on_experts(self, seen: MoEObservation) -> None:
        """Outputs follow from the inputs."""

    def take(self) -> Seen:
        """All batches as one."""
        return Seen(*(torch.cat(column) for column in zip(*self._pieces, strict=True)))
