"""What the machine code of a kernel must look like: a change that loses it is seen before any GPU is timed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tests.aot.compiled import Dot, Facts

HALVES = ("bf16", "f16")
ATOMICS = ("ATOM", "ATOMG", "RED", "REDG", "UTMAREDG")  # on global memory; those on shared memory count integers
# The product instruction of each architecture for tiles that are large enough for it.
WIDE_MMA = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


class GateError(AssertionError):
    """The code is not what was promised."""


@dataclass(frozen=True)
class Gate:
    """Promises about one kernel; the defaults hold for every kernel of this library unless its case says otherwise."""

    registers: int = 255  # at most, per thread
    ctas_per_sm: int = 1  # at least
    tensor_core: bool = False  # it has products, all on the tensor cores
    tma: bool = False  # from capability 90 on, tiles come through tensor descriptors
    narrow_copies: int = 0  # at most so many asynchronous copies of less than 16 bytes
    narrow_loads: int | None = None  # the same of loads
    narrow_stores: int | None = None  # the same of stores
    atomics: bool = False  # the kernel may use them


def check(facts: Facts, gate: Gate) -> None:
    """Raise `GateError` with every promise that the code breaks."""
    broken = [*_resources(facts, gate), *_memory(facts, gate), *_products(facts, gate)]
    if broken:
        raise GateError(f"{facts.name}({facts.configuration}) for {facts.arch.name}: " + "; ".join(broken))


def check_all(kernels: Iterable[tuple[Facts, Gate]]) -> None:
    """Raise one `GateError` about all the kernels that break a promise."""
    said = []
    for facts, gate in kernels:
        try:
            check(facts, gate)
        except GateError as error:
            said.append(str(error))
    if said:
        raise GateError("\n".join(said))


def _resources(facts: Facts, gate: Gate) -> list[str]:
    spills = facts.count("LDL", "STL")
    return _broken(
        (facts.stack_bytes == 0 and spills == 0, f"{facts.stack_bytes} bytes of stack, {spills} accesses of it"),
        (facts.registers <= gate.registers, f"{facts.registers} registers, at most {gate.registers}"),
        (
            facts.shared_bytes <= facts.arch.shared_bytes,
            f"{facts.shared_bytes} bytes of shared memory, at most {facts.arch.shared_bytes}",
        ),
        (facts.ctas_per_sm >= gate.ctas_per_sm, f"{facts.ctas_per_sm} CTAs per SM, at least {gate.ctas_per_sm}"),
        (facts.global_scratch == 0, f"{facts.global_scratch} bytes of global scratch"),
        (gate.atomics or not facts.count(*ATOMICS), f"{facts.count(*ATOMICS)} atomics"),
    )


def _memory(facts: Facts, gate: Gate) -> list[str]:
    narrow = {opcode: sum(n for width, n in counts.items() if width < 16) for opcode, counts in facts.widths.items()}
    # an operand of a product that is loaded number by number has lost its asynchronous copies (indices are wider)
    single = sum(n for width, n in facts.widths["LDG"].items() if width < 4) if facts.dots else 0
    promised_tma = gate.tma and facts.arch.capability >= 90
    return _broken(
        (narrow["LDGSTS"] <= gate.narrow_copies, f"{narrow['LDGSTS']} asynchronous copies of less than 16 bytes"),
        (single == 0, f"{single} loads of single halves in a kernel with products"),
        (gate.narrow_loads is None or narrow["LDG"] <= gate.narrow_loads, f"{narrow['LDG']} narrow loads"),
        (gate.narrow_stores is None or narrow["STG"] <= gate.narrow_stores, f"{narrow['STG']} narrow stores"),
        (not promised_tma or facts.count("UTMALDG") > 0, "no copy through a tensor descriptor (UTMALDG)"),
    )


def _products(facts: Facts, gate: Gate) -> list[str]:
    """Half-precision products must take the widest instruction that their tile allows, promised or not."""
    expected = {mma(dot, facts.arch.capability) for dot in facts.dots if dot.dtype in HALVES}
    return _broken(
        (not gate.tensor_core or bool(expected), "no half-precision product in the kernel"),
        *((facts.count(opcode) > 0, f"no {opcode}") for opcode in sorted(expected)),
    )


def mma(dot: Dot, capability: int) -> str:
    """The instruction of a half-precision product; warpgroup and tcgen05 products take 64 rows or more."""
    return WIDE_MMA[capability] if dot.m >= 64 else "HMMA"


def _broken(*promises: tuple[bool, str]) -> list[str]:
    return [what for kept, what in promises if not kept]
