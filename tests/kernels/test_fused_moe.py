"""The forward in every layout, type and activation, by hand in float64; its gradients; what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cprune_kernels.fused_moe import (
    GELU,
    GELU_TANH,
    SILU,
    SWIGLU_OAI,
    Activation,
    Curve,
    expert_views,
    moe_forward,
    moe_observe,
)
from tests.kernels.moe_case import make

F64 = torch.float64


def forward_case(dtype: torch.dtype, biases: bool, transposed: bool = False, interleaved: bool = False) -> tuple:
    """(positional tensors, keywords) of `moe_forward` with every option, and float64 numbers of the same."""
    case = make(31, 2, 5, 48, 24)
    generator = torch.Generator().manual_seed(1)
    case.index[::3, 1] = 7
    gate_up, down = case.gate_up.to(dtype), case.down.to(dtype)
    if interleaved:
        gate_up = gate_up.unflatten(1, (2, 24)).transpose(1, 2).flatten(1, 2)
    options: dict[str, object] = {"transposed": transposed, "interleaved": interleaved}
    if biases:
        options["gate_up_bias"] = torch.randn(5, 48, generator=generator).to(dtype)
        options["down_bias"] = torch.randn(5, 48, generator=generator).to(dtype)
    if transposed:
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    return (case.hidden.to(dtype), case.index, case.gates, gate_up, down), options


def by_hand(tensors: tuple[Tensor, ...], options: dict, act: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A token and a slot at a time, in float64, with nothing rounded between."""
    hidden, index, gates, gate_up, down = (x.double() if x.is_floating_point() else x for x in tensors)
    gate_up_bias, down_bias = (options.get(name) for name in ("gate_up_bias", "down_bias"))
    if options["transposed"]:
        gate_up, down = gate_up.mT, down.mT
    rows = []
    for token in range(len(hidden)):
        row = torch.zeros_like(hidden[0])
        for slot, expert in enumerate(index[token].tolist()):
            if not 0 <= expert < len(down):
                continue
            both = gate_up[expert] @ hidden[token]
            both = both if gate_up_bias is None else both + gate_up_bias[expert].double()
            gate, up = (both[::2], both[1::2]) if options["interleaved"] else both.chunk(2)
            y = down[expert] @ act(gate, up)
            y = y if down_bias is None else y + down_bias[expert].double()
            row = row + gates[token, slot] * y
        rows.append(row)
    return torch.stack(rows)


def clamped(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


ACTIVATIONS = [
    (SILU, lambda gate, up: gate / (1 + torch.exp(-gate)) * up),
    (GELU, lambda gate, up: gate * (1 + torch.erf(gate / 2**0.5)) / 2 * up),
    (GELU_TANH, lambda g, up: g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3))) / 2 * up),
    (SWIGLU_OAI, clamped),
]


