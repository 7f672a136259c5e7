"""Refused options, and the configuration file."""

from __future__ import annotations

from pathlib import Path

import pytest

from cprune.run import Run, main
from tests.bad_input.refusal import SHORT, Refusal
from tests.tiny import write_tiny


@pytest.mark.parametrize("ratio", ["0", "1", "1.5", "-0.25", "nan", "inf"])
def test_ratio_outside(refusal: Refusal, model: Path, out: Path, ratio: str) -> None:
    refusal([model, out, "--ratio", ratio], "ratio must lie in (0, 1), got")
    refusal(["run", model, out, "--ratio", ratio], "ratio must lie in (0, 1), got", single=True)


@pytest.mark.parametrize(
    "options", [("--ratio", "text"), ("--nonsense",), ("--budget", "nonsense"), ("--tokens", "1.5")]
)
def test_usage_errors_are_the_parser_s(
    model: Path, out: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(model), str(out), *options], (Run,))
    assert stop.value.code == 2 and options[0] in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    ("ratio", "budget", "reason"), [("0.9", "global", "top-k"), ("0.97", "uniform", "top-k"), ("0.05", "uniform", "0")]
)
def test_ratio_that_leaves_too_few(
    refusal: Refusal, model: Path, out: Path, ratio: str, budget: str, reason: str
) -> None:
    refusal([model, out, "--ratio", ratio, "--budget", budget], f"ratio {ratio}", reason)


@pytest.mark.parametrize(
    "options",
    [("--slack", "10"), ("--min-keep", "12"), ("--multiple-of", "14")],
)
def test_constraints_that_leave_nothing_to_remove(
    refusal: Refusal, model: Path, out: Path, options: tuple[str, str]
) -> None:
    refusal([model, out, "--ratio", "0.25", *options], "ratio 0.25 must leave")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--similarity", "nonsense"), ("similarity", "'nonsense'")),
        (("--similarity", "outputs:-1"), ("similarity", "'outputs:-1'")),
        (("--clusters", "0"), ("clusters must be at least 1, got 0",)),
        (("--clusters", "14"), ("clusters", "13", "got 14")),
        (("--method", "cprune-paper", "--calibration", "none"), ("cprune-paper", "calibration")),
        (("--similarity", "cka,weights", "--calibration", "none"), ("similarity cka", "calibration")),
        (("--calibration", " "), ("calibration",)),
        (("--seq-len", "1"), ("seq_len must be at least 2, got 1",)),
        (("--seed", "-1"), ("seed",)),
    ],
)
def test_options_that_cannot_work(
    refusal: Refusal, model: Path, out: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refusal([model, out, *options], *words)


def test_paper_method_with_router_groups(refusal: Refusal, out: Path, text: Path, tmp_path: Path) -> None:
    model = write_tiny("deepseek_v3", tmp_path / "model")
    refusal([model, out, "--method", "cprune-paper", "--calibration", text, *SHORT], "cprune-paper", "4 groups")


def test_yaml(refusal: Refusal, model: Path, out: Path, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    refusal([model, out, "--config", file], "configuration file must be readable", str(file))
    for content, words in (
        ("nonsense: 3\nratio: 0.5\n", ("nonsense",)),
        ("ratio: 1.5\n", ("ratio must lie in (0, 1), got 1.5",)),
        ("ratio: half\n", ("ratio", "'half'")),
        ("verify: 1\n", ("verify", "bool")),
        ("[1, 2]\n", ("mapping",)),
        ("ratio: [\n", ("must be YAML",)),
    ):
        file.write_text(content)
        refusal([model, out, "--config", file], *words)
        refusal(["run", model, out, "--config", file], *words, single=True)
    file.write_bytes(b"\xff\xfe\x00ratio")
    refusal([model, out, "--config", file], str(file))
