"""What an experts forward costs on a GPU: a model of bytes, flops, clocks and launches, in seconds.

A product (gate_up or down) takes as long as the slowest of three things, then its ramps:

    SM    waves of CTAs, each k-step the slower of tensor core and shared memory, fills and epilogues between
    L2    every CTA's operand tiles, from L2 to the SMs
    HBM   each touched expert's weights, activations in and out, and what L2 cannot keep

It is analysis: constants come from published specifications and microbenchmarks, none is fitted to a goal, and what it
leaves out (power, TLB, imbalance between memory channels) makes a real device slower. It serves to rank tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from cprune_kernels import wide_cost
from cprune_kernels.gpu import GENERATIONS, SHARED_RATE, SPECIAL_RATE, Arch, l2_bandwidth, launch_seconds
from cprune_kernels.load import Load

Product = Literal["gate_up", "down"]
ROW_GROUP = 8  # row tiles that share a tile of weights before the next one is read


@dataclass(frozen=True)
class Tile:
    """The part of a product that one CTA computes."""

    m: int  # rows: (token, expert) pairs of one expert; 1: a pair (gate_up) or a token (down), without the tensor core
    n: int  # columns of the output; gate_up holds 2 n accumulator columns, n of gate and n of up
    k: int  # columns of the summed dimension taken per step
    warps: int
    stages: int
    split_k: int = 1  # parts of the summed dimension, each to a CTA of its own
    swap_ab: bool = False  # weights are the M side of the tensor core and tokens the N side (few tokens per expert)
    tma: bool = False  # weights come through tensor descriptors (capability >= 90)
    wide: bool = False  # 192 rows, walked over by one CTA on each SM: two warpgroups that multiply, one that copies


@dataclass(frozen=True)
class MoEShape:
    experts: int  # experts whose weights exist (C)
    top_k: int
    hidden: int
    intermediate: int
    dtype: torch.dtype


@dataclass(frozen=True)
class MoEConfig:
    """Tiles of the two products of an experts forward; both have the same m, one tile map serves both."""

    gate_up: Tile
    down: Tile

    @property
    def direct(self) -> bool:
        """Whether every pair reads the weights of its expert by itself: two launches, without grouping and combine."""
        return self.gate_up.m == 1


_PAIRS_A_BLOCK = 256
_COMBINED, _COMBINES = 512, 20  # columns that a program of the combine gives, and how many an SM holds
_ONE_LAUNCH = 4096  # pairs that a single kernel groups; more take three: counts, a scan, places


@dataclass(frozen=True)
class Part:
    """One step of a forward, or a bound of the whole."""

    name: str
    seconds: float
    bytes: float  # to and from HBM
    flops: float
    bound: str  # what sets its time
    idle: float = 0.0  # s of it that an SM has nothing to do on average, at its end, and memory could do more


@dataclass(frozen=True)
class Cost:
    """A forward, step by step; the steps wait for each other."""

    parts: tuple[Part, ...]

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def bytes(self) -> float:
        return sum(part.bytes for part in self.parts)

    @property
    def flops(self) -> float:
        return sum(part.flops for part in self.parts)

    @property
    def bound(self) -> str:
        """What bounds the longest step."""
        return max(self.parts, key=lambda part: part.seconds).bound


def tile_columns(product: Product, tile: Tile) -> int:
    """Columns of the accumulator: gate and up lie side by side in one."""
    return 2 * tile.n if product == "gate_up" else tile.n


def _is_wide(tile: Tile, itemsize: int, capability: int) -> bool:
    """Whether the warpgroup instructions serve the tile; they need 64 rows of weights or tokens and 16-bit numbers."""
    return capability >= 90 and itemsize < 4 and (tile.m >= 64 or tile.swap_ab)


def shared_bytes(product: Product, tile: Tile, itemsize: int, capability: int) -> int:
    """Shared memory of a CTA, to the byte as Triton lays it out: a ring of tiles of either operand, and barriers.

    mma.sync reads its operands through registers and wants one place less; wgmma takes gate_up's weights that way too
    where they are its row side.
    """
    if tile.wide:
        return wide_cost.shared_bytes(tile.stages, itemsize)
    wide = _is_wide(tile, itemsize, capability)
    places = tile.stages if wide else max(1, tile.stages - 1)
    weight_places = places - (wide and capability == 90 and tile.swap_ab and product == "gate_up")
    barriers = 8 * weight_places * tile.tma
    if wide and capability >= 100:
        barriers = -(-barriers // 16) * 16 + 16
    ring = (places * tile.m + weight_places * tile_columns(product, tile)) * tile.k * itemsize
    return ring + barriers


def registers(product: Product, tile: Tile, itemsize: int, capability: int) -> int:
    """Registers of a thread, about: the accumulator and addresses; beside wgmma also operands, for all of a k-step."""
    accumulator = tile.m * tile_columns(product, tile) // (32 * tile.warps)
    if tile.m == 1:  # a sum for every number of a step
        return 4 * accumulator * tile.k // 3 + 36
    if tile.wide:  # at the start; then 232 for those that multiply, 40 for the one that copies
        return 65536 // (32 * tile.warps) // 8 * 8
    if _is_wide(tile, itemsize, capability):
        return accumulator + 48
    if itemsize == 4:
        return 3 * accumulator + 40
    return (6 if tile.k * itemsize >= 128 else 4) * accumulator // 3 + 40


def ctas_per_sm(product: Product, tile: Tile, itemsize: int, arch: Arch) -> int:
    """How many CTAs of the product an SM holds at a time."""
    per_cta = shared_bytes(product, tile, itemsize, arch.capability) + 1024  # the system's own share
    fits = [
        (arch.shared_bytes + 1024) // per_cta,
        65536 // (registers(product, tile, itemsize, arch.capability) * 32 * tile.warps),
        64 // tile.warps,
    ]
    if arch.capability >= 100 and _is_wide(tile, itemsize, arch.capability):
        accumulator = tile.m if tile.swap_ab else tile_columns(product, tile)
        fits.append(512 // max(32, accumulator))  # columns of tensor memory
    return max(1, min(fits))


def step_clocks(product: Product, tile: Tile, itemsize: int, capability: int) -> tuple[float, float]:
    """Clocks of a k-step of one CTA on an SM of its own: (arithmetic, shared memory)."""
    generation = GENERATIONS[capability]
    rows, columns = tile.m, tile_columns(product, tile)
    if tile.swap_ab:
        rows, columns = columns, rows
    bytes_of = tile.k * itemsize
    write = (rows + columns) * bytes_of
    if tile.m == 1:  # halves are widened, then multiplied and added, without tensor cores
        operations = 1 if itemsize == 4 else 2
        return operations * columns * tile.k / generation.fma, 2 * write / SHARED_RATE
    if _is_wide(tile, itemsize, capability):  # each 64 rows read the columns anew
        rate, read = generation.mma, -(-rows // 64) * (64 + columns) * bytes_of
        rows = -(-rows // 64) * 64
    else:  # warps in a grid over the tile; each reads its rows and its columns
        rate = generation.fma if itemsize == 4 else generation.mma_sync
        down = min(rows // 16, 2 ** (int(math.log2(tile.warps)) // 2))
        read = (rows * (tile.warps // down) + columns * down) * bytes_of
    return rows * columns * tile.k / rate, (write + read) / SHARED_RATE


def peak_flops(arch: Arch, dtype: torch.dtype) -> float:
    """FLOP/s that a good kernel reaches; float32 is added as it is, without tensor cores."""
    fma = GENERATIONS[arch.capability].fma
    return 2 * fma * arch.sms * arch.clock if dtype.itemsize == 4 else arch.flops


def _clock(arch: Arch, dtype: torch.dtype) -> float:
    """Hz at which the SMs' widest instructions reach their peak: under full load the clock is below its best."""
    generation = GENERATIONS[arch.capability]
    per_clock = 2 * arch.sms * (generation.fma if dtype.itemsize == 4 else generation.mma)
    return min(arch.clock, peak_flops(arch, dtype) / per_clock)


