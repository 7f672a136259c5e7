"""PruneConfig: every choice of a pruning run, checked at construction. The command line is derived from it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from cprune.errors import CpruneError

# fmt: off
Method = Literal[
    "cprune", "cprune-paper",
    "expected", "relative", "contribution", "reap", "frequency", "gate", "seer", "ean", "ean-mean", "man", "msan",
    "easy-ep", "mone", "fisher", "taylor", "random", "hc-smoe", "m-smoe", "ream", "group-merge", "group-merge-weights",
    "mop", "naee",
]
# fmt: on
Budget = Literal["global", "uniform"]
Repair = Literal["auto", "experts", "down", "router", "none"]
Action = Literal["prune", "merge"]
Router = Literal["fold", "map"]
Distill = Literal["none", "router", "experts"]
Linkage = Literal["average", "complete", "ward"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]

SIMILARITIES = ("outputs", "cka", "weights", "units", "router")
NONE = "none"  # --calibration none, --evaluate none, --protect none
DEFAULT = "default"  # --calibration default, --evaluate default: the text that comes with the package

# The fields that change what the calibration pass measures; the rest only changes what is made of it.
MEASURE_FIELDS = (
    "calibration",
    "tokens",
    "seq_len",
    "skip_first",
    "sample_tokens",
    "sample_sequences",
    "dtype",
    "seed",
)


@dataclass(frozen=True)
class PruneConfig:
    """How to prune. Raises CpruneError at construction where a value cannot work for any model."""

    ratio: float = 0.25
    """Share of the routed experts to remove, over the whole model, in (0, 1)."""
    method: Method = "cprune"
    """cprune: clusters and one global importance. cprune-paper: the authors' public algorithm. hc-smoe to mop: one of
    each group. naee: least error of the output. Others: one saliency."""
    budget: Budget = "global"
    """global: layers compete, counts differ by layer. uniform: floor(E x ratio) from each layer, a stock checkpoint."""
    action: Action = "prune"
    """prune: what is removed is gone. merge: it goes into the kept expert most like it (needs calibration text)."""
    router: Router = "fold"
    """fold: a row per expert, a stock checkpoint. map: removed experts keep their rows where held-back text likes it;
    the kept one that they were merged into answers, else a vector. Loads with cprune.load or trust_remote_code."""
    repair: Repair = "auto"
    """experts: refit the kept experts to the original's outputs. down: their down projections only, a fraction of the
    work. router: the router's rows, no expert. auto: experts where the text determines them, else down, or none where
    text or weights do not allow it."""

    distill: Distill = "none"
    """Train on the calibration text towards the original's logits, after all else: the routers, or the kept experts."""
    steps: int = 120
    """Of --distill, each on 8 sequences."""

    calibration: str = DEFAULT
    """Text to measure on: default, none, or FILE/DATASET[subset](split):n,... (.jsonl, .txt, .parquet or a hub id)."""
    tokens: int = 65536
    """Calibration tokens in all."""
    seq_len: int = 512
    """Tokens per calibration sequence."""
    skip_first: bool = False
    """Leave the first position of every sequence (an attention sink) out of the statistics."""
    sample_tokens: int = 96
    """Shared tokens on which every expert of a layer is evaluated, for output similarity."""
    sample_sequences: int = 64
    """Sequences whose mean input every expert is evaluated on, for cprune-paper."""

    similarity: str = "outputs"
    """Similarity of experts: outputs, cka, weights, units or router, or a blend such as outputs:0.8,weights:0.2."""
    linkage: Linkage = "average"
    """Linkage of the clusters inside a layer."""
    clusters: int | None = None
    """Clusters per layer; left out, --cluster-distance decides, and with that 0 the silhouette."""
    cluster_distance: float = 0.5
    """Experts further apart than this (1 - similarity) never share a cluster; 0 chooses by silhouette."""

    global_clusters: int = 0
    """Groups over the experts of all layers (FAISS, by mean output); each keeps its most important expert. 0: none."""

    slack: int = 0
    """Experts to keep in every layer beyond the model's top-k."""
    min_keep: int = 1
    """Least number of experts to keep in a layer."""
    multiple_of: int = 1
    """The number kept in every layer is a multiple of this (tensor or expert parallel engines)."""
    protect: Literal["super", "none"] = "super"
    """super: experts with massive activations are never removed."""
    domain_floor: float = 0.0
    """Least importance of an expert, as a share in [0, 1] of what it had if all text were of its best domain."""
    paper_layer_rate: float = 0.1
    """cprune-paper: share removed in every layer by the layer stage; the global stage removes the rest of the ratio."""

    dtype: ComputeDtype = "auto"
    """Compute type of the passes through the model; auto is the checkpoint's own where the processor is fast at it."""
    batch_tokens: int = 4096
    """Tokens that pass through a layer at a time."""
    seed: int = 0
    """Seed of everything random."""

    verify: bool = True
    """Check the written model against the original with the dropped experts masked out."""
    evaluate: str = DEFAULT
    """Text for perplexity before and after: default, none, or a spec as for calibration."""
    evaluate_tokens: int = 8192
    """Most tokens to evaluate on, per domain the same share."""
    work_dir: str | None = None
    """Where the statistics are kept for reruns, and the plan; left out, OUT.work."""

    def __post_init__(self) -> None:
        def must(holds: bool, field: str, what: str) -> None:
            if not holds:
                raise CpruneError(f"{field} must {what}, got {getattr(self, field)!r}")

        for field in dataclasses.fields(self):
            self._check_type(field.name)
        must(0.0 < self.ratio < 1.0, "ratio", "lie in (0, 1)")
        must(0.0 < self.paper_layer_rate < 1.0, "paper_layer_rate", "lie in (0, 1)")
        must(0.0 <= self.domain_floor <= 1.0, "domain_floor", "lie in [0, 1]")
        for name in ("tokens", "batch_tokens", "sample_tokens", "sample_sequences", "multiple_of", "min_keep", "steps"):
            must(getattr(self, name) >= 1, name, "be at least 1")
        must(self.evaluate_tokens >= 2, "evaluate_tokens", "be at least 2")
        must(self.seq_len >= 2, "seq_len", "be at least 2")
        must(self.slack >= 0, "slack", "not be negative")
        must(self.global_clusters >= 0, "global_clusters", "not be negative")
        must(self.clusters is None or self.clusters >= 1, "clusters", "be at least 1")
        must(0.0 <= self.cluster_distance <= 2.0, "cluster_distance", "lie in [0, 2]")
        must(self.seed >= 0, "seed", "not be negative")
        must(bool(self.calibration.strip()), "calibration", "name a text, 'default' or 'none'")
        must(bool(self.evaluate.strip()), "evaluate", "name a text, 'default' or 'none'")
        must(self.action == "prune" or self.calibration != NONE, "calibration", "name a text for --action merge")
        must(self.router == "fold" or self.calibration != NONE, "calibration", "name a text for --router map")
        refits_more = self.repair in ("experts", "router")
        must(self.action == "prune" or not refits_more, "repair", "be auto, down or none for --action merge")
        must(self.repair != "router" or self.router == "fold", "router", "be fold for --repair router")
        must(
            self.distill == NONE or self.calibration != NONE, "calibration", f"name a text for --distill {self.distill}"
        )
        must(self.distill != "router" or self.router == "fold", "router", "be fold for --distill router")
        parse_blend(self.similarity)

    def _check_type(self, name: str) -> None:
        value, choices = getattr(self, name), _CHOICES.get(name)
        if choices is not None and value not in choices:
            raise CpruneError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        kind = _KINDS.get(name)
        if kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise CpruneError(f"{name} must be of type {_type_name(kind)}, got {value!r}")

    def replace(self, **changes: object) -> PruneConfig:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, object]:
        """Plain values by field name, as they stand in plans and YAML files."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> PruneConfig:
        """The configuration of `to_dict`; CpruneError on a name it does not have."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise CpruneError(f"configuration keys must be fields of PruneConfig, got {', '.join(unknown)}")
        return cls(**values)  # type: ignore[arg-type]

    @classmethod
    def from_yaml(cls, path: str | Path) -> PruneConfig:
        """Read a YAML mapping of field names (dashes or underscores)."""
        try:
            values = yaml.safe_load(Path(path).read_text()) or {}
        except OSError as error:
            raise CpruneError(f"the configuration file must be readable, got {path} ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise CpruneError(f"the configuration file must be text, got {path} (not UTF-8)") from error
        except yaml.YAMLError as error:
            raise CpruneError(f"{path} must be YAML, got {str(error).splitlines()[0]}") from error
        if not isinstance(values, dict):
            raise CpruneError(f"{path} must hold a mapping of options, got {type(values).__name__}")
        return cls.from_dict({str(key).replace("-", "_"): value for key, value in values.items()})

    def measure_key(self) -> str:
        """The part of the configuration that the statistics depend on, as canonical JSON."""
        return json.dumps({name: getattr(self, name) for name in MEASURE_FIELDS}, sort_keys=True)


def parse_blend(spec: str) -> dict[str, float]:
    """`"outputs:0.8,weights:0.2"` -> `{"outputs": 0.8, "weights": 0.2}`; weights default to 1, scaled to sum 1."""
    weights: dict[str, float] = {}
    for part in spec.split(","):
        name, _, number = part.strip().partition(":")
        try:
            weight = float(number) if number else 1.0
        except ValueError:
            weight = -1.0
        if name not in SIMILARITIES or not 0.0 <= weight < float("inf"):
            raise CpruneError(
                f"similarity must be NAME or NAME:WEIGHT,... of {', '.join(SIMILARITIES)} with weights >= 0, "
                f"got {spec!r}"
            )
        weights[name] = weights.get(name, 0.0) + weight
    total = sum(weights.values())
    if total <= 0.0:
        raise CpruneError(f"similarity must have a weight above 0, got {spec!r}")
    return {name: weight / total for name, weight in weights.items()}


def _type_name(kind: type | tuple[type, ...]) -> str:
    return " or ".join(k.__name__ for k in kind) if isinstance(kind, tuple) else kind.__name__


_CHOICES: dict[str, tuple[str, ...]] = {
    "method": Method.__args__,  # type: ignore[attr-defined]
    "budget": Budget.__args__,  # type: ignore[attr-defined]
    "action": Action.__args__,  # type: ignore[attr-defined]
    "router": Router.__args__,  # type: ignore[attr-defined]
    "repair": Repair.__args__,  # type: ignore[attr-defined]
    "distill": Distill.__args__,  # type: ignore[attr-defined]
    "linkage": Linkage.__args__,  # type: ignore[attr-defined]
    "dtype": ComputeDtype.__args__,  # type: ignore[attr-defined]
    "protect": ("super", NONE),
}
_KINDS: dict[str, type | tuple[type, ...]] = {
    **{name: (int, float) for name in ("ratio", "cluster_distance", "domain_floor", "paper_layer_rate")},
    **{name: str for name in ("calibration", "evaluate", "similarity")},
    **{name: bool for name in ("skip_first", "verify")},
    **{
        name: int
        for name in (
            *("tokens", "seq_len", "sample_tokens", "sample_sequences", "slack", "min_keep", "multiple_of"),
            *("global_clusters", "steps"),
            *("batch_tokens", "seed", "evaluate_tokens"),
        )
    },
    "clusters": (int, type(None)),
    "work_dir": (str, type(None)),
}
