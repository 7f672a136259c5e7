"""Distillation with one decoder layer of either model in memory, for students that do not fit in it.

Every MoE layer of the student, given what the trained layers before it give, is trained towards the original's hidden
states after that layer: squared error, tokens of massive norm weighted down as in repair (`least_squares.Judge`). A
layer that comes no closer to them on the text held back stays as it is; and where all that was trained does not bring
KL(original || student) down there, which no layer can see, nothing of it is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from cprune import hf
from cprune.act.distill_memory import batch_tokens
from cprune.act.distill_steps import Text, Training
from cprune.act.distill_tensors import Shelf, trained_dtype, trained_parameters
from cprune.act.least_squares import Judge
from cprune.checkpoint import MoELayer
from cprune.config import PruneConfig
from cprune.repaired import Distillation
from cprune.stream import Batch, StreamedModel, embed_all, resolve_dtype

log = logging.getLogger(__name__)


def distill_layers(shelf: Shelf, text: Text, config: PruneConfig, accelerator: Accelerator) -> Distillation:
    """Train layer by layer and put the layers on the shelf; those that are there already are not trained again."""
    walk = _Walk(shelf, text, config, accelerator)
    for index in tqdm(range(len(walk.student.layers)), desc="distill", unit="layer", disable=None):
        walk.layer(index)
    before, after = (walk.divergence(batches) for batches in (walk.untrained, walk.trained))
    digests = {name: digest for name, digest in shelf.digests.items() if digest}
    if not after < before:
        log.info("nothing trained is kept: KL on held-back text %.5f -> %.5f", before, after)
        after, digests = before, {}
    return Distillation(config.distill, config.steps, False, before, after, digests=digests)


class _Walk:
    """The original, the student as it was and the student as it is trained, side by side."""

    def __init__(self, shelf: Shelf, text: Text, config: PruneConfig, accelerator: Accelerator) -> None:
        dtype = resolve_dtype(config.dtype, shelf.checkpoint)
        memory: dict[str, torch.Tensor] = {}  # never a layer of both at the same time
        self.shelf, self.text, self.config, self.accelerator = shelf, text, config, accelerator
        self.teacher, self.student = (
            StreamedModel(checkpoint, dtype=dtype, device=accelerator.device, memory=memory)
            for checkpoint in (shelf.checkpoint, shelf.compact)
        )
        self.fitted = text.order.unique()
        self.original = [
            batch
            for rows in (self.fitted, text.held)
            for batch in embed_all(self.teacher, text.input_ids[rows], config.batch_tokens)
        ]
        self.untrained, self.trained = (
            [Batch(batch.input_ids, batch.hidden, batch.arguments) for batch in self.original] for _ in range(2)
        )
        self.places = {int(row): place for place, row in enumerate(torch.cat([self.fitted, text.held]))}
        self.mask = text.mask[torch.cat([self.fitted, text.held])].to(accelerator.device)
        self.touched = False  # whether a layer so far was trained to any avail

    def layer(self, index: int) -> None:
        """Pass all batches through decoder layer `index`, trained in between."""
        with self.teacher.layer(index) as layer:
            self._advance(self.teacher, index, layer, self.original)
        with self.student.layer(index) as layer:
            moe, given = self.student.moe_layer(index), torch.cat([batch.hidden for batch in self.trained])
            self._advance(self.student, index, layer, self.untrained)
            if moe is None:
                training = None
            elif moe.name in self.shelf.digests:
                training = None
                self.shelf.take(moe, layer)
            else:
                training = self._train(index, layer, moe, given)
            changed = moe is not None and (training.best_step > 0 if training else bool(self.shelf.digests[moe.name]))
            self.touched |= changed
            if self.touched:
                self._advance(self.student, index, layer, self.trained)
            else:
                for batch, plain in zip(self.trained, self.untrained, strict=True):
                    batch.hidden = plain.hidden
            if moe is not None and training is not None:
                training.as_written()
                self.shelf.put(moe, layer if changed else None)

    def divergence(self, batches: list[Batch]) -> float:
        """KL(original || student) on the text held back, nats per token, when all have passed all layers."""
        total, place = 0.0, 0
        for original, batch in zip(self.original, batches, strict=True):
            for row in range(len(batch.input_ids)):
                if place >= len(self.fitted):
                    counts = self.mask[place]
                    expected, got = (
                        self.student.logits(side, row)[counts].float().log_softmax(-1) for side in (original, batch)
                    )
                    total += float(F.kl_div(got, expected, reduction="sum", log_target=True))
                place += 1
        return total / self.text.tokens(self.text.held)

    def _train(self, index: int, layer: nn.Module, moe: MoELayer, given: torch.Tensor) -> Training:
        """Train one layer of the student, which gets hidden states `given` [N, S, H]."""
        expected = torch.cat([batch.hidden for batch in self.original])
        judge = Judge(expected.flatten(0, 1), self.mask, len(self.fitted))
        weight = (judge.weight * judge.counts).view(self.mask.shape)
        layer.requires_grad_(False)
        parameters = trained_parameters(layer, self.config.distill)
        on_disk = dict.fromkeys(parameters, trained_dtype(self.shelf.compact, moe, self.config.distill))
        seq_len = self.text.input_ids.shape[1]

        def residual(rows: torch.Tensor) -> torch.Tensor:
            """Weighted difference [B, S, H] after the layer, of sequences `rows`; 0 where a token does not count."""
            places = torch.tensor([self.places[int(row)] for row in rows])
            batch = self.student.embed(self.text.input_ids[rows])
            args, kwargs = batch.arguments[index]
            out = layer(given[places].clone(), *args, **kwargs)
            out = out[0] if isinstance(out, tuple) else out
            return (out.float() - expected[places].float()) * weight[places].unsqueeze(-1)

        def backward(step: int) -> None:
            rows = self.text.rows_of_step(step)
            for part in rows.split(batch_tokens(self.config, seq_len) // seq_len):
                self.accelerator.backward(residual(part).square().sum() / self.text.tokens(rows))

        @torch.no_grad()
        def error() -> float:
            parts = self.text.held.split(batch_tokens(self.config, seq_len) // seq_len)
            return judge.relative(sum(float(residual(part).double().square().sum()) for part in parts))

        training = Training(parameters, on_disk, steps=self.config.steps, accelerator=self.accelerator)
        with _eager(hf.find_experts(layer).config):
            for _ in training.run(backward, error):
                pass
        log.info("%s: %.2f%% -> %.2f%% off", moe.name, 100 * training.untrained, 100 * training.least)
        return training

    def _advance(self, model: StreamedModel, index: int, layer: nn.Module, batches: list[Batch]) -> None:
        for batch in batches:
            batch.hidden = model.run_layer(index, layer, batch)


@contextmanager
def _eager(config: Any) -> Iterator[None]:
    """Within the context experts run as the model has them: the implementation that observes is not for gradients."""
    before, config._experts_implementation = config._experts_implementation, "eager"
    try:
        yield
    finally:
        config._experts_implementation = before
