"""verify: the compact model on disk equals the original with the dropped experts masked out of its routers.

Where a repair, a merge or a training wrote other tensors than the original's, known by their digest, the original is
given them, and the routing of a merge, so that all else is compared as it is elsewhere.
Both models run in float32, one decoder layer in memory at a time. Each layer of the compact model is given the hidden
states of the masked original and must return the same; so must the embedding and the head. By induction over the layers
the logits agree, and a fault is named by its layer instead of drowning in later ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from cprune import hf
from cprune.checkpoint import Checkpoint, MoELayer
from cprune.errors import CpruneError
from cprune.memory import return_memory
from cprune.merged import changed_names, compact_routing, novices_name, put_tensors
from cprune.plan import LayerPlan, PrunePlan
from cprune.repaired import NOVICES, LayerRepair, digest
from cprune.stream import StreamedModel, embed_all

# float32 has 2^-24 of relative rounding error per operation. A layer is a chain of products with inner lengths up to
# some ten thousands, whose order of summation may differ between E and C experts: sqrt(2^16) roundings of 2^-24, and
# 2^4 for the few such products in a row and for cancellation.
RELATIVE_BUDGET = 2.0**-12
# A router may choose differently between two experts whose logits agree to rounding: a tie, not a fault. Wrong experts
# cannot hide among the ties, since the weights of all kept experts are compared too.
TIED_SHARE = 1.0 / 128


@dataclass(frozen=True)
class VerifyReport:
    """The outcome of a comparison."""

    layers: int
    positions: int  # tokens compared in every layer
    max_error: float  # largest |difference| of a position over the largest |value| of the reference, ties left out
    ties: int  # positions, over all layers, where the routers chose differently between equal logits
    logits_error: float  # the same measure for the logits, from equal final hidden states
    repaired: int = 0  # layers compared with what their repair wrote
    merged: int = 0  # layers compared with what their merge wrote
    distilled: int = 0  # layers compared with what their training wrote, and a repair or merge before it


@torch.inference_mode()
def verify(
    original: Checkpoint,
    compact: Checkpoint,
    plan: PrunePlan,
    input_ids: torch.Tensor,
    changed: Mapping[str, LayerRepair] | None = None,
) -> VerifyReport:
    """Compare the two checkpoints layer by layer.

    Args:
        plan: what was kept; dropped experts are masked to -inf in the original's routers.
        input_ids: [N, S] int64 tokens.
        changed: layers that hold tensors other than the original's, {name: record}. The original is given them, in the
            places of the kept experts, and routes to them as the record says.
    Raises CpruneError, naming the layer, where they differ by more than float32 rounding.
    """
    changed = changed or {}
    memory: dict[str, torch.Tensor] = {}  # one layer of one of the two models at a time
    reference = StreamedModel(original, dtype=torch.float32, memory=memory)
    candidate = StreamedModel(compact, dtype=torch.float32, memory=memory)
    if len(reference.layers) != len(candidate.layers):
        raise CpruneError(
            f"the compact model must have {len(reference.layers)} decoder layers, got {len(candidate.layers)}"
        )
    batches = embed_all(reference, input_ids, batch_tokens=input_ids.numel())
    own = embed_all(candidate, input_ids, batch_tokens=input_ids.numel())
    batch, other = batches[0], own[0]
    worst, ties = _compare("the embedding", batch.hidden, other.hidden, may_tie=False)
    for index in tqdm(range(len(reference.layers)), desc="verify", unit="layer", disable=None):
        moe = reference.moe_layer(index)
        return_memory()
        with reference.layer(index) as layer:
            record, novices = changed.get(moe.name) if moe is not None else None, None
            if record is not None:
                _put_written(layer, compact, moe, plan[moe.name], record)
                novices = compact.read(novices_name(moe)).float() if record.router == NOVICES else None
            marks = _expert_marks(layer)
            if moe is None:
                expected = reference.run_layer(index, layer, batch)
            else:
                mapped = record.mapped if record is not None else ()
                with compact_routing(layer, plan[moe.name], mapped, novices):
                    expected = reference.run_layer(index, layer, batch)
        other.hidden = batch.hidden
        return_memory()
        with candidate.layer(index) as layer:
            if moe is not None:
                _compare_experts(moe.name, plan[moe.name].kept, marks, _expert_marks(layer))
            got = candidate.run_layer(index, layer, other)
        error, tied = _compare(f"decoder layer {index}", expected - batch.hidden, got - batch.hidden, moe is not None)
        worst, ties = max(worst, error), ties + tied
        batch.hidden = expected
    other.hidden = batch.hidden
    logits_error = 0.0
    for row in range(len(input_ids)):
        error, _ = _compare("the logits", reference.logits(batch, row), candidate.logits(other, row), may_tie=False)
        logits_error = max(logits_error, error)
    made = [record.maker for record in changed.values()]
    counts = (made.count(maker) for maker in ("repair", "merge", "training"))
    return VerifyReport(len(reference.layers), input_ids.numel(), worst, ties, logits_error, *counts)


def _put_written(layer: nn.Module, compact: Checkpoint, moe: MoELayer, plan: LayerPlan, record: LayerRepair) -> None:
    """Give the original's layer the changed tensors of the output, one in memory at a time.

    CpruneError where they are not those that were written.
    """

    def put(name: str) -> torch.Tensor:
        tensor = compact.read(name)
        put_tensors(layer, moe, plan, {name: tensor})
        return tensor

    names = changed_names(moe, plan, record)
    if names and digest(map(put, names)) != record.digest:
        raise CpruneError(f"{moe.name} must hold the tensors that its {record.maker} wrote, got others in {names[0]}")


def _expert_marks(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Row sums [E, ...] float32 of every parameter of the experts: small, and other where a weight is other."""
    experts = hf.find_experts(layer)
    return {} if experts is None else {name: p.sum(-1) for name, p in experts.named_parameters()}


