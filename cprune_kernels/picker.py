"""Tile sizes from shapes: a pure function of an analytic model, because a pruned model has a size nobody tuned for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from cprune_kernels.cost import (
    MoEConfig,
    MoEShape,
    Part,
    Product,
    Tile,
    combine_cost,
    floor,
    forward_cost,
    product_cost,
    registers,
    shared_bytes,
)
from cprune_kernels.gpu import A100, B200, H100, Arch
from cprune_kernels.load import Load, load_of, uniform_load

__all__ = [
    "A100",
    "B200",
    "H100",
    "Arch",
    "GramConfig",
    "MoEConfig",
    "MoEShape",
    "Tile",
    "arch_of",
    "explain",
    "legal_tiles",
    "pick_gram",
    "pick_moe",
]


def arch_of(device: torch.device) -> Arch:
    """The model's numbers for a CUDA device, with its own count of SMs and shared memory.

    Consumer parts keep the instructions of capability 8.0 (12.x has neither wgmma nor tcgen05). Raises ValueError
    below capability 8.0.
    """
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    if capability < (8, 0):
        raise ValueError(f"the device must have compute capability 8.0 or higher, got {capability[0]}.{capability[1]}")
    like = {9: H100, 10: B200, 11: B200}.get(properties.major, A100)
    sms = properties.multi_processor_count
    return replace(
        like,
        name=properties.name,
        sms=sms,
        shared_bytes=properties.shared_memory_per_block_optin,
        flops=like.flops * sms / like.sms,
    )


@lru_cache(maxsize=64)
def legal_tiles(product: Product, dtype: torch.dtype, arch: Arch) -> tuple[Tile, ...]:
    """All tiles that the kernels take; one of equal cost counts as better the earlier it stands.

    16-bit numbers: rows of 64 and 128 on the widest instruction of the generation, 16 and 32 with the weights on its
    row side (swap_ab) from capability 9.0, through mma.sync below it. On capability 9.0 wide ones of 192. float32: no
    tensor core, smaller tiles. Last, the direct ones (m = 1): rows of 512 bytes, several steps ahead.
    """
    itemsize = dtype.itemsize
    accumulators = (32, 64, 128, 256)  # columns; gate_up's hold n of gate and n of up
    wide = arch.capability >= 90 and itemsize == 2
    tiles = []
    for m in (16, 32, 64) if itemsize == 4 else (16, 32, 64, 128):
        swap = wide and m < 64
        for columns in reversed(accumulators):
            elements = m * columns
            if itemsize == 4:
                shapes = [(32, 8 if elements >= 32 * 64 else 4)] if columns <= 64 else []
            elif wide:
                fits = columns in (64, 128) if swap else columns >= 64
                shapes = [(64, 8 if elements > 64 * 128 else 4)] if fits else []
            else:
                fits = columns <= 128 and elements <= 128 * 128
                shapes = [(k, 8 if elements >= 128 * 64 else 4) for k in (64, 32)] if fits else []
            n = columns // 2 if product == "gate_up" else columns
            for k, warps in shapes:
                if m * k * itemsize < 16 * 32 * warps:  # a copy of less than 16 bytes a thread
                    continue
                for stages in (4, 3):
                    for split_k in (1, 2, 4) if m <= 64 else (1,):
                        tiles.append(Tile(m, n, k, warps, stages, split_k, swap, wide))
    if wide and arch.capability == 90:
        tiles.append(Tile(192, 128 if product == "gate_up" else 256, 64, 12, 3, tma=True, wide=True))
    tiles += [Tile(1, n, 512 // itemsize, 4, stages) for n in (8, 16) for stages in (6, 4, 8)]
    return tuple(
        tile
        for tile in tiles
        if shared_bytes(product, tile, itemsize, arch.capability) <= arch.shared_bytes
        and registers(product, tile, itemsize, arch.capability) <= 255
    )


def moe_load(shape: MoEShape, tokens: int, histogram: Sequence[int] | Load | None = None) -> Load:
    """Rows per expert: of a histogram [C], as given, or expected where each token takes top_k of C at random."""
    if tokens < 0:
        raise ValueError(f"tokens must not be negative, got {tokens}")
    if histogram is None:
        return uniform_load(shape.experts, tokens, min(1.0, shape.top_k / shape.experts))
    if isinstance(histogram, Load):
        return histogram
    if len(histogram) != shape.experts:
        raise ValueError(f"histogram must have one count for each of {shape.experts} experts, got {len(histogram)}")
    return load_of(histogram)


def pick_moe(
    shape: MoEShape,
    tokens: int,
    arch: Arch,
    histogram: Sequence[int] | Load | None = None,
    *,
    grouped: bool = False,
    wide: bool = True,
) -> MoEConfig:
    """The legal tiles of least modelled time for a forward of `tokens` tokens; none of the direct ones if `grouped`.

    Nor wide ones without `wide`: not every layout of the weights suits them.

    `histogram` [C]: rows per expert, where the caller has them on the host; uniform routing is assumed without it.
    Raises ValueError for negative counts and a histogram of another length.
    """
    ranked = _ranked(shape, tokens, arch, moe_load(shape, tokens, histogram))
    return next(c for c in ranked if not (grouped and c.direct) and (wide or not c.gate_up.wide))


@lru_cache(maxsize=4096)
def _ranked(shape: MoEShape, tokens: int, arch: Arch, load: Load) -> tuple[MoEConfig, ...]:
    """The best configuration of each m, the best of all first."""
    best: dict[int, list[Tile]] = {}
    for product in ("gate_up", "down"):
        least: dict[int, tuple[float, Tile]] = {}
        for tile in legal_tiles(product, shape.dtype, arch):
            part = product_cost(product, tile, shape, tokens, load, arch)
            seconds = part.seconds
            if product == "down" and tile.m > 1:
                seconds += combine_cost(shape, tokens, load, arch, tile, part).seconds
            if tile.m not in least or seconds < least[tile.m][0]:
                least[tile.m] = seconds, tile
        for m, (_, choice) in least.items():
            best.setdefault(m, []).append(choice)
    configs = [MoEConfig(*pair) for pair in best.values() if len(pair) == 2]
    return tuple(sorted(configs, key=lambda config: forward_cost(shape, tokens, arch, config, load).seconds))


def explain(shape: MoEShape, tokens: int, arch: Arch, histogram: Sequence[int] | Load | None = None) -> str:
    """Why `pick_moe` picks what it does: the modelled time of each step and its bound, the runners-up, the floor."""
    load = moe_load(shape, tokens, histogram)
    ranked = _ranked(shape, tokens, arch, load)
    bound = floor(shape, tokens, arch, load)
    lines = [
        f"{shape.experts} experts, top {shape.top_k}, H {shape.hidden}, I {shape.intermediate}, {shape.dtype}, "
        f"T {tokens} on {arch.name} (analysis, not measured)",
        f"{load.pairs:.0f} rows on {load.touched:.1f} experts",
        f"floor {bound.seconds * 1e6:.1f} us: {bound.bytes / 1e6:.1f} MB, {bound.flops / 1e9:.1f} GFLOP, {bound.bound}",
    ]
    for place, config in enumerate(ranked):
        cost = forward_cost(shape, tokens, arch, config, load)
        ratio = f", {cost.seconds / bound.seconds:.2f} x floor" if bound.seconds else ""
        lines.append(f"{'runner-up' if place else 'picked'}: {cost.seconds * 1e6:.1f} us{ratio}")
        lines += [f"  gate_up {describe(config.gate_up)}", f"  down    {describe(config.down)}"]
        lines += [f"  {_said(part)}" for part in cost.parts if not place]
        if not place:
            padded = load.tiles(config.gate_up.m) * config.gate_up.m if not config.gate_up.wide else load.tiles(64) * 64
            lines.append(f"  {load.pairs / padded if padded else 1:.0%} of the tiles' rows hold a token")
    return "\n".join(lines)


def describe(tile: Tile) -> str:
    """A tile in a few characters: m x n x k, warps, stages, and what is special."""
    special = f" split {tile.split_k}" * (tile.split_k > 1) + " swap" * tile.swap_ab + " tma" * tile.tma
    special += " direct" * (tile.m == 1) + " wide" * tile.wide
    return f"{tile.m}x{tile.n}x{tile.k} w{tile.warps} s{tile.stages}{special}"


def _said(part: Part) -> str:
    amounts = f"{part.seconds * 1e6:9.1f} us {part.bytes / 1e6:9.1f} MB {part.flops / 1e9:9.1f} GFLOP"
    return f"{part.name:8} {amounts}  {part.bound}"


@dataclass(frozen=True)
class GramConfig:
    """How the Gram of x [L, E, P] is cut; see `gram_launches`."""

    block: int  # rows of a block of x
    blocks: int
    last: int  # rows of the last block
    grouped: bool  # a program owns up to three tiles of two or three blocks, and not one tile
    step: int  # columns taken at a time
    chunk: int  # columns of a program: the length of a float32 sum
    warps: int
    stages: int
    tma: bool  # x comes through tensor descriptors (capability >= 90)
    per_sm: int  # programs that run on an SM at once

    @property
    def side(self) -> int:
        """Rows and columns of a partial Gram."""
        return (self.blocks - 1) * self.block + self.last

    @property
    def programs(self) -> int:
        """Programs of a chunk."""
        return len(self.tiles())

    def tiles(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """The tiles (block of rows, block of columns) of every program of a chunk."""
        if not self.grouped:
            return tuple(((i, j),) for j in range(self.blocks) for i in range(j + 1))
        triangles = tuple(((i, i), (i, i + 1), (i + 1, i + 1)) for i in range(0, self.blocks - 1, 2))
        if self.blocks == 3:
            return (*triangles, ((0, 2), (1, 2), (2, 2)))
        return (*triangles, *(((0, j), (1, j)) for j in range(2, self.blocks)))


def pick_gram(
    experts: int,
    length: int,
    layers: int,
    dtype: torch.dtype,
    arch: Arch,
    *,
    aligned: bool = True,
    chain: int = 32768,
    exact: bool = False,
) -> GramConfig:
    """The cut of a Gram of [layers, experts, length].

    One program owns all tiles of up to 256 experts, so that x is read once; three tiles of 128 x 128 are what the
    registers of an SM hold. float32 is multiplied outside of the tensor cores, and rows that are not `aligned` to 16
    bytes come an element at a time: both in small tiles. Chunks are of equal length and fill whole waves of programs;
    at most `chain` columns each, or just that many (in whole steps) where `exact`. They have at least 4 columns per
    row of a partial Gram, below which partial sums would be more bytes than a bfloat16 x.
    """
    fast, float8 = aligned and dtype.itemsize < 4, dtype.itemsize == 1
    block = min(128 if fast else 64, max(16, 1 << (experts - 1).bit_length()))
    blocks = -(-experts // block)
    left = experts - (blocks - 1) * block
    grouped = fast and 2 <= blocks <= 4 and not (float8 and (arch.capability < 90 or blocks > 2))
    narrow = grouped and left <= 64 and blocks <= (2 if arch.capability < 90 else 3)
    last = 64 if narrow else block
    if not fast:
        step, warps, stages = 32, 1 if block == 16 else 4, 3
    else:
        warps = {16: 1, 32: 2, 64: 4, 128: 8}[block]
        step, stages = 128 if block <= (16 if float8 else 32) else 64, 4 if arch.capability >= 90 else 3
        # What stands in registers beside the sums must be little: operands, and float8 on its way to bfloat16.
        if grouped and not narrow and arch.capability < 90:
            step, stages = 16, 6
        elif float8 and ((grouped and not narrow and arch.capability < 100) or (block >= 64 and arch.capability < 90)):
            step = 32
    config = GramConfig(
        block, blocks, last, grouped, step, chain, warps, stages, fast and arch.capability >= 90,
        1 if grouped else {16: 8, 32: 4, 64: 4, 128: 2}[block],
    )  # fmt: skip
    if exact:
        return replace(config, chunk=max(step, chain // step * step))
    tasks, slots = layers * config.programs, arch.sms * config.per_sm
    chunks = -(-length // chain)
    waves = -(-chunks * tasks // slots)
    chunks = max(1, chunks, waves * slots // tasks)
    columns = max(-(-length // chunks), min(4 * config.side, chain))
    return replace(config, chunk=-(-columns // step) * step)
