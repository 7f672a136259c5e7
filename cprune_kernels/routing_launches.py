"""The launches of routing.py, for a GPU, Triton's interpreter and the tests of compiled code. Imports Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from cprune_kernels import routing_kernels as kernels
from cprune_kernels.launch import Launch
from cprune_kernels.picker import Arch
from cprune_kernels.routing import RoutedTokens, Routing, Scoring, empty_groups, empty_routing, max_tiles

AT_ONCE = 4096  # pairs that one launch groups
BLOCK = 256  # pairs of a block of the three launches that group more
SCAN = 1024  # blocks that one step of their scan takes
TILES = 32  # entries of the map of tiles that one CTA writes


def route_launches(
    logits: Tensor,
    top_k: int,
    scoring: Scoring,
    arch: Arch,
    bias: Tensor | None = None,
    expert_map: Tensor | None = None,
    num_experts: int | None = None,
) -> tuple[list[Launch], Routing]:
    """`route` as one launch, the same for every `arch`; contiguous arguments."""
    tokens, experts = logits.shape
    out = empty_routing(logits, tokens, top_k)
    group_lanes = _power_of_two(scoring.groups)
    lanes = _power_of_two(experts // scoring.groups)
    block = max(
        1, min(16, 512 // (group_lanes * lanes))
    )  # fixed by the experts: a token's gates do not depend on others
    launch = Launch(
        kernels.route_kernel,
        (_ceil_div(tokens, block),),
        {
            "logits_ptr": logits,
            "bias_ptr": bias,
            "expert_map_ptr": expert_map,
            "index_ptr": out.index,
            "gates_ptr": out.gates,
            "tokens": tokens,
        },
        {
            "N": experts,
            "K": top_k,
            "C": experts if num_experts is None else num_experts,
            "KIND": scoring.kind,
            "RENORMALISE": scoring.renormalise,
            "SCALE": scoring.scale,
            "BY_SCORE": scoring.chooses_by_score(bias is not None),
            "GROUPS": scoring.groups,
            "GROUPS_KEPT": scoring.groups_kept,
            "TOP2": scoring.group_score == "top2",
            "BT": block,
            "G2": group_lanes,
            "S2": lanes,
            "K2": _power_of_two(top_k),
        },
        num_warps=1,
    )
    return [launch] if tokens else [], out


def remap_launches(
    index: Tensor, gates: Tensor, expert_map: Tensor, num_experts: int, arch: Arch
) -> tuple[list[Launch], Routing]:
    """`remap` as one launch, the same for every `arch`; contiguous arguments."""
    tokens, top_k = index.shape
    out = empty_routing(index, tokens, top_k)
    slots = _power_of_two(top_k)
    block = max(1, 128 // slots)
    launch = Launch(
        kernels.remap_kernel,
        (_ceil_div(tokens, block),),
        {
            "index_in_ptr": index,
            "gates_in_ptr": gates,
            "expert_map_ptr": expert_map,
            "index_ptr": out.index,
            "gates_ptr": out.gates,
            "tokens": tokens,
        },
        {"N": len(expert_map), "K": top_k, "C": num_experts, "BT": block, "K2": slots},
        num_warps=1,
    )
    return [launch] if tokens else [], out


def group_tokens_launches(
    index: Tensor, num_experts: int, block_m: int, arch: Arch, level: bool = False, zeros: Tensor | None = None
) -> tuple[list[Launch], RoutedTokens]:
    """`group_tokens` as one launch, or three for more than AT_ONCE pairs; contiguous index.

    With `level`, each expert's tiles have one, two or three thirds of block_m rows: as few tiles as without, heights
    that differ by a third at most, its highest first. `zeros` int32 are zeroed, for kernels that count.
    From capability 9.0 the second and third launch start early, and what follows may.
    """
    early = arch.capability >= 90
    pairs, columns = index.numel(), _power_of_two(max(16, num_experts))
    tiles = max_tiles(pairs, num_experts, block_m)
    out = empty_groups(index, num_experts, block_m)
    count = 0 if zeros is None else zeros.numel()
    tile_programs = max(1, _ceil_div(tiles, TILES))
    outputs = {f"{name}_ptr": tensor for name, tensor in out._asdict().items()}
    shape = {"C": num_experts, "C2": columns, "BM": block_m, "LEVEL": level, "TILES": TILES, "EARLY": early}
    if pairs <= AT_ONCE:
        lanes = _power_of_two(max(128, pairs))
        args = {"index_ptr": index, **outputs, "zeros_ptr": zeros, "pairs": pairs, "tiles": tiles, "zeros": count}
        constants = {**shape, "P2": lanes, "STEP": 32}
        grid = (num_experts + tile_programs,)
        return [Launch(kernels.group_at_once_kernel, grid, args, constants, num_warps=8)], out
    blocks = _ceil_div(pairs, BLOCK)
    upto, base = (index.new_empty((num_experts, blocks), dtype=torch.int32) for _ in range(2))
    return [
        Launch(
            kernels.count_pairs_kernel,
            (blocks,),
            {"index_ptr": index, "upto_ptr": upto, "pairs": pairs, "blocks": blocks},
            {"C": num_experts, "C2": columns, "BLOCK": BLOCK, "STEP": 32, "EARLY": early},
            num_warps=8,
        ),
        Launch(
            kernels.scan_pairs_kernel,
            (num_experts,),
            {"upto_ptr": upto, "base_ptr": base, "offsets_ptr": out.offsets, "blocks": blocks},
            {"BLOCK": SCAN, "EARLY": early},
            early=early,
        ),
        Launch(
            kernels.scatter_pairs_kernel,
            (blocks + tile_programs,),
            {
                "index_ptr": index,
                "base_ptr": base,
                **outputs,
                "zeros_ptr": zeros,
                "pairs": pairs,
                "blocks": blocks,
                "tiles": tiles,
                "zeros": count,
            },
            {**shape, "BLOCK": BLOCK, "STEP": 32},
            num_warps=8,
            early=early,
        ),
    ], out


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
