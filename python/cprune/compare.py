"""compare: methods x ratios from one calibration pass, every plan evaluated as the masked original; writes no model."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from cprune.checkpoint import Checkpoint, open_checkpoint
from cprune.checkpoint.writer import check_space
from cprune.config import MEASURE_FIELDS, NONE, PruneConfig
from cprune.errors import CpruneError
from cprune.files import write_text
from cprune.pipeline import Stopwatch, check_request, measuring_bytes, observe, plan_from, read_texts
from cprune.plan import PrunePlan
from cprune.prove.compare import Quality, Units, bootstrap, masked_losses
from cprune.prove.pareto import Row, frontier, pareto_svg
from cprune.stream import resolve_dtype
from cprune.work import WorkFolder

log = logging.getLogger(__name__)

JSON_NAME, PLOT_NAME = "compare.json", "compare.svg"
SHARED = (
    *MEASURE_FIELDS,
    *("evaluate", "evaluate_tokens", "batch_tokens", "work_dir", "verify", "method", "ratio", "action", "router"),
)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; perplexities are those of the selections as they are, before any repair."""

    model: str
    evaluated_tokens: int
    whole: Quality
    rows: tuple[Row, ...]  # methods in the order asked for, each by ratio
    seconds: dict[str, float]

    def to_json(self) -> str:
        best = frontier(self.rows)
        rows = [{**dataclasses.asdict(row), "pareto": row in best} for row in self.rows]
        return json.dumps({**dataclasses.asdict(self), "rows": rows}, indent=1, ensure_ascii=False) + "\n"

    def save(self, folder: Path) -> None:
        """Write compare.json and compare.svg, each whole or not at all."""
        for name, text in ((JSON_NAME, self.to_json()), (PLOT_NAME, pareto_svg(self.whole, self.rows))):
            write_text(folder / name, text)


def compare(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    methods: Sequence[str],
    ratios: Sequence[float],
    config: PruneConfig | None = None,
) -> Comparison:
    """Plan by every method at every ratio and evaluate all plans on the same text.

    Args:
        folder: for compare.json and compare.svg; made where it does not exist. The statistics go to FOLDER.work.
        methods: NAME or NAME:OPTION=VALUE:..., such as "cprune:budget=uniform"; options of PruneConfig that only
            deciding depends on.
        ratios: shares of the experts to remove.
        config: all that the methods share.
    Raises CpruneError for a request that makes no sense, and where every method is refused; a single refusal is a row.
    """
    config, out, watch = config or PruneConfig(), Path(os.path.abspath(folder)), Stopwatch()
    if config.evaluate == NONE:
        raise CpruneError("compare must have a text to evaluate on, got --evaluate none")
    if config.action != "prune":
        raise CpruneError(f"compare must have --action prune, since it writes no model, got {config.action}")
    with watch.stage("open"):
        requests = [(name, variant(name, ratio, config)) for name in methods for ratio in ratios]
        if not requests:
            raise CpruneError("compare must have at least one method and one ratio, got none")
        checkpoint = open_checkpoint(model)
        work = WorkFolder(Path(config.work_dir) if config.work_dir else out.with_name(out.name + ".work"))
        work.check(MODEL=checkpoint.folder)
        check_space(work.path, measuring_bytes(checkpoint, config, {asked.method for _, asked in requests}))
        _make(out, checkpoint)
        refusals = [_refusal(checkpoint, asked) for _, asked in requests]
        _some_left(refusals)
        texts = read_texts(checkpoint, config)
        assert texts.evaluation is not None
    with watch.stage("measure"):
        wanted = [asked for (_, asked), refused in zip(requests, refusals, strict=True) if refused is None]
        stats = observe(checkpoint, _measuring_for(wanted, config), texts, work, {asked.method for asked in wanted})
    with watch.stage("decide"):
        plans: list[PrunePlan | None] = []
        known: dict[tuple[object, ...], object] = {}
        for place, (_, asked) in enumerate(requests):
            try:
                plans.append(plan_from(checkpoint, stats, asked, known) if refusals[place] is None else None)
            except CpruneError as error:
                plans.append(None)
                refusals[place] = str(error)
        _some_left(refusals)
        del stats
    with watch.stage("evaluate"):
        text = texts.evaluation
        units = Units.of(text.mask, text.domain, text.document)
        losses = masked_losses(
            checkpoint,
            [None, *plans],
            text.input_ids,
            text.mask,
            units,
            dtype=resolve_dtype(config.dtype, checkpoint),
            batch_tokens=config.batch_tokens,
        )
        whole, *found = bootstrap(losses, units, seed=config.seed)
    rows = tuple(
        Row(name, asked.ratio, plan.removed_share if plan else 0.0, quality if plan else None, refused)
        for (name, asked), plan, quality, refused in zip(requests, plans, found, refusals, strict=True)
    )
    comparison = Comparison(str(model), int(text.mask[:, 1:].sum()), whole, rows, watch.seconds)
    comparison.save(out)
    return comparison


def variant(name: str, ratio: float, config: PruneConfig) -> PruneConfig:
    """The configuration of one method, "NAME:OPTION=VALUE:...", at one ratio; CpruneError where it is none."""
    method, *pairs = name.split(":")
    options: dict[str, object] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key in SHARED or key not in config.to_dict():
            raise CpruneError(
                f"a method must be NAME or NAME:OPTION=VALUE with options that only deciding depends on, got {name!r}"
            )
        options[key] = yaml.safe_load(value)
    return config.replace(method=method.strip(), ratio=ratio, **options)


def _measuring_for(variants: Sequence[PruneConfig], config: PruneConfig) -> PruneConfig:
    """A configuration whose statistics serve all variants: with parameter Grams where one needs them."""
    return config.replace(similarity=",".join(dict.fromkeys(asked.similarity for asked in variants)))


def _refusal(checkpoint: Checkpoint, config: PruneConfig) -> str | None:
    try:
        check_request(checkpoint, config)
    except CpruneError as error:
        return str(error)
    return None


def _some_left(refusals: Sequence[str | None]) -> None:
    if all(refusal is not None for refusal in refusals):
        raise CpruneError(str(refusals[0]))


def _make(folder: Path, checkpoint: Checkpoint) -> None:
    if checkpoint.folder.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise CpruneError(f"the comparison must be written outside MODEL, got {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CpruneError(
            f"the comparison must go to a folder that can be written, got {folder} ({error.strerror})"
        ) from error
    if not os.access(folder, os.W_OK):
        raise CpruneError(f"the comparison must go to a folder that can be written, got {folder}")
