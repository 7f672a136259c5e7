"""mma.sync.

Products of 16-bit floats are exact in float32 and are summed in float32, in the order of the host's matrix product;
real tensor cores truncate in places, so results agree to fp32 rounding and not bit for bit. The same holds for wgmma.
"""

from __future__ import annotations

import re

import numpy as np

from tests.ptx.machine import Machine, Operation, builder, unknown
from tests.ptx.program import Instruction
from tests.ptx.types import BITS, Mask, bf16_to_f32, f16_to_f32, truncate_to_tf32
from tests.ptx.warp import executing_warps, spread, synchronous, whole_need

DECODE = {"bf16": bf16_to_f32, "f16": f16_to_f32, "tf32": truncate_to_tf32}


@builder("mma")
def build_mma(machine: Machine, ins: Instruction) -> Operation:
    """m16n8k16 and m16n8k8, row.col, with fp32 accumulators. A fragment register holds one pair of 16-bit elements or
    one tf32 element; lane = 4 g + t, rows g and g + 8, columns around t."""
    shape = re.match(r"m16n8k(\d+)$", ins.parts[3])
    source = ins.parts[-2]
    if not shape or source not in DECODE or ins.parts[-1] != "f32" or ins.parts[6] != "f32":
        raise unknown(ins)
    depth, each = int(shape.group(1)), 1 if source == "tf32" else 2
    bits, decode = BITS[4 // each], DECODE[source]
    puts = machine.write_items(ins.operands[0], "f32")
    a_gets, b_gets = (machine.read_items(o, "b32") for o in ins.operands[1:3])
    c_gets = machine.read_items(ins.operands[3], "f32")
    steps = depth // (4 * each)  # registers along k

    def run(act: Mask) -> None:
        warps = executing_warps(machine, act)
        n = len(warps)
        gather = slice(None) if act is None else warps
        a_bits = np.stack([g(act).reshape(-1, 32)[gather] for g in a_gets])  # by register: [k part, row half]
        b_bits = np.stack([g(act).reshape(-1, 32)[gather] for g in b_gets])
        c = np.stack([g(act).reshape(-1, 32)[gather] for g in c_gets])
        a = decode(a_bits.view(bits)).reshape(steps, 2, n, 8, 4, each)
        a = a.transpose(2, 1, 3, 0, 4, 5).reshape(n, 16, depth)
        b = decode(b_bits.view(bits)).reshape(steps, n, 8, 4, each)
        b = b.transpose(1, 0, 3, 4, 2).reshape(n, depth, 8)
        product = np.matmul(a, b).reshape(n, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, n, 32)
        result = product + c
        for i, put in enumerate(puts):
            put(spread(machine, result[i], warps), act)

    return synchronous(run, whole_need(machine))
