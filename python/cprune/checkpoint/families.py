"""Which tensors are experts, which are the router's, and what config.json calls their number: architecture as data.

A new architecture usually needs nothing here: it is recognised by its tensor names. Where it names its projections or
its router differently, it needs one row of a table below.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from cprune.errors import CpruneError

# Names of (gate, up, down) in per-expert layouts: BLOCK.experts.{e}.NAME.weight, each [I, H], [I, H], [H, I].
PROJECTION_NAMES: tuple[tuple[str, str, str], ...] = (
    ("gate_proj", "up_proj", "down_proj"),  # Qwen, OLMoE, DeepSeek, GLM
    ("w1", "w3", "w2"),  # Mixtral, MiniMax
)
# Fused layouts: BLOCK.experts.NAME..., axis 0 is the expert. Suffixes (_bias, _blocks, _scales, ...) ride along.
FUSED_NAMES: tuple[str, str] = ("gate_up_proj", "down_proj")

# Tensors of the router inside the block, one row (or entry) per expert. The axis of the expert is the one of size E.
ROUTER_NAMES: tuple[str, ...] = (
    "gate.weight",
    "gate.bias",
    "gate.e_score_correction_bias",
    "e_score_correction_bias",
    "router.weight",
    "router.bias",
    "moe_statics.e_score_correction_bias",
)

# What config.json calls the number of routed experts and the experts per token. All that are present count.
COUNT_KEYS: tuple[str, ...] = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS: tuple[str, ...] = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k")
RAGGED_KEY = "cprune"  # config.json of a cprune output with per-layer counts: {"experts_per_layer": {"3": 12, ...}}
# and, where a router has more rows than there are experts, "expert_map": {"3": [0, 0, 1, -1, ...]}: row -> expert, or
# -1 for a row whose novice, a vector in BLOCK.experts.novices, answers
NOVICES_NAME = "novices"


@dataclass(frozen=True)
class Architecture:
    """What config.json says, under the names above."""

    model_type: str
    num_experts: int  # E, the scalar of config.json; of a ragged checkpoint, the largest
    top_k: int
    num_layers: int  # decoder layers of the trunk; MoE layers beyond are multi-token-prediction heads
    n_group: int
    topk_group: int
    scored_groups: int  # experts whose scores make a group's score: 2 with a correction bias (DeepSeek-V3), else 1
    quantized: str | None  # quant_method, or None
    experts_per_layer: Mapping[int, int]  # of a ragged cprune output; empty otherwise
    router_rows: Mapping[int, int] = field(default_factory=dict)  # of layers with more of them than experts

    def experts_in(self, index: int) -> int:
        return self.experts_per_layer.get(index, self.num_experts)


@dataclass(frozen=True)
class MoELayer:
    """The tensors of one MoE block, by role. Shared experts and their gates are nobody's business here."""

    name: str  # absolute name on disk, e.g. "model.layers.3.mlp"
    index: int  # number of the decoder layer
    num_experts: int
    trunk: bool  # False for a multi-token-prediction head, which the forward pass never runs
    experts: tuple[Mapping[str, str], ...]  # per-expert layout: per expert {suffix: tensor name}; empty if fused
    fused: Mapping[str, str]  # fused layout: {suffix: tensor name}, axis 0 = expert; empty if per expert
    router: Mapping[str, tuple[str, int]]  # {suffix: (tensor name, axis of the expert)}
    projections: tuple[str, ...]  # suffixes of (gate, up, down), or of (gate_up, down) if fused

    def expert_tensors(self) -> list[str]:
        """Names of all tensors that belong to routed experts."""
        return [*self.fused.values(), *(name for expert in self.experts for name in expert.values())]


def text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """The part of config.json that describes the language model."""
    nested = config.get("text_config")
    if isinstance(nested, dict) and not any(key in config for key in COUNT_KEYS):
        return nested
    return config


