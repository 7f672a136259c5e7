"""The routed experts of a layer and what they gave: out_t = sum_k g_tk y_tk, y = down_e (f(gate_e x) (up_e x + shift)).

Bound by the bytes of the weights where few tokens meet each expert, by the matrix products where many do. One operator
because everything between them (gather, activation, norms, sums, the weighted combine) would otherwise pass through
memory several times. expert_gemm.py has the Triton kernels, csrc/cpu/moe_forward.cpp the native one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cprune_kernels.moe_reference import (
    GELU,
    GELU_TANH,
    SILU,
    SWIGLU_OAI,
    Activation,
    Curve,
    ExpertWeights,
    MoEObservation,
    backward_reference,
    expert_views,
    forward_reference,
    observe_reference,
)
from cprune_kernels.native import backend

__all__ = [
    "GELU",
    "GELU_TANH",
    "SILU",
    "SWIGLU_OAI",
    "Activation",
    "Curve",
    "ExpertWeights",
    "MoEObservation",
    "expert_views",
    "moe_forward",
    "moe_forward_reference",
    "moe_observe",
    "moe_observe_reference",
]

ON_GPU = (torch.bfloat16, torch.float16, torch.float32)
NATIVE = {(Curve.SILU, 0.0): 0, (Curve.SILU, 1.0): 1, (Curve.GELU_TANH, 0.0): 2}  # numbers of curves and shifts


def moe_forward_reference(
    hidden: Tensor,
    index: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: Activation = SILU,
    transposed: bool = False,
    interleaved: bool = False,
) -> Tensor:
    """The specification of `moe_forward`, an expert at a time; differentiable."""
    weights = expert_views(hidden, gate_up, down, gate_up_bias, down_bias, transposed, interleaved)
    _check_routing(hidden, index, gates, weights)
    return forward_reference(hidden, index, gates, weights, activation)


def moe_observe_reference(
    hidden: Tensor,
    index: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    down: Tensor,
    valid: Tensor | None = None,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: Activation = SILU,
    transposed: bool = False,
    interleaved: bool = False,
) -> MoEObservation:
    """The specification of `moe_observe`, an expert at a time."""
    weights = expert_views(hidden, gate_up, down, gate_up_bias, down_bias, transposed, interleaved)
    _check_routing(hidden, index, gates, weights, valid, (torch.int64,))
    return observe_reference(hidden, index, gates, weights, activation, valid)


def _check_routing(
    hidden: Tensor,
    index: Tensor,
    gates: Tensor,
    weights: ExpertWeights,
    valid: Tensor | None = None,
    integers: tuple[torch.dtype, ...] = (torch.int32, torch.int64),
) -> None:
    tokens = len(hidden)
    if index.dim() != 2 or index.shape[0] != tokens or index.dtype not in integers:
        kinds = " or ".join(str(kind).removeprefix("torch.") for kind in integers)
        raise ValueError(f"index must be an {kinds} [{tokens}, K], got {index.dtype} of shape {list(index.shape)}")
    if gates.shape != index.shape or not gates.is_floating_point():
        raise ValueError(
            f"gates must be floating of the shape of index {list(index.shape)}, got {gates.dtype} of shape "
            f"{list(gates.shape)}"
        )
    if valid is not None and (valid.shape != (tokens,) or valid.dtype != torch.bool):
        raise ValueError(f"valid must be a bool [{tokens}], got {valid.dtype} of shape {list(valid.shape)}")
    tensors = [x for x in (hidden, index, gates, *weights, valid) if x is not None]
    devices = sorted({str(x.device) for x in tensors})
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {' and '.join(devices)}")
    if hidden.is_cuda and hidden.dtype not in ON_GPU:
        raise ValueError(f"hidden must be bfloat16, float16 or float32 on a GPU, got {hidden.dtype}")


def _flat(activation: Activation) -> tuple[str, float, float | None, float]:
    """An activation as arguments of an operator."""
    return str(activation.curve), activation.alpha, activation.limit, activation.shift


def _native_activation(hidden: Tensor, weights: ExpertWeights, activation: Activation) -> int | None:
    """The native kernels' number of the activation; None where they do not take it, the types, or gate and up apart.

    Without vector instructions the matrix library is faster once an expert meets more than a few tokens.
    """
    gate_up, _, *biases = weights
    if (
        hidden.dtype not in ON_GPU
        or backend() in ("reference", "portable")
        or gate_up.stride(1) != gate_up.shape[2] * gate_up.stride(2)
        or any(bias is not None and bias.dtype != hidden.dtype for bias in biases)
    ):
        return None
    return NATIVE.get((activation.curve, activation.shift))


def _directly(
    hidden: Tensor,
    index: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: Activation,
) -> Tensor | None:
    """`moe_forward` of weights as the native kernels want them, by those alone; None where they do not take it all.

    For a single token what this leaves out takes a tenth of the time.
    """
    weights = gate_up, down, gate_up_bias, down_bias
    code = NATIVE.get((activation.curve, activation.shift))
    if (
        type(hidden) is not Tensor
        or not hidden.is_cpu
        or code is None
        or not gates.is_floating_point()
        or not gate_up.dim() == down.dim() == 3
        or not gate_up.stride(2) == down.stride(2) == 1
        or backend() in ("reference", "portable")
        or torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        and any(x is not None and x.requires_grad for x in (hidden, gates, *weights))
    ):
        return None
    options = code, activation.alpha, activation.limit or 0.0
    try:
        return torch.ops.cprune_native.moe_forward(hidden, index, gates.float(), *weights, *options)
    except RuntimeError:  # the other way says what is wrong, or computes what these kernels cannot
        return None


def moe_forward(
    hidden: Tensor,
    index: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: Activation = SILU,
    transposed: bool = False,
    interleaved: bool = False,
) -> Tensor:
    """Run the routed (token, expert) pairs of a layer and combine what they give: [T, H] in hidden's type.

    Args:
        hidden: [T, H] floating; on a GPU bfloat16, float16 or float32.
        index: [T, K] int32 or int64: the experts of each token; a slot outside [0, C) contributes and costs nothing.
        gates: [T, K] floating, applied to the outputs in the combine only.
        gate_up: [C, 2 I, H] of hidden's type: the rows of gate, then those of up; [C, H, 2 I] where transposed. Gate
            and up alternate where interleaved. Weights are read where they are, with any strides.
        down: [C, H, I]; [C, I, H] where transposed.
        gate_up_bias: [C, 2 I], in the order of gate_up; any floating type.
        down_bias: [C, H].
        activation: what makes I numbers of 2 I.

    Products are summed in float32, activations are rounded to hidden's type, on a GPU (but for a few tokens) the
    outputs of the experts too before gates apply. No sum depends on timing. The gradient is that of
    `moe_forward_reference`, recomputed.
    Raises ValueError, in one sentence, for a wrong shape, type or device.
    """
    if not transposed and not interleaved:
        out = _directly(hidden, index, gates, gate_up, down, gate_up_bias, down_bias, activation)
        if out is not None:
            return out
    weights = expert_views(hidden, gate_up, down, gate_up_bias, down_bias, transposed, interleaved)
    _check_routing(hidden, index, gates, weights)
    return torch.ops.cprune.moe_forward(hidden, index, gates, *weights, *_flat(activation))


def moe_observe(
    hidden: Tensor,
    index: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    down: Tensor,
    valid: Tensor | None = None,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: Activation = SILU,
    transposed: bool = False,
    interleaved: bool = False,
) -> MoEObservation:
    """Run the routed pairs like `moe_forward` and reduce what each expert gave. Not differentiable.

    Args:
        index: [T, K] int64.
        valid: [T] bool: the tokens that count in high, low and sums; all of them by default.
        The others are those of `moe_forward`.

    The native kernel (CPU, silu, no biases; weights are read where they are if their last dimension is contiguous)
    takes the statistics from outputs in float32 and gives the same bits for any number of threads. On a GPU outputs
    are rounded to hidden's type before norms, extremes and sums are taken.
    Raises ValueError, in one sentence, for a wrong shape, type or device.
    """
    weights = expert_views(hidden, gate_up, down, gate_up_bias, down_bias, transposed, interleaved)
    _check_routing(hidden, index, gates, weights, valid, (torch.int64,))
    return MoEObservation(*torch.ops.cprune.moe_observe(hidden, index, gates, *weights, *_flat(activation), valid))


@torch.library.custom_op("cprune::moe_forward", mutates_args=(), device_types="cuda")
def _moe_forward(
    hidden: Tensor,
    index: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    curve: str,
    alpha: float,
    limit: float | None,
    shift: float,
) -> Tensor:
    weights = ExpertWeights(gate_up, down, gate_up_bias, down_bias)
    activation = Activation(Curve(curve), alpha, limit, shift)
    if not index.numel():
        return torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    from cprune_kernels.moe_launches import moe_forward_launches, run  # Triton is imported where there is a GPU

    return run(moe_forward_launches, hidden, index, gates, weights, activation)


@_moe_forward.register_kernel("cpu")
def _moe_forward_cpu(hidden: Tensor, index: Tensor, gates: Tensor, *rest: Any) -> Tensor:
    weights, activation = ExpertWeights(*rest[:4]), Activation(Curve(rest[4]), *rest[5:])
    code = _native_activation(hidden, weights, activation)
    if code is not None and weights.gate_up.stride(3) == 1 and weights.down.stride(2) == 1:  # it would copy others
        gate_up, down, gate_up_bias, down_bias = weights
        if gate_up_bias is not None:
            gate_up_bias = gate_up_bias.flatten(1)
        options = code, activation.alpha, activation.limit or 0.0
        operator = torch.ops.cprune_native.moe_forward
        return operator(hidden, index, gates.float(), gate_up.flatten(1, 2), down, gate_up_bias, down_bias, *options)
    return forward_reference(hidden, index, gates, weights, activation)


@_moe_forward.register_fake
def _moe_forward_fake(hidden: Tensor, *rest: Any) -> Tensor:
    return hidden.new_empty(hidden.shape)


@torch.library.custom_op("cprune::moe_forward_backward", mutates_args=())
def _moe_backward(
    grad: Tensor,
    needed: list[bool],
    hidden: Tensor,
    index: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    curve: str,
    alpha: float,
    limit: float | None,
    shift: float,
) -> list[Tensor]:
    """The gradients of hidden, gates and the weights by the specification; of size 0 where not needed."""
    weights = ExpertWeights(gate_up, down, gate_up_bias, down_bias)
    activation = Activation(Curve(curve), alpha, limit, shift)
    found = backward_reference(grad, hidden, index, gates, weights, activation)
    return [x if need else grad.new_empty(0) for x, need in zip(found, needed, strict=True)]


@_moe_backward.register_fake
def _moe_backward_fake(grad: Tensor, needed: list[bool], hidden: Tensor, index: Tensor, *rest: Any) -> list[Tensor]:
    tensors = hidden, *rest[:5]
    return [x.new_empty(x.shape) if need else grad.new_empty(0) for x, need in zip(tensors, needed, strict=True)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.activation = inputs[7:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = [need for place, need in enumerate(ctx.needs_input_grad[:7]) if place != 1]
    found = torch.ops.cprune.moe_forward_backward(grad, needed, *ctx.saved_tensors, *ctx.activation)
    hidden, *rest = (x if need else None for x, need in zip(found, needed, strict=True))
    return hidden, None, *rest, None, None, None, None


_moe_forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("cprune::moe_observe", mutates_args=(), device_types="cuda")
def _moe_observe(
    hidden: Tensor,
    index: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    curve: str,
    alpha: float,
    limit: float | None,
    shift: float,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights = ExpertWeights(gate_up, down, gate_up_bias, down_bias)
    activation = Activation(Curve(curve), alpha, limit, shift)
    if not index.numel():
        return tuple(observe_reference(hidden, index, gates, weights, activation, valid))
    from cprune_kernels.moe_launches import moe_observe_launches, run

    return tuple(run(moe_observe_launches, hidden, index, gates, weights, activation, valid))


@_moe_observe.register_kernel("cpu")
def _moe_observe_cpu(hidden: Tensor, index: Tensor, gates: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weights, activation, valid = ExpertWeights(*rest[:4]), Activation(Curve(rest[4]), *rest[5:8]), rest[8]
    plain = activation == SILU and weights.gate_up_bias is None and weights.down_bias is None
    if plain and _native_activation(hidden, weights, activation) is not None:
        if valid is None:
            valid = torch.ones(len(hidden), dtype=torch.bool)
        gate_up = weights.gate_up.flatten(1, 2)  # a view
        return torch.ops.cprune_native.moe_observe(hidden, index, gates.float(), gate_up, weights.down, valid)
    return tuple(observe_reference(hidden, index, gates, weights, activation, valid))


@_moe_observe.register_fake
def _moe_observe_fake(hidden: Tensor, index: Tensor, gates: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    experts, width = rest[1].shape[0], hidden.shape[1]
    sizes = (hidden.shape, index.shape, (experts,), (experts,), (experts, width))
    return tuple(hidden.new_empty(size, dtype=torch.float32) for size in sizes)
