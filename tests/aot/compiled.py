"""Kernels compiled without a GPU: what Triton's JIT would build for a launch, and what its machine code looks like.

The compiler ships ptxas, cuobjdump and nvdisasm, so registers, spills and instructions are facts on any machine.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, compile, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from cprune_kernels.launch import Launch
from cprune_kernels.picker import Arch
from tests.aot.sass import Instruction, disassemble, usage
from tests.cases import case_modules

SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # bytes; each CTA takes 1 KiB beside its own
REGISTERS_PER_SM, THREADS_PER_SM, CTAS_PER_SM = 65536, 2048, 32
DOT = re.compile(
    r"= (?:tt\.dot|ttng\.warp_group_dot) .*?: "
    r"(?:tensor|!ttg\.memdesc)<(\d+)x(\d+)x(\w+)\b.*?> \* (?:tensor|!ttg\.memdesc)<\d+x(\d+)x\w+"
)


@dataclass(frozen=True)
class Specialised:
    """The arguments of a launch as the compiler sees them: types, and the values that became part of the code."""

    signature: dict[str, str]  # "*bf16", "i32", "fp32", "tensordesc<bf16[1, 2, 128, 64]>"; "constexpr" for a constant
    constants: dict[str, Any]  # by name: tl.constexpr, None and every integer 1
    attributes: dict[tuple[int, ...], Any]  # by position of the argument: [["tt.divisibility", 16]]
    options: Any

    @property
    def divisible(self) -> set[str]:
        """Arguments known to be multiples of 16 (bytes, of a pointer)."""
        names = list(self.signature)
        return {names[position] for (position,), values in self.attributes.items() if ["tt.divisibility", 16] in values}

    @property
    def configuration(self) -> str:
        """What tells two builds of a kernel apart, for people."""
        chosen = {**self.constants, "warps": self.options.num_warps, "stages": self.options.num_stages}
        return ", ".join(f"{name}={value}" for name, value in chosen.items())

    def key(self) -> tuple[str, ...]:
        return tuple(map(repr, (self.signature, self.constants, self.attributes, self.options)))


@dataclass(frozen=True)
class Dot:
    """A product of the kernel: [m, k] with [k, n]."""

    m: int
    n: int
    k: int
    dtype: str  # of the operands, in Triton's names: "bf16", "f16", "f32"


@dataclass(frozen=True, eq=False)
class Compiled:
    """A kernel as machine code, with what a launch of it needs."""

    name: str
    arch: Arch
    specialised: Specialised
    ptx: str
    cubin: bytes
    dots: tuple[Dot, ...]
    threads: int  # of a CTA
    shared_bytes: int
    global_scratch: int  # bytes per CTA
    tensor_maps: tuple[Mapping[str, Any], ...]  # of each descriptor argument in order: block_size, swizzle, elem_size


@dataclass(frozen=True)
class Facts:
    """What the machine code of a kernel takes and does; an instruction counts once, however often it is run."""

    name: str
    configuration: str  # constants and options, to be read
    arch: Arch
    dots: tuple[Dot, ...]
    registers: int  # per thread
    stack_bytes: int  # per thread; spilled registers live here
    shared_bytes: int  # per CTA
    global_scratch: int  # bytes per CTA
    threads: int
    instructions: Counter[str]  # by opcode: "HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "LDL", ...
    widths: dict[str, Counter[int]]  # bytes per thread and access of LDGSTS, LDG and STG
    ctas_per_sm: int

    def count(self, *opcodes: str) -> int:
        return sum(self.instructions[opcode] for opcode in opcodes)


def specialise(launch: Launch, arch: Arch) -> Specialised:
    """Types, constants and divisibility by Triton's own rules; a meta tensor counts as aligned."""
    kernel, backend = launch.kernel, make_backend(_target(arch))
    if not isinstance(kernel, JITFunction):
        raise ValueError("kernels must be imported without TRITON_INTERPRET to be compiled, got interpreted ones")
    named = {**launch.args, **launch.constants, **launch.options, "debug": False}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments, specialisation, rest = bind(**named)
    parsed, signature, constants, attributes = kernel._pack_args(backend, named, arguments, specialisation, rest)
    names = list(signature)
    by_name = {names[position]: value for (position,), value in constants.items()}
    return Specialised(signature, by_name, attributes, parsed)


