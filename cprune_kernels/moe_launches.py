"""The launches of the experts forward: group pairs by expert, gate_up, down, combine. No step waits for the host.

For a few tokens, gate_up and down alone: each pair reads the weights of its expert itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cprune_kernels.combine_launches import combine_columns, combine_launch
from cprune_kernels.cost import ROW_GROUP as GROUP
from cprune_kernels.expert_direct import down_direct_kernel, gate_up_direct_kernel
from cprune_kernels.expert_gemm import activate_kernel, down_kernel, gate_up_kernel
from cprune_kernels.fused_moe import SILU, Activation, Curve, ExpertWeights, MoEObservation
from cprune_kernels.launch import Launch
from cprune_kernels.output_stats import expert_output_launches
from cprune_kernels.picker import Arch, MoEConfig, MoEShape, Tile, arch_of, pick_moe
from cprune_kernels.routing import RoutedTokens, max_tiles
from cprune_kernels.routing_launches import group_tokens_launches
from cprune_kernels.wide_launches import wide_launches


def moe_forward_launches(
    hidden: Tensor,
    index: Tensor,
    gates: Tensor,
    weights: ExpertWeights,
    activation: Activation,
    arch: Arch,
    config: MoEConfig | None = None,
) -> tuple[list[Launch], Tensor]:
    """The launches of `moe_forward` for at least one pair, and what they fill; tiles are picked where not given."""
    config = config or pick_config(hidden, index, weights, arch, activation)
    out = hidden.new_empty(hidden.shape)
    if config.direct:
        return _direct_launches(hidden, index, gates, weights, activation, out, config, arch), out
    launches, routed, y, done = _expert_launches(hidden, index, weights, activation, arch, config, False)
    return [*launches, combine_launch(y, routed, gates, out, None, index, done, config.down)], out


def moe_observe_launches(
    hidden: Tensor,
    index: Tensor,
    gates: Tensor,
    weights: ExpertWeights,
    activation: Activation,
    valid: Tensor | None,
    arch: Arch,
    config: MoEConfig | None = None,
) -> tuple[list[Launch], MoEObservation]:
    """The launches of `moe_observe`: those of the forward, norms from the combine, and one more read of the rows."""
    config = config or pick_config(hidden, index, weights, arch, activation, grouped=True)
    config = dataclasses.replace(config, down=dataclasses.replace(config.down, split_k=1))  # rows, not parts of them
    launches, routed, y, done = _expert_launches(hidden, index, weights, activation, arch, config, True)
    out = hidden.new_empty(hidden.shape, dtype=torch.float32)
    norms = hidden.new_empty(index.shape, dtype=torch.float32)
    launches.append(combine_launch(y, routed, gates, out, norms, index, done, config.down))
    reduce, seen = expert_output_launches(y[0], routed, valid, len(weights.down), arch)
    return launches + reduce, MoEObservation(out, norms, seen.high, seen.low, seen.sums)


def run(build: Callable[..., tuple[list[Launch], Any]], hidden: Tensor, index: Tensor, *rest: Any) -> Any:
    """Run what `build` lists on the GPU of the tensors; its outputs."""
    with torch.cuda.device(hidden.device):
        launches, out = build(hidden, index.contiguous(), *rest, arch_of(hidden.device))
        for launch in launches:
            launch.run()
    return out


def pick_config(
    hidden: Tensor,
    index: Tensor,
    weights: ExpertWeights,
    arch: Arch,
    activation: Activation = SILU,
    *,
    grouped: bool = False,
) -> MoEConfig:
    """The picker's tiles; those of plain copies where tensor descriptors cannot describe the weights."""
    experts, _, inner, width = weights.gate_up.shape
    if not (_describable(_gate_up_view(weights.gate_up)) and _describable(_down_view(weights.down))):
        arch = dataclasses.replace(arch, capability=80)
    shape = MoEShape(experts, index.shape[1], width, inner, hidden.dtype)
    return pick_moe(shape, len(hidden), arch, grouped=grouped, wide=_suits_wide_tiles(hidden, weights, activation))


def _suits_wide_tiles(hidden: Tensor, weights: ExpertWeights, activation: Activation) -> bool:
    """All behind descriptors, weights by rows, gate and up apart, no bias; a curve that leaves registers enough."""
    gate_up, down, *biases = weights
    light = activation.curve != Curve.GELU and activation.limit is None
    plain = biases == [None, None] and not _alternate(gate_up) and light
    aligned = all(size * hidden.element_size() % 16 == 0 for size in down.shape[1:])
    return plain and aligned and all(_describable(x) for x in (hidden, gate_up, down))


