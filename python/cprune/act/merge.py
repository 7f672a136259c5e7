"""Merge: every dropped expert goes into the kept one that stands in for it, and the layer has C experts afterwards.

One decoder layer is in memory at a time, with the hidden states of the original and of the compact model, whose earlier
layers are merged. A layer's groups are merged one by one from what the original gives its experts (`groups`). What then
becomes of the router is `--router`:

fold   C rows (`fold`), a stock checkpoint.
map    the rows of merged experts stay, and a map leads from rows to experts: the original's routing, with the gates of
       a group summed. Rows of dropped experts that went into nobody are gone.

Who is merged (all dropped experts, those of their stand-in's cluster, or nobody), whether the kept experts' weights
change, and which rows are folded is what brings the layer's output, in the compact model as it is up to there, nearest
to the original's on sequences held back from all fits. Where nothing beats pruning, the layer is pruned.

With repair, the down projections of all kept experts are then refitted to what is still missing (`least_squares`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from cprune import hf
from cprune.act.align import Expert
from cprune.act.fold import RouterFit, Rows
from cprune.act.groups import Inputs, gather, merge_group, read_expert, write_expert
from cprune.act.least_squares import Judge, Recorder, fit_down
from cprune.act.repair import FLOATING, MARGIN
from cprune.act.sides import Sides, advance, held_back, run
from cprune.checkpoint import Checkpoint, MoELayer
from cprune.checkpoint.reader import DTYPES
from cprune.config import PruneConfig
from cprune.errors import CpruneError
from cprune.merged import changed_names, compact_routing, suffix_of, taken_tensors
from cprune.plan import LayerPlan, PrunePlan
from cprune.repaired import MAP, ROWS_KEPT, LayerRepair, Passed, digest
from cprune.stream import Batch, StreamedModel


def check_merge(checkpoint: Checkpoint, config: PruneConfig) -> None:
    """Raise CpruneError, before any work, where the experts of this checkpoint cannot be merged as `config` says."""
    architecture = checkpoint.architecture
    if architecture.quantized is not None:
        raise CpruneError(f"action merge needs floating-point weights, got quantization {architecture.quantized!r}")
    if config.router != MAP and architecture.n_group > 1:
        raise CpruneError(
            f"router fold must not mix router groups, got n_group {architecture.n_group} (--router map keeps them)"
        )
    for moe in checkpoint.moe_layers:
        names = moe.expert_tensors()
        for name in names:
            dtype = checkpoint.tensors[name].dtype
            if dtype not in FLOATING or dtype != checkpoint.tensors[names[0]].dtype:
                raise CpruneError(f"merging needs experts of one floating-point type in a layer, got {dtype} in {name}")


@torch.inference_mode()
def merge_experts(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    config: PruneConfig,
    passed: Passed | None = None,
    *,
    refit: bool = False,
) -> Iterator[tuple[LayerRepair, dict[str, torch.Tensor], Passed]]:
    """Walk the original and the compact model side by side and yield every trunk MoE layer's merge, in order of depth.

    Args:
        input_ids: [N, S] int64 sequences, at least two.
        mask: [N, S] bool, False on padding.
        config: the router; compute type of the models, tokens at a time, first positions.
        passed: where an earlier walk with the same arguments stopped; only the layers after that are yielded.
        refit: whether to repair too.
    Yields the record, whose errors are those of the layer with the dropped experts gone and of the merged one, the
    changed tensors under their names and in their data type in the output, and where the walk is.
    Raises CpruneError where the weights are quantised or there is only one sequence.
    """
    if len(input_ids) < 2:
        raise CpruneError(f"merging needs two calibration sequences, one to judge by, got {len(input_ids)}")
    sides = Sides.start(checkpoint, input_ids, mask, config, passed)
    model, original, compact = sides.model, sides.original, sides.compact
    for index in sides.layers("merge"):
        moe = model.moe_layer(index)
        with model.layer(index) as layer:
            if moe is None:
                for batch in (*original, *compact):
                    batch.hidden = model.run_layer(index, layer, batch)
                continue
            walk = _Layer(model, index, layer, moe, plan[moe.name], config)
            walk.observe(original, sides.mask, sides.fitted)
            record, tensors = walk.merge(compact, refit=refit)
            del walk
            yield record, tensors, sides.passed(moe.name)


@dataclass(frozen=True)
class _Choice:
    """What a layer may become."""

    error: float  # squared, on the held-back tokens
    router: str = ROWS_KEPT  # as in `LayerRepair`
    mapped: tuple[int, ...] = ()
    weights: Mapping[int, Expert] = field(default_factory=dict)  # the kept experts that are merged ones
    rows: Rows = field(default_factory=dict)  # of the router, where they are others


class _Layer:
    """One layer in memory, in which the merged experts take the slots of the kept ones."""

    def __init__(
        self, model: StreamedModel, index: int, layer: nn.Module, moe: MoELayer, plan: LayerPlan, config: PruneConfig
    ) -> None:
        self.model, self.index, self.layer, self.moe, self.plan = model, index, layer, moe, plan
        self.maps = config.router == MAP
        self.experts = hf.find_experts(layer)
        tensors = [*moe.expert_tensors(), *(name for name, _ in moe.router.values())]
        on_disk = model.checkpoint.tensors
        self.dtypes = {suffix_of(moe, name): DTYPES[on_disk[name].dtype] for name in tensors}
        self.dtype = DTYPES[on_disk[moe.expert_tensors()[0]].dtype]
        self._own_rows: Rows = {}  # the kept experts' rows of the router, where those may change
        self.fits: dict[tuple[int, ...], RouterFit] = {}  # by the dropped experts that are merged

    def observe(self, batches: list[Batch], mask: torch.Tensor, fitted: int) -> None:
        """Pass the batches of the original through the layer, noting what its router and its experts are given."""
        inputs = self.experts.cprune_observer = Inputs()
        with ExitStack() as stack:
            stack.callback(self.experts.__delattr__, "cprune_observer")
            for members in () if self.maps else self._memberships():
                fit = self.fits[members] = RouterFit(self.layer, self._groups(members), mask[:fitted].flatten())
                stack.callback(hf.find_router(self.layer).register_forward_pre_hook(fit.note).remove)
            for batch in batches:
                batch.hidden = self.model.run_layer(self.index, self.layer, batch)
        self.expected = torch.cat([batch.hidden.flatten(0, 1) for batch in batches])
        self.judge = Judge(self.expected, mask, fitted)
        self.hidden, self.routed = inputs.take()

    def merge(self, batches: list[Batch], *, refit: bool) -> tuple[LayerRepair, dict[str, torch.Tensor]]:
        """Merge, judge, and pass the batches of the compact model through the layer as it is from now on."""
        held = held_back(batches, self.judge)
        before = self._error(held)
        own = {expert: read_expert(self.experts, expert).to(self.dtype) for expert in self.plan.kept}
        best = pruned = _Choice(before)
        for members in self._memberships():
            for choice in self._choices(members):
                self._put_all(choice, own)
                error = self._error(held, choice.mapped)
                if error < (1.0 - MARGIN) * best.error:
                    best = replace(choice, error=error)
            self._put_all(pruned, own)
        del self.hidden, self.routed
        ridge: float | None = None
        downs: dict[int, torch.Tensor] = {}
        if refit:  # repair helps one more than the other, so both are repaired before one is chosen
            choices = [best] if best is pruned else [best, pruned]
            repaired = [self._refit(batches, held, choice, own) for choice in choices]
            best, ridge, downs = min(repaired, key=lambda result: result[0].error)
        self._put_all(best, own)
        for expert, down in downs.items():
            hf.projections(self.experts)[2][expert].copy_(down)
        self._advance(batches, best.mapped)
        record = LayerRepair(
            self.moe.name,
            ridge,
            self.judge.relative(before),
            self.judge.relative(best.error),
            digest="",
            merged=tuple(sorted(best.weights)),
            router=best.router,
            mapped=best.mapped,
        )
        names = changed_names(self.moe, self.plan, record)
        tensors = taken_tensors(self.layer, self.moe, self.plan, names, self.dtypes)
        return replace(record, digest=digest(tensors.values()) if tensors else ""), tensors

    def _memberships(self) -> list[tuple[int, ...]]:
        """The sets of dropped experts that may be merged: those of their stand-in's cluster, and all of them."""
        cluster, everyone = self.plan.cluster, self.plan.dropped
        near = tuple(expert for expert in everyone if cluster[expert] == cluster[self.plan.stand_in[expert]])
        grouped = self.model.checkpoint.architecture.n_group > 1  # router groups must stay equally large
        return [members for members in dict.fromkeys([everyone] if grouped else [near, everyone]) if members]

    def _groups(self, members: Sequence[int]) -> dict[int, list[int]]:
        """{kept: itself and those of `members` that go into it}, where there are some."""
        groups: dict[int, list[int]] = {}
        for expert in members:
            groups.setdefault(self.plan.stand_in[expert], [self.plan.stand_in[expert]]).append(expert)
        return groups

    def _choices(self, members: tuple[int, ...]) -> list[_Choice]:
        """What the layer may become by merging `members`; the simpler first."""
        merged, shares = {}, {}
        for kept, group_members in self._groups(members).items():
            group = gather(self.experts, group_members, self.hidden, self.routed, self.judge)
            shares[kept] = group.contribution
            found = merge_group(self.experts, group, self.dtype)
            if found is not None:
                merged[kept] = found.to(self.dtype)
        weights: list[dict[int, Expert]] = [{}, merged] if merged else [{}]
        if self.maps:
            return [_Choice(math.inf, MAP, members, own) for own in weights]
        kinds = self.fits[members].rows(self.plan.kept, shares)
        self._own_rows = kinds[ROWS_KEPT]
        return [
            _Choice(math.inf, kind, (), own, rows)
            for own in weights
            for kind, rows in kinds.items()
            if own or kind != ROWS_KEPT
        ]

    def _refit(
        self, batches: list[Batch], held: list[Batch], choice: _Choice, own: Mapping[int, Expert]
    ) -> tuple[_Choice, float | None, dict[int, torch.Tensor]]:
        """Repair the down projections of a choice: (it with its error now, the experts' median ridge, {expert: down}).

        Where repair makes it no better, without ridge and down projections.
        """
        self._put_all(choice, own)
        recorder = self.experts.cprune_observer = Recorder(self.judge.weight, self.plan.kept)
        try:
            residual = self.judge.residual(self.expected, self._run(batches, choice.mapped))
        finally:
            del self.experts.cprune_observer
        changes = fit_down(recorder.take(), residual, self.judge)
        down = hf.projections(self.experts)[2]
        for expert, change in changes.items():
            down[expert].copy_((down[expert].float() + change.delta.T).to(self.dtype))
        error = self._error(held, choice.mapped) if changes else choice.error
        if error > (1.0 - MARGIN) * choice.error:
            return choice, None, {}
        ridge = statistics.median(change.ridge for change in changes.values())
        return replace(choice, error=error), ridge, {expert: down[expert].clone() for expert in changes}

    def _put_all(self, choice: _Choice, own: Mapping[int, Expert]) -> None:
        """Make the layer what `choice` says; `own` are the kept experts as they were."""
        for expert, parts in (own | dict(choice.weights)).items():
            write_expert(self.experts, expert, parts, self.dtype)
        self._put_router(choice.rows or self._own_rows)

    def _put_router(self, rows: Rows) -> None:
        router = hf.find_router(self.layer)
        for name, values in rows.items():
            on_disk = next(dtype for suffix, dtype in self.dtypes.items() if _is_router(suffix, name))
            getattr(router, name)[list(self.plan.kept)] = values.to(on_disk).to(getattr(router, name).dtype)

    def _error(self, held: list[Batch], mapped: Sequence[int] = ()) -> float:
        """Squared error of the layer as it stands on the held-back tokens."""
        got = self._run(held, mapped)
        return self.judge.error(self.judge.residual(self.expected[len(self.expected) - len(got) :], got))

    def _run(self, batches: list[Batch], mapped: Sequence[int]) -> torch.Tensor:
        with compact_routing(self.layer, self.plan, mapped):
            return run(self.model, self.index, self.layer, batches)

    def _advance(self, batches: list[Batch], mapped: Sequence[int]) -> None:
        advance(batches, self._run(batches, mapped))


def _is_router(suffix: str, parameter: str) -> bool:
    return not suffix.startswith("experts.") and suffix.rpartition(".")[2] == parameter
