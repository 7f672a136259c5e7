"""The command line. `python -m cprune.run MODEL OUT ...` is the main job; `cprune` has it and the single stages."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, Union

import tyro

from cprune.config import DEFAULT, NONE, PruneConfig
from cprune.errors import CpruneError
from cprune.memory import cache_few_kernels, share_heap

if TYPE_CHECKING:
    from cprune.checkpoint import Checkpoint

log = logging.getLogger(__name__)

Options = tyro.conf.OmitArgPrefixes[PruneConfig]
ConfigFile = Annotated[Path | None, tyro.conf.arg(help="YAML file of options; the command line wins over it.")]


@dataclass(frozen=True)
class Run:
    """Prune: measure, decide, act, prove. MODEL stays as it is; OUT is whole or absent."""

    model: tyro.conf.Positional[str]
    """Checkpoint folder (safetensors) or hub id."""
    out: tyro.conf.Positional[Path]
    """Folder to write."""
    pruning: Options
    plan: Path | None = None
    """Follow this plan instead of measuring and deciding."""
    config: ConfigFile = None

    def __call__(self, checkpoint: Checkpoint | None = None) -> None:
        from cprune.pipeline import prune
        from cprune.plan import PrunePlan
        from cprune.prove.report import render

        plan = PrunePlan.load(self.plan) if self.plan else None
        _show(render(prune(self.model, self.out, self.pruning, plan=plan, checkpoint=checkpoint)))


@dataclass(frozen=True)
class Inspect:
    """What MODEL is, what a ratio would save, and what would be refused and why."""

    model: tyro.conf.Positional[str]
    """Checkpoint folder (safetensors) or hub id."""
    pruning: Options
    config: ConfigFile = None

    def __call__(self) -> None:
        from cprune.inspect import inspect_checkpoint, render

        _show(render(inspect_checkpoint(self.model, self.pruning)))


@dataclass(frozen=True)
class Plan:
    """Measure and decide; write the plan and nothing else."""

    model: tyro.conf.Positional[str]
    """Checkpoint folder (safetensors) or hub id."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Plan file (JSON) to write."""
    pruning: Options
    config: ConfigFile = None

    def __call__(self) -> None:
        from cprune.checkpoint import open_checkpoint
        from cprune.checkpoint.writer import check_space
        from cprune.pipeline import check_request, make_plan, measuring_bytes, read_texts
        from cprune.work import WorkFolder

        options = self.pruning.replace(evaluate=NONE)
        if not self.output.parent.is_dir() or self.output.is_dir() or not os.access(self.output.parent, os.W_OK):
            raise CpruneError(f"the plan must be a file in an existing folder that can be written, got {self.output}")
        checkpoint = open_checkpoint(self.model)
        check_request(checkpoint, options)
        work = WorkFolder(Path(options.work_dir or f"{self.output}.work"))
        work.check(MODEL=checkpoint.folder)
        check_space(work.path, measuring_bytes(checkpoint, options, {options.method}))
        plan = make_plan(checkpoint, options, read_texts(checkpoint, options), work)
        plan.save(self.output)
        counts = [len(layer.kept) for layer in plan.layers]
        _show(
            f"{self.output}: removes {plan.removed_share:.1%} of the experts, "
            f"keeps {min(counts)} to {max(counts)} a layer"
        )


