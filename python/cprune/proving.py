"""The last stage in order: the output is verified, evaluated and reported on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cprune import hf
from cprune.act.compact import PLAN_NAME, REPAIR_NAME
from cprune.checkpoint import Checkpoint
from cprune.config import NONE, PruneConfig
from cprune.errors import CpruneError
from cprune.plan import PrunePlan
from cprune.prove.evaluate import Perplexity, generate, perplexity
from cprune.prove.report import Report, Size, peak_memory
from cprune.prove.verify import VerifyReport, verification_tokens, verify
from cprune.repaired import Repairs
from cprune.stream import resolve_dtype

if TYPE_CHECKING:
    from cprune.measure.packing import Sequences
    from cprune.pipeline import Stopwatch, Texts

REPORT_NAME = "report.json"
SMOKE_PROMPT_TOKENS = 16
SMOKE_NEW_TOKENS = 4  # each is a walk through all layers


def prove_output(
    checkpoint: Checkpoint,
    compact: Checkpoint,
    plan: PrunePlan,
    config: PruneConfig,
    texts: Texts,
    watch: Stopwatch,
    model: str,
    out: Path,
) -> Report:
    """Verify, evaluate and report on the output in `out`, which is moved aside where it fails verification."""
    verification, before, after, generated = None, None, None, None
    if config.verify:
        with watch.stage("verify"):
            try:
                verification = verify_output(checkpoint, compact, plan, texts.evaluation or texts.calibration, config)
            except CpruneError as error:
                failed = out.with_name(out.name + ".failed")
                out.rename(failed)
                raise CpruneError(f"{error}; the output was moved to {failed}") from error
    if texts.evaluation is not None and texts.tokenizer is not None:
        with watch.stage("evaluate"):
            before = perplexity_of(checkpoint, texts.evaluation, config)
            after = perplexity_of(compact, texts.evaluation, config)
            generated = continuation(compact, texts, config)
    repairs = written_repairs(out)
    report = Report(
        model=model,
        out=str(out),
        method=str(plan.config.get("method", config.method)),
        budget=str(plan.config.get("budget", config.budget)),
        ratio=float(str(plan.config.get("ratio", config.ratio))),
        before=Size.of(checkpoint),
        after=Size.of(compact),
        kept_per_layer={layer.layer: len(layer.kept) for layer in plan.layers},
        calibration=_calibration_text(plan, texts),
        perplexity_before=before,
        perplexity_after=after,
        verification=verification,
        generated=generated,
        seconds=watch.seconds,
        peak_memory=peak_memory(),
        repair=repairs.layers if repairs is not None else (),
        distillation=repairs.distillation if repairs is not None else None,
        domains=tuple(sorted(set(texts.calibration.domain))) if texts.calibration is not None else (),
    )
    report.save(out / REPORT_NAME)
    return report


def verify_output(
    original: Checkpoint, compact: Checkpoint, plan: PrunePlan, text: Sequences | None, config: PruneConfig
) -> VerifyReport:
    """Compare an output with its original on random tokens, and on text where there is some."""
    vocab_size = int(hf.read_config(original).get_text_config().vocab_size)
    real = text.input_ids if text is not None else None
    repairs = written_repairs(compact.folder)
    tokens = verification_tokens(vocab_size, real, seed=config.seed)
    return verify(original, compact, plan, tokens, repairs.changed if repairs is not None else None)


def continuation(checkpoint: Checkpoint, texts: Texts, config: PruneConfig) -> str:
    """The smoke test: what the model says after the first words of the evaluation text."""
    assert texts.evaluation is not None and texts.tokenizer is not None
    prompt = texts.evaluation.input_ids[0, :SMOKE_PROMPT_TOKENS]
    dtype = resolve_dtype(config.dtype, checkpoint)
    return texts.tokenizer.decode(generate(checkpoint, prompt, new_tokens=SMOKE_NEW_TOKENS, dtype=dtype))


def perplexity_of(checkpoint: Checkpoint, texts: Sequences, config: PruneConfig) -> Perplexity:
    """Perplexity of any checkpoint on evaluation text."""
    return perplexity(
        checkpoint,
        texts.input_ids,
        texts.mask,
        texts.domain,
        dtype=resolve_dtype(config.dtype, checkpoint),
        batch_tokens=config.batch_tokens,
    )


def _calibration_text(plan: PrunePlan, texts: Texts) -> str:
    spec = str(plan.config.get("calibration", "?"))
    if texts.calibration is None:
        return "parameters only" if spec == NONE else f"{spec} (a plan made earlier)"
    sources = spec.split(",")
    where = spec if len(sources) == 1 else f"{sources[0]} and {len(sources) - 1} more"
    return f"{texts.calibration.tokens} tokens of {where}"


def written_plan(out: Path) -> PrunePlan | None:
    """The plan beside an output, if there is one."""
    path = out / PLAN_NAME
    return PrunePlan.load(path) if path.is_file() else None


def written_repairs(out: Path) -> Repairs | None:
    """The record beside an output of what was done to it besides slicing, if there is one."""
    path = out / REPAIR_NAME
    return Repairs.load(path) if path.is_file() else None
