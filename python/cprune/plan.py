"""PrunePlan: what to keep, layer by layer, and why (decide -> act).

Left of it nothing mutates, right of it nothing is decided.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cprune.errors import CpruneError

PLAN_VERSION = 1


@dataclass(frozen=True)
class LayerPlan:
    """The decision for one MoE layer of E experts."""

    layer: str  # absolute name of the MoE block on disk, e.g. "model.layers.3.mlp"
    num_experts: int  # E
    kept: tuple[int, ...]  # [C] original indices, ascending
    cluster: tuple[int, ...]  # [E] label of the layer-stage cluster, 0 .. number of clusters - 1
    score: tuple[float, ...]  # [E] importance at the moment of the decision; comparable across layers
    stand_in: tuple[int, ...]  # [E] the kept expert most similar to this one; itself where kept
    similarity: tuple[float, ...]  # [E] similarity to the stand-in; 1 where kept

    def __post_init__(self) -> None:
        num, kept = self.num_experts, self.kept
        if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= num:
            raise CpruneError(
                f"{self.layer}: kept must be ascending expert numbers below {num}, at least one, got {list(kept)}"
            )
        for name in ("cluster", "score", "stand_in", "similarity"):
            if len(getattr(self, name)) != num:
                raise CpruneError(f"{self.layer}: {name} must have {num} entries, got {len(getattr(self, name))}")
        outside = sorted(set(self.stand_in) - set(kept))
        if outside:
            raise CpruneError(f"{self.layer}: stand_in must name kept experts, got {outside}")

    @property
    def dropped(self) -> tuple[int, ...]:
        """Original indices of the removed experts, ascending."""
        return tuple(sorted(set(range(self.num_experts)) - set(self.kept)))


@dataclass(frozen=True)
class PrunePlan:
    """The whole decision: readable, diffable, and bound to the checkpoint it was made for."""

    fingerprint: str  # of the source checkpoint; `apply` refuses another
    model_type: str
    layers: tuple[LayerPlan, ...]
    config: dict[str, object] = field(default_factory=dict)  # PruneConfig.to_dict() of the run that decided
    versions: dict[str, str] = field(default_factory=dict)  # of cprune and the libraries that decided

    def __getitem__(self, layer: str) -> LayerPlan:
        for plan in self.layers:
            if plan.layer == layer:
                return plan
        raise KeyError(layer)

    @property
    def uniform(self) -> bool:
        """Whether every layer keeps the same number of experts, so that a stock checkpoint can hold them."""
        return len({len(layer.kept) for layer in self.layers}) == 1

    @property
    def removed_share(self) -> float:
        """Removed routed experts over all routed experts."""
        total = sum(layer.num_experts for layer in self.layers)
        return 1.0 - sum(len(layer.kept) for layer in self.layers) / total

    def to_json(self) -> str:
        """JSON text, one line per list, ending in a newline."""
        head = {"cprune_plan": PLAN_VERSION, "fingerprint": self.fingerprint, "model_type": self.model_type}
        parts = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        parts.append(' "config": ' + json.dumps(self.config))
        parts.append(' "versions": ' + json.dumps(self.versions))
        layers = []
        for layer in self.layers:
            rows = [f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in asdict(layer).items()]
            layers.append("  {\n" + ",\n".join(rows) + "\n  }")
        parts.append(' "layers": [\n' + ",\n".join(layers) + "\n ]")
        return "{\n" + ",\n".join(parts) + "\n}\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, whole or not at all."""
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        try:
            partial.write_text(self.to_json())
        except OSError as error:
            raise CpruneError(f"the plan must be writable, got {target} ({error.strerror})") from error
        partial.replace(target)

    @classmethod
    def from_json(cls, text: str, name: str = "the plan") -> PrunePlan:
        """Parse `to_json`; CpruneError, naming `name`, where it is not a plan."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise CpruneError(f"{name} must be JSON, got {error}") from error
        if not isinstance(values, dict) or values.get("cprune_plan") != PLAN_VERSION:
            raise CpruneError(f"{name} must be a cprune plan of version {PLAN_VERSION}, got something else")
        kinds = {"fingerprint": str, "model_type": str, "config": dict, "versions": dict, "layers": list}
        for key, kind in kinds.items():
            if not isinstance(values.get(key), kind):
                raise CpruneError(f"{name} must hold every field of a plan, got {values.get(key)!r:.40} for {key}")
        try:
            layers = tuple(_layer_plan(layer) for layer in values["layers"])
            plan = cls(values["fingerprint"], values["model_type"], layers, values["config"], values["versions"])
        except (CpruneError, KeyError, TypeError, ValueError) as error:
            raise CpruneError(f"{name} must hold every field of a plan, got a fault in {error}") from error
        if not layers:
            raise CpruneError(f"{name} must name at least one layer, got none")
        return plan

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PrunePlan:
        """Read what `save` wrote."""
        try:
            text = Path(path).read_text()
        except OSError as error:
            raise CpruneError(f"the plan must be readable, got {path} ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise CpruneError(f"the plan must be JSON text, got {path} (not UTF-8)") from error
        return cls.from_json(text, str(path))


def _layer_plan(values: dict[str, object]) -> LayerPlan:
    lists: dict[str, Sequence[object]] = {
        key: values[key] for key in ("kept", "cluster", "score", "stand_in", "similarity")
    }  # type: ignore[assignment,misc]
    return LayerPlan(
        layer=str(values["layer"]),
        num_experts=int(values["num_experts"]),  # type: ignore[call-overload]
        kept=tuple(int(x) for x in lists["kept"]),  # type: ignore[call-overload]
        cluster=tuple(int(x) for x in lists["cluster"]),  # type: ignore[call-overload]
        score=tuple(float(x) for x in lists["score"]),  # type: ignore[arg-type]
        stand_in=tuple(int(x) for x in lists["stand_in"]),  # type: ignore[call-overload]
        similarity=tuple(float(x) for x in lists["similarity"]),  # type: ignore[arg-type]
    )
