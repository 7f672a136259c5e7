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
    gates that lead to it. Parameter novices, where given: [D, H], the vectors that answer, times the gate, for the D
    dropped experts in the order of their numbers; without them a dropped expert gives nothing.
    """

    def __init__(
        self,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *,
        gate_up_proj_bias: Tensor | None = None,
        down_proj_bias: Tensor | None = None,
        expert_map: Tensor | None = None,
        novices: Tensor | None = None,
        activation: Activation = SILU,
        transposed: bool = False,
        interleaved: bool = False,
    ) -> None:
        """Takes the tensors as they are, without a copy; parameters stay the parameters they were.

        Raises ValueError where expert_map is not an integer [N] with values in [-1, C), or novices are not [D, H].
        """
        super().__init__()
        self.gate_up_proj, self.down_proj = _parameter(gate_up_proj), _parameter(down_proj)
        self.gate_up_proj_bias, self.down_proj_bias = _parameter(gate_up_proj_bias), _parameter(down_proj_bias)
        self.activation, self.transposed, self.interleaved = activation, transposed, interleaved
        self.register_buffer("expert_map", None if expert_map is None else _checked_map(expert_map, len(down_proj)))
        self.novices = _parameter(_checked_novices(novices, self.expert_map, self.hidden_size))

    @classmethod
    def from_experts(
        cls, experts: nn.Module, expert_map: Tensor | None = None, novices: Tensor | None = None
    ) -> MergedExperts:
        """The same layer as an experts module of transformers 5, whose parameters it shares.

        Raises ValueError, naming what the module has, where its experts are not two products around an `Activation`.
        """
        biases = ("gate_up_proj_bias", "down_proj_bias") if experts.has_bias else ()
        return cls(
            experts.gate_up_proj,
            experts.down_proj,
            **{name: getattr(experts, name) for name in biases},
            expert_map=expert_map,
            novices=novices,
            activation=activation_of(experts),
            transposed=experts.is_transposed,
            interleaved=not experts.is_concatenated,
        )

    @property
    def num_experts(self) -> int:
        """C, the experts whose weights exist."""
        return self.down_proj.shape[0]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.down_proj.shape[2 if self.transposed else 1]

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
        chosen = index, gates = [x.reshape(-1, x.shape[-1]) for x in (top_k_index, top_k_weights)]
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
        if self.novices is not None:
            out = out + self._of_novices(*chosen).to(out.dtype)
        return out.reshape(hidden_states.shape)

    def _of_novices(self, index: Tensor, gates: Tensor) -> Tensor:
        """[T, H]: what the novices give for the choice [T, K] with gates [T, K]."""
        dropped = self.expert_map < 0
        place = torch.where(dropped, dropped.cumsum(0) - 1, len(self.novices))  # [N], D where an expert is left
        place = torch.cat([place, place.new_tensor([len(self.novices)])])
        num = len(self.expert_map)
        rows = torch.where((index >= 0) & (index < num), index.long(), num)
        sums = gates.new_zeros(len(gates), len(self.novices) + 1).scatter_add(1, place[rows], gates)
        return sums[:, :-1].to(self.novices.dtype) @ self.novices

    def extra_repr(self) -> str:
        routed = "" if self.expert_map is None else f", routed={len(self.expert_map)}"
        routed += "" if self.novices is None else f", novices={len(self.novices)}"
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


def _checked_novices(novices: Tensor | None, expert_map: Tensor | None, hidden_size: int) -> Tensor | None:
    if novices is None:
        return None
    shape = "D, H" if expert_map is None or expert_map.is_meta else f"{int((expert_map < 0).sum())}, {hidden_size}"
    if expert_map is None or novices.dim() != 2 or shape not in ("D, H", ", ".join(map(str, novices.shape))):
        beside = "" if expert_map is not None else " without an expert_map"
        raise ValueError(
            f"novices must be [{shape}], a vector for each -1 of expert_map, got {list(novices.shape)}{beside}"
        )
    return novices


def _remap(index: Tensor, gates: Tensor, expert_map: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    if gates.requires_grad and torch.is_grad_enabled():
        return routing.remap_reference(index, gates, expert_map, num_experts)
    return routing.remap(index, gates, expert_map, num_experts)
