"""Checkpoints on disk: names, shapes and shards in; whole-or-absent folders out."""

from cprune.checkpoint.families import Architecture, MoELayer
from cprune.checkpoint.reader import Checkpoint, TensorInfo, open_checkpoint

__all__ = ["Architecture", "Checkpoint", "MoELayer", "TensorInfo", "open_checkpoint"]