def _direct_launches(
    hidden: Tensor,
    index: Tensor,
    gates: Tensor,
    weights: ExpertWeights,
    activation: Activation,
    out: Tensor,
    config: MoEConfig,
    arch: Arch,
) -> list[Launch]:
    """Every pair reads the weights of its expert by itself."""
    early = arch.capability >= 90
    (tokens, width), top_k, inner = hidden.shape, index.shape[1], weights.down.shape[2]
    up_tile = _turned(config.gate_up, weights.gate_up.stride(3) == 1)
    down_tile = _turned(config.down, weights.down.stride(2) == 1)
    act = hidden.new_empty(index.numel(), inner)
    up_sizes, down_sizes = (
        {"BN": tile.n, "BK": tile.k, "STAGES": tile.stages, "C": len(weights.down), "K": top_k, "EARLY": early}
        for tile in (up_tile, down_tile)
    )
    return [
        Launch(
            gate_up_direct_kernel,
            (index.numel() * triton.cdiv(inner, up_tile.n),),
            {
                "x_ptr": hidden,
                "w_ptr": weights.gate_up,
                "bias_ptr": weights.gate_up_bias,
                "act_ptr": act,
                "index_ptr": index,
                "depth": width,
            },
            {
                "H": width,
                "I": inner,
                **_strides("x", "th", hidden),
                **_strides("w", "epih", weights.gate_up),
                **_epilogue(weights.gate_up_bias, activation),
                **up_sizes,
                "PAIRED": _alternate(weights.gate_up),
            },
            up_tile.warps,
            up_tile.stages,
        ),
        Launch(
            down_direct_kernel,
            (tokens * triton.cdiv(width, down_tile.n),),
            {
                "act_ptr": act,
                "w_ptr": weights.down,
                "bias_ptr": weights.down_bias,
                "index_ptr": index,
                "gates_ptr": gates,
                "out_ptr": out,
                "steps": top_k * triton.cdiv(inner, down_tile.k),
            },
            {
                "H": width,
                "I": inner,
                **_strides("w", "ehi", weights.down),
                **_strides("b", "eh", weights.down_bias),
                **_strides("g", "tk", gates),
                **down_sizes,
                "KP": triton.next_power_of_2(top_k),
            },
            down_tile.warps,
            down_tile.stages,
            early,
        ),
    ]


def _turned(tile: Tile, rows: bool) -> Tile:
    """A direct tile for weights whose columns are contiguous: at least 64 bytes of them, fewer of these large steps."""
    return tile if rows else dataclasses.replace(tile, n=max(tile.n, 32), stages=min(tile.stages, 4))


def _expert_launches(
    hidden: Tensor,
    index: Tensor,
    weights: ExpertWeights,
    activation: Activation,
    arch: Arch,
    config: MoEConfig,
    norms: bool,
) -> tuple[list[Launch], RoutedTokens, Tensor, Tensor | None]:
    """Up to the outputs of the experts, [split_k, R, H] as they are grouped, and what wide tiles report of them."""
    experts, m, wide = len(weights.down), config.gate_up.m, config.gate_up.wide
    progress, done = None, None
    if wide:
        _, span, _ = combine_columns(index.shape[1], hidden.shape[1], norms, config.down)
        taken = triton.cdiv(2 + max_tiles(index.numel(), experts, m), 4) * 4  # 16 bytes
        spans = triton.cdiv(hidden.shape[1], span)
        progress = index.new_empty(taken + experts * spans, dtype=torch.int32)
        done = progress[taken:].view(experts, spans)
    launches, routed = group_tokens_launches(index, experts, m, arch, level=wide, zeros=progress)
    act = hidden.new_empty(index.numel(), weights.down.shape[2])
    kind = hidden.dtype if config.down.split_k == 1 else torch.float32
    y = hidden.new_empty(config.down.split_k, len(act), hidden.shape[1], dtype=kind)
    if progress is not None:
        args = {**_map(routed), "progress_ptr": progress}
        curve = _curve(activation)
        launches += wide_launches(hidden, routed.order, weights, args, act, y[0], done, span, curve, config, arch)
    else:
        launches += _gate_up_launches(hidden, index.shape[1], weights, activation, routed, act, config.gate_up)
        launches.append(_down_launch(act, weights, routed, y, config.down))
    return launches, routed, y, done


