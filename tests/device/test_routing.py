"""The kernels of routing: integers equal to the reference and to brute force, gates within float32's rounding.

Budget of a gate: the exponent x - max and its product with log2(e) are rounded, so exp(x - max) errs by at most
3 |x - max| u of itself beside 4 u of exp2 (two units in the last place); a gate is a quotient of two of them, which
errs by 4 u more, and sums over K slots err by K u. With u = 2^-24 and S the spread of the logits: (6 S + 32 + 2 K) u.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cprune_kernels import routing_launches
from cprune_kernels.picker import Arch
from cprune_kernels.routing import (
    Routing,
    Scoring,
    remap_reference,
    route_reference,
)
from cprune_kernels.routing_launches import group_tokens_launches, remap_launches
from tests.cases.routing import (
    GPT_OSS,
    MINIMAX,
    OLMOE,
    QWEN3,
    Case,
    assert_grouped,
    deepseek_v2,
    deepseek_v3,
    make,
    random_index,
    route_by_hand,
)

U = 2.0**-24
ROUTES = {
    "qwen3": make(131, 128, 8, QWEN3, dtype=torch.bfloat16),
    "qwen3-merged": make(37, 128, 8, QWEN3, kept=24, dtype=torch.float16),
    "one-token": make(1, 60, 4, OLMOE, kept=30),
    "one-slot": make(300, 8, 1, OLMOE),
    "mixtral": make(300, 8, 2, QWEN3, kept=4, dropped=0.0),
    "odd": make(20, 257, 7, OLMOE, kept=131, map_dtype=torch.int64),
    "all-experts": make(19, 7, 7, QWEN3, kept=3),
    "scaled": make(9, 131, 3, Scoring("softmax_topk", renormalise=True, scale=-0.5)),
    "softmax-biased": make(9, 60, 6, Scoring("softmax_topk", renormalise=True), biased=True),
    "gpt-oss": make(37, 32, 4, GPT_OSS, kept=16),
    "gpt-oss-biased": make(9, 131, 5, GPT_OSS, biased=True),
    "minimax": make(20, 256, 8, MINIMAX, biased=True, kept=64),
    "llama4": make(37, 16, 1, Scoring("sigmoid")),
    "kimi": make(11, 384, 8, deepseek_v3(1, 1), biased=True, kept=192),
    "widest": make(5, 512, 10, MINIMAX, biased=True, kept=512),
    "deepseek-v2": make(17, 160, 6, deepseek_v2(), kept=80),
    "deepseek-v3": make(17, 256, 8, deepseek_v3(), biased=True, kept=128),
    "groups-odd": make(37, 60, 5, deepseek_v3(5, 2), biased=True),
    "groups-unbiased": make(37, 36, 4, deepseek_v3(3, 2)),
    "groups-gpt-oss": make(9, 24, 3, Scoring("topk_softmax", groups=6, groups_kept=2), kept=5),
    "groups-all-kept": make(9, 24, 3, deepseek_v2(4, 4)),
    "ties": make(131, 60, 8, QWEN3, ties=True, kept=20),
    "ties-biased": make(37, 131, 6, MINIMAX, ties=True, biased=True),
    "ties-groups": make(37, 64, 6, deepseek_v3(8, 4), ties=True, biased=True, kept=9),
    "ties-groups-max": make(37, 60, 6, deepseek_v2(6, 3), ties=True),
}


def routed(case: Case, device: str, arch: Arch) -> Routing:
    launches, out = case.on(device).launches(arch)
    for launch in launches:
        launch.run()
    return Routing(*(x.cpu() for x in out))


@pytest.mark.parametrize("name", ROUTES)
def test_route(name: str, device: str, arch: Arch) -> None:
    case = ROUTES[name]
    got = routed(case, device, arch)
    index, gates = route_by_hand(case)
    assert got.index.tolist() == index
    assert torch.equal(got.index, route_reference(case.logits, case.top_k, case.scoring, **case.named).index)
    logits = case.logits.double()
    budget = (6 * float(logits.amax() - logits.amin()) + 32 + 2 * case.top_k) * U
    gates = torch.tensor(gates, dtype=torch.float64)
    assert ((got.gates.double() - gates).abs() <= budget * gates.abs()).all()


@pytest.mark.parametrize("scoring", [QWEN3, GPT_OSS, MINIMAX, deepseek_v3(4, 2)], ids=lambda s: s.kind)
@pytest.mark.parametrize("biased", [False, True])
def test_equal_logits_go_by_index(scoring: Scoring, biased: bool, device: str, arch: Arch) -> None:
    logits = torch.tensor([0.0, -0.0, 1.0, -3.0, torch.finfo(torch.float32).tiny / 2])[:, None].repeat(1, 60)
    logits[1, ::2] = 0.0
    got = routed(Case(logits, 6, scoring, torch.full((60,), 0.5) if biased else None), device, arch)
    assert got.index.tolist() == [list(range(6))] * 5


@pytest.mark.parametrize("scoring", [OLMOE, GPT_OSS, MINIMAX, deepseek_v2(4, 2), deepseek_v3(4, 2)], ids=str)
def test_nan_and_infinite_logits_stay_in_range(scoring: Scoring, device: str, arch: Arch) -> None:
    logits = make(7, 20, 6, scoring).logits
    logits[0] = torch.nan
    logits[1] = -torch.inf
    logits[2, :17] = torch.nan
    logits[3, 3:] = -torch.inf
    logits[4, 5] = torch.inf
    logits[5, 11] = torch.nan
    expert_map = torch.arange(20, dtype=torch.int32)
    for case in (Case(logits, 6, scoring), Case(logits, 6, scoring, expert_map=expert_map)):
        got, expected = routed(case, device, arch), route_reference(logits, 6, scoring, **case.named)
        assert torch.equal(got.index, expected.index)
        assert all(len(set(row)) == 6 and min(row) >= 0 and max(row) < 20 for row in got.index.tolist())
        assert torch.equal(got.gates.isnan(), expected.gates.isnan())


def test_every_expert_dropped(device: str, arch: Arch) -> None:
    case = make(19, 60, 4, QWEN3)
    dropped = Case(case.logits, 4, QWEN3, expert_map=torch.full((60,), -1), num_experts=1)
    got = routed(dropped, device, arch)
    assert (got.index == -1).all() and (got.gates == 0).all()


def test_map_outside_the_kept_experts_drops(device: str, arch: Arch) -> None:
    expert_map = torch.tensor([0, 5, -2, 2**31 - 1, 2**40, 1, -1, 4])
    case = Case(make(37, 8, 5, OLMOE).logits, 5, OLMOE, expert_map=expert_map, num_experts=5)
    clean = torch.where((expert_map >= 0) & (expert_map < 5), expert_map, -1)
    got, expected = routed(case, device, arch), route_by_hand(Case(case.logits, 5, OLMOE, None, clean, 5))
    assert got.index.tolist() == expected[0]


def test_gates_do_not_depend_on_other_tokens(device: str, arch: Arch) -> None:
    case = ROUTES["qwen3-merged"]
    together = routed(case, device, arch)
    for token in (0, 5, 36):
        row = case.logits[token : token + 1].contiguous()
        alone = routed(Case(row, case.top_k, case.scoring, **case.named), device, arch)
        assert all(torch.equal(a[0], b[token]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    "tokens, top_k, experts, kept", [(1, 8, 60, 30), (131, 6, 13, 4), (300, 1, 7, 3), (37, 12, 12, 1)]
)
@pytest.mark.parametrize("index_dtype, gate_dtype", [(torch.int64, torch.bfloat16), (torch.int32, torch.float32)])
def test_remap(
    tokens: int,
    top_k: int,
    experts: int,
    kept: int,
    index_dtype: torch.dtype,
    gate_dtype: torch.dtype,
    device: str,
    arch: Arch,
) -> None:
    index = random_index(tokens, top_k, experts).to(index_dtype)
    index[0, 0] = experts + 5  # no expert of this layer
    generator = torch.Generator().manual_seed(0)
    gates = torch.randn(tokens, top_k, generator=generator).to(gate_dtype)
    expert_map = make(1, experts, 1, OLMOE, kept=kept).expert_map
    arguments = [x.to(device) for x in (index, gates, expert_map)]
    launches, out = remap_launches(*arguments, kept, arch)
    for launch in launches:
        launch.run()
    for got, expected in zip(out, remap_reference(index, gates, expert_map, kept), strict=True):
        assert torch.equal(got.cpu(), expected)  # bits: the sums have one order


def grouped(
    index: Tensor, experts: int, block_m: int, device: str, arch: Arch, launches: int, level: bool = False
) -> None:
    zeros = torch.full((index.numel() + 2,), 7, dtype=torch.int32, device=device) if level else None
    planned, out = group_tokens_launches(index.to(device), experts, block_m, arch, level, zeros)
    assert len(planned) == launches
    for launch in planned:
        launch.run()
    assert zeros is None or not zeros.any()
    assert_grouped(type(out)(*(x.cpu() for x in out)), index, experts, block_m, level)


GROUPS = [(1, 1, 1, 16), (1, 8, 131, 16), (131, 6, 13, 32), (300, 4, 60, 16), (257, 2, 384, 64), (64, 8, 512, 128)]
LEVEL = [(1, 1, 1, 3), (1, 8, 131, 24), (131, 6, 13, 24), (300, 4, 9, 48)]  # from one third of a tile to twenty


@pytest.mark.parametrize(
    "tokens, top_k, experts, block_m, level", [(*case, False) for case in GROUPS] + [(*case, True) for case in LEVEL]
)
@pytest.mark.parametrize("at_once", [4096, 0], ids=["at-once", "blocks"])
def test_group(
    tokens: int,
    top_k: int,
    experts: int,
    block_m: int,
    level: bool,
    at_once: int,
    device: str,
    arch: Arch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routing_launches, "AT_ONCE", at_once)
    grouped(random_index(tokens, top_k, experts), experts, block_m, device, arch, 1 if at_once else 3, level=level)


@pytest.mark.parametrize("at_once", [4096, 0], ids=["at-once", "blocks"])
@pytest.mark.parametrize("expert", [0, 5, 12, -1, 13, 2**31 - 1, -(2**31)])
def test_group_one_expert_or_none(
    expert: int, at_once: int, device: str, arch: Arch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing_launches, "AT_ONCE", at_once)
    index = torch.full((131, 3), expert, dtype=torch.int32)
    grouped(index, 13, 16, device, arch, 1 if at_once else 3)


def test_group_no_tokens(device: str, arch: Arch) -> None:
    grouped(torch.empty((0, 8), dtype=torch.int32), 13, 16, device, arch, 1)


def test_group_wide_index(device: str, arch: Arch) -> None:
    index = random_index(131, 4, 60).long()
    index[0] = torch.tensor([2**32, 2**32 + 1, -(2**40), 2**63 - 1])  # its low halves would be experts
    grouped(index, 60, 16, device, arch, 1)


@pytest.mark.parametrize("tokens, top_k, experts", [(513, 8, 60), (1100, 4, 3)])
def test_group_many_pairs(tokens: int, top_k: int, experts: int, device: str, arch: Arch) -> None:
    grouped(random_index(tokens, top_k, experts), experts, 64, device, arch, 3)


def test_group_more_blocks_than_one_step_of_the_scan(device: str, arch: Arch, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AT_ONCE": 0, "BLOCK": 32, "SCAN": 16}.items():
        monkeypatch.setattr(routing_launches, name, value)
    grouped(random_index(300, 6, 5), 5, 128, device, arch, 3)  # 57 blocks
