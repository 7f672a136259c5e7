"""The launches of expert_wide.py: one CTA on each SM, and down under way where gate_up has no tile left."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia import hopper

from cprune_kernels.cost import ROW_GROUP
from cprune_kernels.expert_wide import down_wide_kernel, gate_up_wide_kernel
from cprune_kernels.fused_moe import ExpertWeights
from cprune_kernels.launch import Launch
from cprune_kernels.picker import Arch, MoEConfig


def wide_launches(
    hidden: Tensor,
    order: Tensor,
    weights: ExpertWeights,
    args: dict[str, Tensor],  # the map of tiles, and progress
    act: Tensor,
    y: Tensor,
    done: Tensor,  # [C, H / span] for down's reports
    span: int,  # columns of y
    curve: dict[str, Any],
    config: MoEConfig,
    arch: Arch,
) -> list[Launch]:
    """gate_up, which waits for the grouping, and down, which takes what gate_up has done and waits for nothing else."""
    (rows, inner), (tokens, width), (up, down) = act.shape, hidden.shape, (config.gate_up, config.down)
    across = triton.cdiv(inner, up.n), triton.cdiv(width, down.n)
    third = [up.m // 3, up.k]
    up_args = {"w": _swizzled(weights.gate_up, [1, 2, up.n // 2, up.k]), "act": _swizzled(act, third), "act_ptr": act}
    up_args |= {"x_ptr": hidden, "order_ptr": order, "depth": width}
    up_sizes = {"K": rows // tokens, "H": width, "I": inner, "stride_xt": hidden.stride(0), **curve}
    down_args = {"w": _swizzled(weights.down, [1, down.n // 2, down.k]), "act": _swizzled(act, third), "depth": inner}
    down_args |= {"y": _swizzled(y, third), "y_ptr": y, "done_ptr": done}
    down_sizes = {"H": width, "I": inner, "REPORTS": 2 * across[0], "SPAN": span}
    tiles = len(args["tile_expert_ptr"])
    return [
        Launch(
            kernel,
            (min(arch.sms, tiles * columns),),
            {**args, **own},
            {**sizes, "GROUP": ROW_GROUP, "STAGES": tile.stages},
            tile.warps // 3,  # those of the kernel's first part alone
            early=True,
        )
        for kernel, own, sizes, tile, columns in (
            (gate_up_wide_kernel, up_args, up_sizes, up, across[0]),
            (down_wide_kernel, down_args, down_sizes, down, across[1]),
        )
    ]


def _swizzled(x: Tensor, block: list[int]) -> hopper.TensorDescriptor:
    """A descriptor for Gluon, which wants to know where shared memory has what."""
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(block))
    return hopper.TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)
