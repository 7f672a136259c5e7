"""The attention of the models that are walked through: `cprune.hf` registers `attend` with transformers.

Knows how transformers 5 calls an attention function, and nothing else of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cprune_kernels.attention import attends_natively, causal_attention

ATTEND, SDPA = "cprune_attend", "sdpa"  # the names of `attend`, and of what it calls otherwise
NOT_PLAIN = ("position_bias", "cache", "softcap")

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def attend(
    otherwise: Attention,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Outputs [B, S, heads, W] for query, key and value [B, heads, S, *]: by the native kernel where nothing but plain
    causal attention of whole sequences is asked for and it serves these tensors, else as `otherwise` has them.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = causal and attention_mask is None and not dropout and query.shape[2] == key.shape[2]
    if plain and all(others.get(name) is None for name in NOT_PLAIN) and attends_natively(query, key, value):
        return causal_attention(query, key, value, scaling), None
    asked = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **others}
    return otherwise(module, query, key, value, attention_mask, **asked)
