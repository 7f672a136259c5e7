"""Launches of the experts forward: every tile that the picker can return, every layout of the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from cprune_kernels.fused_moe import GELU_TANH, SILU, SWIGLU_OAI, Activation, ExpertWeights, expert_views
from cprune_kernels.launch import Launch
from cprune_kernels.moe_launches import moe_forward_launches, moe_observe_launches
from cprune_kernels.picker import Arch, MoEConfig, Tile, legal_tiles
from tests.aot.gates import Gate

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GEMMS = ("gate_up_kernel", "gate_up_wide_kernel", "down_kernel", "down_wide_kernel")
WIDE = Tile(192, 128, 64, 12, 3, tma=True, wide=True)


def inputs(
    tokens: int,
    top_k: int,
    experts: int,
    width: int,
    inner: int,
    dtype: torch.dtype = BF16,
    *,
    biases: bool = False,
    transposed: bool = False,
    interleaved: bool = False,
    dropped: float = 0.0,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, ExpertWeights]:
    """(hidden, index, gates, weights): seeded, or on "meta" shapes alone; the last expert has no token."""
    generator = torch.Generator().manual_seed(tokens + width)

    def normal(*size: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        if device == "meta":
            return torch.empty(size, dtype=dtype, device=device)
        return (torch.randn(size, generator=generator) * std).to(dtype)

    if device == "meta":
        index = torch.empty(tokens, top_k, dtype=torch.int32, device=device)
    else:
        index = torch.rand(tokens, max(1, experts - 1), generator=generator).argsort(1)[:, :top_k].int().contiguous()
        index[torch.rand(tokens, top_k, generator=generator) < dropped] = -1
    hidden, gates = normal(tokens, width), normal(tokens, top_k, dtype=FP32)
    gate_up, down = normal(experts, 2 * inner, width, std=width**-0.5), normal(experts, width, inner, std=inner**-0.5)
    if transposed:
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    both = (normal(experts, 2 * inner, dtype=FP32), normal(experts, width, dtype=FP32)) if biases else (None, None)
    return hidden, index, gates, expert_views(hidden, gate_up, down, *both, transposed, interleaved)


def config(gate_up: Tile, **down: object) -> MoEConfig:
    return MoEConfig(gate_up, replace(gate_up, **down))


def forward(
    arch: Arch, tensors: tuple[Tensor, Tensor, Tensor, ExpertWeights], tiles: MoEConfig, activation: Activation = SILU
) -> tuple[list[Launch], dict[str, Tensor]]:
    launches, out = moe_forward_launches(*tensors, activation, arch, tiles)
    return launches, {"out": out}


def observe(
    arch: Arch, tensors: tuple[Tensor, Tensor, Tensor, ExpertWeights], tiles: MoEConfig
) -> tuple[list[Launch], dict[str, Tensor]]:
    valid = torch.arange(len(tensors[0])) % 5 != 3
    launches, seen = moe_observe_launches(*tensors, SILU, valid, arch, tiles)
    return launches, seen._asdict()


def small(arch: Arch, dtype: torch.dtype = BF16, **split: int) -> tuple[list[Launch], dict[str, Tensor]]:
    """Ragged in every dimension: 19 tokens, a tile of columns too wide for H and I, dropped pairs."""
    tile = Tile(16, 16, 32, 4, 3, split.get("split_k", 1))
    return forward(arch, inputs(19, 2, 4, 72, 40, dtype, dropped=0.2), config(tile, n=32))


def swapped(arch: Arch) -> tuple[list[Launch], dict[str, Tensor]]:
    wide = arch.capability >= 90
    tile = Tile(16, 32, 64, 4, 3, 2, swap_ab=wide, tma=wide)
    return forward(arch, inputs(19, 2, 4, 136, 72, dropped=0.2), config(tile, n=64))


def one_product(
    launches: list[Launch], outputs: dict[str, Tensor], down: bool
) -> tuple[list[Launch], dict[str, Tensor]]:
    """Up to the activations, or on from given ones: an activation rounded the other way would change a row of y."""
    place = next(place for place, launch in enumerate(launches) if launch.kernel.__name__.startswith("gate_up"))
    act = launches[place].args["act_ptr"]
    if not down:
        return launches[: place + 1], {"act": act}
    act.copy_(torch.randn(act.shape, generator=torch.Generator().manual_seed(1)))
    progress = launches[place].args.get("progress_ptr")
    if progress is not None:  # as gate_up leaves it
        progress.fill_(launches[place + 1].constants["REPORTS"])
        progress[:2] = 0
    before = [replace(x, args={**x.args, "zeros_ptr": None}) if "zeros_ptr" in x.args else x for x in launches[:place]]
    return before + launches[place + 1 :], outputs


def production(arch: Arch, down: bool) -> tuple[list[Launch], dict[str, Tensor]]:
    """The tiles of prefill; more steps than stages, and columns beyond the last tile."""
    wide = arch.capability >= 90
    tile = Tile(128, 128, 64, 8, 4, tma=True) if wide else Tile(128, 64, 32, 8, 4)
    tiles = config(tile, n=256 if wide else 128)
    return one_product(*forward(arch, inputs(150, 1, 2, 384, 264), tiles), down)


def wide(
    arch: Arch, sms: int, tensors: tuple[Tensor, Tensor, Tensor, ExpertWeights], curve: Activation = SILU
) -> tuple[list[Launch], dict[str, Tensor]]:
    """The wide tiles, and on other architectures narrow ones."""
    arch = replace(arch, sms=sms)
    if arch.capability != 90:
        return forward(arch, tensors, config(Tile(64, 64, 64, 4, 3, tma=arch.capability >= 90), n=64), curve)
    return forward(arch, tensors, config(WIDE, n=256), curve)


def wide_product(arch: Arch, down: bool) -> tuple[list[Launch], dict[str, Tensor]]:
    """An expert of a full tile and one of two blocks, the last not full; three and two tiles for each of two CTAs."""
    return one_product(*wide(arch, 2, inputs(300, 1, 2, 328, 264)), down)


def crowded(arch: Arch) -> tuple[list[Launch], dict[str, Tensor]]:
    """Tiles of one to three blocks, more steps than stages, all for one CTA."""
    return one_product(*wide(arch, 1, inputs(190, 2, 5, 328, 264, dropped=0.3)), True)


def many_experts() -> tuple[Tensor, Tensor, Tensor, ExpertWeights]:
    """More tiles of rows than take turns at a tile of weights, so that some are done long before the others."""
    return inputs(450, 2, 13, 136, 136)


def gpt_oss(arch: Arch, down: bool) -> tuple[list[Launch], dict[str, Tensor]]:
    wide = arch.capability >= 90
    tile = Tile(64, 64, 64, 4, 3, tma=True) if wide else Tile(64, 32, 32, 4, 3)
    tensors = inputs(40, 1, 3, 136, 72, biases=True, transposed=True, interleaved=True)
    return one_product(*forward(arch, tensors, config(tile, n=64), SWIGLU_OAI), down)


def direct(
    arch: Arch, down: bool, dtype: torch.dtype = BF16, oss: bool = False
) -> tuple[list[Launch], dict[str, Tensor]]:
    """More steps than stages, a last step and columns beyond the sizes, dropped pairs."""
    tensors = inputs(2, 3, 5, 1064, 280, dtype, biases=oss, transposed=oss, interleaved=oss, dropped=0.2)
    tile = Tile(1, 16, 512 // dtype.itemsize, 4, 4)
    return one_product(*forward(arch, tensors, config(tile), SWIGLU_OAI if oss else SILU), down)


EXECUTED: dict[str, Callable[[Arch], tuple[list[Launch], dict[str, Tensor]]]] = {
    "small": small,
    "small, float16": partial(small, dtype=FP16),
    "small, float32": partial(small, dtype=FP32),
    "small, split": partial(small, split_k=2),
    "swapped": swapped,
    "gate_up, production": partial(production, down=False),
    "down, production": partial(production, down=True),
    "gate_up, wide": partial(wide_product, down=False),
    "down, wide": partial(wide_product, down=True),
    "wide, all heights": crowded,
    "wide, many experts": lambda arch: wide(arch, 2, many_experts()),
    "wide, small": lambda arch: wide(arch, 1, inputs(19, 2, 4, 72, 40, dropped=0.2)),
    "wide, a step or two": lambda arch: wide(arch, 1, inputs(190, 1, 2, 72, 40)),
    "wide, float16": lambda arch: wide(arch, 2, inputs(19, 2, 4, 72, 40, FP16, dropped=0.2)),
    "wide, tanh": lambda arch: wide(arch, 2, inputs(150, 2, 4, 72, 40, dropped=0.2), GELU_TANH),
    "wide, idle CTAs": lambda arch: wide(arch, 132, inputs(19, 2, 4, 72, 40, dropped=0.2)),
    "wide, nothing to do": lambda arch: wide(arch, 2, inputs(19, 2, 4, 72, 40, dropped=1.0)),
    "gate_up, gpt-oss": partial(gpt_oss, down=False),
    "down, gpt-oss": partial(gpt_oss, down=True),
    "gate_up, direct": partial(direct, down=False),
    "down, direct": partial(direct, down=True),
    "gate_up, direct, float32": partial(direct, down=False, dtype=FP32),
    "down, direct, float32": partial(direct, down=True, dtype=FP32),
    "gate_up, direct, gpt-oss": partial(direct, down=False, oss=True),
    "down, direct, gpt-oss": partial(direct, down=True, oss=True),
    "observe": lambda arch: observe(arch, inputs(19, 2, 4, 72, 40, dropped=0.2), config(Tile(16, 16, 32, 4, 3), n=32)),
}


def families(product: str, dtype: torch.dtype, arch: Arch) -> list[Tile]:
    """The grouped tiles that the picker can return but for depth of the pipeline; in parts, one of each height."""
    found: dict[tuple[object, ...], Tile] = {}
    for tile in legal_tiles(product, dtype, arch):
        cut = ("in parts",) if tile.split_k > 1 else (tile.n, tile.k, tile.warps)
        found.setdefault((tile.m, *cut), tile)
    return [tile for tile in found.values() if tile.m > 1]


def every(
    product: str,
    arch: Arch,
    dtype: torch.dtype = BF16,
    plain: bool = False,
    rows: int | None = None,
    curve: Activation = SILU,
) -> list[Launch]:
    """That product of Qwen3-30B-A3B at every tile; `plain` at those that copy without tensor descriptors."""
    tensors, legal = meta(dtype=dtype), replace(arch, capability=80) if plain else arch
    launches = []
    for tile in families(product, dtype, legal):
        if rows in (None, tile.m):
            name = f"{product}_wide_kernel" if tile.wide else f"{product}_kernel"
            launches += only(name, moe_forward_launches(*tensors, curve, arch, config(tile))[0])
    return launches


def meta(
    tokens: int = 4096,
    top_k: int = 8,
    experts: int = 128,
    width: int = 2048,
    inner: int = 768,
    dtype: torch.dtype = BF16,
    **layout: bool,
) -> tuple[Tensor, Tensor, Tensor, ExpertWeights]:
    return inputs(tokens, top_k, experts, width, inner, dtype, device="meta", **layout)


def only(name: str, launches: list[Launch]) -> list[Launch]:
    return [launch for launch in launches if launch.kernel.__name__ == name]


def layouts(arch: Arch, tokens: int) -> list[Launch]:
    """The products of gpt-oss-20b and Llama 4 Scout; biases in float32, or their loads would pass for lost copies."""
    oss = meta(tokens, 4, 32, 2880, 2880, biases=True, transposed=True, interleaved=True)
    llama = meta(tokens, 1, 16, 5120, 8192, transposed=True)
    launches = [*moe_forward_launches(*oss, SWIGLU_OAI, arch)[0], *moe_forward_launches(*llama, SILU, arch)[0]]
    return [launch for launch in launches if launch.kernel.__name__ in GEMMS]


def directs(arch: Arch) -> list[Launch]:
    """Every direct tile on rows but for depth, those picked on columns. Weights come by 16 bytes, x and act by 4."""
    launches = []
    for dtype in (BF16, FP32):
        for tile in legal_tiles("gate_up", dtype, arch):
            if tile.m == 1 and tile.stages == 6:
                launches += moe_forward_launches(*meta(1, dtype=dtype), SILU, arch, config(tile))[0]
    oss = meta(1, 4, 32, 2880, 2880, biases=True, transposed=True, interleaved=True)
    llama = meta(1, 1, 16, 5120, 8192, transposed=True)
    for tensors in (oss, llama, meta(1, 6, 64, 2048, 1408, FP16)):
        launches += moe_forward_launches(*tensors, SILU, arch)[0]
    assert {launch.kernel.__name__ for launch in launches} == {"gate_up_direct_kernel", "down_direct_kernel"}
    return launches


def streams(arch: Arch) -> list[Launch]:
    """What only moves rows: combine with and without norms and of parts, the activation of parts."""
    tensors, launches = meta(), []
    split = config(Tile(16, 64, 64, 4, 4, 4), n=64)
    launches += moe_forward_launches(*tensors, SILU, arch, split)[0]
    launches += moe_forward_launches(*tensors, SWIGLU_OAI, arch)[0]
    launches += moe_observe_launches(*tensors, SILU, None, arch)[0]
    return [*only("activate_kernel", launches), *only("combine_kernel", launches)]


COMPILED: dict[str, Callable[[Arch], list[Launch]]] = {
    "gate_up": partial(every, "gate_up"),
    "down": partial(every, "down"),
    "gate_up, float16": lambda arch: every("gate_up", arch, FP16)[-2:],
    "gate_up, float32": lambda arch: every("gate_up", arch, FP32),
    "down, float32": lambda arch: every("down", arch, FP32),
    "gate_up, plain copies": partial(every, "gate_up", plain=True, rows=128),
    "down, plain copies": partial(every, "down", plain=True, rows=128),
    "gate_up, tanh": lambda arch: every("gate_up", arch, rows=192 if arch.capability == 90 else 128, curve=GELU_TANH),
    "layouts, decode": partial(layouts, tokens=16),
    "layouts, prefill": partial(layouts, tokens=4096),
    "direct": directs,
    "streams": streams,
}
PRODUCT = Gate(tensor_core=True, tma=True, narrow_loads=8)
GATES = {
    "gate_up": PRODUCT,
    "gate_up, float16": PRODUCT,
    "down": PRODUCT,
    "gate_up, plain copies": Gate(tensor_core=True),
    "down, plain copies": Gate(tensor_core=True),
    "gate_up_wide_kernel": Gate(
        registers=168, tensor_core=True, tma=True, narrow_loads=48, narrow_stores=0, atomics=True
    ),
    "down_wide_kernel": Gate(registers=168, tensor_core=True, tma=True, narrow_loads=24, narrow_stores=0, atomics=True),
    "combine_kernel": Gate(narrow_stores=1, ctas_per_sm=3, atomics=True),  # it looks at what is reported
    "layouts, decode": Gate(tensor_core=True, tma=True),
    "layouts, prefill": Gate(tensor_core=True, tma=True),
    "direct": Gate(narrow_copies=8, narrow_loads=5, narrow_stores=1),
    "streams": Gate(narrow_stores=1, ctas_per_sm=3),
}
