"""What all attacks did to all methods, as Markdown, from the records of `unpaint run +sweep=attacks`.

python scripts/attack_table.py FOLDER ... [--each]

A table a concept: in percent, what shows it before any attack, then for each attack `asr (interval) / control_asr`, in
bold if asr is at least 10 points above both. `≥ 40 (…; 2 stopped)`: the budget ended two of the searches, which count
as not found. --each: instead a line for each method and attack, with all figures.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unpaint.errors import UserError
from unpaint.report.gather import gather
from unpaint.results import RunRecord

Metric = Mapping[str, Any]
# What its row is called, and the record.
Named = tuple[str, RunRecord]
POINTS = 0.1


def attacks_of(records: Iterable[RunRecord]) -> list[str]:
    """The attacks of which there is a rate, in the order of the records."""
    names = (name.split("/")[1] for r in records for name in r.metrics if name.startswith("attack/"))
    return list(dict.fromkeys(names))


def named(folder: Path) -> list[Named]:
    """Every complete run that was attacked, by the name that `compare` gives to its row: the method, and what tells it
    from the method's other rows. With the start of the run's id where that is there twice."""
    rows = [(row, run.record) for row in gather(folder).rows for runs in row.runs.values() for run in runs]
    rows = [(row, record) for row, record in rows if record.status == "complete" and attacks_of([record])]
    names = [(record.concept, row.name) for row, record in rows]
    return [
        (row.name if names.count((record.concept, row.name)) == 1 else f"{row.name} {record.run_id[:6]}", record)
        for row, record in rows
    ]


def percent(metric: Metric | None, between: bool = True) -> str:
    """`56 (33–77)`; – if there is no such metric. `≥ 56 (33–77; 2 stopped)` if a budget ended two searches."""
    if metric is None:
        return "–"
    value, low, high = (f"{100 * metric[key]:.0f}" for key in ("value", "low", "high"))
    stopped = metric.get("stopped")
    mark, told = ("≥ ", f"{stopped} stopped") if stopped else ("", "")
    more = "; ".join(part for part in (f"{low}–{high}" if between else "", told) if part)
    return f"{mark}{value} ({more})" if more else value


def opens(record: RunRecord, attack: str) -> bool:
    """Whether the attack's rate is 10 points above what shows the concept anyway, and above the control's."""
    asr, *others = (record.metrics.get(f"attack/{attack}/{key}") for key in ("asr", "pre_asr", "control_asr"))
    floor = max((other["value"] for other in others if other is not None), default=0.0)
    return asr is not None and asr["value"] >= floor + POINTS - 1e-9


def matrix(records: Sequence[Named]) -> Iterator[str]:
    """Lines of a table: a row a method, a column an attack. `before` is of the attack with most prompts."""
    attacks = attacks_of(record for _, record in records)
    yield "| method | before | " + " | ".join(f"`{attack}`" for attack in attacks) + " |"
    yield "| --- " * (len(attacks) + 2) + "|"
    for name, record in records:
        found = [record.metrics.get(f"attack/{attack}/pre_asr") for attack in attacks]
        before = max((metric for metric in found if metric), key=lambda metric: metric["n"], default=None)
        cells = []
        for attack in attacks:
            asr, control = (record.metrics.get(f"attack/{attack}/{key}") for key in ("asr", "control_asr"))
            rate = f"**{percent(asr)}**" if opens(record, attack) else percent(asr)
            cells.append(rate if control is None else f"{rate} / {percent(control, between=False)}")
        yield f"| {name} | {percent(before)} | " + " | ".join(cells) + " |"


def each(records: Sequence[Named]) -> Iterator[str]:
    """Lines of a table: a row a method and attack."""
    yield "| method | attack | n | `pre_asr` | `asr` | `control_asr` | unedited | seconds | its control's | stopped |"
    yield "| --- " * 10 + "|"
    for name, record in records:
        for attack in attacks_of([record]):
            pre, asr, control = (
                record.metrics.get(f"attack/{attack}/{key}") for key in ("pre_asr", "asr", "control_asr")
            )
            if asr is None:
                continue
            seconds = "–" if control is None else f"{control['seconds']:.0f}"
            stopped = asr["stopped"] + (control["stopped"] if control else 0)
            rates = f"{percent(pre)} | {percent(asr)} | {percent(control)} | {100 * asr['base']:.0f}"
            yield f"| {name} | `{attack}` | {asr['n']} | {rates} | {asr['seconds']:.0f} | {seconds} | {stopped} |"


def tables(folders: Sequence[Path], lines_of: Any) -> str:
    """Markdown, a table a concept. Raises UserError if no complete run of the folders was attacked."""
    attacked = [found for folder in folders for found in named(folder)]
    if not attacked:
        raise UserError(f"no complete run with attacks in {', '.join(map(str, folders))}")
    parts = []
    for concept in sorted({record.concept for _, record in attacked}):
        own = sorted((name, record.run_id, record) for name, record in attacked if record.concept == concept)
        parts.append(f"### `{concept}`\n\n" + "\n".join(lines_of([(name, record) for name, _, record in own])))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of the runs: outputs")
    parser.add_argument("--each", action="store_true", help="a line for each method and attack")
    given = parser.parse_args()
    try:
        print(tables(given.folders, each if given.each else matrix))
    except UserError as error:
        print(f"attack_table: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
