"""What the model of wide tiles counts, by hand and against playing it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from cprune_kernels import wide_cost
from cprune_kernels.cost import MoEShape, Tile, product_cost
from cprune_kernels.gpu import H100
from cprune_kernels.load import load_of

QWEN3 = MoEShape(128, 8, 2048, 768, torch.bfloat16)
WIDE = Tile(192, 128, 64, 12, 3, tma=True, wide=True)


@pytest.mark.parametrize(("blocks", "shared"), [(1, 640), (2, 1024), (3, 1472)])
def test_clocks_of_a_step_of_a_wide_tile(blocks: int, shared: int) -> None:
    """32 KiB of weights and 8 a block written; 40 read for 64 rows of all columns, 24 for as many of half of them."""
    kib = 32 + 8 * blocks + (40 * min(blocks, 2) + 2 * 24 * (blocks == 3))
    assert kib * 1024 / 128 == shared
    assert wide_cost.step_clocks(blocks, 2, 2048, 128) == (blocks * 512, shared)


def test_the_walk_over_wide_tiles_by_hand() -> None:
    """An expert of 100 tiles of rows by 6 of columns: 600 for 132 SMs; then 800 of down, and half of one more."""
    clock, rows = H100.flops / (2 * 132 * 2048), 100 * 192
    two = 128 * 128 * 2 / 128 + 1.25 * 128 * 128 / 16
    up = 32 * 1536 + two + (1472 + 128 - 1536)  # the third block's results are in the way of operands
    down = 12 * 1536 + 512 + (1472 + 2 * 256 - 1536)
    by_rows = 3 * 64 * 128 * 2 / 128  # the last block of the expert's rows, and twice as much of down
    shape = replace(QWEN3, experts=1, top_k=1)
    part = product_cost("gate_up", WIDE, shape, rows, load_of([rows]), H100)
    assert part.seconds == pytest.approx(0.6e-6 + 1.7e-6 + (600 * up + 6 * by_rows) / 132 / clock, rel=1e-6)
    part = product_cost("down", replace(WIDE, n=256), shape, rows, load_of([rows]), H100)
    assert part.seconds == pytest.approx(1.4e-6 + ((800 * down + 16 * by_rows) / 132 + down / 2) / clock, rel=1e-6)


def test_down_ends_no_sooner_than_the_last_tile_of_gate_up_lets_it() -> None:
    """One tile of rows: each SM has a tile of gate_up at most, and its tile of down waits for all of them."""
    shape, load = replace(QWEN3, experts=1, top_k=1), load_of([192])
    clock = H100.flops / (2 * 132 * 2048)
    parts = [product_cost(p, replace(WIDE, n=n), shape, 192, load, H100) for p, n in (("gate_up", 128), ("down", 256))]
    assert sum(part.seconds for part in parts) > (32 * 1536 + 12 * 1536) / clock + 4e-6


def test_the_end_of_a_wide_tile_of_down() -> None:
    """64 KiB leave by way of 48: the rest waits until as much has left at 64 bytes a clock; and two pairs of places."""
    assert wide_cost.end_clocks(256, 2, 2, False, 2048, 128, 16) == max(65536, 2 * 16384 + 2 * 16384) / 128
    assert wide_cost.end_clocks(256, 1, 2, False, 2048, 128, 16) == 32768 / 128
    assert wide_cost.end_clocks(256, 3, 2, False, 2048, 128, 16) == 512 + 448


def test_who_takes_tiles_in_turn_ends_within_one() -> None:
    """Against playing it: SMs that start anywhere in a tile take 3 and 2 blocks' tiles as they become free."""
    load, draw = load_of([512] * 64), random.Random(0)
    mean, after, longest = wide_cost.walk(load, 8, 132, (1.0, 2.0, 3.0))
    assert mean == pytest.approx(8 * 64 * (2 + 3 + 3) / 132) and longest == 3.0
    late = []
    for _ in range(20):
        free = [draw.uniform(0, 3) for _ in range(132)]
        for tile in [3.0, 3.0, 2.0] * 8 * 64:
            place = free.index(min(free))
            free[place] += tile
        late.append(max(free) - sum(free) / 132)
    assert after == pytest.approx(sum(late) / 20, rel=0.1)


def test_tiles_of_an_expert_are_alike() -> None:
    """An expert of 10 blocks has tiles of 3, 3, 2 and 2; one of 40 rows has one of 1."""
    assert load_of([640, 40, 640]).levelled(64) == (1, 4, 4)
    for rows in range(1, 2000):
        one, two, three = load_of([rows]).levelled(64)
        assert one + 2 * two + 3 * three == -(-rows // 64) and one + two + three == -(-rows // 192)
