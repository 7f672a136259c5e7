"""A kernel that is launched while the one before it runs waits for it before it touches what that one writes."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, which an interpreting process cannot", allow_module_level=True)

import torch

from cprune_kernels.fused_moe import SILU
from cprune_kernels.launch import Launch
from cprune_kernels.moe_launches import moe_forward_launches
from cprune_kernels.picker import A100, H100, Arch, Tile
from cprune_kernels.routing_launches import group_tokens_launches
from tests.aot.compiled import Compiled, compile_launch
from tests.cases.fused_moe import BF16, FP32, config, inputs
from tests.cases.routing import random_index
from tests.ptx.errors import ExecutionError
from tests.ptx.executor import parse, run
from tests.ptx.launching import arguments, execute, memory, tensors

WAIT = "griddepcontrol.wait;"
LAYOUTS = {
    "rows": {},
    "columns": {"transposed": True},
    "biases": {"biases": True, "interleaved": True},
}


def two(arch: Arch, layout: str = "rows", dtype: torch.dtype = BF16, inner: int = 280) -> tuple[Launch, Launch]:
    tensors = inputs(2, 3, 5, 136, inner, dtype, **LAYOUTS[layout])
    first, second = moe_forward_launches(*tensors, SILU, arch, config(Tile(1, 8, 512 // dtype.itemsize, 4, 4)))[0]
    return first, second


def run_without(launch: Launch, compiled: Compiled, ptx: str, *names: str) -> None:
    """Execute `ptx` where the tensors of those arguments are in no memory."""
    hidden = [launch.args[name] for name in names]
    present = [memory(x) for x in tensors(launch) if not any(x is absent for absent in hidden)]
    grid = (*launch.grid, 1, 1)[:3]
    run(parse(ptx), grid, list(arguments(launch, compiled)), shared_bytes=compiled.shared_bytes, memory=present)


@pytest.mark.parametrize("inner", [280, 37])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_down_waits_for_gate_up(layout: str, dtype: torch.dtype, inner: int) -> None:
    first, second = two(H100, layout, dtype, inner)
    assert (first.early, second.early) == (False, True)
    assert compile_launch(first, H100).ptx.count("griddepcontrol.launch_dependents;") == 1
    compiled = compile_launch(second, H100)
    assert compiled.specialised.options.launch_pdl and compiled.ptx.count(WAIT) == 1
    until = compiled.ptx.replace(WAIT, "ret;")
    run_without(second, compiled, until, "act_ptr", "out_ptr")
    with pytest.raises(ExecutionError):
        run_without(second, compiled, compiled.ptx, "act_ptr")
    with pytest.raises(ExecutionError):
        run_without(second, compiled, until, "index_ptr")  # it reads so far


@pytest.mark.parametrize("step", [1, 2])
def test_grouping_waits_for_the_step_before(step: int) -> None:
    """Until then the last step has read which experts were chosen, and the others nothing."""
    index = random_index(700, 6, 13)
    launches, _ = group_tokens_launches(index, 13, 192, H100, level=True)
    assert [launch.early for launch in launches] == [False, True, True]
    for launch in launches[:step]:
        execute(launch, H100)
    launch = launches[step]
    compiled = compile_launch(launch, H100)
    assert compiled.specialised.options.launch_pdl
    written = [name for name in launch.args if name.endswith("_ptr") and name not in ("index_ptr", "zeros_ptr")]
    run_without(launch, compiled, compiled.ptx.replace(WAIT, "ret;"), *written)
    with pytest.raises(ExecutionError):
        run_without(launch, compiled, compiled.ptx, {1: "upto_ptr", 2: "base_ptr"}[step])


def test_nothing_starts_early_below_capability_9() -> None:
    for launch in two(A100):
        compiled = compile_launch(launch, A100)
        assert not launch.early and "griddepcontrol" not in compiled.ptx and not compiled.specialised.options.launch_pdl