@dataclass(frozen=True)
class Apply:
    """Write the checkpoint that a plan describes."""

    model: tyro.conf.Positional[str]
    """Checkpoint folder (safetensors) or hub id; the one that the plan was made for."""
    plan: tyro.conf.Positional[Path]
    """Plan file (JSON)."""
    out: tyro.conf.Positional[Path]
    """Folder to write."""

    def __call__(self) -> None:
        from cprune.act.compact import apply_plan
        from cprune.checkpoint import open_checkpoint
        from cprune.plan import PrunePlan
        from cprune.prove.report import size_text

        plan = PrunePlan.load(self.plan)
        if plan.config.get("action") == "merge":
            raise CpruneError(
                f"cprune apply needs a plan of --action prune, got one of merge in {self.plan} (merging "
                "reads text: cprune run --plan with --action merge)"
            )
        if NONE not in (plan.config.get("repair", NONE), plan.config.get("calibration", NONE)):
            log.info("applying without repair, which needs text: cprune run --plan with --calibration repairs too")
        if plan.config.get("distill", NONE) != NONE:
            log.info("applying without distillation, which needs text: cprune run --plan with --distill trains too")
        written = apply_plan(open_checkpoint(self.model), plan, self.out)
        _show(f"{self.out}: {size_text(written)}, {plan.removed_share:.1%} of the experts removed")


@dataclass(frozen=True)
class Verify:
    """Check an output of cprune against its original with the dropped experts masked out."""

    model: tyro.conf.Positional[str]
    """The original."""
    out: tyro.conf.Positional[str]
    """The output of cprune."""
    seed: int = 0
    """Seed of the random tokens."""

    def __call__(self) -> None:
        from cprune.pipeline import verify_folders

        report = verify_folders(self.model, self.out, PruneConfig(seed=self.seed))
        refitted = f", with {report.repaired} repaired layers" if report.repaired else ""
        merged = f", with {report.merged} merged layers" if report.merged else ""
        distilled = f", with {report.distilled} distilled layers" if report.distilled else ""
        _show(
            f"{self.out} equals the masked original{refitted}{merged}{distilled}: "
            f"{report.layers} layers x {report.positions} tokens, "
            f"relative error <= {max(report.max_error, report.logits_error):.1e}, {report.ties} router ties"
        )


@dataclass(frozen=True)
class Evaluate:
    """Perplexity of a checkpoint, by domain."""

    folder: tyro.conf.Positional[str]
    """Checkpoint folder or hub id."""
    text: str = DEFAULT
    """Text to evaluate on: default, or FILE/DATASET[subset](split):n,... (.jsonl, .txt, .parquet or a hub id)."""
    tokens: int = PruneConfig.evaluate_tokens
    """Most tokens to evaluate on, per domain the same share."""
    seq_len: int = PruneConfig.seq_len
    """Tokens per sequence."""
    dtype: Annotated[str, tyro.conf.arg(help="auto, float32 or bfloat16.")] = "auto"

    def __call__(self) -> None:
        from cprune.pipeline import evaluate_folder

        config = PruneConfig(
            evaluate=self.text,
            evaluate_tokens=self.tokens,
            seq_len=self.seq_len,
            dtype=self.dtype,  # type: ignore[arg-type]
        )
        result, continuation = evaluate_folder(self.folder, config)
        lines = [f"{value:10.3f}  {name} ({result.tokens[name]} tokens)" for name, value in result.by_domain.items()]
        lines += [f"{result.mean:10.3f}  mean over domains", f"{result.token_weighted:10.3f}  over all tokens"]
        _show("\n".join([*lines, f"generates {continuation!r}"]))


