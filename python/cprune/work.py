"""The work folder beside OUT: the statistics of a run, so that a rerun need not measure again, and its plan to read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cprune.errors import CpruneError
from cprune.files import write_text
from cprune.repaired import LayerRepair, Passed, Repairs
from cprune.stats import ExpertStats

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkFolder:
    """Results of finished stages, each bound to what it was made from."""

    path: Path

    @property
    def plan_path(self) -> Path:
        return self.path / "plan.json"

    def check(self, **apart_from: Path) -> None:
        """Raise CpruneError unless the folder can be written and lies outside the folders given, {what it is: path}."""
        place = self.path.resolve()
        for name, folder in apart_from.items():
            if folder.resolve() in (place, *place.parents):
                raise CpruneError(f"the work folder must lie outside {name}, got {self.path}")
        parent = next(folder for folder in (place, *place.parents) if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise CpruneError(f"the work folder must be writable, got {self.path}")

    def stats(
        self, source: str, measure: Callable[[], Iterator[ExpertStats]], *, sequences: bool = False
    ) -> dict[str, ExpertStats]:
        """The statistics measured from `source`, read where they are already here, else measured and kept.

        Args:
            source: all that the statistics depend on, as text; other statistics in the folder are replaced.
            measure: called where they have to be measured, before anything here changes; yields them layer by layer.
            sequences: whether to hold `sequence_outputs`, which only cprune-paper reads, in memory too.
        """
        key = key_of(source)
        found = self._read(key, sequences)
        if found is not None:
            return found
        measured = measure()
        self._make()
        self._index.unlink(missing_ok=True)
        names = []
        for number, stats in enumerate(measured):
            stats.save(self._layer(number))
            names.append(stats.layer)
        self._index.write_text(json.dumps({"key": key, "layers": names}) + "\n")
        return self._load(names, sequences)

    def complete_stats(self, stats: Mapping[str, ExpertStats], fields: Sequence[str]) -> None:
        """Keep the `fields` of `stats`, which were not measured before, with what is here of the same source."""
        for number, layer in enumerate(stats.values()):
            whole = ExpertStats.load(self._layer(number))
            replace(whole, **{name: getattr(layer, name) for name in fields}).save(self._layer(number))

    @property
    def gradients_path(self) -> Path:
        """The folder of what a backward pass needs meanwhile."""
        return self.path / "gradients"

    def repairs(
        self,
        source: str,
        repair: Callable[[Passed | None], Iterator[tuple[LayerRepair, dict[str, torch.Tensor], Passed]]],
    ) -> Repairs:
        """The repair made from `source`; what of it is already here is not made again.

        Args:
            source: all that the repair depends on, as text; another repair in the folder is replaced.
            repair: yields every layer after the one passed last: its record, its changed tensors, and where it is then.
        """
        key = key_of(source)
        finished = self._found_repairs(self._repairs, key)
        if finished is not None:
            return finished
        begun = self._found_repairs(self._begun, key)
        layers = list(begun.layers) if begun else []
        passed = self._passed(layers)
        if passed is None:
            layers = []
            self.forget_repairs()
        self._make()
        for record, tensors, now in repair(passed):
            try:
                if tensors:
                    save_file({n: x.contiguous() for n, x in tensors.items()}, self._repaired(len(layers)))
                layers.append(record)
                save_file(dict(now.hidden), self._hidden(len(layers)))
                write_text(self._begun, Repairs(key, tuple(layers)).to_json())
            except (OSError, SafetensorError) as error:
                raise CpruneError(f"the work folder must be writable, got {self.path} ({error})") from error
            self._hidden(len(layers) - 1).unlink(missing_ok=True)
        write_text(self._repairs, Repairs(key, tuple(layers)).to_json())
        self._hidden(len(layers)).unlink(missing_ok=True)
        return self._with_files(Repairs(key, tuple(layers)))

    def _passed(self, layers: Sequence[LayerRepair]) -> Passed | None:
        """Where the repair of `layers` stopped; None before the first, or where its hidden states are gone."""
        try:
            return Passed(layers[-1].layer, load_file(self._hidden(len(layers)))) if layers else None
        except (OSError, SafetensorError) as error:
            log.warning("repairing again: the hidden states after %s must be here, got %s", layers[-1].layer, error)
            return None

    @property
    def distill_path(self) -> Path:
        """The folder of a distillation."""
        return self.path / "distill"

    def forget_repairs(self) -> None:
        """Remove the repair and what was trained, which the output holds as soon as it is written."""
        shutil.rmtree(self.distill_path, ignore_errors=True)
        for path in (self._repairs, self._begun, *self.path.glob("repair-*.safetensors")):  # of tensors and states
            path.unlink(missing_ok=True)

    def _found_repairs(self, path: Path, key: str) -> Repairs | None:
        try:
            found = self._with_files(Repairs.load(path)) if path.exists() else None
        except CpruneError as error:
            log.warning("repairing again: %s", error)
            return None
        return found if found and found.key == key and all(file.is_file() for file in found.files) else None

    def _with_files(self, repairs: Repairs) -> Repairs:
        files = [self._repaired(number) for number, layer in enumerate(repairs.layers) if layer.digest]
        return replace(repairs, files=tuple(files))

    @property
    def _repairs(self) -> Path:
        return self.path / "repair.json"

    @property
    def _begun(self) -> Path:
        return self.path / "repair-begun.json"

    def _hidden(self, layers: int) -> Path:
        return self.path / f"repair-hidden-{layers:03d}.safetensors"

    def _repaired(self, number: int) -> Path:
        return self.path / f"repair-{number:03d}.safetensors"

    @property
    def _index(self) -> Path:
        return self.path / "stats.json"

    def _layer(self, number: int) -> Path:
        return self.path / f"stats-{number:03d}.safetensors"

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CpruneError(f"the work folder must be writable, got {self.path} ({error.strerror})") from error

    def _read(self, key: str, sequences: bool) -> dict[str, ExpertStats] | None:
        try:
            index = json.loads(self._index.read_text())
        except (OSError, json.JSONDecodeError):
            return None  # nothing finished here
        if not isinstance(index, dict) or index.get("key") != key:
            return None
        try:
            return self._load(index["layers"], sequences)
        except CpruneError as error:
            log.warning("measuring again: %s", error)
            return None

    def _load(self, names: list[str], sequences: bool) -> dict[str, ExpertStats]:
        return {name: ExpertStats.load(self._layer(number), sequences=sequences) for number, name in enumerate(names)}


def key_of(source: str) -> str:
    """The key under which results made from `source` are kept."""
    return hashlib.sha256(source.encode()).hexdigest()
