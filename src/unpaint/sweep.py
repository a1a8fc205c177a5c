"""A multirun: what became of its jobs, and the table at its end. Imports nothing heavy.

Jobs may run in this process, in others or on other machines (Hydra's launchers), so each leaves a small file in the
sweep's folder, `jobs/<number>.json`, and the table is made of those.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unpaint.errors import UserError
from unpaint.results import RunRecord, write_json

if TYPE_CHECKING:
    from rich.console import Console

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


@dataclass
class Job:
    """One job of a sweep. status: running (also what stands there after a kill), complete, was complete, failed."""

    number: int
    overrides: list[str]
    status: str = "running"
    error: str = ""
    seconds: float = 0.0
    folder: str = ""
    values: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """A sweep's name, a function of its command line, and its folder. Travels to the jobs' processes."""

    name: str
    folder: Path

    @classmethod
    def of(cls, command: str, overrides: Sequence[str], root: Path) -> "Sweep":
        """Named by its config in conf/sweep, if it has one, and a hash of the overrides."""
        chosen = [m[1] for line in overrides if (m := re.fullmatch(r"\+?sweep=([\w/-]+)", line))]
        digest = hashlib.sha256("\n".join([command, *overrides]).encode()).hexdigest()[:8]
        name = f"{chosen[0].replace('/', '_') if chosen else 'sweep'}-{digest}"
        return cls(name, root.expanduser().absolute() / name)

    def start(self) -> None:
        """Forgets what the jobs left the last time."""
        shutil.rmtree(self.folder / "jobs", ignore_errors=True)

    @contextmanager
    def job(self, number: int, overrides: Sequence[str]) -> Iterator[Job]:
        """The job while it goes on; what is in it at the end is what the table says."""
        job, started = Job(number, list(overrides)), time.perf_counter()
        self._keep(job)
        yield job
        job.seconds = round(time.perf_counter() - started, 1)
        self._keep(job)

    def _keep(self, job: Job) -> None:
        if next((int(os.environ[key]) for key in RANK_VARIABLES if key in os.environ), 0) == 0:
            write_json(self.folder / "jobs" / f"{job.number}.json", asdict(job))

    def jobs(self) -> list[Job]:
        """All jobs that began, in their order."""
        files = (self.folder / "jobs").glob("*.json")
        return sorted((Job(**json.loads(file.read_text(encoding="utf-8"))) for file in files), key=lambda j: j.number)


@contextmanager
def past_dead_jobs() -> Iterator[None]:
    """Let a sweep on a cluster wait for its other jobs when one dies without an answer: killed, or its node lost.

    Hydra's launcher collects answers by `submitit.Job.results`, whose exception would end the sweep. The ledger
    has the job as one that never ended.
    """
    try:
        from submitit.core.core import Job as Submitted
        from submitit.core.utils import FailedJobError, UncompletedJobError
    except ImportError:
        yield
        return
    from hydra.core.utils import JobReturn, JobStatus

    collect = Submitted.results

    def results(job: "Submitted[Any]") -> list[Any]:
        try:
            return collect(job)
        except (FailedJobError, UncompletedJobError) as error:
            print(f"unpaint: {str(error).splitlines()[0]}", file=sys.stderr)
            return [JobReturn(status=JobStatus.COMPLETED)]

    Submitted.results = results  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Submitted.results = collect  # type: ignore[method-assign]


def known(folder: Path) -> bool:
    """Whether the run of that folder is complete already."""
    try:
        return RunRecord.load(folder).status == "complete"
    except UserError:
        return False


def pareto(jobs: Sequence[Job]) -> list[Job]:
    """Those than which no other is better in one value and as good in all others; more is better."""
    whole = [job for job in jobs if job.values and None not in job.values.values()]

    def beats(a: Job, b: Job) -> bool:
        pairs = [(a.values[name] or 0.0, b.values[name] or 0.0) for name in b.values]
        return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)

    return [job for job in whole if not any(beats(other, job) for other in whole)]


def show(sweep: Sweep, jobs: Sequence[Job], front: bool = False, console: "Console | None" = None) -> None:
    """Print the table of a sweep, then which jobs failed and why; `front` marks the Pareto set of their values."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    table = Table(title=f"sweep {sweep.name}", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("job", justify="right")
    table.add_column("config", overflow="fold")
    names = list(dict.fromkeys(name for job in jobs for name in job.values))
    for heading in (*names, "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    best = [job.number for job in pareto(jobs)] if front else []
    for job in jobs:
        state = {"failed": "[red]failed[/red]", "running": "[yellow]interrupted[/yellow]"}.get(job.status, job.status)
        cells = [_number(job.values.get(name)) for name in names]
        words = escape(" ".join(_differing(job, jobs))) + (" [green]★[/green]" if job.number in best else "")
        table.add_row(str(job.number), words, *cells, f"{job.seconds:.1f}" if job.seconds else "–", state)
    console.print(table)
    if front:
        console.print(f"★ Pareto set of {', '.join(names)}: {len(best)} of {len(jobs)} jobs")
    for job in jobs:
        if job.status == "failed":
            console.print(f"failed, job {job.number}: {job.error}", markup=False, highlight=False, soft_wrap=True)
    computed = [job.seconds for job in jobs if job.status == "complete"]
    if len(computed) > 1:
        rest = sorted(computed[1:])[len(computed[1:]) // 2]
        console.print(f"the first job took {computed[0]:.1f} s, those after it {rest:.1f} s (median)", highlight=False)


def _differing(job: Job, jobs: Sequence[Job]) -> list[str]:
    """The overrides that not all jobs share; all of them if there is nothing else to tell it by."""
    own = [line for line in job.overrides if not all(line in other.overrides for other in jobs)]
    return own or job.overrides


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}"
