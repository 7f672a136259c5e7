"""The seam to transformers: a model on the meta device, filled layer by layer, and two experts implementations.

transformers 5 gives every MoE architecture one experts contract, forward(hidden_states [T, H], top_k_index [T, K],
top_k_weights [T, K]) on fused weights, looked up by name. Importing this module registers there `SERVE`, "cprune", for
running a model on cprune's kernels, and `OBSERVE`, which sees the model's own routing and every routed expert's output
before the combine, for all architectures alike; and `ATTEND`, which is transformers' "sdpa" but for what the native
kernel attends to.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from cprune.attention import ATTEND, SDPA, attend
from cprune.checkpoint import Checkpoint, open_checkpoint
from cprune.checkpoint.families import RAGGED_KEY
from cprune.errors import CpruneError
from cprune.experts import SERVE, observed_by_one_kernel, serve_experts, served_by_one_kernel, weight_layout
from cprune.ragged import resize_experts
from cprune_kernels.fused_moe import MoEObservation, moe_observe

OBSERVE = "cprune_observe"
OUTPUT_ROWS = 2048  # of `expert_outputs` at a time: the memory in between is used again, and stays in the cache


class Observer(Protocol):
    """Whoever watches the experts of one layer; attached to the experts module as `cprune_observer`."""

    def on_input(self, hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor | None:
        """hidden [T, H], index [T, K] int64, gates [T, K]: before any expert runs.

        Returns [T] bool, the tokens that count in what `on_experts` is given; None for all of them.
        """

    def on_expert(self, expert: int, tokens: torch.Tensor, slots: torch.Tensor, output: torch.Tensor) -> None:
        """output [n, H] of `expert` for tokens [n] int64 which chose it in slots [n] int64, before gates apply."""

    def on_experts(self, seen: MoEObservation) -> None:
        """The outputs of all experts, already reduced: in place of `on_expert`, where one kernel runs them all."""


@runtime_checkable
class ActivationObserver(Protocol):
    """Whoever wants what the down projections are given; attached in place of an `Observer`."""

    def on_input(self, hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> None:
        """As of an `Observer`."""

    def on_activation(self, expert: int, tokens: torch.Tensor, gates: torch.Tensor, activation: torch.Tensor) -> None:
        """activation [n, I] of `expert` for tokens [n] int64 ascending, which chose it with gates [n]."""


def expert_activation(experts: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What the down projection of `expert` is given for inputs [n, H]: [n, I], for a module of any layout."""
    if experts.has_gate:
        return experts._apply_gate(expert_linear(experts, expert, x, "gate_up_proj"))
    return experts.act_fn(expert_linear(experts, expert, x, "up_proj"))


def expert_output(experts: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    """f_expert(x), [n, H] -> [n, H], on a transformers 5 experts module of any layout (gate not applied)."""
    return expert_linear(experts, expert, expert_activation(experts, expert, x), "down_proj")


def expert_linear(experts: nn.Module, expert: int, x: torch.Tensor, name: str) -> torch.Tensor:
    """One projection `name` of `expert`, [n, *] -> [n, *], with its bias, in the module's own order of outputs."""
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, name + "_bias")[expert] if experts.has_bias else None
    return F.linear(x, weight.T if experts.is_transposed else weight, bias)


