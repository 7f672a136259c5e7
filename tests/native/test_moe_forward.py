"""cprune_native::moe_forward on every instruction set of this machine against float64, an expert at a time.

Products of 16-bit numbers are exact in float32, those of float32 are rounded once inside a fused sum: float32 sums of n
products err by at most n 2^-24 of the sum of absolute products (twice that here, as biases and clamps follow). The
activations and the output are rounded once to the type, U of each. The budgets carry these through the formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import cprune_kernels
from tests.kernels.moe_case import Layer, draw

if cprune_kernels.backend() == "reference":
    pytest.skip("the native kernels were not built", allow_module_level=True)

U32 = 2.0**-24
U = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: U32}
ISAS = torch.ops.cprune_native.isas().split()
SHAPES = [(0, 2, 3, 48, 24), (1, 2, 5, 64, 32), (131, 2, 3, 48, 24), (300, 4, 131, 200, 96), (131, 1, 5, 33, 7)]
SHAPES += [(600, 2, 4, 257, 130), (33, 1, 1, 65, 31), (5, 0, 3, 48, 24), (9, 3, 512, 16, 5)]


@dataclass
class Case(Layer):
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: int = 0
    alpha: float = 1.0
    limit: float = 0.0

    def run(self, isa: str = "") -> Tensor:
        tensors = (self.hidden, self.index, self.gates, self.gate_up, self.down, self.gate_up_bias, self.down_bias)
        return torch.ops.cprune_native.moe_forward(*tensors, self.activation, self.alpha, self.limit, isa)


def make(
    tokens: int,
    top_k: int,
    experts: int,
    hidden: int,
    inner: int,
    dtype: torch.dtype = torch.bfloat16,
    activation: int = 0,
) -> Case:
    """A layer; with biases, a slope and clamps that bite for other activations than 0."""
    generator = torch.Generator().manual_seed(0)
    case = Case(**draw(generator, tokens, top_k, experts, hidden, inner, dtype), activation=activation)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    if activation:
        case.gate_up_bias, case.down_bias = normal(experts, 2 * inner).to(dtype), normal(experts, hidden).to(dtype)
        case.alpha, case.limit = (1.702, 1.5) if activation == 1 else (1.0, 0.0)
    return case


def assert_within_budget(case: Case, got: Tensor) -> None:
    assert got.dtype == case.hidden.dtype and got.shape == case.hidden.shape
    unit = U[got.dtype]
    hidden, gates, gate_up, down = (x.double() for x in (case.hidden, case.gates, case.gate_up, case.down))
    width, inner = down.shape[1:]
    expected, budget = torch.zeros_like(hidden), torch.zeros_like(hidden)
    for expert in range(len(down)):
        token, slot = (case.index == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        x, w = hidden[token], down[expert]
        both, size = x @ gate_up[expert].T, x.abs() @ gate_up[expert].abs().T
        if case.gate_up_bias is not None:
            both, size = both + case.gate_up_bias[expert].double(), size + case.gate_up_bias[expert].double().abs()
        (gate, up), (gate_error, up_error) = both.chunk(2, 1), (2 * (width + 3) * U32 * size).chunk(2, 1)
        if case.limit:
            gate, up = gate.clamp(max=case.limit), up.clamp(-case.limit, case.limit)
        up = up + (case.activation == 1)
        curve = F.gelu(gate, approximate="tanh") if case.activation == 2 else gate * torch.sigmoid(case.alpha * gate)
        act = curve * up
        act_error = 1.2 * gate_error * (up.abs() + up_error) + curve.abs() * up_error  # no curve is steeper than 1.2
        act_error = act_error + (unit + 16 * U32) * (act.abs() + act_error)  # its own arithmetic; then to the type
        if case.activation == 2:  # 1 + tanh from a quotient: absolute where it is next to 0
            act_error = act_error + 16 * U32 * (gate.abs() * up.abs())
        y = act @ w.T
        error = act_error @ w.abs().T + 2 * (inner + 3) * U32 * ((act.abs() + act_error) @ w.abs().T)
        if case.down_bias is not None:
            y = y + case.down_bias[expert].double()
        gated = gates[token, slot].unsqueeze(1)
        expected.index_add_(0, token, y * gated)
        combine = 2 * (case.index.shape[1] + 2) * U32
        budget.index_add_(0, token, gated.abs() * (error + combine * (y.abs() + error)))
    if got.dtype != torch.float32:
        budget = budget + unit * (expected.abs() + budget)
    assert bool(((got.double() - expected).abs() <= budget).all())


@pytest.mark.parametrize("activation", [0, 1, 2])
@pytest.mark.parametrize("dtype", list(U), ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_number_is_that_of_float64(shape: tuple[int, ...], isa: str, dtype: torch.dtype, activation: int) -> None:
    case = make(*shape, dtype=dtype, activation=activation)
    assert_within_budget(case, case.run(isa))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", [*range(1, 34), 47, 48, 49, 61, 95, 97])
def test_any_number_of_tokens_meets_an_expert(count: int, isa: str) -> None:
    case = make(count, 1, 3, 66, 34)
    case.index[:] = 1
    assert_within_budget(case, case.run(isa))


@pytest.mark.parametrize("isa", ISAS)
def test_slots_outside_of_the_experts_contribute_nothing(isa: str) -> None:
    case = make(131, 3, 5, 48, 24)
    case.index[::2, 1], case.index[1::3, 2], case.index[7] = 5, -1, -(2**40)
    got = case.run(isa)
    assert_within_budget(case, got)
    assert not got[7].any()
    assert not replace(case, index=torch.full_like(case.index, -1)).run(isa).any()


def test_index_of_32_bits_is_as_good() -> None:
    case = make(131, 3, 5, 48, 24)
    assert torch.equal(replace(case, index=case.index.int()).run(), case.run())


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_finite_stays_with_its_token(isa: str) -> None:
    case = make(131, 2, 3, 47, 23)
    clean = case.run(isa)
    case.hidden[70, 46] = torch.nan
    got, others = case.run(isa), torch.arange(131) != 70
    assert torch.equal(got[others], clean[others]) and got[70].isnan().all()


def misplaced(x: Tensor) -> Tensor:
    """`x` one element off every alignment."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


