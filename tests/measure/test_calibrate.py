from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from cprune.checkpoint import open_checkpoint
from cprune.config import PruneConfig
from cprune.measure.calibrate import LayerRecorder, add_parameter_grams, calibrate, parameter_stats
from cprune.measure.packing import Sequences
from cprune.stats import TENSOR_FIELDS, ExpertStats
from cprune_kernels.fused_moe import moe_observe
from tests.synthetic import damaged, refuses, tensors_of

Tiny = Callable[..., Path]
SHARED = Path(__file__).resolve().parents[2] / "../shared"
EVERYTHING = 10000  # more than there is: the sample is then every token, every sequence
CONFIG = PruneConfig(dtype="float32", batch_tokens=80, sample_tokens=EVERYTHING, sample_sequences=EVERYTHING)


def sequences(padded: bool = True) -> Sequences:
    """7 x 33 tokens; the third row ends after 10, the last is padding alone."""
    ids = torch.randint(0, 288, (7, 33), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(7, 33, dtype=torch.bool)
    if padded:
        mask[2, 10:] = mask[6] = False
    return Sequences(torch.where(mask, ids, 0), mask, ("b", "a", "c", "a", "b", "c", "c"))


@dataclass
class Dense:
    """One layer, seen by plain transformers: what entered its experts, the routing, and all experts on all tokens."""

    inputs: Tensor  # [N, S, H]
    before: Tensor  # [N, S, H], what entered the decoder layer
    index: Tensor  # [N, S, K]
    gates: Tensor  # [N, S, K]
    after: Tensor  # [N, S, H]
    outputs: Tensor  # [E, N, S, H]


@torch.no_grad()
def dense(folder: Path, texts: Sequences) -> dict[str, Dense]:
    """The layers of a model whose experts are stored one by one, by name."""
    checkpoint, tensors = open_checkpoint(folder), tensors_of(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    shape = texts.input_ids.shape
    seen: dict[tuple[str, int], tuple[Tensor, ...]] = {}
    for moe in checkpoint.moe_layers:
        layer = model.model.layers[moe.index]
        experts = next(module for name, module in layer.named_modules() if name.endswith("experts"))
        experts.register_forward_hook(
            lambda m, args, kw, out, i=moe.index: seen.update({("in", i): (*args, *kw.values())}), with_kwargs=True
        )
        layer.register_forward_hook(lambda m, args, out, i=moe.index: seen.update({("out", i): (args[0], out)}))
    model(texts.input_ids)
    found = {}
    for moe in checkpoint.moe_layers:
        hidden, index, gates = (value.reshape(*shape, -1) for value in seen["in", moe.index])
        before, after = seen["out", moe.index]
        outputs = []
        for expert in moe.experts:
            gate, up, down = (tensors[expert[suffix]] for suffix in moe.projections)
            outputs.append((torch.nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)) @ down.T)
        found[moe.name] = Dense(hidden, before, index, gates, after, torch.stack(outputs))
    return found


def by_hand(layer: Dense, mask: Tensor, domains: Sequence[str]) -> dict[str, Tensor]:
    """The definitions in `cprune.stats`, a token and a slot at a time."""
    num, hidden = layer.outputs.shape[0], layer.outputs.shape[-1]
    sums = {
        name: torch.zeros(num, dtype=torch.float64)
        for name in (
            *("count", "gate_sum", "gated_norm_sum", "gated_sq_sum", "relative_sum", "turning_sum", "norm_sum"),
            *("norm_sq_sum", "norm_max", "activation_absmax", "activation_max"),
        )
    }
    sums |= {"output_sum": torch.zeros(num, hidden, dtype=torch.float64)}
    sums |= {name: torch.zeros(num, num, dtype=torch.float64) for name in ("coactivation", "gated_gram")}
    names = sorted(set(domains))
    sums["domain_gated_sum"] = torch.zeros(len(names), num, dtype=torch.float64)
    sums["domain_tokens"] = torch.zeros(len(names), dtype=torch.float64)
    sums["activation_max"] -= torch.inf
    for row, column in mask.nonzero().tolist():
        chosen = layer.index[row, column].tolist()
        before, after = layer.before[row, column].double(), layer.after[row, column].double()
        stream = float(after.norm())
        turning = 1 - float(before @ after) / (float(before.norm()) * stream)
        domain = names.index(domains[row])
        sums["domain_tokens"][domain] += 1
        for slot, expert in enumerate(chosen):
            output = layer.outputs[expert, row, column].double()
            gate, norm = float(layer.gates[row, column, slot]), float(output.norm())
            sums["count"][expert] += 1
            sums["gate_sum"][expert] += gate
            sums["gated_norm_sum"][expert] += gate * norm
            sums["gated_sq_sum"][expert] += (gate * norm) ** 2
            sums["relative_sum"][expert] += gate * norm / stream
            sums["turning_sum"][expert] += gate * norm * turning
            sums["domain_gated_sum"][domain, expert] += gate * norm
            sums["norm_sum"][expert] += norm
            sums["norm_sq_sum"][expert] += norm**2
            sums["norm_max"][expert] = max(sums["norm_max"][expert], norm)
            sums["activation_max"][expert] = max(sums["activation_max"][expert], float(output.max()))
            sums["activation_absmax"][expert] = max(sums["activation_absmax"][expert], float(output.abs().max()))
            sums["output_sum"][expert] += output
            for place, other in enumerate(chosen):
                sums["coactivation"][expert, other] += 1
                product = float(output @ layer.outputs[other, row, column].double())
                sums["gated_gram"][expert, other] += gate * float(layer.gates[row, column, place]) * product
    sums["activation_max"][sums["count"] == 0] = 0.0
    every = layer.outputs[:, mask].double()
    sums["output_gram"] = torch.einsum("ith,jth->ij", every, every)
    sums["mean_gram"] = every.mean(1) @ every.mean(1).T
    return sums


def assert_close(got: Tensor, expected: Tensor, name: str) -> None:
    """Equal up to the rounding of float32 products; integers exactly."""
    assert got.shape == expected.shape, name
    if not got.is_floating_point():
        assert torch.equal(got, expected.long()), name
    else:
        assert got.dtype == torch.float64, name
        assert (got - expected).abs().max() <= 2.0**-16 * expected.abs().max(), name


def calibrated(folder: Path, texts: Sequences, config: PruneConfig = CONFIG) -> dict[str, ExpertStats]:
    return {stats.layer: stats for stats in calibrate(open_checkpoint(folder), texts, config)}


@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_statistics_are_those_of_the_dense_computation(tiny: Tiny, family: str, skip_first: bool) -> None:
    texts, folder = sequences(), tiny(family)
    mask = texts.mask.clone()
    if skip_first:
        mask[:, 0] = False
    expected = dense(folder, texts)
    stats = calibrated(folder, texts, CONFIG.replace(skip_first=skip_first))
    assert list(stats) == list(expected)
    for name, layer in expected.items():
        assert stats[name].tokens == int(mask.sum())
        for field, value in by_hand(layer, mask, texts.domain).items():
            assert_close(getattr(stats[name], field), value, field)
        assert int(stats[name].count.sum()) == int(mask.sum()) * 2
        assert torch.equal(stats[name].coactivation.diagonal(), stats[name].count)


def test_sample_outputs_are_of_all_experts_on_the_same_inputs(tiny: Tiny) -> None:
    texts, folder = sequences(), tiny("olmoe")
    for name, layer in dense(folder, texts).items():
        stats = calibrated(folder, texts)[name]
        every = layer.outputs[:, texts.mask].double()
        centred = every - every.mean(dim=1, keepdim=True)
        cross = torch.einsum("isa,jsb->ijab", centred, centred).square().sum((-1, -2))
        scale = cross.diagonal().sqrt()
        assert_close(stats.cka, cross / scale / scale.unsqueeze(1), "cka")
        tensors = tensors_of(folder)
        means = torch.stack([layer.inputs[row][texts.mask[row]].mean(0) for row in range(6)])
        for expert in range(15):
            gate, up, down = (tensors[f"{name}.experts.{expert}.{p}_proj.weight"] for p in ("gate", "up", "down"))
            output = (torch.nn.functional.silu(means @ gate.T) * (means @ up.T)) @ down.T
            got = stats.sequence_outputs[expert]
            assert got.dtype == torch.float16 and torch.allclose(got.float(), output, rtol=2.0**-10, atol=1e-4)
        rows = tensors[f"{name}.gate.weight"].double()
        assert_close(stats.router_gram, rows @ rows.T, "router_gram")


def test_sample_is_bounded_and_drawn_by_the_seed(tiny: Tiny) -> None:
    texts, folder = sequences(), tiny("olmoe")
    name = "model.layers.1.mlp"
    config = CONFIG.replace(sample_tokens=20, sample_sequences=3)
    one, same, other = (calibrated(folder, texts, config.replace(seed=seed))[name] for seed in (0, 0, 1))
    assert one.sequence_outputs.shape == (15, 3, 48)
    assert torch.equal(one.output_gram, same.output_gram) and not torch.equal(one.output_gram, other.output_gram)
    assert torch.equal(one.count, other.count)
    every = dense(folder, texts)[name].outputs[:, texts.mask].double()
    squares = every.square().sum(-1).sort(dim=1).values  # the trace is a sum over 20 of the valid tokens
    trace = one.output_gram.diagonal()
    assert (squares[:, :20].sum(1) <= trace).all() and (trace <= squares[:, -20:].sum(1)).all()
    assert torch.linalg.matrix_rank(one.output_gram) == 15


def test_padding_counts_for_nothing(tiny: Tiny) -> None:
    texts, folder = sequences(), tiny("qwen3_moe")
    other = Sequences(torch.where(texts.mask, texts.input_ids, 77), texts.mask, texts.domain)
    shorter = Sequences(texts.input_ids[:6], texts.mask[:6], texts.domain[:6])
    expected = calibrated(folder, texts)
    for changed in (other, shorter):
        for name, stats in calibrated(folder, changed).items():
            for field in TENSOR_FIELDS:
                value = getattr(expected[name], field)
                if value.dtype != torch.float16:
                    assert_close(getattr(stats, field), value, field) if value.numel() else None


def test_batches_make_no_difference(tiny: Tiny) -> None:
    texts, folder = sequences(), tiny("gpt_oss")
    expected = calibrated(folder, texts, CONFIG.replace(batch_tokens=EVERYTHING))
    for batch_tokens in (1, 70):
        for name, stats in calibrated(folder, texts, CONFIG.replace(batch_tokens=batch_tokens)).items():
            for field in TENSOR_FIELDS:
                value = getattr(expected[name], field)
                if value.dtype != torch.float16 and value.numel():
                    assert_close(getattr(stats, field), value, field)


def test_expert_never_routed_to_is_zero_and_reported(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def shun(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.gate.e_score_correction_bias"][5] = -100.0

    folder = damaged(tiny("glm4_moe"), tmp_path / "m", shun)
    with caplog.at_level(logging.WARNING, "cprune"):
        stats = calibrated(folder, sequences())["model.layers.1.mlp"]
    assert "model.layers.1.mlp: 1 of 13 experts saw no calibration token" in caplog.text
    for field in ("count", "gate_sum", "gated_norm_sum", "norm_sum", "norm_max", "activation_max", "activation_absmax"):
        values = getattr(stats, field)
        assert values[5] == 0 and (values != 0).sum() == 12, field
    assert not stats.output_sum[5].any() and not stats.coactivation[5].any() and not stats.coactivation[:, 5].any()
    assert stats.output_gram[5, 5] > 0 and all(getattr(stats, f).isfinite().all() for f in TENSOR_FIELDS)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.3.up_proj.weight",
        "model.layers.2.self_attn.o_proj.weight",
        "model.layers.0.mlp.gate.weight",
        "model.embed_tokens.weight",
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weight_that_is_not_finite_is_named(tiny: Tiny, tmp_path: Path, name: str, value: float) -> None:
    folder = damaged(tiny("olmoe"), tmp_path / "m", lambda tensors: tensors[name].fill_(value))
    with refuses(f"weights must be finite, got NaN or infinity in {name}"):
        calibrated(folder, sequences())


def test_overflow_of_finite_weights_is_told_from_damage(tiny: Tiny, tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.startswith("model.layers.1.mlp.experts."):
                tensor.mul_(1e30)

    with refuses("hidden states must stay finite, got an overflow after decoder layer 1"):
        calibrated(damaged(tiny("olmoe"), tmp_path / "m", enlarge), sequences())


# Without data


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_parameters_alone_give_grams_and_no_tokens(tiny: Tiny, family: str) -> None:
    checkpoint, tensors = open_checkpoint(tiny(family)), tensors_of(tiny(family))
    found = list(parameter_stats(checkpoint, PruneConfig(dtype="float32", calibration="none")))
    assert [stats.layer for stats in found] == [moe.name for moe in checkpoint.moe_layers]
    for stats, moe in zip(found, checkpoint.moe_layers, strict=True):
        num = moe.num_experts
        assert stats.tokens == 0 and not stats.count.any() and not stats.norm_sum.any()
        if family == "gpt_oss":
            fused, down = (tensors[moe.fused[name]].double() for name in ("gate_up_proj", "down_proj"))
            parts = [fused[..., ::2], fused[..., 1::2], down]
        else:
            parts = [torch.stack([tensors[e[suffix]].double() for e in moe.experts]) for suffix in moe.projections]
        for gram, part in zip(stats.weight_gram, parts, strict=True):
            assert_close(gram, part.flatten(1) @ part.flatten(1).T, "weight_gram")
        rows = tensors[next(iter(moe.router.values()))[0]].double()
        assert_close(stats.router_gram, rows @ rows.T, "router_gram")
        assert stats.unit_gram.shape == (num, num) and stats.unit_gram.isfinite().all()


def test_calibrated_statistics_are_completed_by_the_grams(tiny: Tiny) -> None:
    checkpoint = open_checkpoint(tiny("olmoe"))
    config = PruneConfig(dtype="float32")
    measured = calibrated(tiny("olmoe"), sequences(), config)
    alone = {stats.layer: stats for stats in parameter_stats(checkpoint, config)}
    for stats in add_parameter_grams(checkpoint, config, measured):
        for field in TENSOR_FIELDS:
            source = alone if field in ("weight_gram", "unit_gram") else measured
            assert torch.equal(getattr(stats, field), getattr(source[stats.layer], field)), field


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.1.mlp.gate.weight"])
def test_parameters_that_are_not_finite_are_named(tiny: Tiny, tmp_path: Path, name: str) -> None:
    folder = damaged(tiny("olmoe"), tmp_path / "m", lambda tensors: tensors[name][0].fill_(torch.nan))
    with refuses(f"weights must be finite, got NaN or infinity in {name}"):
        list(parameter_stats(open_checkpoint(folder), PruneConfig(calibration="none")))


def test_statistics_agree_with_those_of_reap() -> None:
    golden, folder = SHARED / "golden/reap-qwen3_moe/statistics.safetensors", SHARED / "models/qwen3_moe"
    if not golden.exists() or not folder.exists():
        pytest.skip(
            f"needs {golden.name} of REAP and the model it was measured on in a folder `shared` beside this one"
        )
    expected = load_file(golden)
    ids = expected["input_ids"].long()
    texts = Sequences(ids, torch.ones_like(ids, dtype=torch.bool), ("text",) * len(ids))
    for number, stats in enumerate(
        calibrate(open_checkpoint(folder), texts, PruneConfig(dtype="float32", seq_len=256))
    ):
        count = stats.count.clamp_min(1)
        got = {
            "reap": stats.gated_norm_sum / count,
            "ean_mean": stats.norm_sum / count,
            "ean_sum": stats.norm_sum,
            "weighted_ean_sum": stats.gated_norm_sum,
            "weighted_expert_frequency_sum": stats.gate_sum,
            "max_activations": stats.activation_max,
        }
        assert torch.equal(stats.count, expected[f"expert_frequency.{number}"].long())
        for name, value in got.items():
            reference = expected[f"{name}.{number}"].double()
            assert (value - reference).abs().max() <= 2.0**-16 * reference.abs().max(), (number, name)
    assert number == 5


def test_outputs_reduced_beforehand_count_as_those_given_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, top_k, experts, hidden, inner = 66, 2, 5, 48, 24
    none = torch.zeros(0, dtype=torch.int64)
    single, whole = (LayerRecorder(experts, hidden, none, none, 33, torch.tensor([1, 0, 0, 1])) for _ in range(2))
    gate_up = torch.randn(experts, 2 * inner, hidden, generator=generator) / 7
    down = torch.randn(experts, hidden, inner, generator=generator) / 5
    for first in (0, 2):
        x = torch.randn(tokens, hidden, generator=generator)
        index = torch.rand(tokens, experts - 1, generator=generator).argsort(1)[:, :top_k]  # none for the last
        gates = torch.rand(tokens, top_k, generator=generator)
        mask = torch.rand(2, 33, generator=generator) < 0.7
        for recorder in (single, whole):
            recorder.begin(first, mask)
            valid = recorder.on_input(x, index, gates)
        assert torch.equal(valid, mask.flatten())
        seen = moe_observe(x, index, gates, gate_up, down, valid)
        whole.on_experts(seen)
        for expert in range(experts - 1):
            token, slot = (index == expert).nonzero(as_tuple=True)
            gate, up = (x[token] @ gate_up[expert].T).chunk(2, 1)
            single.on_expert(expert, token, slot, (torch.nn.functional.silu(gate) * up) @ down[expert].T)
        for recorder in (single, whole):
            recorder.finish(torch.arange(2.0 * 33 * hidden).view(2, 33, hidden), torch.ones(2, 33, hidden))
    for name in ("norm_sum", "norm_sq_sum", "norm_max", "absmax", "output_sum", "gated_norm_sum", "relative_sum"):
        assert_close(getattr(whole, name), getattr(single, name), name)
    for name in ("turning_sum", "domain_tokens", "domain_gated_sum"):
        assert_close(getattr(whole, name), getattr(single, name), name)
    assert_close(whole.max[:-1], single.max[:-1], "max")
    assert whole.max[-1] == single.max[-1] == -torch.inf and whole.absmax[-1] == 0
