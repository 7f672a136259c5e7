"""wgmma: matrix products that read shared memory, and whose accumulators are unreadable until they are waited for.

Operands are read when the instruction is issued and looked at again at the wait: if shared memory changed in between,
a GPU might have read either, which is an error here. Accumulator registers are poison while a product is in flight.
Not checked: that wgmma.fence and fence.proxy.async stand where they must.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.ptx.errors import ExecutionError
from tests.ptx.machine import Machine, Operation, builder, unknown
from tests.ptx.program import Immediate, Instruction, Register, Vector
from tests.ptx.shared import SharedMemory
from tests.ptx.tensorcore import DECODE
from tests.ptx.types import BITS, Array, Mask
from tests.ptx.warp import synchronous, whole_need

SWIZZLED_SPAN = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes, by the descriptor's layout
SWIZZLE_MASK = {0: 0, 1: 7, 2: 3, 3: 1}


@functools.lru_cache(maxsize=4096)
def _pieces(descriptor: int, rows: int, depth: int, size: int, transposed: bool) -> Array:
    """Addresses of an operand's 16-byte pieces, by the canonical layouts of the PTX manual's matrix descriptor:
    [rows, pieces along k], or [depth, pieces along the rows] where the operand is transposed (M or N contiguous)."""
    start, leading, stride = ((descriptor >> s & 0x3FFF) << 4 for s in (0, 16, 32))
    layout = descriptor >> 62
    span = SWIZZLED_SPAN[layout]
    if transposed:
        k, byte = np.arange(depth)[:, None], np.arange(0, rows * size, 16)[None, :]
        across, down = (leading, stride) if layout else (stride, leading)
        offsets = byte // span * across + byte % span + k // 8 * down + k % 8 * span
    else:
        row, byte = np.arange(rows)[:, None], np.arange(0, depth * size, 16)[None, :]
        offsets = row // 8 * stride + row % 8 * span + (byte if layout else byte // 16 * leading)
    offsets += start
    return offsets ^ ((offsets >> 7 & SWIZZLE_MASK[layout]) << 4)


class _Tile:
    """An operand in shared memory as it was when the product was issued."""

    def __init__(
        self, memory: SharedMemory, group: int, descriptor: int, shape: tuple[int, int, int], transposed: bool
    ):
        """Read by the threads of warpgroup `group`; `shape` is rows, depth and bytes of an element."""
        rows, depth, size = shape
        pieces = _pieces(descriptor, rows, depth, size, transposed)
        lanes = np.full(pieces.size, 128 * group)
        index = memory.slots(pieces.reshape(-1), 16, lanes)
        memory.note_read(index, 16, lanes)
        self.memory, self.index = memory, index.reshape(pieces.shape)
        self.items = memory.view(16)[self.index]
        bits = self.items.view(BITS[size])
        self.bits = bits.T if transposed else bits  # [rows, depth]

    def changed(self) -> bool:
        now = np.ascontiguousarray(self.memory.view(16)[self.index])
        return not np.array_equal(now.view(np.uint64), self.items.view(np.uint64))


@dataclass(eq=False)
class _Accumulator:
    """The true values of registers that products in flight write."""

    registers: tuple[Register, ...]
    matrices: Array  # [warpgroups, 64, N]
    writer: Array  # number of the newest group that writes them, by warpgroup; -1 for none


class _Products:
    """wgmma in flight, by warpgroup."""

    def __init__(self, warpgroups: int) -> None:
        self.warpgroups = warpgroups
        self.open: list[list[tuple[_Accumulator, list[_Tile]]]] = [[] for _ in range(warpgroups)]  # not committed yet
        self.groups: list[list[tuple[int, list]]] = [[] for _ in range(warpgroups)]  # committed: number, products
        self.accumulators: dict[tuple[int, ...], _Accumulator] = {}  # by their registers' slots
        self.number = [0] * warpgroups  # of the next group

    def accumulator(self, registers: tuple[Register, ...], columns: int) -> _Accumulator:
        slots = tuple(r.slot for r in registers)
        found = self.accumulators.get(slots)
        if found is None:
            matrices = np.zeros((self.warpgroups, 64, columns), np.float32)
            found = _Accumulator(registers, matrices, np.full(self.warpgroups, -1))
            self.accumulators[slots] = found
        return found


def _products(machine: Machine) -> _Products:
    if "products" not in machine.state:
        machine.state["products"] = _Products(machine.threads // 128)
    return machine.state["products"]


def _warpgroups(machine: Machine, act: Mask) -> list[int]:
    return [g for g in range(machine.threads // 128) if act is None or act[128 * g]]


@builder("wgmma")
def build_wgmma(machine: Machine, ins: Instruction) -> Operation:
    need = whole_need(machine, 128)
    if ins.parts[1] == "fence":
        return synchronous(lambda act: None, need)
    if ins.parts[1] == "commit_group":
        return synchronous(lambda act: _commit(machine, act), need)
    if ins.parts[1] == "wait_group":
        allowed = int(ins.operands[0].text, 0)  # type: ignore[union-attr]
        return synchronous(lambda act: _wait(machine, act, allowed), need)
    return synchronous(_multiply(machine, ins), need)


def _commit(machine: Machine, act: Mask) -> None:
    state = _products(machine)
    for g in _warpgroups(machine, act):
        state.groups[g].append((state.number[g], state.open[g]))
        state.open[g] = []
        state.number[g] += 1


def _wait(machine: Machine, act: Mask, allowed: int) -> None:
    """Finish all but the newest `allowed` groups: their registers become readable."""
    state = _products(machine)
    landed: dict[tuple[int, ...], list[int]] = {}
    checked: set[int] = set()
    for g in _warpgroups(machine, act):
        while len(state.groups[g]) > allowed:
            number, products = state.groups[g].pop(0)
            for accumulator, tiles in products:
                for tile in tiles:
                    if id(tile) not in checked and tile.changed():
                        raise ExecutionError("shared memory changed before the wgmma that reads it was waited for")
                    checked.add(id(tile))
                if accumulator.writer[g] == number:
                    accumulator.writer[g] = -1
                    landed.setdefault(tuple(r.slot for r in accumulator.registers), []).append(g)
    for slots, groups in landed.items():
        accumulator = state.accumulators[slots]
        mask = None if len(groups) == state.warpgroups else np.isin(machine.lanes // 128, groups)
        for slot, values in zip(slots, to_fragments(accumulator.matrices), strict=True):
            machine.assign(slot, values, mask)
        if (accumulator.writer < 0).all():
            del state.accumulators[slots]


def to_fragments(matrices: Array) -> Array:
    """[warpgroups, 64, N] to register bits [N / 2, threads]. Register 4 j + 2 h + e of lane 32 w + 4 q + t holds
    row 16 w + 8 h + q, column 8 j + 2 t + e."""
    count, _, columns = matrices.shape
    parts = matrices.reshape(count, 4, 2, 8, columns // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
    return np.ascontiguousarray(parts).view(np.uint32).reshape(columns // 2, 128 * count)


def from_fragments(registers: Array) -> Array:
    """The inverse for one warpgroup: values [N / 2, 128] to [64, N]."""
    columns = 2 * len(registers)
    parts = registers.reshape(columns // 8, 2, 2, 4, 8, 4).transpose(3, 1, 4, 0, 5, 2)
    return parts.reshape(64, columns)


def _multiply(machine: Machine, ins: Instruction) -> Callable[[Mask], None]:
    shape = re.match(r"m64n(\d+)k(\d+)$", ins.parts[4])
    source = ins.parts[-1]
    if not shape or source not in DECODE or ins.parts[5] != "f32" or not isinstance(ins.operands[0], Vector):
        raise unknown(ins)
    columns, depth, size = int(shape.group(1)), int(shape.group(2)), 4 if source == "tf32" else 2
    registers: tuple[Register, ...] = ins.operands[0].items  # type: ignore[assignment]
    in_registers = isinstance(ins.operands[1], Vector)
    a_gets = machine.read_items(ins.operands[1], "b32" if in_registers else "b64")
    b_get, scale = machine.read(ins.operands[2], "b64"), machine.read(ins.operands[3], "pred")
    flags = [int(o.text, 0) for o in ins.operands[4:] if isinstance(o, Immediate)] + [0, 0]
    sign = np.float32(flags[0] * flags[1])
    a_transposed, b_transposed = (False, bool(flags[2])) if in_registers else (bool(flags[2]), bool(flags[3]))
    c_gets, decode = [machine.read(r, "f32") for r in registers], DECODE[source]
    poison = machine.full(-1, 4)

    def a_fragment(act: Mask, g: int) -> Array:
        """A from registers: as for mma.sync, four warps above one another."""
        span = slice(128 * g, 128 * g + 128)
        bits = np.stack([get(act)[span] for get in a_gets]).view(BITS[size])
        values = decode(bits).reshape(-1, 2, 4, 8, 4, 4 // size)
        return values.transpose(2, 1, 3, 0, 4, 5).reshape(64, depth)

    def run(act: Mask) -> None:
        state = _products(machine)
        accumulator = state.accumulator(registers, columns)
        b_tiles: dict[int, tuple[_Tile, Array]] = {}
        adds = scale(act)
        for g in _warpgroups(machine, act):
            tiles = []
            if in_registers:
                a = a_fragment(act, g)
            else:
                tiles.append(_Tile(machine.shared, g, int(a_gets[0](act)[128 * g]), (64, depth, size), a_transposed))
                a = decode(tiles[0].bits)
            descriptor = int(b_get(act)[128 * g])
            if descriptor not in b_tiles:
                tile = _Tile(machine.shared, g, descriptor, (columns, depth, size), b_transposed)
                b_tiles[descriptor] = (tile, decode(tile.bits).T)
            tile, b = b_tiles[descriptor]
            product = a @ b if sign == 1 else (a @ b) * sign
            if adds[128 * g]:
                if accumulator.writer[g] < 0:
                    span = slice(128 * g, 128 * g + 128)
                    product += from_fragments(np.stack([get(act)[span] for get in c_gets]))
                else:
                    product += accumulator.matrices[g]
            accumulator.matrices[g] = product
            accumulator.writer[g] = state.number[g]
            state.open[g].append((accumulator, [*tiles, tile]))
        for register in registers:
            machine.assign(register.slot, poison, act)

    return run
