"""Which kernels a forward launches, and on how many CTAs."""

from __future__ import annotations

import pytest

from cprune_kernels.fused_moe import GELU, GELU_TANH, SILU, SWIGLU_OAI
from cprune_kernels.moe_launches import moe_forward_launches
from cprune_kernels.picker import A100, B200, H100, Arch
from tests.cases.fused_moe import meta


def products(arch: Arch, **layout: bool) -> dict[str, tuple[int, ...]]:
    launches, _ = moe_forward_launches(*meta(16384, **layout), SILU, arch)
    return {launch.kernel.__name__: launch.grid for launch in launches if "group" not in launch.kernel.__name__}


def test_large_tiles_walk_on_every_sm_of_hopper() -> None:
    grids = products(H100)
    assert list(grids)[-3:] == ["gate_up_wide_kernel", "down_wide_kernel", "combine_kernel"]
    assert grids["gate_up_wide_kernel"] == grids["down_wide_kernel"] == (132,)
    for arch in (A100, B200):
        assert list(products(arch))[-3:] == ["gate_up_kernel", "down_kernel", "combine_kernel"]


@pytest.mark.parametrize("layout", ["transposed", "interleaved", "biases"])
def test_other_layouts_have_a_cta_for_each_tile(layout: str) -> None:
    *_, gate_up, down, _ = grids = products(H100, **{layout: True})
    assert (gate_up, down) == ("gate_up_kernel", "down_kernel") and grids[gate_up] > (132,)


def test_other_curves_have_a_cta_for_each_tile() -> None:
    for activation, wide in ((GELU_TANH, True), (GELU, False), (SWIGLU_OAI, False)):
        launches, _ = moe_forward_launches(*meta(16384), activation, H100)
        assert any(launch.kernel.__name__ == "gate_up_wide_kernel" for launch in launches) == wide


@pytest.mark.parametrize("name", ["hidden", "gate_up", "down"])
def test_what_no_descriptor_describes_has_a_cta_for_each_tile(name: str) -> None:
    hidden, index, gates, weights = meta(16384)
    if name == "hidden":
        hidden = meta(16384, width=2056)[0][:, 3:2051]
    else:
        odd = meta(4096, width=2056, inner=776)[3]._asdict()[name]
        weights = weights._replace(**{name: odd[..., 3 : 3 + getattr(weights, name).shape[-1]]})
        weights = weights._replace(gate_up=weights.gate_up[:, :, :768], down=weights.down[:, :2048])
    launches, _ = moe_forward_launches(hidden, index, gates, weights, SILU, H100)
    assert not any("wide" in launch.kernel.__name__ for launch in launches)


def test_what_starts_early_waits_itself() -> None:
    """Down of few tokens; of many, what follows the first step of grouping: all of it where tiles are wide."""
    group, rest = [False, True, True], [False] * 3
    expected = {
        1: {A100: [False] * 2, H100: [False, True], B200: [False, True]},
        64: dict.fromkeys((A100, H100, B200), [False] * 4),
        16384: {A100: [False] * 6, H100: [*group, True, True, True], B200: [*group, *rest]},
    }
    first = {"gate_up_direct_kernel", "count_pairs_kernel", "group_at_once_kernel"}  # what follows them may be early
    for tokens, by_arch in expected.items():
        for arch, early in by_arch.items():
            launches, _ = moe_forward_launches(*meta(tokens), SILU, arch)
            assert [launch.early for launch in launches] == early, (tokens, arch.name)
            for launch in launches:
                assert launch.constants.get("EARLY", launch.early) == (
                    arch.capability >= 90 if launch.kernel.__name__ in first else launch.early
                )