def _gate_up_launches(
    hidden: Tensor,
    top_k: int,
    weights: ExpertWeights,
    activation: Activation,
    routed: RoutedTokens,
    act: Tensor,
    tile: Tile,
) -> list[Launch]:
    w, bias, (rows, inner), width = weights.gate_up, weights.gate_up_bias, act.shape, hidden.shape[1]
    view = _gate_up_view(w)
    tma = tile.tma and _describable(view)
    paired = _alternate(w)
    tiles = len(routed.tile_expert) * triton.cdiv(inner, tile.n) * tile.split_k
    args = {"x_ptr": hidden, "order_ptr": routed.order, **_map(routed), "depth": width}
    sizes = {"K": top_k, "H": width, "I": inner, **_strides("x", "th", hidden)}
    # the tile of weights, in the order of the view: [1, 2, n, k], [1, 2 n, k], [1, k, 2, n] or [1, k, 2 n]
    columns = [2 * tile.n] if paired else [2, tile.n]
    block = [1, *columns, tile.k] if w.stride(3) == 1 else [1, tile.k, *columns]
    parts = act if tile.split_k == 1 else act.new_empty(tile.split_k, rows, 2, inner, dtype=torch.float32)
    epilogue = _epilogue(bias, activation)
    product = Launch(
        gate_up_kernel,
        (tiles,),
        {
            **args,
            "w": _descriptor(view, block) if tma else w,
            "bias_ptr": bias if tile.split_k == 1 else None,
            "act_ptr": parts,
            "rows": rows,
        },
        {**sizes, **_strides("w", "epih", w), **epilogue, **_sizes(tile, tma), "PAIRED": paired},
        tile.warps,
        tile.stages,
    )
    if tile.split_k == 1:
        return [product]
    columns = 256
    return [
        product,
        Launch(
            activate_kernel,
            (len(routed.tile_expert) * (tile.m // 4), triton.cdiv(inner, columns)),
            {"parts_ptr": parts, "bias_ptr": bias, "act_ptr": act, **_map(routed), "rows": rows},
            {"I": inner, **epilogue, "BM": tile.m, "BR": 4, "BN": columns, "SPLIT": tile.split_k},
        ),
    ]


def _down_launch(act: Tensor, weights: ExpertWeights, routed: RoutedTokens, y: Tensor, tile: Tile) -> Launch:
    w, bias, (rows, inner) = weights.down, weights.down_bias, act.shape
    view = _down_view(w)
    tma = tile.tma and _describable(view) and _describable(act)
    block = [1, tile.n, tile.k] if w.stride(2) == 1 else [1, tile.k, tile.n]
    tiles = len(routed.tile_expert) * triton.cdiv(w.shape[1], tile.n) * tile.split_k
    return Launch(
        down_kernel,
        (tiles,),
        {
            "act": _descriptor(act, [tile.m, tile.k]) if tma else act,
            "w": _descriptor(view, block) if tma else w,
            "bias_ptr": bias,
            "y_ptr": y,
            **_map(routed),
            "rows": rows,
            "depth": inner,
        },
        {
            "H": w.shape[1],
            "I": inner,
            **_strides("w", "ehi", w),
            **_strides("b", "eh", bias),
            **_sizes(tile, tma),
        },
        tile.warps,
        tile.stages,
    )


def _epilogue(bias: Tensor | None, activation: Activation) -> dict[str, Any]:
    return {**_strides("b", "epi", bias), **_curve(activation)}


def _curve(activation: Activation) -> dict[str, Any]:
    return {
        "KIND": str(activation.curve),
        "ALPHA": activation.alpha,
        "LIMIT": activation.limit,
        "SHIFT": activation.shift,
    }


def _map(routed: RoutedTokens) -> dict[str, Tensor]:
    return {
        "offsets_ptr": routed.offsets,
        "tile_expert_ptr": routed.tile_expert,
        "tile_row_ptr": routed.tile_row,
        "tile_count_ptr": routed.tile_count,
    }


def _block(tile: Tile) -> dict[str, int]:
    return {"BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP": GROUP}


def _sizes(tile: Tile, tma: bool) -> dict[str, Any]:
    return {**_block(tile), "SPLIT": tile.split_k, "TMA": tma, "SWAP": tile.swap_ab}


def _strides(name: str, dims: str, x: Tensor | None) -> dict[str, int]:
    """{stride_<name><dim>: stride}, of zeros without a tensor."""
    return {f"stride_{name}{dim}": 0 if x is None else x.stride(place) for place, dim in enumerate(dims)}


def _alternate(gate_up: Tensor) -> bool:
    """Whether the columns of gate and of up alternate in memory."""
    return gate_up.stride(2) == 2 * gate_up.stride(1)


def _gate_up_view(w: Tensor) -> Tensor:
    """[C, 2, I, H], or [C, 2 I, H] where they alternate, with the contiguous dimension moved to the end."""
    if _alternate(w):
        w = w.transpose(1, 2).flatten(1, 2)
        return w if w.stride(2) == 1 else w.mT
    return w if w.stride(3) == 1 else w.permute(0, 3, 1, 2)


def _down_view(w: Tensor) -> Tensor:
    return w if w.stride(2) == 1 else w.mT


def _describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can be had: rows of 16 bytes and more, at multiples of 16 bytes."""
    *outer, last = x.stride()
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in outer)
    return last == 1 and aligned and x.data_ptr() % 16 == 0


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)
