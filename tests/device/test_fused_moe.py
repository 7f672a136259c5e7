"""The experts forward on a device against float64, an expert at a time, within budgets that follow from the types.

With u the unit roundoff of hidden's type and e that of float32: a sum of n products of such numbers errs by at most
n e of the sum of absolute products; the curve adds 16 e of its value and of its argument; activations and outputs are
rounded once, u of each. The budgets carry these through the formula.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from cprune_kernels.fused_moe import (
    GELU,
    GELU_TANH,
    SILU,
    SWIGLU_OAI,
    Activation,
    ExpertWeights,
    MoEObservation,
    expert_views,
    moe_forward,
    moe_observe,
)
from cprune_kernels.moe_launches import moe_forward_launches, moe_observe_launches, pick_config
from cprune_kernels.picker import Arch, MoEConfig, Tile

ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
U32 = 2.0**-24
SLOPE = 1.2  # no curve is steeper; silu(alpha x) / alpha has the slope of silu


@dataclass
class Case:
    hidden: Tensor
    index: Tensor
    gates: Tensor
    gate_up: Tensor  # [C, 2 I, H] or [C, H, 2 I]
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: Activation = SILU
    layout: dict[str, bool] = field(default_factory=lambda: {"transposed": False, "interleaved": False})

    @property
    def weights(self) -> ExpertWeights:
        return expert_views(self.hidden, self.gate_up, self.down, self.gate_up_bias, self.down_bias, **self.layout)


def make(
    device: str,
    tokens: int,
    top_k: int,
    experts: int,
    width: int,
    inner: int,
    dtype: torch.dtype = torch.bfloat16,
    biases: bool = False,
    **options: object,
) -> Case:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    case = Case(
        hidden=normal(tokens, width).to(dtype),
        index=torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k].int().contiguous(),
        gates=normal(tokens, top_k),
        gate_up=(normal(experts, 2 * inner, width) * width**-0.5).to(dtype),
        down=(normal(experts, width, inner) * inner**-0.5).to(dtype),
        gate_up_bias=normal(experts, 2 * inner).to(dtype) if biases else None,
        down_bias=normal(experts, width).to(dtype) if biases else None,
        **options,
    )
    if case.layout["transposed"]:
        case.gate_up, case.down = case.gate_up.mT.contiguous(), case.down.mT.contiguous()
    return dataclasses.replace(
        case,
        **{name: value.to(device) for name, value in vars(case).items() if isinstance(value, Tensor)},
    )


def expected(case: Case) -> tuple[list[tuple[Tensor, ...]], Tensor, Tensor]:
    """Per expert (tokens, slots, y, its error); the combined output and its error: all float64."""
    u = ROUNDOFF[case.hidden.dtype]
    hidden, gates = case.hidden.double(), case.gates.double()
    weights = ExpertWeights(*(None if x is None else x.double() for x in case.weights))
    (_, width), inner = hidden.shape, weights.down.shape[2]
    out, budget = torch.zeros_like(hidden), torch.zeros_like(hidden)
    outputs = []
    for expert in range(len(weights.down)):
        token, slot = (case.index == expert).nonzero(as_tuple=True)
        x = hidden[token]
        sides, errors = [], []
        for side in (0, 1):
            w = weights.gate_up[expert, side]
            value, error = x @ w.T, (width + 4) * U32 * (x.abs() @ w.abs().T)
            if weights.gate_up_bias is not None:
                value = value + weights.gate_up_bias[expert, side]
                error = error + U32 * value.abs()
            sides.append(value), errors.append(error)
        act = case.activation(*sides)
        curve = case.activation(sides[0], torch.ones_like(sides[0]) - case.activation.shift)  # f(gate)
        factor = (
            sides[1] if case.activation.limit is None else sides[1].clamp(-case.activation.limit, case.activation.limit)
        )
        factor = (factor + case.activation.shift).abs() + errors[1]
        curve_error = SLOPE * errors[0] + 16 * U32 * (curve.abs() + sides[0].abs())
        act_error = curve_error * factor + curve.abs() * errors[1]
        act_error = act_error + (u + 4 * U32) * (act.abs() + act_error)
        w = weights.down[expert]
        y = act @ w.T
        error = act_error @ w.abs().T + (inner + 4) * U32 * ((act.abs() + act_error) @ w.abs().T)
        if weights.down_bias is not None:
            y = y + weights.down_bias[expert]
            error = error + U32 * y.abs()
        error = error + (u + U32) * (y.abs() + error)  # stored
        outputs.append((token, slot, y, error))
        gate = gates[token, slot].unsqueeze(1)
        out.index_add_(0, token, y * gate)
        budget.index_add_(0, token, gate.abs() * (error + (case.index.shape[1] + 2) * U32 * (y.abs() + error)))
    return outputs, out, budget


def forward(case: Case, arch: Arch, config: MoEConfig | None = None) -> Tensor:
    if config and config.gate_up.wide:  # several tiles for each CTA
        arch = dataclasses.replace(arch, sms=2)
    launches, out = moe_forward_launches(
        case.hidden, case.index, case.gates, case.weights, case.activation, arch, config
    )
    for launch in launches:
        launch.run()
    return out


def assert_right(case: Case, got: Tensor) -> None:
    _, out, budget = expected(case)
    budget = budget + ROUNDOFF[got.dtype] * (out.abs() + budget)
    assert got.dtype == case.hidden.dtype
    worst = ((got.double() - out).abs() - budget).max() if got.numel() else torch.tensor(0.0)
    assert bool(worst <= 0), float(worst)


def both(tile: Tile, **down: object) -> MoEConfig:
    return MoEConfig(tile, dataclasses.replace(tile, **down))


PATHS = {
    "pointers": both(Tile(16, 16, 32, 4, 2), n=32),
    "pointers, wide": both(Tile(64, 32, 32, 4, 3), n=64),
    "descriptors": both(Tile(64, 32, 32, 4, 3, tma=True), n=64),
    "swapped": both(Tile(16, 32, 32, 4, 3, swap_ab=True), n=64),
    "swapped, descriptors": both(Tile(16, 32, 32, 4, 3, swap_ab=True, tma=True), n=64),
    "split": both(Tile(16, 32, 16, 4, 2, split_k=4), n=64, split_k=3),
    "split, swapped, descriptors": both(Tile(16, 32, 16, 4, 2, split_k=2, swap_ab=True, tma=True), n=64, split_k=2),
    "direct": both(Tile(1, 32, 32, 4, 3), n=16),
    "prefill": both(Tile(192, 128, 64, 12, 3, tma=True, wide=True), n=256),
}
FEW = (
    "pointers",
    "descriptors",
    "swapped, descriptors",
    "split, swapped, descriptors",
    "direct",
)


def tokens_for(path: str) -> int:
    """Ragged; few for the direct path, whose grid grows with them."""
    return 7 if path == "direct" else 37


def runnable(path: str, arch: Arch) -> MoEConfig:
    if "descriptors" in path and arch.capability < 90:
        pytest.skip("no tensor descriptors below capability 9.0")
    if path == "prefill" and arch.capability != 90:
        pytest.skip("these kernels compile for capability 9.0 alone")
    return PATHS[path]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(1, 2, 5, 48, 40), (4, 3, 7, 72, 40), (131, 2, 3, 72, 40)], ids=str)
def test_paths(device: str, arch: Arch, path: str, shape: tuple[int, ...]) -> None:
    tokens, *sizes = shape
    case = make(device, min(tokens, tokens_for(path)) if path == "direct" else tokens, *sizes)
    assert_right(case, forward(case, arch, runnable(path, arch)))


@pytest.mark.parametrize("path", FEW)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_types(device: str, arch: Arch, path: str, dtype: torch.dtype) -> None:
    case = make(device, tokens_for(path), 3, 7, 72, 40, dtype)
    assert_right(case, forward(case, arch, runnable(path, arch)))


@pytest.mark.parametrize("path", FEW)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_layouts_with_biases(device: str, arch: Arch, path: str, transposed: bool, interleaved: bool) -> None:
    layout = {"transposed": transposed, "interleaved": interleaved}
    case = make(device, tokens_for(path), 2, 3, 48, 40, biases=True, activation=SWIGLU_OAI, layout=layout)
    case.gate_up *= 4  # some reach the limit
    assert_right(case, forward(case, arch, runnable(path, arch)))


@pytest.mark.parametrize("activation", [SILU, GELU, GELU_TANH, Activation(limit=0.5), SWIGLU_OAI], ids=str)
def test_activations(device: str, arch: Arch, activation: Activation) -> None:
    case = make(device, 19, 2, 3, 48, 40, torch.float32, activation=activation)
    case.gate_up *= 3
    for path in ("pointers", "split", "direct"):
        assert_right(case, forward(case, arch, PATHS[path]))


def misplaced(x: Tensor) -> Tensor:
    """`x` two bytes off every alignment."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return memory[1:].view(x.shape).copy_(x)


