"""The wide products and the combine at a time, as on a GPU where each starts while the one before runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, which an interpreting process cannot", allow_module_level=True)

import torch

from cprune_kernels.launch import Launch
from cprune_kernels.picker import H100
from tests.aot.compiled import compile_launch
from tests.cases.fused_moe import WIDE, config, inputs, many_experts, observe, wide
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
    (*both, _), act, y, _ = three(tensors, sms)
    return both, act, y


def three(
    tensors: tuple, sms: int, tokens: int | None = None
) -> tuple[list[Launch], torch.Tensor, torch.Tensor, torch.Tensor]:
    """gate_up, down and the combine of the first `tokens`; act, y and out."""
    with poisoned_empty():
        launches, outputs = wide(H100, sms, tensors)
    for launch in launches[:-3]:
        execute(launch, H100)
    gate_up, down, combine = launches[-3:]
    assert all(launch.early for launch in launches[-3:])
    combine = replace(combine, grid=(tokens or combine.grid[0], *combine.grid[1:]))
    return [gate_up, down, combine], gate_up.args["act_ptr"], down.args["y_ptr"], outputs["out"]


@functools.cache
def one_after_the_other(case: str) -> tuple[torch.Tensor, ...]:
    """act, y and out of the first 4 tokens."""
    launches, act, y, out = three(CASES[case](), 1, 4)
    for launch in launches:
        execute(launch, H100)
    return act, y, out[:4]


@pytest.mark.parametrize("sms", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_down_takes_what_gate_up_has_done(case: str, sms: int) -> None:
    """Bit for bit what one after the other gives, whoever takes which tile."""
    both, act, y = products(CASES[case](), sms)
    issued = execute_together(both, H100, [None, None], MOST)
    assert len(issued) == 2 * sms and all(counts.get("wgmma.fence.sync.aligned", 0) for counts in issued)
    for actual, right in zip((act, y), one_after_the_other(case)[:2], strict=True):
        assert torch.equal(actual.nan_to_num(7.0), right.nan_to_num(7.0))


def test_each_tile_is_taken_once_and_reported_by_both_halves() -> None:
    both, _, _ = products(CASES["two heights"](), 2)
    execute_together(both, H100, [None, None], MOST)
    gate_up, down, *reports = both[0].args["progress_ptr"].tolist()
    tiles, places = int(both[0].args["tile_count_ptr"]), len(both[0].args["tile_row_ptr"])
    assert (gate_up, down) == (tiles * 3, tiles * 2)  # each CTA's first is not counted, and one is asked for in vain
    assert reports[:places] == [2 * 3] * tiles + [0] * (places - tiles)
    assert both[1].args["done_ptr"].tolist() == [[2 * 2 * tiles], [0]]  # the other expert has no row


def test_the_combine_takes_what_down_has_done() -> None:
    """Of wide y, a program for each span of columns; the same bits as after all of down."""
    tensors = inputs(90, 2, 4, 648, 72, dropped=0.3)
    launches, _, _, expected = three(tensors, 1)
    for launch in launches:
        execute(launch, H100)
    launches, _, _, out = three(tensors, 2, 8)
    assert launches[2].grid == (8, 2) and launches[1].args["done_ptr"].shape == (4, 2)
    execute_together(launches, H100, [None] * 3, MOST)
    assert torch.equal(out[:8], expected[:8]) and out[8:].isnan().all()


def test_norms_wait_for_all_columns() -> None:
    with poisoned_empty():
        launches, _ = observe(replace(H100, sms=1), inputs(70, 2, 4, 600, 40, dropped=0.2), config(WIDE, n=256))
    place = next(place for place, launch in enumerate(launches) if launch.kernel.__name__ == "combine_kernel")
    for launch in launches[: place - 2]:
        execute(launch, H100)
    gate_up, down, combine = launches[place - 2 : place + 1]
    assert combine.grid == (70, 1) and combine.args["norms_ptr"] is not None
    execute_together([gate_up, down, replace(combine, grid=(6, 1))], H100, [None] * 3, MOST)
    row = combine.args["position_ptr"].view(70, 2)[:6].long()
    y = torch.where((row >= 0)[..., None], down.args["y_ptr"][row.clamp(min=0)].double(), 0.0)
    assert torch.allclose(combine.args["norms_ptr"][:6].double(), y.norm(dim=2), rtol=1e-6)


def test_the_combine_alone_waits() -> None:
    """For experts that it has; a token without any has its sum."""
    hidden, index, gates, weights = many_experts()
    index[1] = -1
    (*both, combine), _, _, out = three((hidden, index, gates, weights), 1, 2)
    execute(both[0], H100)
    with pytest.raises(HangError):
        execute_together([combine], H100, [None], 2_000)
    assert out[0].isnan().all() and not out[1].any()


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


GATE_UP, DOWN, COMBINE = 0, 1, 2
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
    "down reports nothing": (DOWN, every(r"@%p\d+ atom\.global\.gpu\.release[^;]*;", "")),
    "y may be under way when it is reported": (
        DOWN,
        every(r"(cp\.async\.bulk\.wait_group)(\s+0;)", r"\1.read\2"),
    ),
    "the combine does not wait": (
        COMBINE,
        every(r"atom\.global\.gpu\.acquire\.add\.u32 (%r\d+),[^;]*;", r"mov.b32 \1, 99;"),
    ),
    "tiles are taken twice": (DOWN, every(r"(atom\.global\.gpu\.)relaxed\.add", r"\1relaxed.min")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_seen(name: str) -> None:
    expected = one_after_the_other("many experts")
    launches, *found = three(many_experts(), 1, 4)
    which, edit = DAMAGE[name]
    codes: list[str | None] = [None] * 3
    intact = compile_launch(launches[which], H100).ptx
    codes[which] = edit(intact)
    assert codes[which] != intact, "the edit must find its place"
    try:
        execute_together(launches, H100, codes, MOST)
    except ExecutionError:
        return
    assert not all(torch.equal(a[: len(b)], b) for a, b in zip(found, expected, strict=True))
