"""What the model takes for granted about wide tiles, in their machine code."""

from __future__ import annotations

import re

import pytest

from cprune_kernels import cost
from cprune_kernels.fused_moe import SILU
from cprune_kernels.moe_launches import moe_forward_launches
from cprune_kernels.picker import H100, legal_tiles
from tests.aot.compiled import Compiled, compile_launch, facts
from tests.aot.sass import complaints
from tests.cases.fused_moe import BF16, config, meta, only

TILES = [(p, tile) for p in ("gate_up", "down") for tile in legal_tiles(p, BF16, H100) if tile.wide]


def compiled(product: str) -> Compiled:
    [tile] = (tile for p, tile in TILES if p == product)
    [launch] = only(f"{product}_wide_kernel", moe_forward_launches(*meta(), SILU, H100, config(tile))[0])
    return compile_launch(launch, H100)


@pytest.mark.parametrize(("product", "tile"), TILES, ids=str)
def test_the_model_knows_a_wide_tile(product: cost.Product, tile: cost.Tile) -> None:
    found = facts(compiled(product))
    assert found.threads == 32 * tile.warps
    assert found.shared_bytes == cost.shared_bytes(product, tile, 2, 90)
    assert found.registers == cost.registers(product, tile, 2, 90)
    assert found.ctas_per_sm == cost.ctas_per_sm(product, tile, 2, H100) == 1


@pytest.mark.parametrize("product", ["gate_up", "down"])
def test_registers_go_to_those_that_multiply(product: str) -> None:
    """What each part has while it works; together no more than an SM has."""
    changes = [int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", compiled(product).ptx)]
    assert changes.count(232) == 2 and changes.count(40) == 1
    assert (232 + 232 + 40) * 128 <= 65536


@pytest.mark.parametrize("product", ["gate_up", "down"])
def test_products_do_not_wait_for_each_other(product: str) -> None:
    """The assembler says so where it has to end each one before it begins the next."""
    ptx = compiled(product).ptx
    assert complaints(ptx, 90) == []
    damaged = ptx.replace("wgmma.wait_group.sync.aligned 0;", "")
    assert damaged != ptx and "serialized" in "".join(complaints(damaged, 90))


@pytest.mark.parametrize(("product", "special"), [("gate_up", 1.5), ("down", 0)])
def test_a_number_of_act_takes_one_and_a_half_special_operations(product: str, special: float) -> None:
    """Each of the two parts holds 64 rows by 128 numbers and half as many more, of 128 threads."""
    count = facts(compiled(product)).count("MUFU")
    assert 0 <= count - special * 2 * (64 + 32) * 128 / 128 <= 8  # beside them a few divisions of integers
