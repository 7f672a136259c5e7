"""What tests make up: statistics, plans, damaged checkpoints; and how a refusal must read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cprune.checkpoint import Checkpoint, open_checkpoint
from cprune.errors import CpruneError
from cprune.plan import LayerPlan, PrunePlan
from cprune.stats import ExpertStats


@contextmanager
def refuses(match: str) -> Iterator[None]:
    """The block must raise CpruneError: one sentence on one line, what must hold and what was given."""
    with pytest.raises(CpruneError, match=match) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and not message.endswith("."), message
    assert ("must" in message or "needs" in message) and "got " in message, message


def expert_stats(num: int = 5, *, layer: str = "model.layers.0.mlp", seed: int = 0, **fields: object) -> ExpertStats:
    """Random statistics of `num` experts, hidden size 6, 3 sequences; `fields` replace single ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    def gram(*shape: int) -> Tensor:
        rows = draw(*shape)
        return rows @ rows.transpose(-1, -2)

    values: dict[str, object] = {
        name: draw(num)
        for name in (
            *("gate_sum", "gated_norm_sum", "gated_sq_sum", "relative_sum", "turning_sum", "norm_sum", "norm_sq_sum"),
            *("norm_max", "activation_max", "activation_absmax"),
        )
    }
    count = torch.randint(1, 100, (num,), generator=generator)
    values |= {
        "count": count,
        "output_sum": draw(num, 6),
        "coactivation": torch.diag(count),
        "domain_tokens": torch.tensor([300, 300, 400]),
        "domain_gated_sum": draw(3, num),
        "output_gram": gram(num, 20),
        "mean_gram": gram(num, 6),
        "gated_gram": gram(num, 20),
        "cka": torch.eye(num, dtype=torch.float64),
        "router_gram": gram(num, 6),
        "weight_gram": gram(3, num, 20),
        "unit_gram": gram(num, 20),
        "mask_gradient_sq": draw(num),
        "mask_gradient_abs": draw(num),
        "sequence_outputs": draw(num, 3, 6).half(),
    }
    return ExpertStats(**{"layer": layer, "tokens": 1000, **values, **fields})  # type: ignore[arg-type]


def layer_plan(layer: str, num: int, kept: Sequence[int]) -> LayerPlan:
    """A plan that keeps `kept`; who stands in for whom is of no consequence."""
    kept = sorted(kept)
    stand_in = tuple(expert if expert in kept else kept[0] for expert in range(num))
    similarity = tuple(1.0 if expert in kept else 0.5 for expert in range(num))
    return LayerPlan(layer, num, tuple(kept), (0,) * num, (0.25,) * num, stand_in, similarity)


def plan_for(checkpoint: Checkpoint, kept: dict[str, Sequence[int]]) -> PrunePlan:
    """A plan of the whole checkpoint: {layer name: experts kept}."""
    layers = tuple(layer_plan(moe.name, moe.num_experts, kept[moe.name]) for moe in checkpoint.moe_layers)
    return PrunePlan(checkpoint.fingerprint, checkpoint.architecture.model_type, layers)


def uniform_plan(checkpoint: Checkpoint, seed: int = 0) -> PrunePlan:
    """Drops 3 experts of every layer, or one of every router group, at random."""
    drop = 3 if checkpoint.architecture.n_group == 1 else 1
    return plan_for(checkpoint, {moe.name: _kept(checkpoint, place, drop, seed) for place, moe in _places(checkpoint)})


def ragged_plan(checkpoint: Checkpoint, seed: int = 0) -> PrunePlan:
    """Drops 1, 2, 3, ... experts of the trunk's layers; with router groups one per group of the first; heads whole."""
    grouped = checkpoint.architecture.n_group > 1
    kept = {}
    for place, moe in _places(checkpoint):
        drop = (place == 0) if grouped else (place + 1)
        kept[moe.name] = _kept(checkpoint, place, int(drop) if moe.trunk else 0, seed)
    return plan_for(checkpoint, kept)


def _places(checkpoint: Checkpoint) -> Iterator[tuple[int, object]]:
    return enumerate(checkpoint.moe_layers)


def _kept(checkpoint: Checkpoint, place: int, drop: int, seed: int) -> list[int]:
    moe, groups = checkpoint.moe_layers[place], checkpoint.architecture.n_group
    per_group = moe.num_experts // groups
    generator = torch.Generator().manual_seed(1000 * seed + place)
    kept: list[int] = []
    for group in range(groups):
        chosen = torch.randperm(per_group, generator=generator)[drop:] + group * per_group
        kept += sorted(chosen.tolist())
    return kept


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, as safetensors itself reads them."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def damaged(
    source: Path,
    folder: Path,
    tensors: Callable[[dict[str, Tensor]], object] | None = None,
    config: Callable[[dict[str, object]], object] | None = None,
) -> Path:
    """A copy of a single-file checkpoint in `folder`, its tensors and its config.json changed by the callables."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    if tensors is not None:
        values = load_file(folder / "model.safetensors")
        tensors(values)
        save_file({name: value.contiguous() for name, value in values.items()}, folder / "model.safetensors")
    if config is not None:
        settings = json.loads((folder / "config.json").read_text())
        config(settings)
        (folder / "config.json").write_text(json.dumps(settings, indent=2))
    open_checkpoint(folder)
    return folder


def write_words(path: Path, documents: int) -> Path:
    """A .jsonl file of documents of forty words, drawn from a few."""
    words = "the router sends every token to experts and other layers return what is left".split()
    draws = torch.randint(0, len(words), (documents, 40), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text("".join(json.dumps({"text": " ".join(words[i] for i in draw)}) + "\n" for draw in draws))
    return path


def run_arguments(model: Path, out: Path, text: Path, *options: str, tokens: int) -> list[str]:
    """Of a run on little text, which is evaluated on, too."""
    few = f"--tokens {tokens} --seq-len 32 --evaluate-tokens 128 --sample-tokens 40 --dtype float32 --ratio 0.4".split()
    return [str(model), str(out), "--calibration", str(text), "--evaluate", str(text), *few, *options]