def _target(arch: Arch) -> GPUTarget:
    return GPUTarget("cuda", arch.capability, 32)


_COMPILED: dict[tuple[Any, ...], Compiled] = {}


def compile_launch(launch: Launch, arch: Arch) -> Compiled:
    """The code that `launch.run()` would run on such a GPU; built once per process, and kept on disk by Triton."""
    specialised = specialise(launch, arch)
    key = (launch.kernel, arch.capability, specialised.key())
    if key not in _COMPILED:
        _COMPILED[key] = _compile(launch.kernel, specialised, arch)
    return _COMPILED[key]


def _compile(kernel: Any, specialised: Specialised, arch: Arch) -> Compiled:
    gluon = kernel.is_gluon()
    source_of = GluonASTSource if gluon else ASTSource
    source = source_of(kernel, specialised.signature, specialised.constants, specialised.attributes)
    built = compile(source, target=_target(arch), options=dict(vars(specialised.options)))
    dots = tuple(
        Dot(int(m), int(n), int(k), dtype)
        for m, k, dtype, n in DOT.findall(str(built.asm["ttgir" if gluon else "ttir"]))
    )
    return Compiled(
        name=kernel.__name__,
        arch=arch,
        specialised=specialised,
        ptx=built.asm["ptx"],
        cubin=built.asm["cubin"],
        dots=dots,
        threads=int(re.search(r"\.(?:reqntid|maxntid) (\d+)", built.asm["ptx"]).group(1)),
        shared_bytes=built.metadata.shared,
        global_scratch=built.metadata.global_scratch_size,
        tensor_maps=tuple(built.metadata.tensordesc_meta or ()),
    )


_FACTS: dict[Compiled, Facts] = {}


def facts(compiled: Compiled) -> Facts:
    return facts_of([compiled])[0]


def facts_of(kernels: Sequence[Compiled]) -> list[Facts]:
    """Facts of kernels for one architecture; together they take hardly longer than one."""
    new = [kernel for kernel in dict.fromkeys(kernels) if kernel not in _FACTS]
    if new:
        for kernel, code in zip(new, disassemble([k.cubin for k in new], new[0].arch.capability), strict=True):
            _FACTS[kernel] = _read(kernel, code)
    return [_FACTS[kernel] for kernel in kernels]


def facts_of_case(case: str, arch: Arch) -> list[Facts]:
    """Facts of every launch of a COMPILED case."""
    name, _, entry = case.partition("/")
    return facts_of([compile_launch(launch, arch) for launch in case_modules()[name].COMPILED[entry](arch)])


def _read(compiled: Compiled, code: Sequence[Instruction]) -> Facts:
    registers, stack = usage(compiled.cubin)
    instructions = Counter(opcode for opcode, _ in code)
    widths: dict[str, Counter[int]] = {opcode: Counter() for opcode in ("LDGSTS", "LDG", "STG")}
    for opcode, suffixes in code:
        if opcode in widths:
            widths[opcode][_access_bytes(suffixes)] += 1
    return Facts(
        name=compiled.name,
        configuration=compiled.specialised.configuration,
        arch=compiled.arch,
        dots=compiled.dots,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=compiled.shared_bytes,
        global_scratch=compiled.global_scratch,
        threads=compiled.threads,
        instructions=instructions,
        widths=widths,
        ctas_per_sm=_ctas_per_sm(compiled, registers),
    )


def _access_bytes(suffixes: Sequence[str]) -> int:
    """Bytes of one access from the suffixes of its opcode; no suffix of a size means four."""
    sizes = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((sizes[suffix] for suffix in suffixes if suffix in sizes), 4)


def _ctas_per_sm(compiled: Compiled, registers: int) -> int:
    """CTAs that one SM holds: registers are given to a warp in blocks of 256."""
    warps = compiled.threads // 32
    by_registers = REGISTERS_PER_SM // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = SHARED_PER_SM[compiled.arch.capability] // (compiled.shared_bytes + 1024)
    return min(by_registers, by_shared, THREADS_PER_SM // compiled.threads, CTAS_PER_SM)