def _compare_experts(
    layer: str, kept: Sequence[int], expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]
) -> None:
    """CpruneError where an expert of the compact layer is not the one that the plan keeps in its place."""
    for name, marks in expected.items():
        for place, expert in enumerate(kept):
            if not torch.equal(marks[expert], got[name][place]):
                raise CpruneError(
                    f"{layer} must keep expert {expert} as it is in the original, got other values in {name} {place}"
                )


def verification_tokens(
    vocab_size: int, text: torch.Tensor | None, *, seed: int, rows: int = 4, length: int = 64
) -> torch.Tensor:
    """[N, length] int64: `rows` sequences of random tokens, and up to `rows` of real text [*, S] where given."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (rows, length), generator=generator)
    if text is None:
        return tokens
    length = min(length, text.shape[1])
    return torch.cat([tokens[:, :length], text[:rows, :length]])


def _compare(what: str, expected: torch.Tensor, got: torch.Tensor, may_tie: bool) -> tuple[float, int]:
    """(largest relative error, tied positions) of [..., D] tensors; CpruneError beyond the budget."""
    if expected.shape != got.shape:
        raise CpruneError(f"{what} must give {list(expected.shape)} values, got {list(got.shape)}")
    error = (expected - got).abs().amax(-1).flatten() / expected.abs().max().clamp_min(1e-30)
    beyond = ~(error <= RELATIVE_BUDGET)  # NaN counts as beyond
    allowed = int(len(error) * TIED_SHARE) if may_tie else 0
    if int(beyond.sum()) > allowed:
        raise CpruneError(
            f"the compact model must equal the masked original up to rounding, got a relative difference of "
            f"{float(error.nan_to_num(nan=torch.inf).max()):.2g} after {what} "
            f"({int(beyond.sum())} of {len(error)} positions)"
        )
    return float(error[~beyond].max()) if not bool(beyond.all()) else 0.0, int(beyond.sum())
