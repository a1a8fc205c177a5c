"""The `unpaint` command. Nothing heavy is imported before it is known what is asked for, and that it makes sense."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from unpaint import __version__
from unpaint.errors import UserError, environment_fault, nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from unpaint.config import ConfTree
    from unpaint.sweep import Sweep

HELP = """\
unpaint removes concepts from text-to-image diffusion models and measures what was removed and what it cost.

usage: unpaint COMMAND ...

  run       erase a concept, then evaluate:           unpaint run concept=cat method=esd
  erase     only make the edit:                       unpaint erase concept=mosaic
  evaluate  only measure an edit:                     unpaint evaluate edit=FILE
  compare   all runs as tables and a page:            unpaint compare outputs
  generate  pictures, unedited beside edited:         unpaint generate --edit FILE --prompt "a cat on a beach"
  ls        what there is to choose from:             unpaint ls concepts
  doctor    versions, devices, is the built-in model intact

unpaint COMMAND --help says more; unpaint --version prints the version.
"""

JOB_HELP = {
    "run": """\
Erase a concept from a model, then measure what was removed and what it cost.
The same command again prints the result; after a kill it goes on where it stopped.

usage: unpaint run [KEY=VALUE ...]

  unpaint run                                       the defaults: cat, from the built-in model, with ESD
  unpaint run concept=mosaic method.steps=100       other choices and options
  unpaint run -m concept=cat,dog seed=0,1,2         all combinations, one after the other
  unpaint run concept=cat --cfg job                 show the config and do nothing
  unpaint run --config-dir my_conf method=mine      with a folder of your own configs
""",
    "erase": """\
Erase a concept from a model: make the edit file, and measure nothing.

usage: unpaint erase [KEY=VALUE ...]

  unpaint erase concept=cat method=esd
  unpaint erase -m concept=cat,dog seed=0,1,2       all combinations, one after the other
""",
    "evaluate": """\
Measure an edit file. Concept, method and seed are those that made it, unless you name others.

usage: unpaint evaluate edit=FILE [KEY=VALUE ...]

  unpaint evaluate edit=edit.safetensors
  unpaint evaluate edit=edit.safetensors concept=dog    what did it do to dogs?
