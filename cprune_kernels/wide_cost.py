"""Clocks of a tile of expert_wide.py on its SM, and how the tiles of a load are shared out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cprune_kernels.load import Load

BLOCK = 64  # rows that are multiplied or not
BLOCKS = 3  # of the highest tile
COLUMNS = 256  # of the accumulator
STEP = 64  # columns of the summed dimension
PLACES = 6  # blocks of results by 64 columns that wait in shared memory to leave
SPECIAL = 1.25  # exponentials and reciprocals for a number of act, with silu


@dataclass(frozen=True)
class Sm:
    """What an SM does."""

    clock: float  # Hz
    mma: int  # multiply-adds per clock
    shared_rate: int  # bytes per clock
    special_rate: int  # exponentials or reciprocals per clock
    latency: float  # s from a load to its data


def shared_bytes(stages: int, itemsize: int) -> int:
    """A ring of either operand, places for results; barriers, word of tiles, and what the warpgroups are handed."""
    return (stages * (BLOCKS * BLOCK + COLUMNS) * STEP + PLACES * BLOCK * 64) * itemsize + 320


def step_clocks(blocks: int, itemsize: int, mma: int, shared_rate: int) -> tuple[float, float]:
    """(tensor core, shared memory): one block of rows for each of two warpgroups, half of the columns of the third."""
    written = (blocks * BLOCK + COLUMNS) * STEP
    read = (min(blocks, 2) * (BLOCK + COLUMNS) + (blocks == BLOCKS) * 2 * (BLOCK + COLUMNS // 2)) * STEP
    return blocks * BLOCK * COLUMNS * STEP / mma, (written + read) * itemsize / shared_rate


def end_clocks(
    columns: int, blocks: int, steps: int, itemsize: int, special: bool, mma: int, shared_rate: int, special_rate: int
) -> float:
    """What a tile of so many steps takes beside them.

    Half of what two warpgroups have summed is finished before the next tile begins, the other half while its first step
    is multiplied, the third block while the last step of the others is: what these take longer counts, and what they
    write to shared memory from their operands. Results leave by themselves, but shared memory is read for that too: it
    bounds a tile whose steps leave no room for that.
    """
    arithmetic, shared = step_clocks(blocks, itemsize, mma, shared_rate)
    step = max(arithmetic, shared)
    half = min(blocks, 2) * BLOCK * columns // 2
    written = half * itemsize / shared_rate
    own = written + special * SPECIAL * half / special_rate
    beside = max(0.0, own - step_clocks(min(blocks, 2), itemsize, mma, shared_rate)[0], shared + written - step)
    moved = 2 * blocks * BLOCK * columns * itemsize / shared_rate
    return max(own + beside * (2 if blocks == BLOCKS else 1), moved - steps * (step - shared))


def walk(load: Load, column_tiles: int, sms: int, seconds: Sequence[float]) -> tuple[float, float, float]:
    """Of an SM that takes tiles of one, two and three blocks in turn with the others, each of so many seconds.

    (What it is busy on average, how much later than on average the last one ends, the longest tile.) When no tile is
    left, the SMs stand anywhere in theirs, and in a long one more likely than in a short one.
    """
    times = [(tiles * column_tiles, t) for tiles, t in zip(load.levelled(BLOCK), seconds, strict=True) if tiles]
    work, longest = sum(n * t for n, t in times), max((t for _, t in times), default=0.0)
    left = sum(n * t * t for n, t in times) / (2 * work) if work else 0.0
    return work / sms, longest - left, longest


def share(
    gate_up: bool, stages: int, sizes: tuple[int, int, int], load: Load, sm: Sm, sms: int, wait: float
) -> tuple[float, float, float]:
    """`walk` of a product of [H, I, itemsize].

    `wait` is from looking for a tile to its first data: it is looked for while all stages but one are worked on.
    """
    hidden, inner, itemsize = sizes
    columns, depth, width = (inner, hidden, 128) if gate_up else (hidden, inner, 256)
    steps, across, times = -(-depth // STEP), -(-columns // width), []
    for blocks in range(1, BLOCKS + 1):
        step = max(step_clocks(blocks, itemsize, sm.mma, sm.shared_rate)) / sm.clock
        end = end_clocks(width, blocks, steps, itemsize, gate_up, sm.mma, sm.shared_rate, sm.special_rate) / sm.clock
        stream = steps * sm.latency / (stages - 1)
        times.append(max(steps * step, stream) + end + max(0.0, wait - (stages - 1) * step - end))
    mean, after, longest = walk(load, across, sms, times)
    # an expert's last block leaves by rows: all of it out of shared memory, those that are to L2 at half the rate
    blocks = sum(height * tiles for height, tiles in enumerate(load.levelled(BLOCK), 1))
    rows = load.pairs - BLOCK * (blocks - load.touched)
    masked = (BLOCK * load.touched + 2 * rows) * across * width * itemsize / sms / sm.shared_rate / sm.clock
    return mean + masked, after, longest


def seconds(
    gate_up: bool, stages: int, sizes: tuple[int, int, int], load: Load, sm: Sm, sms: int, wait: float
) -> tuple[float, float]:
    """An SM's share of a product, and for how much of it an SM has no tile left on average.

    Down's begins wherever gate_up's ends, and takes what ends last.
    """
    mean, after, longest = share(True, stages, sizes, load, sm, sms, wait)
    if gate_up:
        return max(mean, longest), 0.0
    mean, own, longest = share(False, stages, sizes, load, sm, sms, wait)
    last = max(mean + own, after + longest)
    return last, last - mean