def read_architecture(config: Mapping[str, object], *, has_experts: bool) -> Architecture:
    """Read config.json. Raises CpruneError for a dense model and for a MoE whose counts it cannot find."""
    model_type = str(config.get("model_type", "unknown"))
    text = text_config(config)
    counted = [key for key in COUNT_KEYS if isinstance(text.get(key), int) and text[key] > 1]  # type: ignore[operator]
    if not has_experts and counted:
        raise CpruneError(
            f"experts must be tensors named ….experts.…, got none in a model of type {model_type!r} "
            f"whose config.json says {counted[0]} = {text[counted[0]]}"
        )
    if not has_experts:
        raise CpruneError(f"MODEL must be a Mixture-of-Experts model, got the dense model type {model_type!r}")
    counts = {key: text[key] for key in COUNT_KEYS if isinstance(text.get(key), int)}
    top_ks = {key: text[key] for key in TOP_K_KEYS if isinstance(text.get(key), int)}
    if not counts or not top_ks:
        raise CpruneError(
            f"config.json must give the number of experts ({', '.join(COUNT_KEYS)}) and of experts per token "
            f"({', '.join(TOP_K_KEYS)}), got {', '.join(sorted({**counts, **top_ks})) or 'neither'} for {model_type!r}"
        )
    if len(set(counts.values())) > 1:
        raise CpruneError(f"config.json must give one number of experts, got {counts}")
    n_group = int(text.get("n_group") or 1)  # type: ignore[call-overload]
    ragged = config.get(RAGGED_KEY)
    per_layer = ragged.get("experts_per_layer", {}) if isinstance(ragged, dict) else {}
    maps = ragged.get("expert_map", {}) if isinstance(ragged, dict) else {}
    quantization = config.get("quantization_config")
    return Architecture(
        model_type=model_type,
        num_experts=int(next(iter(counts.values()))),  # type: ignore[call-overload]
        top_k=int(next(iter(top_ks.values()))),  # type: ignore[call-overload]
        num_layers=int(text.get("num_hidden_layers") or 0),  # type: ignore[call-overload]
        n_group=n_group,
        topk_group=int(text.get("topk_group") or n_group),  # type: ignore[call-overload]
        scored_groups=1 if text.get("topk_method") == "group_limited_greedy" else 2,
        quantized=str(quantization.get("quant_method", "yes")) if isinstance(quantization, dict) else None,
        experts_per_layer={int(index): int(count) for index, count in per_layer.items()},
        router_rows={int(index): len(expert_map) for index, expert_map in maps.items()},
    )


_PER_EXPERT = re.compile(r"(?P<block>.+)\.experts\.(?P<expert>\d+)\.(?P<suffix>.+)")
_FUSED = re.compile(rf"(?P<block>.+)\.experts\.(?P<suffix>(?:{'|'.join(FUSED_NAMES)}).*)")
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.")


def find_moe_layers(shapes: Mapping[str, tuple[int, ...]], architecture: Architecture) -> tuple[MoELayer, ...]:
    """Group tensors into MoE layers.

    Args:
        shapes: {tensor name: shape} of the whole checkpoint.
    Raises CpruneError, saying what was found, where expert tensors match no layout above, an expert lacks a tensor, a
    router has not one row per expert, or a block holds another tensor that seems to run over the experts.
    """
    per_expert: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    fused: dict[str, dict[str, str]] = defaultdict(dict)
    strange: list[str] = []
    for name in shapes:
        if match := _PER_EXPERT.fullmatch(name):
            per_expert[match["block"]][int(match["expert"])][match["suffix"]] = name
        elif match := _FUSED.fullmatch(name):
            fused[match["block"]][match["suffix"]] = name
        elif ".experts." in name and not (name.endswith(f".experts.{NOVICES_NAME}") and architecture.router_rows):
            strange.append(name)
    if strange:
        raise CpruneError(
            f"expert tensors must be named experts.N.gate_proj/up_proj/down_proj, experts.N.w1/w3/w2 or "
            f"experts.gate_up_proj/down_proj, got {strange[0]} in a model of type {architecture.model_type!r}"
        )
    layers = []
    for block in sorted(per_expert.keys() | fused.keys(), key=_depth):
        if block in per_expert and block in fused:
            raise CpruneError(f"{block} must hold its experts one by one or fused, got both")
        layers.append(_moe_layer(block, per_expert.get(block, {}), fused.get(block, {}), shapes, architecture))
    return tuple(layers)


