"""A layer in memory that computes what the merged layer of the output does, for those who make it and who check it.

The original's layer keeps its E slots; the tensors of the output go to the slots of the kept experts. Dropped experts
are masked out of the router, or (`map`) may still be chosen: the kept expert that stands in for them answers, or their
novice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from cprune import hf
from cprune.checkpoint import MoELayer
from cprune.checkpoint.families import NOVICES_NAME
from cprune.plan import LayerPlan
from cprune.repaired import NOVICES, LayerRepair
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
    if record.router == NOVICES:
        names.add(novices_name(moe))
    if record.folds or record.distilled == "router":
        names |= set(router_rows(moe).values())
    return sorted(names)


def router_rows(moe: MoELayer) -> dict[str, str]:
    """{parameter of the router with a row or an entry for every expert: its name on disk}; no score correction."""
    named = ((suffix.rpartition(".")[2], name) for suffix, (name, _) in moe.router.items())
    return {parameter: name for parameter, name in named if parameter in ROUTER_ROWS}


def novices_name(moe: MoELayer) -> str:
    """Name of the novices [D, H] of a layer: of its D dropped experts, in the order of their numbers."""
    return f"{moe.name}.experts.{NOVICES_NAME}"


def row_map(plan: LayerPlan, record: LayerRepair) -> dict[int, int] | None:
    """{row of the original's router that is kept: place of the expert that answers, or -1 for a novice}, ascending.

    None where the rows are those of the kept experts.
    """
    if not record.mapped:
        return None
    answers = {expert: plan.kept.index(plan.stand_in[expert]) for expert in (*plan.kept, *record.mapped)}
    if record.router == NOVICES:
        answers |= dict.fromkeys(record.mapped, -1)
    return dict(sorted(answers.items()))


def put_tensors(layer: nn.Module, moe: MoELayer, plan: LayerPlan, tensors: Mapping[str, torch.Tensor]) -> None:
    """Set the slots of the kept experts of a layer in memory from tensors of the output, by their names there.

    Novices have no slot, but belong to the routing (`compact_routing`).
    """
    for name, tensor in tensors.items():
        if name == novices_name(moe):
            continue
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
def compact_routing(
    layer: nn.Module, plan: LayerPlan, mapped: Sequence[int] = (), novices: torch.Tensor | None = None
) -> Iterator[None]:
    """Within the context the layer routes as the compact one, its experts under their numbers in the original.

    Args:
        mapped: dropped experts that may still be chosen, and whose stand-ins answer (`LayerRepair.mapped`).
        novices: [D, H], which answer for `mapped` instead, in their order.
    """
    gone = [expert for expert in plan.dropped if expert not in mapped]
    with hf.masked_router(layer, torch.tensor(gone, dtype=torch.int64)), _answered(layer, plan, mapped, novices):
        yield


@contextmanager
def _answered(layer: nn.Module, plan: LayerPlan, mapped: Sequence[int], novices: torch.Tensor | None) -> Iterator[None]:
    if not mapped:
        yield
        return
    stand_in = torch.tensor(plan.stand_in)
    if novices is not None:
        stand_in[list(mapped)] = -1
    of_novices: list[torch.Tensor] = []

    def answered(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, index, gates = args
        if novices is not None:
            of_novices.append(gates_of(mapped, index, gates, plan.num_experts).to(novices.dtype) @ novices)
        merged = remap(index, gates, stand_in.to(index.device), plan.num_experts)
        return (
            hidden,
            torch.where(merged.index < 0, plan.num_experts, merged.index.long()),
            merged.gates.to(gates.dtype),
        )

    def with_novices(_: nn.Module, __: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        return out + of_novices.pop().to(out.dtype) if novices is not None else out

    experts = hf.find_experts(layer)
    handles = experts.register_forward_pre_hook(answered), experts.register_forward_hook(with_novices)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gates_of(experts: Sequence[int], index: torch.Tensor, gates: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[T, D] float32: the gates of `experts`, D of the layer's, by the choice index [T, K] with gates [T, K]."""
    place = torch.full((num_experts + 1,), len(experts), device=index.device)
    place[list(experts)] = torch.arange(len(experts), device=index.device)
    sums = torch.zeros(len(index), len(experts) + 1, device=index.device)
    return sums.scatter_add_(1, place[index.long()], gates.float())[:, :-1]
