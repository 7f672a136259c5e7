"""What a checkpoint is, what a ratio would save, and what would be refused and why: reads headers, loads nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cprune import hf
from cprune.checkpoint import Checkpoint, open_checkpoint
from cprune.config import PruneConfig
from cprune.errors import CpruneError
from cprune.pipeline import check_request
from cprune.prove.report import Size, count_text, size_text

RATIOS = (0.125, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Saving:
    """What removing a share of the experts would do."""

    ratio: float
    removed: int  # experts
    bytes: int  # of the output
    refusal: str | None  # why it would be refused


@dataclass(frozen=True)
class Inspection:
    """A checkpoint in numbers."""

    folder: str
    bytes: int  # of all tensors
    facts: dict[str, str]
    savings: tuple[Saving, ...]
    refusals: tuple[str, ...]


def inspect_checkpoint(model: str | os.PathLike[str], config: PruneConfig) -> Inspection:
    """Read the headers of a checkpoint. Raises CpruneError where it is not a MoE checkpoint that cprune knows."""
    checkpoint = open_checkpoint(model)
    layers, arch, size = checkpoint.moe_layers, checkpoint.architecture, Size.of(checkpoint)
    expert_bytes = sum(checkpoint.tensors[name].nbytes for layer in layers for name in layer.expert_tensors())
    counts = sorted({layer.num_experts for layer in layers})
    dtypes = sorted({info.dtype for info in checkpoint.tensors.values()})
    facts = {
        "family": arch.model_type,
        "layout": "fused" if layers[0].fused else "per expert",
        "layers": f"{arch.num_layers}, of which MoE {sum(layer.trunk for layer in layers)}"
        + (f", and {extra} prediction heads" if (extra := sum(not layer.trunk for layer in layers)) else ""),
        "experts per layer": " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1]))),
        "experts per token": str(arch.top_k)
        + (f" (from {arch.topk_group} of {arch.n_group} groups)" if arch.n_group > 1 else ""),
        "parameters": count_text(size.parameters),
        "data types": ", ".join(dtypes),
        "shards": str(len(checkpoint.shards)),
        "bytes in experts": f"{size_text(expert_bytes)} ({expert_bytes / size.bytes:.1%})",
        "bytes elsewhere": size_text(size.bytes - expert_bytes),
        "fingerprint": checkpoint.fingerprint[:12],
    }
    ratios = dict.fromkeys((*RATIOS, config.ratio))
    savings = tuple(_saving(checkpoint, config.replace(ratio=ratio), expert_bytes, size) for ratio in sorted(ratios))
    refusals = []
    for check in (lambda: hf.build_empty(checkpoint, torch.float32), lambda: hf.read_tokenizer(checkpoint)):
        try:
            check()
        except CpruneError as error:
            refusals.append(str(error))
    return Inspection(str(checkpoint.folder), size.bytes, facts, savings, tuple(refusals))


def render(inspection: Inspection) -> Group:
    """Tables for a terminal."""
    facts = Table(title=Text(inspection.folder), title_justify="left", show_header=False)
    for name, value in inspection.facts.items():
        facts.add_row(name, value)
    savings = Table(title="what a ratio would save", title_justify="left")
    for name in ("ratio", "experts removed", "output", "of the original", "refused because"):
        savings.add_column(name, justify="left" if name == "refused because" else "right")
    for saving in inspection.savings:
        if saving.refusal is None:
            share = f"{saving.bytes / inspection.bytes:.1%}"
            savings.add_row(f"{saving.ratio:g}", str(saving.removed), size_text(saving.bytes), share, "")
        else:
            savings.add_row(f"{saving.ratio:g}", "", "", "", saving.refusal)
    refusals = Table.grid(padding=(0, 2))
    for refusal in inspection.refusals:
        refusals.add_row("refused:", refusal)
    return Group(facts, savings, refusals)


def _saving(checkpoint: Checkpoint, config: PruneConfig, expert_bytes: int, size: Size) -> Saving:
    try:
        removed = check_request(checkpoint, config)
    except CpruneError as error:
        return Saving(config.ratio, 0, 0, str(error))
    return Saving(config.ratio, removed, round(size.bytes - expert_bytes * removed / size.experts), None)
