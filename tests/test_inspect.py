from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from cprune.act.compact import apply_plan
from cprune.checkpoint import open_checkpoint
from cprune.config import PruneConfig
from cprune.inspect import RATIOS, inspect_checkpoint, render
from tests.synthetic import damaged, refuses, uniform_plan
from tests.tiny import FAMILIES

Tiny = Callable[..., Path]


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_are_those_of_the_checkpoint(tiny: Tiny, family: str) -> None:
    found, checkpoint = inspect_checkpoint(tiny(family), PruneConfig()), open_checkpoint(tiny(family))
    num = checkpoint.moe_layers[0].num_experts
    assert found.facts["family"] == family and found.facts["experts per layer"] == str(num)
    assert found.facts["layout"] == ("fused" if family == "gpt_oss" else "per expert")
    assert found.facts["layers"] == f"3, of which MoE {len(checkpoint.moe_layers)}"
    assert found.facts["experts per token"] == "2" + (" (from 2 of 4 groups)" if family == "deepseek_v3" else "")
    assert found.bytes == checkpoint.nbytes and not found.refusals
    assert [saving.ratio for saving in found.savings] == list(RATIOS)


def test_saving_is_that_of_the_output(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("olmoe"))
    found = inspect_checkpoint(tiny("olmoe"), PruneConfig(ratio=0.2, budget="uniform"))
    saving = next(saving for saving in found.savings if saving.ratio == 0.2)
    written = apply_plan(checkpoint, uniform_plan(checkpoint), tmp_path / "out")  # 3 of 15 in 3 layers
    assert saving.removed == 9 and saving.refusal is None
    routers = 3 * 3 * 48 * 4  # bytes of the router's rows, which the forecast leaves out
    assert saving.bytes == pytest.approx(written + routers, abs=1)


def test_what_would_be_refused_is_told(tiny: Tiny) -> None:
    found = inspect_checkpoint(tiny("deepseek_v3", tokenizer=False), PruneConfig(ratio=0.3))
    refused = {saving.ratio: saving.refusal for saving in found.savings if saving.refusal}
    assert set(refused) == {0.125, 0.5, 0.75}  # an eighth of 24 is less than a step of one expert a group
    assert "ratio 0.5 must leave every layer its top-k" in refused[0.5]
    assert len(found.refusals) == 1 and "must hold a tokenizer" in found.refusals[0]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(found), markup=False)
    text = console.export_text()
    assert "ratio 0.5 must leave every layer" in text and "must hold a tokenizer" in text and "0.3" in text


def test_model_type_unknown_to_transformers_is_told(tiny: Tiny, tmp_path: Path) -> None:
    folder = damaged(tiny("olmoe"), tmp_path / "m", config=lambda c: c.update(model_type="new_moe"))
    found = inspect_checkpoint(folder, PruneConfig())
    assert all("must know the model type" in (saving.refusal or "") for saving in found.savings)
    assert "must know the model type, got 'new_moe'" in found.refusals[0]


def test_dense_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    def drop(tensors: dict) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]

    with refuses("experts must be tensors named"):
        inspect_checkpoint(damaged(tiny("olmoe"), tmp_path / "m", drop), PruneConfig())
