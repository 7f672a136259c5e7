"""Which kernels a forward launches, and on how many CTAs."""

from __future__ import annotations

import pytest

from cprune_kernels.fused_moe import SILU
from cprune_kernels.moe_launches import moe_forward_launches
from cprune_kernels.picker import A100, B200, H100, Arch, Tile
from tests.cases.fused_moe import config, meta

LARGE = config(Tile(128, 128, 64, 8, 4, tma=True, persistent=True), n=256)


def products(arch: Arch, **layout: bool) -> dict[str, tuple[int, ...]]:
    launches, _ = moe_forward_launches(*meta(**layout), SILU, arch, LARGE if arch.capability == 90 else None)
    return {launch.kernel.__name__: launch.grid for launch in launches if "group" not in launch.kernel.__name__}


def test_large_tiles_walk_on_every_sm_of_hopper() -> None:
    grids = products(H100)
    assert list(grids)[-3:] == ["gate_up_persistent_kernel", "down_persistent_kernel", "combine_kernel"]
    assert grids["gate_up_persistent_kernel"] == grids["down_persistent_kernel"] == (132,)
    for arch in (A100, B200):
        assert list(products(arch))[-3:] == ["gate_up_kernel", "down_kernel", "combine_kernel"]


@pytest.mark.parametrize("layout", ["transposed", "interleaved", "biases"])
def test_other_layouts_have_a_cta_for_each_tile(layout: str) -> None:
    *_, gate_up, down, _ = grids = products(H100, **{layout: True})
    assert gate_up == "gate_up_kernel" and grids[gate_up] > (132,)
    assert down == ("down_persistent_kernel" if layout == "interleaved" else "down_kernel")


def test_only_what_follows_a_direct_gate_up_starts_early() -> None:
    for tokens, early in ((1, [False, True]), (64, [False] * 4)):
        for arch in (A100, H100, B200):
            launches, _ = moe_forward_launches(*meta(tokens), SILU, arch)
            expected = early if arch.capability >= 90 else [False] * len(early)
            assert [launch.early for launch in launches] == expected, (tokens, arch.name)
