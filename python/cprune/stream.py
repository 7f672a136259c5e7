"""Run a model of any size with one decoder layer in memory: embed, walk the layers, apply the head.

The pattern is generic. The model's own forward runs once per batch with every layer replaced by a stub that notes the
arguments it is called with (masks, position embeddings: they do not depend on the hidden states). Then the layers run
one after the other over all batches, each filled from the shards just before and emptied just after. The head is the
model's own forward again, with the last stub returning the hidden states of the walk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from cprune import hf
from cprune.checkpoint import Checkpoint, MoELayer
from cprune.errors import CpruneError
from cprune.norms import native_norms

BF16_CAPABILITIES = ("avx512_bf16", "amx_bf16", "bf16")  # torch's names on x86, and on Arm


@dataclass
class Batch:
    """Sequences on their way through the layers."""

    input_ids: torch.Tensor  # [B, S] int64
    hidden: torch.Tensor  # [B, S, H], before the layer that runs next
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]  # per decoder layer: what the model calls it with


class StreamedModel:
    """A checkpoint as a model whose decoder layers are in memory one at a time.

    Padding is on the right and attention is causal, so no mask is needed: what follows a token cannot reach it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        memory: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Builds the model and loads all that is not a decoder layer.

        Args:
            memory: of the experts of the layer at hand, kept for the next, since fresh pages cost as much as reading;
                models that never have a layer in memory at the same time may share one dictionary.

        Raises CpruneError where transformers does not know the model, or the checkpoint is quantised or lacks a tensor.
        """
        if checkpoint.architecture.quantized is not None:
            raise CpruneError(
                f"running a model needs unquantised weights, got quantization {checkpoint.architecture.quantized!r}"
            )
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self.model = hf.build_empty(checkpoint, dtype)
        self.layers = hf.decoder_layers(self.model)
        self._moe = {layer.index: layer for layer in checkpoint.moe_layers if layer.trunk}
        self._names: dict[int, list[str]] = {index: [] for index in range(len(self.layers))}
        self._memory = {} if memory is None else memory
        rest: list[str] = []
        for name in checkpoint.tensors:
            match = re.match(r"(?:.*\.)?layers\.(\d+)\.", name)
            if match is None:
                rest.append(name)
            elif int(match[1]) in self._names:
                self._names[int(match[1])].append(name)
        checkpoint.prefetch(self._names.get(0, ()))
        hf.load_tensors(self.model, {name: checkpoint.read(name) for name in rest}, self.device)
        self.model.tie_weights()
        layer_parameters = {id(p) for p in self.layers.parameters()}
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta and id(parameter) not in layer_parameters:
                raise CpruneError(f"{checkpoint.folder} must hold every weight of the model, got none for {name}")

    def moe_layer(self, index: int) -> MoELayer | None:
        """The MoE block of decoder layer `index`, or None where it is dense."""
        return self._moe.get(index)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer `index`, its weights in memory within the context only; one such context at a time.

        The disk meanwhile reads the next one into the system's cache.
        """
        layer = self.layers[index]
        empty = {name: parameter for name, parameter in layer.named_parameters()}
        self._fill(index, layer)
        self.checkpoint.prefetch(self._names.get(index + 1, ()))
        try:
            with native_norms(layer):
                yield layer
        finally:
            for name, parameter in empty.items():
                owner, _, leaf = name.rpartition(".")
                layer.get_submodule(owner)._parameters[leaf] = parameter

    @torch.no_grad()
    def embed(self, input_ids: torch.Tensor) -> Batch:
        """Start sequences [B, S] int64 on their way: embeddings, and the arguments of every layer."""
        arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: list[torch.Tensor] = []

        def note(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if not first:
                first.append(hidden)
            arguments.append((args, kwargs))
            return hidden

        head = self.model.get_output_embeddings()
        with self._stubs([note] * len(self.layers)), hf.replaced_forward(head, lambda hidden: hidden):
            self.model(input_ids=input_ids[:, :].to(self.device), use_cache=False, logits_to_keep=1)
        if len(arguments) != len(self.layers):
            raise CpruneError(
                f"the model must run its {len(self.layers)} decoder layers once each, got {len(arguments)} calls"
            )
        return Batch(input_ids=input_ids, hidden=first[0], arguments=arguments)

    @torch.no_grad()
    def run_layer(self, index: int, layer: nn.Module, batch: Batch) -> torch.Tensor:
        """Hidden states [B, S, H] after decoder layer `index` of `batch`, which stays as it is."""
        args, kwargs = batch.arguments[index]
        out = layer(batch.hidden, *args, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
        if hidden.shape != batch.hidden.shape:
            raise CpruneError(
                f"decoder layers must return hidden states {list(batch.hidden.shape)}, got {list(hidden.shape)}"
            )
        return hidden

    @torch.no_grad()
    def logits(self, batch: Batch, row: int) -> torch.Tensor:
        """Logits [S, V] of sequence `row`, from the hidden states of a batch that has passed all layers."""
        return self.head(batch.hidden[row : row + 1], batch.input_ids[row : row + 1])

    def head(self, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] of one sequence [1, S] from hidden states [1, S, H] after all layers, with gradients if on."""
        stubs: list[Any] = [lambda h, *args, **kwargs: h] * (len(self.layers) - 1)
        with self._stubs([*stubs, lambda h, *args, **kwargs: hidden]):
            return self.model(input_ids=input_ids.to(self.device), use_cache=False).logits[0]

    def next_token_losses(self, hidden: torch.Tensor, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """-log p [n] float32, in nats, of the tokens after the first that `mask` counts, of one sequence.

        Args:
            hidden: [1, S, H] after all layers, input_ids [1, S] int64, mask [S] bool, False on padding.
        """
        valid = mask[1:]
        logits = self.head(hidden, input_ids)[:-1][valid]
        return F.cross_entropy(logits.float(), input_ids[0, 1:][valid].to(logits.device), reduction="none")

    def walk(self, batches: Sequence[Batch]) -> Iterator[tuple[int, nn.Module]]:
        """Yield (index, layer) with the layer's weights in memory, before the batches pass through it.

        The batches advance after the caller has looked (and, say, attached an observer), so that exhausting the
        iterator leaves the final hidden states in them.
        """
        for index in range(len(self.layers)):
            with self.layer(index) as layer:
                yield index, layer
                for batch in batches:
                    batch.hidden = self.run_layer(index, layer, batch)

    @contextmanager
    def _stubs(self, forwards: Sequence[Any]) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, forward in zip(self.layers, forwards, strict=True):
                stack.enter_context(hf.replaced_forward(layer, forward))
            yield

    def _fill(self, index: int, layer: nn.Module) -> None:
        names = self._names[index]
        moe = self._moe.get(index)
        if moe is not None:
            self.fill_experts(moe, layer)
            of_experts = set(moe.expert_tensors())
            names = [name for name in names if name not in of_experts]
        hf.load_tensors(self.model, {name: self.checkpoint.read(name) for name in names}, self.device)
        for name, tensor in layer.named_parameters():
            if tensor.is_meta:
                raise CpruneError(
                    f"{self.checkpoint.folder} must hold every weight of the model, "
                    f"got none for {name} of layer {index}"
                )

    def fill_experts(self, moe: MoELayer, layer: nn.Module) -> None:
        """Fill the fused parameters straight from disk: per-expert tensors land in their slice, without a copy."""
        experts = hf.find_experts(layer)
        if experts is None:
            raise CpruneError(f"{moe.name} must be a MoE block of transformers' experts contract, got none")
        if moe.fused:
            for suffix, name in moe.fused.items():
                _set(experts, suffix.removesuffix(".weight"), self._read_whole(experts, suffix, name))
            return
        gate, up, down = moe.projections
        size = experts.gate_up_proj.shape[1] // 2
        fused_up = self._buffer("gate_up_proj", experts.gate_up_proj)
        fused_down = self._buffer("down_proj", experts.down_proj)
        if len(moe.experts) != fused_up.shape[0]:
            raise CpruneError(f"{moe.name} must hold {fused_up.shape[0]} experts, got {len(moe.experts)}")
        targets: dict[str, torch.Tensor] = {}
        for expert, tensors in enumerate(moe.experts):
            for suffix, target in (
                (gate, fused_up[expert, :size]),
                (up, fused_up[expert, size:]),
                (down, fused_down[expert]),
            ):
                shape = self.checkpoint.tensors[tensors[suffix]].shape
                if shape != tuple(target.shape):
                    raise CpruneError(f"{tensors[suffix]} must have shape {list(target.shape)}, got {list(shape)}")
                targets[tensors[suffix]] = target
        self.checkpoint.read_all_into(targets)
        _set(experts, "gate_up_proj", fused_up.to(self.device))
        _set(experts, "down_proj", fused_down.to(self.device))

    def _buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Uninitialised memory of the shape and type of `like`, the same for every layer."""
        flat = self._memory.get(name)
        if flat is None or flat.numel() < like.numel() or flat.dtype != like.dtype:
            flat = self._memory[name] = torch.empty(like.numel(), dtype=like.dtype)
        return flat[: like.numel()].view(like.shape)

    def _read_whole(self, experts: nn.Module, suffix: str, name: str) -> torch.Tensor:
        parameter = getattr(experts, suffix.removesuffix(".weight"), None)
        shape = self.checkpoint.tensors[name].shape
        if parameter is None or tuple(parameter.shape) != shape:
            raise CpruneError(
                f"{name} must have the shape of the model, "
                f"{list(parameter.shape) if parameter is not None else 'which has none'}, got {list(shape)}"
            )
        target = self._buffer(suffix, parameter)
        self.checkpoint.read_into(name, target)
        return target.to(self.device)


def _set(module: nn.Module, name: str, value: torch.Tensor) -> None:
    setattr(module, name, nn.Parameter(value, requires_grad=False))


def counted(mask: torch.Tensor, *, skip_first: bool) -> torch.Tensor:
    """The tokens that count, [N, S] bool: those of `mask`, False on padding, without the first positions if skipped."""
    mask = mask.clone()
    if skip_first:
        mask[:, 0] = False
    return mask


def embed_all(model: StreamedModel, input_ids: torch.Tensor, batch_tokens: int) -> list[Batch]:
    """Sequences [N, S] as batches of at most `batch_tokens` tokens (at least one sequence each), embedded."""
    rows = max(1, batch_tokens // input_ids.shape[1])
    return [model.embed(chunk) for chunk in input_ids.split(rows)]


def down_names(moe: MoELayer) -> list[str]:
    """Names on disk of a block's down projections: one per expert, or of one tensor over all of them."""
    if moe.fused:
        return [moe.fused[moe.projections[-1]]]
    return [tensors[moe.projections[-1]] for tensors in moe.experts]


def resolve_dtype(choice: str, checkpoint: Checkpoint) -> torch.dtype:
    """The compute type of a pass: `auto` is bfloat16 for a 16-bit checkpoint where the processor is fast at it."""
    if choice != "auto":
        return torch.float32 if choice == "float32" else torch.bfloat16
    sixteen_bit = sum(info.nbytes for info in checkpoint.tensors.values() if info.dtype in ("BF16", "F16"))
    if 2 * sixteen_bit < checkpoint.nbytes:
        return torch.float32
    fast = torch.cpu.get_capabilities()  # an x86 processor that only emulates bfloat16 is faster in float32
    return torch.bfloat16 if any(fast.get(name) for name in BF16_CAPABILITIES) else torch.float32
