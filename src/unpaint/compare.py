"""`unpaint compare`: everything in a folder, or two runs, as tables and as a page. Imports no torch for a folder."""

from collections.abc import Mapping
from pathlib import Path

from unpaint.errors import UserError
from unpaint.report.aggregate import RETENTION, summarized
from unpaint.report.gather import Run, gather, gathered, run_of
from unpaint.report.page import write_page
from unpaint.report.pair import paired, show_pair
from unpaint.report.tables import show, write_csv, write_markdown
from unpaint.report.wall import Wall, wall
from unpaint.results import RunRecord


def compare(
    folder: Path,
    out: Path | None = None,
    pictures: bool = True,
    retention: str = RETENTION,
    weights: Mapping[str, float] | None = None,
) -> dict[str, Path]:
    """Print the table of every record below `folder` and write `compare.html`, `.csv` and `.md` to `out`, by default
    `folder/compare`; returns their paths.

    retention: the metric that is held against UA. weights: metric -> weight of a score, by which rows are then ordered.
    Raises UserError if there is nothing to compare, or no record has a metric that is asked for.
    """
    summary = summarized(gather(folder), retention, weights)
    out = out or folder / "compare"
    files = {
        "page": write_page(summary, wall(summary.gathered) if pictures else Wall(), out / "compare.html"),
        "CSV": write_csv(summary, out / "compare.csv"),
        "Markdown": write_markdown(summary, out / "compare.md"),
    }
    show(summary, files)
    return files


def compare_two(a: Path, b: Path, out: Path | None = None, pictures: bool = True) -> dict[str, Path]:
    """Print what differs between two runs, given by their folders, and write the page and both runs' tables to `out`,
    by default `compare/<A>_<B>` in the outputs that A lies in. Raises UserError if one is no run."""
    runs = [run_of(RunRecord.load(folder), folder if folder.is_dir() else folder.parent) for folder in (a, b)]
    if runs[0].folder.resolve() == runs[1].folder.resolve():
        raise UserError(f"compare {a} {b}: both are the same run")
    summary = summarized(gathered(outputs_of(runs[0]), runs))
    pair = paired(summary.gathered, *runs)
    out = out or outputs_of(runs[0]) / "compare" / "_".join(run.record.run_id for run in runs)
    files = {
        "page": write_page(summary, wall(summary.gathered) if pictures else Wall(), out / "compare.html", pair),
        "CSV": write_csv(summary, out / "compare.csv"),
        "Markdown": write_markdown(summary, out / "compare.md"),
    }
    show_pair(pair, files)
    return files


def outputs_of(run: Run) -> Path:
    """The folder of all runs, from `<outputs>/<model>/<concept>/<method>/<run_id>`; a run that was moved lies in its
    parent."""
    folder = run.folder.absolute()
    in_place = len(folder.parents) > 4 and folder.parents[2].name == run.record.model
    return folder.parents[3] if in_place else folder.parent


def weights_of(given: str) -> dict[str, float]:
    """`erasure/ua=1,retention/ira=0.5` as a dict. Raises UserError unless every weight is a number above 0."""
    found = {}
    for part in given.split(","):
        name, _, weight = part.strip().partition("=")
        try:
            found[name] = float(weight)
        except ValueError:
            found[name] = 0.0
        if not name or not 0 < found[name] < float("inf"):
            raise UserError(
                f"--score {part.strip()}: expected METRIC=WEIGHT, a weight above 0, as erasure/ua=1,retention/ira=1"
            )
    return found
