"""The stages in order: open, measure, decide, act, prove. No logic of its own beyond who comes after whom."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import json
import logging
import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cprune import hf
from cprune.act.compact import PLAN_NAME, apply_plan, check_plan
from cprune.act.distill import check_distill, distill
from cprune.act.distill_memory import check_memory
from cprune.act.distill_tensors import trained_names
from cprune.act.merge import check_merge, merge_experts
from cprune.act.repair import check_novices, repair_experts, why_not
from cprune.checkpoint import Checkpoint, open_checkpoint
from cprune.checkpoint.scan import check_finite
from cprune.checkpoint.writer import check_output, check_space
from cprune.config import DEFAULT, NONE, PruneConfig, parse_blend
from cprune.decide.budget import check_feasible
from cprune.decide.known import Known, once
from cprune.decide.methods import check_method, decide, rank_heads
from cprune.decide.saliency import GRADIENT_METHODS
from cprune.errors import CpruneError
from cprune.measure.calibrate import add_parameter_grams, calibrate, parameter_stats
from cprune.measure.documents import fingerprint_documents, read_documents
from cprune.measure.gradients import add_mask_gradients
from cprune.measure.packing import Sequences, pack, passages
from cprune.measure.similarity import similarity_matrix
from cprune.memory import return_memory
from cprune.plan import PrunePlan
from cprune.prove.evaluate import Perplexity
from cprune.prove.report import Report
from cprune.prove.verify import VerifyReport
from cprune.proving import (
    REPORT_NAME,
    continuation,
    perplexity_of,
    prove_output,
    verify_output,
    written_plan,
    written_repairs,
)
from cprune.repaired import MAP, Repairs
from cprune.sizes import compact_bytes, distill_bytes, gradient_bytes, passed_bytes, refit_bytes, stats_bytes
from cprune.stats import ExpertStats
from cprune.work import WorkFolder, key_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

PROVE_FIELDS = ("verify", "evaluate", "evaluate_tokens", "batch_tokens", "work_dir")  # what no plan depends on
VERIFY_TOKENS = 2048  # of text to tokenize for `cprune verify`, which takes four sequences' beginnings


@dataclass(frozen=True)
class Texts:
    """What a run reads besides the model, gathered before any work."""

    tokenizer: PreTrainedTokenizerBase | None
    calibration: Sequences | None
    calibration_fingerprint: str
    evaluation: Sequences | None


class Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        log.info("%s …", name)
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 3)
            gc.collect()
            return_memory()


def prune(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: PruneConfig | None = None,
    *,
    plan: PrunePlan | None = None,
    checkpoint: Checkpoint | None = None,
) -> Report:
    """The main job: a MoE checkpoint in, a smaller one out.

    Args:
        model: checkpoint folder or hub id; `checkpoint` where it is open already.
        out: folder to write; must not exist, or be empty, or hold the unproved output of the same run.
        config: every choice; the defaults where left out.
        plan: skips measuring and deciding; `auto` then repairs where `config` names the text, or the plan was made on
            the default one.
    Raises CpruneError, before any work, where the input cannot be pruned as asked.
    """
    config, target, watch = config or PruneConfig(), Path(os.path.abspath(out)), Stopwatch()
    work = WorkFolder(Path(config.work_dir) if config.work_dir else target.with_name(target.name + ".work"))
    with watch.stage("open"):
        checkpoint = checkpoint or open_checkpoint(model)
        moved = _unproved(target, checkpoint, config, plan)
        if moved is None:
            check_output(target, checkpoint.folder)
        work.check(MODEL=checkpoint.folder, OUT=target)
        check_request(checkpoint, config) if plan is None else check_plan(checkpoint, plan)
        unrepaired, merging = why_not(checkpoint, config, plan), config.action == "merge"
        mapping = config.router == MAP
        if plan is not None and plan.config.get("action") == "merge" and not merging:
            raise CpruneError(f"--action must be merge for a plan that was made to merge, got {config.action}")
        if merging and plan is not None:
            check_merge(checkpoint, config)
        check_novices(checkpoint, config)
        check_distill(checkpoint, config)
        distilling = config.distill != NONE
        share = config.ratio if plan is None else plan.removed_share
        if moved is None:
            check_space(target, compact_bytes(checkpoint, share))
        needed = measuring_bytes(checkpoint, config, {config.method}) if plan is None else 0
        if (merging or mapping or unrepaired is None) and moved is None:
            if merging or config.repair not in ("router", NONE):
                needed += refit_bytes(checkpoint, share, whole=merging or config.repair != "down")
            needed += passed_bytes(checkpoint, config)
        if distilling and moved is None:
            trained = [name for moe in checkpoint.moe_layers for name in trained_names(moe, config.distill)]
            needed += distill_bytes(checkpoint, share, trained)
        if needed:
            check_space(work.path, needed)
        reading = plan is None or merging or mapping or distilling or unrepaired is None
        texts = read_texts(checkpoint, config, calibration=reading)
        asked_for = {"action merge": merging, "--router map": mapping, f"--distill {config.distill}": distilling}
        for what, asked in asked_for.items():
            if asked and texts.calibration is not None and len(texts.calibration.input_ids) < 2:
                raise CpruneError(f"{what} needs two calibration sequences, one to judge by, got 1")
        if distilling and texts.calibration is not None and moved is None:
            check_memory(checkpoint, config, texts.calibration.input_ids.shape, share)
        if config.repair == "auto" and texts.calibration is not None and len(texts.calibration.input_ids) < 2:
            unrepaired = "calibration text of one sequence"
        if config.repair == "auto" and unrepaired is not None:
            log.info("applying without repair, which needs text and floating-point weights: got %s", unrepaired)
        if plan is not None and moved is None:
            check_finite(checkpoint)
    if plan is None:
        plan = make_plan(checkpoint, config, texts, work, watch)
    source, repairs = None, None
    if (merging or mapping or unrepaired is None) and texts.calibration is not None:
        source = _repair_source(checkpoint, plan, config, texts)
        if moved is None:
            with watch.stage("merge" if merging else "repair"):
                repairs = _repair(checkpoint, plan, config, texts.calibration, work, source, refit=unrepaired is None)
    if distilling and texts.calibration is not None:
        base = _repair_source(checkpoint, plan, config, texts)
        source = json.dumps(["distill", base, source is not None, config.distill, config.steps])
        if moved is None:
            ids, mask = texts.calibration.input_ids, texts.calibration.mask
            with watch.stage("distill"):
                repairs = distill(checkpoint, plan, repairs, ids, mask, config, work.distill_path, key_of(source))
    with watch.stage("act"):
        if moved is None:
            apply_plan(checkpoint, plan, target, repairs)
            if repairs is not None:
                work.forget_repairs()
        elif _kept(moved) != _kept(plan) or _written_key(target) != (key_of(source) if source else None):
            raise CpruneError(f"OUT must not exist or hold the output of this very run, got another plan's in {target}")
        compact = open_checkpoint(target)
    return prove_output(checkpoint, compact, plan, config, texts, watch, str(model), target)


def measuring_bytes(checkpoint: Checkpoint, config: PruneConfig, methods: Collection[str]) -> int:
    """Bytes of the work folder, about, that measuring for `methods` takes."""
    gradients = gradient_bytes(checkpoint, config) if GRADIENT_METHODS & set(methods) else 0
    return stats_bytes(checkpoint, config) + gradients


def check_request(checkpoint: Checkpoint, config: PruneConfig) -> int:
    """Experts that would be removed; CpruneError where the checkpoint or the constraints forbid it."""
    if checkpoint.architecture.quantized is not None:
        raise CpruneError(
            f"measuring needs unquantised weights, got quantization {checkpoint.architecture.quantized!r}; "
            "a plan made on the unquantised model does not fit either, since its fingerprint differs"
        )
    if checkpoint.architecture.router_rows:
        raise CpruneError("MODEL must have a router row for each expert, got an output of --router map")
    hf.read_config(checkpoint)
    sizes = {layer.name: layer.num_experts for layer in checkpoint.moe_layers if layer.trunk}
    measured = {"outputs", "cka"} & parse_blend(_similarity_of(config)).keys()
    if config.calibration == NONE and measured:
        raise CpruneError(
            f"similarity {min(measured)} must have calibration text, got --calibration none "
            "(weights, units and router need none)"
        )
    why_not(checkpoint, config)
    check_novices(checkpoint, config)
    check_distill(checkpoint, config)
    if config.action == "merge":
        check_merge(checkpoint, config)
    check_method(sizes, checkpoint.architecture, config)
    return check_feasible(sizes, checkpoint.architecture, config)


def read_texts(checkpoint: Checkpoint, config: PruneConfig, *, calibration: bool = True) -> Texts:
    """Read and tokenize what calibration and evaluation ask for; CpruneError where some is missing or too short."""
    wants_calibration = calibration and config.calibration != NONE
    if not wants_calibration and config.evaluate == NONE:
        return Texts(None, None, "", None)
    tokenizer = hf.read_tokenizer(checkpoint)
    measured, fingerprint, evaluation = None, "", None
    if wants_calibration:
        if config.calibration == DEFAULT:
            log.info(
                "measuring on the general text that comes with cprune; a task's own text (--calibration) is better"
            )
        documents = read_documents(config.calibration, split="calibration", seed=config.seed)
        documents = passages(documents, tokens=config.tokens, seq_len=config.seq_len)
        fingerprint = fingerprint_documents(documents)
        measured = pack(documents, tokenizer, tokens=config.tokens, seq_len=config.seq_len, seed=config.seed)
    if config.evaluate != NONE:
        documents = read_documents(config.evaluate, split="evaluation", seed=config.seed)
        evaluation = pack(documents, tokenizer, tokens=config.evaluate_tokens, seq_len=config.seq_len, seed=config.seed)
    return Texts(tokenizer, measured, fingerprint, evaluation)


def make_plan(
    checkpoint: Checkpoint, config: PruneConfig, texts: Texts, work: WorkFolder, watch: Stopwatch | None = None
) -> PrunePlan:
    """Measure (or find in the work folder) and decide; the plan is kept in the work folder too."""
    watch = watch or Stopwatch()
    with watch.stage("measure"):
        stats = observe(checkpoint, config, texts, work)
    with watch.stage("decide"):
        plan = plan_from(checkpoint, stats, config)
        plan.save(work.plan_path)
    return plan


def plan_from(
    checkpoint: Checkpoint, stats: dict[str, ExpertStats], config: PruneConfig, known: Known | None = None
) -> PrunePlan:
    """Decide on statistics at hand; CpruneError where they are not what the method needs.

    Args:
        known: what other decisions on them have found; a dictionary for all of them.
    """
    blend = parse_blend(_similarity_of(config))
    known = {} if known is None else known
    similarity = once(
        known,
        ("similarity", *blend.items()),
        lambda: {name: similarity_matrix(layer, blend) for name, layer in stats.items()},
    )
    layers = list(decide(stats, similarity, checkpoint.architecture, config, known))
    for moe in checkpoint.moe_layers:
        if not moe.trunk:  # a prediction head: the forward pass never runs it, so only its router tells
            rows = checkpoint.read(next(iter(moe.router.values()))[0]).double().reshape(moe.num_experts, -1)
            layers.append(rank_heads(moe.name, rows, layers, checkpoint.architecture, config))
    return PrunePlan(
        fingerprint=checkpoint.fingerprint,
        model_type=checkpoint.architecture.model_type,
        layers=tuple(layers),
        config=config.to_dict(),
        versions=dict(_versions()),
    )


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    return tuple((name, importlib.metadata.version(name)) for name in ("cprune", "torch", "transformers"))


def verify_folders(
    model: str | os.PathLike[str], out: str | os.PathLike[str], config: PruneConfig | None = None
) -> VerifyReport:
    """`cprune verify`: compare an output with its original, by the plan kept in the output."""
    config = config or PruneConfig()
    original, compact = open_checkpoint(model), open_checkpoint(out)
    plan = written_plan(Path(out))
    if plan is None:
        raise CpruneError(f"{out} must hold {PLAN_NAME}, as every output of cprune does, got none")
    check_plan(original, plan)
    try:
        evaluation = read_texts(original, config.replace(evaluate_tokens=VERIFY_TOKENS), calibration=False).evaluation
    except CpruneError as error:
        log.warning("verifying on random tokens only: %s", error)
        evaluation = None
    return verify_output(original, compact, plan, evaluation, config)


def evaluate_folder(folder: str | os.PathLike[str], config: PruneConfig) -> tuple[Perplexity, str]:
    """`cprune evaluate`: perplexity and a continuation by any checkpoint, also one with ragged layers."""
    if config.evaluate == NONE:
        raise CpruneError("evaluate must name a text or be 'default', got 'none'")
    checkpoint = open_checkpoint(folder)
    texts = read_texts(checkpoint, config, calibration=False)
    assert texts.evaluation is not None
    return perplexity_of(checkpoint, texts.evaluation, config), continuation(checkpoint, texts, config)


def observe(
    checkpoint: Checkpoint,
    config: PruneConfig,
    texts: Texts,
    work: WorkFolder,
    methods: Collection[str] | None = None,
) -> dict[str, ExpertStats]:
    """The statistics of every MoE layer, by name, from one pass, or from the work folder where they are already.

    What only some methods need is measured for `methods` alone (that of `config` where left out).
    Raises CpruneError, before the pass, where a weight is not finite.
    """
    version = importlib.metadata.version("cprune")
    source = json.dumps([version, checkpoint.fingerprint, config.measure_key(), texts.calibration_fingerprint])
    sequences, methods = texts.calibration, {config.method} if methods is None else methods

    def measure() -> Iterator[ExpertStats]:
        check_finite(checkpoint)
        return parameter_stats(checkpoint, config) if sequences is None else calibrate(checkpoint, sequences, config)

    stats = work.stats(source, measure, sequences="cprune-paper" in methods)
    if sequences is None:
        return stats
    asked = {*parse_blend(config.similarity), *methods}
    by_parameters = asked & {"weights", "units", "group-merge-weights"}
    if by_parameters and not all(len(layer.weight_gram) for layer in stats.values()):
        stats = {layer.layer: layer for layer in add_parameter_grams(checkpoint, config, stats)}
        work.complete_stats(stats, ("weight_gram", "unit_gram"))
    if asked & GRADIENT_METHODS and not all(len(layer.mask_gradient_sq) for layer in stats.values()):
        stats = add_mask_gradients(checkpoint, sequences, config, stats, work.gradients_path)
        work.complete_stats(stats, ("mask_gradient_sq", "mask_gradient_abs"))
    return stats


def _repair_source(checkpoint: Checkpoint, plan: PrunePlan, config: PruneConfig, texts: Texts) -> str:
    """All that a repair depends on."""
    version = importlib.metadata.version("cprune")
    made_from = [version, checkpoint.fingerprint, config.measure_key(), texts.calibration_fingerprint, _kept(plan)]
    made_from.append(config.repair)
    if config.action == "merge":
        made_from += [layer.stand_in for layer in plan.layers]
    if config.action == "merge" or config.router == MAP:
        made_from += [config.action, config.router]
    return json.dumps(["repair", *made_from])


def _repair(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    config: PruneConfig,
    text: Sequences,
    work: WorkFolder,
    source: str,
    *,
    refit: bool,
) -> Repairs:
    ids, mask = text.input_ids, text.mask
    if config.action == "merge":
        return work.repairs(source, lambda at: merge_experts(checkpoint, plan, ids, mask, config, at, refit=refit))
    asked = config if refit else config.replace(repair=NONE)  # novices alone
    return work.repairs(source, lambda at: repair_experts(checkpoint, plan, ids, mask, asked, at))


def _similarity_of(config: PruneConfig) -> str:
    """The similarity to use: the default one needs outputs, and without data the units stand in for it."""
    if config.calibration == NONE and config.similarity == PruneConfig.similarity:
        return "units"
    return config.similarity


def _unproved(out: Path, checkpoint: Checkpoint, config: PruneConfig, plan: PrunePlan | None) -> PrunePlan | None:
    """The plan of an output that this very run wrote before it was stopped, or None where `out` is something else."""
    moved = None if (out / REPORT_NAME).exists() else written_plan(out)
    if moved is None or moved.fingerprint != checkpoint.fingerprint:
        return None
    if plan is not None:
        return moved if moved.layers == plan.layers else None
    deciding = {name: value for name, value in config.to_dict().items() if name not in PROVE_FIELDS}
    return moved if deciding.items() <= moved.config.items() else None


def _written_key(out: Path) -> str | None:
    repairs = written_repairs(out)
    return None if repairs is None else repairs.key


def _kept(plan: PrunePlan) -> list[tuple[int, ...]]:
    return [layer.kept for layer in plan.layers]
