"""Damaged code does not go unseen: each edit of compiled PTX must raise, or give a wrong result."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, which an interpreting process cannot", allow_module_level=True)

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from cprune_kernels.launch import Launch
from cprune_kernels.picker import A100, H100
from tests.aot.compiled import compile_launch
from tests.ptx.errors import ExecutionError
from tests.ptx.launching import execute_ptx
from tests.ptx.test_triton import close, described_product, product

M, N, K = 100, 128, 320  # a ragged tile of rows, five steps through a pipeline of three


def copies() -> tuple[Launch, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    a, b, c = torch.randn(M, K).bfloat16(), torch.randn(K, N).bfloat16(), torch.full((M, N), float("nan"))
    args = {"a": a, "b": b, "c": c, "M": M, "N": N, "K": K}
    constants = {"BM": 64, "BN": 64, "BK": 64, "PRECISION": "ieee"}
    return Launch(product, (2, 2), args, constants, 4, 3), c, a.double() @ b.double()


def descriptors() -> tuple[Launch, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    a, b, c = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16(), torch.full((M, N), float("nan"))
    boxes = {"a": (a, [128, 64]), "b": (b, [64, 64]), "c": (c, [128, 64])}
    args = {name: TensorDescriptor.from_tensor(tensor, box) for name, (tensor, box) in boxes.items()}
    constants = {"BM": 128, "BN": 64, "BK": 64, "ROWS": True, "WS": False}
    return Launch(described_product, (1, 2), {**args, "K": K}, constants, 8, 3), c, a.double() @ b.double().T


def first(pattern: str, new: str) -> Callable[[str], str]:
    return lambda ptx: re.sub(pattern, new, ptx, count=1)


def every(pattern: str, new: str) -> Callable[[str], str]:
    return lambda ptx: re.sub(pattern, new, ptx)


def last(pattern: str, new: str) -> Callable[[str], str]:
    def edit(ptx: str) -> str:
        found = list(re.finditer(pattern, ptx))[-1]
        return ptx[: found.start()] + new + ptx[found.end() :]

    return edit


AMPERE = {
    "no waits": every(r"cp\.async\.wait_group[^;]*;", ""),
    "waits a stage short": every(r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 4;"),
    "no barriers": every(r"bar\.sync[^;]*;", ""),
    "a barrier less in the loop": last(r"bar\.sync[^;]*;", ""),
    "a group is not committed": last(r"cp\.async\.commit_group;", ""),
    "a product is missing": first(r"mma\.sync[^;]*;", ""),
    "an operand 16 bytes off": first(r"(ldmatrix[^;]*\+)2048", r"\g<1>2064"),
    "an operand not transposed": first(r"(ldmatrix[^;]*)\.trans", r"\1"),
    "a mask is inverted": first(r"setp\.lt\.s32", "setp.ge.s32"),
    "a row too many is read": every(r"setp\.lt\.s32", "setp.le.s32"),
    "a copy 16 bytes off": first(r"(cp\.async\.cg\.shared\.global \[ ?%r\d+ \+ )0", r"\g<1>16"),
    "the loop ends early": first(r"setp\.lt\.s32(\s+%p\d+, %r\d+, %r\d+;\s+@%p\d+ bra)", r"setp.gt.s32\1"),
    "wrong accumulator": first(r"mov\.b32(\s+%r\d+), 0f00000000;", r"mov.b32\1, 0f3F800000;"),
}
HOPPER = {
    "no barriers": every(r"bar\.sync[^;]*;", ""),
    "no expect_tx": first(r"@%p\d+ mbarrier\.arrive\.expect_tx[^;]*;", ""),
    "last expect_tx missing": last(r"@%p\d+ mbarrier\.arrive\.expect_tx[^;]*;", ""),
    "too few bytes expected": first(r"(expect_tx[^;]*), \d+;", r"\1, 64;"),
    "no wait for the copies": first(r"waitLoop:[^}]*", ""),
    "wrong parity": first(r"(mbarrier\.try_wait[^;]*), %r\d+;", r"\1, 1;"),
    "a copy is missing": first(r"@%p\d+ cp\.async\.bulk\.tensor[^;]*mbarrier[^;]*;", ""),
    "no wgmma waits": every(r"wgmma\.wait_group[^;]*;", ""),
    "the last wgmma wait is missing": last(r"wgmma\.wait_group[^;]*;", ""),
    "wgmma waits come late": every(r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 3;"),
    "a product is missing": first(r"wgmma\.mma_async[^;]*;", ""),
    "an operand transposed": first(r"(wgmma\.mma_async[^;]*), 1, 1, 0, 0;", r"\1, 1, 1, 0, 1;"),
    "a descriptor 32 bytes off": first(r"4611686293305294850", "4611686293305294852"),
    "no barrier initialised": first(r"@%p\d+ mbarrier\.init[^;]*;", ""),
    "swapped coordinates": first(r"(cp\.async\.bulk\.tensor[^{]*)\{(%r\d+), (%r\d+)\}", r"\1{\3, \2}"),
    "a stage 128 bytes off": first(r"49152;", "49280;"),
}
CASES = [("copies", name, edit) for name, edit in AMPERE.items()] + [
    ("tma", name, edit) for name, edit in HOPPER.items()
]


@pytest.mark.parametrize("kernel, edit", [(k, e) for k, _, e in CASES], ids=[f"{k}: {name}" for k, name, _ in CASES])
def test_damage_is_seen(kernel: str, edit: Callable[[str], str]) -> None:
    launch, out, expected = copies() if kernel == "copies" else descriptors()
    compiled = compile_launch(launch, A100 if kernel == "copies" else H100)
    damaged = edit(compiled.ptx)
    assert damaged != compiled.ptx, "the edit must find its place"
    try:
        execute_ptx(launch, compiled, damaged)
    except ExecutionError:
        return
    assert not close(out, expected, K)


@pytest.mark.parametrize("kernel", ["copies", "tma"])
def test_undamaged_code_is_right(kernel: str) -> None:
    launch, out, expected = copies() if kernel == "copies" else descriptors()
    execute_ptx(launch, compile_launch(launch, A100 if kernel == "copies" else H100))
    assert close(out, expected, K)
