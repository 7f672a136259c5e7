from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import cprune
import cprune.attention
import cprune.experts
from cprune import hf
from cprune.act.compact import apply_plan
from cprune.attention import ATTEND
from cprune.checkpoint import open_checkpoint
from cprune.stream import StreamedModel, embed_all
from cprune_kernels import backend
from cprune_kernels.fused_moe import MoEObservation, moe_observe
from tests.synthetic import damaged, ragged_plan, refuses, tensors_of, uniform_plan
from tests.tiny import FAMILIES

Tiny = Callable[..., Path]
IDS = torch.randint(0, 288, (3, 33), generator=torch.Generator().manual_seed(1))


def load(folder: Path, experts: str = "eager") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation=experts)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of float32 sums taken in another order."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 2.0**-16 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_observing_experts_give_what_eager_experts_give(tiny: Tiny, family: str) -> None:
    assert_close(logits(load(tiny(family), hf.OBSERVE)), logits(load(tiny(family))))


class Recorder:
    """Keeps all that it is shown."""

    def __init__(self) -> None:
        self.inputs: list[tuple[Tensor, Tensor, Tensor]] = []
        self.seen: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self.reduced: list[MoEObservation] = []
        self.valid: Tensor | None = None

    def on_input(self, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor | None:
        self.inputs.append((hidden, index, gates))
        return self.valid

    def on_expert(self, expert: int, tokens: Tensor, slots: Tensor, output: Tensor) -> None:
        self.seen.append((expert, tokens, slots, output.clone()))

    def on_experts(self, seen: MoEObservation) -> None:
        self.reduced.append(seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_observer_sees_every_routed_pair_once_and_its_output(tiny: Tiny, family: str) -> None:
    model, recorder = load(tiny(family), hf.OBSERVE), Recorder()
    experts = hf.find_experts(hf.decoder_layers(model)[2])
    outputs: list[Tensor] = []
    experts.register_forward_hook(lambda module, args, out: outputs.append(out))
    experts.cprune_observer = recorder
    logits(model)
    ((hidden, index, gates),) = recorder.inputs
    assert hidden.shape == (99, 48) and index.shape == gates.shape == (99, 2)
    assert [expert for expert, *_ in recorder.seen] == sorted({int(e) for e in index.flatten()})
    combined = torch.zeros(99, 48)
    pairs = set()
    for expert, tokens, slots, output in recorder.seen:
        assert (index[tokens, slots] == expert).all() and output.shape == (len(tokens), 48)
        combined.index_add_(0, tokens, output * gates[tokens, slots].unsqueeze(1))
        pairs |= set(zip(tokens.tolist(), slots.tolist(), strict=True))
    assert len(pairs) == 99 * 2
    assert_close(combined, outputs[0].reshape(99, 48))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_kernel_runs_plain_experts_of_bfloat16_models(tiny: Tiny, family: str, masked: bool) -> None:
    if not backend().endswith("bf16"):
        pytest.skip("native kernels do not beat the matrix library here")
    model, recorder = load(tiny(family), hf.OBSERVE).bfloat16(), Recorder()
    recorder.valid = torch.arange(99) % 3 > 0 if masked else None
    experts = hf.find_experts(hf.decoder_layers(model)[2])
    outputs: list[Tensor] = []
    experts.register_forward_hook(lambda module, args, out: outputs.append(out))
    experts.cprune_observer = recorder
    logits(model)
    (inputs,) = recorder.inputs
    if family in ("gpt_oss",):  # interleaved, with biases and an activation of its own
        assert recorder.seen and not recorder.reduced
        return
    (seen,) = recorder.reduced
    expected = moe_observe(*inputs, experts.gate_up_proj.detach(), experts.down_proj.detach(), recorder.valid)
    assert not recorder.seen and torch.equal(outputs[0].reshape(99, 48), seen.out.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_kernel_serves_what_nobody_observes(
    tiny: Tiny, family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, served = load(tiny(family), hf.OBSERVE).to(dtype), []
    serve = hf.serve_experts
    monkeypatch.setattr(hf, "serve_experts", lambda *args: served.append(True) or serve(*args))
    products = cprune.experts.FP32_PRODUCTS if dtype == torch.float32 else cprune.experts.BF16_PRODUCTS
    plain = family != "gpt_oss" and backend() in products
    logits(model)
    blocks = [hf.find_experts(layer) for layer in hf.decoder_layers(model)]
    assert len(served) == plain * sum(block is not None for block in blocks)
    served.clear()
    monkeypatch.setattr(cprune.experts, "FEW_ROWS", 0)
    logits(model)
    assert bool(served) == (plain and dtype == torch.bfloat16)  # in float32 the matrix library is as fast at many rows


def test_experts_that_must_be_differentiated_run_on_torch(tiny: Tiny) -> None:
    model, recorder = load(tiny("olmoe"), hf.OBSERVE).bfloat16(), Recorder()
    experts = hf.find_experts(hf.decoder_layers(model)[2])
    experts.cprune_observer = recorder
    model(IDS).logits.float().sum().backward()
    assert recorder.seen and not recorder.reduced and experts.down_proj.grad.abs().sum() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_and_outputs_are_those_of_the_tensors_on_disk(tiny: Tiny, family: str) -> None:
    checkpoint, model = open_checkpoint(tiny(family)), load(tiny(family))
    moe, tensors = checkpoint.moe_layers[-1], tensors_of(tiny(family))
    experts = hf.find_experts(hf.decoder_layers(model)[moe.index])
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    for expert in range(moe.num_experts):
        if family == "gpt_oss":
            prefix = f"{moe.name}.experts."
            fused, down = tensors[prefix + "gate_up_proj"][expert], tensors[prefix + "down_proj"][expert].T
            gate, up = fused[:, ::2].T, fused[:, 1::2].T
            bias = tensors[prefix + "gate_up_proj_bias"][expert]
            a, b = (x @ gate.T + bias[::2]).clamp(max=7.0), (x @ up.T + bias[1::2]).clamp(-7.0, 7.0)
            inner = (b + 1) * a * torch.sigmoid(1.702 * a)
            expected = inner @ down.T + tensors[prefix + "down_proj_bias"][expert]
        else:
            gate, up, down = (tensors[moe.experts[expert][suffix]] for suffix in moe.projections)
            expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
        for got, weight in zip(hf.projections(experts), (gate, up, down), strict=True):
            assert torch.equal(got[expert], weight)
        assert_close(hf.expert_output(experts, expert, x), expected)
    with torch.inference_mode():
        assert torch.equal(hf.expert_outputs(experts, x)[expert], hf.expert_output(experts, expert, x))


@torch.inference_mode()
def test_outputs_of_all_experts_at_once_are_those_of_each(tiny: Tiny) -> None:
    """In bfloat16, where one kernel may run them all: it rounds twice on the way, the matrix library five times."""
    experts = hf.find_experts(hf.decoder_layers(load(tiny("qwen3_moe")).bfloat16())[1])
    x = torch.randn(300, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert experts.num_experts * len(x) > hf.OUTPUT_ROWS
    outputs = hf.expert_outputs(experts, x)
    assert outputs.shape == (experts.num_experts, 300, 48) and outputs.dtype == torch.bfloat16
    for expert, output in enumerate(outputs.double()):
        single = hf.expert_output(experts, expert, x).double()
        assert (output - single).norm() <= 7 * 2**-9 * single.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_router_is_the_one_beside_the_experts(tiny: Tiny, family: str) -> None:
    checkpoint, model = open_checkpoint(tiny(family)), load(tiny(family))
    trunk = {moe.index: moe for moe in checkpoint.moe_layers}
    for index, layer in enumerate(hf.decoder_layers(model)):
        if index in trunk:
            name, _ = next(iter(trunk[index].router.values()))
            assert torch.equal(hf.find_router(layer).weight, checkpoint.read(name))
        else:
            assert hf.find_experts(layer) is None


@pytest.mark.parametrize("shape", ["uniform", "ragged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masking_experts_equals_removing_them(tiny: Tiny, family: str, shape: str, tmp_path: Path) -> None:
    checkpoint, original = open_checkpoint(tiny(family)), load(tiny(family), hf.OBSERVE)
    plan = (uniform_plan if shape == "uniform" else ragged_plan)(checkpoint)
    apply_plan(checkpoint, plan, tmp_path / "out")
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    whole = logits(original)
    layers = hf.decoder_layers(original)
    with ExitStack() as masks:
        for moe in checkpoint.moe_layers:
            masks.enter_context(
                hf.masked_router(layers[moe.index], torch.tensor(plan[moe.name].dropped, dtype=torch.int64))
            )
        masked = logits(original)
    small = cprune.load(tmp_path / "out")
    assert_close(logits(small), masked)
    assert (masked - whole).abs().max() > 0.01 * whole.abs().max()  # what was dropped had been used
    assert torch.equal(logits(original), whole)
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())
    if shape == "uniform":
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(small))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_plain_transformers_loads_ragged_output_by_its_own_code(
    tiny: Tiny, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    checkpoint, out = open_checkpoint(tiny(family)), tmp_path / f"out_{family}"
    apply_plan(checkpoint, ragged_plan(checkpoint), out)
    model, info = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, output_loading_info=True)
    assert type(model).__name__ == "CpruneForCausalLM" and not any(info.values()), info
    assert torch.equal(logits(model), logits(cprune.load(out)))


def test_load_takes_what_from_pretrained_takes(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("olmoe"))
    apply_plan(checkpoint, ragged_plan(checkpoint), tmp_path / "out")
    model = cprune.load(tmp_path / "out", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
    counts = [hf.find_experts(layer).num_experts for layer in hf.decoder_layers(model)]
    assert counts == [14, 13, 12]
    assert model.generate(IDS[:1], max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (1, 37)


def test_load_refuses_a_folder_that_lacks_a_weight(tiny: Tiny, tmp_path: Path) -> None:
    folder = damaged(tiny("olmoe"), tmp_path / "m", lambda tensors: tensors.pop("model.layers.1.mlp.gate.weight"))
    with refuses("must hold every weight of the model, got none for model.layers.1.mlp.gate.weight"):
        cprune.load(folder)
    with refuses("MODEL must be"):
        cprune.load(tmp_path / "none")


def test_model_is_built_without_weights(tiny: Tiny) -> None:
    model = hf.build_empty(open_checkpoint(tiny("deepseek_v3")), torch.bfloat16)
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers()) and not model.training


def test_model_type_unknown_to_transformers_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    for name, value in (("model_type", "new_moe"), ("model_type", None)):
        folder = damaged(tiny("olmoe"), tmp_path / str(value), config=lambda c, n=name, v=value: c.update({n: v}))
        with refuses("must know the model type, got"):
            hf.read_config(open_checkpoint(folder))
    folder = damaged(tiny("olmoe"), tmp_path / "t5", config=lambda c: c.update(model_type="t5"))
    with refuses("must be a causal language model, got 't5'"):
        hf.build_empty(open_checkpoint(folder), torch.float32)


def test_tokenizer_is_read_or_asked_for(tiny: Tiny) -> None:
    tokenizer = hf.read_tokenizer(open_checkpoint(tiny("olmoe")))
    assert tokenizer.decode(tokenizer("the router")["input_ids"]) == "the router"
    with refuses("must hold a tokenizer"):
        hf.read_tokenizer(open_checkpoint(tiny("olmoe", tokenizer=False)))


def test_tensors_without_a_place_or_of_another_shape_are_refused(tiny: Tiny) -> None:
    checkpoint = open_checkpoint(tiny("olmoe"))
    model = hf.build_empty(checkpoint, torch.float32)
    with refuses("every tensor must have a place in the model, got model.layers.0.other.weight"):
        hf.load_tensors(model, {"model.layers.0.other.weight": torch.ones(3)}, torch.device("cpu"))
    with refuses("model.norm.weight must have the shape of the model"):
        hf.load_tensors(model, {"model.norm.weight": torch.ones(3)}, torch.device("cpu"))


@pytest.mark.parametrize("family", FAMILIES)
def test_models_attend_natively_where_they_may(tiny: Tiny, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    native = cprune.attention.attends_natively
    monkeypatch.setattr(cprune.attention, "attends_natively", lambda *x: calls.append(True) or native(*x))
    checkpoint = open_checkpoint(tiny(family))
    model = StreamedModel(checkpoint, dtype=torch.float32)
    batches = embed_all(model, IDS, IDS.numel())
    for _ in model.walk(batches):
        pass
    assert_close(torch.stack([model.logits(batches[0], row) for row in range(len(IDS))]), logits(load(tiny(family))))
    supported = type(model.model)._supports_sdpa
    assert model.model.config._attn_implementation == (ATTEND if supported else "eager")
    assert len(calls) == (len(model.layers) if supported else 0)
