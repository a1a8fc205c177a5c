"""The page of `unpaint compare` in a real browser: it sorts, filters, and asks the network for nothing."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unpaint.report.aggregate import summarized
from unpaint.report.gather import gather
from unpaint.report.page import write_page
from unpaint.report.wall import Card, Wall

ROOT = Path(__file__).parents[2]
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = (
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ),
    *("--disable-component-update", "--disable-sync", "--virtual-time-budget=8000", "--enable-logging=stderr"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"

# Run by the page itself once it has drawn; what it finds is written into the document, and read from its dump.
SCRIPT = """
addEventListener("load", () => {
  const found = {}, get = (id) => document.getElementById(id);
  const lines = () => [...get("table").tBodies[0].rows];
  const shown = (cell) => cell.querySelector("b").innerText;
  const column = (k) => lines().filter((row) => row.dataset.name).map((row) => shown(row.cells[k]));
  const names = () => lines().map((row) => row.dataset.name || row.cells[0].innerText);
  const press = (key) => get("table").querySelector(`[data-key="${key}"]`).click();
  const set = (id, value, kind) => { get(id).value = value; get(id).dispatchEvent(new Event(kind)); };
  try {
    found.resources = performance.getEntriesByType("resource").map((entry) => entry.name);
    found.ready = document.documentElement.dataset.ready;
    found.first = names()[0];
    found.marks = document.querySelectorAll("#trade .scatterlayer .points path").length;
    set("concept", "cat", "change");
    press(0); found.down = column(3);
    found.sorted = get("table").querySelector("[aria-sort=descending] button").innerText;
    press(0); found.up = column(3);
    found.pinned = names()[0];
    set("search", "esd", "input"); found.filtered = names();
    found.figures = [...document.querySelectorAll("#wall figcaption")].map((node) => node.innerText);
    found.alts = [...document.querySelectorAll("#wall img")].every((node) => node.alt.length > 10);
    set("search", "", "input");
    found.all = document.querySelectorAll("#wall figcaption").length;
    get("trade").emit("plotly_click", { points: [{ customdata: ["uce", "cat"] }] });
    found.clicked = [...document.querySelectorAll("#wall figcaption")].map((node) => node.innerText);
    get("table").querySelector("tbody button").click();
    found.details = get("table").querySelector(".details").innerText.includes("judged by");
    get("groups").querySelector("[data-group=all]").click();
    found.columns = get("table").tHead.rows[0].cells.length;
    found.damage = get("damage").tBodies[0].rows.length;
    found.difference = get("difference").innerText;
    get("theme").click(); found.theme = document.documentElement.dataset.theme;
    set("concept", "*", "change"); found.rows = get("live").innerText; found.shown = column(4).length;
    dispatchEvent(new Event("beforeprint")); found.printed = column(4).length;
  } catch (error) { found.error = String(error); }
  const out = document.createElement("pre");
  out.id = "found"; out.textContent = JSON.stringify(found);
  document.body.append(out);
});
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    command = [sys.executable, str(ROOT / "scripts" / "make_records.py"), str(folder), "--runs", "200"]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    return folder


def browsed(page: Path, folder: Path) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """A visit with a new profile, and the addresses that the page asked for. The browser asks for some itself."""
    assert CHROMIUM is not None
    log = folder / "net.json"
    profile = f"--user-data-dir={folder / 'user'}"
    command = [CHROMIUM, *FLAGS, profile, f"--log-net-log={log}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    asked = []
    for line in log.read_text(errors="replace").splitlines():
        if '"initiator":' in line:
            entry = json.loads(line.strip().rstrip(",").removesuffix("]"))["params"]
            if entry["initiator"] != "not an origin" and not entry["url"].startswith(("file:", "data:")):
                asked.append(entry["url"])
    return done, asked


def visited(page: Path, folder: Path) -> tuple[dict[str, Any], list[str], list[str]]:
    """What the script found, the lines on the console, and the addresses that the page asked for."""
    done, asked = browsed(page, folder)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    text = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(text), console, asked


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_works_in_a_browser_and_asks_for_nothing(records: Path, tmp_path: Path) -> None:
    summary = summarized(gather(records))
    rows = summary.gathered.rows
    own = [(i, 1) for i, row in enumerate(rows) if row.concept == "cat"]
    page = write_page(
        summary,
        Wall([Card(0, "cat", 0, "a cat in the snow", "to be erased", 0, own)], [PIXEL] * 2, (1, 1)),
        tmp_path / "p.html",
    )
    page.write_text(page.read_text(encoding="utf-8") + f"<script>{SCRIPT}</script>", encoding="utf-8")
    found, console, asked = visited(page, tmp_path)
    assert "error" not in found, found
    assert found["ready"] == "yes"
    assert (found["first"], found["pinned"]) == ("unedited model", "unedited model")
    down = [float(text) for text in found["down"]]
    assert down == sorted(down, reverse=True)
    assert [float(text) for text in found["up"]] == sorted(down)
    assert found["sorted"] == "UA"
    assert found["filtered"] == ["unedited model", "esd"]
    assert found["figures"] == ["unedited", "esd"]
    assert found["all"] == 1 + len(own)
    assert found["clicked"] == ["unedited", "uce"]
    assert found["alts"] and found["details"]
    assert found["marks"] >= 8
    assert found["columns"] == 4 - 1 + len(summary.metrics)
    assert found["damage"] >= 1
    assert "method.name" in found["difference"] or "concept" in found["difference"]
    assert found["theme"] in ("light", "dark")
    # The individual concepts; combinations and conditions are in tables of their own.
    first = [row for row in rows if row.protocol == 0]
    assert len(first) < len(rows)
    assert found["rows"] == f"{len(first)} rows"
    assert (found["shown"], found["printed"]) == (50, len(first))
    assert console == []
    assert found["resources"] == []
    assert asked == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_page_that_asked_for_something_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "asks.html"
    page.write_text('<img src="http://unpaint.invalid/picture.png">')
    assert browsed(page, tmp_path)[1] == ["http://unpaint.invalid/picture.png"]
