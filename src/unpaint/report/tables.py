"""A comparison as text: a table in the terminal, CSV, Markdown, and the words that all of them share with the page."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from unpaint.files import replacing
from unpaint.report.aggregate import COST, MEAN, ROW, UA, Summary, in_order
from unpaint.report.terminal import COSTS, NARROW, amount, number

if TYPE_CHECKING:
    from rich.console import Console

# A name is short where people know it; others are the last part of the metric's, in words.
_HEADINGS = {
    "erasure/ua": "UA",
    "erasure/ua_out_of_set": "UA, other words",
    "erasure/ua_implicit": "UA, implied",
    "erasure/fsr": "FSR",
    "retention/ira": "IRA",
    "retention/cra": "CRA",
    "retention/damage": "worst label",
    "fidelity/clip_score": "CLIP score",
    "fidelity/fid": "FID",
    "fidelity/kid": "KID",
    "in_prompt/csdr": "CSDR",
    "in_prompt/clip_score": "CLIP, rest of prompt",
}
_PAIRS = ("pairs/first_only", "pairs/second_only")  # what must stay of a combination
_COMPACT = (
    *(UA, "erasure/ua_out_of_set", *_PAIRS),
    *("retention/ira", "retention/cra", "fidelity/clip_score", "cost/erase_seconds"),
)
# A table of their own: what erasing takes, and what it does to pictures at large.
_PRICE = (
    *("fidelity/fid", "cost/optimizer_steps", "cost/seconds_to_ua95", "cost/peak_memory_bytes"),
    *("cost/trainable_parameters", "cost/changed_parameters", "cost/edit_bytes"),
)
_GENERIC = {
    "“{target}”": "the concept",
    "{target}": "the concept",
    "{axis}": "thing of its kind",
    "{cross}": "crossed label",
}
MOST_LINES = 60
UNEDITED = "unedited model"


def heading(metric: str) -> str:
    """What a column of the metric is called."""
    if metric in _HEADINGS:
        return _HEADINGS[metric]
    if metric.startswith(COST):
        return COSTS[metric.removeprefix(COST)][0] if metric.removeprefix(COST) in COSTS else metric
    group, _, rest = metric.partition("/")
    words = rest.replace("_", " ").replace("/", ": ")
    return words.replace("pre asr", "ASR before").replace(" asr", " ASR") if group == "attack" else words


def in_words(title: str) -> str:
    """A metric's title for any concept."""
    for slot, words in _GENERIC.items():
        title = title.replace(slot, words)
    return title


def text(line: Mapping[str, Any], key: str = "value") -> str:
    """The number as it is shown: rates in percent and cosines times 100, without a sign; costs with their unit. What
    did not come to its end is `never`, `> 200`, or `not always`; a rate that stopped searches may raise has a ≥."""
    if key == "value" and (line.get("never") or line.get("relearned") is False):
        return _never(line)
    if line.get(key) is None or pd.isna(line[key]):
        return "–"
    metric = str(line.get("metric", ""))
    if metric.startswith(COST):
        kind = COSTS.get(metric.removeprefix(COST), ("", "count"))[1]
        value = float(line[key])
        # A mean of counts is none itself, but the tenths of a large one say nothing.
        whole = kind != "seconds" and (value.is_integer() or value >= 1000)
        return amount(round(value) if whole else round(value, 1), kind)
    # pair's differences are numbers as well, and have none of these keys
    return f"≥ {number(line, key, '')}" if key == "value" and line.get("stopped") else number(line, key, "")


def _never(line: Mapping[str, Any]) -> str:
    if line.get("relearned") is False:  # of a record
        return f"> {number(line, 'value', '')}"
    if line["never"] < 1:
        return "not always"
    return "never" if math.isinf(line["more_than"]) else f"> {number(line, 'more_than', '')}"


def interval(line: Mapping[str, Any]) -> str:
    """`92.7–99.4`; empty if there is none, and where both ends read alike, as of a count that all seeds agree on."""
    low, high = text(line, "low"), text(line, "high")
    return "" if "–" in (low, high) or low == high else f"{low}–{high}"


@dataclass(frozen=True)
class Section:
    """One table: of one protocol, for one concept or (concept None) as a mean over all. lines: best row first, each
    with its place, rank, score, `seeds`, and `cells` {metric: line of the frame}; base: the unedited model's cells."""

    protocol: int
    concept: str | None
    lines: Sequence[Mapping[str, Any]]
    base: Mapping[str, Mapping[str, Any]]
    concepts: int


