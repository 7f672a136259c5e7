"""Damage to the wide tiles does not go unseen: to the ring, what is said about it, and stores that nobody waits for."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, which an interpreting process cannot", allow_module_level=True)

import torch

from cprune_kernels.launch import Launch
from cprune_kernels.picker import H100
from tests.aot.compiled import compile_launch
from tests.cases.fused_moe import wide_product
from tests.ptx.errors import ExecutionError
from tests.ptx.launching import execute, execute_ptx
from tests.ptx.test_mutations import every, first, last

DAMAGE = {
    "nobody says that rows have come": every(r"cp\.async\.mbarrier\.arrive\.noinc[^;]*;", ""),
    "no place of the ring is given back": every(r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64 _[^;]*;", ""),
    "the ring is filled before it is free": first(r"setp\.eq\.b32(\s+%p\d+, %r\d+), 2;", r"setp.eq.b32\1, 1;"),
    "more stores may be under way": every(r"(cp\.async\.bulk\.wait_group\.read\s+)2;", r"\g<1>5;"),
    "nobody waits for stores": every(r"cp\.async\.bulk\.wait_group\.read\s+\d+;", ""),
    "nobody waits for the last products": every(r"(wgmma\.wait_group\.sync\.aligned) 0;", r"\1 1;"),
    "the half of the tile before is finished from the new sums": every(r"add\.f32 (%r\d+), %r\d+, 0f00000000;", ""),
    "a product is missing": last(r"wgmma\.mma_async[^;]*;", ""),
    "too few bytes of weights expected": first(r"(expect_tx[^;]*), \d+;", r"\1, 16384;"),
}


@pytest.fixture(scope="module")
def prepared() -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """The launch of gate_up after all that comes before it, where it writes, and what it gives."""
    launches, outputs = wide_product(H100, False)
    for launch in launches:
        execute(launch, H100)
    return launches[-1], outputs["act"], outputs["act"].clone()


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_seen(name: str, prepared: tuple[Launch, torch.Tensor, torch.Tensor]) -> None:
    launch, act, expected = prepared
    compiled, edit = compile_launch(launch, H100), DAMAGE[name]
    assert edit(compiled.ptx) != compiled.ptx, "the edit must find its place"
    act.fill_(torch.nan)
    try:
        execute_ptx(launch, compiled, edit(compiled.ptx))
    except ExecutionError:
        return
    assert not torch.equal(act, expected)
