"""`attend`: the native kernel where plain causal attention is asked for, else what transformers has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import cprune.attention
from cprune.attention import attend
from cprune_kernels.attention import causal_attention
from tests.kernels.test_attention import qkv

SHAPE = (2, 4, 2, 37, 16, 16)


class Layer(nn.Module):
    is_causal = True
    num_key_value_groups = 2


def ask(monkeypatch: pytest.MonkeyPatch, *, native: bool = True, layer: nn.Module | None = None, mask=None, **asked):  # type: ignore[no-untyped-def]
    """(outputs, whether they were left to transformers)."""
    left: list[bool] = []

    def otherwise(*args: object, **kwargs: object) -> tuple[Tensor, None]:
        left.append(True)
        return sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setattr(cprune.attention, "attends_natively", lambda *inputs: native)
    q, k, v = qkv(SHAPE, torch.float32)
    queries = asked.pop("queries", slice(None))
    out, _ = attend(otherwise, layer or Layer(), q[:, :, queries], k, v, mask, **asked)
    return out, bool(left)


def test_plain_causal_attention_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked in ({}, {"scaling": 0.3}, {"is_causal": True}, {"sliding_window": 100}, {"position_bias": None}):
        out, left = ask(monkeypatch, **asked)
        assert not left
        assert torch.equal(out, causal_attention(*qkv(SHAPE, torch.float32), asked.get("scaling")))


def test_all_else_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = ask(monkeypatch)
    both_ways = Layer()
    both_ways.is_causal = False
    mask = torch.ones(1, 1, 37, 37, dtype=torch.bool).tril(2)
    bias = torch.randn(1, 4, 37, 37, generator=torch.Generator().manual_seed(0))
    for asked in (
        {"layer": both_ways},
        {"is_causal": False},
        {"mask": mask},
        {"dropout": 0.5},
        {"position_bias": bias},
        {"queries": slice(-1, None)},
    ):
        out, left = ask(monkeypatch, **asked)
        assert left
        assert out.shape != whole.shape or not torch.allclose(out, whole)
    out, left = ask(monkeypatch, native=False)
    assert left and torch.allclose(out, whole)
