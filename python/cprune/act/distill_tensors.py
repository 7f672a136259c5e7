"""What distillation trains: parameters in a model's memory, and the files in which a trained layer waits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cprune import hf
from cprune.checkpoint import Checkpoint, MoELayer
from cprune.checkpoint.families import NOVICES_NAME
from cprune.checkpoint.reader import DTYPES
from cprune.files import write_text
from cprune.merged import ROUTER_ROWS, changed_names, put_tensors, router_rows, suffix_of, taken_tensors
from cprune.plan import LayerPlan, PrunePlan
from cprune.repaired import LayerRepair, digest

BEGUN_NAME = "layers.json"


def trained_names(moe: MoELayer, which: str) -> list[str]:
    """Names on disk of what is trained in a layer: all that its experts have ("experts"), or its "router"'s rows."""
    if which == "experts":
        return moe.expert_tensors()
    return list(router_rows(moe).values())


def trained_parameters(layer: nn.Module, which: str) -> dict[str, nn.Parameter]:
    """The parameters of a decoder layer that `trained_names` are read into, by their names in their module."""
    if which == "experts":
        return {name: p for name, p in hf.find_experts(layer).named_parameters() if name != NOVICES_NAME}
    return {name: p for name, p in hf.find_router(layer).named_parameters() if name in ROUTER_ROWS}


def trained_dtype(checkpoint: Checkpoint, moe: MoELayer, which: str) -> torch.dtype:
    """The data type on disk of what is trained in a layer."""
    return DTYPES[checkpoint.tensors[trained_names(moe, which)[0]].dtype]


@dataclass
class Shelf:
    """The trained layers, in files of all that is not the original's in them, under their names in the output."""

    folder: Path
    checkpoint: Checkpoint  # the original
    compact: Checkpoint  # the student as it was before
    plan: PrunePlan
    before: Mapping[str, LayerRepair]  # what a repair or a merge did to the layers, by name
    which: str
    digests: dict[str, str] = field(default_factory=dict)  # of the finished layers; empty where nothing was better

    def __post_init__(self) -> None:
        begun = self.folder / BEGUN_NAME
        if begun.is_file():
            self.digests = json.loads(begun.read_text())

    def put(self, moe: MoELayer, layer: nn.Module | None) -> None:
        """Keep a layer of the student, which has the trained weights; None where it stays as it was."""
        tensors = {} if layer is None else self._tensors(moe, layer)
        if tensors:
            save_file(tensors, self.file(moe))
        self.digests[moe.name] = digest(tensors.values()) if tensors else ""
        write_text(self.folder / BEGUN_NAME, json.dumps(self.digests))

    def take(self, moe: MoELayer, layer: nn.Module) -> None:
        """Give a layer of the student the weights that were kept of it, if any."""
        if self.digests[moe.name]:
            names = set(trained_names(moe, self.which))
            kept = {name: tensor for name, tensor in load_file(self.file(moe)).items() if name in names}
            put_tensors(layer, moe, whole_plan(moe), kept)

    def file(self, moe: MoELayer) -> Path:
        return self.folder / f"layer-{moe.index:03d}.safetensors"

    def _tensors(self, moe: MoELayer, layer: nn.Module) -> dict[str, torch.Tensor]:
        original = next(other for other in self.checkpoint.moe_layers if other.name == moe.name)
        record = replace(self.before.get(moe.name, LayerRepair(moe.name, None, 0.0, 0.0, "")), distilled=self.which)
        names = changed_names(original, self.plan[moe.name], record)
        ours = [name for name in names if name in set(trained_names(moe, self.which))]
        dtypes = {suffix_of(moe, name): DTYPES[self.compact.tensors[name].dtype] for name in ours}
        trained = taken_tensors(layer, moe, whole_plan(moe), ours, dtypes)
        return {name: trained[name].cpu() if name in trained else self.compact.read(name) for name in names}


def whole_plan(moe: MoELayer) -> LayerPlan:
    """The plan that keeps every expert of a layer, under its own number."""
    every = tuple(range(moe.num_experts))
    return LayerPlan(moe.name, moe.num_experts, every, every, (0.0,) * len(every), every, (1.0,) * len(every))
