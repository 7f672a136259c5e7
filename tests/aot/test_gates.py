"""The machine code of every kernel at production sizes, for three architectures; and that the gates see it decay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from cprune_kernels.launch import Launch
from cprune_kernels.picker import A100, B200, H100, Arch
from tests.aot.compiled import compile_launch, facts, facts_of_case
from tests.aot.gates import Gate, GateError, check, check_all
from tests.aot.samples import meta_product
from tests.cases import case_modules, case_names

ARCHS = [A100, H100, B200]
WIDE = {"tile": (128, 128, 64), "warps": 8}


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
@pytest.mark.parametrize("case", case_names("COMPILED"))
def test_the_code_keeps_its_promises(case: str, arch: Arch) -> None:
    name, _, entry = case.partition("/")
    gates: Mapping[str, Gate] = getattr(case_modules()[name], "GATES", {})
    found = facts_of_case(case, arch)
    assert found
    check_all((kernel, gates.get(kernel.name, gates.get(entry, Gate()))) for kernel in found)


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
def test_a_good_product_passes(arch: Arch) -> None:
    described = arch.capability >= 90
    found = facts(compile_launch(meta_product(described=described, **WIDE), arch))
    check(found, Gate(registers=168, tensor_core=True, tma=True, narrow_loads=0, narrow_stores=0))


@pytest.mark.parametrize(
    "launch, arch, said",
    [
        pytest.param(meta_product(tile=(256, 256, 32), stages=2), H100, "bytes of stack", id="accumulator too large"),
        pytest.param(meta_product(stride=4100, **WIDE), A100, "loads of single halves", id="rows not aligned"),
        pytest.param(meta_product(tile=(128, 128, 64), warps=16), B200, "no UTCHMMA", id="too many warps for tcgen05"),
        pytest.param(meta_product(stages=8, **WIDE), A100, "bytes of shared memory", id="too many stages"),
    ],
)
def test_a_bad_configuration_is_refused(launch: Launch, arch: Arch, said: str) -> None:
    with pytest.raises(GateError, match=said):
        check(facts(compile_launch(launch, arch)), Gate())


@pytest.mark.parametrize(
    "gate, said",
    [
        (Gate(registers=64), "registers, at most 64"),
        (Gate(ctas_per_sm=9), "CTAs per SM, at least 9"),
        (Gate(tma=True), "UTMALDG"),
    ],
)
def test_a_broken_promise_is_named(gate: Gate, said: str) -> None:
    found = facts(compile_launch(meta_product(**WIDE), H100))
    check(found, Gate())
    with pytest.raises(GateError, match=said):
        check(found, gate)


def test_what_no_kernel_here_does_is_refused_too() -> None:
    found = facts(compile_launch(meta_product(**WIDE), H100))
    for change, said in [
        ({"global_scratch": 128}, "global scratch"),
        ({"instructions": found.instructions + type(found.instructions)(RED=1)}, "1 atomics"),
        ({"widths": {**found.widths, "LDGSTS": {16: 24, 4: 2}}}, "2 asynchronous copies"),
        ({"dots": ()}, "no half-precision product"),
    ]:
        with pytest.raises(GateError, match=said):
            check(replace(found, **change), Gate(tensor_core=True))


def test_all_the_broken_kernels_of_a_case_are_named() -> None:
    found = [facts(compile_launch(meta_product(warps=warps, tile=(128, 128, 64)), B200)) for warps in (4, 16, 16, 8)]
    with pytest.raises(GateError) as raised:
        check_all((kernel, Gate()) for kernel in found)
    assert str(raised.value).count("warps=16") == 2 and "warps=8" not in str(raised.value)
