"""What the model takes for granted about persistent tiles, in their machine code."""

from __future__ import annotations

import pytest

from cprune_kernels import cost
from cprune_kernels.fused_moe import SILU
from cprune_kernels.moe_launches import moe_forward_launches
from cprune_kernels.picker import H100, Tile, legal_tiles
from tests.aot.compiled import compile_launch, facts
from tests.cases.fused_moe import BF16, config, meta, only

TILES = [(p, tile) for p in ("gate_up", "down") for tile in legal_tiles(p, BF16, H100) if tile.persistent]


@pytest.mark.parametrize(("product", "tile"), TILES, ids=str)
def test_the_model_knows_a_persistent_tile(product: cost.Product, tile: Tile) -> None:
    [launch] = only(f"{product}_persistent_kernel", moe_forward_launches(*meta(), SILU, H100, config(tile))[0])
    found = facts(compile_launch(launch, H100))
    assert found.shared_bytes == cost.shared_bytes(product, tile, 2, 90)
    assert found.registers <= cost.registers(product, tile, 2, 90)
    assert found.ctas_per_sm == cost.ctas_per_sm(product, tile, 2, H100) == 1


@pytest.mark.parametrize("product", ["gate_up", "down"])
def test_copies_run_on_across_tiles(product: cost.Product) -> None:
    """One loop, with the steps' copies before the epilogue's stores: not a loop of steps inside one of tiles."""
    tile = next(tile for p, tile in TILES if p == product)
    [launch] = only(f"{product}_persistent_kernel", moe_forward_launches(*meta(), SILU, H100, config(tile))[0])
    ptx = compile_launch(launch, H100).ptx
    assert ptx.count("Loop Header: Depth=1") == 1 and "Depth=2" not in ptx
    loop = ptx[ptx.index("Loop Header: Depth=1") :]
    order = [loop.index(what) for what in ("wgmma.mma_async", "cp.async.bulk.tensor", "st.global")]
    assert order == sorted(order)
