"""Native kernels and their specification against float64, an expert at a time, within budgets that follow from bf16.

A product of bf16 numbers is exact in float32, so float32 sums of n products err by at most n 2^-24 of the sum of
absolute products; the activations are rounded once to bf16, 2^-8 of each. The budgets carry these through the formula.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cprune_kernels
from cprune_kernels import native
from cprune_kernels.fused_moe import MoEObservation, moe_observe, moe_observe_reference
from tests.kernels.moe_case import Case, make

U32, U16 = 2.0**-24, 2.0**-8  # unit roundoff of float32 and bf16
SHAPES = [(131, 2, 3, 48, 24), (300, 4, 131, 200, 96), (131, 1, 5, 33, 7), (600, 2, 4, 257, 130), (1, 3, 9, 64, 32)]
SHAPES += [(0, 2, 3, 48, 24), (5, 0, 3, 48, 24)]


def portable(*tensors: Tensor) -> MoEObservation:
    hidden, index, gates, gate_up, down, valid = tensors
    return MoEObservation(
        *torch.ops.cprune_native.moe_observe(hidden, index, gates.float(), gate_up, down, valid, "portable")
    )


@pytest.fixture(params=["native", "portable", "reference"])
def kernel(request: pytest.FixtureRequest) -> Callable[..., MoEObservation]:
    if request.param != "reference" and cprune_kernels.backend() == "reference":
        pytest.skip("the native kernels were not built")
    return {"native": moe_observe, "portable": portable, "reference": moe_observe_reference}[request.param]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_within_budget(case: Case, got: MoEObservation) -> None:
    """Every number of `got` against float64, an expert at a time, elementwise."""
    hidden, gates, gate_up, down = (x.double() for x in (case.hidden, case.gates, case.gate_up, case.down))
    width, inner = down.shape[1:]
    expected = MoEObservation(*(torch.zeros(x.shape, dtype=torch.float64) for x in got))
    expected.high.fill_(-torch.inf), expected.low.fill_(torch.inf)
    budget = MoEObservation(*(torch.zeros(x.shape, dtype=torch.float64) for x in got))
    for expert in range(len(down)):
        token, slot = (case.index == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        x, w = hidden[token], down[expert]
        gate, up = (x @ gate_up[expert].T).chunk(2, 1)
        gate_error, up_error = ((width + 2) * U32 * (x.abs() @ gate_up[expert].abs().T)).chunk(2, 1)
        act = F.silu(gate) * up
        act_error = 1.1 * gate_error * (up.abs() + up_error) + F.silu(gate).abs() * up_error  # |silu'| < 1.1
        act_error = act_error + (U16 + 8 * U32) * (act.abs() + act_error)  # exp, quotient, product; then to bf16
        y = act @ w.T
        error = act_error @ w.abs().T + (inner + 2) * U32 * ((act.abs() + act_error) @ w.abs().T)
        gated = gates[token, slot].unsqueeze(1)
        expected.out.index_add_(0, token, y * gated)
        combine = (case.index.shape[1] + 2) * U32
        budget.out.index_add_(0, token, gated.abs() * (error + combine * (y.abs() + error)))
        expected.norms[token, slot] = y.norm(dim=1)
        budget.norms[token, slot] = error.norm(dim=1) + (width + 2) * U32 * (y.norm(dim=1) + error.norm(dim=1))
        keep = case.valid[token]
        if bool(keep.any()):
            y, error = y[keep], error[keep]
            expected.high[expert], expected.low[expert] = y.max(), y.min()
            budget.high[expert] = budget.low[expert] = error.max()
            expected.sums[expert] = y.sum(0)
            budget.sums[expert] = error.sum(0) + (len(y) + 2) * U32 * (y.abs() + error).sum(0)
    for name, value in got._asdict().items():
        want, limit = getattr(expected, name), getattr(budget, name)
        assert value.dtype == torch.float32, name
        same = value.double() == want  # infinities, and what nothing was added to
        assert bool((same | ((value - want).abs() <= limit)).all()), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_number_is_that_of_float64(kernel: Callable[..., MoEObservation], shape: tuple[int, ...]) -> None:
    case = make(*shape)
    assert_within_budget(case, kernel(*case.tensors))


def test_experts_without_tokens_and_one_with_all(kernel: Callable[..., MoEObservation]) -> None:
    case = make(700, 1, 4, 48, 24)
    case.index[:] = 2
    got = kernel(*case.tensors)
    assert_within_budget(case, got)
    assert got.high[[0, 1, 3]].isneginf().all() and got.low[[0, 1, 3]].isposinf().all()
    assert not got.sums[[0, 1, 3]].any() and got.sums[2].any()


def test_slots_outside_of_the_experts_contribute_nothing(kernel: Callable[..., MoEObservation]) -> None:
    case = make(131, 3, 5, 48, 24)
    case.index[::2, 1], case.index[1::3, 2] = 5, -1
    got = kernel(*case.tensors)
    assert_within_budget(case, got)
    assert not got.norms[::2, 1].any() and not got.norms[1::3, 2].any() and got.norms[:, 0].all()


def test_tokens_that_do_not_count_are_combined_but_not_observed(kernel: Callable[..., MoEObservation]) -> None:
    case = make(131, 2, 3, 48, 24)
    every = torch.ones_like(case.valid)
    got, whole = kernel(*case.tensors), kernel(*case.tensors[:-1], every)
    assert torch.equal(got.out, whole.out) and torch.equal(got.norms, whole.norms)
    case.hidden[~case.valid] *= 300  # what only those who do not count can see
    louder, whole = kernel(*case.tensors), kernel(*case.tensors[:-1], every)
    for name in ("high", "low", "sums"):
        assert torch.equal(getattr(louder, name), getattr(got, name))
        assert not torch.equal(getattr(whole, name), getattr(got, name))
    none = kernel(*case.tensors[:-1], torch.zeros_like(case.valid))
    assert none.high.isneginf().all() and none.low.isposinf().all() and not none.sums.any()


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4, 1e30])
def test_activation_holds_at_its_ends(kernel: Callable[..., MoEObservation], scale: float) -> None:
    case = make(131, 2, 3, 48, 24)
    case.gate_up[:, :24] *= scale  # the rows of gate
    case.gate_up[:, 24:] /= scale
    got = kernel(*case.tensors)
    assert got.out.isfinite().all()
    assert_within_budget(case, got)


def test_what_is_not_finite_stays_with_its_token(kernel: Callable[..., MoEObservation]) -> None:
    case = make(131, 2, 3, 48, 24)
    clean = kernel(*case.tensors)
    case.hidden[70, 3] = torch.nan
    got = kernel(*case.tensors)
    others = torch.arange(131) != 70
    assert torch.equal(got.out[others], clean.out[others]) and torch.equal(got.norms[others], clean.norms[others])
    assert got.out[70].isnan().all() and got.norms[70].isnan().all()


def misplaced(x: Tensor) -> Tensor:
    """`x` two bytes off every alignment."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)
    return memory[1:].view(x.shape).copy_(x)


