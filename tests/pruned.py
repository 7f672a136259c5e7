"""Tiny models pruned through the command line, and what their outputs must equal: the original, masked."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from cprune import PrunePlan

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
BUDGETS = ("uniform", "global")
IDS = torch.randint(0, 288, (4, 48), generator=torch.Generator().manual_seed(1))
WORDS = "the router sends every token to experts and other layers return what is left of hidden state".split()
LITTLE = ("--seq-len", "32", "--evaluate-tokens", "128", "--sample-tokens", "40", "--dtype", "float32")
SHORT = ("--tokens", "512", *LITTLE)
EXACT = ("--repair", "none")  # what is kept stays as it was, so that outputs equal the masked original


def quieter_last_layer(model: Path) -> Path:
    """Scale the experts of layer 2 down, so that a global budget takes more of them than of the others."""
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if re.search(r"layers\.2\..*experts\.(\d+\.)?(down_proj|w2)", name):
            tensor *= 0.25
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


def share(family: str, budget: str) -> float:
    """A quarter; 12 experts in 4 groups leave by four."""
    return 0.34 if (family, budget) == ("deepseek_v3", "uniform") else 0.25


def plain(folder: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"], info
    return model.eval()


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Equal up to float32: 2^-24 a rounding, for some thousands of them in a chain, of the largest logit."""
    assert got.shape == expected.shape and (got - expected).abs().max() <= 2.0**-18 * expected.abs().max()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def plan_of(out: Path) -> PrunePlan:
    return PrunePlan.load(out / "cprune_plan.json")


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def masked_reference(model: Path, plan: PrunePlan) -> Tensor:
    """Logits of the original whose routers choose among the kept experts only, routing written out anew."""
    original = plain(model)
    config, layers = original.config, original.model.layers
    for layer in plan.layers:
        index = int(layer.layer.split(".")[2])
        if index < len(layers):
            block = next(child for child in layers[index].children() if hasattr(child, "experts"))
            router = getattr(block, "gate", None) or block.router
            dropped = torch.zeros(layer.num_experts, dtype=torch.bool)
            dropped[list(layer.dropped)] = True
            correction = getattr(router, "e_score_correction_bias", getattr(block, "e_score_correction_bias", None))
            router.forward = masked_routing(config, router, dropped, correction)
    return logits(original)


def masked_routing(config: Any, router: nn.Module, dropped: Tensor, correction: Tensor | None) -> Callable[..., Any]:
    top_k, num = config.num_experts_per_tok, len(dropped)
    groups, reach = getattr(config, "n_group", 1) or 1, getattr(config, "topk_group", 1) or 1

    def route(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        raw = F.linear(hidden.reshape(-1, hidden.shape[-1]).float(), router.weight, getattr(router, "bias", None))
        raw = raw.masked_fill(dropped, -torch.inf)
        if config.model_type == "gpt_oss":
            chosen = raw.sort(dim=1, descending=True).indices[:, :top_k]
            return raw, raw.gather(1, chosen).softmax(1), chosen
        scores = raw.softmax(1) if correction is None else raw.sigmoid()
        choice = (scores if correction is None else scores + correction).masked_fill(dropped, -torch.inf)
        if correction is not None and groups > 1:
            grouped = choice.view(-1, groups, num // groups)
            best = grouped.sort(dim=2, descending=True).values[:, :, :2].sum(2).sort(dim=1, descending=True).indices
            for row in range(len(grouped)):
                grouped[row, best[row, reach:]] = -torch.inf
            choice = grouped.reshape(-1, num)
        chosen = choice.sort(dim=1, descending=True).indices[:, :top_k]
        gates = scores.gather(1, chosen)
        if config.model_type in ("mixtral", "minimax_m2") or config.norm_topk_prob:
            gates = gates / gates.sum(1, keepdim=True)
        return raw, gates * getattr(config, "routed_scaling_factor", 1.0), chosen

    return route
