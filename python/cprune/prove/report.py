"""The report of a run: what went in, what came out, what it cost. Written as report.json, shown as a table."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from cprune.checkpoint import Checkpoint
from cprune.files import write_text
from cprune.prove.evaluate import Perplexity
from cprune.prove.verify import VerifyReport
from cprune.repaired import NOVICES, Distillation, LayerRepair


@dataclass(frozen=True)
class Size:
    """A checkpoint in numbers."""

    experts: int  # routed experts over all layers
    parameters: int  # elements of all tensors
    bytes: int  # of all tensors

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Size:
        return cls(
            experts=sum(layer.num_experts for layer in checkpoint.moe_layers),
            parameters=sum(math.prod(info.shape) for info in checkpoint.tensors.values()),
            bytes=checkpoint.nbytes,
        )


@dataclass(frozen=True)
class Report:
    """All that a run has to tell."""

    model: str
    out: str
    method: str
    budget: str
    ratio: float  # asked for
    before: Size
    after: Size
    kept_per_layer: dict[str, int]
    calibration: str  # what was measured on, in words
    perplexity_before: Perplexity | None
    perplexity_after: Perplexity | None
    verification: VerifyReport | None
    generated: str | None  # a greedy continuation by the compact model
    seconds: dict[str, float]  # by stage
    peak_memory: int  # bytes, resident, of the whole process
    repair: tuple[LayerRepair, ...] = ()  # by layer; empty where there was none
    distillation: Distillation | None = None
    domains: tuple[str, ...] = ()  # of the text that was measured on; empty where that is not known

    @property
    def apart(self) -> dict[str, list[str]]:
        """The evaluated domains: those that were measured on, "in_domain", and "out_of_domain"; empty if unknown."""
        if self.perplexity_after is None or not self.domains:
            return {}
        parts = {"in_domain": [], "out_of_domain": []}
        for name in self.perplexity_after.by_domain:
            parts["in_domain" if name in self.domains else "out_of_domain"].append(name)
        return parts

    @property
    def removed_share(self) -> float:
        return 1.0 - self.after.experts / self.before.experts

    def to_json(self) -> str:
        values = dataclasses.asdict(self) | {"removed_share": self.removed_share}
        for name in ("perplexity_before", "perplexity_after"):
            result: Perplexity | None = getattr(self, name)
            if result is not None:
                values[name] |= {"mean": result.mean, "token_weighted": result.token_weighted}
                values[name] |= {part: result.mean_of(names) for part, names in self.apart.items() if names}
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_text(path, self.to_json())


def peak_memory() -> int:
    """Largest resident set of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def size_text(nbytes: float) -> str:
    """1234567 -> '1.23 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def count_text(number: float) -> str:
    """1234567 -> '1.23 M'."""
    for unit in ("", "k", "M", "B"):
        if number < 1000:
            return f"{number:.3g} {unit}".strip()
        number /= 1000
    return f"{number:.3g} T"


def render(report: Report) -> Group:
    """The result table for a terminal."""
    table = Table(title=Text(f"{report.method}, {report.budget} budget: {report.out}"), title_justify="left")
    for name in ("", "before", "after", "change"):
        table.add_column(name, justify="left" if not name else "right")

    def row(name: str, before: float, after: float, text: object) -> None:
        assert callable(text)
        table.add_row(name, text(before), text(after), f"{(after / before - 1) * 100:+.1f} %" if before else "")

    counts = sorted(set(report.kept_per_layer.values()))
    row("experts", report.before.experts, report.after.experts, str)
    row("parameters", report.before.parameters, report.after.parameters, count_text)
    row("bytes", report.before.bytes, report.after.bytes, size_text)
    if report.perplexity_before is not None and report.perplexity_after is not None:
        before, after = report.perplexity_before, report.perplexity_after
        for domain, value in before.by_domain.items():
            row(f"perplexity {domain}", value, after.by_domain[domain], lambda x: f"{x:.2f}")
        for part, names in report.apart.items() if report.apart.get("out_of_domain") else ():
            if names:
                words = part.replace("_", "-")
                row(f"perplexity, {words}", before.mean_of(names), after.mean_of(names), lambda x: f"{x:.2f}")
        if len(before.by_domain) > 1:
            row("perplexity, mean", before.mean, after.mean, lambda x: f"{x:.2f}")
    notes = Table.grid(padding=(0, 2))
    notes.add_row("experts per layer", str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}")
    notes.add_row("measured on", report.calibration)
    if report.repair:
        merging = any(layer.maker == "merge" for layer in report.repair)
        changed = sum(layer.changes for layer in report.repair)
        novices = sum(layer.router == NOVICES for layer in report.repair)
        with_novices = f" ({novices} with novices)" if novices else ""
        before, after = (_mean([getattr(layer, when) for layer in report.repair]) for when in ("before", "after"))
        notes.add_row(
            "merged" if merging else "repaired",
            f"{changed} of {len(report.repair)} layers{with_novices}, error of their outputs on held-back text "
            f"{before:.2%} -> {after:.2%}",
        )
    if report.distillation is not None:
        done = report.distillation
        steps = f"{done.steps} steps" if done.whole else f"{done.steps} steps a layer, layer by layer"
        kept = "" if done.digests else ", no better: nothing of it is kept"
        error = f"KL to the original on held-back text {done.before:.4f} -> {done.after:.4f}"
        notes.add_row("distilled", f"{done.trained}, {steps}, {error}{kept}")
    if report.verification is not None:
        check = report.verification
        refitted = f" with {check.repaired} repaired layers" if check.repaired else ""
        refitted += f" with {check.merged} merged layers" if check.merged else ""
        refitted += f" with {check.distilled} distilled layers" if check.distilled else ""
        notes.add_row(
            "verified",
            f"equals the masked original{refitted} in {check.layers} layers x {check.positions} tokens, "
            f"relative error <= {max(check.max_error, check.logits_error):.1e}",
        )
    else:
        notes.add_row("verified", "no (--no-verify)")
    if report.generated is not None:
        notes.add_row("generates", repr(report.generated))
    notes.add_row("seconds", ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items()))
    notes.add_row("peak memory", size_text(report.peak_memory))
    return Group(table, notes)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
