"""The Triton kernels of the experts forward for few tokens: weights are read once per pair, and nothing is grouped.

gate_up_direct   act[t K + s] = f(x[t] W_gate) (x[t] W_up + shift) of the expert of slot s: a CTA per pair and columns
down_direct      out[t] = sum_s gate[t, s] act[t K + s] W_down, slot after slot: a CTA per token and columns

One row meets each weight, so bandwidth bounds them and the tensor core would idle: rows of weights stream through
asynchronous copies, products add up in float32 where they were loaded, and one reduction per CTA ends the sum. Two
launches instead of five are what a few tokens gain; experts that tokens share are read more than once. With EARLY the
second one is launched while the first one runs, and waits for it when it has read where its experts are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cprune_kernels.expert_gemm import _activated, _pointers, _sides, _tile


@triton.jit(do_not_specialize=["depth"])
def gate_up_direct_kernel(
    x_ptr,  # [T, H]
    w_ptr,  # [C, 2, I, H], with any strides
    bias_ptr,  # [C, 2, I] or None
    act_ptr,  # [T K, I]; rows of slots without an expert are not written
    index_ptr,  # [T, K]
    depth,  # H, at run time: known bounds would unroll the loop
    C: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    stride_xt: tl.constexpr,
    stride_xh: tl.constexpr,
    stride_we: tl.constexpr,
    stride_wp: tl.constexpr,
    stride_wi: tl.constexpr,
    stride_wh: tl.constexpr,
    stride_be: tl.constexpr,
    stride_bp: tl.constexpr,
    stride_bi: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    PAIRED: tl.constexpr,
    EARLY: tl.constexpr,
):
    column_tiles: tl.constexpr = (I + BN - 1) // BN
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    pair = tl.program_id(0) // column_tiles
    column = tl.program_id(0) % column_tiles
    expert = tl.load(index_ptr + pair).to(tl.int64)
    if (expert < 0) | (expert >= C):
        return
    k = tl.arange(0, BK)
    x_at = x_ptr + (pair // K).to(tl.int64) * stride_xt + k.to(tl.int64) * stride_xh
    w_column, bias_column, w_ok = _sides(column, stride_wp, stride_wi, stride_bp, stride_bi, I, BN, PAIRED)
    w_at = _pointers(w_ptr + expert * stride_we, w_column, k.to(tl.int64) * stride_wh, stride_wh == 1)
    acc = tl.zeros((2 * BN, BK), tl.float32)
    for start in tl.range(0, depth, BK, num_stages=STAGES):
        x = tl.load(x_at, mask=start + k < H, other=0.0).to(tl.float32)
        w = _tile(w_at, w_ok, start + k < H, stride_wh == 1, H % BK != 0).to(tl.float32)
        acc += w * x[None, :]
        x_at += BK * stride_xh
        w_at += BK * stride_wh
    total = tl.sum(acc, 1)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + expert * stride_be + bias_column, mask=w_ok, other=0.0).to(tl.float32)
    if PAIRED:
        gate, up = tl.split(total.reshape(BN, 2))
    else:
        gate, up = tl.split(total.reshape(2, BN).permute(1, 0))
    value = _activated(gate, up, KIND, ALPHA, LIMIT, SHIFT)
    i = BN * column + tl.arange(0, BN)
    tl.store(act_ptr + pair.to(tl.int64) * I + i, value.to(act_ptr.dtype.element_ty), mask=i < I)


@triton.jit(do_not_specialize=["steps"])
def down_direct_kernel(
    act_ptr,  # [T K, I]
    w_ptr,  # [C, H, I], with any strides
    bias_ptr,  # [C, H] or None
    index_ptr,  # [T, K]
    gates_ptr,  # [T, K]
    out_ptr,  # [T, H]
    steps,  # K ceil(I / BK), at run time
    C: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    stride_we: tl.constexpr,
    stride_wh: tl.constexpr,
    stride_wi: tl.constexpr,
    stride_be: tl.constexpr,
    stride_bh: tl.constexpr,
    stride_gt: tl.constexpr,
    stride_gk: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,  # K, to a power of two
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    column_tiles: tl.constexpr = (H + BN - 1) // BN
    chunks: tl.constexpr = (I + BK - 1) // BK
    token = (tl.program_id(0) // column_tiles).to(tl.int64)
    h = tl.program_id(0) % column_tiles * BN + tl.arange(0, BN)
    slot = tl.arange(0, KP)
    expert = tl.load(index_ptr + token * K + slot, mask=slot < K, other=-1)
    live = (expert >= 0) & (expert < C)
    expert = tl.where(live, expert, -1).to(tl.int32)
    gate = tl.load(gates_ptr + token * stride_gt + slot * stride_gk, mask=live, other=0.0).to(tl.float32)
    k = tl.arange(0, BK)
    act_at = act_ptr + token * K * I
    w_at = _pointers(w_ptr, h.to(tl.int64) * stride_wh, k.to(tl.int64) * stride_wi, stride_wi == 1)
    acc = tl.zeros((BN, BK), tl.float32)
    if EARLY:  # index and gates are older than the launch of gate_up, which did not start early
        tl.extra.cuda.gdc_wait()
    for step in tl.range(0, steps, num_stages=STAGES):  # slot after slot, without a gap in the stream between them
        now = step // chunks
        start = step % chunks * BK
        its_expert = tl.sum(tl.where(slot == now, expert, 0), 0)
        its_gate = tl.sum(tl.where(slot == now, gate, 0.0), 0)
        some = its_expert >= 0
        k_ok = (start + k < I) & some
        act = tl.load(act_at + now * I + start + k, mask=k_ok, other=0.0).to(tl.float32)
        at = w_at + (its_expert.to(tl.int64) * stride_we + start.to(tl.int64) * stride_wi)
        w = _tile(at, (h < H) & some, k_ok, stride_wi == 1, I % BK != 0).to(tl.float32)
        acc += w * (act * its_gate)[None, :]
    total = tl.sum(acc, 1)
    if bias_ptr is not None:
        bias_at = bias_ptr + (expert.to(tl.int64) * stride_be)[:, None] + (h * stride_bh)[None, :]
        bias = tl.load(bias_at, mask=live[:, None] & (h < H)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(bias * gate[:, None], 0)
    tl.store(out_ptr + token * H + h, total.to(out_ptr.dtype.element_ty), mask=h < H)
