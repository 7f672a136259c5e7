"""Machine code read with the tools that Triton ships; the disassembler starts slowly, so it is given many kernels."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TARGETS = {80: "SM80", 90: "SM90a", 100: "SM100a"}
INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)")

Instruction = tuple[str, tuple[str, ...]]  # opcode and its suffixes: "LDG", ("E", "128")


def disassemble(cubins: Sequence[bytes], capability: int) -> list[list[Instruction]]:
    """The instructions of each cubin, all of that capability."""
    texts = [machine_code(cubin) for cubin in cubins]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code"
        path.write_bytes(b"".join(texts))
        listing = _output("nvdisasm", "-ndf", "-b", TARGETS[capability], path)
    found = [(int(at, 16), op, tuple(rest.split(".")[1:])) for at, op, rest in INSTRUCTION.findall(listing)]
    parts, end, position = [], 0, 0
    for text in texts:
        start, end = position, end + len(text)
        while position < len(found) and found[position][0] < end:
            position += 1
        parts.append([(op, suffixes) for _, op, suffixes in found[start:position]])
    return parts


def machine_code(cubin: bytes) -> bytes:
    """The bytes of an ELF file's .text sections."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<I20xQQ", cubin, table + i * entry) for i in range(count)]  # name, offset, size
    names = sections[names_index][1]
    return b"".join(
        cubin[offset : offset + size] for name, offset, size in sections if cubin[names + name :].startswith(b".text.")
    )


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = _output("cuobjdump", "-res-usage", path)
    registers, stack = (int(re.search(rf"{what}:(\d+)", text).group(1)) for what in ("REG", "STACK"))
    return registers, stack


def complaints(ptx: str, capability: int) -> list[str]:
    """What the assembler says costs time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [TOOLS / "ptxas", "-v", f"--gpu-name={TARGETS[capability].lower().replace('sm', 'sm_')}", path]
        said = subprocess.run([*command, "-o", Path(folder) / "out"], capture_output=True, text=True, check=True).stderr
    return [line for line in said.splitlines() if "Performance Loss" in line]


def _output(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
