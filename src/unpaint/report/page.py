"""The page: one HTML file with everything in it, that opens from disk and asks the network for nothing."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from unpaint.files import replacing
from unpaint.report.aggregate import COST, UA, Summary, levelled
from unpaint.report.gather import Run, flat
from unpaint.report.pair import Pair
from unpaint.report.tables import (
    Section,
    apart,
    heading,
    in_words,
    interval,
    notes,
    order_in_words,
    sections,
    seeds_of,
    text,
)
from unpaint.report.terminal import slots
from unpaint.report.wall import Wall

_GROUPS = {
    "erasure": "Erasure",
    "retention": "Retention",
    "pairs": "2x2 table",
    "in_prompt": "In prompt",
    "fidelity": "Fidelity",
    "attack": "Attacks",
    "restoration": "Restoration",
    "oracle": "Oracle",
    "cost": "Cost",
}


def write_page(summary: Summary, wall: Wall, path: Path, pair: Pair | None = None) -> Path:
    """Write the page of a comparison, of two runs if there is a `pair`; returns its path."""
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("unpaint.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    gathered = summary.gathered
    statuses = Counter(run.record.status for run in gathered.runs)
    faults = {kind: [f.text for f in gathered.faults if f.kind == kind] for kind in _kinds(summary)}
    loader = Path(__file__).parent
    html = environment.get_template("page.html.j2").render(
        title=_title(summary, pair),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        counts={
            "runs": len(gathered.runs),
            "complete": statuses["complete"],
            "concepts": len({row.concept for row in gathered.rows}),
            "methods": len({row.method for row in gathered.rows}),
        },
        models=", ".join(sorted({run.record.model for run in gathered.runs})),
        faults=faults,
        apart=apart(summary),
        order=order_in_words(summary),
        notes=notes(summary),
        glossary=[_glossary(summary, name) for name in summary.metrics if not name.startswith(COST)],
        has=_has(summary, wall),
        wall=wall,
        pair=pair,
        style=Markup((loader / "page.css").read_text(encoding="utf-8")),
        script=Markup((loader / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
        # In a script element nothing but the end of the element needs escaping.
        data=Markup(
            json.dumps(page_data(summary, wall), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        ),
    )
    with replacing(path) as beside:
        beside.write_text(html, encoding="utf-8")
    return path


def _title(summary: Summary, pair: Pair | None) -> str:
    if pair is not None:
        return " and ".join(name.partition(", seed")[0] for name in pair.names)
    concepts = sorted({row.concept for row in summary.gathered.rows})
    what = f"“{concepts[0]}”" if len(concepts) == 1 else f"{len(concepts)} concepts"
    methods = len({row.method for row in summary.gathered.rows})
    return f"{what}, {methods} method{'s' * (methods > 1)}"


def _kinds(summary: Summary) -> list[str]:
    return list(dict.fromkeys(fault.kind for fault in summary.gathered.faults))


def _has(summary: Summary, wall: Wall) -> dict[str, bool]:
    metrics = summary.metrics
    return {
        "attacks": any(name.startswith("attack/") and name.endswith("/pre_asr") for name in metrics),
        "damage": "retention/damage" in metrics,
        "cost": any(name.startswith(COST) for name in metrics),
        "wall": bool(wall.cards),
    }


def _glossary(summary: Summary, name: str) -> dict[str, Any]:
    detectors = sorted(set(summary.runs.loc[summary.runs["metric"] == name, "detector"]))
    return {"name": name, "heading": heading(name), "title": _titles(summary)[name], "detectors": detectors}


def _titles(summary: Summary) -> dict[str, str]:
    found: dict[str, str] = {}
    for run in summary.gathered.runs:
        for name, metric in run.record.metrics.items():
            found.setdefault(name, in_words(metric.get("title") or ""))
    return found


# --- data -------------------------------------------------------------------------------------------------------------


def page_data(summary: Summary, wall: Wall) -> dict[str, Any]:
    """What the page's script shows, as plain data. A cell is [value, low, high, the value as text, the interval as
    text, n, over how many concepts or seeds]; the texts come from the full numbers, and the script shows them as they
    are. Values are levelled as for the ranks, so that the front that is drawn is theirs."""
    metrics, titles = summary.metrics, _titles(summary)
    first = summary.runs.drop_duplicates("metric").set_index("metric")
    rows = {(row.protocol, row.concept, row.method, row.variant): i for i, row in enumerate(summary.gathered.rows)}
    parts: dict[str, int] = {}
    runs = [
        _run(run, i, metrics, parts)
        for i, row in enumerate(summary.gathered.rows)
        for some in row.runs.values()
        for run in some
    ]
    return {
        "metrics": [
            {
                "name": name,
                "head": heading(name),
                "title": titles.get(name, ""),
                "unit": first.loc[name, "unit"],
                "up": bool(first.loc[name, "higher_is_better"]),
                "group": _GROUPS.get(name.partition("/")[0], name.partition("/")[0]),
                "detectors": sorted(set(summary.runs.loc[summary.runs["metric"] == name, "detector"].dropna()) - {""}),
            }
            for name in metrics
        ],
        "protocols": [
            {
                "name": protocol.name,
                "runs": len(protocol.runs),
                "unlike": protocol.unlike(summary.gathered.protocols[0]),
            }
            for protocol in summary.gathered.protocols
        ],
        "tables": [_table(summary, section, metrics, rows) for section in sections(summary)],
        "runs": runs,
        "parts": [json.loads(part) for part in parts],
        "damage": _damage(summary),
        "cards": [[c.protocol, c.concept, c.seed, c.prompt, c.fate, c.before, c.after] for c in wall.cards],
        "pictures": wall.pictures,
        "axes": [metrics.index(name) for name in (UA, summary.retention) if name in metrics],
        "weights": bool(summary.weights),
    }


def _table(summary: Summary, section: Section, metrics: Sequence[str], rows: Mapping[Any, int]) -> dict[str, Any]:
    values = [[line["cells"].get(name, {}).get("value", math.nan) for name in metrics] for line in section.lines]
    level = levelled(np.array(values, dtype=np.float64).reshape(len(values), len(metrics)))
    return {
        "protocol": section.protocol,
        "concept": section.concept,
        "concepts": section.concepts,
        "base": [_cell(section.base.get(name)) for name in metrics],
        "lines": [
            {
                "method": line["method"],
                "variant": line["variant"],
                "row": rows.get((section.protocol, section.concept, line["method"], line["variant"]), -1),
                "rank": None if line["rank"] is None or pd.isna(line["rank"]) else int(line["rank"]),
                "score": None if line["score"] is None or pd.isna(line["score"]) else round(float(line["score"]), 4),
                "seeds": seeds_of(summary, section, line),
                "cells": [_cell(line["cells"].get(name), value) for name, value in zip(metrics, own, strict=True)],
            }
            for line, own in zip(section.lines, level, strict=True)
        ],
    }


def _cell(line: Mapping[str, Any] | None, value: float | None = None) -> list[Any] | None:
    # value: what is drawn, if it is not the line's own
    if line is None:
        return None
    drawn = [line["value"] if value is None else value, line["low"], line["high"]]
    plain = [None if pd.isna(number) else float(f"{number:.7g}") for number in drawn]
    count = int(line["n"]) if not pd.isna(line["n"]) and line["n"] else None
    return [*plain, text(line), interval(line), count, int(line["concepts"] if "concepts" in line else line["seeds"])]


def _run(run: Run, row: int, metrics: Sequence[str], parts: dict[str, int]) -> dict[str, Any]:
    """`parts`: every section of a config once, as JSON; the run names those that are its own by their positions."""
    record = run.record
    config = {key: value for key, value in record.config.items() if key not in ("outputs", "force")}
    loose = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    own = [flat({key: value}) for key, value in config.items() if isinstance(value, Mapping)] + [flat(loose)]
    shown = {
        metrics.index(name): text(metric | {"metric": name})
        for name, metric in record.metrics.items()
        if name in metrics
    }
    return {
        "id": record.run_id,
        "row": row,
        "seed": record.seed,
        "status": record.status,
        "when": record.finished or record.started,
        "folder": str(run.folder),
        "texts": shown,
        "parts": [parts.setdefault(json.dumps(part, sort_keys=True, ensure_ascii=False), len(parts)) for part in own],
    }


def _damage(summary: Summary) -> dict[int, dict[str, Any]]:
    """Row -> its labels, as means over seeds [edited, unedited] and n, and which of them were to be erased."""
    found = {}
    for i, row in enumerate(summary.gathered.rows):
        records = [runs[0].record for runs in row.runs.values()]
        tables = [r.metrics["retention/damage"]["by_label"] for r in records if "retention/damage" in r.metrics]
        if not tables:
            continue
        labels = {
            label: [sum(t[label][key] for t in tables if label in t) for key in ("value", "base", "n")]
            + [sum(label in t for t in tables)]
            for label in dict.fromkeys(label for t in tables for label in t)
        }
        concept = records[0].config.get("concept") or {}
        members = (concept.get("members") or {"": concept}).values()
        found[i] = {
            "target": slots(records[0])["{target}"],
            "erased": ["+".join(member.get("labels") or []) for member in members],
            "labels": {label: [v / k, b / k, n] for label, (v, b, n, k) in labels.items()},
        }
    return found
