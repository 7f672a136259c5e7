"""What the model of wide tiles counts, by hand and against playing it."""

from __future__ import annotations

import heapq
import random
from dataclasses import replace

import pytest
import torch

from cprune_kernels import wide_cost
from cprune_kernels.cost import MoEShape, Tile, combine_cost, product_cost
from cprune_kernels.gpu import H100
from cprune_kernels.load import load_of, uniform_load

QWEN3 = MoEShape(128, 8, 2048, 768, torch.bfloat16)
WIDE = Tile(192, 128, 64, 12, 3, tma=True, wide=True)
DOWN = replace(WIDE, n=256)


@pytest.mark.parametrize(("blocks", "shared"), [(1, 640), (2, 1024), (3, 1472)])
def test_clocks_of_a_step_of_a_wide_tile(blocks: int, shared: int) -> None:
    """32 KiB of weights and 8 a block written; 40 read for 64 rows of all columns, 24 for as many of half of them."""
    kib = 32 + 8 * blocks + (40 * min(blocks, 2) + 2 * 24 * (blocks == 3))
    assert kib * 1024 / 128 == shared
    assert wide_cost.step_clocks(blocks, 2, 2048, 128) == (blocks * 512, shared)


def test_the_walk_over_wide_tiles_by_hand() -> None:
    """An expert of 100 tiles of rows by 6 of columns: 600 for 132 SMs; then 800 of down, and half of one more."""
    clock, rows = H100.flops / (2 * 132 * 2048), 100 * 192
    one = 128 * 64 * 2 / 128 + 1.25 * 128 * 64 / 16
    up = 32 * 1536 + one + 2 * (1472 + 128 - 1536)  # what is finished beside products is in the way of operands
    down = 12 * 1472 + 2 * 192 * 256 * 2 / 128  # shared memory has no time to spare
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


def test_the_end_of_a_wide_tile() -> None:
    """Half of two blocks before the next tile, the other half beside its first step, the third beside the last one."""

    def end(columns: int, blocks: int, steps: int, special: bool) -> float:
        return wide_cost.end_clocks(columns, blocks, steps, 2, special, 2048, 128, 16)

    assert end(128, 3, 32, True) == 640 + 128 + 2 * 64 and end(128, 2, 32, True) == 640 + 128 + 128
    assert end(128, 1, 32, True) == 320 + 64 + 64
    assert end(256, 3, 22, False) == 256 + 2 * 192
    assert end(256, 3, 12, False) == 2 * 768 - 12 * 64 and end(256, 2, 22, False) == 2 * 512


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


def test_the_combine_begins_where_down_has_no_tile_left() -> None:
    """Against playing it: programs take tokens in turn and wait for what down reports; memory serves who has all."""
    shape, tokens = replace(QWEN3, experts=64), 4096
    load, draw = uniform_load(64, tokens, 1 / 8), random.Random(0)
    down = product_cost("down", DOWN, shape, tokens, load, H100)
    combine = combine_cost(shape, tokens, load, H100, DOWN, down)
    work = combine.bytes / H100.bandwidth * 1e6
    assert combine.seconds * 1e6 == pytest.approx(work + 0.6 - down.idle * 1e6)

    high, low = 12.98, 8.99  # us of a tile
    tiles = [(e, column, time) for e in range(64) for column in range(8) for time in (high, high, low)]
    free = [draw.uniform(0, high) for _ in range(132)]
    done = dict.fromkeys(((e, span) for e in range(64) for span in range(4)), 0.0)
    for place, (expert, column, time) in enumerate(tiles):
        end = heapq.heappop(free) + time
        heapq.heappush(free, end)
        said = end + (3.4 if len(tiles) - place > 132 else 0.6)  # in the third step of the next tile, or at the end
        done[expert, column // 2] = max(done[expert, column // 2], said)
    free.sort()
    programs = [(span, draw.sample(range(64), 8)) for span in range(4) for _ in range(tokens)]
    start, now, taken, serves = 2.0, free[0], 0, 0.05  # us until a program has its indices; of a round
    held: list[tuple[float, float, int]] = []  # when it is ready, us of all the bandwidth that it still wants, SM
    on = [0] * 132
    while taken < len(programs) or held:
        for sm in (sm for sm, end in enumerate(free) if end <= now):
            while on[sm] < 20 and taken < len(programs):
                span, experts = programs[taken]
                ready = max(now + start, *(done[expert, span] for expert in experts))
                held.append((ready, work / len(programs), sm))
                on[sm], taken = on[sm] + 1, taken + 1
        spare = serves * (1 - 0.86 * sum(end > now for end in free) / 132)  # what down leaves of the bandwidth
        ready = [one for one in held if one[0] <= now]
        share = spare / len(ready) if ready else 0.0
        held = [one for one in held if one[0] > now] + [(t, w - share, sm) for t, w, sm in ready if w > share]
        for _, wants, sm in ready:
            on[sm] -= wants <= share
        now += serves
    mean = sum(free) / 132
    assert now - mean == pytest.approx(work + 0.6, abs=1.0)