def sections(summary: Summary) -> Iterator[Section]:
    """Protocol by protocol: the mean over its concepts, if there are several, then every concept."""
    tables = (
        (summary.means, summary.base_means, summary.mean_ranks, MEAN),
        (summary.rows, summary.base, summary.row_ranks, ROW),
    )
    for protocol in range(len(summary.gathered.protocols)):
        concepts = sorted({row.concept for row in summary.gathered.rows if row.protocol == protocol})
        for table, base, ranks, by in tables:
            if by is MEAN and len(concepts) < 2:
                continue
            cells = _cells(table[table["protocol"] == protocol], by)
            unedited = _cells(base[base["protocol"] == protocol], by)
            order = in_order(ranks[ranks["protocol"] == protocol], table, by).to_dict("records")
            for concept in [None] if by is MEAN else concepts:
                own = [line for line in order if concept is None or line["concept"] == concept]
                lines = [line | {"cells": cells[tuple(line[key] for key in by)]} for line in own]
                here = (protocol, "", "") if concept is None else (protocol, concept, "", "")
                yield Section(
                    protocol,
                    concept,
                    [*lines, *_unmeasured(summary, protocol, concept, lines)],
                    unedited.get(here, {}),
                    len(concepts),
                )


def _cells(table: pd.DataFrame, by: Sequence[str]) -> dict[tuple[Any, ...], dict[str, dict[str, Any]]]:
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for line in table.to_dict("records"):
        found.setdefault(tuple(line[key] for key in by), {})[line["metric"]] = line
    return found


