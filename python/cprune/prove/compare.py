"""compare: many selections of experts on one text, with one decoder layer in memory, and how sure the differences are.

Every plan is evaluated as the original with its dropped experts masked out of the routers, which is what the compact
model computes (`verify`), so nothing is written. All plans walk the layers together: a layer is read once for all, and
plans that have dropped the same experts so far share their hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn
from tqdm import tqdm

from cprune import hf
from cprune.checkpoint import Checkpoint
from cprune.errors import CpruneError
from cprune.plan import PrunePlan
from cprune.prove.evaluate import summed_losses
from cprune.stream import StreamedModel, embed_all

DRAWS = 1000  # of the bootstrap
LEVEL = 0.95  # share of the draws that an interval holds
FEW = 8  # documents of a domain, below which it is drawn by rows: two or three documents would say that nothing is sure

Dropped = tuple[int, ...]


@dataclass(frozen=True)
class Units:
    """What the bootstrap draws: the documents of the text, or the rows of a domain that has few of them."""

    of_token: torch.Tensor  # [N, S] int64 in [0, U)
    tokens: torch.Tensor  # [U] int64: predicted ones
    domain: tuple[str, ...]  # [U]

    @classmethod
    def of(cls, mask: torch.Tensor, domains: Sequence[str], document: torch.Tensor | None = None) -> Units:
        """
        Args:
            mask: [N, S] bool, False on padding. domains: of every sequence.
            document: [N, S] int64, which document a token is of; left out, all is drawn by rows.
        """
        of_token = torch.zeros(mask.shape, dtype=torch.int64)
        names: list[str] = []
        rows_of: dict[str, list[int]] = {}
        for row, domain in enumerate(domains):
            rows_of.setdefault(domain, []).append(row)
        for domain, rows in rows_of.items():
            own = torch.arange(len(rows)).unsqueeze(1).expand(len(rows), mask.shape[1])
            if document is not None:
                found, numbered = document[rows].unique(return_inverse=True)
                own = numbered if len(found) >= FEW else own
            of_token[rows] = own + len(names)
            names += [domain] * (int(own.max()) + 1)
        tokens = torch.bincount(of_token[:, 1:][mask[:, 1:]], minlength=len(names))
        return cls(of_token, tokens, tuple(names))


@torch.inference_mode()
def masked_losses(
    checkpoint: Checkpoint,
    plans: Sequence[PrunePlan | None],
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    units: Units,
    *,
    dtype: torch.dtype,
    batch_tokens: int,
) -> torch.Tensor:
    """Negative log likelihood [P, U] float64, in nats, of each unit under each plan; None is the whole model.

    Args:
        input_ids: [N, S] int64. mask: [N, S] bool, False on padding (on the right).
    Holds the hidden states of all sequences once for every different plan. Raises CpruneError where a weight is missing
    or the logits are not finite.
    """
    model = StreamedModel(checkpoint, dtype=dtype)
    batches = embed_all(model, input_ids, batch_tokens)
    dropped = [_dropped(plan) for plan in plans]
    paths: list[tuple[Dropped, ...]] = [() for _ in plans]  # what each plan has dropped so far, layer by layer
    states = {(): [batch.hidden for batch in batches]}
    bar = tqdm(range(len(model.layers)), desc="compare", unit="layer", disable=None)
    for index in bar:
        moe = model.moe_layer(index)
        after: dict[tuple[Dropped, ...], list[torch.Tensor]] = {}
        with model.layer(index) as layer:
            for place, path in enumerate(paths):
                gone = () if moe is None else dropped[place].get(moe.name, ())
                paths[place] = (*path, gone)
                if paths[place] in after:
                    continue
                with _masked(layer, gone):
                    after[paths[place]] = [
                        model.run_layer(index, layer, replace(batch, hidden=hidden))
                        for batch, hidden in zip(batches, states[path], strict=True)
                    ]
        states = after
    losses = {}
    for path, hiddens in states.items():
        done = [replace(batch, hidden=hidden) for batch, hidden in zip(batches, hiddens, strict=True)]
        losses[path] = summed_losses(model, done, mask, units.of_token)
    return torch.stack([losses[path] for path in paths])


def _dropped(plan: PrunePlan | None) -> Mapping[str, Dropped]:
    return {} if plan is None else {layer.layer: layer.dropped for layer in plan.layers}


def _masked(layer: nn.Module, dropped: Dropped) -> AbstractContextManager[None]:
    return hf.masked_router(layer, torch.tensor(dropped)) if dropped else nullcontext()


@dataclass(frozen=True)
class Estimate:
    """A number and the interval that holds 95 % of its bootstrap draws."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Quality:
    """Perplexity under a plan: mean over the domains, each counting the same."""

    perplexity: Estimate
    increase: Estimate  # over the whole model, on the same draws, as a share: 0.1 is ten per cent
    by_domain: dict[str, float]


def bootstrap(losses: torch.Tensor, units: Units, *, seed: int, draws: int = DRAWS) -> list[Quality]:
    """The quality under each plan from the losses [P, U] of `masked_losses`, whose first row is the whole model.

    A draw takes from every domain as many units as it has, with replacement, the same for all plans; so increases are
    compared on the same text. Raises CpruneError where no unit has a token to predict.
    """
    tokens = units.tokens.double()
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, torch.Tensor] = {}  # [P] by domain
    drawn = []  # [P, draws] by domain
    for domain in dict.fromkeys(units.domain):
        rows = torch.tensor([name == domain for name in units.domain]) & (tokens > 0)
        if not bool(rows.any()):
            continue
        own, count = losses[:, rows], tokens[rows]
        picks = torch.randint(0, len(count), (draws, len(count)), generator=generator)
        values[domain] = (own.sum(1) / count.sum()).exp()
        drawn.append((own[:, picks].sum(2) / count[picks].sum(1)).exp())
    if not drawn:
        raise CpruneError("the evaluation text must have tokens to predict, got none")
    mean, means = torch.stack(list(values.values())).mean(0), torch.stack(drawn).mean(0)
    return [
        Quality(
            perplexity=_estimate(float(mean[place]), means[place]),
            increase=_estimate(float(mean[place] / mean[0]) - 1.0, means[place] / means[0] - 1.0),
            by_domain={domain: float(value[place]) for domain, value in values.items()},
        )
        for place in range(len(losses))
    ]


def _estimate(value: float, draws: torch.Tensor) -> Estimate:
    edge = (1.0 - LEVEL) / 2
    low, high = torch.quantile(draws, torch.tensor([edge, 1.0 - edge], dtype=draws.dtype)).tolist()
    return Estimate(value, low, high) if math.isfinite(value) else Estimate(value, value, value)
