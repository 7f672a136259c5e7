"""Runs a parsed kernel on the CPU: one CTA at a time, all of its threads as numpy vectors.

    program = parse(ptx)
    stats = run(program, grid, [x.ctypes.data, n], shared_bytes=0, memory=[x])

Threads that stand at one instruction execute it together. Where branches part them, the group at the smallest
instruction runs first, until it meets the others. Instructions of several threads (shuffles, matrix products, barriers)
wait for all threads that they name; when nobody can go on any more, the kernel hangs, which is an error here.
`run_together` takes several CTAs at a time, of several launches, a turn each.
Not modelled: other orders of warps between barriers (races in shared memory raise).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.ptx import bits, bulk, floats, scalar, tensorcore, transfers, warp, wgmma  # noqa: F401  (they register builders)
from tests.ptx.bulk import TensorMap
from tests.ptx.control import Scheduler
from tests.ptx.errors import AccessError, ExecutionError, HangError, RaceError
from tests.ptx.machine import Machine
from tests.ptx.memory import FlatMemory, GlobalMemory
from tests.ptx.parser import parse
from tests.ptx.program import Parameter, Program
from tests.ptx.shared import SharedMemory
from tests.ptx.types import Array

__all__ = [
    "AccessError",
    "ExecutionError",
    "HangError",
    "Program",
    "RaceError",
    "Stats",
    "TensorMap",
    "parse",
    "run",
    "run_together",
]


@dataclass(frozen=True)
class Stats:
    """What a launch did. Bytes count every access; distinct bytes count each address once, by buffer of `memory`."""

    ctas: int
    instructions: int  # issued, once for each group of threads that executes it
    opcodes: dict[str, int]
    read_bytes: int
    written_bytes: int
    distinct_read: tuple[int, ...]
    distinct_written: tuple[int, ...]

    def count(self, prefix: str) -> int:
        """Instructions issued whose opcode starts with `prefix`."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith(prefix))


def run(
    program: Program,
    grid: tuple[int, ...],
    args: Sequence[int | float | bytes | TensorMap],
    *,
    shared_bytes: int,
    memory: Sequence[np.ndarray],
    threads: int | tuple[int, ...] | None = None,
    races: bool = True,
) -> Stats:
    """Execute every CTA of `grid`, x fastest.

    `args` are the parameters in order: addresses of arrays in `memory` as integers, numbers, bytes for structures,
    TensorMaps for 128-byte descriptors; the last two may be left out and are 0 then (Triton's scratch pointers).
    `shared_bytes` is dynamic shared memory; `threads` is the block, where the kernel does not say it itself; `races`
    looks for warps that use the same shared memory with no barrier in between.
    Raises ValueError for a call that does not fit the program, ExecutionError (AccessError, RaceError, HangError) for
    what is undefined on a GPU, NotImplementedError for an instruction that is not known here, with its line.
    """
    everything = GlobalMemory(memory)
    machine, count = _machine(program, args, everything, shared_bytes, threads, races)
    dimensions = (*grid, 1, 1)[:3]
    with np.errstate(all="ignore"):
        scheduler = Scheduler(machine)
        for index in np.ndindex(*dimensions[::-1]):
            machine.reset(_cta_specials(index[::-1], dimensions, count))
            scheduler.run_cta(index[::-1])
    used = everything.buffers[: len(memory)]
    return Stats(
        ctas=int(np.prod(dimensions)),
        instructions=sum(scheduler.counts),
        opcodes=scheduler.opcodes(),
        read_bytes=everything.read_bytes,
        written_bytes=everything.written_bytes,
        distinct_read=tuple(int(np.count_nonzero(b.read)) for b in used),
        distinct_written=tuple(int(np.count_nonzero(b.written)) for b in used),
    )


@dataclass(frozen=True)
class Grid:
    """A launch of `run_together`: what `run` takes of it."""

    program: Program
    size: tuple[int, ...]
    args: Sequence[int | float | bytes | TensorMap]
    shared_bytes: int


def run_together(grids: Sequence[Grid], memory: Sequence[np.ndarray], most: int) -> list[dict[str, int]]:
    """Execute the CTAs of all grids side by side, so that one may wait for another; at most `most` instructions each.

    Gives what each CTA has issued, by opcode.
    """
    everything = GlobalMemory(memory)
    schedulers: list[Scheduler] = []
    with np.errstate(all="ignore"):
        for grid in grids:
            dimensions = (*grid.size, 1, 1)[:3]
            for index in np.ndindex(*dimensions[::-1]):
                machine, count = _machine(grid.program, grid.args, everything, grid.shared_bytes, None, True)
                machine.reset(_cta_specials(index[::-1], dimensions, count))
                schedulers.append(Scheduler(machine, most, polite=True))
                schedulers[-1].begin(index[::-1])
        busy = schedulers
        while busy:
            busy = [scheduler for scheduler in busy if scheduler.turn()]
    return [scheduler.opcodes() for scheduler in schedulers]


