"""cprune_native::group_tokens against a stable sort."""

from __future__ import annotations

import pytest
import torch

import cprune_kernels

if cprune_kernels.backend() == "reference":
    pytest.skip("the native kernels were not built", allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("kind", ["uniform", "holes", "one", "none"])
@pytest.mark.parametrize("shape", [(0, 2, 3), (1, 1, 1), (131, 2, 5), (300, 8, 512), (5, 0, 3), (4, 2, 0)], ids=str)
def test_it_is_a_stable_sort(shape: tuple[int, int, int], kind: str, dtype: torch.dtype) -> None:
    tokens, top_k, experts = shape
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, max(experts, 1), (tokens, top_k), generator=generator).to(dtype)
    if kind == "holes":
        index[index == experts // 2] = -1
        index[::5] = experts + 3
    if kind == "one":
        index[:] = experts - 1
    if kind == "none":
        index[:] = -1
    order, offsets, position = torch.ops.cprune_native.group_tokens(index, experts)
    assert {x.dtype for x in (order, offsets, position)} == {torch.int32}
    pairs = torch.arange(index.numel())
    where = index.flatten().long()
    by_expert = [pairs[where == expert] for expert in range(experts)]  # ascending pairs
    total = sum(len(x) for x in by_expert)
    assert order[:total].tolist() == [pair for x in by_expert for pair in x.tolist()]
    assert order[total:].eq(-1).all() and len(order) == index.numel()
    assert offsets.diff().tolist() == [len(x) for x in by_expert] and offsets[0] == 0 and offsets[-1] == total
    routed = (where >= 0) & (where < experts)
    assert torch.equal(order[position[routed].long()].long(), pairs[routed])
    assert position[~routed].eq(-1).all()


def test_a_view_is_read_as_it_is() -> None:
    index = torch.randint(0, 5, (60, 6))[::2, ::3]
    for got, want in zip(
        torch.ops.cprune_native.group_tokens(index, 5),
        torch.ops.cprune_native.group_tokens(index.contiguous(), 5),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_operator_can_be_traced() -> None:
    torch.library.opcheck(torch.ops.cprune_native.group_tokens.default, (torch.randint(0, 5, (31, 2)), 5))


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    with pytest.raises(RuntimeError, match=r"index must be \[T, K\], got \[3\]"):
        torch.ops.cprune_native.group_tokens(torch.zeros(3, dtype=torch.int64), 5)
    with pytest.raises(RuntimeError, match="index must be int64, got float32"):
        torch.ops.cprune_native.group_tokens(torch.zeros(3, 2), 5)
    with pytest.raises(RuntimeError, match="num_experts must be at least 0, got -1"):
        torch.ops.cprune_native.group_tokens(torch.zeros(3, 2, dtype=torch.int64), -1)
