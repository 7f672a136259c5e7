"""evaluate: perplexity by domain and a generation smoke test, with one decoder layer in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from cprune.checkpoint import Checkpoint
from cprune.checkpoint.scan import all_finite
from cprune.errors import CpruneError
from cprune.memory import return_memory
from cprune.stream import Batch, StreamedModel, embed_all


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log likelihood per predicted token, in nats."""

    by_domain: dict[str, float]
    tokens: dict[str, int]  # predicted tokens by domain

    @property
    def mean(self) -> float:
        """Mean over the domains, each counting the same."""
        return self.mean_of(self.by_domain)

    def mean_of(self, domains: Collection[str]) -> float:
        """Mean over some of the domains, each counting the same."""
        return sum(self.by_domain[name] for name in domains) / len(domains)

    @property
    def token_weighted(self) -> float:
        """Perplexity over all tokens together."""
        total = sum(self.tokens.values())
        return math.exp(sum(math.log(value) * self.tokens[name] for name, value in self.by_domain.items()) / total)


@torch.inference_mode()
def perplexity(
    checkpoint: Checkpoint,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    domains: tuple[str, ...],
    *,
    dtype: torch.dtype,
    batch_tokens: int,
) -> Perplexity:
    """Perplexity of sequences [N, S], token-weighted inside each domain.

    Args:
        mask: [N, S] bool, False on padding (on the right).
        domains: one per sequence.
    Raises CpruneError where a weight is missing or the logits are not finite.
    """
    model = StreamedModel(checkpoint, dtype=dtype)
    batches = embed_all(model, input_ids, batch_tokens)
    for _ in tqdm(model.walk(batches), total=len(model.layers), desc="evaluate", unit="layer", disable=None):
        return_memory()  # or what a repair has left behind adds to the peak
    rows = torch.arange(len(mask)).unsqueeze(1).expand(mask.shape)
    return by_domain(summed_losses(model, batches, mask, rows), mask[:, 1:].sum(1), domains)


def summed_losses(
    model: StreamedModel, batches: Sequence[Batch], mask: torch.Tensor, units: torch.Tensor
) -> torch.Tensor:
    """Negative log likelihood [U] float64, in nats, of each unit's tokens, from batches that have passed all layers.

    Args:
        mask: [N, S] bool, False on padding.
        units: [N, S] int64 in [0, U): what a token is of. The first of a sequence is not predicted.
    Raises CpruneError where the logits are not finite.
    """
    losses = torch.zeros(int(units.max()) + 1, dtype=torch.float64)
    number = 0
    for batch in batches:
        for row in range(len(batch.input_ids)):
            one, counts = slice(row, row + 1), mask[number]
            of_tokens = model.next_token_losses(batch.hidden[one], batch.input_ids[one], counts).double().cpu()
            losses.index_add_(0, units[number, 1:][counts[1:]], of_tokens)
            number += 1
    if not all_finite(losses):
        raise CpruneError(f"logits must be finite, got NaN or infinity from {model.checkpoint.folder}")
    return losses


def by_domain(losses: torch.Tensor, predicted: torch.Tensor, domains: Sequence[str]) -> Perplexity:
    """Perplexity from the losses [U] of sequences or documents with `predicted` [U] tokens, token-weighted in each."""
    loss: dict[str, float] = dict.fromkeys(domains, 0.0)
    count: dict[str, int] = dict.fromkeys(domains, 0)
    for domain, nll, tokens in zip(domains, losses.tolist(), predicted.int().tolist(), strict=True):
        loss[domain] += nll
        count[domain] += tokens
    names = [name for name in loss if count[name]]
    values = {name: float(torch.tensor(loss[name] / count[name], dtype=torch.float64).exp()) for name in names}
    return Perplexity(values, {name: count[name] for name in names})


@torch.inference_mode()
def generate(checkpoint: Checkpoint, prompt: torch.Tensor, *, new_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Greedy continuation [new_tokens] int64 of a prompt [S] int64: does the model speak at all?

    Every token is one walk through the layers, so this is for a few tokens of any model, not for serving.
    """
    model = StreamedModel(checkpoint, dtype=dtype)
    tokens = prompt.reshape(1, -1)
    for _ in range(new_tokens):
        batches = embed_all(model, tokens, tokens.numel())
        for _ in model.walk(batches):
            pass
        logits = model.logits(batches[0], 0)[-1]
        if not all_finite(logits):
            raise CpruneError(f"logits must be finite, got NaN or infinity from {checkpoint.folder}")
        tokens = torch.cat([tokens, logits.argmax().reshape(1, 1).cpu()], dim=1)
    return tokens[0, prompt.numel() :]
