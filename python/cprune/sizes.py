"""What a run will need of the disk, before it begins."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cprune.checkpoint import Checkpoint
from cprune.config import PruneConfig
from cprune.stream import down_names


def stats_bytes(checkpoint: Checkpoint, config: PruneConfig) -> int:
    """Bytes of the statistics, about: outputs on sequence means, mean outputs, matrices over pairs of experts."""
    total = 0
    for layer in checkpoint.moe_layers:
        hidden = max(checkpoint.tensors[name].shape[-1] for name, _ in layer.router.values())
        total += layer.num_experts * (hidden * (2 * config.sample_sequences + 8) + 64 * layer.num_experts)
    return total


def refit_bytes(checkpoint: Checkpoint, share: float, *, whole: bool) -> int:
    """Bytes of what a repair or a merge changes, about: the kept experts, or their down projections only."""
    layers = checkpoint.moe_layers
    names = [name for layer in layers for name in (layer.expert_tensors() if whole else down_names(layer))]
    return int(sum(checkpoint.tensors[name].nbytes for name in names) * (1.0 - share))


def distill_bytes(checkpoint: Checkpoint, share: float, trained: Sequence[str]) -> int:
    """Bytes that a training keeps until it is done, about: the student, its state, twice the trained tensors.

    Args:
        trained: names of what is trained, of all experts.
    """
    elements = sum(math.prod(checkpoint.tensors[name].shape) for name in trained)
    written = sum(checkpoint.tensors[name].nbytes for name in trained)
    return compact_bytes(checkpoint, share) + int((3 * 4 * elements + 2 * written) * (1.0 - share))


def compact_bytes(checkpoint: Checkpoint, share: float) -> int:
    """Bytes of the output, about."""
    experts = sum(checkpoint.tensors[name].nbytes for layer in checkpoint.moe_layers for name in layer.expert_tensors())
    return int(checkpoint.nbytes - experts * share)
