"""Apply a plan: slice experts, router rows and score corrections, renumber, edit config.json; never build the model."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from cprune import ragged as resizing
from cprune.checkpoint import Checkpoint, TensorInfo
from cprune.checkpoint.families import COUNT_KEYS, RAGGED_KEY
from cprune.checkpoint.reader import read_header
from cprune.checkpoint.writer import OutputTensor, Piece, check_output, write_checkpoint
from cprune.errors import CpruneError
from cprune.merged import novices_name, row_map
from cprune.plan import PrunePlan
from cprune.repaired import Repairs

MODELING_NAME = "modeling_cprune.py"
PLAN_NAME = "cprune_plan.json"
REPAIR_NAME = "cprune_repair.json"
AUTO_CLASS = "CpruneForCausalLM"
Maps = Mapping[str, Mapping[int, int]]  # {layer: {row of the router that is kept: place of its expert, or -1}}


def check_plan(checkpoint: Checkpoint, plan: PrunePlan) -> None:
    """Raise CpruneError unless `plan` was made for this checkpoint and leaves every router enough experts."""
    if plan.fingerprint != checkpoint.fingerprint:
        raise CpruneError(
            f"the plan must be of this checkpoint ({checkpoint.fingerprint[:12]}), "
            f"got one of {plan.model_type} {plan.fingerprint[:12]}"
        )
    layers = {layer.name: layer for layer in checkpoint.moe_layers}
    planned = [layer.layer for layer in plan.layers]
    if sorted(planned) != sorted(layers):
        odd = sorted(set(planned) ^ set(layers)) or sorted(set(name for name in planned if planned.count(name) > 1))
        raise CpruneError(f"the plan must name every MoE layer once, got {odd[0]} in one of the two only")
    for layer in plan.layers:
        if layer.num_experts != layers[layer.layer].num_experts:
            raise CpruneError(
                f"{layer.layer} must have {layer.num_experts} experts as planned, got {layers[layer.layer].num_experts}"
            )
        if len(layer.kept) < checkpoint.architecture.top_k:
            raise CpruneError(
                f"{layer.layer} must keep at least the {checkpoint.architecture.top_k} experts a token uses, "
                f"got {len(layer.kept)}"
            )
        groups, per = checkpoint.architecture.n_group, layer.num_experts // checkpoint.architecture.n_group
        if len({sum(1 for e in layer.kept if e // per == group) for group in range(groups)}) > 1:
            raise CpruneError(
                f"{layer.layer} must keep as many experts in each of {groups} router groups, got {list(layer.kept)}"
            )
        scored = checkpoint.architecture.scored_groups
        if groups > 1 and len(layer.kept) // groups < scored:
            raise CpruneError(
                f"{layer.layer} must keep the {scored} experts by which a router group is scored, "
                f"got {list(layer.kept)}"
            )


def output_shards(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    replaced: Mapping[str, TensorInfo] | None = None,
    maps: Maps | None = None,
) -> list[list[OutputTensor]]:
    """The tensors of the compact checkpoint, per source shard, in file order.

    Args:
        replaced: tensors that stand elsewhere than in the source, under their names in the output.
        maps: of layers whose routers keep rows of dropped experts.
    """
    maps, replaced = maps or {}, replaced or {}
    experts: dict[str, OutputTensor | None] = {}
    for moe in checkpoint.moe_layers:
        kept = plan[moe.name].kept
        for name, axis in moe.router.values():
            rows = list(maps.get(moe.name, kept))
            experts[name] = _sliced(checkpoint.tensors[name], rows, axis, name)
        for name in moe.fused.values():
            experts[name] = _sliced(checkpoint.tensors[name], kept, 0, name)
        new_number = {old: new for new, old in enumerate(kept)}
        for old, tensors in enumerate(moe.experts):
            for suffix, name in tensors.items():
                new_name = f"{moe.name}.experts.{new_number[old]}.{suffix}" if old in new_number else None
                experts[name] = _whole(checkpoint.tensors[name], new_name) if new_name else None
    shards: dict[Path, list[OutputTensor]] = {shard: [] for shard in checkpoint.shards}
    for name, info in checkpoint.tensors.items():
        tensor = experts[name] if name in experts else _whole(info, name)
        if tensor is not None:
            shards[info.file].append(_instead(tensor, replaced[tensor.name]) if tensor.name in replaced else tensor)
    for moe in checkpoint.moe_layers:
        if (name := novices_name(moe)) in replaced:
            beside = checkpoint.tensors[next(iter(moe.router.values()))[0]].file
            shards[beside].append(_whole(replaced[name], name))
    return list(shards.values())


def output_config(checkpoint: Checkpoint, plan: PrunePlan, maps: Maps | None = None) -> dict[str, object]:
    """config.json of the compact checkpoint: the source's, every synonym of the expert count edited in place.

    Where layers keep different numbers, the scalar is the largest of them, `cprune.experts_per_layer` has them all, and
    `auto_map` names the class of `modeling_cprune.py`; a plain load then fails on the shapes instead of going wrong. So
    it does where routers keep rows of dropped experts (`maps`): the scalar is then the most rows, and
    `cprune.expert_map` leads from every row to its expert, or to none (-1), whose novice answers.
    """
    config = copy.deepcopy(checkpoint.config)
    counts = {moe.index: len(plan[moe.name].kept) for moe in checkpoint.moe_layers}
    answers = {
        str(moe.index): list(maps[moe.name].values()) for moe in checkpoint.moe_layers if maps and moe.name in maps
    }
    for section in (config, config.get("text_config")):
        if isinstance(section, dict):
            for key in COUNT_KEYS:
                if isinstance(section.get(key), int):
                    section[key] = max([*counts.values(), *map(len, answers.values())])
    config.pop(RAGGED_KEY, None)
    if answers or len(set(counts.values())) > 1:
        ragged: dict[str, object] = {"experts_per_layer": {str(index): counts[index] for index in sorted(counts)}}
        if answers:
            ragged["expert_map"] = answers
        config[RAGGED_KEY] = ragged
        auto_map = config.get("auto_map") if isinstance(config.get("auto_map"), dict) else {}
        stem = MODELING_NAME.removesuffix(".py")
        config["auto_map"] = {**auto_map, "AutoModelForCausalLM": f"{stem}.{AUTO_CLASS}"}  # type: ignore[dict-item]
    elif isinstance(config.get("auto_map"), dict):
        others = {key: value for key, value in config["auto_map"].items() if AUTO_CLASS not in str(value)}
        if others:
            config["auto_map"] = others
        elif config["auto_map"]:
            del config["auto_map"]  # of a source that was ragged
    return config


def modeling_code(config: Mapping[str, object]) -> str:
    """The file that lets plain transformers load layers of different expert counts (`trust_remote_code=True`)."""
    architectures = config.get("architectures")
    if not isinstance(architectures, Sequence) or not architectures:
        raise CpruneError(
            "config.json must name its architectures for per-layer counts, got none (try --budget uniform)"
        )
    base = str(architectures[0])
    return (
        Path(resizing.__file__).read_text()
        + f"""

