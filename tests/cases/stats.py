"""Launches of the calibration statistics: sums over routed pairs, and what the experts' outputs were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cprune_kernels.launch import Launch
from cprune_kernels.output_stats import expert_output_launches
from cprune_kernels.picker import Arch
from cprune_kernels.routing import RoutedTokens, group_tokens_reference
from cprune_kernels.routing_launches import group_tokens_launches
from cprune_kernels.stats_launches import expert_statistics_launches


def grouped(index: Tensor, experts: int) -> RoutedTokens:
    return group_tokens_reference(index, experts, 128)


@dataclass(frozen=True)
class Case:
    """Random routing of T tokens to K of E experts, and of what the forward knows of the pairs."""

    index: Tensor  # [T, K], some of it -1
    gates: Tensor  # [T, K]
    norms: Tensor  # [T, K]
    scale: Tensor | None  # [T]
    valid: Tensor | None  # [T] bool
    experts: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.index, self.gates, self.norms, self.scale, self.valid


def make(
    tokens: int,
    top_k: int,
    experts: int,
    *,
    dropped: float = 0.1,
    skip: tuple[int, ...] = (),
    index_dtype: torch.dtype = torch.int64,
    dtype: torch.dtype = torch.float32,
    scale: bool = True,
    valid: bool = True,
) -> Case:
    """`skip` are experts without a token."""
    generator = torch.Generator().manual_seed(tokens + experts)
    scores = torch.rand(tokens, experts, generator=generator)
    scores[:, list(skip)] = -1.0
    index = scores.argsort(dim=1, descending=True, stable=True)[:, :top_k].contiguous()
    index[torch.rand(tokens, top_k, generator=generator) < dropped] = -1
    return Case(
        index=index.to(index_dtype),
        gates=torch.rand(tokens, top_k, generator=generator).to(dtype),
        norms=torch.rand(tokens, top_k, generator=generator) * 10,
        scale=torch.rand(tokens, generator=generator) + 1 if scale else None,
        valid=torch.rand(tokens, generator=generator) < 0.8 if valid else None,
        experts=experts,
    )


def _sums(case: Case, arch: Arch) -> tuple[list[Launch], dict[str, Tensor]]:
    launches, sums = expert_statistics_launches(*case.tensors, grouped(case.index, case.experts), case.experts, arch)
    return launches, sums._asdict()


def _outputs(case: Case, width: int, dtype: torch.dtype, arch: Arch) -> tuple[list[Launch], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(case.index.numel(), width, generator=generator).to(dtype)
    routed = grouped(case.index, case.experts)
    launches, out = expert_output_launches(rows, routed, case.valid, case.experts, arch)
    return launches, out._asdict()


EXECUTED: dict[str, Callable[[Arch], tuple[list[Launch], dict[str, Tensor]]]] = {
    "sums-small": partial(_sums, make(131, 3, 5, skip=(2,), index_dtype=torch.int32)),
    "sums-plain": partial(_sums, make(37, 2, 3, dtype=torch.bfloat16, scale=False, valid=False)),
    "sums-tile": partial(_sums, make(700, 8, 9)),
    "outputs-small": partial(_outputs, make(37, 3, 4, skip=(1,)), 130, torch.bfloat16),
    "outputs-tile": partial(_outputs, make(150, 2, 3, valid=False), 1024, torch.float32),
}


def _meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _compiled_sums(tokens: int, top_k: int, experts: int, arch: Arch) -> list[Launch]:
    index, pairs = _meta(tokens, top_k, dtype=torch.int32), _meta(tokens, top_k)
    _, routed = group_tokens_launches(index, experts, 128, arch)
    valid = _meta(tokens, dtype=torch.bool)
    return expert_statistics_launches(index, pairs, pairs, _meta(tokens), valid, routed, experts, arch)[0]


def _compiled_outputs(tokens: int, top_k: int, experts: int, hidden: int, arch: Arch) -> list[Launch]:
    _, routed = group_tokens_launches(_meta(tokens, top_k, dtype=torch.int32), experts, 128, arch)
    rows = _meta(tokens * top_k, hidden, dtype=torch.bfloat16)
    return expert_output_launches(rows, routed, _meta(tokens, dtype=torch.bool), experts, arch)[0]


COMPILED: dict[str, Callable[[Arch], list[Launch]]] = {
    "sums-mixtral-8x7b": partial(_compiled_sums, 4096, 2, 8),
    "sums-qwen3-30b-a3b": partial(_compiled_sums, 4096, 8, 128),
    "sums-deepseek-v3": partial(_compiled_sums, 4096, 8, 256),
    "sums-odd": partial(_compiled_sums, 300, 6, 43),
    "outputs-mixtral-8x7b": partial(_compiled_outputs, 4096, 2, 8, 4096),
    "outputs-qwen3-30b-a3b": partial(_compiled_outputs, 4096, 8, 128, 2048),
    "outputs-deepseek-v3": partial(_compiled_outputs, 4096, 8, 256, 7168),
}
