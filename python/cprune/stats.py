"""ExpertStats: what the calibration pass knows of one MoE layer, and all that any method needs (measure -> decide).

Notation: token t, expert j, gate g_j(t) (0 where not routed), expert output f_j(t), hidden state after the layer h(t).
Sums run over the tokens routed to j, in float64. "Sample" means the shared tokens on which all experts are evaluated.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import safe_open, save_file

from cprune.errors import CpruneError

PROJECTIONS = ("gate", "up", "down")


def _unmeasured() -> torch.Tensor:
    return torch.zeros(0, dtype=torch.float64)


@dataclass(frozen=True)
class ExpertStats:
    """Sufficient statistics of one layer for every saliency, similarity and ratio. `tokens` is 0 when data-free."""

    layer: str  # absolute name of the MoE block on disk, e.g. "model.layers.3.mlp"
    tokens: int  # tokens that entered the layer
    count: torch.Tensor  # [E] int64      tokens routed to j
    gate_sum: torch.Tensor  # [E] float64    sum g
    gated_norm_sum: torch.Tensor  # [E] float64    sum g |f|                    (REAP, 2510.13999, before its mean)
    gated_sq_sum: torch.Tensor  # [E] float64    sum g^2 |f|^2
    relative_sum: torch.Tensor  # [E] float64    sum g |f| / |h|
    turning_sum: torch.Tensor  # [E] float64    sum g |f| (1 - cos(hidden state before the decoder layer, h))
    norm_sum: torch.Tensor  # [E] float64    sum |f|                      (EAN)
    norm_sq_sum: torch.Tensor  # [E] float64    sum |f|^2
    norm_max: torch.Tensor  # [E] float64    max |f|
    activation_max: torch.Tensor  # [E] float64    largest component of f, signed
    activation_absmax: torch.Tensor  # [E] float64    largest |component| of f      (super experts)
    output_sum: torch.Tensor  # [E, H] float64 sum f                        (mean outputs)
    coactivation: torch.Tensor  # [E, E] int64   tokens routed to both i and j; the diagonal is count
    domain_tokens: torch.Tensor  # [D] int64     tokens of each domain
    domain_gated_sum: torch.Tensor  # [D, E] float64 sum g |f| over the tokens of a domain
    output_gram: torch.Tensor  # [E, E] float64 sum over the sample of <f_i, f_j>
    mean_gram: torch.Tensor  # [E, E] float64 <m_i, m_j> of the mean outputs m over the sample
    gated_gram: torch.Tensor  # [E, E] float64 sum over the sample of g_i g_j <f_i, f_j>
    cka: torch.Tensor  # [E, E] float64 linear CKA over the sample
    router_gram: torch.Tensor  # [E, E] float64 <w_i, w_j> of the router's rows
    sequence_outputs: torch.Tensor  # [E, S, H] float16 f_j(mean input of a sequence), for cprune-paper
    # Empty until a method or a similarity asks for them.
    weight_gram: torch.Tensor = field(default_factory=_unmeasured)  # [3, E, E] float64 <W_i, W_j> of gate, up, down
    unit_gram: torch.Tensor = field(default_factory=_unmeasured)  # [E, E] float64 <S_i, S_j> of hidden-unit signatures
    mask_gradient_sq: torch.Tensor = field(default_factory=_unmeasured)  # [E] float64 sum over sequences of A^2,
    mask_gradient_abs: torch.Tensor = field(default_factory=_unmeasured)  # [E] float64 and of |A|, A = dL/d(mask of j)

    @property
    def num_experts(self) -> int:
        return self.count.shape[0]

    def save(self, path: Path) -> None:
        """Write as safetensors, whole or not at all."""
        tensors = {name: getattr(self, name).contiguous() for name in TENSOR_FIELDS}
        partial = path.with_suffix(".partial")
        try:
            save_file(tensors, partial, metadata={"stats": json.dumps({"layer": self.layer, "tokens": self.tokens})})
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            raise CpruneError(f"the work folder must be writable, got {path} ({error})") from error

    @classmethod
    def load(cls, path: Path, *, sequences: bool = True) -> ExpertStats:
        """Read what `save` wrote; CpruneError where the file is not that.

        Args:
            sequences: False leaves `sequence_outputs` [E, 0, H], by far the largest tensor, on disk.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("stats", "null"))
                tensors = {
                    name: file.get_slice(name)[:, :0]
                    if name == "sequence_outputs" and not sequences
                    else file.get_tensor(name)
                    for name in file.keys()  # noqa: SIM118 - not a dict
                }
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise CpruneError(f"{path} must hold the statistics of a layer, got {error}") from error
        known = isinstance(header, dict) and header.keys() == {"layer", "tokens"}
        if not known or set(tensors) != set(TENSOR_FIELDS):
            raise CpruneError(
                f"{path} must hold the statistics of a layer as this version writes them, got other tensors"
            )
        return cls(layer=header["layer"], tokens=header["tokens"], **tensors)


TENSOR_FIELDS = tuple(field.name for field in fields(ExpertStats) if field.name not in ("layer", "tokens"))
