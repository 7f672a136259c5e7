"""Distillation: the compact model's routers, or its experts, are trained towards what the original says of the text.

The student is the compact model as it would be written, after repair or merge. Trained are the routers alone, rows and
biases (arXiv 2603.02217), or all that the kept experts have; everything else stays as it is. The loss is
KL(original || student) of the next token, averaged over the tokens of the calibration text.

The teacher is never in memory beside the student: the original walks through the text once, one decoder layer at a
time, and leaves its last hidden states; what it would say is what the student's head, which is the original's, makes
of them. Where the student and its training do not fit in memory, they do layer by layer (`distill_layers`).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from cprune import hf
from cprune.act.compact import apply_plan
from cprune.act.distill_layers import distill_layers
from cprune.act.distill_memory import batch_tokens, whole_or_layers
from cprune.act.distill_steps import Text, Training
from cprune.act.distill_tensors import Shelf, trained_dtype, trained_names, trained_parameters
from cprune.act.repair import FLOATING
from cprune.checkpoint import Checkpoint, open_checkpoint
from cprune.config import NONE, PruneConfig
from cprune.errors import CpruneError
from cprune.files import write_text
from cprune.plan import PrunePlan
from cprune.repaired import Distillation, Repairs
from cprune.stream import StreamedModel, embed_all, resolve_dtype

log = logging.getLogger(__name__)

RECORD_NAME, KEY_NAME, STUDENT_NAME, STATE_NAME = "distilled.json", "key.txt", "student", "state.pt"


def check_distill(checkpoint: Checkpoint, config: PruneConfig) -> None:
    """Raise CpruneError, before any work, where this checkpoint cannot be trained as `config` says."""
    if config.distill == NONE:
        return
    if checkpoint.architecture.quantized is not None:
        raise CpruneError(
            f"--distill needs unquantised weights, got quantization {checkpoint.architecture.quantized!r}"
        )
    for moe in checkpoint.moe_layers:
        dtypes = {checkpoint.tensors[name].dtype for name in trained_names(moe, config.distill)}
        if len(dtypes) > 1 or not dtypes <= set(FLOATING):
            raise CpruneError(
                f"--distill needs weights of one floating-point type in a layer, got {', '.join(sorted(dtypes))} "
                f"in {moe.name}"
            )


def distill(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    repairs: Repairs | None,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    config: PruneConfig,
    folder: Path,
    key: str,
) -> Repairs:
    """Train the compact model.

    Args:
        repairs: what else was done to the model.
        input_ids: [N, S] int64 sequences, at least two, of which one in eight is held back.
        mask: [N, S] bool, False on padding.
        config: what to train, steps, compute type, tokens at a time, seed.
        folder: for the student, the state of the training (a killed one goes on) and the trained tensors; what it
            holds of another key is removed.
        key: of all that the result is made from.
    Returns `repairs` under `key`, with what was trained on top.
    Raises CpruneError where there is one sequence only, or too little memory even layer by layer.
    """
    if len(input_ids) < 2:
        raise CpruneError(f"--distill needs two calibration sequences, one to judge by, got {len(input_ids)}")
    _bind(folder, key)
    student, record = folder / STUDENT_NAME, folder / RECORD_NAME
    if not student.exists():
        apply_plan(checkpoint, plan, student, repairs)
    compact = open_checkpoint(student)
    layers = repairs.layers if repairs is not None else ()
    shelf = Shelf(folder, checkpoint, compact, plan, {layer.layer: layer for layer in layers}, config.distill)
    if record.is_file():
        distillation = Repairs.load(record).distillation
        assert distillation is not None
    else:
        accelerator = Accelerator()
        whole = whole_or_layers(checkpoint, compact, config, input_ids.shape, accelerator.device)
        text = Text.of(input_ids, mask, config, joined=whole)
        distillation = (_distill_whole if whole else distill_layers)(shelf, text, config, accelerator)
        write_text(record, Repairs(key, layers, distillation=distillation).to_json())
    files = [shelf.file(moe) for moe in compact.moe_layers if moe.name in distillation.digests]
    if repairs is not None:
        changed = [layer.layer for layer in layers if layer.digest]
        files += [file for name, file in zip(changed, repairs.files, strict=True) if name not in distillation.digests]
    return Repairs(key, layers, tuple(files), distillation)


def _bind(folder: Path, key: str) -> None:
    """Make the folder one for `key`, empty unless it was that already."""
    mark = folder / KEY_NAME
    if not mark.is_file() or mark.read_text() != key:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
            mark.write_text(key)
        except OSError as error:
            raise CpruneError(f"the work folder must be writable, got {folder} ({error.strerror})") from error


def _distill_whole(shelf: Shelf, text: Text, config: PruneConfig, accelerator: Accelerator) -> Distillation:
    device, dtype = accelerator.device, resolve_dtype(config.dtype, shelf.checkpoint)
    taught = last_hidden_states(shelf.checkpoint, text, config, dtype, device)
    student = _student(shelf.compact, dtype, device)
    trunk = [moe for moe in shelf.compact.moe_layers if moe.trunk]
    layers = {moe.name: hf.decoder_layers(student)[moe.index] for moe in trunk}
    parameters, on_disk = {}, {}
    for moe in trunk:
        for name, parameter in trained_parameters(layers[moe.name], config.distill).items():
            parameters[f"{moe.name}.{name}"] = parameter
            on_disk[f"{moe.name}.{name}"] = trained_dtype(shelf.compact, moe, config.distill)
    rows_at_once = batch_tokens(config, text.input_ids.shape[1]) // text.input_ids.shape[1]

    def divergence(rows: torch.Tensor) -> torch.Tensor:
        """Sum over the tokens of sequences `rows` that count of KL(original || student), nats."""
        ids, counts = text.input_ids[rows].to(device), text.mask[rows].to(device)
        with torch.no_grad(), _only_the_head(student, taught[rows].to(device)):
            expected = student(input_ids=ids, use_cache=False).logits[counts].float().log_softmax(-1)
        got = student(input_ids=ids, use_cache=False).logits[counts].float().log_softmax(-1)
        return F.kl_div(got, expected, reduction="sum", log_target=True)

    def backward(step: int) -> None:
        rows = text.rows_of_step(step)
        tokens = text.tokens(rows)
        for part in rows.split(rows_at_once):
            accelerator.backward(divergence(part) / tokens)

    @torch.no_grad()
    def judge() -> float:
        parts = [float(divergence(part)) for part in text.held.split(rows_at_once)]
        return sum(parts) / text.tokens(text.held)

    training = Training(parameters, on_disk, steps=config.steps, accelerator=accelerator)
    del parameters
    with tqdm(total=config.steps, desc="distill", unit="step", disable=None) as bar:
        for step in training.run(backward, judge, shelf.folder / STATE_NAME):
            bar.update(step - bar.n)
    training.as_written()
    for moe in trunk:
        shelf.put(moe, layers[moe.name] if training.best_step else None)
    (shelf.folder / STATE_NAME).unlink(missing_ok=True)
    digests = {name: digest for name, digest in shelf.digests.items() if digest}
    return Distillation(
        config.distill, config.steps, True, training.untrained, training.least, training.best_step, digests
    )


def _student(compact: Checkpoint, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model to train. cprune's own kernels have no fast gradient on the CPU: transformers' implementations do."""
    implementation = "grouped_mm" if device.type == "cuda" else "eager"
    with hf.no_progress_bar():
        model = hf.load(compact.folder, dtype=dtype, experts_implementation=implementation)
    return model.eval().requires_grad_(False).to(device)


def last_hidden_states(
    checkpoint: Checkpoint, text: Text, config: PruneConfig, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Hidden states [N, S, H] after the last decoder layer, on the CPU."""
    model = StreamedModel(checkpoint, dtype=dtype, device=device)
    batches = embed_all(model, text.input_ids, config.batch_tokens)
    for _ in tqdm(model.walk(batches), total=len(model.layers), desc="teacher", unit="layer", disable=None):
        pass
    return torch.cat([batch.hidden.cpu() for batch in batches])


@contextmanager
def _only_the_head(model: nn.Module, hidden: torch.Tensor) -> Iterator[None]:
    """Within the context the decoder layers are passed over, and the head is given `hidden` [B, S, H]."""
    with ExitStack() as stack:
        for layer in hf.decoder_layers(model):
            stack.enter_context(hf.replaced_forward(layer, lambda *args, **kwargs: hidden))
        yield
