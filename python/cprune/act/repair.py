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

`--repair router` changes the router's rows instead (`router_fit`), and with `--router map` dropped experts may keep
theirs, for which novices answer (`novices`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from cprune import hf
from cprune.act.gauss_newton import DOWN_RIDGE, RIDGE, Seen, refit
from cprune.act.least_squares import Judge
from cprune.act.novices import TOKENS, fit_novices
from cprune.act.router_fit import Rows, router_step
from cprune.act.sides import Sides, advance, held_back, run
from cprune.act.tangent import Experts
from cprune.checkpoint import Checkpoint, MoELayer
from cprune.checkpoint.reader import DTYPES
from cprune.config import DEFAULT, NONE, PruneConfig
from cprune.errors import CpruneError
from cprune.memory import return_memory
from cprune.merged import changed_names, compact_routing, gates_of, novices_name, of_one_expert, router_rows, slots
from cprune.plan import LayerPlan, PrunePlan
from cprune.repaired import MAP, NOVICES, REFITTED, LayerRepair, Passed, digest
from cprune.stream import Batch, StreamedModel, down_names

PROJECTIONS = 3  # of an expert: gate, up and down
ROUTER_STEPS = 3  # of Gauss-Newton, each from where the one before it led
LENGTHS = (1.0, 0.5, 0.25)  # of a step: the slopes hold for small changes, and not across a change of choice
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
    if config.repair in ("experts", "down", "router"):
        if reason is not None:
            raise CpruneError(
                f"--repair {config.repair} needs calibration text and floating-point weights, got {reason}"
            )
    elif plan is not None and config.calibration == DEFAULT != plan.config.get("calibration", NONE):
        reason = f"a plan measured on {plan.config.get('calibration', NONE)} and no --calibration"
    return reason


def check_novices(checkpoint: Checkpoint, config: PruneConfig) -> None:
    """Raise CpruneError, before any work, where novices are asked for and the weights cannot be run."""
    reason = _not_floating(checkpoint) if config.router == MAP else None
    if reason is not None:
        raise CpruneError(f"--router map needs floating-point weights, got {reason}")


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
    Yields the record, the changed tensors under their names and in their data type in the output, none where the layer
    stays as it is, and where the walk is.
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
            if moe is None:
                advance(compact, run(model, index, layer, compact))
                continue
            judge = Judge(expected, sides.mask, sides.fitted)
            walk = _Layer(model, index, layer, moe, plan[moe.name], compact, expected, judge)
            record, tensors = walk.repair(config.repair, novices=config.router == MAP)
            del walk, expected
            return_memory()
            yield record, tensors, sides.passed(moe.name)


@dataclass(frozen=True)
class _Outcome:
    """What a layer may become."""

    error: float  # squared, on the held-back tokens
    record: LayerRepair  # without its digest
    tensors: dict[str, torch.Tensor]  # all that is other than in the pruned layer, by their names in the output
    hidden: list[torch.Tensor]  # of the batches, after the layer


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
        self.dtype = DTYPES[model.checkpoint.tensors[down_names(moe)[0]].dtype]  # of the experts on disk

    def repair(self, projections: str, *, novices: bool) -> tuple[LayerRepair, dict[str, torch.Tensor]]:
        """Pass the batches through the layer, fit, judge, and add what it has changed to their hidden states.

        Args:
            projections: experts (all three), down, none, router (its rows instead), or auto: all three where an expert
                meets as many tokens, on average, as it has weights for each of the H numbers that a token comes with,
                so that they are determined.
            novices: whether the router may keep the rows of dropped experts. Refitting helps one routing more than the
                other, so the layer is fitted both ways.
        """
        both = novices and bool(self.plan.dropped)
        inputs = [batch.hidden for batch in self.batches] if both else []
        best = self._with_router() if projections == "router" else self._fitted(projections, novices=False)
        if both:
            for batch, hidden in zip(self.batches, inputs, strict=True):
                batch.hidden = hidden
            self.model.fill_experts(self.moe, self.layer)
            other = self._fitted(projections, novices=True)
            if other.error <= (1.0 - MARGIN) * best.error:
                best = replace(other, record=replace(other.record, before=best.record.before))
            for batch, hidden in zip(self.batches, best.hidden, strict=True):
                batch.hidden = hidden
        tensors = best.tensors
        return replace(best.record, digest=digest(tensors.values()) if tensors else ""), tensors

    def _fitted(self, projections: str, *, novices: bool) -> _Outcome:
        """Fit with either routing, from the layer and the batches as they are, which are advanced."""
        record = LayerRepair(self.moe.name, None, 0.0, 0.0, "")
        tensors: dict[str, torch.Tensor] = {}
        if novices:
            plain, seen, tensors[novices_name(self.moe)] = self._with_novices()
            record = replace(record, router=NOVICES, mapped=self.plan.dropped)
        else:
            plain, seen = self._observe()
        advance(self.batches, plain)
        residual = self.judge.residual(self.expected, plain)
        del plain
        before = after = self.judge.error(residual)
        if projections != NONE:
            whole = projections == "experts" or (projections != "down" and self._determines(seen))
            experts = Experts(self.module, self.dtype)
            changed = refit(experts, self.plan.kept, seen, residual, self.judge, whole=whole)
            return_memory()
            error = self.judge.error(residual)
            if changed and error <= (1.0 - MARGIN) * before:
                after = error
                advance(self.batches, self.judge.hidden(self.expected, residual))
                record = replace(record, ridge=RIDGE if whole else DOWN_RIDGE, whole=whole)
        names = changed_names(self.moe, self.plan, record)
        tensors |= self._written([name for name in names if name not in tensors])
        record = replace(record, before=self.judge.relative(before), after=self.judge.relative(after))
        hidden = [batch.hidden for batch in self.batches]
        return _Outcome(after, record, {name: tensors[name] for name in names}, hidden)

    def _with_router(self) -> _Outcome:
        """Fit the kept rows of the router, step by step as far as held-back tokens like it, and advance the batches."""
        held, steps = held_back(self.batches, self.judge), 0
        tensors = self.model.checkpoint.tensors
        on_disk = {parameter: DTYPES[tensors[name].dtype] for parameter, name in router_rows(self.moe).items()}
        rows = Rows(self.layer, self.plan.kept, on_disk)
        plain, seen = self._observe()
        residual = self.judge.residual(self.expected, plain)
        before = error = self.judge.error(residual)
        while steps < ROUTER_STEPS:
            with compact_routing(self.layer, self.plan):
                step, errors = router_step(self.layer, seen, residual, self.judge), {}
                for length in LENGTHS:
                    rows.put(step * length)
                    got = run(self.model, self.index, self.layer, held)
                    errors[length] = self.judge.error(self.judge.residual(self.expected[-len(got) :], got))
            best = min(errors, key=errors.__getitem__)
            if errors[best] > (1.0 - MARGIN) * error:
                break
            rows.take(step * best)
            steps += 1
            plain, seen = self._observe()
            residual = self.judge.residual(self.expected, plain)
            error = self.judge.error(residual)
        rows.put(None)
        advance(self.batches, plain)
        router, (first, last) = REFITTED if steps else "", map(self.judge.relative, (before, error))
        record = LayerRepair(self.moe.name, None, first, last, "", router=router)
        written = self._written(changed_names(self.moe, self.plan, record))
        return _Outcome(error, record, written, [batch.hidden for batch in self.batches])

    def _determines(self, seen: Seen) -> bool:
        """Whether the text determines all three projections."""
        met = int(self.judge.counts[: self.judge.first].sum()) * seen.index.shape[1] / len(self.plan.kept)
        return met >= PROJECTIONS * hf.projections(self.module)[0].shape[1]

    def _with_novices(self) -> tuple[torch.Tensor, Seen, torch.Tensor]:
        """As `_observe`, with the original's routing and novices, and these [D, H]."""
        dropped, num = self.plan.dropped, self.plan.num_experts
        nothing = torch.zeros(len(dropped), self.expected.shape[1], dtype=self.expected.dtype)
        plain, seen = self._observe(nothing)
        residual = self.judge.residual(self.expected, plain)
        novices = fit_novices(dropped, num, seen, residual, self.judge, self.dtype)[0]
        for tokens in torch.arange(len(plain)).split(TOKENS):
            gates = gates_of(dropped, seen.index[tokens], seen.gates[tokens], num)
            plain[tokens] += gates.to(plain.dtype) @ novices.to(plain.dtype)
        return plain, seen, novices

    def _observe(self, novices: torch.Tensor | None = None) -> tuple[torch.Tensor, Seen]:
        """Hidden states [T, H] after the layer as it stands, and what its experts were given."""
        noted: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

        def note(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            hidden, index, gates = args
            noted.append((hidden, index.to(torch.int16), gates))

        handle = self.module.register_forward_pre_hook(note)
        mapped = () if novices is None else self.plan.dropped
        try:
            with compact_routing(self.layer, self.plan, mapped, novices):
                plain = run(self.model, self.index, self.layer, self.batches)
        finally:
            handle.remove()
        return plain, Seen(*(torch.cat(column) for column in zip(*noted, strict=True)))

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