def spread(x: Tensor) -> Tensor:
    """`x` with a stride of its own in every dimension but the last, rows still at multiples of 16 bytes."""
    memory = torch.full([2 * size for size in x.shape[:-1]] + [x.shape[-1] + 8], 77, dtype=x.dtype, device=x.device)
    view = memory[..., : x.shape[-1]]
    return view[tuple(slice(None, None, 2) for _ in x.shape[:-1])].copy_(x)


def turned(x: Tensor) -> Tensor:
    """`x` with its last dimension not contiguous."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("path", ["pointers", "descriptors"])
@pytest.mark.parametrize("place", [misplaced, spread, turned])
def test_place_in_memory_changes_no_bit(device: str, arch: Arch, path: str, place: Callable[[Tensor], Tensor]) -> None:
    case = make(device, 37, 2, 3, 48, 40)
    moved = dataclasses.replace(
        case, **{name: place(getattr(case, name)) for name in ("hidden", "gates", "gate_up", "down")}
    )
    got, want = (forward(x, arch, runnable(path, arch)) for x in (moved, case))
    assert_right(case, got)
    assert torch.equal(got, want)


@pytest.mark.parametrize("place", [misplaced, spread, turned])
def test_direct_reads_from_any_place(device: str, arch: Arch, place: Callable[[Tensor], Tensor]) -> None:
    case = make(device, 4, 3, 5, 48, 40)
    tensors = {name: place(getattr(case, name)) for name in ("hidden", "gates", "gate_up", "down")}
    assert_right(case, forward(dataclasses.replace(case, **tensors), arch, PATHS["direct"]))


@pytest.mark.parametrize("path", FEW)
def test_width_that_is_no_multiple_of_anything(device: str, arch: Arch, path: str) -> None:
    case = make(device, 19, 2, 3, 51, 37)
    assert_right(case, forward(case, arch, runnable(path, arch)))


@pytest.mark.parametrize("path", [*FEW, "prefill"])
def test_slots_without_an_expert_cost_and_give_nothing(device: str, arch: Arch, path: str) -> None:
    case = make(device, tokens_for(path), 3, 5, 48, 40)
    case.index[::2, 1], case.index[1::3, 2], case.index[5] = 5, -1, -7
    case.gates[5] = torch.nan  # of no expert
    got = forward(case, arch, runnable(path, arch))
    assert_right(dataclasses.replace(case, gates=case.gates.nan_to_num()), got)
    assert not got[5].any()
    case.index[:] = -1
    assert not forward(case, arch, runnable(path, arch)).any()


@pytest.mark.parametrize("path", [*FEW, "prefill"])
def test_one_expert_takes_all(device: str, arch: Arch, path: str) -> None:
    case = make(device, tokens_for(path), 1, 4, 48, 40)
    case.index[:] = 2
    assert_right(case, forward(case, arch, runnable(path, arch)))


@pytest.mark.parametrize("layout", [False, True], ids=["rows", "columns"])
def test_picked_direct_tiles_of_one_token(device: str, arch: Arch, layout: bool) -> None:
    """More than one step of either sum, a last one that is not full, experts without a token."""
    case = make(device, 1, 3, 5, 600, 264, layout={"transposed": layout, "interleaved": layout}, biases=layout)
    launches, out = moe_forward_launches(case.hidden, case.index, case.gates, case.weights, SILU, arch)
    assert len(launches) == 2
    for launch in launches:
        launch.run()
    assert_right(case, out)


@pytest.mark.parametrize(
    ("tokens", "dtype"), [(2, torch.bfloat16), (131, torch.bfloat16), (37, torch.float32)], ids=str
)
def test_picked_grouped_tiles(device: str, arch: Arch, tokens: int, dtype: torch.dtype) -> None:
    case = make(device, tokens, 2, 5, 64, 48, dtype)
    config = pick_config(case.hidden, case.index, case.weights, arch, grouped=True)
    assert_right(case, forward(case, arch, config))
    case.gate_up = misplaced(case.gate_up)  # no descriptor can say where that lies
    config = pick_config(case.hidden, case.index, case.weights, arch, grouped=True)
    assert not (config.gate_up.tma or config.down.tma)
    assert_right(case, forward(case, arch, config))


@pytest.mark.parametrize("path", ["pointers", "direct", "prefill"])
def test_what_is_not_finite_stays_with_its_token(device: str, arch: Arch, path: str) -> None:
    case = make(device, tokens_for(path), 2, 3, 48, 40)
    clean = forward(case, arch, runnable(path, arch))
    sick = len(case.hidden) - 2
    case.hidden[sick, 3] = torch.nan
    got = forward(case, arch, PATHS[path])
    others = torch.arange(len(case.hidden), device=device) != sick
    assert torch.equal(got[others], clean[others]) and got[sick].isnan().all()
    limited = dataclasses.replace(case, activation=SWIGLU_OAI)
    assert forward(limited, arch, PATHS[path])[sick].isnan().all()


def observe(case: Case, valid: Tensor | None, arch: Arch, config: MoEConfig) -> MoEObservation:
    launches, seen = moe_observe_launches(
        case.hidden, case.index, case.gates, case.weights, case.activation, valid, arch, config
    )
    for launch in launches:
        launch.run()
    return seen


@pytest.mark.parametrize("path", ["pointers", "split", "prefill"])
def test_observation(device: str, arch: Arch, path: str) -> None:
    case = make(device, 61, 3, 4, 1100 if path == "pointers" else 48, 24)
    case.index[::3, 1], case.index[case.index == 3] = -1, -1  # the last expert has no token
    valid = torch.arange(61, device=device) % 4 != 1
    seen = observe(case, valid, arch, runnable(path, arch))
    outputs, out, budget = expected(case)
    assert {x.dtype for x in seen} == {torch.float32}
    assert bool(((seen.out - out).abs() <= budget + U32 * (out.abs() + budget)).all())
    norms, limit = torch.zeros_like(case.gates).double(), torch.zeros_like(case.gates).double()
    for expert, (token, slot, y, error) in enumerate(outputs):
        norms[token, slot] = y.norm(dim=1)
        limit[token, slot] = error.norm(dim=1) + (y.shape[1] + 2) * U32 * (y.norm(dim=1) + error.norm(dim=1))
        y, error = y[valid[token]], error[valid[token]]
        if not len(y):
            assert seen.high[expert].isneginf() and seen.low[expert].isposinf() and not seen.sums[expert].any()
            continue
        assert (seen.high[expert] - y.max()).abs() <= error.max() and (seen.low[expert] - y.min()).abs() <= error.max()
        room = error.sum(0) + (len(y) + 2) * U32 * (y.abs() + error).sum(0)
        assert bool(((seen.sums[expert] - y.sum(0)).abs() <= room).all())
    assert bool(((seen.norms - norms).abs() <= limit).all())
    assert not seen.norms[case.index < 0].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_operators_on_a_gpu_and_in_a_graph() -> None:
    case = make("cuda", 37, 2, 5, 64, 48)
    arguments = case.hidden, case.index, case.gates, case.gate_up, case.down
    got = moe_forward(*arguments)
    assert_right(case, got)
    compiled = torch.compile(moe_forward, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        assert torch.equal(compiled(*arguments), got)
    seen = moe_observe(case.hidden, case.index.long(), *arguments[2:])
    assert bool(((seen.out - got.float()).abs() <= 2.0**-8 * seen.out.abs()).all())
