"""Routing and grouping on the CPU: against brute force and transformers' own routers, refused input, tracing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from cprune_kernels.routing import (
    RoutedTokens,
    Routing,
    Scoring,
    group_tokens,
    max_tiles,
    remap,
    route,
)
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
    remap_by_hand,
    route_by_hand,
)

SCORINGS = {
    "qwen3": (QWEN3, False),
    "olmoe": (OLMOE, False),
    "gpt-oss": (GPT_OSS, False),
    "gpt-oss-biased": (GPT_OSS, True),
    "softmax-biased": (QWEN3, True),
    "minimax": (MINIMAX, True),
    "sigmoid": (Scoring("sigmoid"), False),
    "deepseek-v2": (deepseek_v2(4, 2), False),
    "deepseek-v3": (deepseek_v3(4, 3), True),
    "deepseek-v3-unbiased": (deepseek_v3(3, 2), False),
}
GATE = (
    2.0**-18
)  # relative: exp of the spread of the logits (16 at most here) in float32, a sum over at most 384 of them


def called(case: Case) -> Routing:
    return route(case.logits, case.top_k, case.scoring, **case.named)


@pytest.mark.parametrize("name", SCORINGS)
@pytest.mark.parametrize("tokens, experts, top_k, kept", [(1, 60, 1, None), (131, 60, 6, 13), (300, 384, 8, 192)])
@pytest.mark.parametrize("ties", [False, True])
def test_route_by_hand(name: str, tokens: int, experts: int, top_k: int, kept: int | None, ties: bool) -> None:
    scoring, biased = SCORINGS[name]
    case = make(tokens, experts, top_k, scoring, biased=biased, kept=kept, ties=ties)
    index, gates = route_by_hand(case)
    got = called(case)
    assert got.index.dtype == torch.int32 and got.gates.dtype == torch.float32
    assert got.index.tolist() == index
    gates = torch.tensor(gates, dtype=torch.float64)
    assert ((got.gates.double() - gates).abs() <= GATE * gates.abs()).all()


def test_a_token_visits_a_merged_expert_once() -> None:
    case = make(300, 60, 8, QWEN3, kept=5, dropped=0.0)
    got = called(case)
    for row in got.index.tolist():
        visited = [expert for expert in row if expert >= 0]
        assert len(set(visited)) == len(visited) < 8
    torch.testing.assert_close(got.gates.sum(1), torch.ones(300), rtol=0, atol=16 * 2.0**-24)  # sums of 8 numbers
    assert (got.gates[got.index < 0] == 0).all()


def hf_router(module: str, prefix: str, **options: object) -> torch.nn.Module:
    """A router of transformers with random weights."""
    package = importlib.import_module(f"transformers.models.{module}")
    config = getattr(package, f"{prefix}Config")(hidden_size=32, **options)
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    kind = next(k for k in ("TopKRouter", "TopkRouter") if hasattr(modeling, f"{prefix}{k}"))
    router = getattr(modeling, f"{prefix}{kind}")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 3)
    return router


GROUPED = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_experts_per_tok": 6}
ROUTERS = {
    "qwen3": (QWEN3, ("qwen3_moe", "Qwen3Moe"), {"num_experts": 60, "num_experts_per_tok": 8, "norm_topk_prob": True}),
    "qwen2": (OLMOE, ("qwen2_moe", "Qwen2Moe"), {"num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False}),
    "olmoe": (OLMOE, ("olmoe", "Olmoe"), {"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False}),
    "mixtral": (QWEN3, ("mixtral", "Mixtral"), {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "gpt-oss": (GPT_OSS, ("gpt_oss", "GptOss"), {"num_local_experts": 32, "num_experts_per_tok": 4}),
    "minimax": (MINIMAX, ("minimax_m2", "MiniMaxM2"), {"num_local_experts": 131, "num_experts_per_tok": 8}),
    "deepseek-v3": (deepseek_v3(4, 2), ("deepseek_v3", "DeepseekV3"), {"n_routed_experts": 64, **GROUPED}),
    "deepseek-v3-plain": (
        replace(deepseek_v3(4, 2), renormalise=False),
        ("deepseek_v3", "DeepseekV3"),
        {"n_routed_experts": 64, **GROUPED, "norm_topk_prob": False},
    ),
    "glm4": (deepseek_v3(4, 2), ("glm4_moe", "Glm4Moe"), {"n_routed_experts": 60, **GROUPED, "norm_topk_prob": True}),
    "deepseek-v2": (
        replace(deepseek_v2(4, 2), scale=2.5),
        ("deepseek_v2", "DeepseekV2"),
        {"n_routed_experts": 60, **GROUPED, "topk_method": "group_limited_greedy"},
    ),
    "deepseek-v2-lite": (
        OLMOE,
        ("deepseek_v2", "DeepseekV2"),
        {"n_routed_experts": 64, "num_experts_per_tok": 6, "routed_scaling_factor": 1.0, "topk_method": "greedy"},
    ),
}


@pytest.mark.parametrize("name", ROUTERS)
@torch.no_grad()
def test_routes_as_transformers_does(name: str) -> None:
    scoring, names, options = ROUTERS[name]
    router = hf_router(*names, **options)
    hidden = torch.randn(300, 32, generator=torch.Generator().manual_seed(1))
    bias = getattr(router, "e_score_correction_bias", None)
    extra = ()
    if name == "minimax":  # the bias is an argument of this router
        bias = torch.randn(131, generator=torch.Generator().manual_seed(2)) / 3
        extra = (bias,)
    logits, gates, index = router(hidden, *extra)
    got = route(logits, options["num_experts_per_tok"], scoring, bias=bias)
    assert torch.equal(got.index.sort(1).values, index.int().sort(1).values)

    def dense(index: Tensor, gates: Tensor) -> Tensor:
        return torch.zeros(logits.shape).scatter_(1, index.long(), gates)

    torch.testing.assert_close(dense(*got), dense(index, gates), rtol=2.0**-20, atol=0)  # the same sums of at most 131


def test_remap_by_hand_and_bits() -> None:
    index, gates = random_index(131, 6, 13).long(), torch.randn(131, 6, generator=torch.Generator().manual_seed(0))
    index[3, 2] = 99
    expert_map = make(1, 13, 1, OLMOE, kept=4).expert_map
    got = remap(index, gates.bfloat16(), expert_map, 4)
    rows = zip(index.tolist(), gates.bfloat16().double().tolist(), strict=True)
    expected = [remap_by_hand(*row, expert_map.tolist()) for row in rows]
    assert got.index.tolist() == [index for index, _ in expected]
    gates = torch.tensor([gates for _, gates in expected], dtype=torch.float64)
    assert (got.gates.double() - gates).abs().max() <= 6 * 6 * 8 * 2.0**-24  # 6 sums of numbers below 8 in float32


@pytest.mark.parametrize("scoring", [QWEN3, OLMOE, GPT_OSS, deepseek_v2(4, 2)], ids=lambda s: s.kind)
def test_route_is_its_two_halves(scoring: Scoring) -> None:
    case = make(131, 60, 6, scoring, kept=9)
    whole = called(case)
    halves = remap(*called(replace(case, expert_map=None, num_experts=None)), case.expert_map, 9)
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))


@pytest.mark.parametrize(
    "tokens, top_k, experts, block_m",
    [(0, 8, 13, 16), (1, 1, 1, 1), (1, 8, 131, 16), (131, 6, 13, 32), (300, 8, 60, 16), (1000, 4, 384, 64)],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_group_by_hand(tokens: int, top_k: int, experts: int, block_m: int, dtype: torch.dtype) -> None:
    index = random_index(tokens, top_k, experts)
    assert_grouped(group_tokens(index.to(dtype), experts, block_m), index, experts, block_m)


@pytest.mark.parametrize("expert", [0, 7, 12, -1, 13, -(2**31), 2**31 - 1])
def test_group_one_expert_or_none(expert: int) -> None:
    index = torch.full((131, 3), expert, dtype=torch.int32)
    assert_grouped(group_tokens(index, 13, 64), index, 13, 64)


def test_order_and_position_are_inverse() -> None:
    index = random_index(300, 6, 13)
    routed = group_tokens(index, 13, 64)
    count = int(routed.offsets[-1])
    assert (routed.order[:count].sort().values == (index.flatten() >= 0).nonzero()[:, 0]).all()
    assert torch.equal(routed.position[routed.order[:count].long()], torch.arange(count, dtype=torch.int32))


@pytest.mark.parametrize("pairs, experts, block_m", list(product(range(9), (1, 2, 4), (1, 2, 3))))
def test_max_tiles_is_reached_and_never_passed(pairs: int, experts: int, block_m: int) -> None:
    def most(left: int, experts: int) -> int:
        """Over every way to give up to `left` pairs to the experts."""
        if not experts:
            return 0
        return max(-(-own // block_m) + most(left - own, experts - 1) for own in range(left + 1))

    assert max_tiles(pairs, experts, block_m) == most(pairs, experts)


def test_arguments_need_not_be_contiguous() -> None:
    case = make(37, 60, 4, MINIMAX, biased=True, kept=12)
    strided = replace(
        case,
        logits=case.logits.T.contiguous().T,
        bias=case.bias.repeat_interleave(2)[::2],
        expert_map=case.expert_map.repeat_interleave(3)[::3],
    )
    assert all(torch.equal(a, b) for a, b in zip(called(case), called(strided), strict=True))
    index = random_index(37, 4, 13)
    got, expected = group_tokens(index.T.contiguous().T, 13, 16), group_tokens(index, 13, 16)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def nan_logits(count: int) -> Tensor:
    logits = torch.zeros(5, 8)
    logits.view(-1)[:count] = torch.nan
    return logits


LOGITS, INDEX, MAP = torch.zeros(5, 8), torch.zeros(5, 2, dtype=torch.int64), torch.arange(8)
REFUSED: dict[str, Callable[[], object]] = {
    "logits must be a floating [T, N], got torch.int64 of shape [8]": lambda: route(MAP, 2, QWEN3),
    "N, the experts of the router, must lie in [1, 512], got 513": lambda: route(torch.zeros(2, 513), 2, QWEN3),
    "top_k must lie in [1, 8], got 9": lambda: route(LOGITS, 9, QWEN3),
    "top_k must lie in [1, 8], got 0": lambda: route(LOGITS, 0, QWEN3),
    "groups must divide N = 8, got 3": lambda: route(LOGITS, 2, deepseek_v3(3, 1)),
    "top_k must be at most the 4 experts of the kept groups, got 5": lambda: route(LOGITS, 5, deepseek_v3(4, 2)),
    "groups must hold at least 2 experts to count by the best two, got 1": lambda: route(LOGITS, 2, deepseek_v3(8, 4)),
    "bias must be a floating [8], got torch.float32 of shape [7]": lambda: route(
        LOGITS, 2, MINIMAX, bias=torch.zeros(7)
    ),
    "expert_map must be an int32 or int64 [N], got torch.float32 of shape [8]": lambda: route(
        LOGITS, 2, QWEN3, expert_map=MAP.float()
    ),
    "expert_map must be an integer [8], got torch.int64 of shape [7]": lambda: route(
        LOGITS, 2, QWEN3, expert_map=MAP[1:]
    ),
    "expert_map must lie in [-1, 7), got 7": lambda: route(LOGITS, 2, QWEN3, expert_map=MAP, num_experts=7),
    "expert_map must lie in [-1, 8), got -2": lambda: route(LOGITS, 2, QWEN3, expert_map=MAP - 2),
    "num_experts must lie in [1, 512], got 0": lambda: route(LOGITS, 2, QWEN3, expert_map=MAP, num_experts=0),
    "num_experts must be N = 8 without expert_map, got 4": lambda: route(LOGITS, 2, QWEN3, num_experts=4),
    "logits must hold no NaN, got 3 of them": lambda: route(nan_logits(3), 2, QWEN3),
    "all tensors must be on one device, got cpu and meta": lambda: route(
        LOGITS, 2, QWEN3, expert_map=MAP.to("meta"), num_experts=8
    ),
    "index must be an int32 or int64 [T, K], got torch.float32 of shape [5, 8]": lambda: remap(LOGITS, LOGITS, MAP, 8),
    "gates must be a floating [5, 2], got torch.float32 of shape [5, 8]": lambda: remap(INDEX, LOGITS, MAP, 8),
    "expert_map must lie in [-1, 5), got 7": lambda: remap(INDEX, INDEX.float(), MAP, 5),
    "index must be an int32 or int64 [T, K], got torch.int64 of shape [8]": lambda: group_tokens(MAP, 8, 16),
    "num_experts must lie in [1, 512], got 513": lambda: group_tokens(INDEX, 513, 16),
    "block_m must lie in [1, 65536], got 0": lambda: group_tokens(INDEX, 8, 0),
    "T K must lie in [0, 2147483647], got 2147483648": lambda: group_tokens(
        torch.empty((2**28, 8), dtype=torch.int32, device="meta"), 8, 16
    ),
    "kind must be one of softmax_topk, topk_softmax, sigmoid, got 'softmax'": lambda: Scoring("softmax"),
    "group_score must be one of max, top2, got 'sum'": lambda: Scoring(group_score="sum"),
    "groups_kept must lie in [1, groups = 4], got 5": lambda: Scoring(groups=4, groups_kept=5),
    "scale must be finite, got inf": lambda: Scoring(scale=float("inf")),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message: str) -> None:
    with pytest.raises(ValueError) as caught:
        REFUSED[message]()
    assert str(caught.value) == message


def routed_and_grouped(logits: Tensor, bias: Tensor, expert_map: Tensor) -> tuple[Routing, Routing, RoutedTokens]:
    first = route(logits, 4, deepseek_v3(4, 2), bias=bias, expert_map=expert_map, num_experts=7)
    second = remap(first.index, first.gates, torch.arange(7).flip(0), 7)
    return first, second, group_tokens(second.index, 7, 16)


def test_compiles_whole() -> None:
    case = make(37, 32, 4, deepseek_v3(4, 2), biased=True, kept=7)
    compiled = torch.compile(routed_and_grouped, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (37, 5):
        arguments = (case.logits[:tokens], case.bias, case.expert_map)
        for got, expected in zip(compiled(*arguments), routed_and_grouped(*arguments), strict=True):
            assert type(got) is type(expected)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_operators_keep_torch_rules() -> None:
    case, index = make(9, 32, 4, MINIMAX, biased=True, kept=7), random_index(37, 4, 13)
    how = ("sigmoid", True, 1.0, 1, 1, "max")
    ops = torch.ops.cprune
    torch.library.opcheck(ops.route.default, (case.logits, 4, *how, case.bias, case.expert_map, 7))
    torch.library.opcheck(ops.route.default, (case.logits, 4, *how, None, None, 32))
    torch.library.opcheck(ops.remap.default, (index, torch.rand(37, 4), torch.arange(13), 13))
    torch.library.opcheck(ops.group_tokens.default, (index, 13, 16))


def test_meta_tensors_give_shapes() -> None:
    logits = torch.empty((300, 60), device="meta", dtype=torch.bfloat16)
    routing = route(logits, 6, QWEN3)
    assert routing.index.shape == routing.gates.shape == (300, 6)
    routed = group_tokens(routing.index, 60, 16)
    assert [len(x) for x in routed] == [1800, 61, 1800, 168, 168, 1]  # 60 + (1800 - 60) // 16
    assert {x.dtype for x in routed} == {torch.int32}