def _unmeasured(
    summary: Summary, protocol: int, concept: str | None, lines: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of which no run is complete."""
    there = {(line["method"], line["variant"]) for line in lines}
    names = {
        (row.method, row.variant): None
        for row in summary.gathered.rows
        if row.protocol == protocol and concept in (None, row.concept) and (row.method, row.variant) not in there
    }
    return [
        {
            "protocol": protocol,
            "concept": concept,
            "method": method,
            "variant": variant,
            "rank": None,
            "score": None,
            "cells": {},
        }
        for method, variant in names
    ]


def name_of(line: Mapping[str, Any]) -> str:
    return f"{line['method']} ({line['variant']})" if line["variant"] else str(line["method"])


def seeds_of(summary: Summary, section: Section, line: Mapping[str, Any]) -> str:
    """`2 of 3`, or for a mean how many concepts; and what did not come to its end."""
    rows = [
        row
        for row in summary.gathered.rows
        if (row.protocol, row.method, row.variant) == (section.protocol, line["method"], line["variant"])
        and section.concept in (None, row.concept)
    ]
    runs = [run for row in rows for some in row.runs.values() for run in some]
    broken = [run.record.status for run in runs if run.record.status != "complete"]
    told = "".join(f", {broken.count(status)} {status}" for status in dict.fromkeys(broken))
    if section.concept is None:
        done = {
            row.concept
            for row in rows
            if any(r.record.status == "complete" for some in row.runs.values() for r in some)
        }
        return f"{len(done)} of {section.concepts}{told}"
    whole = sum(any(run.record.status == "complete" for run in some) for some in rows[0].runs.values()) if rows else 0
    return f"{whole}{told}"


def title(summary: Summary, section: Section) -> str:
    protocol = summary.gathered.protocols[section.protocol]
    what = f"mean over {section.concepts} concepts" if section.concept is None else f"“{section.concept}” erased"
    return f"{what} ({protocol.name})"


def order_in_words(summary: Summary) -> str:
    if summary.weights:
        total = sum(summary.weights.values())
        parts = " + ".join(f"{weight / total:.3g} × {heading(name)}" for name, weight in summary.weights.items())
        return f"Ordered by score = {parts} (one minus the rate where lower is better)."
    return (
        f"Ordered by Pareto front of {heading(UA)} and {heading(summary.retention)}: on front 1 no other row is at "
        "least as good in both and better in one. There is no score unless you ask for one (--score)."
    )


def notes(summary: Summary) -> list[str]:
    """What the numbers of the tables are, in sentences."""
    told = [
        "Rates in %, CLIP cosines times 100; in parentheses the 95 % interval.",
        "One seed: the interval of the record, about pictures. Several seeds: the wider, on each side, of Student's t "
        "over the seeds and of the records' own intervals combined.",
    ]
    if set(_PAIRS) & set(summary.metrics):
        first, second = map(heading, _PAIRS)
        told.append(f"{first}, {second}: how often a part of the combination, asked for without the other, is there.")
    if (summary.runs["stopped"] > 0).any():
        told.append("≥: the budget ended some of the attack's searches, which count as not found.")
    return told


# --- terminal ---------------------------------------------------------------------------------------------------------


def show(summary: Summary, files: Mapping[str, Path], console: "Console | None" = None) -> None:
    """Print what is wrong, a table for each protocol and concept (the means alone if that would be more than
    `MOST_LINES` lines), and where the files are."""
    from rich.console import Console
    from rich.markup import escape

    console = console or Console()
    every = list(sections(summary))
    several = sum(len(section.lines) for section in every) > MOST_LINES
    shown = [section for section in every if not several or section.concept is None or section.concepts == 1]
    for section in shown:
        console.print(_table(summary, section, console.width))
    if len(shown) < len(every):
        console.print(f"{len(every) - len(shown)} tables of single concepts: in the files.")
    console.print(escape(" ".join((order_in_words(summary), *notes(summary)))), style="dim", highlight=False)
    told = [*apart(summary), *(f"{fault.kind}: {fault.text}" for fault in summary.gathered.faults)]
    for line in told[:20]:
        console.print(escape(line), style="yellow", soft_wrap=True, highlight=False)
    if len(told) > 20:
        console.print(f"... and {len(told) - 20} more such lines, on the page", style="yellow")
    for what, path in files.items():
        console.print(f"  {what:<9} {escape(str(path))}", soft_wrap=True, highlight=False)


def apart(summary: Summary) -> list[str]:
    """Why protocols are kept apart: one line for each but the first."""
    first, *others = summary.gathered.protocols
    lines = []
    for other in others:
        reasons = other.unlike(first)
        more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        lines.append(f"not measured alike: {other.name} ({len(other.runs)} runs): {'; '.join(reasons[:3])}{more}")
    return lines


def _table(summary: Summary, section: Section, width: int) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title(summary, section)), title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    columns = _fitting(compact(summary, section), summary, width)
    names = [str(line["method"]) for line in section.lines]
    table.add_column("method", overflow="fold", min_width=min(24, max(map(len, [*names, UNEDITED]))))
    table.add_column("score" if summary.weights else "front", justify="right")
    table.add_column("concepts" if section.concept is None else "seeds", justify="right")
    for name in columns:
        table.add_column(heading(name), justify="right", no_wrap=True)
    table.add_row(f"[dim]{UNEDITED}[/dim]", "", "", *(f"[dim]{text(section.base.get(n, {}))}[/dim]" for n in columns))
    for line in section.lines[:MOST_LINES]:
        place = line["score"] if summary.weights else line["rank"]
        table.add_row(
            escape(name_of(line)),
            "–" if place is None or pd.isna(place) else f"{place:.3f}" if summary.weights else str(place),
            seeds_of(summary, section, line),
            *((text if width < NARROW else _with_interval)(line["cells"].get(name, {})) for name in columns),
        )
    if len(section.lines) > MOST_LINES:
        table.caption = f"{len(section.lines) - MOST_LINES} more rows: in the files"
    return table


def _fitting(columns: Sequence[str], summary: Summary, width: int) -> list[str]:
    """As many columns as there is room for beside the method, what matters most first; always UA and retention."""
    wanted = dict.fromkeys([UA, summary.retention, *summary.weights, *_PAIRS, _COMPACT[-1], "retention/cra", *columns])
    room = max(2, (width - 46) // 21)
    kept = [name for name in wanted if name in columns][:room]
    return [name for name in columns if name in kept]


def compact(summary: Summary, section: Section) -> list[str]:
    """The metrics of the narrow tables that some line of the section has."""
    there = {name for line in section.lines for name in line["cells"]}
    wanted = dict.fromkeys([*_COMPACT[:2], summary.retention, *_COMPACT[2:-1]])
    attacks = [name for name in summary.metrics if name.startswith("attack/") and name.endswith("/asr")]
    every = dict.fromkeys([*wanted, *attacks, *summary.weights])
    every.pop(_COMPACT[-1], None)
    return [name for name in [*every, _COMPACT[-1]] if name in there]


def _with_interval(line: Mapping[str, Any]) -> str:
    between = interval(line) if line else ""
    return f"{text(line)} ({between})" if between else text(line)


# --- files ------------------------------------------------------------------------------------------------------------


def write_csv(summary: Summary, path: Path) -> Path:
    """One line a row and metric, numbers in full; rows of which no run is complete have a line without numbers."""
    protocols = summary.gathered.protocols
    table = summary.rows.merge(summary.row_ranks, on=ROW)
    left = [
        row
        for row in summary.gathered.rows
        if (row.protocol, row.concept, row.method, row.variant)
        not in set(table[ROW].itertuples(index=False, name=None))
    ]
    empty = pd.DataFrame([{key: getattr(row, key) for key in ROW} for row in left], columns=ROW)
    table = pd.concat([table, empty]) if len(empty) else table
    status = {
        (row.protocol, row.concept, row.method, row.variant): " ".join(
            f"{seed}:{run.record.status}:{run.record.run_id}" for seed, runs in row.runs.items() for run in runs
        )
        for row in summary.gathered.rows
    }
    table["runs"] = [status[key] for key in table[ROW].itertuples(index=False, name=None)]
    table["measured_as"] = [protocols[i].name for i in table["protocol"]]
    columns = [
        "measured_as",
        "concept",
        "method",
        "variant",
        "rank",
        *(["score"] if summary.weights else []),
        "metric",
        "value",
        "low",
        "high",
        "n",
        "seeds",
        "base",
        "never",
        "more_than",
        "stopped",
        "unit",
        "higher_is_better",
        "detector",
        "runs",
    ]
    with replacing(path) as beside:
        table[columns].to_csv(beside, index=False)
    return path


def write_markdown(summary: Summary, path: Path) -> Path:
    """The tables of `sections`, and every line about what is missing or was measured otherwise."""
    parts = [f"# Comparison of {len(summary.gathered.runs)} runs", order_in_words(summary), " ".join(notes(summary))]
    parts += markdown(summary)
    told = [*apart(summary), *(f"{fault.kind}: {fault.text}" for fault in summary.gathered.faults)]
    if told:
        parts += ["## What is missing or apart", "\n".join(f"- {line}" for line in told)]
    with replacing(path) as beside:
        beside.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def markdown(summary: Summary) -> list[str]:
    """Headings and tables, as paragraphs; what attacks came to has a table of its own, and so has, in the first section
    of each protocol, what fidelity and erasing cost."""
    parts: list[str] = []
    seen: set[int] = set()
    for section in sections(summary):
        columns = compact(summary, section)
        attacks = [name for name in columns if name.startswith("attack/")]
        parts += [
            f"## {title(summary, section)}",
            _grid(summary, section, section.lines, [name for name in columns if name not in attacks]),
        ]
        if attacks:
            attacked = [line for line in section.lines if any(name in line["cells"] for name in attacks)]
            parts += [_attacked(section, attacked, attacks), _grid(summary, section, attacked, attacks, placed=False)]
        there = {name for line in section.lines for name in line["cells"]}
        price = [name for name in _PRICE if name in there]
        if price and section.protocol not in seen:
            seen.add(section.protocol)
            parts += ["Fidelity and cost:", _grid(summary, section, section.lines, price, placed=False)]
    return parts


def _attacked(section: Section, lines: Sequence[Mapping[str, Any]], attacks: Sequence[str]) -> str:
    if section.concept is not None:
        return "After attacks:"
    counts = {int(line["cells"][name]["concepts"]) for line in lines for name in attacks if name in line["cells"]}
    return f"After attacks, of {' or '.join(map(str, sorted(counts)))} of the concepts:"


def _grid(
    summary: Summary, section: Section, lines: Sequence[Mapping[str, Any]], columns: Sequence[str], placed: bool = True
) -> str:
    """placed: with the rank, or the score, and the number of concepts or seeds, which are those of the whole row."""
    place = "score" if summary.weights else "front"
    seeds = "concepts" if section.concept is None else "seeds"
    head = ["method", *([place, seeds] if placed else []), *(heading(name) for name in columns)]
    base = [UNEDITED, *(["", ""] if placed else []), *(text(section.base.get(name, {})) for name in columns)]
    rows = [head, ["---", *["---:"] * (len(head) - 1)], base]
    for line in lines:
        own = line["score"] if summary.weights else line["rank"]
        shown = "–" if own is None or pd.isna(own) else f"{own:.3f}" if summary.weights else str(own)
        cells = (_with_interval(line["cells"].get(name, {})) for name in columns)
        rows.append([name_of(line), *([shown, seeds_of(summary, section, line)] if placed else []), *cells])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
