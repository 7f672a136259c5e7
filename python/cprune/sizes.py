"""What a run will need of the disk, before it begins."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cprune.checkpoint import Checkpoint
from cprune.config import PruneConfig
from cprune.stream import down_names, resolve_dtype


def stats_bytes(checkpoint: Checkpoint, config: PruneConfig) -> int:
    """Bytes of the statistics, about: outputs on sequence means, mean outputs, matrices over pairs of experts."""
    total, hidden = 0, hidden_size(checkpoint)
    for layer in checkpoint.moe_layers:
        total += layer.num_experts * (hidden * (2 * config.sample_sequences + 8) + 64 * layer.num_experts)
    return total


def hidden_size(checkpoint: Checkpoint) -> int:
    """Elements of a hidden state: what a router's rows have."""
    return max(checkpoint.tensors[name].shape[-1] for name, _ in checkpoint.moe_layers[0].router.values())


def hidden_bytes(checkpoint: Checkpoint, config: PruneConfig) -> int:
    """Bytes of the hidden states of all calibration tokens, as a model computes with them."""
    return config.tokens * hidden_size(checkpoint) * resolve_dtype(config.dtype, checkpoint).itemsize


def refit_bytes(checkpoint: Checkpoint, share: float, *, whole: bool) -> int:
    """Bytes of what a repair or a merge changes, about: the kept experts, or their down projections only."""
    layers = checkpoint.moe_layers
    names = [name for layer in layers for name in (layer.expert_tensors() if whole else down_names(layer))]
    return int(sum(checkpoint.tensors[name].nbytes for name in names) * (1.0 - share))


def passed_bytes(checkpoint: Checkpoint, config: PruneConfig) -> int:
    """Bytes of the hidden states that a repair or a merge keeps to go on from: of two models, the last and the next."""
    return 2 * 2 * hidden_bytes(checkpoint, config)


def gradient_bytes(checkpoint: Checkpoint, config: PruneConfig) -> int:
    """Bytes of the hidden states that a backward pass leaves for the way back: those that enter every layer."""
    return checkpoint.architecture.num_layers * hidden_bytes(checkpoint, config)


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
