"""What the compiler is told about a launch is what Triton's JIT would tell it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cprune_kernels.picker import A100, B200, H100
from tests.aot.compiled import Dot, compile_launch, facts, specialise
from tests.aot.samples import add_launch, meta_product


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_types_come_from_the_arguments() -> None:
    seen = specialise(add_launch(meta(300), meta(300, dtype=torch.float32), meta(300), stride=2**40), A100)
    assert seen.signature == {
        "x_ptr": "*bf16",
        "y_ptr": "*fp32",
        "out_ptr": "*bf16",
        "count": "i32",
        "stride": "i64",
        "seed": "i32",
        "scale": "fp32",
        "BLOCK": "constexpr",
    }
    assert seen.constants == {"BLOCK": 128}


def test_none_and_one_become_part_of_the_code() -> None:
    seen = specialise(add_launch(meta(300), None, meta(300), stride=1), A100)
    assert seen.constants == {"y_ptr": None, "stride": 1, "BLOCK": 128}
    assert seen.signature["y_ptr"] == seen.signature["stride"] == "constexpr"


def test_multiples_of_16_are_known_unless_the_kernel_asks_not_to() -> None:
    seen = specialise(add_launch(meta(320), meta(320), meta(320), stride=48, seed=16), A100)
    assert seen.divisible == {"x_ptr", "y_ptr", "out_ptr", "count", "stride"}  # seed is in do_not_specialize
    unaligned = torch.zeros(321, dtype=torch.bfloat16)[1:]
    seen = specialise(add_launch(unaligned, None, meta(300), stride=2, seed=1), A100)
    assert seen.divisible == {"out_ptr"}
    assert "seed" not in seen.constants


def test_descriptors_carry_their_block() -> None:
    launch = meta_product(described=True, tile=(64, 32, 128))
    assert specialise(launch, H100).signature["b_ptr"] == "tensordesc<bf16[32, 128]>"
    (tensor_map,) = compile_launch(launch, H100).tensor_maps
    assert tensor_map["block_size"] == [32, 64]  # one copy takes 128 bytes of a row: what the swizzle spans
    assert tensor_map["elem_size"] == 2


def test_options_reach_the_code() -> None:
    assert compile_launch(meta_product(warps=8), H100).threads == 256
    few, many = (compile_launch(meta_product(stages=stages), H100).shared_bytes for stages in (2, 4))
    assert many - few == 2 * (64 + 64) * 64 * 2  # two more stages of both operands


def test_equal_launches_are_compiled_once() -> None:
    launch = meta_product()
    assert compile_launch(launch, H100) is compile_launch(replace(launch, grid=(1, 1)), H100)
    assert compile_launch(launch, H100) is not compile_launch(launch, B200)
    assert compile_launch(launch, H100) is not compile_launch(meta_product(stages=4), H100)


def test_an_unknown_argument_is_refused() -> None:
    launch = add_launch(meta(300), None, meta(300))
    with pytest.raises((KeyError, TypeError)):
        compile_launch(replace(launch, args={**launch.args, "nobody": 3}), A100)


def test_facts_are_read_from_the_machine_code() -> None:
    found = facts(compile_launch(meta_product(described=True, tile=(128, 128, 64), warps=8), H100))
    assert found.dots == (Dot(128, 128, 64, "bf16"),)
    assert found.count("HGMMA") == 4 and found.count("HMMA", "LDL", "STL") == 0  # 64 columns are four of 16
    assert found.count("UTMALDG") == 3 and found.widths["LDGSTS"] == {16: 12}  # three stages ahead
    assert found.widths["STG"] == {16: 8}  # 128 x 128 halves of 256 threads
    assert found.threads == 256 and found.shared_bytes > 3 * 2 * 128 * 64 * 2 and found.stack_bytes == 0
    assert found.ctas_per_sm == 2  # 98 KiB of shared memory each, of 228


def test_spills_are_read_from_the_machine_code() -> None:
    found = facts(compile_launch(meta_product(tile=(256, 256, 32), stages=2), H100))
    assert found.registers == 255 and found.stack_bytes > 0 and found.count("LDL") > 0 and found.count("STL") > 0
