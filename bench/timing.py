"""What the benches of the kernels share: published models, calls timed on a CPU or a GPU, rows in a CSV file."""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from common import ROWS, machine, print_rows
from torch import Tensor

from cprune_kernels.picker import arch_of


@dataclass(frozen=True)
class Model:
    """The experts of a published model."""

    hidden: int
    inner: int
    experts: int
    top_k: int
    layers: int  # with experts


MODELS = {
    "mixtral-8x7b": Model(4096, 14336, 8, 2, 32),
    "qwen3-30b-a3b": Model(2048, 768, 128, 8, 48),
    "deepseek-v2-lite": Model(2048, 1408, 64, 6, 26),
    "deepseek-v3": Model(7168, 2048, 256, 8, 58),
    "kimi-k2": Model(7168, 2048, 384, 8, 60),
}
FORWARD = ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v2-lite", "deepseek-v3")


@dataclass(frozen=True)
class Work:
    """One operation on one input, and what it is compared with."""

    name: str
    ours: Callable[[], Sequence[Tensor]]
    alternative: Callable[[], object]
    expected: Sequence[Tensor]
    nbytes: int  # of arguments and results

    def row(self, repeats: int, device: torch.device) -> dict[str, object]:
        """Time against the alternative and against the bytes at the GPU's bandwidth."""
        ours = microseconds(self.ours, repeats, device)
        floor = self.nbytes / arch_of(device).bandwidth * 1e6 if device.type == "cuda" else None
        return {
            "what": self.name,
            "us": round(ours, 2),
            "GB/s": round(self.nbytes / ours / 1e3, 3),
            "% of floor": "" if floor is None else round(100 * floor / ours, 2),
            "x best alternative": round(microseconds(self.alternative, repeats, device) / ours, 2),
        }


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call: by events on a GPU."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def microseconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median of `repeats` calls, after three that compile and warm."""
    return statistics.median([seconds(run, device) for _ in range(repeats + 3)][3:]) * 1e6


def medians(ways: dict[str, Callable[[], object]], repeats: int, seconds: float) -> dict[str, float]:
    """Seconds of each, in turn; the order changes, since each finds the caches as another left them."""
    taken: dict[str, list[float]] = {way: [] for way in ways}
    order, shuffle = list(ways), random.Random(0).shuffle
    begin = time.perf_counter()
    for repeat in range(repeats + 1):
        if repeat > 3 and (time.perf_counter() - begin) * (repeat + 1) / repeat > seconds:
            break
        shuffle(order)
        for way in order:
            start = time.perf_counter()
            ways[way]()
            if repeat:  # the first warms
                taken[way].append(time.perf_counter() - start)
    return {way: statistics.median(times) for way, times in taken.items()}


def here(warning: str) -> torch.device:
    """The GPU, or the CPU with a word of warning."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    print(f"No GPU: these are times of {warning}, not of the kernels.")
    return torch.device("cpu")


def names(parser: argparse.ArgumentParser, option: str, text: str, known: Collection[str]) -> list[str]:
    """The names in an option, split at commas; ends the bench where one is unknown."""
    given = [name for name in text.split(",") if name]
    if unknown := sorted(set(given) - set(known)):
        parser.error(f"{option} must name some of {', '.join(known)}, got {', '.join(unknown)}")
    return given


def save_csv(name: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Keep the rows, each with the machine and the date, in results/NAME.csv, and print them as a table."""
    where = {key: value for key, value in machine().items() if key in ("device", "cpu", "torch", "date")}
    ROWS.mkdir(exist_ok=True)
    with (ROWS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *where])
        writer.writeheader()
        writer.writerows({**row, **where} for row in rows)
    print_rows(rows)
