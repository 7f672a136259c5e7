"""The launches of pairwise.py: what runs on a GPU, in Triton's interpreter and, compiled, in the tests. Imports Triton.

A Gram is three launches: sums over chunks of columns in float32 (`gram_tile_kernel` or `gram_group_kernel`), their
sum over the chunks in float64, dealt to a fixed number of lanes, and the sum over lanes. No atomics, and the order of
every sum depends on E and the chunk alone: the same bits for columns that come at once and in windows of chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cprune_kernels import cka_kernels, gram_kernels
from cprune_kernels.launch import Launch
from cprune_kernels.picker import Arch, GramConfig, pick_gram

FLOAT8 = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
SCALED = 128  # columns to a scale of float8
SYRK = 64  # rows and columns of a tile of a centred kernel
CENTRE_WIDTH, CENTRE_SAMPLES = 128, 32


def gram_launches(
    x: Tensor,
    arch: Arch,
    *,
    scale: Tensor | None = None,
    chain: int | None = None,
    config: GramConfig | None = None,
) -> tuple[list[Launch], Tensor]:
    """The launches of `pairwise.pairwise_gram`, and its result once they have run.

    x: [L, E, P] or [E, P] of bfloat16, float16, float32 or float8 with any strides; scale as for `pairwise_gram`.
    chain: columns of a chunk, rounded down to a whole number of steps; by default what fills `arch`, at most 32768.
    """
    shape = (*x.shape[:-1], x.shape[-2])
    x, scale = _layers(x, scale)
    layers, experts, _ = x.shape
    gram = x.new_empty(shape, dtype=torch.float64)
    if not gram.numel():
        return [], gram
    lanes = x.new_empty(layers, lane_count(experts), experts, experts, dtype=torch.float64)
    launches, _ = add_launches(x, lanes, arch, scale=scale, chain=chain, config=config, fresh=True)
    return [*launches, finish_launch(lanes, gram)], gram


def lane_count(experts: int) -> int:
    """Lanes that the chunks are dealt to: enough threads to read partial sums at the speed of memory."""
    return min(64, max(1, 2**18 // triton.next_power_of_2(experts * experts)))


def add_launches(
    x: Tensor,
    lanes: Tensor,
    arch: Arch,
    *,
    scale: Tensor | None = None,
    chain: int | None = None,
    config: GramConfig | None = None,
    first: int = 0,
    fresh: bool = False,
) -> tuple[list[Launch], int]:
    """Add the Gram of x [L, E, P] to lanes [L, lane_count(E), E, E] float64, or set it where `fresh`.

    first: chunks added before; the lane of a chunk is its number modulo the lanes. Returns also the chunks of x.
    """
    x, scale = _layers(x, scale)
    layers, experts, length = x.shape
    if config is None:
        config = pick_gram(
            experts,
            length,
            layers,
            x.dtype,
            arch,
            aligned=_aligned(x, arch),
            chain=chain or 32768,
            exact=chain is not None,
        )
    chunks = -(-length // config.chunk)
    side = config.side
    partial = x.new_empty(layers, chunks, side, side, dtype=torch.float32)
    width = min(side, 64)
    lanes_launch = Launch(
        gram_kernels.gram_lanes_kernel,
        (side // 16 * (side // width), layers * lanes.shape[1]),
        {"partial": partial, "lanes": lanes, "first": first},
        {"E": experts, "CHUNKS": chunks, "SIDE": side, "LANES": lanes.shape[1], "ROWS": 16, "COLUMNS": width}
        | {"ADD": not fresh},
        num_warps=max(1, width // 16),
    )
    return [_chunk_launch(x, scale, partial, config), lanes_launch] if chunks else [lanes_launch], chunks


def finish_launch(lanes: Tensor, gram: Tensor) -> Launch:
    """lanes [L, lanes, E, E] summed into gram [L, E, E] or [E, E], both float64."""
    layers, count, experts, _ = lanes.shape
    width = max(64, 4096 // count)
    constants = {"E": experts, "LANES": count, "COUNT": width}
    return Launch(
        gram_kernels.gram_finish_kernel,
        (-(-experts * experts // width), layers),
        {"lanes": lanes, "gram": gram},
        constants,
        num_warps=4,
    )


def _chunk_launch(x: Tensor, scale: Tensor | None, partial: Tensor, config: GramConfig) -> Launch:
    layers, experts, length = x.shape
    fp8 = FLOAT8.get(x.dtype, "")
    x = x.view(torch.uint8) if fp8 else x
    args: dict[str, Any] = {"x": _source(x, config.block, config), "scale": scale, "partial": partial}
    scales = 0 if scale is None else scale.shape[-1]
    constants = {
        "P": length,
        "LAYOUT": (experts, length, *x.stride(), scales, fp8, config.tma),
        "CHUNKS": partial.shape[1],
        "CHUNK": config.chunk,
        "BLOCKS": config.blocks,
        "BLOCK": config.block,
        "STEP": config.step,
    }
    kernel = gram_kernels.gram_tile_kernel
    if config.grouped:
        kernel = gram_kernels.gram_group_kernel
        args["x_last"] = _source(x, config.last, config)
        constants["LAST"] = config.last
    grid = (config.programs * partial.shape[1] * layers,)
    return Launch(kernel, grid, args, constants, config.warps, config.stages)


def _source(x: Tensor, rows: int, config: GramConfig) -> Tensor | TensorDescriptor:
    if not config.tma:
        return x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, config.step])


def _layers(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x as [L, E, P] with the strides of its copy along axes of length 1, and contiguous scales."""
    if x.dim() == 2:
        x = x.unsqueeze(0)
    layers, experts, length = x.shape
    column = x.stride(2) if length > 1 else 1
    row = x.stride(1) if experts > 1 else -(-length // 16) * 16
    layer = x.stride(0) if layers > 1 else experts * row
    return x.as_strided(x.shape, (layer, row, column)), None if scale is None else scale.contiguous()


def _aligned(x: Tensor, arch: Arch) -> bool:
    """Whether rows can be copied 16 bytes at a time; a descriptor cuts its last copy short by itself."""
    unit = 16 // x.dtype.itemsize
    whole = x.shape[2] % unit == 0 or (arch.capability >= 90 and x.dtype.itemsize < 4)
    strides = x.stride(2) == 1 and all(stride > 0 and stride % unit == 0 for stride in x.stride()[:2])
    return whole and strides and x.data_ptr() % 16 == 0


@dataclass(frozen=True)
class GramTraffic:
    """Bytes that a Gram moves, counted from its grid and config."""

    read: int  # x and its scales out of HBM: once, since the programs of one chunk are neighbours and share L2
    fetched: int  # the same out of L2: as often as programs ask
    partial: int  # partial sums and lanes, written and read again
    flops: int  # of the tiles, rows that do not exist included

    @property
    def total(self) -> int:
        return self.read + self.partial


def gram_traffic(
    experts: int, length: int, layers: int, dtype: torch.dtype, config: GramConfig, *, scaled: bool = False
) -> GramTraffic:
    """What the launches of `gram_launches` move for an x of [layers, experts, length]."""
    row = length * dtype.itemsize + (4 * -(-length // SCALED) if scaled else 0)
    heights = [config.block] * (config.blocks - 1) + [config.last]
    rows = [min(height, experts - i * config.block) for i, height in enumerate(heights)]
    fetched, area = 0, 0
    for tiles in config.tiles():
        fetched += sum(rows[block] for block in {block for tile in tiles for block in tile})
        area += sum(heights[i] * heights[j] for i, j in tiles)
    chunks = -(-length // config.chunk)
    lanes = 2 * min(chunks, lane_count(experts)) * experts * (experts + 1) // 2 * 8
    return GramTraffic(
        read=layers * experts * row,
        fetched=layers * fetched * row,
        partial=layers * (2 * chunks * area * 4 + lanes + experts * experts * 8),
        flops=layers * 2 * area * length,
    )


def gram_seconds(traffic: GramTraffic, length: int, layers: int, config: GramConfig, arch: Arch) -> float:
    """The model's time: reading or multiplying, whichever is longer, over the filling of waves; then partial sums."""
    chunks = -(-length // config.chunk)
    tasks = layers * chunks * config.programs
    waves = -(-tasks // (arch.sms * config.per_sm))
    filled = layers * length * config.programs / (waves * arch.sms * config.per_sm * config.chunk)
    return max(traffic.read / arch.bandwidth, traffic.flops / arch.flops) / filled + traffic.partial / arch.bandwidth


def cka_launches(y: Tensor, arch: Arch) -> tuple[list[Launch], Tensor]:
    """The launches of `pairwise.pairwise_cka` up to the Gram [E, E] float64 of the centred kernels.

    y: [E, S, H] of bfloat16, float16 or float32 with any strides. Kernels are [S, S] float32 and padded to 16 bytes.
    """
    experts, samples, hidden = y.shape
    size = samples * samples
    row = -(-size // 4) * 4
    peaks = -(-hidden // CENTRE_WIDTH)
    centre = y.new_empty(experts, 2, hidden, dtype=torch.float32)
    peak = y.new_empty(experts, peaks, dtype=torch.float32)
    matrices = y.new_empty(experts, row, dtype=torch.float32)[:, :size]
    constants = {
        "S": samples,
        "H": hidden,
        "EXPERT_STRIDE": y.stride(0),
        "SAMPLE_STRIDE": y.stride(1),
        "H_STRIDE": y.stride(2),
    }
    centring = Launch(
        cka_kernels.cka_centre_kernel,
        (peaks, experts),
        {"y": y, "centre": centre, "peak": peak},
        constants | {"SAMPLES": CENTRE_SAMPLES, "WIDTH": CENTRE_WIDTH},
        num_warps=4,
    )
    block = min(SYRK, max(16, triton.next_power_of_2(samples)))
    blocks = -(-samples // block)
    syrk = Launch(
        cka_kernels.cka_kernel,
        (blocks * (blocks + 1) // 2, experts),
        {"y": y, "centre": centre, "peak": peak, "kernels": matrices},
        constants
        | {"PEAKS": peaks, "PEAKS_PADDED": triton.next_power_of_2(peaks), "ROW": row, "BLOCK": block, "STEP": 16},
        num_warps=4 if block > 16 else 1,
        num_stages=1,  # bound by arithmetic; several programs to an SM hide the loads of one another
    )
    launches, gram = gram_launches(matrices, arch)
    return [centring, syrk, *launches], gram
