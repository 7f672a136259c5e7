"""What the model takes for granted about wide tiles, in their machine code."""

from __future__ import annotations

import re

import pytest

from cprune_kernels import cost, wide_cost
from cprune_kernels.fused_moe import SILU
from cprune_kernels.moe_launches import moe_forward_launches
from cprune_kernels.picker import H100, legal_tiles
from tests.aot.compiled import Compiled, compile_launch, facts
from tests.aot.sass import complaints, disassemble
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


@pytest.mark.parametrize(("product", "special"), [("gate_up", wide_cost.SPECIAL), ("down", 0)])
def test_a_number_of_act_takes_an_exponential_and_a_quarter_of_a_reciprocal(product: str, special: float) -> None:
    """Each of the two parts has code for four times 64 rows by 64 numbers, of 128 threads.

    The third block, the half that is finished at once, and the other one with and without a tile after it.
    """
    count = facts(compiled(product)).count("MUFU")
    assert 0 <= count - special * 2 * 4 * 64 * 64 / 128 <= 8  # beside them a few divisions of integers


@pytest.mark.parametrize("product", ["gate_up", "down"])
def test_what_is_counted_is_integers(product: str) -> None:
    """Tiles that are taken, and reports: in whichever order they come, no result depends on them."""
    ptx = compiled(product).ptx
    counted = re.findall(r"(?<!\w)(?:atom|red)\.\S+", ptx)
    assert set(counted) == {"atom.global.gpu.relaxed.add.u32", "atom.global.gpu.release.add.u32"}


def test_what_is_reported_is_in_memory() -> None:
    """A store is waited for to its end, for all of a warpgroup, before one thread says so; who reads looks first."""
    copy = r"fence\.proxy\.async;[^@]*?cp\.async\.bulk\.wait_group\s+0;"
    for product in ("gate_up", "down"):
        ptx = compiled(product).ptx
        reports = re.findall(copy + r"\s+bar\.sync[^@]*?@%p\d+ atom\.global\.gpu\.release", ptx)
        assert len(reports) == ptx.count("gpu.release") >= 4
    order = r"ld\.global\.gpu\.acquire.*?fence\.proxy\.async;.*?cp\.async\.bulk\.tensor"
    assert re.search(order, compiled("down").ptx, re.DOTALL)


@pytest.mark.parametrize("product", ["gate_up", "down"])
def test_results_leave_while_others_are_multiplied(product: str) -> None:
    """Between products and the wait for them, in machine code: half of the tile before, and later the third block."""
    names = {"HGMMA": "m", "UTMASTG": "s", "WARPGROUP": "w"}
    [code] = disassemble([compiled(product).cubin], 90)
    order = "".join(names[opcode] for opcode, suffixes in code if opcode in names and "ARRIVE" not in suffixes)
    stores = "s" if product == "gate_up" else "ss"
    assert len(re.findall(f"mmmmw{stores}wmmmmw" + "m{8}" + f"ww{stores}w", order)) == 2


def test_all_are_under_way_early() -> None:
    """gate_up waits for the grouping, and only then lets down be launched; down and the combine wait for reports.

    The combine's last program waits for the end of down, so that who waits for the combine has waited for both.
    """
    tile = TILES[0][1]
    launches, _ = moe_forward_launches(*meta(), SILU, H100, config(tile, n=256))
    for launch, order in zip(
        launches[-3:], (["wait", "launch_dependents"], ["launch_dependents"], ["wait"]), strict=True
    ):
        found = compile_launch(launch, H100)
        assert re.findall(r"griddepcontrol\.(\w+);", found.ptx) == order
        assert found.specialised.options.launch_pdl == launch.early == (launch is not launches[0])
    gate_up = compile_launch(launches[-3], H100).ptx
    assert "ld.global" not in gate_up[: gate_up.index("griddepcontrol.wait;")]


def test_an_sm_holds_as_many_programs_of_the_combine_as_the_model_says() -> None:
    launches, _ = moe_forward_launches(*meta(), SILU, H100)
    [combine] = only("combine_kernel", launches)
    assert combine.constants["SPAN"] == cost._COMBINED
    found = compile_launch(combine, H100)
    assert facts(found).ctas_per_sm >= cost._COMBINES
    assert re.findall(r"(?<!\w)(?:atom|red)\.\S+", found.ptx) == ["atom.global.gpu.acquire.add.u32"]
