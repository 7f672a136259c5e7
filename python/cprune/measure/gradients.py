"""How the loss depends on each expert: one backward pass with frozen weights, one decoder layer in memory at a time.

Every routed (token, expert) pair has a mask m = 1 on its gate, so that a layer gives sum_j m g_j f_j. With L the cross
entropy of all next tokens, in nats, the gradient dL/dm of a pair is g <dL/dy, f>, y the layer's output at the token.
Over the tokens t of sequence s that count, A_sj = sum_t dL/dm_tj says what taking a little of expert j away does to
the sequence: the sample of a Fisher information of the masks, sum_s A_sj^2 (2204.09656), and of a first-order Taylor
expansion, sum_s |A_sj| (1906.10771).

The forward pass leaves the hidden states that enter each layer in files; on the way back each layer is filled and run
again, and its files are removed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from cprune import hf
from cprune.checkpoint import Checkpoint
from cprune.checkpoint.scan import all_finite
from cprune.config import PruneConfig
from cprune.errors import CpruneError
from cprune.measure.packing import Sequences
from cprune.stats import ExpertStats
from cprune.stream import Batch, StreamedModel, counted, embed_all, resolve_dtype


def add_mask_gradients(
    checkpoint: Checkpoint,
    sequences: Sequences,
    config: PruneConfig,
    stats: Mapping[str, ExpertStats],
    folder: Path,
) -> dict[str, ExpertStats]:
    """Complete statistics by `mask_gradient_sq` and `mask_gradient_abs`.

    Args:
        stats: of every trunk MoE layer, by name.
        folder: for the hidden states meanwhile, L T H numbers of the compute type; removed at the end.
    Raises CpruneError where the folder cannot be written or a gradient is not finite.
    """
    found = {}
    with closing(mask_gradients(checkpoint, sequences, config, folder)) as walk:
        for name, gradients in walk:
            if not all_finite(gradients):
                raise CpruneError(f"gradients must be finite, got NaN or infinity in {name} (try --dtype float32)")
            squares, sizes = gradients.square().sum(0), gradients.abs().sum(0)
            found[name] = replace(stats[name], mask_gradient_sq=squares, mask_gradient_abs=sizes)
    return {name: found[name] for name in stats}


def mask_gradients(
    checkpoint: Checkpoint, sequences: Sequences, config: PruneConfig, folder: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (layer, A [N, E] float64) of N sequences, the last layer first."""
    model = StreamedModel(checkpoint, dtype=resolve_dtype(config.dtype, checkpoint))
    batches = embed_all(model, sequences.input_ids, config.batch_tokens)
    counts = counted(sequences.mask, skip_first=config.skip_first).split([len(batch.input_ids) for batch in batches])
    try:
        _forward(model, batches, folder)
        towards = _loss_gradients(model, batches, sequences.mask)
        depth = len(model.layers)
        for index in tqdm(range(depth - 1, -1, -1), desc="backward", unit="layer", disable=None):
            entered = load_file(_file(folder, index))
            _file(folder, index).unlink()
            moe, found = model.moe_layer(index), []
            with model.layer(index) as layer:
                for number, batch in enumerate(batches):
                    hidden = entered.pop(str(number)).to(model.device)
                    towards[number], of_masks = _through(layer, batch, index, hidden, towards[number])
                    if moe is not None:
                        found += [_by_sequence(*pairs, counts[number], moe.num_experts) for pairs in of_masks]
            if moe is not None:
                yield moe.name, torch.cat(found)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _file(folder: Path, index: int) -> Path:
    return folder / f"hidden-{index:03d}.safetensors"


def _forward(model: StreamedModel, batches: list[Batch], folder: Path) -> None:
    """Pass the batches through all layers, leaving what enters each of them in a file."""
    walk = tqdm(model.walk(batches), total=len(model.layers), desc="forward", unit="layer", disable=None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for index, _ in walk:
            save_file({str(number): batch.hidden for number, batch in enumerate(batches)}, _file(folder, index))
    except (OSError, SafetensorError) as error:
        raise CpruneError(f"the work folder must be writable, got {folder} ({error})") from error


def _loss_gradients(model: StreamedModel, batches: list[Batch], mask: torch.Tensor) -> list[torch.Tensor]:
    """dL/dh [B, S, H] of each batch's hidden states h after all layers; mask [N, S] bool, False on padding."""
    gradients, number = [], 0
    for batch in batches:
        rows = []
        for row in range(len(batch.input_ids)):
            hidden = batch.hidden[row : row + 1].detach().requires_grad_()
            with torch.enable_grad():
                losses = model.next_token_losses(hidden, batch.input_ids[row : row + 1], mask[number])
            rows += torch.autograd.grad(losses.sum(), hidden)
            number += 1
        gradients.append(torch.cat(rows))
    return gradients


def _through(
    layer: nn.Module, batch: Batch, index: int, hidden: torch.Tensor, towards: torch.Tensor
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Back through one layer: (dL/d hidden [B, S, H], [(experts [T, K], dL/dm [T, K])]), no pair where it is dense.

    Args:
        hidden: [B, S, H] that entered the layer.
        towards: dL/dh [B, S, H] of what left it.
    """
    hidden = hidden.detach().requires_grad_()
    args, kwargs = batch.arguments[index]
    with torch.enable_grad(), _masks(layer) as masks:
        out = layer(hidden, *args, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    gradient, *of_masks = torch.autograd.grad(out, [hidden, *(ones for _, ones in masks)], towards)
    return gradient, [(experts, of_mask) for (experts, _), of_mask in zip(masks, of_masks, strict=True)]


@contextmanager
def _masks(layer: nn.Module) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Within the context the gates of the layer's experts are multiplied by ones: [(experts, ones)], each [T, K]."""
    noted: list[tuple[torch.Tensor, torch.Tensor]] = []

    def masked(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, index, gates = args
        noted.append((index, torch.ones_like(gates).requires_grad_()))
        return hidden, index, gates * noted[-1][1]

    experts = hf.find_experts(layer)
    handle = experts.register_forward_pre_hook(masked) if experts is not None else None
    try:
        yield noted
    finally:
        if handle is not None:
            handle.remove()


def _by_sequence(index: torch.Tensor, gradient: torch.Tensor, mask: torch.Tensor, num: int) -> torch.Tensor:
    """A [B, E] float64 from experts and gradients [T, K] of the B S tokens, of which those of mask [B, S] count."""
    index, gradient = index.cpu().view(len(mask), -1), gradient.double().cpu().view(*mask.shape, -1)
    known = (index >= 0) & (index < num)
    values = (gradient * mask.unsqueeze(2)).view(len(mask), -1) * known
    return torch.zeros(len(mask), num, dtype=torch.float64).scatter_add_(1, index.clamp(0, num - 1), values)
