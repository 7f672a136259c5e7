"""Clocks of a tile of expert_wide.py on its SM, and how the tiles of a load are shared out."""

from __future__ import annotations

import math

from cprune_kernels.load import Load

BLOCK = 64  # rows that are multiplied or not
BLOCKS = 3  # of the highest tile
COLUMNS = 256  # of the accumulator
STEP = 64  # columns of the summed dimension
PLACES = 6  # blocks of results by 64 columns that wait in shared memory to leave
SPECIAL = 1.5  # exponentials and reciprocals for a number of act, with silu


def shared_bytes(stages: int, itemsize: int) -> int:
    """A ring of tiles of either operand, places for results; barriers, and what the warpgroups are handed."""
    return (stages * (BLOCKS * BLOCK + COLUMNS) * STEP + PLACES * BLOCK * 64) * itemsize + 240


def step_clocks(blocks: int, itemsize: int, mma: int, shared_rate: int) -> tuple[float, float]:
    """(tensor core, shared memory): one block of rows for each of two warpgroups, half of the columns of the third."""
    written = (blocks * BLOCK + COLUMNS) * STEP
    read = (min(blocks, 2) * (BLOCK + COLUMNS) + (blocks == BLOCKS) * 2 * (BLOCK + COLUMNS // 2)) * STEP
    return blocks * BLOCK * COLUMNS * STEP / mma, (written + read) * itemsize / shared_rate


def end_clocks(columns: int, blocks: int, itemsize: int, special: bool, shared_rate: int, special_rate: int) -> float:
    """From the last product of a tile to the first of the next one.

    Results go to shared memory and leave from there by themselves, to L2 at half the rate. Beyond what the places hold,
    one from each warpgroup is written when a place is free.
    """
    results = blocks * BLOCK * columns
    pair = 2 * BLOCK * 64
    beyond = max(0, results - PLACES * BLOCK * 64)
    leave = max(results, 2 * beyond + 2 * pair * (beyond > 0)) * itemsize / shared_rate
    return leave + special * SPECIAL * results / special_rate


def shares(load: Load, column_tiles: int, sms: int) -> tuple[int, int, int]:
    """Tiles of one, two and three blocks for the SM that has most: the highest come first, to each SM by turns."""
    taken, before, passed = [], 0.0, 0
    for tiles, _ in reversed(load.levelled(BLOCK)):
        before += tiles * column_tiles
        upto = math.ceil(before / sms - 1e-9)
        taken.append(upto - passed)
        passed = upto
    three, two, one = taken
    return one, two, three
