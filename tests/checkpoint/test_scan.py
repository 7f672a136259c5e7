from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cprune.checkpoint import open_checkpoint
from cprune.checkpoint.reader import DTYPES
from cprune.checkpoint.scan import Ahead, check_finite
from tests.synthetic import refuses

FLOATS = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}


def write(folder: Path, **shards: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


def tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    """Four neighbours of odd sizes, one of them empty."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "b": (131, 7), "c": (0, 4), "d": (300,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("block", [64, 1 << 20], ids=["many", "one"])
@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("name", ["a", "b", "d"])
@pytest.mark.parametrize("kind", FLOATS)
def test_the_tensor_at_fault_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str, place: int, block: int
) -> None:
    monkeypatch.setattr("cprune.checkpoint.scan.BLOCK_BYTES", block)
    good, bad = tensors(FLOATS[kind]), tensors(FLOATS[kind])
    check_finite(open_checkpoint(write(tmp_path, x=good, y={"other": torch.ones(3)})))
    bad[name].view(-1)[place] = float("nan")
    with refuses(f"weights must be finite, got NaN or infinity in {name}$"):
        check_finite(open_checkpoint(write(tmp_path, x=bad, y={"other": torch.ones(3)})))


@pytest.mark.parametrize("values", [(torch.inf,), (-torch.inf,), (torch.inf, -torch.inf), (torch.inf, torch.nan)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_infinities_do_not_cancel(tmp_path: Path, dtype: torch.dtype, values: tuple[float, ...]) -> None:
    bad = tensors(dtype)
    bad["b"][5, : len(values)] = torch.tensor(values, dtype=dtype)
    with refuses("weights must be finite, got NaN or infinity in b$"):
        check_finite(open_checkpoint(write(tmp_path, x=bad)))


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_sums_that_overflow_are_finite_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    large = torch.full((300,), torch.finfo(dtype).max / 2, dtype=torch.float64).to(dtype)
    check_finite(open_checkpoint(write(tmp_path, x={"large": large})))


def test_whole_numbers_are_never_at_fault(tmp_path: Path) -> None:
    bits = torch.full((64,), torch.nan).view(torch.uint8)
    check_finite(open_checkpoint(write(tmp_path, x={"scales": bits, "float": torch.ones(5)})))


@pytest.mark.parametrize("dtype", [dtype for dtype in FLOATS.values() if dtype.itemsize <= 2], ids=str)
def test_every_pattern_of_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = torch.arange(1 << 8 * dtype.itemsize).to(torch.int32 if dtype.itemsize == 2 else torch.int16)
    numbers = bits.to(torch.uint16 if dtype.itemsize == 2 else torch.uint8).view(dtype)
    finite = numbers.float().isfinite()
    check_finite(open_checkpoint(write(tmp_path / "all", x={"a": numbers[finite]})))
    for place, number in enumerate(numbers[~finite][:: 1 + (~finite).sum() // 40]):
        folder = write(tmp_path / f"{place}", x={"a": torch.stack([numbers[1], number])})
        with refuses("got NaN or infinity in a$"):
            check_finite(open_checkpoint(folder))


def finished(ahead: Ahead) -> frozenset[str]:
    ahead._thread.join()
    return ahead.stop().finite


@pytest.mark.parametrize("block", [64, 1 << 20], ids=["many", "one"])
def test_what_was_looked_at_ahead_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("cprune.checkpoint.scan.AHEAD_BYTES", block)
    good, bad = tensors(torch.bfloat16), tensors(torch.bfloat16)
    folder = write(tmp_path, x=good, y={f"second {name}": tensor for name, tensor in bad.items()})
    assert finished(Ahead(open_checkpoint(folder))) == {*good, *(f"second {name}" for name in bad)}
    bad["b"][60, 0] = torch.nan
    write(tmp_path, y={f"second {name}": tensor for name, tensor in bad.items()})
    ahead = Ahead(open_checkpoint(folder))
    found = finished(ahead)
    assert set(good) <= found and not {"second b", "second d"} & found
    (folder / "x.safetensors").unlink()
    with refuses("weights must be finite, got NaN or infinity in second b$"):
        check_finite(ahead.stop())


def test_looking_ahead_leaves_errors_to_whoever_asks(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, x=tensors(torch.float32)))
    (tmp_path / "x.safetensors").write_bytes(b"")
    assert finished(Ahead(checkpoint)) == frozenset()
    with refuses("must hold all of"):
        check_finite(checkpoint)
