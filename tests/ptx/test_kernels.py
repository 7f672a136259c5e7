"""Every kernel as compiled PTX, executed on the CPU, against the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cprune_kernels.picker import A100, H100, Arch
from tests.cases import case_modules, case_names
from tests.device.shim import poisoned_empty
from tests.ptx.launching import execute

ROOT = Path(__file__).parents[2]
ARCHS = {arch.name: arch for arch in (A100, H100)}
CASES = [f"{case}@{arch}" for case in case_names("EXECUTED") for arch in ARCHS]
# Both sides sum in float32, in different orders: an error of some 2^-24 sqrt(terms) of the largest value. 2^-17 lies
# above that for 10^4 terms, and far below one rounding to bfloat16 (2^-9) or TF32 (2^-11).
SUM_ORDER = 2.0**-17

Outputs = dict[str, torch.Tensor] | str  # by name; or why there are none


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Outputs]]:
    """Outputs of a case from the interpreter: one process, beside this one, that is asked for a case at a time."""
    path = tmp_path_factory.mktemp("interpreted") / "outputs.pt"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "tests.device.dump", path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:

        def outputs(case: str) -> Outputs:
            print(case, file=process.stdin, flush=True)
            assert process.stdout.readline() == f"{case}\n", "the interpreter's process failed"
            return torch.load(path)

        yield outputs
        process.kill()


@pytest.mark.parametrize("case", CASES)
def test_compiled_code_computes_what_the_interpreter_does(case: str, interpreted: Callable[[str], Outputs]) -> None:
    path, _, arch = case.partition("@")
    actual, expected = executed(path, ARCHS[arch]), interpreted(case)
    assert isinstance(expected, dict), f"the interpreter failed: {expected}"
    assert actual.keys() == expected.keys() and actual
    for name, tensor in actual.items():
        assert_agrees(tensor, expected[name], name)


def executed(path: str, arch: Arch) -> dict[str, torch.Tensor]:
    name, _, entry = path.partition("/")
    with poisoned_empty():
        launches, outputs = case_modules()[name].EXECUTED[entry](arch)
    for launch in launches:
        execute(launch, arch)
    return {name: tensor for name, tensor in outputs.items() if tensor is not None}


def assert_agrees(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Integers are equal; floats but for the order of sums; halves bit-equal but for 1 in 1000.

    Those few sit where a sum falls next to the middle between two halves: in the output itself, or in a half that an
    earlier launch has stored. Either moves an output by no more than one unit in the last place of the largest.
    """
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, name
    if not actual.is_floating_point():
        assert torch.equal(actual, expected), f"{name}: {int((actual != expected).sum())} of {actual.numel()} differ"
        return
    finite = expected.isfinite()
    special = ~finite
    assert torch.equal(actual[special].nan_to_num(7.0), expected[special].nan_to_num(7.0)), f"{name}: NaN or infinity"
    a, b = actual[finite].double(), expected[finite].double()
    relative = SUM_ORDER
    if actual.element_size() == 2:
        unequal = int((a != b).sum())
        assert unequal <= 1 + a.numel() // 1000, f"{name}: {unequal} of {a.numel()} differ"
        relative += torch.finfo(actual.dtype).eps
    if a.numel():
        off, largest = float((a - b).abs().max()), float(b.abs().max())
        assert off <= relative * largest, f"{name}: off by {off}, values up to {largest}"


FIRST = torch.arange(3000)
DIFFERENCES = {
    "one integer": (torch.arange(9), lambda x: x + (x == 4), "1 of 9 differ"),
    "five roundings": (torch.ones(3000).bfloat16(), lambda x: x.where(FIRST >= 5, 1 + 2**-7), "5 of 3000 differ"),
    "two roundings of one": (torch.ones(3000).bfloat16(), lambda x: x.where(FIRST >= 1, 1 + 2**-6), "off by"),
    "a sum in TF32": (torch.ones(9), lambda x: x + 2**-11, "off by"),
    "one not written": (torch.arange(9.0), lambda x: x.masked_fill(x == 3, float("nan")), "off by"),
    "written where nothing should be": (torch.full((9,), float("nan")), lambda x: x.nan_to_num(0.0), "NaN or infinity"),
    "the wrong infinity": (torch.full((9,), float("inf")), lambda x: -x, "NaN or infinity"),
    "another type": (torch.ones(9), lambda x: x.double(), "changed"),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_difference_is_seen(difference: str) -> None:
    expected, change, said = DIFFERENCES[difference]
    assert_agrees(expected.clone(), expected, "same")
    changed = change(expected)
    with pytest.raises(AssertionError, match=said):
        assert_agrees(changed, expected, "changed")


def test_a_few_roundings_are_allowed() -> None:
    expected = torch.ones(3000).bfloat16()
    assert_agrees(expected.where(FIRST >= 3, 1 + 2**-7), expected, "halves")
    assert_agrees(torch.ones(9) + 2**-20, torch.ones(9), "floats")
