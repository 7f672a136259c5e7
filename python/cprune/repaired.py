"""Repairs: what a repair did to the kept experts, layer by layer (act -> prove).

The tensors themselves wait in files until they are written; what stays beside the output is the record of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cprune.errors import CpruneError

REPAIRS_VERSION = 2
ROWS_KEPT = "kept"  # the router has the kept experts' rows as they were
MAP = "map"  # the router has rows of dropped experts too, and a map leads from rows to the experts that are left


@dataclass(frozen=True)
class LayerRepair:
    """What became of one MoE layer. Errors are of the layer's output, relative, on tokens held back from the fit."""

    layer: str  # absolute name of the MoE block on disk
    ridge: float | None  # the experts' median, in units of the Gram matrices' mean diagonal; None: left as it was
    before: float  # error without the repair of this layer, those before it repaired
    after: float  # error with it; `before` where the layer was left as it was
    digest: str  # `digest` of the changed tensors as they are written; empty where all are as they were
    merged: tuple[int, ...] = ()  # of a merge: the kept experts, by their numbers in the original, that are others now
    router: str = ""  # of a merge: how the router's rows were folded (ROWS_KEPT or another), or MAP
    mapped: tuple[int, ...] = ()  # of MAP: the dropped experts that the router still knows; their stand-ins answer

    @property
    def merges(self) -> bool:
        """Whether a merge left the layer other than pruned."""
        return bool(self.merged or self.mapped or self.folds)

    @property
    def folds(self) -> bool:
        """Whether the router's rows are others than the original's."""
        return self.router not in ("", ROWS_KEPT, MAP)


@dataclass(frozen=True)
class Repairs:
    """The repair of a whole model."""

    key: str  # of all that it was made from
    layers: tuple[LayerRepair, ...]
    files: tuple[Path, ...] = ()  # safetensors of the repaired tensors, under their names in the output

    @property
    def changed(self) -> dict[str, LayerRepair]:
        """The layers of which a tensor was changed, by name."""
        return {layer.layer: layer for layer in self.layers if layer.digest}

    @property
    def merged(self) -> dict[str, LayerRepair]:
        """The layers of a merge that it left other than pruned, by name."""
        return {layer.layer: layer for layer in self.layers if layer.merges or (layer.router and layer.digest)}

    def to_json(self) -> str:
        """JSON text of all but the files, ending in a newline."""
        values = {"cprune_repairs": REPAIRS_VERSION, "key": self.key, "layers": [asdict(x) for x in self.layers]}
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
            return cls(str(values["key"]), tuple(layers))
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
