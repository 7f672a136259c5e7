from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cprune import hf
from cprune.ragged import EXPERT_COUNT_NAMES, resize_experts
from tests.tiny import FAMILIES, tiny_config, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_get_their_own_number_of_experts_and_a_router_to_match(family: str) -> None:
    model: PreTrainedModel = tiny_model(tiny_config(family))
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    whole = hf.find_experts(hf.decoder_layers(model)[1]).num_experts
    size = 8 if family == "deepseek_v3" else 5
    resize_experts(model, {"2": size, "7": 3})  # there is no layer 7
    layers = hf.decoder_layers(model)
    assert hf.find_experts(layers[1]).num_experts == whole
    assert hf.find_experts(layers[2]).num_experts == size == len(hf.find_router(layers[2]).weight)
    after = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert after.keys() == before.keys()
    for name, shape in before.items():
        changed = name.startswith("model.layers.2.mlp") and shape[:1] == (whole,)
        assert after[name] == (torch.Size((size, *shape[1:])) if changed else shape), name
    counts = [getattr(model.config, key) for key in EXPERT_COUNT_NAMES if hasattr(model.config, key)]
    assert counts and set(counts) == {whole}
    assert model(torch.arange(9).unsqueeze(0)).logits.shape == (1, 9, 307)


def test_blocks_keep_the_experts_implementation_of_the_model() -> None:
    model = tiny_model(tiny_config("olmoe"))
    model.config._experts_implementation = hf.OBSERVE
    resize_experts(model, {"0": 4})
    assert hf.find_experts(hf.decoder_layers(model)[0]).config._experts_implementation == hf.OBSERVE


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "deepseek_v3"])
def test_a_router_may_have_more_rows_than_there_are_experts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: PreTrainedModel = tiny_model(tiny_config(family))
    layer = hf.decoder_layers(model)[2]
    whole = hf.find_experts(layer).num_experts
    rows = [place % 3 for place in range(whole)]
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    resize_experts(model, {"1": 4, "2": 3}, {"2": rows})
    experts = hf.find_experts(layer)
    assert experts.num_experts == 3 and hf.find_experts(hf.decoder_layers(model)[1]).num_experts == 4
    for name, tensor in layer.state_dict().items():
        small = ".experts." in name
        assert tensor.shape == (torch.Size((3, *before[name].shape[1:])) if small else before[name].shape), name
    calls: list[tuple[Tensor, ...]] = []
    inner = type(experts).__mro__[2]  # the class of transformers
    monkeypatch.setattr(inner, "forward", lambda _, *args: calls.append(args) or args[0])
    index = torch.tensor([[0, whole - 1], [4, 1], [whole, 2]])  # the last token's first slot has no expert
    experts(torch.zeros(3, 8), index, torch.ones(3, 2))
    assert calls[0][1].tolist() == [[0, (whole - 1) % 3], [1, 1], [3, 2]]
    assert torch.equal(calls[0][2], torch.ones(3, 2))
