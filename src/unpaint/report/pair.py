"""Two runs side by side: the difference of every number, paired picture by picture where both painted the same."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unpaint.errors import UserError
from unpaint.report.aggregate import COST
from unpaint.report.gather import Gathered, Run, measured_alike
from unpaint.report.tables import heading, text
from unpaint.report.wall import store_of

if TYPE_CHECKING:
    from rich.console import Console

PAIRED, APART = "same pictures", "independent"


@dataclass(frozen=True)
class Difference:
    """B - A of one metric, as texts for the reader and as numbers. how: `same pictures` or `independent`, empty for
    costs and where an interval cannot be had; verdict: `better` or `worse` if the interval excludes 0."""

    name: str
    heading: str
    base: str
    a: str
    b: str
    difference: str
    interval: str
    how: str
    n: str
    verdict: str
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Pair:
    """names: of A and of B. note: whether they were measured alike."""

    names: tuple[str, str]
    note: str
    lines: Sequence[Difference]


def paired(gathered: Gathered, a: Run, b: Run) -> Pair:
    """Compare run B with run A. Reads the readings of both from the cache, if they painted the same prompts from the
    same seeds; then torch is imported. Raises UserError if the two share no metric."""
    protocols = measured_alike([a, b])
    alike = len(protocols) == 1 and a.record.seed == b.record.seed and a.record.concept == b.record.concept
    shared = [name for name in a.record.metrics if name in b.record.metrics]
    if not shared:
        raise UserError(f"compare {a.folder} {b.folder}: no metric is in both ({_status(a)}; {_status(b)})")
    from_pictures = _from_pictures(a, b) if alike else {}
    lines = [
        line
        for name in shared
        if (line := _line(name, a.record.metrics[name], b.record.metrics[name], from_pictures.get(name))) is not None
    ]
    lines += [_cost(key, a.record.cost[key], b.record.cost[key]) for key in a.record.cost if _both(key, a, b)]
    return Pair((_name(a), _name(b)), _note(a, b, protocols), lines)


def _status(run: Run) -> str:
    return f"{run.record.run_id} is {run.record.status}, with {len(run.record.metrics)} metrics"


def _name(run: Run) -> str:
    record = run.record
    return f"{record.method} on {record.concept}, seed {record.seed} ({record.run_id})"


def _note(a: Run, b: Run, protocols: Sequence[Any]) -> str:
    if len(protocols) > 1:
        reasons = protocols[1].unlike(protocols[0])
        more = f" and {len(reasons) - 4} more" if len(reasons) > 4 else ""
        return f"They were not measured alike ({'; '.join(reasons[:4])}{more}): read the differences with that in mind."
    if a.record.concept != b.record.concept:
        return "They erase different concepts: the differences are between two tasks as well."
    if a.record.seed != b.record.seed:
        return "Their seeds differ, and so do their pictures: the differences are not paired."
    return "Same prompts and seeds on both sides: “same pictures” marks intervals of paired differences."


def _line(
    name: str, a: Mapping[str, Any], b: Mapping[str, Any], found: tuple[float, float, float] | None
) -> Difference | None:
    if a["value"] is None or b["value"] is None:
        return None
    how = PAIRED
    if any(side.get("relearned") is False for side in (a, b)):
        found = (math.nan, math.nan, math.nan)  # more steps than that, nobody knows how many
    elif found is None:
        found, how = independent(a, b), APART
    value, low, high = found
    known = not math.isnan(low)
    better = b.get("higher_is_better", True)
    verdict = "" if not known or low <= 0 <= high else "better" if (low > 0) == better else "worse"
    shown = {"metric": name, "unit": b.get("unit", "rate"), "value": value, "low": low, "high": high}
    limits = [_signed(text(shown, key)) for key in ("low", "high")]
    return Difference(
        name=name,
        heading=heading(name),
        base=text({**b, "metric": name}, "base"),
        a=text({**a, "metric": name}),
        b=text({**b, "metric": name}),
        difference=_signed(text(shown)),
        interval=" to ".join(limits) if known else "–",
        how=how if known else "",
        n=str(a.get("n")) if a.get("n") == b.get("n") else f"{a.get('n')} and {b.get('n')}",
        verdict=verdict,
        value=value,
        low=low if known else None,
        high=high if known else None,
    )


def _signed(number: str) -> str:
    return number if number == "–" else number.replace("-", "−") if number.startswith("-") else f"+{number}"


def independent(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[float, float, float]:
    """B - A of two numbers with intervals, as if nothing tied them: MOVER (Newcombe 1998, Statistics in Medicine 17,
    method 10, for rates with Wilson's intervals). The limits are NaN if a number has none."""
    value = b["value"] - a["value"]
    if any(side.get(key) is None for side in (a, b) for key in ("low", "high")):
        return value, math.nan, math.nan
    low = value - math.hypot(b["value"] - b["low"], a["high"] - a["value"])
    high = value + math.hypot(b["high"] - b["value"], a["value"] - a["low"])
    return value, low, high


def _both(key: str, a: Run, b: Run) -> bool:
    return all(isinstance(run.record.cost.get(key), int | float) for run in (a, b)) and key != "world_size"


def _cost(key: str, a: float, b: float) -> Difference:
    name = f"{COST}{key}"
    ratio = f"× {b / a:.2f}" if a > 0 else "–"
    left, right = (text({"metric": name, "value": value}) for value in (a, b))
    return Difference(name, heading(name), "–", left, right, ratio, "–", "", "", "", float(b) - float(a), None, None)


def _from_pictures(a: Run, b: Run) -> dict[str, tuple[float, float, float]]:
    """B - A and its interval, by the metrics' own paired arithmetic, of what the judges said of each picture."""
    stores = [store_of(run) for run in (a, b)]
    if None in stores or stores[0][0] != stores[1][0] or stores[0][1] != stores[1][1]:  # type: ignore[index]
        return {}
    from omegaconf import OmegaConf

    from unpaint.cases import NEUTRAL
    from unpaint.config import instantiate
    from unpaint.evaluation.metrics import PairReader, ReferenceMetric, asked
    from unpaint.evaluation.pictures import PictureStore

    config = b.record.config
    folder, _, of_b = stores[1]  # type: ignore[misc]
    of_a = stores[0][2]  # type: ignore[index]
    store = PictureStore(Path(folder).parent)
    try:
        evaluator, concept = (
            instantiate(OmegaConf.create(config[part]), config.get("plugins") or ())
            for part in ("evaluator", "concept")
        )
        batches = evaluator.plan(concept, b.record.seed)
    except UserError:
        return {}  # a plugin that is not here, or a judge that has gone: the difference is then not paired
    found = {}
    for metric in evaluator.metrics:
        # A judge of pairs compares with the unedited model, a reference with further pictures: neither is a difference
        # between two readings of the same picture.
        one_picture = not isinstance(metric.reader, PairReader) and not isinstance(metric, ReferenceMetric)
        recorded = [run.record.metrics.get(metric.name, {}).get("value") for run in (a, b)]
        if not one_picture or NEUTRAL in metric.parts or any(value is None for value in recorded):
            continue
        judge = (metric.reader or evaluator.detector).identity
        own = [batch for batch in batches if asked(batch.cases, metric)]
        readings: list[list[Any]] = [[store.reading(key, judge, batch) for batch in own] for key in (of_a, of_b)]
        if not own or any(reading is None for side in readings for reading in side):
            continue
        before, after = (
            [
                metric.part(batch.cases, reading.numpy(), evaluator.detector)
                for batch, reading in zip(own, side, strict=True)
            ]
            for side in readings
        )
        result = metric.finish(after, before)
        # Other values than the records' were computed of other pictures, or by another version of the metric.
        values = [metric.finish(before, before)["value"], result["value"]]
        if result.get("delta") is not None and np.allclose(
            np.array(values, float), np.array(recorded, float), rtol=0, atol=1e-9
        ):
            found[metric.name] = (result["delta"], result["delta_low"], result["delta_high"])
    return found


def show_pair(pair: Pair, files: Mapping[str, Path], console: "Console | None" = None) -> None:
    """Print the table of differences, and where the files are."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    for letter, name in zip("AB", pair.names, strict=True):
        console.print(f"[bold]{letter}[/bold] {escape(name)}", highlight=False)
    console.print(escape(pair.note), style="dim")
    table = Table(box=SIMPLE_HEAD)
    table.add_column("measured", overflow="fold", min_width=10)
    for column in ("A", "B", "B − A", "95 % interval", "n"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=console.width >= 90)
    for line in pair.lines:
        style = {"better": "green", "worse": "red"}.get(line.verdict, "")
        said = ", ".join(part for part in (line.verdict, line.how) if part)
        table.add_row(line.heading, line.a, line.b, line.difference, line.interval, line.n, said, style=style)
    console.print(table)
    for what, path in files.items():
        console.print(f"  {what:<9} {escape(str(path))}", soft_wrap=True, highlight=False)