@pytest.mark.parametrize(("activation", "act"), ACTIVATIONS, ids=["silu", "gelu", "gelu_tanh", "gpt-oss"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_forward_in_every_layout(
    activation: Activation, act: Callable[[Tensor, Tensor], Tensor], transposed: bool, interleaved: bool
) -> None:
    tensors, options = forward_case(torch.float64, True, transposed, interleaved)
    got = moe_forward(*tensors, activation=activation, **options)
    torch.testing.assert_close(got, by_hand(tensors, options, act), rtol=1e-12, atol=1e-12)
    seen = moe_observe(*tensors, activation=activation, **options)
    torch.testing.assert_close(seen.out.double(), got, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_forward_is_the_combine_of_the_observation(dtype: torch.dtype) -> None:
    tensors, options = forward_case(dtype, False)
    got = moe_forward(tensors[0], tensors[1].int(), *tensors[2:], **options)
    assert got.dtype == dtype
    seen = moe_observe(*tensors, **options).out
    assert bool(((got.float() - seen).abs() <= torch.finfo(dtype).eps * (seen.abs() + 1)).all())


@pytest.mark.parametrize(("activation", "act"), ACTIVATIONS, ids=["silu", "gelu", "gelu_tanh", "gpt-oss"])
def test_gradients_are_those_of_the_formula(activation: Activation, act: Callable[[Tensor, Tensor], Tensor]) -> None:
    tensors, options = forward_case(torch.float64, True, transposed=True, interleaved=True)
    tensors[3].mul_(4)  # some reach the limit
    leaves = [x.requires_grad_() for x in (*tensors, *options.values()) if isinstance(x, Tensor) and x.dtype == F64]
    got = torch.autograd.grad(moe_forward(*tensors, activation=activation, **options).square().sum(), leaves)
    want = torch.autograd.grad(by_hand(tensors, options, act).square().sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    [only] = torch.autograd.grad(moe_forward(*tensors, **options).sum(), [tensors[0]])
    assert only.shape == tensors[0].shape


@pytest.mark.parametrize("biases", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_is_the_same_with_and_without_a_gradient(dtype: torch.dtype, biases: torch.dtype | None) -> None:
    tensors, options = forward_case(dtype, biases is not None)
    options = {name: x.to(biases) if isinstance(x, Tensor) else x for name, x in options.items()}
    tensors = tensors[0], tensors[1], tensors[2].to(dtype), *tensors[3:]
    without = moe_forward(*tensors, **options)
    assert not without.requires_grad
    of_down = moe_forward(*tensors[:4], tensors[4].requires_grad_(), **options)
    assert of_down.requires_grad and torch.equal(of_down, without)
    with torch.no_grad():
        assert torch.equal(moe_forward(*tensors, **options), without)


def test_forward_can_be_traced_compiled_and_differentiated() -> None:
    tensors, options = forward_case(torch.float32, True)
    weights = expert_views(tensors[0], *tensors[3:], options["gate_up_bias"], options["down_bias"], False, False)
    hidden, index, gates = tensors[0].requires_grad_(), *tensors[1:3]
    torch.library.opcheck(torch.ops.cprune.moe_forward, (hidden, index, gates, *weights, "silu", 1.0, None, 0.0))
    observe = (hidden.detach(), index, gates, *weights, "silu", 1.0, None, 0.0, None)
    torch.library.opcheck(torch.ops.cprune.moe_observe, observe)
    compiled = torch.compile(lambda *x: moe_forward(*x, **options).relu(), backend="aot_eager", fullgraph=True)
    got, want = compiled(*tensors), moe_forward(*tensors, **options).relu()
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(x.sum(), hidden)[0] for x in (got, want)))


@pytest.mark.parametrize("size", [(0, 2), (5, 0)])
def test_forward_of_nothing_is_zeros(size: tuple[int, int]) -> None:
    tensors, options = forward_case(torch.float32, True)
    index, gates = torch.zeros(size, dtype=torch.int32), torch.zeros(size)
    out = moe_forward(tensors[0][: size[0]], index, gates, *tensors[3:], **options)
    assert out.shape == (size[0], 48) and not out.any()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gate_up_bias": torch.zeros(5, 24)}, r"gate_up_bias must be a floating \[5, 48\], got .* \[5, 24\]"),
        (
            {"down_bias": torch.zeros(5, 48, dtype=torch.int32)},
            r"down_bias must be a floating \[5, 48\], got torch.int32",
        ),
        ({"transposed": True}, r"down must be a torch.float32 \[E, I, 48\], got .* \[5, 48, 24\]"),
        ({"index": torch.zeros(31, 2)}, r"index must be an int32 or int64 \[31, K\], got torch.float32"),
    ],
)
def test_forward_refuses_what_does_not_fit(change: dict[str, object], sentence: str) -> None:
    (hidden, index, *rest), options = forward_case(torch.float32, False)
    index = change.pop("index", index)
    with pytest.raises(ValueError, match=f"^{sentence}[^\n]*$"):
        moe_forward(hidden, index, *rest, **{**options, **change})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"curve": "silu"}, "curve must be a Curve, got 'silu'"),
        ({"limit": -1.0}, "limit must be positive or None, got -1.0"),
        ({"curve": Curve.GELU, "alpha": 2.0}, "alpha must be 1 for gelu, got 2.0"),
    ],
)
def test_activation_refuses_what_it_cannot_be(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        Activation(**options)