""",
}

HYDRA_HELP = """\
Overrides and flags are Hydra's: -m sweeps, --cfg job|hydra|all prints the config, --resolve fills in its references,
--info searchpath|defaults, --config-dir FOLDER adds your own configs, --hydra-help lists all of them.
"""


class _Parser(argparse.ArgumentParser):
    """An argparse parser that takes no abbreviations and answers a mistake with one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for a bug or a failed job, 2 for bad input, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        print("unpaint: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, `head` for instance, has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _report(error)


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        print(HELP, file=sys.stderr, end="")
        return 2
    command, rest = arguments[0], arguments[1:]
    if command in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if command == "--version":
        print(f"unpaint {__version__}")
        return 0
    if command in JOB_HELP:
        return _jobs(command, rest)
    others: dict[str, Callable[[list[str]], int]] = {
        "compare": _compare,
        "generate": _generate,
        "ls": _ls,
        "doctor": _doctor,
    }
    if command not in others:
        commands = [*JOB_HELP, *others]
        raise UserError(f"no command {command!r}{nearest(command, commands)}; there are: {', '.join(commands)}")
    try:
        return others[command](rest)
    except SystemExit as exit:  # argparse, after it has printed its help
        return _code(exit)


def _code(exit: SystemExit) -> int:
    # Lightning answers Ctrl-C by sys.exit(1).
    if isinstance(exit.__context__, KeyboardInterrupt):
        raise KeyboardInterrupt from exit
    if exit.code == 128 + signal.SIGTERM:
        print("unpaint: told to stop; the same command goes on from here", file=sys.stderr)
    if isinstance(exit.code, str):
        print(exit.code, file=sys.stderr)
    return exit.code if isinstance(exit.code, int) else int(exit.code is not None)


def _report(error: BaseException) -> int:
    """Say on stderr what went wrong: a line if it is the user's or the disk's fault, else a traceback."""
    line = _reason(error)
    if line is None:
        traceback.print_exception(error)
        return 1
    print(f"unpaint: {line}", file=sys.stderr)
    return 2


def _reason(error: BaseException) -> str | None:
    """The one line that says it all; None for a bug."""
    line = str(error) if isinstance(error, UserError) else environment_fault(error)
    return None if line is None else " ".join(line.split())


# --- run, erase, evaluate: Hydra's


def _jobs(command: str, rest: list[str]) -> int:
    from hydra import version as hydra_version
    from hydra._internal.utils import _run_hydra, get_args_parser

    from unpaint.checking import check
    from unpaint.config import HYDRA_VERSION_BASE, ConfTree, quoted
    from unpaint.listing import own_folder
    from unpaint.sweep import Sweep, past_dead_jobs

    parser = get_args_parser()
    parser.prog = f"unpaint {command}"
    parser.allow_abbrev = False

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; see {parser.prog} --help")

    parser.error = refuse  # type: ignore[method-assign]
    try:
        # Overrides may stand on both sides of a flag; Lightning's children get some more at the end.
        args = parser.parse_intermixed_args(rest)
    except SystemExit as exit:
        return _code(exit)
    if args.experimental_rerun is not None:
        refuse("--experimental-rerun is not supported: give the same overrides again")
    default = ConfTree.default()
    tree = ConfTree(
        root=own_folder(args.config_path) if args.config_path else default.root,
        name=args.config_name or default.name,
        extra=own_folder(args.config_dir) if args.config_dir else None,
    )
    if args.help:
        print(f"{JOB_HELP[command]}\n{_choices(tree)}\n{HYDRA_HELP}", end="")
        return 0
    only_shows = args.cfg or args.info or args.hydra_help or args.shell_completion
    sweep: Sweep | None = None
    if not (args.info or args.hydra_help or args.shell_completion):
        checked = check(args.overrides, None if only_shows else command, tree, multirun=args.multirun)
        if not only_shows and checked.multirun:
            sweep = Sweep.of(command, args.overrides, checked.sweep_root)
            sweep.start()
            args.overrides.append(f"hydra.sweep.dir={quoted(str(sweep.folder))}")

    results: list[int] = []
    args.config_path = None

    def job(cfg: "DictConfig") -> list[float] | None:
        # Nothing is raised into Hydra: it would print in its own way, and a failed job would end a sweep.
        if sweep is not None:
            return _job_of(sweep, command, cfg)
        try:
            _job(command, cfg)
            results.append(0)
        except Exception as error:
            results.append(_report(error))
        return None

    hydra_version.setbase(HYDRA_VERSION_BASE)
    try:
        with _hydra_raises(), past_dead_jobs() if sweep else nullcontext():
            _run_hydra(
                args=args, args_parser=parser, task_function=job, config_path=str(tree.root), config_name=tree.name
            )
    except SystemExit as exit:
        return _code(exit)
    except ValueError as error:  # flags that do not go together
        raise UserError(str(error)) from error
    # A config that is only shown runs no job.
    return max(results, default=0) if sweep is None else _ended(sweep, checked.optimises)


def _ended(sweep: "Sweep", optimises: bool) -> int:
    """The table of a sweep, on stdout; the exit code."""
    from unpaint.sweep import show

    jobs = sweep.jobs()
    show(sweep, jobs, front=optimises)
    if failed := sum(job.status in ("failed", "running") for job in jobs):
        print(f"unpaint: {failed} of {len(jobs)} jobs failed", file=sys.stderr)
    return int(failed > 0)


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Let Hydra's own errors come out as exceptions, rather than as its print and exit code 1."""
    from unpaint.config import refusals

    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with refusals():
            yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def _job_of(sweep: "Sweep", command: str, cfg: "DictConfig") -> list[float] | None:
    """A job of a sweep, in whatever process: goes on past what fails. Returns what a sweeper may optimise."""
    from hydra.core.hydra_config import HydraConfig

    from unpaint.config import run_folder, starts_over
    from unpaint.sweep import known

    hydra = HydraConfig.get()
    with sweep.job(int(hydra.job.num), list(hydra.overrides.task)) as job:
        try:
            folder = run_folder(cfg)
            job.folder = str(folder)
            was_there = command != "erase" and not cfg.part and not starts_over(cfg) and known(folder)
            if cfg.logger.name == "wandb" and cfg.logger.group is None:
                cfg.logger.group = sweep.name
            record = _job(command, cfg)
            if record is not None and command != "erase":
                job.values = {name: record.metrics.get(name, {}).get("value") for name in cfg.objectives}
            job.status = "was complete" if was_there else "complete"
        except Exception as error:
            job.status, job.error = "failed", _reason(error) or f"{type(error).__name__}: {error}"
            _report(error)
    values = [value for value in job.values.values() if value is not None]
    return values if job.values and len(values) == len(job.values) else None


def _job(command: str, cfg: "DictConfig") -> Any:
    if command == "evaluate":
        from hydra.core.hydra_config import HydraConfig

        from unpaint.config import adopt_edit

        adopt_edit(cfg, list(HydraConfig.get().overrides.task))
    _join_ranks()
    from unpaint import run

    if cfg.part:
        return run.paint_part(cfg)
    return {"run": run.run, "erase": run.erase, "evaluate": run.evaluate}[command](cfg)


def _join_ranks() -> None:
    """Under submitit without SLURM nothing tells Lightning which rank this process is."""
    if os.environ.get("SUBMITIT_EXECUTOR") == "local":
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def _choices(tree: "ConfTree") -> str:
    from unpaint.listing import chosen_by, groups, options

    lines = ["Choices (unpaint ls describes them):"]
    choosable = chosen_by(tree.root / f"{tree.name}.yaml")
    for group in groups(tree.folders):
        if group not in choosable:
            continue
        names = ", ".join(option.name for option in options(tree.folders, group))
        lines.append(f"  {group + '=':<12}{names}")
    return "\n".join(lines) + "\n"


# --- the others


def _edit_and_scale(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:SCALE`; a file whose name happens to end in `:1` wins over a scale."""
    file, colon, scale = text.rpartition(":")
    if not colon or Path(text).is_file():
        return Path(text), 1.0
    try:
        return Path(file), float(scale)
    except ValueError:
        return Path(text), 1.0


def _generate(rest: list[str]) -> int:
    parser = _Parser(
        prog="unpaint generate",
        description="Paint with edits, beside the unedited model: one row a prompt, the same seed on both sides.",
    )
    add = parser.add_argument
    add("--edit", action="append", default=[], metavar="FILE[:SCALE]", help="an edit file; repeat it to add edits up")
    add("--prompt", action="append", required=True, metavar="TEXT", help="what to paint; repeat it for more rows")
    add("--out", default="unpaint.png", metavar="FILE.png", help="the picture grid (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the first row; each further row has the next (default: %(default)s)")
    add("--steps", type=int, default=25, help="of the sampler (default: %(default)s)")
    add("--guidance", type=float, default=4.0, help="classifier-free guidance, 1 is none (default: %(default)s)")
    add("--model", default="picturebook", help="a name from `unpaint ls models`, or a diffusers folder")
    args = parser.parse_args(rest)
    from unpaint import generate

    edits = [_edit_and_scale(text) for text in args.edit]
    out = generate.generate(
        edits, args.prompt, Path(args.out), args.seed, args.steps, args.guidance, generate.model_config(args.model)
    )
    print(out)
    return 0


def _compare(rest: list[str]) -> int:
    parser = _Parser(
        prog="unpaint compare",
        description="All runs of a folder, or two of them side by side: a table here, and compare.html, .csv and .md.",
    )
    add = parser.add_argument
    add(
        "folders",
        nargs="*",
        default=["outputs"],
        metavar="FOLDER",
        help="one with runs (default: outputs), or two runs' own",
    )
    add("--out", type=Path, metavar="DIR", help="where the files go (default: FOLDER/compare)")
    add("--no-pictures", action="store_true", help="a page without pictures: smaller, and sooner there")
    add("--retention", default="retention/ira", metavar="METRIC", help="what is held against UA (default: %(default)s)")
    add(
        "--score",
        metavar="METRIC=WEIGHT,...",
        help="order by a weighted mean of rates, as erasure/ua=1,retention/ira=1",
    )
    args = parser.parse_args(rest)
    if len(args.folders) > 2:
        parser.error(f"one folder or two, not {len(args.folders)}")
    from unpaint import compare

    first, *second = (Path(folder).expanduser() for folder in args.folders)
    if second:
        if args.score or args.retention != "retention/ira":
            parser.error("--score and --retention order the runs of one folder; two runs have no order")
        compare.compare_two(first, second[0], args.out, not args.no_pictures)
        return 0
    weights = compare.weights_of(args.score) if args.score else {}
    compare.compare(first, args.out, not args.no_pictures, args.retention, weights)
    return 0


def _ls(rest: list[str]) -> int:
    parser = _Parser(prog="unpaint ls", description="What there is to choose from, one line each, with its cost.")
    parser.add_argument("what", nargs="*", help="methods, concepts, models, evaluators, ... (default: all)")
    parser.add_argument("--config-dir", metavar="FOLDER", help="a folder of your own configs")
    args = parser.parse_args(rest)
    from unpaint.listing import conf_dir, own_folder, table

    folders = [conf_dir(), *([own_folder(args.config_dir)] if args.config_dir else [])]
    print(table(folders, args.what), end="")
    return 0


def _doctor(rest: list[str]) -> int:
    parser = _Parser(
        prog="unpaint doctor", description="Versions, devices, optional parts; is the built-in model intact?"
    )
    parser.parse_args(rest)
    from unpaint.doctor import diagnose

    report, healthy = diagnose()
    print(report, end="")
    return 0 if healthy else 1
