"""Damage to the source of the wide tiles does not go unseen by the interpreter of Gluon."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("about the interpreter", allow_module_level=True)

from cprune_kernels import expert_wide
from cprune_kernels.launch import Launch
from cprune_kernels.moe_launches import moe_forward_launches
from cprune_kernels.picker import Arch
from tests.device.gluon import HangError, KernelError, RaceError
from tests.device.shim import poisoned_empty
from tests.device.test_fused_moe import PATHS, make

# Where, what, by what, and the error; None: a wrong result.
DAMAGE: dict[str, tuple[str, str, str, type[KernelError] | None]] = {
    "nobody says that rows have come": ("gather", r"async_copy\.mbarrier_arrive\(.*", "pass", HangError),
    "too few bytes of weights expected": (
        "gather",
        r"expect\(ready, 2 \* 256 \* 64\)",
        "expect(ready, 256 * 64)",
        KernelError,
    ),
    "too few rows expected": ("fetch", r"\(256 \+ 192\)", "(256 + 128)", KernelError),
    "gate_up's ring is filled before it is free": ("gather", r"mbarrier\.wait\(empty.*", "pass", RaceError),
    "down's ring is filled before it is free": ("fetch", r"mbarrier\.wait\(empty.*", "pass", RaceError),
    "nobody waits for operands": ("_multiply", r"mbarrier\.wait\(full.*", "pass", KernelError),
    "rows have no fence": ("_step", r"fence_async_shared\(\)", "pass", KernelError),
    "no place of the ring is given back": ("_multiply", r"mbarrier\.arrive\(empty.*", "pass", HangError),
    "the next place is given back": ("_multiply", r"_before\(slot, STAGES\)", "slot", HangError),
    "more products may be under way": ("_multiply", r"warpgroup_mma_wait\(2,", "warpgroup_mma_wait(4,", RaceError),
    "the last product is not waited for": (
        "_multiply",
        r"warpgroup_mma_wait\(0,",
        "warpgroup_mma_wait(1,",
        KernelError,
    ),
    "half of the columns twice": ("_multiply", r"2 \* slot \+ PART", "2 * slot", None),
    "more stores may be under way": ("_leave", r"store_wait\(2\)", "store_wait(5)", RaceError),
    "nobody waits for stores": ("_leave", r"tma\.store_wait\(.\).*", "pass", RaceError),
    "results have no fence": ("_leave", r"fence_async_shared\(\)", "pass", KernelError),
    "a row is not stored": ("_leave", r"\(row < top \+ left\)", "(row < top + left - 1)", None),
    "half of a tile is stored elsewhere": ("_multiply", r"2 \* column \+ 1", "2 * column", None),
    "a column is not stored": ("_leave", r"\(i < WIDTH\)", "(i < WIDTH - 1)", None),
}


def products(device: str, arch: Arch) -> tuple[list[Launch], torch.Tensor]:
    """All launches but the last, for tiles of three and of two blocks, not all full, and y."""
    case = make(device, 310, 1, 2, 264, 136)
    case.index[:] = torch.arange(310)[:, None] // 300
    tensors = case.hidden, case.index, case.gates, case.weights, case.activation
    with poisoned_empty():
        launches, _ = moe_forward_launches(*tensors, dataclasses.replace(arch, sms=1), PATHS["prefill"])
    return launches[:-1], launches[-2].args["y_ptr"]


def run(device: str, arch: Arch) -> torch.Tensor:
    launches, y = products(device, arch)
    for launch in launches:
        launch.run()
    return y


def damaged(function: Any, pattern: str, new: str, folder: Path) -> Any:
    source = inspect.getsource(function.fn)
    edited = re.sub(pattern, new, source)
    assert edited != source, "the edit must find its place"
    path = folder / "damaged.py"
    path.write_text(edited)
    names = dict(function.fn.__globals__)
    exec(compile(edited, path, "exec"), names)
    return names[function.fn.__name__]


@pytest.fixture(scope="module")
def right(device: str, arch: Arch) -> torch.Tensor:
    y = run(device, arch)
    assert y.isfinite().all()
    return y


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_seen(
    name: str, device: str, arch: Arch, right: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, pattern, new, error = DAMAGE[name]
    monkeypatch.setattr(expert_wide, function, damaged(getattr(expert_wide, function), pattern, new, tmp_path))
    if error is None:
        assert not torch.equal(run(device, arch).nan_to_num(7.0), right)
    else:
        with pytest.raises(error):
            run(device, arch)
