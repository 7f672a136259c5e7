"""The Triton kernels of routing and of grouping its (token, expert) pairs; cprune_kernels/routing.py specifies them.

route, remap     one warp per few tokens, so that each of the K steps of the top-k is a reduction by shuffles alone
_group_at_once   few pairs, one launch: a CTA per expert finds its own pairs, and others write the map of tiles
_count_pairs, _scan_pairs, _scatter_pairs   many pairs: counts per block of pairs, a scan along the blocks, the places

All counts are sums in registers, with neither integer atomics nor float sums in an order that may change.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
TAKEN = tl.constexpr(-2147483648)  # below the key of every number: a place already chosen, or one that holds no expert
TINY = tl.constexpr(1e-20)


@triton.jit
def _key(x):
    """int32 in the order of the float32 x; NaN goes with -inf, and -0 with 0."""
    x = tl.where(x == x, x, float("-inf"))
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _total(x):
    """Row sums by way of float64, whose rounding leaves no trace of the order of the sum in float32."""
    return tl.sum(x.to(tl.float64), 1).to(tl.float32)[:, None]


@triton.jit
def _score(x, high, total, KIND: tl.constexpr):
    """Of logits x: exp(x - high) / total, or the sigmoid."""
    if KIND == "sigmoid":
        return 1.0 / (1.0 + tl.exp2(-x * LOG2E))
    else:
        return tl.exp2((x - high) * LOG2E) / total


@triton.jit
def _coalesce(expert, gates, slot, K: tl.constexpr):
    """(index, gates) [BT, K2]: gates of one expert summed in slot order on its first slot, its other slots empty."""
    total = tl.zeros_like(gates)
    repeated = tl.zeros_like(expert)
    for k in range(K):
        here = slot == k
        same = expert == tl.sum(tl.where(here, expert, 0), 1)[:, None]
        total += tl.where(same, tl.sum(tl.where(here, gates, 0.0), 1)[:, None], 0.0)
        repeated |= (same & (slot > k)).to(tl.int32)
    kept = (expert >= 0) & (repeated == 0)
    return tl.where(kept, expert, -1), tl.where(kept, total, 0.0)


@triton.jit
def _mapped(expert_map_ptr, expert, live, C: tl.constexpr):
    """The new expert of each live slot as int32, -1 where it has none or one outside [0, C)."""
    new = tl.load(expert_map_ptr + expert, mask=live, other=-1)
    return tl.where((new >= 0) & (new < C), new, -1).to(tl.int32)


@triton.jit
def route_kernel(
    logits_ptr,  # [T, N]
    bias_ptr,  # [N] or None
    expert_map_ptr,  # [N] or None
    index_ptr,  # [T, K] int32
    gates_ptr,  # [T, K] float32
    tokens,  # T
    N: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    RENORMALISE: tl.constexpr,
    SCALE: tl.constexpr,
    BY_SCORE: tl.constexpr,  # choose by score, not by logit; of the same order where nothing is added to a score
    GROUPS: tl.constexpr,
    GROUPS_KEPT: tl.constexpr,
    TOP2: tl.constexpr,  # a group counts by the sum of its two best, not by its best
    BT: tl.constexpr,
    G2: tl.constexpr,  # powers of two: groups,
    S2: tl.constexpr,  # experts per group,
    K2: tl.constexpr,  # slots
):
    # A group is S = N / GROUPS experts in S2 lanes, so that [BT, G2 S2] reshapes to groups whatever S is.
    S: tl.constexpr = N // GROUPS
    lane = tl.arange(0, G2 * S2)[None, :]
    expert = lane if S == S2 else lane // S2 * S + lane % S2
    real = (lane // S2 < GROUPS) & (lane % S2 < S)
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)[:, None]
    row = logits_ptr + tl.minimum(token, tokens - 1) * N
    x = tl.load(row + expert, mask=real, other=float("-inf")).to(tl.float32)
    high = tl.max(x, 1)[:, None]
    total = _total(tl.exp2((x - high) * LOG2E)) if KIND == "softmax_topk" else high

    choice = _score(x, high, total, KIND) if BY_SCORE else x
    if bias_ptr is not None:
        choice += tl.load(bias_ptr + expert, mask=real, other=0.0).to(tl.float32)
    if GROUPS_KEPT < GROUPS:
        best = tl.reshape(tl.where(real, choice, float("-inf")), (BT, G2, S2))
        best = tl.where(best == best, best, float("-inf"))
        worth, first = tl.max(best, 2, return_indices=True)
        if TOP2:
            place = tl.arange(0, S2)[None, None, :]
            worth += tl.max(tl.where(place == first[:, :, None], float("-inf"), best), 2)
        group = tl.arange(0, G2)[None, :]
        rank = tl.where(group < GROUPS, _key(worth), TAKEN)
        for _ in range(GROUPS_KEPT):
            rank = tl.where(group == tl.argmax(rank, 1)[:, None], TAKEN, rank)
        kept = (rank == TAKEN).to(tl.int32)[:, :, None] + tl.zeros((BT, G2, S2), tl.int32)
        choice = tl.where(tl.reshape(kept, (BT, G2 * S2)) != 0, choice, float("-inf"))

    key = tl.where(real, _key(choice), TAKEN)
    slot = tl.arange(0, K2)[None, :]
    chosen = tl.zeros((BT, K2), tl.int32)
    for k in range(K):
        at = tl.argmax(key, 1)[:, None]
        chosen = tl.where(slot == k, at, chosen)
        key = tl.where(lane == at, TAKEN, key)
    if S != S2:
        chosen = chosen // S2 * S + chosen % S2

    live = (slot < K) & (token < tokens)
    x = tl.load(row + chosen, mask=slot < K, other=float("-inf")).to(tl.float32)
    if KIND == "topk_softmax":
        high = tl.max(x, 1)[:, None]
        total = _total(tl.exp2((x - high) * LOG2E))
    gates = _score(x, high, total, KIND)
    if RENORMALISE:
        gates /= _total(tl.where(slot < K, gates, 0.0)) + TINY
    gates *= SCALE
    if expert_map_ptr is not None:
        chosen, gates = _coalesce(_mapped(expert_map_ptr, chosen, live, C), gates, slot, K)
    tl.store(index_ptr + token * K + slot, chosen, mask=live)
    tl.store(gates_ptr + token * K + slot, gates, mask=live)


@triton.jit
def remap_kernel(
    index_in_ptr,  # [T, K]
    gates_in_ptr,  # [T, K]
    expert_map_ptr,  # [N]
    index_ptr,  # [T, K] int32
    gates_ptr,  # [T, K] float32
    tokens,  # T
    N: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BT: tl.constexpr,
    K2: tl.constexpr,
):
    slot = tl.arange(0, K2)[None, :]
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)[:, None]
    live = (slot < K) & (token < tokens)
    old = tl.load(index_in_ptr + token * K + slot, mask=live, other=-1)
    gates = tl.load(gates_in_ptr + token * K + slot, mask=live, other=0.0).to(tl.float32)
    expert = _mapped(expert_map_ptr, old, live & (old >= 0) & (old < N), C)
    expert, gates = _coalesce(expert, gates, slot, K)
    tl.store(index_ptr + token * K + slot, expert, mask=live)
    tl.store(gates_ptr + token * K + slot, gates, mask=live)


@triton.jit
def _experts(index_ptr, pair, pairs, C: tl.constexpr):
    """The expert of each pair as int32; C where it has none."""
    expert = tl.load(index_ptr + pair, mask=pair < pairs, other=-1)
    return tl.where((expert >= 0) & (expert < C), expert, C).to(tl.int32)


@triton.jit
def _write_tiles(
    first,
    count,
    tile,
    tile_expert_ptr,
    tile_row_ptr,
    tile_count_ptr,
    zeros_ptr,
    tiles,
    zeros,
    stride,  # entries of all CTAs
    lead,
    C2: tl.constexpr,
    BM: tl.constexpr,
    LEVEL: tl.constexpr,
):
    """The entries `tile` [BLOCK] of the map of tiles, from each expert's first row and count of rows [C2]; zeros.

    With LEVEL, tiles of one to three thirds of BM rows: no more of them, alike in an expert, its highest first.
    """
    own = (count + BM - 1) // BM
    last = tl.cumsum(own, 0)
    used = tl.sum(own, 0)
    expert = tl.sum((last[:, None] <= tile[None, :]).to(tl.int32), 0)  # how many experts end before this tile
    mine = tl.arange(0, C2)[:, None] == expert[None, :]
    place = tile - tl.sum(tl.where(mine, (last - own)[:, None], 0), 0)
    row = tl.sum(tl.where(mine, first[:, None], 0), 0)
    if LEVEL:
        three = tl.maximum((count + BM // 3 - 1) // (BM // 3) - 2 * own, 0)
        high = tl.minimum(place, tl.sum(tl.where(mine, three[:, None], 0), 0))
        row += (2 * place + high) * (BM // 3)
    else:
        row += place * BM
    tl.store(tile_expert_ptr + tile, tl.where(tile < used, expert, -1), mask=tile < tiles)
    tl.store(tile_row_ptr + tile, tl.where(tile < used, row, 0), mask=tile < tiles)
    tl.store(tile_count_ptr, used, mask=lead)
    if zeros_ptr is not None:
        for begin in range(0, zeros, stride):
            tl.store(zeros_ptr + begin + tile, 0, mask=begin + tile < zeros)


@triton.jit
def group_at_once_kernel(
    index_ptr,  # [P] pairs
    order_ptr,  # [P] int32, as all outputs
    offsets_ptr,  # [C + 1]
    position_ptr,  # [P]
    tile_expert_ptr,  # [M]
    tile_row_ptr,  # [M]
    tile_count_ptr,  # [1]
    zeros_ptr,  # [Z] int32 to be zeroed, or None
    pairs,  # P
    tiles,  # M
    zeros,  # Z
    C: tl.constexpr,
    C2: tl.constexpr,
    P2: tl.constexpr,
    BM: tl.constexpr,
    LEVEL: tl.constexpr,  # tiles of thirds
    TILES: tl.constexpr,  # entries of the map of tiles that one CTA writes
    STEP: tl.constexpr,
    EARLY: tl.constexpr,  # the next kernel starts while this one ends
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    pair = tl.arange(0, P2)
    expert = _experts(index_ptr, pair, pairs, C)
    if program < C:
        mine = expert == program
        place = tl.sum((expert < program).to(tl.int32), 0) + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(order_ptr + place, pair, mask=mine)
        tl.store(position_ptr + pair, place, mask=mine)
        tl.store(offsets_ptr + program + 1, tl.sum((expert <= program).to(tl.int32), 0))
        tl.store(offsets_ptr + program, 0, mask=program == 0)
    else:
        lead = program == C
        routed = tl.sum((expert < C).to(tl.int32), 0)
        tl.store(order_ptr + pair, -1, mask=lead & (pair >= routed) & (pair < pairs))
        tl.store(position_ptr + pair, -1, mask=lead & (expert == C) & (pair < pairs))
        column = tl.arange(0, C2)[None, :]
        hits = tl.zeros((STEP, C2), tl.int32)
        for begin in tl.range(0, P2, STEP, loop_unroll_factor=4):
            some = _experts(index_ptr, begin + tl.arange(0, STEP), pairs, C)
            hits += (some[:, None] == column).to(tl.int32)
        count = tl.where(tl.arange(0, C2) < C, tl.sum(hits, 0), 0)
        first = tl.cumsum(count, 0) - count
        tile = (program - C) * TILES + tl.arange(0, TILES)
        stride = (tl.num_programs(0) - C) * TILES
        map = (tile_expert_ptr, tile_row_ptr, tile_count_ptr, zeros_ptr)
        _write_tiles(first, count, tile, *map, tiles, zeros, stride, lead, C2, BM, LEVEL)


@triton.jit
def count_pairs_kernel(
    index_ptr,  # [P]
    upto_ptr,  # [C, B] int32: pairs of a block whose expert is at most c
    pairs,  # P
    blocks,  # B
    C: tl.constexpr,
    C2: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    EARLY: tl.constexpr,  # the next kernel starts while this one ends
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    block = tl.program_id(0)
    column = tl.arange(0, C2)
    hits = tl.zeros((STEP, C2), tl.int32)
    for begin in tl.static_range(0, BLOCK, STEP):
        pair = block.to(tl.int64) * BLOCK + begin + tl.arange(0, STEP)
        hits += (_experts(index_ptr, pair, pairs, C)[:, None] <= column[None, :]).to(tl.int32)
    tl.store(upto_ptr + column.to(tl.int64) * blocks + block, tl.sum(hits, 0), mask=column < C)


@triton.jit
def scan_pairs_kernel(
    upto_ptr,  # [C, B]
    base_ptr,  # [C, B] int32: where the pairs of a block and expert begin in the order
    offsets_ptr,  # [C + 1] int32
    blocks,  # B
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    expert = tl.program_id(0)
    here = upto_ptr + expert.to(tl.int64) * blocks
    below = here - blocks
    first, end = 0, 0
    for begin in range(0, blocks, BLOCK):
        block = begin + tl.arange(0, BLOCK)
        first += tl.sum(tl.load(below + block, mask=(block < blocks) & (expert > 0), other=0), 0)
        end += tl.sum(tl.load(here + block, mask=block < blocks, other=0), 0)
    tl.store(offsets_ptr + expert + 1, end)
    tl.store(offsets_ptr + expert, 0, mask=expert == 0)
    for begin in range(0, blocks, BLOCK):
        block = begin + tl.arange(0, BLOCK)
        own = tl.load(here + block, mask=block < blocks, other=0)
        own -= tl.load(below + block, mask=(block < blocks) & (expert > 0), other=0)
        tl.store(base_ptr + expert.to(tl.int64) * blocks + block, first + tl.cumsum(own, 0) - own, mask=block < blocks)
        first += tl.sum(own, 0)


@triton.jit
def scatter_pairs_kernel(
    index_ptr,  # [P]
    base_ptr,  # [C, B]
    order_ptr,  # [P] int32, as all outputs
    offsets_ptr,  # [C + 1]
    position_ptr,  # [P]
    tile_expert_ptr,  # [M]
    tile_row_ptr,  # [M]
    tile_count_ptr,  # [1]
    zeros_ptr,  # [Z] int32 to be zeroed, or None
    pairs,  # P
    blocks,  # B
    tiles,  # M
    zeros,  # Z
    C: tl.constexpr,
    C2: tl.constexpr,
    BM: tl.constexpr,
    LEVEL: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    TILES: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    if program < blocks:
        pair = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        expert = _experts(index_ptr, pair, pairs, C)
        earlier = tl.zeros((STEP, BLOCK), tl.int32)
        for begin in tl.range(0, BLOCK, STEP, loop_unroll_factor=4):
            other = program.to(tl.int64) * BLOCK + begin + tl.arange(0, STEP)
            same = _experts(index_ptr, other, pairs, C)[:, None] == expert[None, :]
            earlier += (same & (other[:, None] < pair[None, :])).to(tl.int32)
        if EARLY:
            tl.extra.cuda.gdc_wait()
        base = tl.load(base_ptr + expert.to(tl.int64) * blocks + program, mask=expert < C, other=0)
        place = base + tl.sum(earlier, 0)
        tl.store(order_ptr + place, pair.to(tl.int32), mask=expert < C)
        tl.store(position_ptr + pair, tl.where(expert < C, place, -1), mask=pair < pairs)
        tl.store(order_ptr + pair, -1, mask=(pair >= tl.load(offsets_ptr + C)) & (pair < pairs))
    else:
        if EARLY:
            tl.extra.cuda.gdc_wait()
        column = tl.arange(0, C2)
        first = tl.load(offsets_ptr + column, mask=column < C, other=0)
        count = tl.load(offsets_ptr + 1 + column, mask=column < C, other=0) - first
        tile = (program - blocks) * TILES + tl.arange(0, TILES)
        stride = (tl.num_programs(0) - blocks) * TILES
        lead = program == blocks
        map = (tile_expert_ptr, tile_row_ptr, tile_count_ptr, zeros_ptr)
        _write_tiles(first, count, tile, *map, tiles, zeros, stride, lead, C2, BM, LEVEL)
