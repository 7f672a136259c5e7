"""What it costs to decide by every method: measuring and deciding for all of them, against one method at one ratio.

python bench/bench_methods.py MODEL --calibration SPEC [--repeats 3]

Both begin with an empty work folder and alternate; seconds are medians. Gradients (fisher, taylor) need a pass of their
own and are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import save_rows

from cprune import CpruneError
from cprune.checkpoint import Checkpoint, open_checkpoint
from cprune.config import NONE, Method, PruneConfig
from cprune.decide.known import Known
from cprune.decide.saliency import GRADIENT_METHODS
from cprune.pipeline import Texts, observe, plan_from, read_texts
from cprune.work import WorkFolder

ALL = tuple(method for method in Method.__args__ if method not in GRADIENT_METHODS)
RATIOS = (0.25, 0.5, 0.75)


def seconds(checkpoint: Checkpoint, base: PruneConfig, texts: Texts, variants: Sequence[PruneConfig]) -> float:
    """Of measuring for all variants and deciding each."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        stats = observe(checkpoint, base, texts, WorkFolder(Path(folder)), {asked.method for asked in variants})
        known: Known = {}
        for asked in variants:
            with contextlib.suppress(CpruneError):  # cprune-paper may leave a layer too few experts, and say so
                plan_from(checkpoint, stats, asked, known)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--tokens", type=int, default=PruneConfig.tokens)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    base = PruneConfig(calibration=args.calibration, tokens=args.tokens, evaluate=NONE, repair=NONE, ratio=0.5)
    checkpoint = open_checkpoint(args.model)
    texts = read_texts(checkpoint, base)
    cases = {
        "cprune, one ratio": [base],
        f"{len(ALL)} methods, {len(RATIOS)} ratios": [base.replace(method=m, ratio=r) for m in ALL for r in RATIOS],
    }
    seconds(checkpoint, base, texts, [base])  # warm
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(args.repeats):
        for name, variants in cases.items():
            taken[name].append(seconds(checkpoint, base, texts, variants))
    medians = {name: statistics.median(runs) for name, runs in taken.items()}
    one = next(iter(medians.values()))
    save_rows("methods", ({"what": n, "seconds": round(t, 2), "of one": round(t / one, 2)} for n, t in medians.items()))


if __name__ == "__main__":
    main()