def _depth(block: str) -> int:
    match = _LAYER.match(block + ".")
    if match is None:
        raise CpruneError(f"MoE blocks must stand in numbered decoder layers (…layers.N.…), got {block}")
    return int(match[1])


def _moe_layer(
    block: str,
    per_expert: Mapping[int, Mapping[str, str]],
    fused: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    architecture: Architecture,
) -> MoELayer:
    index = _depth(block)
    num = architecture.experts_in(index)
    if per_expert:
        if sorted(per_expert) != list(range(num)):
            raise CpruneError(f"{block} must hold experts 0 to {num - 1} as config.json says, got {len(per_expert)}")
        suffixes = set(per_expert[0])
        for expert, tensors in per_expert.items():
            if set(tensors) != suffixes:
                odd = sorted(suffixes ^ set(tensors))[0]
                raise CpruneError(
                    f"{block}: every expert must hold the same tensors, got {odd} not in both 0 and {expert}"
                )
        projections = _per_expert_projections(block, suffixes)
    else:
        for name in fused.values():
            if not shapes[name] or shapes[name][0] != num:
                raise CpruneError(f"{name} must have {num} experts on axis 0, got shape {list(shapes[name])}")
        projections = tuple(next((s for s in sorted(fused) if s.startswith(name)), "") for name in FUSED_NAMES)
        if not all(projections):
            raise CpruneError(f"{block}.experts must hold {' and '.join(FUSED_NAMES)}, got {', '.join(sorted(fused))}")
    return MoELayer(
        name=block,
        index=index,
        num_experts=num,
        trunk=index < architecture.num_layers,
        experts=tuple(dict(per_expert[e]) for e in sorted(per_expert)),
        fused=dict(fused),
        router=_router_tensors(block, architecture.router_rows.get(index, num), shapes),
        projections=projections,
    )


def _per_expert_projections(block: str, suffixes: set[str]) -> tuple[str, ...]:
    stems = {suffix.partition(".")[0] for suffix in suffixes}
    for names in PROJECTION_NAMES:
        if stems == set(names):
            # the first suffix of each projection is its weight (a scale or zero point sorts after it)
            return tuple(min((s for s in suffixes if s.startswith(name + ".")), key=_weight_first) for name in names)
    raise CpruneError(
        f"{block}: the projections of an expert must be named "
        f"{' or '.join('/'.join(names) for names in PROJECTION_NAMES)}, got {', '.join(sorted(stems))}"
    )


def _weight_first(suffix: str) -> tuple[bool, str]:
    return (not suffix.endswith((".weight", ".qweight")), suffix)


def _router_tensors(block: str, num: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, int]]:
    router: dict[str, tuple[str, int]] = {}
    for suffix in ROUTER_NAMES:
        name = f"{block}.{suffix}"
        if name in shapes:
            axes = [axis for axis, size in enumerate(shapes[name]) if size == num]
            if not axes:
                raise CpruneError(f"{name} must have one row for each of {num} experts, got shape {list(shapes[name])}")
            router[suffix] = (name, axes[0])
    if not router:
        raise CpruneError(f"{block} must have a router named {' or '.join(ROUTER_NAMES[:5:4])}, got none")
    for name, shape in shapes.items():
        if not name.startswith(block + ".") or name.startswith((f"{block}.experts.", f"{block}.shared")):
            continue
        if name.removeprefix(f"{block}.") not in router and num in shape[:1]:
            raise CpruneError(
                f"every tensor over the experts must be known, got {name} of shape {list(shape)} in {block}"
            )
    return router
