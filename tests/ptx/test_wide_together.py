"""Both wide products at a time, as on a GPU where down starts while gate_up runs, several CTAs of each."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, which an interpreting process cannot", allow_module_level=True)

import torch

from cprune_kernels.launch import Launch
from cprune_kernels.picker import H100
from tests.aot.compiled import compile_launch
from tests.cases.fused_moe import inputs, many_experts, wide
from tests.device.shim import poisoned_empty
from tests.ptx.errors import ExecutionError, HangError
from tests.ptx.launching import execute, execute_together
from tests.ptx.test_mutations import every

MOST = 200_000  # instructions of a CTA; those below need some 20,000
CASES = {
    "two heights": lambda: inputs(300, 1, 2, 328, 264),
    "many experts": many_experts,
    "dropped": lambda: inputs(190, 2, 5, 328, 264, dropped=0.3),
}


def products(tensors: tuple, sms: int) -> tuple[list[Launch], torch.Tensor, torch.Tensor]:
    """gate_up and down, what comes before them done; act and y."""
    with poisoned_empty():
        launches, _ = wide(H100, sms, tensors)
    place = next(place for place, launch in enumerate(launches) if launch.kernel.__name__.startswith("gate_up"))
    for launch in launches[:place]:
        execute(launch, H100)
    both = launches[place : place + 2]
    assert [launch.early for launch in both] == [False, True]
    return both, both[0].args["act_ptr"], both[1].args["y_ptr"]


@functools.cache
def one_after_the_other(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """act and y."""
    launches, act, y = products(CASES[case](), 1)
    for launch in launches:
        execute(launch, H100)
    return act, y


@pytest.mark.parametrize("sms", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_down_takes_what_gate_up_has_done(case: str, sms: int) -> None:
    """Bit for bit what one after the other gives, whoever takes which tile."""
    both, act, y = products(CASES[case](), sms)
    issued = execute_together(both, H100, [None, None], MOST)
    assert len(issued) == 2 * sms and all(counts.get("wgmma.fence.sync.aligned", 0) for counts in issued)
    for actual, right in zip((act, y), one_after_the_other(case), strict=True):
        assert torch.equal(actual.nan_to_num(7.0), right.nan_to_num(7.0))


def test_each_tile_is_taken_once_and_reported_by_both_halves() -> None:
    both, _, _ = products(CASES["two heights"](), 2)
    execute_together(both, H100, [None, None], MOST)
    gate_up, down, *reports = both[0].args["progress_ptr"].tolist()
    tiles = int(both[0].args["tile_count_ptr"])
    assert (gate_up, down) == (tiles * 3 + 2, tiles * 2 + 2)  # and each CTA once in vain
    assert reports == [2 * 3] * tiles + [0] * (len(reports) - tiles)


def test_down_alone_waits() -> None:
    """It takes a tile, and no more, while gate_up says nothing."""
    (_, down), _, y = products(many_experts(), 1)
    with pytest.raises(HangError):
        execute_together([down], H100, [None], 20_000)
    assert y.isnan().all()


def test_a_gate_far_below_zero_gives_next_to_nothing() -> None:
    """Rounded once to bfloat16, sums in float32; sigmoid is off by 2^-31 at most, where it is less than that."""
    hidden, index, gates, weights = inputs(100, 1, 2, 136, 72)
    both, act, _ = products((hidden * 32, index, gates, weights), 1)
    execute(both[0], H100)
    order = both[0].args["order_ptr"].long()
    gate, up = torch.einsum("th,pih->pti", hidden[order].double() * 32, weights.gate_up[0].double())
    exact = gate * gate.sigmoid() * up
    assert (gate < -22).float().mean() > 0.2 and (gate > 22).float().mean() > 0.2
    most = 2**-7 * exact.abs() + (1 + 2**-8) * 2**-31 * (gate * up).abs()
    assert ((act.double() - exact).abs() <= most).all()


GATE_UP, DOWN = 0, 1
DAMAGE: dict[str, tuple[int, Callable[[str], str]]] = {
    "stores may be under way when they are reported": (
        GATE_UP,
        every(r"(cp\.async\.bulk\.wait_group)(\s+0;)", r"\1.read\2"),
    ),
    "nobody waits for stores that are reported": (GATE_UP, every(r"cp\.async\.bulk\.wait_group\s+0;", "")),
    "nothing is reported": (GATE_UP, every(r"@%p\d+ atom\.global\.gpu\.release[^;]*;", "")),
    "another tile is reported": (GATE_UP, every(r"(atom\.global\.gpu\.release\S+ %r\d+, \[ %rd\d+ \+) 0", r"\1 4")),
    "half of the reports are enough": (DOWN, every(r"(setp\.lt\.s32\s+%p\d+, %r\d+), 4;", r"\1, 2;")),
    "down does not wait": (DOWN, every(r"(setp\.lt\.s32\s+%p\d+, %r\d+), 4;", r"\1, 0;")),
    "tiles are taken twice": (DOWN, every(r"(atom\.global\.gpu\.)relaxed\.add", r"\1relaxed.min")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_seen(name: str) -> None:
    expected = one_after_the_other("many experts")
    both, act, y = products(many_experts(), 1)
    which, edit = DAMAGE[name]
    codes: list[str | None] = [None, None]
    intact = compile_launch(both[which], H100).ptx
    codes[which] = edit(intact)
    assert codes[which] != intact, "the edit must find its place"
    try:
        execute_together(both, H100, codes, 100_000)
    except ExecutionError:
        return
    assert not (torch.equal(act, expected[0]) and torch.equal(y, expected[1]))
