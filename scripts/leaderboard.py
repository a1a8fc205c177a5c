"""The leaderboard: keeps the records of a sweep, small, under docs/results, and makes docs/results.md of what is kept.

    python scripts/leaderboard.py keep outputs     copy the records of every complete run there, without machine paths;
                                                   --into FOLDER for runs that are to stand in no leaderboard
    python scripts/leaderboard.py write            docs/results.md and docs/images/tradeoff.png from docs/results
    python scripts/leaderboard.py pictures outputs docs/images/wall.png from what the kept runs painted there

The plot is a photograph of the page's own, and takes a Chromium: apt-get install chromium.

The text of docs/results.md outside the two marks is written by hand and left as it is.
"""

import argparse
import base64
import dataclasses
import io
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from PIL import Image, ImageDraw, ImageFont

from unpaint.config import compose
from unpaint.errors import UserError
from unpaint.evaluation.grid import FAINT, GREEN, INK, PAPER, RED
from unpaint.listing import conf_dir, options
from unpaint.report.aggregate import Summary, summarized
from unpaint.report.gather import Gathered, Run, flat, gather, gathered
from unpaint.report.page import write_page
from unpaint.report.tables import apart, markdown, notes, order_in_words
from unpaint.report.wall import GONE, Card, Wall, wall
from unpaint.results import RunRecord

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- made by scripts/leaderboard.py -->", "<!-- end -->"
HEAD = "# Results\n\nThe Picturebook leaderboard; what the numbers mean: [evaluation.md](evaluation.md).\n"
# The sweeps that it is made of and whose evaluators have no name of their own.
SWEEPS = ("table", "attacks")
# What the records say of a machine and of one user's folders; it says nothing about the numbers.
_LOOSE = ("outputs", "force", "logger", "trainer", "checkpoint_seconds", "probes", "plugins")

# What in a sweep depends on the jobs before; benchmark.py erasing measures it.
_OF_THE_SWEEP = ("peak_memory_bytes",)


def keep(outputs: Path, results: Path) -> list[Path]:
    """Copy the complete records below `outputs` to `results/<concept>/<method>/<run_id>/`; returns their paths."""
    kept = []
    for run in gather(outputs).runs:
        if run.record.status == "complete":
            record = slim(run.record)
            kept.append(record.save(results / record.concept / record.method / record.run_id))
    return kept


def slim(record: RunRecord) -> RunRecord:
    """The record without paths, the platform's name and memory, and with numbers to six digits."""
    config = {key: value for key, value in record.config.items() if key not in _LOOSE}
    environment: dict[str, Any] = {
        key: record.environment[key] for key in ("unpaint", "git", "torch", "device") if key in record.environment
    }
    metrics = {name: {key: _short(value) for key, value in metric.items()} for name, metric in record.metrics.items()}
    cost = {key: value for key, value in record.cost.items() if key not in _OF_THE_SWEEP}
    return dataclasses.replace(record, config=config, environment=environment, metrics=metrics, cost=cost)


def _short(value: object) -> object:
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write(results: Path, page: Path) -> Path:
    """Put the tables of `results`, and the command for each row, between the marks of `page`."""
    summary = summarized(gather(results))
    told = [f"- {line}" for line in [*apart(summary), *(f"{f.kind}: {f.text}" for f in summary.gathered.faults)]]
    parts = [order_in_words(summary), " ".join(notes(summary)), *markdown(summary), "## The command for each row"]
    parts += [
        "```\n" + "\n".join(commands(summary)) + "\n```",
        *(["## Missing or apart", "\n".join(told)] if told else []),
    ]
    made = "\n\n".join([BEGIN, *parts, END])
    before, _, rest = (page.read_text(encoding="utf-8") if page.is_file() else f"{HEAD}\n{BEGIN}{END}").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{made}{after.rstrip()}\n", encoding="utf-8")
    return page


CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 900, 470
# Of the page, the trade-off plot alone.
ALONE = """
<style>
  .skip, .top, .filters, footer, .modebar-container { display: none !important; }
  main > section:not([aria-labelledby="trade-title"]), section > :not(#trade) { display: none !important; }
  .wide { padding: 0; max-width: none; } section { margin: 0; } .plot { height: %dpx; }
</style>
"""