def spread(x: Tensor) -> Tensor:
    """`x` with strides of its own in every dimension but the last."""
    memory = torch.full([2 * size for size in x.shape[:-1]] + [x.shape[-1] + 3], 77, dtype=x.dtype)
    view = memory[..., : x.shape[-1]]
    for dim in range(x.dim() - 1):
        view = view.narrow(dim, 0, 2 * x.shape[dim])[(slice(None),) * dim + (slice(None, None, 2),)]
    return view.copy_(x)


def transposed(x: Tensor) -> Tensor:
    """`x` with its last dimension not contiguous."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("place", [misplaced, spread, transposed])
def test_place_in_memory_changes_no_bit(
    kernel: Callable[..., MoEObservation], place: Callable[[Tensor], Tensor]
) -> None:
    case = make(131, 2, 5, 50, 26)
    moved = [place(x) if x.dim() > 1 else x for x in case.tensors]
    assert all(torch.equal(a, b) for a, b in zip(moved, case.tensors, strict=True))
    if kernel is moe_observe_reference:
        assert_within_budget(case, kernel(*moved))  # the library may sum in another order
        return
    for got, expected in zip(kernel(*moved), kernel(*case.tensors), strict=True):
        assert torch.equal(got, expected)


def test_weights_are_read_from_a_memory_map(kernel: Callable[..., MoEObservation], tmp_path: Path) -> None:
    case = make(131, 2, 5, 48, 24)
    expected = kernel(*case.tensors)
    for name in ("gate_up", "down"):
        weight = getattr(case, name)
        (tmp_path / name).write_bytes(weight.view(torch.uint8).numpy().tobytes())
        mapped = torch.from_file(str(tmp_path / name), size=weight.numel(), dtype=torch.bfloat16)
        setattr(case, name, mapped.view(weight.shape))
    for got, want in zip(kernel(*case.tensors), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(300, 4, 13, 200, 96), (7, 2, 5, 130, 300), (3000, 2, 3, 130, 600)], ids=str)
def test_number_of_threads_changes_no_bit(
    kernel: Callable[..., MoEObservation], shape: tuple[int, ...], threads: Callable[[int], None]
) -> None:
    if kernel is moe_observe_reference:
        pytest.skip("only the native kernels promise it")
    case, results = make(*shape), []
    for count in (1, 2, 2, 5):
        threads(count)
        results.append(kernel(*case.tensors))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_other_types_run_on_the_specification(dtype: torch.dtype) -> None:
    case = make(131, 2, 5, 48, 24)
    got = moe_observe(case.hidden.to(dtype), case.index, case.gates, case.gate_up.to(dtype), case.down.to(dtype))
    case.valid[:] = True
    assert_within_budget(case, got)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("hidden", lambda x: x[0], r"hidden must be a floating \[T, H\], got torch.bfloat16 of shape \[48\]"),
        ("hidden", lambda x: x.int(), r"hidden must be a floating \[T, H\], got torch.int32"),
        ("index", lambda x: x[:-1], r"index must be an int64 \[131, K\], got torch.int64 of shape \[130, 2\]"),
        ("index", lambda x: x.int(), r"index must be an int64 \[131, K\], got torch.int32"),
        ("gates", lambda x: x[:, :1], r"gates must be floating of the shape of index \[131, 2\], got .* \[131, 1\]"),
        ("down", lambda x: x[:, :40], r"down must be a torch.bfloat16 \[E, 48, I\], got .* \[5, 40, 24\]"),
        ("down", lambda x: x.float(), r"down must be a torch.bfloat16 \[E, 48, I\], got torch.float32"),
        ("down", lambda x: x[:0], r"down must be a torch.bfloat16 \[E, 48, I\], got .* \[0, 48, 24\]"),
        ("gate_up", lambda x: x[:4], r"gate_up must be a torch.bfloat16 \[5, 48, 48\], got .* \[4, 48, 48\]"),
        ("gate_up", lambda x: x.half(), r"gate_up must be a torch.bfloat16 \[5, 48, 48\], got torch.float16"),
        ("valid", lambda x: x[1:], r"valid must be a bool \[131\], got torch.bool of shape \[130\]"),
        ("valid", lambda x: x.int(), r"valid must be a bool \[131\], got torch.int32"),
        ("down", lambda x: x.to("meta"), "all tensors must be on one device, got cpu and meta"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(
    name: str, change: Callable[[Tensor], Tensor], sentence: str
) -> None:
    case = make(131, 2, 5, 48, 24)
    setattr(case, name, change(getattr(case, name)))
    with pytest.raises(ValueError, match=f"^{sentence}[^\n]*$"):
        moe_observe(*case.tensors)


@pytest.mark.parametrize("place", range(6))
def test_operator_itself_refuses_too(place: int) -> None:
    if cprune_kernels.backend() == "reference":
        pytest.skip("the native kernels were not built")
    tensors = list(make(131, 2, 5, 48, 24).tensors)
    for wrong in (tensors[place].to(torch.int16), tensors[place][..., :-1], tensors[place][None]):
        with pytest.raises(RuntimeError, match="must be"):
            torch.ops.cprune_native.moe_observe(*tensors[:place], wrong, *tensors[place + 1 :])


def test_operator_can_be_traced_and_compiled() -> None:
    if cprune_kernels.backend() == "reference":
        pytest.skip("the native kernels were not built")
    case = make(31, 2, 5, 48, 24)
    torch.library.opcheck(torch.ops.cprune_native.moe_observe.default, case.tensors)
    compiled = torch.compile(lambda *tensors: moe_observe(*tensors).out.relu(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*case.tensors), moe_observe(*case.tensors).out.relu())


def test_without_native_kernels_it_says_so_once_and_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "broken.so").write_bytes(b"no library")
    for library, reason in ((tmp_path / "none.so", "they were not built"), (tmp_path / "broken.so", "broken.so")):
        monkeypatch.setattr(native, "LIBRARY", library)
        with caplog.at_level(logging.WARNING):
            assert native._load.__wrapped__() == "reference"
        (record,) = caplog.records
        assert reason in record.message and "reference operations" in record.message
        caplog.clear()
    monkeypatch.setattr("cprune_kernels.fused_moe.backend", lambda: "reference")
    monkeypatch.setattr(torch.ops.cprune_native, "moe_observe", None, raising=False)
    case = make(31, 2, 5, 48, 24)
    assert_within_budget(case, moe_observe(*case.tensors))
