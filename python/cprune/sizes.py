"""What a run will need of the disk, before it begins."""

from __future__ import annotations

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


def refit_bytes(checkpoint: Checkpoint, share: float, *, merging: bool) -> int:
    """Bytes of what a repair changes, the kept experts' down projections, or of what a merge may, about."""
    layers = checkpoint.moe_layers
    names = [name for layer in layers for name in (layer.expert_tensors() if merging else down_names(layer))]
    return int(sum(checkpoint.tensors[name].nbytes for name in names) * (1.0 - share))


def compact_bytes(checkpoint: Checkpoint, share: float) -> int:
    """Bytes of the output, about."""
    experts = sum(checkpoint.tensors[name].nbytes for layer in checkpoint.moe_layers for name in layer.expert_tensors())
    return int(checkpoint.nbytes - experts * share)
