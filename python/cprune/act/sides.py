"""The original and the compact model side by side: the same sequences go through both, one layer in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from cprune.act.least_squares import Judge, judges
from cprune.checkpoint import Checkpoint
from cprune.config import PruneConfig
from cprune.memory import return_memory
from cprune.repaired import Passed
from cprune.stream import Batch, StreamedModel, counted, embed_all, resolve_dtype


@dataclass(frozen=True)
class Sides:
    """The sequences that are fitted come first, and fill whole batches; then those held back, which judge."""

    model: StreamedModel
    original: list[Batch]
    compact: list[Batch]
    mask: torch.Tensor  # [N, S] bool: the tokens that count, in the order of the batches
    fitted: int  # sequences
    first: int  # the decoder layer that comes next

    @classmethod
    def start(
        cls,
        checkpoint: Checkpoint,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        config: PruneConfig,
        passed: Passed | None = None,
    ) -> Sides:
        """Embed sequences [N, S] int64, at least two, of which mask [N, S] bool tells the padding.

        Args:
            passed: where an earlier walk over the same sequences stopped; the new one goes on there.
        """
        mask = counted(mask, skip_first=config.skip_first)
        held = judges(len(mask))
        model = StreamedModel(checkpoint, dtype=resolve_dtype(config.dtype, checkpoint))
        original = [
            batch
            for part in (input_ids[~held], input_ids[held])
            for batch in embed_all(model, part, config.batch_tokens)
        ]
        compact = [Batch(batch.input_ids, batch.hidden, batch.arguments) for batch in original]
        first = 0
        if passed is not None:
            advance(original, passed.hidden["original"])
            advance(compact, passed.hidden["compact"])
            first = 1 + next(moe.index for moe in checkpoint.moe_layers if moe.name == passed.layer)
        return cls(model, original, compact, torch.cat([mask[~held], mask[held]]), int((~held).sum()), first)

    def layers(self, name: str) -> Iterable[int]:
        """The decoder layers that are to come, by number, with a progress bar of that name."""
        depth = len(self.model.layers)
        return tqdm(range(self.first, depth), initial=self.first, total=depth, desc=name, unit="layer", disable=None)

    def passed(self, layer: str) -> Passed:
        """Where the walk is now, after the MoE block `layer`."""
        sides = {"original": self.original, "compact": self.compact}
        return Passed(layer, {name: torch.cat([b.hidden.flatten(0, 1) for b in side]) for name, side in sides.items()})


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
    hidden = torch.cat([model.run_layer(index, layer, batch).flatten(0, 1) for batch in batches])
    return_memory()  # or what the layer has freed adds to the peak of the fit that follows
    return hidden


def advance(batches: list[Batch], hidden: torch.Tensor) -> None:
    """Give the batches their hidden states [T, H]."""
    parts = hidden.split([batch.input_ids.numel() for batch in batches])
    for batch, part in zip(batches, parts, strict=True):
        batch.hidden = part.view_as(batch.hidden)