from transformers import {base}  # noqa: E402


class {AUTO_CLASS}({base}):
    def __init__(self, config):
        super().__init__(config)
        resize_experts(self, config.{RAGGED_KEY}["experts_per_layer"], config.{RAGGED_KEY}.get("expert_map"))
"""
    )


def apply_plan(checkpoint: Checkpoint, plan: PrunePlan, out: Path, repairs: Repairs | None = None) -> int:
    """Write the compact checkpoint that `plan` describes; returns the bytes of its tensors.

    Args:
        repairs: tensors of a repair or a merge to write instead of the source's; their record is kept in OUT as
            cprune_repair.json.
    Raises CpruneError, before anything is written, where the plan is of another checkpoint, OUT is in the way, or the
    disk is too small. The plan itself is kept in OUT as cprune_plan.json.
    """
    check_output(out, checkpoint.folder)
    check_plan(checkpoint, plan)
    records = repairs.layers if repairs is not None else ()
    maps = {record.layer: answers for record in records if (answers := row_map(plan[record.layer], record))}
    config = output_config(checkpoint, plan, maps)
    texts = {PLAN_NAME: plan.to_json()}
    if RAGGED_KEY in config:
        texts[MODELING_NAME] = modeling_code(config)
    replaced: dict[str, TensorInfo] = {}
    if repairs is not None:
        texts[REPAIR_NAME] = repairs.to_json()
        replaced = {info.name: info for file in repairs.files for info in read_header(file)}
    own = (PLAN_NAME, REPAIR_NAME, MODELING_NAME, "report.json")
    companions = [path for path in checkpoint.companions() if path.name not in own]
    return write_checkpoint(out, output_shards(checkpoint, plan, replaced, maps), config, companions, texts)


def _whole(info: TensorInfo, name: str) -> OutputTensor:
    return OutputTensor(name, info.dtype, info.shape, (Piece(info.file, info.offset, info.nbytes),))


def _instead(tensor: OutputTensor, info: TensorInfo) -> OutputTensor:
    if (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
        raise CpruneError(
            f"{tensor.name} must be replaced by {tensor.dtype} {list(tensor.shape)}, "
            f"got {info.dtype} {list(info.shape)} in {info.file}"
        )
    return _whole(info, tensor.name)


def _sliced(info: TensorInfo, kept: Sequence[int], axis: int, name: str) -> OutputTensor:
    """The entries `kept` of `axis`, as byte ranges."""
    outer = math.prod(info.shape[:axis])
    row = info.nbytes // (outer * info.shape[axis])
    pieces = tuple(
        Piece(info.file, info.offset + (block * info.shape[axis] + expert) * row, row)
        for block, expert in itertools.product(range(outer), kept)
    )
    return OutputTensor(name, info.dtype, (*info.shape[:axis], len(kept), *info.shape[axis + 1 :]), pieces)
