"""Launches of the Gram of experts and of linear CKA."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cprune_kernels.gram_launches import add_launches, cka_launches, finish_launch, gram_launches, lane_count
from cprune_kernels.launch import Launch
from cprune_kernels.picker import Arch
from tests.aot.gates import Gate

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _gram(
    experts: int,
    length: int,
    dtype: torch.dtype,
    arch: Arch,
    *,
    layers: int = 1,
    offset: int = 0,
    scaled: bool = False,
    chain: int | None = 128,
) -> tuple[list[Launch], dict[str, Tensor]]:
    """Whole numbers, and scales that are powers of two: no order of the sums can round them."""
    generator = torch.Generator().manual_seed(experts)
    x = torch.randint(-8, 9, (layers, experts, length + offset), generator=generator).float().to(dtype)[..., offset:]
    scale = None
    if scaled:
        scale = 2.0 ** torch.randint(-2, 3, (layers, experts, -(-length // 128)), generator=generator)
    launches, gram = gram_launches(x, arch, scale=scale, chain=chain)
    return launches, {"gram": gram}


def _windows(experts: int, length: int, arch: Arch) -> tuple[list[Launch], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(experts)
    x = torch.randint(-8, 9, (experts, length), generator=generator).bfloat16()
    lanes = torch.zeros(1, lane_count(experts), experts, experts, dtype=torch.float64)
    gram = torch.empty(experts, experts, dtype=torch.float64)
    launches, first = [], 0
    for window in x.split(length // 2, dim=1):
        more, chunks = add_launches(window, lanes, arch, chain=128, first=first)
        launches, first = [*launches, *more], first + chunks
    return [*launches, finish_launch(lanes, gram)], {"gram": gram, "lanes": lanes}


def _cka(
    experts: int, samples: int, hidden: int, dtype: torch.dtype, arch: Arch
) -> tuple[list[Launch], dict[str, Tensor]]:
    """Outputs whose mean over a power of two of samples, and whose peak, are whole: the kernels round nothing."""
    generator = torch.Generator().manual_seed(experts)
    y = torch.randint(-2, 3, (experts, samples, hidden), generator=generator)
    y[:, samples // 2 :] = -y[:, : samples // 2]
    y[:, 0, 0], y[:, samples // 2, 0] = 4, -4
    launches, gram = cka_launches(y.to(dtype), arch)
    return launches, {"gram": gram}


EXECUTED: dict[str, Callable[[Arch], tuple[list[Launch], dict[str, Tensor]]]] = {
    "8 experts": partial(_gram, 8, 300, BF16),
    "24 experts": partial(_gram, 24, 304, FP16, layers=2),
    "64 experts": partial(_gram, 64, 200, BF16),
    "131 experts": partial(_gram, 131, 304, BF16),
    "256 experts": partial(_gram, 256, 256, BF16),
    "300 experts": partial(_gram, 300, 144, FP16),
    "511 experts": partial(_gram, 511, 80, BF16),
    "float32": partial(_gram, 70, 132, FP32),
    "rows off the grid": partial(_gram, 17, 131, BF16, offset=1),
    "float8 with scales": partial(_gram, 131, 272, torch.float8_e4m3fn, scaled=True),
    "float8 of 8 experts": partial(_gram, 8, 400, torch.float8_e5m2, scaled=True),
    "windows": partial(_windows, 65, 1024),
    "cka": partial(_cka, 3, 32, 40, BF16),
}


def _meta(experts: int, length: int, dtype: torch.dtype, layers: int, arch: Arch) -> list[Launch]:
    return gram_launches(torch.empty(layers, experts, length, dtype=dtype, device="meta"), arch)[0]


def _meta_windows(experts: int, length: int, arch: Arch) -> list[Launch]:
    x = torch.empty(experts, length, dtype=BF16, device="meta")
    lanes = torch.empty(1, lane_count(experts), experts, experts, dtype=torch.float64, device="meta")
    return add_launches(x, lanes, arch, chain=4096, first=7)[0]


def _meta_cka(experts: int, samples: int, hidden: int, arch: Arch) -> list[Launch]:
    return cka_launches(torch.empty(experts, samples, hidden, dtype=BF16, device="meta"), arch)[0]


DEEPSEEK, QWEN, LITE, MIXTRAL, KIMI = 44_040_192, 4_718_592, 8_650_752, 176_160_768, 44_040_192  # 3 I H

COMPILED: dict[str, Callable[[Arch], list[Launch]]] = {
    "deepseek-v3": partial(_meta, 256, DEEPSEEK, BF16, 1),
    "deepseek-v3 float8": partial(_meta, 256, DEEPSEEK, torch.float8_e4m3fn, 1),
    "qwen3-30b-a3b": partial(_meta, 128, QWEN, BF16, 1),
    "qwen3-30b-a3b all layers": partial(_meta, 128, QWEN, BF16, 48),
    "deepseek-v2": partial(_meta, 160, 23_592_960, BF16, 1),
    "deepseek-v2-lite": partial(_meta, 64, LITE, BF16, 1),
    "mixtral-8x7b": partial(_meta, 8, MIXTRAL, BF16, 1),
    "kimi-k2": partial(_meta, 384, KIMI, BF16, 1),
    "300 experts": partial(_meta, 300, DEEPSEEK, FP16, 1),
    "512 experts": partial(_meta, 512, 6_291_456, BF16, 1),
    "32 experts": partial(_meta, 32, 24_883_200, BF16, 1),
    "float8 of 160": partial(_meta, 160, 23_592_960, torch.float8_e4m3fn, 1),
    "float8 of 128": partial(_meta, 128, QWEN, torch.float8_e5m2, 1),
    "float8 of 64": partial(_meta, 64, LITE, torch.float8_e4m3fn, 1),
    "float8 of 32": partial(_meta, 32, LITE, torch.float8_e4m3fn, 1),
    "float8 of 8": partial(_meta, 8, MIXTRAL, torch.float8_e4m3fn, 1),
    "float8 of 384": partial(_meta, 384, KIMI, torch.float8_e4m3fn, 1),
    "float32 of 8": partial(_meta, 8, 1_048_576, FP32, 1),
    "float32 of 32": partial(_meta, 32, 1_048_576, FP32, 1),
    "float32 of 256": partial(_meta, 256, 1_048_576, FP32, 1),
    "windows": partial(_meta_windows, 256, 4_194_304),
    "cka": partial(_meta_cka, 128, 1024, 2048),
    "cka of few samples": partial(_meta_cka, 128, 96, 2048),
}

GATES = {
    "gram_group_kernel": Gate(tensor_core=True, tma=True, narrow_loads=0, narrow_stores=0),
    "gram_tile_kernel": Gate(narrow_loads=0, narrow_stores=0),
    "gram_lanes_kernel": Gate(narrow_loads=0, narrow_stores=0, ctas_per_sm=4),
}
