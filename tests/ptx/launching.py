"""From a launch to an execution: compile it, lay out its arguments as Triton's launcher does, run it on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from triton.experimental.gluon.nvidia import hopper
from triton.tools.tensor_descriptor import TensorDescriptor

from cprune_kernels.launch import Launch
from cprune_kernels.picker import Arch
from tests.aot.compiled import Compiled, compile_launch
from tests.ptx.executor import Grid, Stats, TensorMap, parse, run, run_together

BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}  # numpy has no bfloat16
SWIZZLE_BYTES = (0, 32, 64, 128)  # by CUtensorMapSwizzle

DESCRIPTORS = (TensorDescriptor, hopper.TensorDescriptor)

parse_once = functools.cache(parse)


def execute(launch: Launch, arch: Arch) -> Stats:
    """Run every CTA of a launch on CPU tensors as the code compiled for `arch`; outputs are written in place."""
    return execute_ptx(launch, compile_launch(launch, arch))


def execute_ptx(launch: Launch, compiled: Compiled, ptx: str | None = None) -> Stats:
    """The same with other code in place of what was compiled."""
    if compiled.global_scratch:
        raise ValueError(f"{compiled.name} must need no global scratch, got {compiled.global_scratch} bytes")
    return run(
        parse_once(compiled.ptx if ptx is None else ptx),
        (*launch.grid, 1, 1)[:3],
        list(arguments(launch, compiled)),
        shared_bytes=compiled.shared_bytes,
        memory=[memory(tensor) for tensor in tensors(launch)],
    )


def execute_together(
    launches: Sequence[Launch], arch: Arch, ptx: Sequence[str | None], most: int
) -> list[dict[str, int]]:
    """Run launches side by side, with other code for those where it is given; as `run_together`."""
    grids, arrays = [], {}
    for launch, code in zip(launches, ptx, strict=True):
        compiled = compile_launch(launch, arch)
        program = parse_once(compiled.ptx if code is None else code)
        grids.append(Grid(program, launch.grid, list(arguments(launch, compiled)), compiled.shared_bytes))
        arrays |= {tensor.data_ptr(): memory(tensor) for tensor in tensors(launch)}
    return run_together(grids, list(arrays.values()), most)


def tensors(launch: Launch) -> list[torch.Tensor]:
    """Every tensor that the kernel may touch."""
    bases = (value.base if isinstance(value, DESCRIPTORS) else value for value in launch.args.values())
    return [base for base in bases if isinstance(base, torch.Tensor)]


def memory(tensor: torch.Tensor) -> np.ndarray:
    """The bytes from the first element of a tensor to its last, shared with it."""
    if tensor.numel() == 0:
        return np.empty(0, np.uint8)
    size = tensor.element_size()
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    offset = tensor.storage_offset() * size
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), offset, ((last + 1) * size,)).numpy()


def arguments(launch: Launch, compiled: Compiled) -> Iterator[Any]:
    """Parameters in the order of the kernel's signature, without what became part of the code and without scratch."""
    maps = iter(compiled.tensor_maps)
    values = {**{parameter.name: parameter.default for parameter in launch.kernel.params}, **launch.args}
    for name, kind in compiled.specialised.signature.items():
        value = values[name]
        if kind == "constexpr":
            continue
        elif isinstance(value, DESCRIPTORS):
            settings = next(maps)
            swizzle = SWIZZLE_BYTES[settings["swizzle"]]
            yield TensorMap(described(value), tuple(settings["block_size"]), swizzle, value.padding == "nan")
            yield from value.shape
            yield from value.strides
        elif isinstance(value, torch.Tensor):
            yield value.data_ptr()
        else:
            yield value


def described(descriptor: TensorDescriptor | hopper.TensorDescriptor) -> np.ndarray:
    """The array that a descriptor reads, as unsigned integers."""
    base = descriptor.base
    view = torch.as_strided(base, tuple(descriptor.shape), tuple(descriptor.strides), base.storage_offset())
    return view.view(BITS[base.element_size()]).numpy()