@dataclass(frozen=True)
class Compare:
    """Methods x ratios from one calibration pass: a table and a plot of quality over size. Writes no model."""

    model: tyro.conf.Positional[str]
    """Checkpoint folder (safetensors) or hub id."""
    pruning: Options
    methods: str = "cprune,contribution,reap,frequency,random"
    """Methods, by commas: NAME or NAME:OPTION=VALUE:..., such as cprune:budget=uniform. They replace --method."""
    ratios: str = "0.25,0.5"
    """Shares of the experts to remove, by commas. They replace --ratio."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("compare")
    """Folder for compare.json and compare.svg."""
    config: ConfigFile = None

    def __call__(self) -> None:
        from cprune.compare import compare
        from cprune.prove.pareto import render

        try:
            ratios = [float(ratio) for ratio in self.ratios.split(",")]
        except ValueError as error:
            raise CpruneError(f"ratios must be numbers with commas between them, got {self.ratios!r}") from error
        methods = [name.strip() for name in self.methods.split(",")]
        found = compare(self.model, self.output, methods, ratios, self.pruning)
        _show(render(found.whole, found.rows))


COMMANDS: tuple[type, ...] = (Run, Inspect, Plan, Apply, Verify, Evaluate, Compare)


def main(arguments: Sequence[str] | None = None, commands: tuple[type, ...] = COMMANDS) -> int:
    """Run a command line; returns the exit status: 0 done, 1 failed, 2 refused, 130 interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "urllib3", "faiss", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, _terminate)
    share_heap()
    cache_few_kernels()
    try:
        command = _parse(list(sys.argv[1:] if arguments is None else arguments), commands)
        opened = _import_engine(command.model if isinstance(command, Run) else None)
        _check_environment()
        command(opened) if opened else command()
    except CpruneError as error:
        return _fail(f"cprune: {error}", 2)
    except KeyboardInterrupt:
        return _fail("cprune: interrupted; the same command again goes on from the finished stages", 130)
    except OSError as error:
        return _fail(f"cprune: {error}", 1)
    return 0


def process(commands: tuple[type, ...] = COMMANDS) -> NoReturn:
    """`main` as a process of its own, which ends here: the interpreter would free a million objects one by one."""
    status = main(commands=commands)
    logging.shutdown()
    try:
        sys.stdout.flush()
    except OSError:  # whoever read it has gone, which the interpreter's own end reports
        sys.exit(status)
    os._exit(status)


def _import_engine(model: str | None) -> Checkpoint | None:
    """Import torch and transformers with the garbage collector off and exempt what they made, a million objects.

    A fifth of the time of the imports, and nearly all the time of every later collection. They take seconds on one
    core; another looks through the weights of `model` meanwhile, if it is a folder, which is returned open.
    """
    gc.disable()
    try:
        ahead = None
        if model is not None and os.path.isdir(model):
            from cprune.checkpoint import open_checkpoint
            from cprune.checkpoint.scan import Ahead

            ahead = Ahead(open_checkpoint(model))
        import cprune.pipeline  # noqa: F401

        return ahead and ahead.stop()
    finally:
        gc.freeze()
        gc.enable()


def _check_environment() -> None:
    from cprune_kernels.native import check_environment

    try:
        check_environment()
    except ValueError as error:
        raise CpruneError(str(error)) from error


def _parse(arguments: list[str], commands: tuple[type, ...]) -> Callable[..., None]:
    """The command object of a command line; `--config` gives the defaults of its options."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    reader.add_argument("--config", type=Path)
    config = None
    with contextlib.suppress(argparse.ArgumentError):  # tyro says what is wrong with it
        config = reader.parse_known_args(arguments)[0].config
    options = PruneConfig.from_yaml(config) if config else PruneConfig()
    if len(commands) == 1:
        return tyro.cli(
            commands[0], args=arguments, default=_with_options(commands[0], options), prog=f"python -m {__spec__.name}"
        )
    choices = [
        Annotated[command, tyro.conf.subcommand(command.__name__.lower(), default=_with_options(command, options))]
        for command in commands
    ]
    return tyro.cli(Union[tuple(choices)], args=arguments, prog="cprune", description=__doc__)  # type: ignore[arg-type]  # noqa: UP007


def _with_options(command: type, options: PruneConfig) -> object:
    """An instance that holds `options` and lacks what the user must give."""
    values: dict[str, object] = {}
    for field in dataclasses.fields(command):
        if field.name == "pruning":
            values[field.name] = options
        elif field.default is dataclasses.MISSING:
            values[field.name] = tyro.MISSING
    return command(**values)


def _terminate(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _show(content: object) -> None:
    from rich.console import Console

    Console(soft_wrap=isinstance(content, str), highlight=False).print(content, markup=False)


def _fail(message: str, status: int) -> int:
    sys.stderr.write(message + "\n")
    return status


if __name__ == "__main__":
    process(commands=(Run,))