def product_cost(product: Product, tile: Tile, shape: MoEShape, tokens: int, load: Load, arch: Arch) -> Part:
    """One product with its launch, and where gate_up is split, the kernel that adds its parts.

    Direct ones (m = 1) read an expert's weights once per pair, and down's give a token's sum over its slots; from
    capability 9.0 it has read its indices and waits when gate_up ends, whose last writes and the word of it pass L2.
    """
    generation, itemsize = GENERATIONS[arch.capability], shape.dtype.itemsize
    hidden, inner = shape.hidden, shape.intermediate
    depth, columns = (hidden, 2 * inner) if product == "gate_up" else (inner, hidden)
    out = inner if product == "gate_up" else hidden
    pairs = load.pairs
    width = tile_columns(product, tile)
    direct, row_tiles, stored = tile.m == 1, load.tiles(tile.m), pairs
    steps = math.ceil(math.ceil(depth / tile.k) / tile.split_k)
    if direct and product == "down":
        row_tiles, stored, steps = tokens, tokens, shape.top_k * steps
    ctas = row_tiles * -(-out // tile.n) * tile.split_k

    # SM: q CTAs pass through the fullest one, `held` at a time
    clock = _clock(arch, shape.dtype)
    step = max(step_clocks(product, tile, itemsize, arch.capability)) / clock
    buffers = max(2, tile.stages) - (not _is_wide(tile, itemsize, arch.capability))
    stream = steps * generation.latency / max(1, buffers - 1)  # a step is asked for so many steps ahead
    indices = 2 if product == "gate_up" and not direct else 1  # one after the other, before the data
    if tile.wide:  # a tile, and whether act is there; an expert's rows; whose rows. Later ones are taken first
        indices += 1
    early = direct and product == "down" and arch.capability >= 90
    fill = generation.latency + generation.l2_latency * indices * (not early)
    held = ctas_per_sm(product, tile, itemsize, arch)
    result = tile.m * (width if tile.split_k > 1 else tile.n) * (4 if tile.split_k > 1 else itemsize)
    epilogue = 4 * result / SHARED_RATE  # into shared memory, out by rows, and to L2 at half the rate
    if product == "gate_up" and tile.split_k == 1:
        epilogue += 2 * tile.m * tile.n / SPECIAL_RATE
    ramp = fill + epilogue / clock
    passed = math.ceil(ctas / arch.sms - 1e-9)
    idle = 0.0
    if tile.wide:
        rates = clock, generation.mma, SHARED_RATE, SPECIAL_RATE, generation.latency
        sizes, wait = (hidden, inner, itemsize), fill + generation.l2_latency
        sm, idle = wide_cost.seconds(
            product == "gate_up", tile.stages, sizes, load, wide_cost.Sm(*rates), arch.sms, wait
        )
        sm += fill
    else:
        sm = max(passed * steps * step + ramp, math.ceil(passed / held) * (ramp + max(steps * step, stream)))

    # L2: gathered rows past an expert's last are not read, rows of a descriptor's box are
    rows = row_tiles * tile.m if product == "down" and tile.tma else pairs
    if tile.wide and product == "down":
        rows = sum(blocks * tiles for blocks, tiles in enumerate(load.levelled(64), 1)) * 64
    taken = (rows + (pairs if direct else row_tiles) * width) * -(-out // tile.n) * depth * itemsize
    l2 = taken / l2_bandwidth(arch) + ramp

    # HBM
    weights = columns * depth * itemsize
    kept = weights <= generation.l2_bytes / 2
    reads = load.touched if kept else load.tiles(tile.m, ROW_GROUP)
    if direct:
        reads = pairs  # L2 may help where tokens share an expert; not counted on
    moved = reads * weights + stored * out * (4 * tile.split_k if tile.split_k > 1 else itemsize)
    moved += (16 if tile.wide else 8) * row_tiles  # the map, and what is counted beside it
    if product == "gate_up":
        if tile.split_k > 1:
            moved += pairs * inner * 4 * tile.split_k  # gate and up are both kept
        moved += 4 * pairs
        distinct = min(pairs, tokens) * hidden * itemsize
        moved += distinct if distinct <= generation.l2_bytes / 2 else pairs * hidden * itemsize
    else:
        moved += pairs * inner * itemsize + (8 * tokens * shape.top_k if direct else 0)
    hbm = moved / arch.bandwidth + ramp

    times = {"tensor core": sm, "L2": l2, "HBM": hbm}
    bound = max(times, key=times.__getitem__)
    if bound == "tensor core":
        arithmetic, shared = step_clocks(product, tile, itemsize, arch.capability)
        if stream > passed * steps * step:
            bound = "latency"
        elif shared > arithmetic:
            bound = "shared memory"
        elif itemsize == 4:
            bound = "arithmetic"
    start = generation.gap
    if early or tile.wide:  # wide ones of down follow as one CTA another on an SM: all are under way
        start = 2 * generation.l2_latency * (early or product == "gate_up")
    seconds = start + max(times.values())
    if product == "gate_up" and tile.split_k > 1:
        parts = pairs * inner * (8 * tile.split_k + itemsize)
        seconds += launch_seconds(arch) + parts / arch.bandwidth
        moved += parts
    flops = 2 * pairs * columns * (depth + (direct and product == "down"))  # gates, where no combine applies them
    return Part(product, seconds, moved, flops, bound, max(0.0, min(idle, sm - max(l2, hbm))))


def _group_cost(shape: MoEShape, tokens: int, load: Load, arch: Arch) -> Part:
    """Grouping the router's pairs by expert. Its choice, and sending it to the kept experts, come before a forward."""
    pairs = tokens * shape.top_k
    moved = pairs * (2 * 4 + 2 * 4) + 8 * (shape.experts + load.touched)  # read twice, placed
    seconds = launch_seconds(arch)
    if pairs > _ONE_LAUNCH:
        moved += 5 * 4 * shape.experts * pairs / _PAIRS_A_BLOCK  # the counts and their scan
        early = arch.capability >= 90  # wait for last writes and the word of it, and read them in L2
        seconds += 2 * (3 * GENERATIONS[arch.capability].l2_latency if early else launch_seconds(arch))
    seconds += moved / arch.bandwidth
    return Part("group", seconds, moved, 0.0, "latency" if 2 * moved / arch.bandwidth < seconds else "HBM")


def combine_cost(shape: MoEShape, tokens: int, load: Load, arch: Arch, tile: Tile, down: Part) -> Part:
    """The gates' weighted sum of each token's rows, after that product by these tiles.

    After wide ones it begins wherever these are at an end, with rows that are there, and memory does not wait for the
    last of them; unless all programs that an SM holds wait for rows of the experts that come last.
    """
    itemsize = shape.dtype.itemsize
    row = 4 * tile.split_k if tile.split_k > 1 else itemsize
    moved = (load.pairs * row + tokens * itemsize) * shape.hidden + 8 * tokens * shape.top_k
    ramp, work = launch_seconds(arch), moved / arch.bandwidth
    if tile.wide and load.pairs:
        generation = GENERATIONS[arch.capability]
        ramp = 2 * generation.l2_latency + max(0.0, generation.latency - down.idle)
        under_way = arch.sms / (sum(load.levelled(tile.m // 3)) * -(-shape.hidden // tile.n))
        waits = 1 - max(0.0, 1 - under_way) ** (load.pairs / tokens)
        programs = tokens * -(-shape.hidden // _COMBINED) / arch.sms
        before = work * min(1.0, _COMBINES * (1 - waits) / waits / programs)
        work -= min(down.idle, before)
    seconds = ramp + work
    return Part("combine", seconds, moved, 2 * load.pairs * shape.hidden, "latency" if 2 * ramp > seconds else "HBM")


def forward_cost(shape: MoEShape, tokens: int, arch: Arch, config: MoEConfig, load: Load) -> Cost:
    """A forward of the routed experts on hidden states [tokens, H] with these tiles: grouping, products, combine."""
    products = (
        product_cost("gate_up", config.gate_up, shape, tokens, load, arch),
        product_cost("down", config.down, shape, tokens, load, arch),
    )
    if config.direct:
        return Cost(products)
    combine = combine_cost(shape, tokens, load, arch, config.down, products[1])
    return Cost((_group_cost(shape, tokens, load, arch), *products, combine))


def floor(shape: MoEShape, tokens: int, arch: Arch, load: Load) -> Part:
    """No forward that keeps gate_up's outputs in memory is faster: each byte once, no padding, no launch.

    Bytes: the weights of the touched experts; hidden states in and out [T, H]; act [R, I] and y [R, H], both written
    and read. Or, where that is less, the weights once per pair and no y: a token's experts are then summed at once. The
    larger of bytes / bandwidth and flops / rate.
    """
    itemsize, pairs = shape.dtype.itemsize, load.pairs
    weights = 3 * shape.hidden * shape.intermediate
    ways = load.touched * weights + 2 * pairs * shape.hidden, pairs * weights
    moved = itemsize * (min(ways) + 2 * tokens * shape.hidden + 2 * pairs * shape.intermediate)
    flops = 6 * pairs * shape.hidden * shape.intermediate
    memory, arithmetic = moved / arch.bandwidth, flops / peak_flops(arch, shape.dtype)
    return Part("floor", max(memory, arithmetic), moved, flops, "HBM" if memory > arithmetic else "tensor core")
