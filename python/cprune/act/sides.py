"""The original and the compact model side by side: the same sequences go through both, one layer in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from cprune.act.least_squares import Judge, judges
from cprune.checkpoint import Checkpoint
from cprune.config import PruneConfig
from cprune.stream import Batch, StreamedModel, counted, embed_all, resolve_dtype


@dataclass(frozen=True)
class Sides:
    """The sequences that are fitted come first, and fill whole batches; then those held back, which judge."""

    model: StreamedModel
    original: list[Batch]
    compact: list[Batch]
    mask: torch.Tensor  # [N, S] bool: the tokens that count, in the order of the batches
    fitted: int  # sequences

    @classmethod
    def start(cls, checkpoint: Checkpoint, input_ids: torch.Tensor, mask: torch.Tensor, config: PruneConfig) -> Sides:
        """Embed sequences [N, S] int64, at least two, of which mask [N, S] bool tells the padding."""
        mask = counted(mask, skip_first=config.skip_first)
        held = judges(len(mask))
        model = StreamedModel(checkpoint, dtype=resolve_dtype(config.dtype, checkpoint))
        original = [
            batch
            for part in (input_ids[~held], input_ids[held])
            for batch in embed_all(model, part, config.batch_tokens)
        ]
        compact = [Batch(batch.input_ids, batch.hidden, batch.arguments) for batch in original]
        return cls(model, original, compact, torch.cat([mask[~held], mask[held]]), int((~held).sum()))


def held_back(batches: list[Batch], judge: Judge) -> list[Batch]:
    """The batches of the sequences that are held back."""
    held, rows = [], 0
    for batch in batches:
        if rows >= judge.first:
            held.append(batch)
        rows += batch.input_ids.numel()
    return held


def run(model: StreamedModel, index: int, layer: nn.Module, batches: list[Batch]) -> torch.Tensor:
    """Hidden states [T, H] of all batches after decoder layer `index`; the batches stay as they are."""
    return torch.cat([model.run_layer(index, layer, batch).flatten(0, 1) for batch in batches])


def advance(batches: list[Batch], hidden: torch.Tensor) -> None:
    """Give the batches their hidden states [T, H]."""
    parts = hidden.split([batch.input_ids.numel() for batch in batches])
    for batch, part in zip(batches, parts, strict=True):
        batch.hidden = part.view_as(batch.hidden)
