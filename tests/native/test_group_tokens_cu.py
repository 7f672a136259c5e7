"""csrc/cuda/group_tokens.cu: compiled by nvcc for three generations, and its PTX run on the CPU."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.ptx.executor import parse, run

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")

SOURCE = Path(__file__).parents[2] / "csrc" / "cuda" / "group_tokens.cu"
THREADS = 1024
parsed = functools.cache(parse)
ARCHES = ("sm_80", "sm_90a", "sm_100a")


@pytest.fixture(scope="module", params=ARCHES)
def ptx(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("ptx") / "group_tokens.ptx"
    subprocess.run(["nvcc", "-ptx", f"-arch={request.param}", "-o", str(out), str(SOURCE)], check=True)
    return out.read_text()


def expected(index: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By a stable sort: routed pairs by expert, then the others."""
    flat = index.reshape(-1)
    key = np.where((flat >= 0) & (flat < experts), flat, experts)
    sorted_pairs = np.argsort(key, kind="stable").astype(np.int32)
    offsets = np.searchsorted(key[sorted_pairs], np.arange(experts + 1)).astype(np.int32)
    total = offsets[-1]
    order, position = np.full(len(flat), -1, np.int32), np.full(len(flat), -1, np.int32)
    order[:total] = sorted_pairs[:total]
    position[order[:total]] = np.arange(total, dtype=np.int32)
    return order, offsets, position


def grouped(ptx: str, index: np.ndarray, experts: int, small: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The launches that group_tokens.cu describes; the outputs hold a number that none of them may keep."""
    pairs, kind = index.size, "i64" if index.dtype == np.int64 else "i32"
    order, position = np.full(pairs, 77777, np.int32), np.full(pairs, 77777, np.int32)
    offsets = np.full(experts + 1, 77777, np.int32)
    at = [array.ctypes.data for array in (order, offsets, position)]

    def launch(name: str, blocks: int, args: list[int], *memory: np.ndarray) -> None:
        run(parsed(ptx, name), (blocks,), args, shared_bytes=0, memory=memory, threads=THREADS)

    if small:
        arguments = [index.ctypes.data, pairs, experts, *at]
        launch(f"group_small_{kind}", 1, arguments, index, order, offsets, position)
        return order, offsets, position
    blocks = -(-pairs // THREADS)
    counts = np.full((experts, blocks), 77777, np.int32)
    arguments = [index.ctypes.data, pairs, experts, counts.ctypes.data]
    launch(f"group_count_{kind}", blocks, arguments, index, counts)
    launch("group_scan", 1, [counts.ctypes.data, experts, blocks, at[1]], counts, offsets)
    arguments += [at[1], at[0], at[2]]
    launch(f"group_scatter_{kind}", blocks, arguments, index, counts, offsets, order, position)
    return order, offsets, position


def routing(tokens: int, top_k: int, experts: int, kind: str) -> np.ndarray:
    generator = np.random.default_rng(0)
    index = generator.integers(0, experts, (tokens, top_k))
    if kind == "holes":  # slots without an expert on both sides of the range, and one expert without tokens
        index = np.where(index == experts // 2, -1, index)
        index[::5, 0] = experts + 3
    if kind == "one":
        index[:] = experts - 1
    if kind == "none":
        index[:] = -1
    return index


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("kind", ["holes", "one", "none"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 64), (131, 2, 5), (300, 4, 33)], ids=str)
def test_small_launch_is_a_stable_sort(ptx: str, shape: tuple[int, int, int], kind: str, dtype: type) -> None:
    index = routing(*shape, kind).astype(dtype)
    for got, want in zip(grouped(ptx, index, shape[2], small=True), expected(index, shape[2]), strict=True):
        assert np.array_equal(got, want)


@pytest.mark.parametrize("kind", ["holes", "one"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (512, 2, 7), (300, 8, 40)], ids=str)
def test_three_launches_are_a_stable_sort(ptx: str, shape: tuple[int, int, int], kind: str) -> None:
    index = routing(*shape, kind)
    for got, want in zip(grouped(ptx, index, shape[2], small=False), expected(index, shape[2]), strict=True):
        assert np.array_equal(got, want)


def test_an_expert_of_another_width_is_no_expert(ptx: str) -> None:
    index = np.array([[2**32, 1], [1 - 2**32, 0]])  # their low words are experts
    for got, want in zip(grouped(ptx, index, 3, small=True), expected(index, 3), strict=True):
        assert np.array_equal(got, want)


def test_nothing_is_left_to_a_race(ptx: str) -> None:
    assert not re.search(r"\b(atom|red)\.", ptx)