def _machine(
    program: Program,
    args: Sequence[int | float | bytes | TensorMap],
    everything: GlobalMemory,
    shared_bytes: int,
    threads: int | tuple[int, ...] | None,
    races: bool,
) -> tuple[Machine, int]:
    """A machine for the CTAs of a launch, and how many threads each has."""
    block = _block(program, threads)
    count = int(np.prod(block))
    symbols = {**program.shared, **program.local, **{p.name: p.offset for p in program.parameters}}
    for variable in program.variables:
        data = np.zeros(-(-variable.size // 16) * 16, np.uint8)
        data[: len(variable.data)] = np.frombuffer(variable.data, np.uint8)
        symbols[variable.name] = everything.add(data).base
    param, tensor_maps = _parameters(program, args)
    shared = SharedMemory(program.shared_bytes + shared_bytes, -(-count // 32) if races else 1)
    machine = Machine(program, count, everything, param, shared, symbols, tensor_maps)
    machine.specials.update(_thread_specials(block, count, shared.size, shared_bytes))
    return machine, count


def _block(program: Program, threads: int | tuple[int, ...] | None) -> tuple[int, ...]:
    if threads is None:
        threads = program.threads
    if threads is None:
        raise ValueError(f"threads must be given, {program.name} does not say it")
    block = (*((threads,) if isinstance(threads, int) else threads), 1, 1)[:3]
    if not 1 <= np.prod(block) <= 1024:
        raise ValueError(f"threads must lie in [1, 1024], got {threads}")
    return block


def _thread_specials(block: tuple[int, ...], count: int, total_shared: int, dynamic_shared: int) -> dict[str, Array]:
    lanes = np.arange(count, dtype=np.uint32)
    x, y = np.uint32(block[0]), np.uint32(block[1])
    lane = lanes % 32
    one = np.uint32(1)
    values = {
        "%tid.x": lanes % x,
        "%tid.y": lanes // x % y,
        "%tid.z": lanes // (x * y),
        "%laneid": lane,
        "%warpid": lanes // 32,
        "%nwarpid": np.full(count, -(-count // 32), np.uint32),
        "%lanemask_eq": one << lane,
        "%lanemask_lt": (one << lane) - one,
        "%lanemask_le": (one << lane) - one | one << lane,
        "%lanemask_ge": ~((one << lane) - one),
        "%lanemask_gt": ~((one << lane) - one | one << lane),
        "%dynamic_smem_size": np.full(count, dynamic_shared, np.uint32),
        "%total_smem_size": np.full(count, total_shared, np.uint32),
    }
    zeros, ones = np.zeros(count, np.uint32), np.ones(count, np.uint32)
    names = ("%clock", "%globaltimer", "%smid", "%gridid", "%cluster_ctarank")
    values.update(dict.fromkeys(names, zeros) | {"%clock64": zeros, "%cluster_nctarank": ones, "%nsmid": ones})
    for axis, extent in zip("xyz", block, strict=True):
        values[f"%ntid.{axis}"] = np.full(count, extent, np.uint32)
        values[f"%cluster_ctaid.{axis}"], values[f"%cluster_nctaid.{axis}"] = zeros, ones
    return values


def _cta_specials(index: tuple[int, ...], grid: tuple[int, ...], count: int) -> dict[str, Array]:
    values = {}
    for axis, i, n in zip("xyz", index, grid, strict=True):
        values[f"%ctaid.{axis}"] = values[f"%clusterid.{axis}"] = np.full(count, i, np.uint32)
        values[f"%nctaid.{axis}"] = values[f"%nclusterid.{axis}"] = np.full(count, n, np.uint32)
    return values


def _parameters(
    program: Program, args: Sequence[int | float | bytes | TensorMap]
) -> tuple[FlatMemory, dict[int, TensorMap]]:
    wanted = program.parameters
    if not len(wanted) - 2 <= len(args) <= len(wanted):
        raise ValueError(f"args must be {len(wanted)} values (the last two may be left out), got {len(args)}")
    memory = FlatMemory(max((p.offset + p.size for p in wanted), default=0), "parameter")
    maps: dict[int, TensorMap] = {}
    for parameter, value in zip(wanted, [*args, 0, 0], strict=False):
        if isinstance(value, TensorMap):
            if parameter.size != 128:
                raise ValueError(f"{parameter.name} must be a 128-byte tensor map, got {parameter.size} bytes")
            maps[parameter.offset] = value
            continue
        data = np.frombuffer(_encoded(parameter, value), np.uint8)
        memory.bytes[parameter.offset : parameter.offset + len(data)] = data
    return memory, maps


def _encoded(parameter: Parameter, value: int | float | bytes) -> bytes:
    if isinstance(value, bytes):
        if len(value) != parameter.size:
            raise ValueError(f"{parameter.name} must be {parameter.size} bytes, got {len(value)}")
        return value
    if parameter.type in ("f32", "f64"):
        return struct.pack("<f" if parameter.type == "f32" else "<d", value)
    if parameter.size > 8 or isinstance(value, float):
        raise ValueError(f"{parameter.name} must be {parameter.type} ({parameter.size} bytes), got {value!r}")
    return (int(value) & (1 << 8 * parameter.size) - 1).to_bytes(parameter.size, "little")
