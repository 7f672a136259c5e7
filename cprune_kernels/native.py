"""The native operators of csrc/: loaded once where they were built, and never required."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path

import torch

log = logging.getLogger(__name__)
LIBRARY = Path(__file__).with_name("_C.so")
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")  # the best last


@torch.compiler.assume_constant_result
def backend() -> str:
    """What the operators run on.

    "amx_bf16" | "avx512_bf16" | "avx512" | "avx2" | "portable": the native kernels and the instructions they use on
    this CPU; "reference": torch operations, because the native kernels were not built or do not fit the installed torch
    (logged once). CPRUNE_MAX_ISA in the environment names the most that is used of these instructions.
    Raises ValueError where it names others.
    """
    return _load()


@functools.cache
def _load() -> str:
    check_environment()
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        reason = str(error).splitlines()[0] if LIBRARY.exists() else "they were not built"
        log.warning("no native kernels (%s); running on reference operations", reason)
        return "reference"
    for name, fake in FAKES.items():
        torch.library.register_fake(f"cprune_native::{name}", fake)
    return torch.ops.cprune_native.backend()


def check_environment() -> None:
    """Raise ValueError where CPRUNE_MAX_ISA names no instructions that the native kernels know."""
    most = os.environ.get("CPRUNE_MAX_ISA") or ISAS[-1]
    if most not in ISAS:
        raise ValueError(f"CPRUNE_MAX_ISA must be one of {', '.join(ISAS)}, got {most!r}")


def wants_gradients(*inputs: torch.Tensor) -> bool:
    """Whether what is computed of these inputs is to be differentiated, which the native kernels cannot."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def use_large_pages(*tensors: torch.Tensor) -> int:
    """Move tensors of a CPU to memory pages of 2 MB, in place; return the bytes that now lie in such pages.

    For weights that stay: their values and addresses do not change, no memory is added, and reading all of them costs
    fewer look-ups of addresses. Takes about two seconds for a gigabyte. 0 bytes where the native kernels were not
    built, or the system cannot: Linux before 6.1, tensors mapped from files.
    Raises ValueError for a tensor of another device.
    """
    if others := sorted({str(x.device) for x in tensors if x.device.type != "cpu"}):
        raise ValueError(f"tensors must be on the CPU, got {' and '.join(others)}")
    if backend() == "reference":
        return 0
    return sum(torch.ops.cprune_native.use_large_pages(x) for x in tensors)


def _moe_forward_fake(hidden: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
    return hidden.new_empty(hidden.shape)


def _moe_observe_fake(
    hidden: torch.Tensor,
    index: torch.Tensor,
    gates: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    valid: torch.Tensor,
    isa: str = "",
) -> tuple[torch.Tensor, ...]:
    experts, width = down.shape[0], hidden.shape[1]
    sizes = (hidden.shape, index.shape, (experts,), (experts,), (experts, width))
    return tuple(gates.new_empty(size) for size in sizes)


def _causal_attention_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, isa: str = ""
) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _rms_norm_fake(x: torch.Tensor, weight: torch.Tensor, epsilon: float, isa: str = "") -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _centred_grams_fake(y: torch.Tensor, isa: str = "") -> torch.Tensor:
    return y.new_empty(y.shape[0], y.shape[1], y.shape[1], dtype=torch.float32)


def _gram_fake(x: torch.Tensor, isa: str = "") -> torch.Tensor:
    return x.new_empty(x.shape[0], x.shape[0], dtype=torch.float64)


def _group_tokens_fake(index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
    sizes = (index.numel(), num_experts + 1, index.numel())
    return tuple(index.new_empty(size, dtype=torch.int32) for size in sizes)


FAKES = {
    "moe_forward": _moe_forward_fake,
    "moe_observe": _moe_observe_fake,
    "causal_attention": _causal_attention_fake,
    "rms_norm": _rms_norm_fake,
    "centred_grams": _centred_grams_fake,
    "gram": _gram_fake,
    "group_tokens": _group_tokens_fake,
}