def spread(x: Tensor) -> Tensor:
    """`x` with strides of its own in every dimension but the last."""
    memory = torch.full([2 * size for size in x.shape[:-1]] + [x.shape[-1] + 3], 77).to(x.dtype)
    view = memory[..., : x.shape[-1]]
    for dim in range(x.dim() - 1):
        view = view[(slice(None),) * dim + (slice(None, None, 2),)]
    return view.copy_(x)


def transposed(x: Tensor) -> Tensor:
    """`x` with its last dimension not contiguous."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("place", [misplaced, spread, transposed])
@pytest.mark.parametrize("dtype", list(U), ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_place_in_memory_changes_no_bit(isa: str, dtype: torch.dtype, place: Callable[[Tensor], Tensor]) -> None:
    case = make(131, 2, 5, 50, 26, dtype=dtype, activation=1)
    moved = replace(case, **{name: place(x) for name, x in vars(case).items() if isinstance(x, Tensor)})
    assert torch.equal(moved.run(isa), case.run(isa))


def test_weights_are_read_where_safetensors_maps_them(tmp_path: Path) -> None:
    case = make(131, 2, 5, 48, 24)
    save_file({"odd": torch.zeros(1, dtype=torch.uint8), "up": case.gate_up, "down": case.down}, tmp_path / "w")
    with safe_open(tmp_path / "w", framework="pt") as file:
        mapped = replace(case, gate_up=file.get_tensor("up"), down=file.get_tensor("down"))
        assert torch.equal(mapped.run(), case.run())


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(300, 4, 13, 200, 96), (7, 2, 5, 130, 300), (1500, 2, 3, 130, 600)], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_number_of_threads_changes_no_bit(isa: str, shape: tuple[int, ...], threads: Callable[[int], None]) -> None:
    case, results = make(*shape), []
    for count in (1, 2, 2, 3):
        threads(count)
        results.append(case.run(isa))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("isa", ISAS)
def test_observation_gives_the_same_output(isa: str) -> None:
    case = make(131, 2, 3, 48, 24)
    tensors = (case.hidden, case.index, case.gates, case.gate_up, case.down, torch.ones(131, dtype=torch.bool))
    observed = torch.ops.cprune_native.moe_observe(*tensors, isa)[0]
    assert torch.equal(observed.bfloat16(), case.run(isa))


def test_operator_can_be_traced_and_compiled() -> None:
    case = make(31, 2, 5, 48, 24)
    tensors = (case.hidden, case.index, case.gates, case.gate_up, case.down)
    torch.library.opcheck(torch.ops.cprune_native.moe_forward.default, tensors)
    op = torch.ops.cprune_native.moe_forward
    compiled = torch.compile(lambda *x: op(*x).relu(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*tensors), case.run().relu())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden": torch.zeros(131, 48)}, "gate_up must be float32, got bfloat16"),
        ({"hidden": torch.zeros(131, 48, dtype=torch.float64)}, "hidden must be bfloat16, float16 or float32"),
        ({"hidden": torch.zeros(131)}, r"hidden must be \[T, H\], got \[131\]"),
        ({"index": torch.zeros(130, 2, dtype=torch.int64)}, r"index must be \[131, 2\], got \[130, 2\]"),
        ({"index": torch.zeros(131, 2)}, "index must be int64, got float32"),
        ({"gates": torch.zeros(131, 2).bfloat16()}, "gates must be float32, got bfloat16"),
        ({"down": torch.zeros(5, 40, 24).bfloat16()}, r"down must be \[5, 48, 24\], got \[5, 40, 24\]"),
        ({"down": torch.zeros(0, 48, 24).bfloat16()}, r"gate_up must be \[0, 48, 48\], got \[5, 48, 48\]"),
        ({"gate_up_bias": torch.zeros(5, 24).bfloat16()}, r"gate_up_bias must be \[5, 48\], got \[5, 24\]"),
        ({"down_bias": torch.zeros(5, 48)}, "down_bias must be bfloat16, got float32"),
        ({"activation": 3}, r"activation must lie in \[0, 2\], got 3"),
        ({"limit": -1.0}, "limit must be at least 0, got -1"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(change: dict[str, object], sentence: str) -> None:
    case = replace(make(131, 2, 5, 48, 24), **change)
    with pytest.raises(RuntimeError, match=sentence):
        case.run()


def test_instructions_must_be_of_this_machine() -> None:
    with pytest.raises(RuntimeError, match="isa must be one of"):
        make(1, 1, 1, 8, 8).run("sse9")
