"""Device code of pairwise_cka: K_e = C_e C_e^T [S, S] of every expert, C_e its centred outputs over their peak.

Bound by the products in float32: a centred output rounded to fewer bits would no longer have a mean of zero.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_samples(
    y,
    first,
    expert,
    sample,
    h,
    S: tl.constexpr,
    H: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr,
    SAMPLE_STRIDE: tl.constexpr,
    H_STRIDE: tl.constexpr,
):
    """y[expert, sample, h] - first[h] in float32: exactly zero where an expert's output is constant."""
    at = y + expert.to(tl.int64) * EXPERT_STRIDE + h.to(tl.int64)[None, :] * H_STRIDE
    mask = (sample < S)[:, None] & (h < H)[None, :]
    value = tl.load(at + sample.to(tl.int64)[:, None] * SAMPLE_STRIDE, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, value - first[None, :], 0.0)


@triton.jit
def cka_centre_kernel(
    y,
    centre,
    peak,
    S: tl.constexpr,
    H: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr,
    SAMPLE_STRIDE: tl.constexpr,
    H_STRIDE: tl.constexpr,
    SAMPLES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """centre[e] = y[e, 0, :] and the mean of y[e] - y[e, 0]; peak[e, block] = the greatest |.| of y[e] less the two."""
    expert = tl.program_id(1)
    h = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    at = y + expert.to(tl.int64) * EXPERT_STRIDE + h.to(tl.int64) * H_STRIDE
    first = tl.load(at, mask=h < H, other=0.0).to(tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, S, SAMPLES):
        sample = start + tl.arange(0, SAMPLES)
        value = _load_samples(y, first, expert, sample, h, S, H, EXPERT_STRIDE, SAMPLE_STRIDE, H_STRIDE)
        total += tl.sum(value, axis=0)
    mean = total / S
    out = centre + expert.to(tl.int64) * (2 * H) + h
    tl.store(out, first, mask=h < H)
    tl.store(out + H, mean, mask=h < H)
    highest = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, S, SAMPLES):
        sample = start + tl.arange(0, SAMPLES)
        value = _load_samples(y, first, expert, sample, h, S, H, EXPERT_STRIDE, SAMPLE_STRIDE, H_STRIDE)
        value = tl.where((sample < S)[:, None], tl.abs(value - mean[None, :]), 0.0)
        highest = tl.maximum(highest, tl.max(value, axis=0))
    tl.store(peak + expert * tl.num_programs(0) + tl.program_id(0), tl.max(highest, axis=0))


@triton.jit
def cka_kernel(
    y,
    centre,
    peak,
    kernels,
    S: tl.constexpr,
    H: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr,
    SAMPLE_STRIDE: tl.constexpr,
    H_STRIDE: tl.constexpr,
    PEAKS: tl.constexpr,
    PEAKS_PADDED: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """kernels[e] = C C^T, [S, S] in rows of ROW elements an expert, with C = y[e] centred and over its peak.

    One tile on or above the diagonal per program, numbered down the columns of tiles, stored on both sides.
    """
    expert, tile = tl.program_id(1), tl.program_id(0)
    j = 0
    for column in range(1, (S + BLOCK - 1) // BLOCK):
        j += (tile >= column * (column + 1) // 2).to(tl.int32)
    i = tile - j * (j + 1) // 2
    at = tl.arange(0, PEAKS_PADDED)
    scale = tl.max(tl.load(peak + expert * PEAKS + at, mask=at < PEAKS, other=0.0), axis=0)
    scale = tl.where(scale > 0.0, scale, 1.0)
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    middle = centre + expert.to(tl.int64) * (2 * H)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, H, STEP):
        h = start + tl.arange(0, STEP)
        first = tl.load(middle + h, mask=h < H, other=0.0)
        mean = tl.load(middle + H + h, mask=h < H, other=0.0)
        a = _load_samples(y, first, expert, rows, h, S, H, EXPERT_STRIDE, SAMPLE_STRIDE, H_STRIDE)
        b = _load_samples(y, first, expert, columns, h, S, H, EXPERT_STRIDE, SAMPLE_STRIDE, H_STRIDE)
        a = tl.div_rn(a - mean[None, :], tl.zeros_like(a) + scale)
        b = tl.div_rn(b - mean[None, :], tl.zeros_like(b) + scale)
        acc = tl.dot(a, b.T, acc, input_precision="ieee")
    inside = (rows < S)[:, None] & (columns < S)[None, :]  # rows past S hold -mean; they end with this store
    out = kernels + expert.to(tl.int64) * ROW
    tl.store(out + rows[:, None] * S + columns[None, :], acc, mask=inside)
    if i != j:
        tl.store(out + columns[None, :] * S + rows[:, None], acc, mask=inside)
