"""A run's record as a table in the terminal, for somebody who has read nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unpaint.results import RunRecord

if TYPE_CHECKING:
    from rich.console import Console

NARROW = 76  # columns; below, the table keeps what matters most
COSTS = {
    "erase_seconds": ("erasing took", "seconds"),
    "evaluate_seconds": ("evaluating took", "seconds"),
    "seconds_to_ua95": ("erased to 95 % after", "seconds"),
    "optimizer_steps": ("optimiser steps", "count"),
    "peak_memory_bytes": ("most memory in use", "bytes"),
    "trainable_parameters": ("weights the method may change", "count"),
    "changed_parameters": ("weights it changed", "count"),
    "edit_bytes": ("size of the edit", "bytes"),
    "world_size": ("processes", "count"),
}


def show(record: RunRecord, files: Mapping[str, Path | str] | None = None, console: "Console | None" = None) -> None:
    """Print the record as a table that needs no manual, then the cost and the files written ({what: path})."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    table = Table(title=_title(record), title_justify="left", title_style="bold", caption=_CAPTION, box=SIMPLE_HEAD)
    table.caption_justify = "left"
    table.add_column("what was measured", overflow="fold", min_width=18)
    headings = ["unedited", "edited", "95 % interval", "n", "in short"]
    if console.width < NARROW:
        headings = ["unedited", "edited", "in short"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "in short" else "right", no_wrap=heading != "in short")
    for name, metric in record.metrics.items():
        mark = "> " if metric.get("relearned") is False else "≥ " if metric.get("stopped") else ""
        cells = {
            "unedited": number(metric, "base"),
            "edited": f"[bold]{mark}{number(metric, 'value')}[/bold]",
            "95 % interval": f"{number(metric, 'low', '')}–{number(metric, 'high')}",
            "n": str(metric.get("n", "–")),
            "in short": verdict(name, metric),
        }
        words = f"{_in_words(metric.get('title', ''), record)} [dim]{name}[/dim]".strip()
        table.add_row(words, *(cells[heading] for heading in headings))
    if record.metrics:
        console.print(table)
    else:
        console.print(f"[bold]{_title(record)}[/bold]")
    lines = [(words, amount(record.cost[key], kind)) for key, (words, kind) in COSTS.items() if key in record.cost]
    lines += [(key, str(value)) for key, value in record.cost.items() if key not in COSTS]
    _pairs(console, "cost", lines)
    _pairs(console, "written", [(what, str(path)) for what, path in (files or {}).items()])


_CAPTION = "Same prompts and seeds for both models. The interval is that of the edited model; n counts pictures."


def _pairs(console: "Console", heading: str, lines: Sequence[tuple[str, str]]) -> None:
    from rich.markup import escape

    if not lines:
        return
    console.print(f"[bold]{heading}[/bold]")
    wide = max(len(what) for what, _ in lines)
    for what, value in lines:
        # A path that is cut or broken cannot be copied.
        console.print(f"  {escape(what.ljust(wide))}  {escape(value)}", soft_wrap=True, highlight=False)


def _title(record: RunRecord) -> str:
    from rich.markup import escape

    state = {"complete": "", "failed": " (failed)", "interrupted": " (interrupted, go on with the same command)"}
    words = slots(record)["{target}"]
    return escape(f"“{words}” erased from {record.model} by {record.method}, seed {record.seed}{state[record.status]}")


def _in_words(title: str, record: RunRecord) -> str:
    from rich.markup import escape

    for slot, words in slots(record).items():
        title = title.replace(slot, words)
    return escape(title)


def slots(record: RunRecord) -> dict[str, str]:
    """What the slots of a title stand for; for a set, its members' words."""
    concept = record.config.get("concept", {})
    members = list((concept.get("members") or {"": concept}).values())
    targets = [str(member.get("target", record.concept)) for member in members]
    axes = {str(member.get("axis", "concept")) for member in members}
    crossed = {str((member.get("evaluation") or {}).get("cross_domain") or "rest") for member in members}
    return {
        "{target}": ", ".join(targets[:-1]) + " or " * (len(targets) > 1) + targets[-1],
        "{axis}": axes.pop() if len(axes) == 1 else "concept",
        "{cross}": crossed.pop() if len(crossed) == 1 else "rest",
    }


def verdict(name: str, metric: Mapping[str, Any]) -> str:
    """A word or two: for `erasure/` the rate itself decides (95 %, 80 %), else its ratio to the unedited model's.

    For the cell of both in a 2x2 table that ratio is to be small (15 %, 50 %)."""
    value, base = metric.get("value"), metric.get("base")
    if value is None:
        return "not measured"
    if metric.get("relearned") is False:
        return "not back by then"
    if metric.get("stopped"):
        return f"{metric['stopped']} of {metric.get('n')} searches stopped"
    if name.startswith("erasure/"):
        if base is not None and base >= 0.8:
            return "never painted"
        return (
            "[green]erased[/green]" if value >= 0.95 else "partly erased" if value >= 0.8 else "[red]not erased[/red]"
        )
    if name == "pairs/both" and base:
        ratio = value / base
        return (
            "[green]erased[/green]" if ratio <= 0.15 else "partly erased" if ratio <= 0.5 else "[red]not erased[/red]"
        )
    if not metric.get("higher_is_better", True) or not base or base < 0:
        return "↑ is better" if metric.get("higher_is_better", True) else "↓ is better"
    ratio = value / base
    return "[green]kept[/green]" if ratio >= 0.9 else "partly lost" if ratio >= 0.7 else "[red]lost[/red]"


def number(metric: Mapping[str, Any], key: str, sign: str = " %") -> str:
    value = metric.get(key)
    if value is None:
        return "–"
    if metric.get("unit", "rate") == "rate":
        return f"{100 * value:.1f}{sign}"
    # A cosine is shown as CLIP scores usually are, times 100.
    return f"{100 * value:.2f}" if metric["unit"] == "cosine" else f"{value:.3g}"


def amount(value: Any, kind: str) -> str:
    if value is None:
        return "never" if kind == "seconds" else "–"
    if kind == "seconds":
        return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"
    if kind == "count":
        return f"{value:,}"
    size = float(value)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
