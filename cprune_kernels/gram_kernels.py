"""Device code of pairwise.py: Grams of chunks of columns and their sum in float64.

x is [L, E, P]. Rows are cut into BLOCKS blocks of BLOCK (LAST in the last), columns into chunks of CHUNK. A program
owns some tiles of one chunk from its first column to its last and leaves them in partial [L, CHUNKS, SIDE, SIDE]
float32, of which only the blocks on and above the diagonal are ever written or read.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _decode(byte, scale, FP8: tl.constexpr):
    """float8 bytes to bfloat16, by way of the float16 of the same bits (for e4m3 up to the bias of its exponent)."""
    if FP8 == "e5m2":
        value = (byte.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        half = ((byte & 0x80).to(tl.uint16) << 8) | ((byte & 0x7F).to(tl.uint16) << 7)
        value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        value = tl.where((byte & 0x7F) == 0x7F, float("nan"), value)
    return (value * scale).to(tl.bfloat16)


@triton.jit
def _load_rows(
    x,
    scale,
    layer,
    row,
    column,
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """x[layer, row : row + ROWS, column : column + STEP], zero outside of x; float8 is scaled and becomes bfloat16."""
    E: tl.constexpr = LAYOUT[0]
    P: tl.constexpr = LAYOUT[1]
    SCALES: tl.constexpr = LAYOUT[5]
    FP8: tl.constexpr = LAYOUT[6]
    r = row + tl.arange(0, ROWS)
    if LAYOUT[7]:
        value = x.load([layer, row, column]).reshape(ROWS, STEP)
    else:
        c = column + tl.arange(0, STEP)
        at = x + layer.to(tl.int64) * LAYOUT[2]
        at = at + r.to(tl.int64)[:, None] * LAYOUT[3] + c.to(tl.int64)[None, :] * LAYOUT[4]
        if P % STEP != 0:
            value = tl.load(at, mask=(r < E)[:, None] & (c < P)[None, :], other=0.0)
        elif E % ROWS != 0:
            value = tl.load(at, mask=(r < E)[:, None], other=0.0)
        else:
            value = tl.load(at)
    if FP8 != "":
        if SCALES > 0:
            at = scale + (layer.to(tl.int64) * E + r) * SCALES + column // 128
            value = _decode(value, tl.load(at, mask=r < E, other=0.0)[:, None], FP8)
        else:
            value = _decode(value, 1.0, FP8)
    return value


@triton.jit
def _store_tile(partial, tile, row, column, SIDE: tl.constexpr):
    r = row + tl.arange(0, tile.shape[0])
    c = column + tl.arange(0, tile.shape[1])
    tl.store(partial + r[:, None] * SIDE + c[None, :], tile)


@triton.jit
def _program(layer_chunk, P: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, SIDE: tl.constexpr):
    """First and last column of this program's chunk, and where its partial Gram lies, in elements."""
    chunk = layer_chunk % CHUNKS
    start = chunk * CHUNK
    return start, tl.minimum(start + CHUNK, P), layer_chunk.to(tl.int64) * (SIDE * SIDE)


