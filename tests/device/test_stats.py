"""Kernels of the calibration statistics against brute force in float64.

Products of float32 numbers are exact in float64 and every sum has fewer than 2^20 terms, so at 2^-53 a rounding no sum
of non-negative terms errs by more than 2^-32 of itself; integers are exact.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cprune_kernels.output_stats import STEPS, expert_output_launches, expert_output_reference
from cprune_kernels.picker import Arch
from cprune_kernels.routing import RoutedTokens
from cprune_kernels.stats import ExpertSums
from cprune_kernels.stats_launches import expert_statistics_launches
from tests.cases.stats import Case, grouped, make
from tests.kernels.test_stats_kernels import assert_sums, by_hand

CASES = {
    "ragged": make(131, 3, 7, skip=(2,)),
    "300": make(300, 8, 43, dropped=0.4),
    "two column tiles": make(40, 6, 131),
    "one token": make(1, 2, 9, dropped=0.0, valid=False),
    "none dropped, none masked": make(300, 2, 5, dropped=0.0, valid=False),
    "no scale": make(131, 2, 5, scale=False),
    "all dropped": make(30, 2, 5, dropped=1.0),
    "bfloat16 gates": make(131, 2, 5, dtype=torch.bfloat16),
    "float16 gates": make(131, 2, 5, dtype=torch.float16),
    "int32": make(131, 2, 5, index_dtype=torch.int32),
    "one expert": make(5000, 1, 1),
    "no token": make(0, 2, 3),
}


def placed(case: Case, device: str) -> list[Tensor | None]:
    return [None if x is None else x.to(device) for x in case.tensors]


def placed_grouping(case: Case, device: str) -> RoutedTokens:
    return RoutedTokens(*(x.to(device) for x in grouped(case.index, case.experts)))


def run(case: Case, device: str, arch: Arch) -> ExpertSums:
    routed = placed_grouping(case, device)
    launches, sums = expert_statistics_launches(*placed(case, device), routed, case.experts, arch)
    for launch in launches:
        launch.run()
    return ExpertSums(*(x.cpu() for x in sums))


@pytest.mark.parametrize("name", CASES)
def test_sums_are_those_of_brute_force(name: str, device: str, arch: Arch) -> None:
    case = CASES[name]
    assert_sums(run(case, device, arch), by_hand(case))


def test_all_tokens_on_one_expert_are_split_among_programs(device: str, arch: Arch) -> None:
    case = make(5000, 2, 4, dropped=0.0)
    case.index[:, 0], case.index[:, 1] = 3, -1
    launches, _ = expert_statistics_launches(*case.tensors, grouped(case.index, 4), 4, arch)
    assert launches[0].grid[1] > 1
    assert_sums(run(case, device, arch), by_hand(case))


def test_repetition_changes_no_bit(device: str, arch: Arch) -> None:
    case = make(700, 4, 9)
    for first, second in zip(run(case, device, arch), run(case, device, arch), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "top_k", "experts", "width"), [(131, 3, 5, 130), (300, 2, 3, 1100), (1, 2, 4, 48)])
def test_outputs_are_those_of_brute_force(
    tokens: int, top_k: int, experts: int, width: int, dtype: torch.dtype, device: str, arch: Arch
) -> None:
    for valid in (True, False):
        case = make(tokens, top_k, experts, skip=(1,), valid=valid)
        generator = torch.Generator().manual_seed(width)
        rows = torch.randn(tokens * top_k, width, generator=generator).to(dtype)
        routed = grouped(case.index, experts)
        rows[int(routed.offsets[-1]) :] = torch.nan  # of pairs without an expert: not to be read
        want = expert_output_reference(rows, routed.order, routed.offsets, case.valid, top_k)
        magnitude = expert_output_reference(rows.abs(), routed.order, routed.offsets, case.valid, top_k).sums
        on_device = None if case.valid is None else case.valid.to(device)
        launches, out = expert_output_launches(rows.to(device), placed_grouping(case, device), on_device, experts, arch)
        for launch in launches:
            launch.run()
        assert torch.equal(out.high.cpu(), want.high) and torch.equal(out.low.cpu(), want.low)
        # STEPS - 1 additions in float32, then float64, then one rounding to float32; the reference rounds once too
        assert ((out.sums.cpu() - want.sums).abs() <= (STEPS + 1) * 2.0**-24 * magnitude).all()
        assert out.high[1] == -torch.inf and out.low[1] == torch.inf and not out.sums[1].any()


def test_no_row_counts(device: str, arch: Arch) -> None:
    case = make(20, 2, 3)
    assert case.valid is not None
    nobody = torch.zeros_like(case.valid).to(device)
    rows = torch.randn(40, 48).to(device)
    launches, out = expert_output_launches(rows, placed_grouping(case, device), nobody, 3, arch)
    for launch in launches:
        launch.run()
    assert out.high.isneginf().all() and out.low.isposinf().all() and not out.sums.any()