def expert_outputs(experts: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Every expert's output on the same inputs, [n, H] -> [E, n, H] of x's type (gate not applied)."""
    num = experts.down_proj.shape[0]
    if not observed_by_one_kernel(experts, x):
        return torch.stack([expert_output(experts, expert, x) for expert in range(num)])
    out = x.new_empty(num, *x.shape)
    for some in torch.arange(num, device=x.device).split(max(1, OUTPUT_ROWS // max(1, len(x)))):
        index = some.repeat_interleave(len(x)).unsqueeze(1)
        gates = torch.ones(index.shape, device=x.device)
        out[some[0] : some[-1] + 1] = serve_experts(experts, x.repeat(len(some), 1), index, gates).view(-1, *x.shape)
    return out


def projections(experts: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gate [E, I, H], up [E, I, H], down [E, H, I]): views of an experts module's weights, whatever its layout."""
    fused, down = experts.gate_up_proj, experts.down_proj
    if experts.is_transposed:
        fused, down = fused.transpose(1, 2), down.transpose(1, 2)
    if experts.is_concatenated:
        gate, up = fused.chunk(2, dim=1)
    else:
        gate, up = fused[:, ::2], fused[:, 1::2]
    return gate, up, down


def padded_rows(count: int) -> int:
    """`count` rounded up to one of 4 sizes per octave.

    The matrix library compiles and caches a kernel for every shape it meets; experts with ever different numbers of
    tokens would fill that cache, a gigabyte, and compile all the time.
    """
    step = max(64, 1 << max(0, count.bit_length() - 3))
    return -(-count // step) * step


def _observing_experts(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Only routed (token, expert) pairs are computed, expert by expert in ascending order; the sum is in float32."""
    observer: Observer | ActivationObserver | None = getattr(experts, "cprune_observer", None)
    if observer is None and served_by_one_kernel(experts, hidden_states, top_k_index):
        return serve_experts(experts, hidden_states, top_k_index, top_k_weights)
    of_activations = isinstance(observer, ActivationObserver)
    valid = None
    if observer is not None:
        valid = observer.on_input(hidden_states, top_k_index, top_k_weights)
    if not of_activations and observed_by_one_kernel(experts, hidden_states):
        weights = experts.gate_up_proj.detach(), experts.down_proj.detach()
        seen = moe_observe(hidden_states, top_k_index, top_k_weights, *weights, valid, **weight_layout(experts))
        if observer is not None:
            observer.on_experts(seen)
        return seen.out.to(hidden_states.dtype)
    num_slots = top_k_index.shape[1]
    pairs = torch.argsort(top_k_index.flatten(), stable=True)  # [T * K], grouped by expert, tokens ascending
    counts = torch.bincount(top_k_index.flatten(), minlength=experts.num_experts).tolist()
    out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    start = 0
    for expert, count in enumerate(counts):
        if count and expert < experts.num_experts:
            pair = pairs[start : start + count]
            tokens, slots = pair // num_slots, pair % num_slots
            rows = F.pad(tokens, (0, padded_rows(count) - count))
            gates = top_k_weights[tokens, slots]
            activation = expert_activation(experts, expert, hidden_states[rows])
            output = expert_linear(experts, expert, activation, "down_proj")[:count]
            if of_activations:
                observer.on_activation(expert, tokens, gates, activation[:count])
            elif observer is not None:
                observer.on_expert(expert, tokens, slots, output)
            out.index_add_(0, tokens, output.float().mul_(gates.float().unsqueeze(1)))
        start += count
    return out.to(hidden_states.dtype)


ALL_ATTENTION_FUNCTIONS.register(ATTEND, functools.partial(attend, sdpa_attention_forward))
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTEND, sdpa_mask)
ALL_EXPERTS_FUNCTIONS.register(OBSERVE, _observing_experts)
ALL_EXPERTS_FUNCTIONS.register(SERVE, serve_experts)


def read_config(checkpoint: Checkpoint) -> transformers.PreTrainedConfig:
    """The transformers configuration. Raises CpruneError for a model type that this transformers does not know."""
    try:
        return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError, StrictDataclassError) as error:
        raise CpruneError(
            f"transformers {transformers.__version__} must know the model type, got "
            f"{checkpoint.config.get('model_type')!r} ({str(error).splitlines()[0][:120]})"
        ) from error


def read_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer that stands beside the weights. Raises CpruneError where there is none."""
    refusal = CpruneError(
        f"{checkpoint.folder} must hold a tokenizer, got none that transformers can load; "
        f"--calibration none --evaluate none work without one"
    )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError, ImportError) as error:
        raise refusal from error
    if not tokenizer("text")["input_ids"]:  # without its files, some model types get a tokenizer that knows no word
        raise refusal
    return tokenizer


def ragged_counts(config: transformers.PreTrainedConfig) -> dict[str, int]:
    """{decoder layer: experts} of a checkpoint whose layers differ; empty for a stock checkpoint."""
    ragged = getattr(config, RAGGED_KEY, None)
    return dict(ragged["experts_per_layer"]) if isinstance(ragged, dict) else {}


def expert_maps(config: transformers.PreTrainedConfig) -> dict[str, list[int]]:
    """{decoder layer: the expert of every router row} of a merged checkpoint with all its rows; empty for others."""
    ragged = getattr(config, RAGGED_KEY, None)
    return dict(ragged.get("expert_map", {})) if isinstance(ragged, dict) else {}


def model_class(config: transformers.PreTrainedConfig) -> type[PreTrainedModel]:
    """The causal language model class of a configuration; where layers differ, a subclass that sizes them.

    Raises CpruneError for a configuration without such a class.
    """
    try:
        stock = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError as error:
        raise CpruneError(f"the model type must be a causal language model, got {config.model_type!r}") from error
    counts = ragged_counts(config)
    if not counts:
        return stock

    class Ragged(stock):  # type: ignore[misc, valid-type]
        def __init__(self, config: transformers.PreTrainedConfig) -> None:
            super().__init__(config)
            resize_experts(self, counts, expert_maps(config))

    Ragged.__module__, Ragged.__name__ = stock.__module__, stock.__name__  # so that weight conversions know it
    return Ragged


def build_empty(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint: parameters on the meta device, buffers real, layers of their own expert counts."""
    config = read_config(checkpoint)
    try:
        with init_empty_weights(include_buffers=False):
            model = model_class(config)._from_config(config, dtype=dtype, experts_implementation=OBSERVE)
            if model.config._attn_implementation == SDPA:  # which not every model supports
                model.set_attn_implementation(ATTEND)
    except (ValueError, KeyError, TypeError) as error:
        raise CpruneError(
            f"transformers must build the causal language model of the checkpoint, "
            f"got {str(error).splitlines()[0][:160]}"
        ) from error
    return model.eval().requires_grad_(False)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, in order."""
    for module in model.modules():
        if isinstance(layers := getattr(module, "layers", None), nn.ModuleList):
            return layers
    raise CpruneError(f"the model must have a list of decoder layers, got none in {type(model).__name__}")


def find_experts(layer: nn.Module) -> nn.Module | None:
    """The experts module of a decoder layer (fused, by transformers' experts contract), or None for a dense layer."""
    found = [m for m in layer.modules() if hasattr(m, "down_proj") and hasattr(m, "is_transposed")]
    if len(found) > 1:
        raise CpruneError(f"a decoder layer must have one experts module, got {len(found)} in {type(layer).__name__}")
    return found[0] if found else None


def find_block(layer: nn.Module) -> nn.Module:
    """The MoE block: the module of a decoder layer in which the experts stand."""
    experts = find_experts(layer)
    return next(module for module in layer.modules() if any(child is experts for child in module.children()))


def find_router(layer: nn.Module) -> nn.Module:
    """The router: the child that stands beside the experts in the MoE block and has a row for each of them."""
    experts = find_experts(layer)
    for child in find_block(layer).children():
        weight = getattr(child, "weight", None)
        if child is not experts and weight is not None and weight.shape[:1] == (experts.num_experts,):
            return child
    raise CpruneError(f"a MoE block must hold a router beside its experts, got none in {type(layer).__name__}")


def load_tensors(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Load tensors under their names on disk, through transformers' own renames and conversions.

    Raises CpruneError where a name has no place in the model or a shape does not fit.
    """
    plan = LoadStateDictConfig(
        dtype=model.dtype,
        dtype_plan=model._get_dtype_plan(model.dtype),
        device_map={"": device},
        weight_mapping=get_model_conversion_mapping(model),
    )
    with no_progress_bar():
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), plan)
    if info.unexpected_keys:
        raise CpruneError(f"every tensor must have a place in the model, got {sorted(info.unexpected_keys)[0]}")
    if info.mismatched_keys:
        name, *shapes = sorted(info.mismatched_keys, key=str)[0]
        raise CpruneError(f"{name} must have the shape of the model, got {shapes}")
    if info.conversion_errors:
        raise CpruneError(f"every tensor must convert to the model's layout, got {next(iter(info.conversion_errors))}")


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Within the context transformers shows no progress of its own."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context, calling `module` calls `forward` instead of its own."""
    before = module.__dict__.get("forward")  # of a context around this one
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


class _MaskLogits(TorchFunctionMode):
    """Sets the dropped columns of the first router projection to -inf, wherever the router computes it."""

    def __init__(self, num_experts: int, dropped: torch.Tensor) -> None:
        super().__init__()
        self.num_experts, self.dropped = num_experts, dropped

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear and out.shape[-1] == self.num_experts:
            # a copy, since a tensor of inference mode could not be saved for a gradient
            dropped = self.dropped.to(out.device).clone()
            out = out.index_fill(-1, dropped, float("-inf"))
        return out


@contextmanager
def masked_router(layer: nn.Module, dropped: torch.Tensor) -> Iterator[None]:
    """Within the context the layer routes as if the experts `dropped` [n] int64 were gone: their logits are -inf.

    Score-correction biases of dropped experts are -inf too, since a sigmoid router would still choose by them.
    """
    router, experts = find_router(layer), find_experts(layer)
    forward = router.forward

    def masked(*args: Any, **kwargs: Any) -> Any:
        with _MaskLogits(experts.num_experts, dropped):
            return forward(*args, **kwargs)

    buffers = [b for name, b in layer.named_buffers() if name.endswith("e_score_correction_bias")]
    saved = [buffer.clone() for buffer in buffers]
    for buffer in buffers:
        buffer[..., dropped] = float("-inf")
    try:
        with replaced_forward(router, masked):
            yield
    finally:
        for buffer, values in zip(buffers, saved, strict=True):
            buffer.copy_(values)


def load(folder: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """The transformers model of any cprune output, also where layers keep different numbers of experts.

    Args:
        folder: an output of cprune (or any checkpoint that transformers loads).
        kwargs: passed to `from_pretrained` (dtype, device_map, ...).
    Raises CpruneError where the folder is not a checkpoint or a weight is missing in it.
    """
    checkpoint = open_checkpoint(folder)
    config = read_config(checkpoint)
    config.__dict__.pop("auto_map", None)
    model, info = model_class(config).from_pretrained(
        checkpoint.folder, config=config, output_loading_info=True, **kwargs
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise CpruneError(
            f"{folder} must hold every weight of the model, got none for "
            f"{sorted(map(str, {*info['missing_keys'], *info['mismatched_keys']}))[0]}"
        )
    return model
