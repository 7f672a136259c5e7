"""The routed experts of a layer as a module: merged, dropped or all kept, from any source of weights.

>>> experts = MergedExperts(gate_up_proj, down_proj, expert_map=expert_map)  # a router over N experts, C of them left
>>> out = experts(hidden_states, top_k_index, top_k_weights)
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from cprune_kernels import routing
from cprune_kernels.fused_moe import SILU, Activation, Curve, moe_forward


class MergedExperts(nn.Module):
    """out_t = sum_k g_tk y_tk over the experts that a router chose, where several of its experts may share weights.

    Parameters: gate_up_proj [C, 2 I, H], down_proj [C, H, I], and where given gate_up_proj_bias [C, 2 I] and
    down_proj_bias [C, H]; gate_up_proj [C, H, 2 I] and down_proj [C, I, H] if transposed; gate and up alternate if
    interleaved. Buffer expert_map: [N] int64, the expert that stands for each of the router's, -1 for one that was
    dropped; None where the router knows the C experts themselves. A token visits an expert once, with the sum of the
    gates that lead to it.
    """

    def __init__(
        self,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *,
        gate_up_proj_bias: Tensor | None = None,
        down_proj_bias: Tensor | None = None,
        expert_map: Tensor | None = None,
        activation: Activation = SILU,
        transposed: bool = False,
        interleaved: bool = False,
    ) -> None:
        """Takes the tensors as they are, without a copy; parameters stay the parameters they were.

        Raises ValueError where expert_map is not an integer [N] with values in [-1, C).
        """
        super().__init__()
        self.gate_up_proj, self.down_proj = _parameter(gate_up_proj), _parameter(down_proj)
        self.gate_up_proj_bias, self.down_proj_bias = _parameter(gate_up_proj_bias), _parameter(down_proj_bias)
        self.activation, self.transposed, self.interleaved = activation, transposed, interleaved
        self.register_buffer("expert_map", None if expert_map is None else _checked_map(expert_map, len(down_proj)))

    @classmethod
    def from_experts(cls, experts: nn.Module, expert_map: Tensor | None = None) -> MergedExperts:
        """The same layer as an experts module of transformers 5, whose parameters it shares.

        Raises ValueError, naming what the module has, where its experts are not two products around an `Activation`.
        """
        biases = ("gate_up_proj_bias", "down_proj_bias") if experts.has_bias else ()
        return cls(
            experts.gate_up_proj,
            experts.down_proj,
            **{name: getattr(experts, name) for name in biases},
            expert_map=expert_map,
            activation=activation_of(experts),
            transposed=experts.is_transposed,
            interleaved=not experts.is_concatenated,
        )

    @property
    def num_experts(self) -> int:
        """C, the experts whose weights exist."""
        return self.down_proj.shape[0]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run the experts.

        Args:
            hidden_states: [..., H] of the parameters' type.
            top_k_index: [..., K] int32 or int64 with the same leading sizes: the router's choice, of N experts with a
                map, of C without. What lies outside is no expert.
            top_k_weights: [..., K] floating, applied to the experts' outputs.

        Returns [..., H] of the same type. Raises ValueError, in one sentence, for a wrong shape, type or device.
        """
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        index, gates = (x.reshape(-1, x.shape[-1]) for x in (top_k_index, top_k_weights))
        if self.expert_map is not None:
            index, gates = _remap(index, gates, self.expert_map, self.num_experts)
        out = moe_forward(
            hidden,
            index,
            gates,
            self.gate_up_proj,
            self.down_proj,
            gate_up_bias=self.gate_up_proj_bias,
            down_bias=self.down_proj_bias,
            activation=self.activation,
            transposed=self.transposed,
            interleaved=self.interleaved,
        )
        return out.reshape(hidden_states.shape)

    def extra_repr(self) -> str:
        routed = "" if self.expert_map is None else f", routed={len(self.expert_map)}"
        return f"experts={self.num_experts}{routed}, activation={self.activation}"


def activation_of(experts: nn.Module) -> Activation:
    """What the experts of a transformers 5 module do between their two products, known by what it computes.

    `_apply_gate` runs on numbers of every size and sign, and must give what an `Activation` gives, with the limit and
    the factor that the module has: names are many, and a curve that only resembles another would give wrong numbers.
    Raises ValueError, naming what the module has, without a gate, with a norm behind each expert, or for another curve.
    """
    kind = type(experts).__name__
    if not experts.has_gate:
        raise ValueError(f"experts must have a gate, got {kind} with an up projection alone")
    if getattr(experts, "has_post_expert_norm", False):
        raise ValueError(f"experts must end with their down projection, got {kind} with a norm behind it")
    sizes = torch.logspace(-4, 6, 61, dtype=torch.float64)
    values = torch.cat([-sizes, sizes.new_zeros(1), sizes])
    gate, up = (x.flatten() for x in torch.meshgrid(values, values[::5], indexing="ij"))
    both = torch.cat([gate, up]) if experts.is_concatenated else torch.stack([gate, up], dim=1).flatten()
    with torch.no_grad():
        got = experts._apply_gate(both.to(experts.down_proj.device).unsqueeze(0)).squeeze(0).double().cpu()
    # room for a module that computes in float32, and for the cancellation in the left tail of a gelu
    room = 2.0**-42 * gate.abs() * (up.abs() + 1)
    for activation in _candidates(experts):
        want = activation(gate, up)
        if bool(((got - want).abs() <= 2.0**-20 * want.abs() + room).all()):
            return activation
    act = getattr(experts, "act_fn", None)
    name = getattr(act, "__name__", type(act).__name__)
    raise ValueError(
        f"experts must apply {', '.join(map(str, Curve))} to their gate, got {kind} with act_fn {name} in "
        f"{type(experts)._apply_gate.__qualname__}"
    )


def _candidates(experts: nn.Module) -> list[Activation]:
    """The activations that the numbers which the module has can make."""

    def numbers(*names: str) -> list[float]:
        found = (getattr(experts, name, None) for name in names)
        return [float(x) for x in found if isinstance(x, int | float) and math.isfinite(x) and x > 0]

    limits = [None, *numbers("limit", "swiglu_limit")]
    shapes = [(Curve.SILU, alpha) for alpha in (1.0, *numbers("alpha", "swiglu_alpha"))]
    shapes += [(Curve.GELU, 1.0), (Curve.GELU_TANH, 1.0)]
    return [Activation(*shape, limit, shift) for shape, limit, shift in itertools.product(shapes, limits, (0.0, 1.0))]


def _parameter(x: Tensor | None) -> nn.Parameter | None:
    return x if x is None or isinstance(x, nn.Parameter) else nn.Parameter(x)


def _checked_map(expert_map: Tensor, num_experts: int) -> Tensor:
    if expert_map.dim() != 1 or expert_map.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expert_map must be integers [N], got {expert_map.dtype} of shape {list(expert_map.shape)}")
    expert_map = expert_map.long()
    if not expert_map.is_meta and not bool(((expert_map >= -1) & (expert_map < num_experts)).all()):
        low, high = expert_map.aminmax()
        raise ValueError(f"expert_map must lie in [-1, {num_experts}), got values from {int(low)} to {int(high)}")
    return expert_map


def _remap(index: Tensor, gates: Tensor, expert_map: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    if gates.requires_grad and torch.is_grad_enabled():
        return routing.remap_reference(index, gates, expert_map, num_experts)
    return routing.remap(index, gates, expert_map, num_experts)