@triton.jit
def gram_tile_kernel(
    x,
    scale,
    partial,
    P: tl.constexpr,
    LAYOUT: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile per program, numbered down the columns of tiles; with one block, that tile is the whole Gram."""
    SIDE: tl.constexpr = BLOCKS * BLOCK
    TILES: tl.constexpr = BLOCKS * (BLOCKS + 1) // 2
    layer = tl.program_id(0) // TILES // CHUNKS
    start, end, offset = _program(tl.program_id(0) // TILES, P, CHUNKS, CHUNK, SIDE)
    tile = tl.program_id(0) % TILES
    j = 0
    for column in tl.static_range(1, BLOCKS):
        j += (tile >= column * (column + 1) // 2).to(tl.int32)
    i = tile - j * (j + 1) // 2
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    if i == j:
        for k in range(start, end, STEP):
            a = _load_rows(x, scale, layer, i * BLOCK, k, LAYOUT, BLOCK, STEP)
            acc = tl.dot(a, a.T, acc, input_precision="ieee")
    else:
        for k in range(start, end, STEP):
            a = _load_rows(x, scale, layer, i * BLOCK, k, LAYOUT, BLOCK, STEP)
            b = _load_rows(x, scale, layer, j * BLOCK, k, LAYOUT, BLOCK, STEP)
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
    _store_tile(partial + offset, acc, i * BLOCK, j * BLOCK, SIDE)


@triton.jit
def gram_group_kernel(
    x,
    x_last,
    scale,
    partial,
    P: tl.constexpr,
    LAYOUT: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    LAST: tl.constexpr,
    STEP: tl.constexpr,
):
    """Up to three tiles per program out of two or three blocks, so that what it reads serves several tiles.

    2 blocks: the triangle 00 01 11, which is all. 3 blocks: the same and the strip 02 12 22.
    4 blocks: the triangles 00 01 11 and 22 23 33 and the strips 02 12 and 03 13.
    x_last is x with boxes of LAST rows. Groups of one chunk are neighbours, so that all but the first find it in L2.
    """
    SIDE: tl.constexpr = (BLOCKS - 1) * BLOCK + LAST
    GROUPS: tl.constexpr = 1 if BLOCKS == 2 else 2 if BLOCKS == 3 else 4
    TRIANGLES: tl.constexpr = BLOCKS // 2
    SECOND: tl.constexpr = LAST if BLOCKS == 2 else BLOCK  # rows of a triangle's second block
    layer = tl.program_id(0) // GROUPS // CHUNKS
    start, end, offset = _program(tl.program_id(0) // GROUPS, P, CHUNKS, CHUNK, SIDE)
    group = tl.program_id(0) % GROUPS
    out = partial + offset
    if group < TRIANGLES:
        i = group * 2 * BLOCK
        j = i + BLOCK
        first = tl.zeros((BLOCK, BLOCK), tl.float32)
        cross = tl.zeros((BLOCK, SECOND), tl.float32)
        second = tl.zeros((SECOND, SECOND), tl.float32)
        for k in range(start, end, STEP):
            a = _load_rows(x, scale, layer, i, k, LAYOUT, BLOCK, STEP)
            b = _load_rows(x_last if BLOCKS == 2 else x, scale, layer, j, k, LAYOUT, SECOND, STEP)
            first = tl.dot(a, a.T, first, input_precision="ieee")
            cross = tl.dot(a, b.T, cross, input_precision="ieee")
            second = tl.dot(b, b.T, second, input_precision="ieee")
        _store_tile(out, first, i, i, SIDE)
        _store_tile(out, cross, i, j, SIDE)
        _store_tile(out, second, j, j, SIDE)
    if BLOCKS > 2:
        if group >= TRIANGLES:
            j = (group - TRIANGLES + 2) * BLOCK
            upper = tl.zeros((BLOCK, LAST), tl.float32)
            lower = tl.zeros((BLOCK, LAST), tl.float32)
            corner = tl.zeros((LAST, LAST), tl.float32)
            for k in range(start, end, STEP):
                a = _load_rows(x, scale, layer, 0, k, LAYOUT, BLOCK, STEP)
                b = _load_rows(x, scale, layer, BLOCK, k, LAYOUT, BLOCK, STEP)
                c = _load_rows(x_last, scale, layer, j, k, LAYOUT, LAST, STEP)
                upper = tl.dot(a, c.T, upper, input_precision="ieee")
                lower = tl.dot(b, c.T, lower, input_precision="ieee")
                if BLOCKS == 3:
                    corner = tl.dot(c, c.T, corner, input_precision="ieee")
            _store_tile(out, upper, 0, j, SIDE)
            _store_tile(out, lower, BLOCK, j, SIDE)
            if BLOCKS == 3:
                _store_tile(out, corner, j, j, SIDE)


@triton.jit
def gram_lanes_kernel(
    partial,
    lanes,
    first,
    E: tl.constexpr,
    CHUNKS: tl.constexpr,
    SIDE: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ADD: tl.constexpr,
):
    """lanes[layer, l] (+)= the sum of all partial[layer, c] with (first + c) mod LANES = l, in order, in float64.

    partial [L, CHUNKS, SIDE, SIDE] float32, lanes [L, LANES, E, E] float64. A program is a tile of one lane.
    """
    layer, lane = tl.program_id(1) // LANES, tl.program_id(1) % LANES
    row, column = tl.program_id(0) // (SIDE // COLUMNS) * ROWS, tl.program_id(0) % (SIDE // COLUMNS) * COLUMNS
    if column + COLUMNS > row:  # nothing is written, or asked for, below the diagonal
        r, c = row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
        source = partial + layer.to(tl.int64) * CHUNKS * SIDE * SIDE + r * SIDE + c
        target = lanes + (layer * LANES + lane).to(tl.int64) * (E * E) + r * E + c
        inside = (r < E) & (c < E)
        total = tl.zeros((ROWS, COLUMNS), tl.float64)
        if ADD:
            total = tl.load(target, mask=inside, other=0.0)
        start = (lane + LANES - first % LANES) % LANES
        source += start.to(tl.int64) * (SIDE * SIDE)
        for _ in tl.range(start, CHUNKS, LANES, num_stages=4):
            total += tl.load(source).to(tl.float64)
            source += LANES * SIDE * SIDE
        tl.store(target, total, mask=inside)


@triton.jit
def gram_finish_kernel(lanes, gram, E: tl.constexpr, LANES: tl.constexpr, COUNT: tl.constexpr):
    """gram[layer, i, j] = gram[layer, j, i] = the sum over the lanes of their element above the diagonal."""
    layer = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    row, column = tl.minimum(at // E, at % E), tl.maximum(at // E, at % E)
    lane = tl.arange(0, LANES)[:, None]
    source = lanes + (layer * LANES + lane) * (E * E) + (row * E + column)[None, :]
    inside = at < E * E
    total = tl.sum(tl.load(source, mask=inside[None, :], other=0.0), axis=0)
    tl.store(gram + layer * (E * E) + at, total, mask=inside)
