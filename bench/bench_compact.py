"""Compaction against `cp` of the same bytes: GB/s and the ratio, alternating, medians.

python bench/bench_compact.py [--folder DIR] [--repeats 5]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from common import save_rows, write_random_qwen3_moe

from cprune.act.compact import apply_plan
from cprune.checkpoint import Checkpoint, open_checkpoint
from cprune.plan import LayerPlan, PrunePlan


def every_fourth_dropped(checkpoint: Checkpoint) -> PrunePlan:
    """A plan that scatters what is left, the worst case for merging byte ranges."""
    layers = []
    for moe in checkpoint.moe_layers:
        kept = tuple(expert for expert in range(moe.num_experts) if expert % 4)
        num = moe.num_experts
        stand_in = tuple(expert if expert in kept else kept[0] for expert in range(num))
        layers.append(LayerPlan(moe.name, num, kept, (0,) * num, (0.0,) * num, stand_in, (1.0,) * num))
    return PrunePlan(checkpoint.fingerprint, checkpoint.architecture.model_type, tuple(layers))


def seconds(action: object) -> float:
    assert callable(action)
    os.sync()
    start = time.monotonic()
    action()
    os.sync()
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "cprune-bench-1.25b")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    checkpoint = open_checkpoint(write_random_qwen3_moe(args.folder))
    plan = every_fourth_dropped(checkpoint)
    ours, copies = [], []
    with tempfile.TemporaryDirectory(dir=args.folder.parent) as folder:
        out, copy = Path(folder) / "out", Path(folder) / "copy"
        for _ in range(args.repeats):
            ours.append(seconds(lambda: apply_plan(checkpoint, plan, out)))
            shutil.rmtree(copy, ignore_errors=True)
            copies.append(seconds(lambda: subprocess.run(["cp", "-r", out, copy], check=True)))
            written = sum(path.stat().st_size for path in out.iterdir())
            shutil.rmtree(out)
    mine, cp = statistics.median(ours), statistics.median(copies)
    save_rows(
        "compact",
        [
            {
                "what": "cprune apply",
                "GB": written / 1e9,
                "seconds": mine,
                "GB/s": written / mine / 1e9,
                "x cp": cp / mine,
            },
            {"what": "cp -r", "GB": written / 1e9, "seconds": cp, "GB/s": written / cp / 1e9, "x cp": 1.0},
        ],
    )


if __name__ == "__main__":
    main()
