"""Whether a training fits in memory: estimated before it begins, since it would otherwise end in a killed process."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import get_max_memory

from cprune import hf
from cprune.act.distill_steps import SEQUENCES
from cprune.act.distill_tensors import trained_names
from cprune.checkpoint import Checkpoint, MoELayer
from cprune.config import PruneConfig
from cprune.errors import CpruneError
from cprune.stream import resolve_dtype

log = logging.getLogger(__name__)

OF_TRAINED = 4 * 4  # bytes per parameter, in float32: master, gradient, Adam's two moments
OF_LOGITS = 5 * 4  # bytes per logit: both models' and the gradient, in float32, and what making them takes
SPARE = 0.1  # of what is available: never asked for


def whole_or_layers(
    checkpoint: Checkpoint, compact: Checkpoint, config: PruneConfig, shape: tuple[int, int], device: torch.device
) -> bool:
    """True where the whole student can be trained in the memory that is available, False where layer by layer can.

    Args:
        shape: sequences and tokens of each.
    Raises CpruneError where neither can.
    """
    room = int(available(device) * (1.0 - SPARE))
    whole = whole_bytes(checkpoint, compact, config, shape)
    if whole <= room:
        log.info("training the whole model, which needs about %.2f GB of %.2f GB", whole / 1e9, room / 1e9)
        return True
    layers = layers_bytes(checkpoint, compact, config, shape)
    _check(layers, room)
    log.info(
        "training layer by layer (%.2f GB): the whole model needs about %.2f GB, and %.2f GB are available",
        *(nbytes / 1e9 for nbytes in (layers, whole, room)),
    )
    return False


def check_memory(checkpoint: Checkpoint, config: PruneConfig, shape: tuple[int, int], share: float) -> None:
    """Raise CpruneError, before any work, where not even layer by layer could be trained, as far as can be said then.

    Args:
        shape: sequences and tokens of each.
        share: of the experts that will be removed.
    """
    room = int(available(Accelerator().device) * (1.0 - SPARE))
    _check(layers_bytes(checkpoint, checkpoint, config, shape, left=1.0 - share), room)


def _check(layers: int, room: int) -> None:
    if layers > room:
        raise CpruneError(
            f"--distill needs about {layers / 1e9:.2f} GB of memory even layer by layer, got {room / 1e9:.2f} GB "
            "(fewer --tokens need less)"
        )


def available(device: torch.device) -> int:
    """Bytes that can be had on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(get_max_memory()["cpu"])


def whole_bytes(checkpoint: Checkpoint, compact: Checkpoint, config: PruneConfig, shape: tuple[int, int]) -> int:
    """Of training the whole student: it, its training, the original's last hidden states, one batch on its way."""
    item, text = resolve_dtype(config.dtype, checkpoint).itemsize, hf.read_config(compact).get_text_config()
    trunk = [moe for moe in compact.moe_layers if moe.trunk]
    student = _elements(compact, compact.tensors) * item
    sequences = (
        config.steps * SEQUENCES + shape[0]
    )  # the teacher's answers to all that is trained on, and to the judges
    hidden = sequences * shape[1] * text.hidden_size * item
    tokens = batch_tokens(config, shape[1])
    batch = tokens * (text.vocab_size * OF_LOGITS + text.num_hidden_layers * _activations(compact, trunk, item))
    trained = sum(_trained(compact, moe, config) for moe in trunk)
    return student + trained + max(hidden + batch, _walk_bytes(checkpoint, item) + 2 * hidden)


def layers_bytes(
    checkpoint: Checkpoint, compact: Checkpoint, config: PruneConfig, shape: tuple[int, int], left: float = 1.0
) -> int:
    """Of training a layer at a time: both models' layer, its training, the hidden states of both and of the untrained
    student, before and after the layer, and one batch on its way. Of `compact`, the share `left` counts."""
    item, text = resolve_dtype(config.dtype, checkpoint).itemsize, hf.read_config(compact).get_text_config()
    trunk = [moe for moe in compact.moe_layers if moe.trunk]
    hidden = math.prod(shape) * text.hidden_size * item
    batch = batch_tokens(config, shape[1]) * _activations(compact, trunk, item)
    logits = shape[1] * text.vocab_size * OF_LOGITS
    trained = max(_trained(compact, moe, config) for moe in trunk)
    student = _walk_bytes(compact, item) + trained
    return _walk_bytes(checkpoint, item) + int(left * student) + 5 * hidden + max(batch, logits)


def batch_tokens(config: PruneConfig, seq_len: int) -> int:
    """Tokens that go through the student at a time: whole sequences, of one step."""
    return min(SEQUENCES, max(1, config.batch_tokens // seq_len)) * seq_len


def _trained(compact: Checkpoint, moe: MoELayer, config: PruneConfig) -> int:
    """What training a layer takes besides its weights: and the best weights so far, and those being judged."""
    names = trained_names(moe, config.distill)
    return _elements(compact, names) * OF_TRAINED + 2 * sum(compact.tensors[name].nbytes for name in names)


def _walk_bytes(checkpoint: Checkpoint, item: int) -> int:
    """A streamed model: all that is outside the decoder layers, and the largest of those."""
    sizes: dict[str, int] = {}
    for name, info in checkpoint.tensors.items():
        parts = name.split(".")
        at = parts.index("layers") + 1 if "layers" in parts else 0
        layer = parts[at] if at and at < len(parts) and parts[at].isdigit() else ""
        sizes[layer] = sizes.get(layer, 0) + math.prod(info.shape) * item
    return sizes.pop("", 0) + max(sizes.values(), default=0)


def _activations(compact: Checkpoint, trunk: list[MoELayer], item: int) -> int:
    """Bytes per token that a layer keeps for its gradient, about: sixteen hidden states and, of each of top-k experts,
    four intermediate and two hidden ones."""
    hidden = hf.read_config(compact).get_text_config().hidden_size
    intermediate = max(_elements(compact, moe.expert_tensors()) // (moe.num_experts * 3 * hidden) for moe in trunk)
    return item * (16 * hidden + compact.architecture.top_k * (4 * intermediate + 2 * hidden))


def _elements(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    return sum(math.prod(checkpoint.tensors[name].shape) for name in names)
