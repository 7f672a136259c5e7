from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from cprune.checkpoint import open_checkpoint
from cprune.prove.evaluate import Perplexity
from cprune.prove.report import Report, Size, count_text, peak_memory, render, size_text
from cprune.prove.verify import VerifyReport
from cprune.repaired import Distillation
from tests.synthetic import tensors_of
from tests.tiny import FAMILIES

REPORT = Report(
    model="m",
    out="out",
    method="cprune",
    budget="global",
    ratio=0.25,
    before=Size(experts=96, parameters=1_234_567, bytes=2_500_000),
    after=Size(experts=72, parameters=1_000_000, bytes=2_000_000),
    kept_per_layer={"model.layers.0.mlp": 20, "model.layers.1.mlp": 28, "model.layers.2.mlp": 24},
    calibration="65536 tokens of default",
    perplexity_before=Perplexity({"code": 10.0, "prosé": 20.0}, {"code": 100, "prosé": 300}),
    perplexity_after=Perplexity({"code": 11.0, "prosé": 30.0}, {"code": 100, "prosé": 300}),
    verification=VerifyReport(layers=3, positions=256, max_error=1e-6, ties=0, logits_error=2e-6),
    generated="the\n[bold]router",
    seconds={"open": 0.25, "measure": 12.0},
    peak_memory=1_500_000_000,
)


def shown(report: Report) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render(report), markup=False)
    return console.export_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_size_is_that_of_the_tensors(tiny: Callable[..., Path], family: str) -> None:
    checkpoint, tensors = open_checkpoint(tiny(family)), tensors_of(tiny(family))
    size = Size.of(checkpoint)
    assert size.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert size.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert size.experts == sum(moe.num_experts for moe in checkpoint.moe_layers)


def test_json_has_every_field(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    REPORT.save(path)
    values = json.loads(path.read_text())
    assert values.pop("removed_share") == REPORT.removed_share
    for name, result in (("before", REPORT.perplexity_before), ("after", REPORT.perplexity_after)):
        assert values[f"perplexity_{name}"].pop("mean") == result.mean
        assert values[f"perplexity_{name}"].pop("token_weighted") == result.token_weighted
    assert values == json.loads(json.dumps(dataclasses.asdict(REPORT)))
    assert values["perplexity_after"]["by_domain"] == {"code": 11.0, "prosé": 30.0} and "prosé" in path.read_text()
    assert values["verification"]["positions"] == 256 and values["kept_per_layer"]["model.layers.1.mlp"] == 28
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_json_of_a_run_without_proofs(tmp_path: Path) -> None:
    bare = dataclasses.replace(
        REPORT, perplexity_before=None, perplexity_after=None, verification=None, generated=None, seconds={}
    )
    bare.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["verification"] is None
    text = shown(bare)
    assert "no (--no-verify)" in text and "perplexity" not in text and "generates" not in text


def test_removed_share_is_what_was_done() -> None:
    assert REPORT.removed_share == pytest.approx(0.25)


def test_table_shows_what_went_in_and_came_out() -> None:
    lines = [" ".join(line.replace("│", " ").replace("┃", " ").split()) for line in shown(REPORT).splitlines()]
    for expected in (
        "experts 96 72 -25.0 %",
        "parameters 1.23 M 1 M -19.0 %",
        "bytes 2.5 MB 2 MB -20.0 %",
        "perplexity code 10.00 11.00 +10.0 %",
        "perplexity prosé 20.00 30.00 +50.0 %",
        "perplexity, mean 15.00 20.50 +36.7 %",
        "experts per layer 20 to 28",
        "measured on 65536 tokens of default",
        "verified equals the masked original in 3 layers x 256 tokens, relative error <= 2.0e-06",
        "seconds open 0.2, measure 12.0",
        "peak memory 1.5 GB",
    ):
        assert expected in lines, "\n".join(lines)


def test_domains_that_were_not_measured_on_are_told_apart() -> None:
    report = dataclasses.replace(REPORT, domains=("code", "law"))
    lines = [" ".join(line.replace("│", " ").split()) for line in shown(report).splitlines()]
    assert "perplexity, in-domain 10.00 11.00 +10.0 %" in lines
    assert "perplexity, out-of-domain 20.00 30.00 +50.0 %" in lines
    values = json.loads(report.to_json())
    assert (values["perplexity_after"]["in_domain"], values["perplexity_after"]["out_of_domain"]) == (11.0, 30.0)
    all_in = dataclasses.replace(REPORT, domains=("code", "prosé"))
    assert "in-domain" not in shown(all_in) and json.loads(all_in.to_json())["perplexity_before"]["in_domain"] == 15.0
    none_in = dataclasses.replace(REPORT, domains=("law",))
    assert "perplexity, out-of-domain" in shown(none_in) and "in-domain" not in shown(none_in).replace("of-domain", "")
    assert "in_domain" not in json.loads(none_in.to_json())["perplexity_before"] and "of-domain" not in shown(REPORT)


def test_generated_text_is_shown_as_it_is() -> None:
    assert r"'the\n[bold]router'" in shown(REPORT)


def test_uniform_counts_and_a_single_domain_are_shown_once() -> None:
    one = Perplexity({"code": 10.0}, {"code": 100})
    kept = dict.fromkeys(REPORT.kept_per_layer, 24)
    text = shown(dataclasses.replace(REPORT, kept_per_layer=kept, perplexity_before=one, perplexity_after=one))
    assert "experts per layer  24" in text and "mean" not in text


@pytest.mark.parametrize(
    ("number", "size", "count"),
    [
        (0, "0 B", "0"),
        (999, "999 B", "999"),
        (1000, "1 kB", "1 k"),
        (1_234_567, "1.23 MB", "1.23 M"),
        (2.5e9, "2.5 GB", "2.5 B"),
        (3.2e12, "3.2 TB", "3.2 T"),
    ],
)
def test_numbers_are_shown_in_three_digits(number: float, size: str, count: str) -> None:
    assert (size_text(number), count_text(number)) == (size, count)


def test_peak_memory_is_in_bytes() -> None:
    assert 50e6 < peak_memory() < 1e12  # Python with torch in it


def test_a_distillation_says_what_it_did() -> None:
    done = Distillation("experts", 120, True, 0.02057, 0.01399, 110, {"model.layers.0.mlp": "x"})
    for distillation, words in (
        (done, "distilled experts, 120 steps, KL to the original on held-back text 0.0206 -> 0.0140\n"),
        (dataclasses.replace(done, whole=False), "experts, 120 steps a layer, layer by layer, KL"),
        (dataclasses.replace(done, after=0.02057, digests={}), "0.0206 -> 0.0206, no better: nothing of it is kept"),
    ):
        report = dataclasses.replace(REPORT, distillation=distillation)
        lines = (" ".join(line.split()) for line in shown(report).splitlines())
        assert words in "\n".join(lines)
        assert json.loads(report.to_json())["distillation"]["best_step"] == 110
    check = dataclasses.replace(REPORT.verification, distilled=3)
    assert "with 3 distilled layers in 3 layers" in shown(dataclasses.replace(REPORT, verification=check))
