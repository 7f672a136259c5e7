"""Quality: mean perplexity over domains after pruning, methods x ratios x budgets from one calibration pass.

python bench/bench_quality.py MODEL --calibration SPEC --evaluate SPEC [--ratios 0.25 0.5] [--methods cprune reap ...]

Every row prunes for real and evaluates the reloaded compact checkpoint, streamed, float32. "name=value" after a method
sets further options: cprune:cluster_distance=0,similarity=cka. Nothing is repaired unless asked: cprune:repair=auto.
--methods merging compares pruning with merging, either router, without repair and with it. --each takes the files of
--calibration and --evaluate, by commas, as pairs: what is pruned on one text is evaluated on the text beside it.
Seconds are of the run that pruned; the first row's are with measuring, whose statistics the others find.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from common import ROWS, keep_rows, print_rows

from cprune import CpruneError, PruneConfig, prune
from cprune.config import NONE
from cprune.pipeline import evaluate_folder

METHODS = ("cprune", "contribution", "reap", "frequency", "random", "cprune-paper")
ROW_KEY = ("text", "method", "budget", "ratio")
MERGING = tuple(
    f"cprune:{action}repair={repair}"
    for repair in ("none", "down")
    for action in ("", "action=merge,", "action=merge,router=map,")
)


def options_of(text: str) -> dict[str, object]:
    """'cprune:similarity=cka' -> {"method": "cprune", "similarity": "cka"}."""
    method, _, rest = text.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    return {"method": method, **{key: yaml.safe_load(value) for key, _, value in pairs}}


def rows_of(
    model: Path, base: PruneConfig, methods: Sequence[str], budgets: Sequence[str], ratios: Sequence[float]
) -> Iterator[dict[str, object]]:
    """Prune by each method at each budget and ratio, and evaluate before and after."""
    before = evaluate_folder(model, base)[0].mean
    with tempfile.TemporaryDirectory() as folder:
        for method, budget, ratio in itertools.product(methods, budgets, ratios):
            out = Path(folder) / "out"
            config = base.replace(ratio=ratio, budget=budget, work_dir=f"{folder}/work", **options_of(method))
            row: dict[str, object] = {"method": method, "budget": budget, "ratio": ratio}
            try:
                report = prune(model, out, config.replace(evaluate=NONE))
            except CpruneError as error:
                yield {**row, "refused": str(error)}
                continue
            after = evaluate_folder(out, base)[0].mean
            shutil.rmtree(out)
            yield {
                **row,
                "removed": round(report.removed_share, 4),
                "before": round(before, 3),
                "after": round(after, 3),
                "change %": round((after / before - 1) * 100, 2),
                "seconds": round(sum(report.seconds.values())),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluate", required=True)
    parser.add_argument("--tokens", type=int, default=PruneConfig.tokens)
    parser.add_argument("--evaluate-tokens", type=int, default=81920)
    parser.add_argument("--seq-len", type=int, default=PruneConfig.seq_len)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--budgets", nargs="+", default=["global", "uniform"])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--name", default=None, help="results/quality-NAME.json; the model's folder name if left out")
    parser.add_argument("--add", action="store_true", help="keep the other rows that are there under this name")
    parser.add_argument("--each", action="store_true", help="take the files of both texts as pairs")
    args = parser.parse_args()
    name = f"quality-{args.name or args.model.name}"
    methods = MERGING if args.methods == ["merging"] else args.methods
    base = PruneConfig(
        calibration=args.calibration,
        evaluate=args.evaluate,
        tokens=args.tokens,
        evaluate_tokens=args.evaluate_tokens,
        seq_len=args.seq_len,
        dtype="float32",
        verify=False,
        repair="none",
    )
    rows: list[dict[str, object]] = json.loads((ROWS / f"{name}.json").read_text())["rows"] if args.add else []
    texts = [(args.calibration, args.evaluate)]
    if args.each:
        texts = list(zip(args.calibration.split(","), args.evaluate.split(","), strict=True))
    for calibration, evaluate in texts:
        config = base.replace(calibration=calibration, evaluate=evaluate)
        of_text = {"text": Path(evaluate).name.partition(".")[0]} if args.each else {}
        for row in rows_of(args.model, config, methods, args.budgets, args.ratios):
            new = of_text | row
            rows = [old for old in rows if any(old.get(key) != new.get(key) for key in ROW_KEY)] + [new]
            print(new, flush=True)
            keep_rows(name, rows)
    print_rows(rows)


if __name__ == "__main__":
    main()
