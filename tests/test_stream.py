from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import cprune
from cprune.act.compact import apply_plan
from cprune.checkpoint import open_checkpoint
from cprune.stream import StreamedModel, embed_all, resolve_dtype
from tests.synthetic import damaged, ragged_plan, refuses
from tests.tiny import FAMILIES

Tiny = Callable[..., Path]
IDS = torch.randint(0, 288, (5, 37), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def streamed(folder: Path, batch_tokens: int = 80, dtype: torch.dtype = torch.float32) -> Tensor:
    model = StreamedModel(open_checkpoint(folder), dtype=dtype)
    batches = embed_all(model, IDS, batch_tokens)
    assert [index for index, _ in model.walk(batches)] == list(range(len(model.layers)))
    return torch.stack([model.logits(batch, row) for batch in batches for row in range(len(batch.input_ids))])


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of float32 sums taken in another order."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 2.0**-16 * expected.abs().max()


@torch.no_grad()
def plain(folder: Path, **options: object) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", **options)(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_plain_transformers(tiny: Tiny, family: str) -> None:
    assert_close(streamed(tiny(family)), plain(tiny(family)))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("olmoe", {"shards": 3}),
        ("gpt_oss", {"shards": 4}),
        ("qwen3_moe", {"fuse_on_disk": True}),
        ("qwen3_moe", {"tie_word_embeddings": True}),
        ("qwen2_moe", {"decoder_sparse_step": 3}),
        ("deepseek_v3", {"mtp": True}),
        ("glm4_moe", {"mtp": True, "shards": 2}),
        ("deepseek_v3", {"dtype": "bfloat16"}),
    ],
)
def test_logits_are_those_of_plain_transformers_in_other_layouts(
    tiny: Tiny, family: str, options: dict[str, object]
) -> None:
    folder = tiny(family, **options)
    assert_close(streamed(folder), plain(folder, dtype=torch.float32))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_layers_with_different_counts(tiny: Tiny, family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny(family))
    apply_plan(checkpoint, ragged_plan(checkpoint), tmp_path / "out")
    with torch.no_grad():
        assert_close(streamed(tmp_path / "out"), cprune.load(tmp_path / "out")(IDS).logits)


def test_batches_make_no_difference(tiny: Tiny) -> None:
    one = streamed(tiny("gpt_oss"), batch_tokens=1)
    for batch_tokens in (37, 111, 10000):
        assert_close(streamed(tiny("gpt_oss"), batch_tokens), one)


def test_sequences_are_split_into_batches_of_at_most_so_many_tokens(tiny: Tiny) -> None:
    model = StreamedModel(open_checkpoint(tiny("olmoe")), dtype=torch.float32)
    for batch_tokens, sizes in ((1, [1] * 5), (74, [2, 2, 1]), (75, [2, 2, 1]), (10000, [5])):
        batches = embed_all(model, IDS, batch_tokens)
        assert [len(batch.input_ids) for batch in batches] == sizes
        assert torch.equal(torch.cat([batch.input_ids for batch in batches]), IDS)


def test_padding_on_the_right_reaches_no_token(tiny: Tiny) -> None:
    model = StreamedModel(open_checkpoint(tiny("deepseek_v2")), dtype=torch.float32)
    padded = IDS[:1].clone()
    padded[:, 20:] = 0
    results = []
    for ids in (IDS[:1, :20], padded):
        batches = embed_all(model, ids, 1000)
        for _ in model.walk(batches):
            pass
        results.append(model.logits(batches[0], 0)[:20])
    assert_close(results[1], results[0])


def test_one_layer_is_in_memory_at_a_time(tiny: Tiny) -> None:
    model = StreamedModel(open_checkpoint(tiny("glm4_moe")), dtype=torch.float32)

    def real() -> list[int]:
        return [i for i, layer in enumerate(model.layers) if not all(p.is_meta for p in layer.parameters())]

    assert real() == []
    for index, layer in model.walk(embed_all(model, IDS, 100)):
        assert real() == [index] and not any(p.is_meta for p in layer.parameters())
    assert real() == []
    with pytest.raises(ZeroDivisionError), model.layer(1):
        raise ZeroDivisionError
    assert real() == []


def test_a_layer_can_be_run_twice(tiny: Tiny) -> None:
    model = StreamedModel(open_checkpoint(tiny("minimax_m2")), dtype=torch.float32)
    (batch,) = embed_all(model, IDS, 1000)
    before = batch.hidden.clone()
    with model.layer(1) as layer:
        first = model.run_layer(1, layer, batch)
    with model.layer(1) as layer:
        assert torch.equal(model.run_layer(1, layer, batch), first)
    assert torch.equal(batch.hidden, before)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("model.norm.weight", "got none for model.norm.weight"),
        ("lm_head.weight", "got none for lm_head.weight"),
        ("model.layers.1.self_attn.q_proj.weight", "got none for self_attn.q_proj.weight of layer 1"),
        ("model.layers.2.input_layernorm.weight", "got none for input_layernorm.weight of layer 2"),
    ],
)
def test_missing_weight_is_refused_by_name(tiny: Tiny, tmp_path: Path, name: str, match: str) -> None:
    folder = damaged(tiny("olmoe"), tmp_path / "m", lambda tensors: tensors.pop(name))
    with refuses(match):
        streamed(folder)


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.1.mlp.gate.weight", "model.embed_tokens.weight"],
)
def test_weight_of_another_shape_is_refused_by_name(tiny: Tiny, tmp_path: Path, name: str) -> None:
    def shorten(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][:, :-1]

    with refuses(f"{name.removesuffix('.weight')}.* must have (the )?shape"):
        streamed(damaged(tiny("olmoe"), tmp_path / "m", shorten))


def test_fused_weight_of_another_shape_is_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    def shorten(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.down_proj"] = tensors["model.layers.1.mlp.experts.down_proj"][:, :-1]

    with refuses("model.layers.1.mlp.experts.down_proj must have the shape"):
        streamed(damaged(tiny("gpt_oss"), tmp_path / "m", shorten))


def test_quantised_weights_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    quantization = {"quant_method": "mxfp4"}
    folder = damaged(tiny("gpt_oss"), tmp_path / "m", config=lambda c: c.update(quantization_config=quantization))
    with refuses("needs unquantised weights, got quantization 'mxfp4'"):
        streamed(folder)


def test_auto_keeps_float32_and_takes_bfloat16_where_it_is_fast(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    single, half = open_checkpoint(tiny("olmoe")), open_checkpoint(tiny("olmoe", dtype="bfloat16"))
    assert resolve_dtype("float32", half) == torch.float32 and resolve_dtype("bfloat16", single) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for fast in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda fast=fast: {"avx512_bf16": fast})
        assert resolve_dtype("auto", single) == torch.float32
        assert resolve_dtype("auto", half) == (torch.bfloat16 if fast else torch.float32)
