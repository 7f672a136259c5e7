"""Repairs: what a repair, a merge or a distillation did to the kept experts, layer by layer (act -> prove).

The tensors themselves wait in files until they are written; what stays beside the output is the record of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from cprune.errors import CpruneError

REPAIRS_VERSION = 2
ROWS_KEPT = "kept"  # the router has the kept experts' rows as they were
MAP = "map"  # the router has rows of dropped experts too, and a map leads from rows to the experts that are left
REFITTED = "refitted"  # the router has the kept experts' rows, and a repair has changed them
NOVICES = "novices"  # the router has all its rows, and a vector of its own answers for a dropped expert


@dataclass(frozen=True)
class LayerRepair:
    """What became of one MoE layer. Errors are of the layer's output, relative, on tokens held back from the fit."""

    layer: str  # absolute name of the MoE block on disk
    ridge: float | None  # of the refit, in units of the fit's mean diagonal; None: left as it was
    before: float  # error without the repair of this layer, those before it repaired
    after: float  # error with it; `before` where the layer was left as it was
    digest: str  # `digest` of the changed tensors as they are written; empty where all are as they were
    whole: bool = False  # of a repair: gate and up projections were refitted too
    merged: tuple[int, ...] = ()  # of a merge: the kept experts, by their numbers in the original, that are others now
    router: str = ""  # of a merge: how rows were folded (ROWS_KEPT or another), or MAP; of a repair: REFITTED, NOVICES
    mapped: tuple[int, ...] = ()  # the dropped experts that the router still knows; stand-ins or NOVICES answer
    distilled: str = ""  # what of the layer was trained after that: "router" or "experts" (`Repairs.distilled`)

    @property
    def maker(self) -> str:
        """Who wrote the changed tensors, the last of several: "repair", "merge" or "training"."""
        if self.distilled:
            return "training"
        return "repair" if self.router in ("", REFITTED, NOVICES) else "merge"

    @property
    def changes(self) -> bool:
        """Whether the layer is other than pruned."""
        return bool(self.digest or self.mapped)

    @property
    def folds(self) -> bool:
        """Whether the router's rows are others than the original's."""
        return self.router not in ("", ROWS_KEPT, MAP, NOVICES)


@dataclass(frozen=True)
class Passed:
    """How far a walk through the layers has come."""

    layer: str  # the MoE block that it passed last
    hidden: Mapping[str, torch.Tensor]  # "original" and "compact", [T, H]: both models' hidden states after that layer


@dataclass(frozen=True)
class Distillation:
    """The training of the compact model after all else. Errors are on the text held back, untrained and as written."""

    trained: str  # "router" or "experts"
    steps: int  # taken; of each layer, layer by layer
    whole: bool  # towards the original's logits; else layer by layer, towards its hidden states
    before: float  # KL(original || compact) of the next token, nats
    after: float
    best_step: int | None = None  # of the whole model: after which step it was best; 0: never better than untrained
    digests: Mapping[str, str] = field(default_factory=dict)  # {layer: of all in it that is not the original's}


@dataclass(frozen=True)
class Repairs:
    """What was done to a whole model besides slicing it."""

    key: str  # of all that it was made from
    layers: tuple[LayerRepair, ...]  # of the repair or merge; empty where there was none
    files: tuple[Path, ...] = ()  # safetensors of the changed tensors, under their names in the output
    distillation: Distillation | None = None

    @property
    def changed(self) -> dict[str, LayerRepair]:
        """The layers that are other than pruned, by name, each with the digest of all that was changed in it."""
        changed = {layer.layer: layer for layer in self.layers if layer.changes}
        if self.distillation is not None:
            before, trained = {layer.layer: layer for layer in self.layers}, self.distillation.trained
            for name, digest in self.distillation.digests.items():
                record = before.get(name, LayerRepair(name, None, 0.0, 0.0, ""))
                changed[name] = replace(record, digest=digest, distilled=trained)
        return changed

    def to_json(self) -> str:
        """JSON text of all but the files, ending in a newline."""
        values = {"cprune_repairs": REPAIRS_VERSION, "key": self.key, "layers": [asdict(x) for x in self.layers]}
        values["distillation"] = None if self.distillation is None else asdict(self.distillation)
        return json.dumps(values, indent=1) + "\n"

    @classmethod
    def load(cls, path: Path) -> Repairs:
        """Read `to_json` from a file; CpruneError where it is not that."""
        try:
            values = json.loads(path.read_text())
            if values["cprune_repairs"] != REPAIRS_VERSION:
                raise ValueError("another version")
            layers = (
                LayerRepair(**{**layer, **{name: tuple(layer.get(name, ())) for name in ("merged", "mapped")}})
                for layer in values["layers"]
            )
            trained = values.get("distillation")
            distillation = None if trained is None else Distillation(**trained)
            return cls(str(values["key"]), tuple(layers), distillation=distillation)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CpruneError(
                f"{path} must be the record of a repair as this version writes it, got {error}"
            ) from error


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """sha256 of the tensors' bytes, one after the other."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()
