"""`MergedExperts` against float64, a token and a slot at a time, within budgets that follow from the data type.

Products are summed in float32, so a sum of n products errs by at most n 2^-24 of the sum of absolute products;
activations and the result are rounded once to the data type, with unit roundoff u. Every curve has slopes below 1.15.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from cprune_kernels.fused_moe import GELU, GELU_TANH, SILU, SWIGLU_OAI, Activation
from cprune_kernels.layer import MergedExperts, activation_of

U32 = 2.0**-24
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
MAPS = {
    "none": (None, 5),
    "merged": ([0, 1, 1, 2, 0, 3, 4, 1], 5),
    "merged and dropped": ([2, -1, 0, 0, -1, 1, 2, 3, 4], 5),
    "all in one": ([0, 0, 0, 0], 1),
    "all dropped": ([-1, -1, -1], 2),
    "ragged": ([6, 5, 4, 3, 2, 1, 0], 7),
}


@dataclass
class Case:
    hidden: Tensor  # [T, H]
    index: Tensor  # [T, K]
    gates: Tensor  # [T, K]


def make(tokens: int, top_k: int, experts: int, width: int, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(tokens)
    return Case(
        hidden=torch.randn(tokens, width, generator=generator).to(dtype),
        index=torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k],
        gates=torch.rand(tokens, top_k, generator=generator),
    )


def module(
    experts: int,
    width: int,
    inner: int,
    dtype: torch.dtype = torch.float32,
    expert_map: list[int] | None = None,
    bias: bool = False,
    activation: Activation = SILU,
    novices: bool = False,
) -> MergedExperts:
    generator = torch.Generator().manual_seed(experts)

    def normal(*size: int, std: float) -> Tensor:
        return (torch.randn(size, generator=generator) * std).to(dtype)

    biases = {}
    if bias:
        biases = {"gate_up_proj_bias": normal(experts, 2 * inner, std=0.3)}
        biases |= {"down_proj_bias": normal(experts, width, std=0.3)}
    return MergedExperts(
        normal(experts, 2 * inner, width, std=width**-0.5),
        normal(experts, width, inner, std=inner**-0.5),
        expert_map=None if expert_map is None else torch.tensor(expert_map),
        novices=normal(expert_map.count(-1), width, std=1.0) if novices else None,
        activation=activation,
        **biases,
    )


def curve(activation: Activation, gate: Tensor) -> Tensor:
    if activation.limit is not None:
        gate = gate.clamp(max=activation.limit)
    if activation in (GELU, GELU_TANH):
        return torch.nn.functional.gelu(gate, approximate="tanh" if activation == GELU_TANH else "none")
    return gate * torch.sigmoid(activation.alpha * gate)


def brute(layer: MergedExperts, case: Case) -> tuple[Tensor, Tensor]:
    """(out, budget), both [T, H] float64."""
    u = ROUNDOFF[case.hidden.dtype]
    gate_up, down = layer.gate_up_proj.detach().double(), layer.down_proj.detach().double()
    width, inner = down.shape[1:]
    zero = torch.zeros((), dtype=torch.float64)
    bias = zero if layer.gate_up_proj_bias is None else layer.gate_up_proj_bias.detach().double()
    bias_down = zero if layer.down_proj_bias is None else layer.down_proj_bias.detach().double()
    out, budget = torch.zeros_like(case.hidden, dtype=torch.float64), torch.zeros_like(case.hidden, dtype=torch.float64)
    for token, slot in torch.ones_like(case.index).nonzero().tolist():
        row = expert = int(case.index[token, slot])
        if layer.expert_map is not None:
            expert = int(layer.expert_map[row])
        if expert < 0:
            if layer.novices is not None:
                novice = layer.novices[int((layer.expert_map[:row] < 0).sum())].detach().double()
                out[token] += case.gates[token, slot].double() * novice
                budget[token] += 3 * u * (case.gates[token, slot] * novice).abs()  # gate, product, both outputs rounded
            continue
        x, g = case.hidden[token].double(), case.gates[token, slot].double()
        gate, up = (gate_up[expert] @ x + (bias[expert] if bias.dim() else zero)).chunk(2)
        gate_error, up_error = ((width + 4) * U32 * (gate_up[expert].abs() @ x.abs() + bias.abs().max())).chunk(2)
        if layer.activation.limit is not None:
            up = up.clamp(-layer.activation.limit, layer.activation.limit)
        up, f = up + layer.activation.shift, curve(layer.activation, gate)
        act = f * up
        act_error = 1.15 * gate_error * (up.abs() + up_error) + f.abs() * up_error
        # the tail of a gelu is a difference of numbers of the size of the gate
        act_error = act_error + (u + 8 * U32) * (act.abs() + act_error) + 8 * U32 * gate.abs() * up.abs()
        y = down[expert] @ act + (bias_down[expert] if bias_down.dim() else zero)
        error = down[expert].abs() @ (act_error + (inner + 4) * U32 * (act.abs() + act_error)) + 4 * U32 * y.abs()
        out[token] += g * y
        budget[token] += g * (error + 16 * U32 * (y.abs() + error))  # the sum of gates, the combine
    return out, budget + u * (out.abs() + budget)


def assert_within_budget(layer: MergedExperts, case: Case, got: Tensor) -> None:
    want, budget = brute(layer, case)
    assert got.shape == want.shape and got.dtype == case.hidden.dtype
    assert bool(((got.double() - want).abs() <= budget).all())


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_every_number_is_that_of_float64(name: str, dtype: torch.dtype) -> None:
    expert_map, experts = MAPS[name]
    routed = experts if expert_map is None else len(expert_map)
    layer = module(experts, 50, 26, dtype, expert_map)
    for tokens in (131, 1):
        case = make(tokens, 3 if routed > 3 else 2 if routed > 1 else 1, routed, 50, dtype)
        got = layer(case.hidden, case.index, case.gates)
        assert_within_budget(layer, case, got)
        assert bool(got.any()) == (name != "all dropped")


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize("name", ["merged and dropped", "all dropped"])
def test_novices_answer_for_dropped_experts(name: str, dtype: torch.dtype) -> None:
    expert_map, experts = MAPS[name]
    layer = module(experts, 50, 26, dtype, expert_map, novices=True)
    assert f"novices={expert_map.count(-1)}" in repr(layer) and "novices" in layer.state_dict()
    for tokens in (131, 1):
        case = make(tokens, 2, len(expert_map), 50, dtype)
        case.index[0, 0] = len(expert_map)  # no expert, and no novice
        case.gates[0, 0] = 0.0
        got = layer(case.hidden, case.index, case.gates)
        case.index[0, 0] = 0
        assert_within_budget(layer, case, got)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [SILU, GELU, GELU_TANH, SWIGLU_OAI, Activation(limit=0.5)], ids=str)
def test_activations_and_biases(activation: Activation, bias: bool) -> None:
    layer = module(5, 48, 24, expert_map=[0, 1, 1, -1, 2, 3, 4], bias=bias, activation=activation)
    case = make(131, 3, 7, 48, torch.float32)
    case.hidden *= 3
    assert_within_budget(layer, case, layer(case.hidden, case.index, case.gates))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_layouts_of_the_same_weights_give_the_same(transposed: bool, interleaved: bool) -> None:
    plain = module(5, 48, 24, bias=True)
    gate_up, bias, down = plain.gate_up_proj.detach(), plain.gate_up_proj_bias.detach(), plain.down_proj.detach()
    if interleaved:
        gate_up = gate_up.unflatten(1, (2, 24)).transpose(1, 2).flatten(1, 2)
        bias = bias.unflatten(1, (2, 24)).transpose(1, 2).flatten(1, 2)
    if transposed:
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    other = MergedExperts(
        gate_up,
        down,
        gate_up_proj_bias=bias,
        down_proj_bias=plain.down_proj_bias,
        transposed=transposed,
        interleaved=interleaved,
    )
    case = make(131, 2, 5, 48, torch.float32)
    assert other.num_experts == 5
    assert_within_budget(plain, case, other(case.hidden, case.index, case.gates))


def test_leading_dimensions_are_kept() -> None:
    layer = module(5, 48, 24, expert_map=[0, 1, 1, 2, 3, 4])
    case = make(30, 2, 6, 48, torch.float32)
    want = layer(case.hidden, case.index, case.gates)
    got = layer(case.hidden.view(2, 3, 5, 48), case.index.view(2, 3, 5, 2), case.gates.view(2, 3, 5, 2))
    assert torch.equal(got, want.view(2, 3, 5, 48))
    assert layer(case.hidden[:0], case.index[:0], case.gates[:0]).shape == (0, 48)


def test_a_token_visits_a_merged_expert_once_with_the_sum_of_its_gates() -> None:
    merged = module(1, 48, 24, expert_map=[0, 0, 0])
    alone = MergedExperts(merged.gate_up_proj, merged.down_proj)
    case = make(131, 3, 3, 48, torch.float32)
    total = case.gates[:, :1] + case.gates[:, 1:2] + case.gates[:, 2:]
    want = alone(case.hidden, torch.zeros(131, 1, dtype=torch.int64), total)
    assert torch.equal(merged(case.hidden, case.index, case.gates), want)


@pytest.mark.parametrize(
    ("expert_map", "novices"),
    [(None, False), ([0, 1, -1, 1, 2], False), ([0, 1, -1, 1, 2], True)],
    ids=["plain", "merged", "novices"],
)
def test_gradients_are_those_of_the_formula(expert_map: list[int] | None, novices: bool) -> None:
    layer = module(3, 20, 12, expert_map=expert_map, bias=True, novices=novices)
    case = make(31, 2, 3 if expert_map is None else 5, 20, torch.float32)
    case.hidden.requires_grad_(), case.gates.requires_grad_()
    target = torch.randn(31, 20, generator=torch.Generator().manual_seed(7))
    layer(case.hidden, case.index, case.gates).backward(target)

    leaves = {name: x.detach().double().requires_grad_() for name, x in layer.named_parameters()}
    hidden, gates = (x.detach().double().requires_grad_() for x in (case.hidden, case.gates))
    gate_up = torch.einsum("th,eih->tei", hidden, leaves["gate_up_proj"]) + leaves["gate_up_proj_bias"]
    act = torch.nn.functional.silu(gate_up[..., :12]) * gate_up[..., 12:]
    every = torch.einsum("tei,ehi->teh", act, leaves["down_proj"]) + leaves["down_proj_bias"]
    expert = case.index if expert_map is None else torch.tensor(expert_map)[case.index]
    chosen = every.gather(1, expert.clamp_min(0).unsqueeze(2).expand(-1, -1, 20))
    given = (gates * (expert >= 0)).unsqueeze(2) * chosen
    if novices:
        given = given + (gates * (expert < 0)).unsqueeze(2) * leaves["novices"][0]
    given.sum(1).backward(target.double())

    pairs = [(case.hidden, hidden), (case.gates, gates)]
    pairs += [(parameter, leaves[name]) for name, parameter in layer.named_parameters()]
    for got, want in pairs:
        assert got.grad is not None and want.grad is not None
        assert (got.grad - want.grad).abs().max() <= 2.0**-16 * want.grad.abs().max()  # sums of float32


@pytest.mark.parametrize(
    ("expert_map", "novices"),
    [(None, False), ([0, 1, -1, 1, 2], False), ([0, 1, -1, 1, 2], True)],
    ids=["plain", "merged", "novices"],
)
def test_it_compiles_without_a_break(expert_map: list[int] | None, novices: bool) -> None:
    torch._dynamo.reset()
    layer = module(3, 48, 24, expert_map=expert_map, novices=novices).requires_grad_(False)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for tokens in (31, 7):
        case = make(tokens, 2, 3 if expert_map is None else 5, 48, torch.float32)
        got = compiled(case.hidden, case.index, case.gates)
        assert torch.equal(got, layer(case.hidden, case.index, case.gates))


def test_inference_mode_changes_no_bit() -> None:
    layer = module(5, 48, 24, torch.bfloat16, [0, 1, 1, -1, 2, 3, 4])
    case = make(131, 2, 7, 48, torch.bfloat16)
    with torch.inference_mode():
        got = layer(case.hidden, case.index, case.gates)
    assert torch.equal(got, layer.requires_grad_(False)(case.hidden, case.index, case.gates))


def test_state_goes_round() -> None:
    layer, other = (module(5, 48, 24, expert_map=[4, 3, 2, 1, 0, -1], bias=True) for _ in range(2))
    assert set(layer.state_dict()) == {
        *("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias", "expert_map")
    }
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(layer.state_dict())
    case = make(31, 2, 6, 48, torch.float32)
    want = layer(case.hidden, case.index, case.gates)
    for twin in (other, copy.deepcopy(layer)):
        assert torch.equal(twin(case.hidden, case.index, case.gates), want)
    assert set(module(5, 48, 24).state_dict()) == {"gate_up_proj", "down_proj"}


class Experts(nn.Module):
    """What transformers gives to a class with its experts contract."""

    has_gate, has_bias, has_post_expert_norm, is_transposed, is_concatenated = True, False, False, False, True

    def __init__(self, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 48, 48, generator=torch.Generator().manual_seed(0)))
        self.down_proj = nn.Parameter(torch.randn(3, 48, 24, generator=torch.Generator().manual_seed(1)))
        self.act_fn = act_fn

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return self.act_fn(gate) * up


class Clamped(Experts):
    limit, alpha = 2.0, 1.5

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(gate * self.alpha) * (up + 1)


def test_parameters_of_another_module_are_shared() -> None:
    experts = Experts(nn.GELU())
    layer = MergedExperts.from_experts(experts, torch.tensor([0, 1, 2, 2, -1]))
    assert layer.gate_up_proj is experts.gate_up_proj and layer.down_proj is experts.down_proj
    assert layer.activation == GELU and "routed=5" in repr(layer)
    case = make(31, 2, 5, 48, torch.float32)
    assert_within_budget(layer, case, layer(case.hidden, case.index, case.gates))


def test_activations_are_known_by_what_they_compute() -> None:
    for act, activation in ((nn.SiLU(), SILU), (nn.GELU(), GELU), (nn.GELU("tanh"), GELU_TANH)):
        assert activation_of(Experts(act)) == activation
    assert activation_of(Clamped(nn.SiLU())) == Activation(alpha=1.5, limit=2.0, shift=1.0)


@pytest.mark.parametrize(
    ("experts", "sentence"),
    [
        (Experts(nn.ReLU()), "experts must apply silu, gelu, gelu_tanh to their gate, got Experts with act_fn ReLU in"),
        (Experts(nn.SiLU()), "experts must have a gate, got Experts with an up projection alone"),
        (Experts(nn.SiLU()), "experts must end with their down projection, got Experts with a norm behind it"),
        (Clamped(nn.SiLU()), "experts must apply silu, gelu, gelu_tanh to their gate, got Clamped with act_fn SiLU in"),
    ],
)
def test_other_experts_are_refused(experts: Experts, sentence: str) -> None:
    experts.has_gate = "have a gate" not in sentence
    experts.has_post_expert_norm = "norm behind" in sentence
    if isinstance(experts, Clamped):
        experts.__dict__["_apply_gate"] = lambda both: Clamped._apply_gate(SimpleNamespace(limit=5.0, alpha=1.5), both)
    with pytest.raises(ValueError, match=f"^{sentence}[^\n]*$"):
        MergedExperts.from_experts(experts)


@pytest.mark.parametrize(
    ("expert_map", "sentence"),
    [
        (torch.tensor([0, 5]), r"expert_map must lie in \[-1, 5\), got values from 0 to 5"),
        (torch.tensor([-2, 4]), r"expert_map must lie in \[-1, 5\), got values from -2 to 4"),
        (torch.tensor([0.0, 1.0]), r"expert_map must be integers \[N\], got torch.float32 of shape \[2\]"),
        (torch.tensor([[0, 1]]), r"expert_map must be integers \[N\], got torch.int64 of shape \[1, 2\]"),
        (torch.tensor([True, False]), r"expert_map must be integers \[N\], got torch.bool of shape \[2\]"),
    ],
)
def test_maps_that_lead_nowhere_are_refused(expert_map: Tensor, sentence: str) -> None:
    weights = torch.zeros(5, 48, 48), torch.zeros(5, 48, 24)
    with pytest.raises(ValueError, match=f"^{sentence}[^\n]*$"):
        MergedExperts(*weights, expert_map=expert_map)


def test_other_novices_are_refused() -> None:
    weights, some = (torch.zeros(5, 48, 48), torch.zeros(5, 48, 24)), torch.zeros(2, 48)
    sentence = r"novices must be \[1, 48\], a vector for each -1 of expert_map, got \[2, 48\]"
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        MergedExperts(*weights, expert_map=torch.tensor([0, -1]), novices=some)
    with pytest.raises(ValueError, match=r"^novices must be \[D, H\].* got \[2, 48\] without an expert_map$"):
        MergedExperts(*weights, novices=some)


def test_wrong_inputs_are_refused_in_a_sentence() -> None:
    layer, case = module(5, 48, 24), make(31, 2, 5, 48, torch.float32)
    with pytest.raises(ValueError, match=r"^down must be a torch.bfloat16"):
        layer(case.hidden.bfloat16(), case.index, case.gates)
    with pytest.raises(ValueError, match=r"^index must be an"):
        layer(case.hidden, case.index[1:], case.gates)
