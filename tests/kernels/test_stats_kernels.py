"""The statistics of routed pairs against their definitions, a token and a slot at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cprune_kernels.stats import ExpertSums, expert_statistics, expert_statistics_reference
from tests.cases.stats import Case, make

SHAPES = [(131, 3, 7), (300, 8, 43), (1, 2, 9), (0, 2, 3), (5, 0, 3), (17, 1, 1)]


def by_hand(case: Case) -> ExpertSums:
    num = case.experts
    sums = ExpertSums(*(torch.zeros(num, dtype=torch.float64) for _ in range(8)), torch.zeros(num, num))
    for token in range(len(case.index)):
        if case.valid is not None and not case.valid[token]:
            continue
        chosen = case.index[token].tolist()
        for slot, expert in enumerate(chosen):
            if not 0 <= expert < num:
                continue
            gate, norm = case.gates[token, slot].double(), case.norms[token, slot].double()
            sums.count[expert] += 1
            sums.gate_sum[expert] += gate
            sums.gated_norm_sum[expert] += gate * norm
            sums.gated_sq_sum[expert] += (gate * norm) ** 2
            if case.scale is not None:
                sums.relative_sum[expert] += gate * norm / case.scale[token].double()
            sums.norm_sum[expert] += norm
            sums.norm_sq_sum[expert] += norm**2
            sums.norm_max[expert] = max(sums.norm_max[expert], norm)
            for other in chosen:
                if 0 <= other < num:
                    sums.coactivation[expert, other] += 1
    return sums


def assert_sums(got: ExpertSums, want: ExpertSums) -> None:
    """Integers exactly; sums of fewer than 2^20 non-negative terms, each rounded a few times in float64, to 2^-32."""
    for name, value in got._asdict().items():
        expected = getattr(want, name)
        assert value.shape == expected.shape, name
        if name in ("count", "coactivation"):
            assert value.dtype == torch.int64 and torch.equal(value, expected.long()), name
        elif name == "norm_max":
            assert value.dtype == torch.float64 and torch.equal(value, expected), name
        else:
            assert value.dtype == torch.float64, name
            assert ((value - expected).abs() <= 2.0**-32 * expected).all(), name


@pytest.mark.parametrize("kernel", [expert_statistics, expert_statistics_reference])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_those_of_brute_force(kernel: Callable[..., ExpertSums], shape: tuple[int, int, int]) -> None:
    for options in (
        {},
        {"scale": False, "valid": False},
        {"dropped": 0.0},
        {"dtype": torch.bfloat16},
        {"index_dtype": torch.int32},
    ):
        case = make(*shape, **options)
        assert_sums(kernel(*case.tensors, case.experts), by_hand(case))


def test_experts_without_tokens_and_one_with_all() -> None:
    case = make(300, 1, 4, dropped=0.0, valid=False)
    case.index[:] = 2
    sums = expert_statistics(*case.tensors, 4)
    assert sums.count.tolist() == [0, 0, 300, 0] and sums.coactivation.sum() == sums.coactivation[2, 2] == 300
    assert_sums(sums, by_hand(case))


def test_slots_outside_of_the_experts_count_nowhere() -> None:
    case = make(131, 2, 5, dropped=0.0)
    case.index[::2, 1], case.index[1::3, 0] = 5, -7
    case.norms[::2, 1] = torch.nan
    assert_sums(expert_statistics(*case.tensors, 5), by_hand(case))


def test_where_a_tokens_experts_differ_the_diagonal_of_the_coactivation_is_the_count() -> None:
    case = make(300, 4, 11)
    sums = expert_statistics(*case.tensors, 11)
    assert torch.equal(sums.coactivation.diagonal(), sums.count)
    assert torch.equal(sums.coactivation, sums.coactivation.T)


def test_a_hidden_state_of_zeros_makes_no_infinity() -> None:
    case = make(30, 2, 5)
    assert case.scale is not None
    case.scale[:] = 0.0
    assert expert_statistics(*case.tensors, 5).relative_sum.isfinite().all()


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("index", lambda x: x.short(), r"index must be an int32 or int64 \[T, K\], got torch.int16 of shape \[31, 2\]"),
        ("index", lambda x: x[0], r"index must be an int32 or int64 \[T, K\], got torch.int64 of shape \[2\]"),
        ("gates", lambda x: x[1:], r"gates must be floating of the shape of index \[31, 2\], got .* \[30, 2\]"),
        ("gates", lambda x: x.int(), r"gates must be floating of the shape of index \[31, 2\], got torch.int32"),
        ("norms", lambda x: x[:, :1], r"norms must be floating of the shape of index \[31, 2\], got .* \[31, 1\]"),
        ("scale", lambda x: x[1:], r"scale must be a floating \[31\], got torch.float32 of shape \[30\]"),
        ("valid", lambda x: x.int(), r"valid must be a bool \[31\], got torch.int32"),
        ("experts", lambda x: 0, "num_experts must be at least 1, got 0"),
        ("norms", lambda x: x.to("meta"), "all tensors must be on one device, got cpu and meta"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(
    name: str, change: Callable[[Tensor], Tensor], sentence: str
) -> None:
    case = make(31, 2, 5)
    arguments = {field: getattr(case, field) for field in ("index", "gates", "norms", "scale", "valid", "experts")}
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=f"^{sentence}[^\n]*$"):
        expert_statistics(*arguments.values())


def test_operator_can_be_traced_and_compiled() -> None:
    case = make(31, 2, 5)
    torch.library.opcheck(torch.ops.cprune.expert_statistics.default, (*case.tensors, 5))
    compiled = torch.compile(lambda *x: expert_statistics(*x, 5).gate_sum * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*case.tensors), expert_statistics(*case.tensors, 5).gate_sum * 2)
