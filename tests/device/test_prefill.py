"""The wide tiles of prefill on Hopper: every height and edge of a tile, and which CTA takes it changes no bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cprune_kernels.fused_moe import GELU, GELU_TANH, SILU, SWIGLU_OAI, Activation
from cprune_kernels.moe_launches import moe_forward_launches
from cprune_kernels.picker import Arch
from tests.device.test_fused_moe import PATHS, Case, assert_right, forward, make, runnable, spread

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def hopper(arch: Arch) -> None:
    runnable("prefill", arch)


def assert_computes(case: Case, arch: Arch) -> None:
    assert_right(case, forward(case, arch, PATHS["prefill"]))


@pytest.mark.parametrize("shape", [(1, 2, 5, 48, 40), (131, 2, 3, 72, 40), (450, 2, 3, 264, 264)], ids=str)
@pytest.mark.parametrize(("dtype", "activation"), [(BF16, SILU), (FP16, GELU_TANH)], ids=str)
def test_uneven_experts(
    device: str, arch: Arch, shape: tuple[int, ...], dtype: torch.dtype, activation: Activation
) -> None:
    case = make(device, *shape, dtype, activation=activation)
    case.index[::2, 1], case.index[1::5, 0] = -1, 0
    assert_computes(case, arch)


@pytest.mark.parametrize("rows", [1, 64, 65, 128, 129, 192, 193, 256, 257, 385])
def test_every_height_of_a_tile(device: str, arch: Arch, rows: int) -> None:
    """The rows of one expert, cut into tiles of one to three blocks, the last not full; another has one row."""
    case = make(device, rows + 1, 1, 3, 136, 72)
    case.index[:] = 1
    case.index[rows // 2] = 2
    assert_computes(case, arch)


@pytest.mark.parametrize("sizes", [(8, 8), (64, 128), (256, 64), (72, 136), (200, 256), (264, 392)], ids=str)
def test_widths(device: str, arch: Arch, sizes: tuple[int, int]) -> None:
    """Steps and tiles of columns that are full, or not; from one step on to more than the ring has places."""
    assert_computes(make(device, 70, 2, 3, *sizes), arch)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("activation", [GELU, Activation(limit=0.5), SWIGLU_OAI, Activation(alpha=1.7)], ids=str)
def test_curves(device: str, arch: Arch, activation: Activation, dtype: torch.dtype) -> None:
    case = make(device, 83, 2, 3, 72, 40, dtype, activation=activation)
    case.gate_up *= 3
    assert_computes(case, arch)


@pytest.mark.parametrize("activation", [SILU, GELU_TANH], ids=str)
def test_gates_far_from_zero(device: str, arch: Arch, activation: Activation) -> None:
    case = make(device, 83, 2, 3, 72, 40, activation=activation)
    case.gate_up[:, :40] *= 32
    assert_computes(case, arch)


def test_which_cta_takes_a_tile_changes_no_bit(device: str, arch: Arch) -> None:
    case = make(device, 150, 2, 4, 136, 264)
    case.index[::3, 1] = -1

    def computed(sms: int) -> torch.Tensor:
        tensors = case.hidden, case.index, case.gates, case.weights, case.activation
        launches, out = moe_forward_launches(*tensors, dataclasses.replace(arch, sms=sms), PATHS["prefill"])
        for launch in launches:
            launch.run()
        return out

    one, *others = (computed(sms) for sms in (1, 3, 132))
    assert_right(case, one)
    assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("name", ["hidden", "gates", "gate_up", "down"])
def test_place_in_memory_changes_no_bit(device: str, arch: Arch, name: str) -> None:
    case = make(device, 83, 2, 3, 72, 40)
    moved = dataclasses.replace(case, **{name: spread(getattr(case, name))})
    got, want = (forward(x, arch, PATHS["prefill"]) for x in (moved, case))
    assert_right(case, got)
    assert torch.equal(got, want)
