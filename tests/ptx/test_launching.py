"""Launches on the executor: arguments arrive where the kernel reads them, and damage to its code does not go unseen."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from cprune_kernels.launch import Launch
from cprune_kernels.picker import A100, H100, Arch
from tests.aot.compiled import compile_launch
from tests.aot.samples import add_launch, product_launch
from tests.ptx.executor import AccessError, ExecutionError
from tests.ptx.launching import execute, execute_ptx

BF16, NAN = torch.bfloat16, float("nan")
ROWS, COLUMNS, DEPTH = 100, 128, 320  # a ragged tile of rows, five steps through a pipeline of three


def product_case(described: bool) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """A launch, the tensor that it fills, and what it should hold."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(ROWS, DEPTH, generator=generator).to(BF16)
    b = torch.randn(COLUMNS, DEPTH, generator=generator).to(BF16)
    out = torch.full((ROWS, COLUMNS), NAN)
    return product_launch(a, b, out, described=described), out, (a.double() @ b.double().T).float()


def wrong(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Beyond what the order of 320 float32 additions explains: their number times one rounding of the largest sum."""
    return not torch.allclose(actual, expected, rtol=0, atol=DEPTH * 2**-24 * float(expected.abs().max()))


@pytest.mark.parametrize("arch, described", [(A100, False), (H100, False), (H100, True)])
def test_a_product_is_right(arch: Arch, described: bool) -> None:
    launch, out, expected = product_case(described)
    stats = execute(launch, arch)
    assert stats.ctas == 4
    assert stats.count("wgmma.mma_async" if arch is H100 else "mma.sync") > 0
    assert (stats.count("cp.async.bulk.tensor") > 0) == described
    assert not wrong(out, expected)


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("stride", [1, 3])
def test_arguments_that_became_code_are_not_passed(second: bool, stride: int) -> None:
    x = torch.randn(300 * stride, generator=torch.Generator().manual_seed(1)).to(BF16)
    y = torch.randn(300, generator=torch.Generator().manual_seed(2)) if second else None
    out = torch.full((300,), NAN)
    execute(add_launch(x, y, out, stride=stride, seed=-7, scale=0.25), A100)
    assert torch.equal(out, x[::stride].float() * 0.25 - 7 + (y if second else 0.0))


def test_a_view_gives_its_own_bytes_only() -> None:
    whole = torch.zeros(400, dtype=BF16)
    out = torch.full((300,), NAN)
    execute(add_launch(whole[50:350], None, out), A100)
    short = add_launch(whole[50:349], None, out)  # the kernel reads 300 numbers of 299
    with pytest.raises(AccessError):
        execute(short, A100)


def test_every_cta_of_the_grid_and_no_other_runs() -> None:
    launch, out, expected = product_case(described=False)
    compiled = compile_launch(launch, A100)
    execute_ptx(replace(launch, grid=(1, 1)), compiled)
    assert not wrong(out[:64, :64], expected[:64, :64]) and out[64:].isnan().all() and out[:, 64:].isnan().all()


# name: (architecture, descriptors, pattern, what it becomes); the first match is replaced, all of them where it says so
ALL = True
DAMAGE = {
    "every wait for copies is dropped": (A100, False, r"cp\.async\.wait_group[^;]*;", "", ALL),
    "waits come a stage late": (A100, False, r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 4;", ALL),
    "a copy is dropped": (A100, False, r"cp\.async\.cg[^;]*;", "", not ALL),
    "a copy goes 16 bytes too far": (
        A100,
        False,
        r"(cp\.async\.cg\.shared\.global \[ %r\d+ \+ )0",
        r"\g<1>16",
        not ALL,
    ),
    "an operand is read 16 bytes too far": (A100, False, r"(ldmatrix[^\[]*\[%r\d+)\+4096", r"\1+4112", not ALL),
    "a product is dropped": (A100, False, r"mma\.sync[^;]*;", "", not ALL),
    "operands change places": (A100, False, r"(mma\.sync[^{]*\{[^}]*\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2", not ALL),
    "a mask is inverted": (A100, False, r"setp\.lt\.s32", "setp.ge.s32", not ALL),
    "a mask lets one row more in": (A100, False, r"setp\.lt\.s32", "setp.le.s32", ALL),
    "the loop ends a step early": (A100, False, r"(setp\.lt\.u64[^;]*), 256;", r"\1, 192;", not ALL),
    "a store is dropped": (A100, False, r"@%p\d+ st\.global[^;]*;", "", not ALL),
    "a warpgroup product is dropped": (H100, True, r"wgmma\.mma_async[^;]*;", "", not ALL),
    "products are not waited for": (H100, True, r"wgmma\.wait_group[^;]*;", "", ALL),
    "expected bytes are not announced": (H100, True, r"@%p\d+ mbarrier\.arrive\.expect_tx[^;]*;", "", not ALL),
    "too many bytes are expected": (H100, True, r"(expect_tx[^;]*, )8192;", r"\g<1>16384;", not ALL),
    "a tile is not copied": (H100, True, r"@%p\d+ cp\.async\.bulk\.tensor[^;]*;", "", not ALL),
    "tiles are not waited for": (H100, True, r"mbarrier\.try_wait[^;]*;", "mov.pred complete, -1;", ALL),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_code_is_seen(damage: str) -> None:
    arch, described, pattern, becomes, everywhere = DAMAGE[damage]
    launch, out, expected = product_case(described)
    compiled = compile_launch(launch, arch)
    damaged, count = re.subn(pattern, becomes, compiled.ptx, count=0 if everywhere else 1)
    assert count and damaged != compiled.ptx
    try:
        execute_ptx(launch, compiled, damaged)
    except ExecutionError:
        return
    assert wrong(out, expected)
