"""A layer in memory that computes what the merged layer of the output does, for those who make it and who check it.

The original's layer keeps its E slots; the tensors of the output go to the slots of the kept experts. Dropped experts
are masked out of the router, or (`map`) may still be chosen, and the kept expert that stands in for them answers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from cprune import hf
from cprune.checkpoint import MoELayer
from cprune.plan import LayerPlan
from cprune.repaired import LayerRepair
from cprune_kernels.routing import remap

ROUTER_ROWS = ("weight", "bias")  # parameters of a router with a row or an entry for every expert


def changed_names(moe: MoELayer, plan: LayerPlan, record: LayerRepair) -> list[str]:
    """Names of the tensors of the output that a merge, a repair or a training changed, in the order of the digest.

    Args:
        moe: the layer, in the original or in the output.
        record: what was done to it.
    """
    names: set[str] = set()
    down, trained = moe.projections[-1], record.whole or record.distilled == "experts"
    if moe.fused:
        names |= {moe.fused[down]} if record.ridge is not None else set()
        names |= set(moe.fused.values()) if record.merged or trained else set()
    else:
        for place, expert in enumerate(plan.kept):
            whole = trained or expert in record.merged
            suffixes = moe.experts[0] if whole else [down] if record.ridge is not None else []
            names |= {f"{moe.name}.experts.{place}.{suffix}" for suffix in suffixes}
    if record.folds or record.distilled == "router":
        names |= {name for suffix, (name, _) in moe.router.items() if suffix.rpartition(".")[2] in ROUTER_ROWS}
    return sorted(names)


def put_tensors(layer: nn.Module, moe: MoELayer, plan: LayerPlan, tensors: Mapping[str, torch.Tensor]) -> None:
    """Set the slots of the kept experts of a layer in memory from tensors of the output, by their names there."""
    for name, tensor in tensors.items():
        places = slots(layer, moe, plan, name)
        for slot, row in zip(places, [tensor] if of_one_expert(moe, name) else tensor, strict=True):
            slot.copy_(row)


def taken_tensors(
    layer: nn.Module, moe: MoELayer, plan: LayerPlan, names: Sequence[str], dtypes: Mapping[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """The inverse of `put_tensors`: copies of the slots, by the names that they have in the output.

    Args:
        dtypes: data types on disk by the name after the block's, without an expert's number (`suffix_of`).
    """
    taken = {}
    for name in names:
        places = slots(layer, moe, plan, name)
        whole = places[0].clone() if of_one_expert(moe, name) else torch.stack(places)
        taken[name] = whole.to(dtypes[suffix_of(moe, name)]).contiguous()
    return taken


def suffix_of(moe: MoELayer, name: str) -> str:
    """What follows the block's name in a tensor's, without the number of the expert."""
    return re.sub(r"^experts\.\d+\.", "experts.", name.removeprefix(f"{moe.name}."))


def of_one_expert(moe: MoELayer, name: str) -> bool:
    """Whether a tensor of the output holds one expert's weight, and not all experts' or the router's."""
    return not moe.fused and name.startswith(f"{moe.name}.experts.")


def slots(layer: nn.Module, moe: MoELayer, plan: LayerPlan, name: str) -> list[torch.Tensor]:
    """Views of a layer in memory for a tensor of the output: of the expert that it is of, or of every kept one."""
    experts, suffix = hf.find_experts(layer), name.removeprefix(f"{moe.name}.")
    if of_one_expert(moe, name):
        _, place, projection = suffix.split(".", 2)
        return [hf.projections(experts)[moe.projections.index(projection)][plan.kept[int(place)]]]
    if suffix.startswith("experts."):
        whole = getattr(experts, suffix.removeprefix("experts.").removesuffix(".weight"))
    else:
        whole = getattr(hf.find_router(layer), suffix.rpartition(".")[2])
    return [whole[expert] for expert in plan.kept]


@contextmanager
def compact_routing(layer: nn.Module, plan: LayerPlan, mapped: Collection[int] = ()) -> Iterator[None]:
    """Within the context the layer routes as the compact one, its experts under their numbers in the original.

    Args:
        mapped: dropped experts that may still be chosen, and whose stand-ins answer (`LayerRepair.mapped`).
    """
    gone = [expert for expert in plan.dropped if expert not in mapped]
    with hf.masked_router(layer, torch.tensor(gone, dtype=torch.int64)), _answered(layer, plan, mapped):
        yield


@contextmanager
def _answered(layer: nn.Module, plan: LayerPlan, mapped: Collection[int]) -> Iterator[None]:
    if not mapped:
        yield
        return
    stand_in = torch.tensor(plan.stand_in)

    def mapped(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, index, gates = args
        merged = remap(index, gates, stand_in.to(index.device), plan.num_experts)
        return (
            hidden,
            torch.where(merged.index < 0, plan.num_experts, merged.index.long()),
            merged.gates.to(gates.dtype),
        )

    handle = hf.find_experts(layer).register_forward_pre_hook(mapped)
    try:
        yield
    finally:
        handle.remove()