def draw(results: Path, picture: Path) -> Path:
    """Photograph the trade-off plot of the page that `unpaint compare` writes of `results`, twice as large as it is
    shown: the means of what was run on all concepts of the first table. Raises UserError without a Chromium."""
    browser = next((found for name in CHROMIUMS if (found := shutil.which(name))), None)
    if browser is None:
        raise UserError(f"{picture} is drawn by a browser, and there is none: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        page = write_page(summarized(_on_all_concepts(gather(results))), Wall(), Path(folder) / "page.html")
        html = page.read_text(encoding="utf-8").replace("</head>", ALONE % HEIGHT + "</head>", 1)
        page.write_text(html, encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000"]
        size = [f"--window-size={WIDTH},{HEIGHT}", "--force-device-scale-factor=2"]
        shot = Path(folder) / "shot.png"
        own = [f"--user-data-dir={folder}/profile", f"--screenshot={shot}"]
        done = subprocess.run([browser, *flags, *size, *own, page.as_uri()], capture_output=True, text=True)
        if not shot.is_file():
            raise UserError(f"{picture}: {browser} took no picture: {done.stderr.strip()[-300:]}")
        picture.parent.mkdir(parents=True, exist_ok=True)
        # 64 colours are enough for a plot, and a third of the bytes.
        Image.open(shot).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(picture, optimize=True)
    return picture


def _on_all_concepts(gathered: Gathered) -> Gathered:
    """The first table's rows alone, and of these the ones whose mean is over all of its concepts."""
    rows = [row for row in gathered.rows if row.protocol == 0]
    concepts = {row.concept for row in rows}
    of = {row.name: {one.concept for one in rows if one.name == row.name} for row in rows}
    return dataclasses.replace(gathered, rows=[row for row in rows if of[row.name] == concepts])


CELL, GAP, LABEL, TOP = 96, 4, 190, 56


def show(outputs: Path, results: Path, picture: Path) -> Path:
    """A row for the first prompt of each concept's target and of what must stay: the unedited model's picture, and that
    of each method from the same seed. Of the kept runs of seed 0 with evaluator=standard. Raises UserError if
    `outputs` has no pictures of it."""
    runs = [run for run in gather(results).runs if run.record.seed == 0]
    kept = {run.record.run_id for run in runs if _way(run) == "evaluator=standard"}
    found = gather(outputs)
    here = gathered(outputs, [run for run in found.runs if run.record.run_id in kept])
    cards: dict[tuple[str, bool], Card] = {}
    shown = wall(here)
    for card in shown.cards:
        cards.setdefault((card.concept, card.fate == GONE), card)
    if not cards:
        raise UserError(f"{outputs}: none of the runs of {results} has its pictures there")
    names = list(dict.fromkeys(here.rows[i].name for card in cards.values() for i, _ in card.after))
    columns = ["unedited", *sorted(names)]
    sheet = Image.new("RGB", (LABEL + len(columns) * (CELL + GAP), TOP + len(cards) * (CELL + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    head, text = ImageFont.load_default(13), ImageFont.load_default(12)
    for i, name in enumerate(columns):
        words = name.replace(" (", "\n(").replace("variant=", "")
        draw.multiline_text((LABEL + i * (CELL + GAP) + CELL / 2, TOP - 8), words, INK, head, "md", align="center")
    for k, ((concept, gone), card) in enumerate(sorted(cards.items(), key=lambda item: (item[0][0], not item[0][1]))):
        top = TOP + k * (CELL + GAP)
        draw.text((0, top + 8), concept.replace("_", " "), INK, head)
        draw.text((0, top + 26), card.fate, RED if gone else GREEN, text)
        draw.multiline_text((0, top + 44), textwrap.fill(card.prompt, 30), FAINT, text)
        places = {"unedited": card.before} | {here.rows[i].name: place for i, place in card.after}
        for i, name in enumerate(columns):
            if name in places:
                data = base64.b64decode(shown.pictures[places[name]].partition(",")[2])
                one = Image.open(io.BytesIO(data)).resize((CELL, CELL), Image.Resampling.LANCZOS)
                sheet.paste(one, (LABEL + i * (CELL + GAP), top))
            else:
                draw.text((LABEL + i * (CELL + GAP) + CELL / 2, top + CELL / 2), "-", FAINT, head, "mm")
    sheet.quantize(256, dither=Image.Dither.NONE).save(picture, optimize=True)
    return picture


def commands(summary: Summary) -> Iterator[str]:
    """What runs each row again: its choices, and every option that is not the shipped default."""
    for row in summary.gathered.rows:
        ways: dict[str, dict[int, Run]] = {}
        for seed, runs in row.runs.items():
            for run in runs:
                ways.setdefault(_way(run), {})[seed] = run
        for way, by_seed in ways.items():
            chosen = (f"method={row.method}", f"concept={row.concept}", way)
            several = " -m" if len(by_seed) > 1 and not way.startswith("+sweep=") else ""
            changed = _changed(next(iter(by_seed.values())), _default(*chosen))
            yield " ".join([f"unpaint run{several}", *chosen, f"seed={','.join(map(str, by_seed))}", *changed])


def _way(run: Run) -> str:
    """The choice of a shipped evaluator, or of a sweep of the leaderboard's, that differs least from the run's."""
    own = flat(run.record.config.get("evaluator") or {})
    ways = [f"evaluator={option.name}" for option in options([conf_dir()], "evaluator")]
    ways += [f"+sweep={name}" for name in SWEEPS]
    return min(ways, key=lambda way: len(set(own.items()) ^ set(_part(_default(way), "evaluator"))))


@cache
def _default(*overrides: str) -> dict[str, Any]:
    config = OmegaConf.to_container(compose(overrides), resolve=True)
    assert isinstance(config, dict)
    return flat({key: config[key] for key in ("model", "concept", "method", "evaluator")})


def _shipped(name: str, chosen: str) -> dict[str, Any]:
    """The config with a metric of that name added, if one ships."""
    return _default(chosen) if (conf_dir() / "metric" / f"{name}.yaml").is_file() else {}


def _part(config: dict[str, Any], name: str) -> list[tuple[str, Any]]:
    return [(key.partition(".")[2], value) for key, value in config.items() if key.startswith(f"{name}.")]


def _changed(run: Run, default: dict[str, Any]) -> Iterator[str]:
    config = run.record.config
    own = flat({key: config[key] for key in ("model", "concept", "method", "evaluator") if key in config})
    for name in (config.get("evaluator") or {}).get("metrics", {}):
        below = f"evaluator.metrics.{name}."
        chosen = f"+metric@evaluator.metrics.{name}={name}"
        here = {key: value for key, value in own.items() if key.startswith(below)}
        if not any(key.startswith(below) for key in default) and here.items() <= _shipped(name, chosen).items():
            own = {key: value for key, value in own.items() if key not in here}
            yield chosen
    for key, value in own.items():
        if key not in default or default[key] != value:
            text = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
            sign = "" if key in default else "+"
            yield f"'{sign}{key}={text}'" if re.search(r"[^\w.=/-]", str(text)) else f"{sign}{key}={text}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands_ = parser.add_subparsers(dest="command", required=True)
    keeping = commands_.add_parser("keep")
    keeping.add_argument("outputs", type=Path)
    keeping.add_argument("--into", type=Path, default=DOCS / "results")
    commands_.add_parser("write")
    showing = commands_.add_parser("pictures")
    showing.add_argument("outputs", type=Path)
    args = parser.parse_args()
    try:
        if args.command == "keep":
            kept = keep(args.outputs, args.into)
            size = sum(path.stat().st_size for path in kept)
            print(f"{len(kept)} records, {size / 2**20:.1f} MiB, in {args.into}")
        elif args.command == "pictures":
            print(show(args.outputs, DOCS / "results", DOCS / "images" / "wall.png"))
        else:
            print(write(DOCS / "results", DOCS / "results.md"))
            print(draw(DOCS / "results", DOCS / "images" / "tradeoff.png"))
    except UserError as error:
        print(f"leaderboard: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
