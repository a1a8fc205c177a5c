"""The record survives a round trip, damage is told, the table speaks plainly, the lock goes with its process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from unpaint.errors import UserError
from unpaint.report.terminal import show, verdict
from unpaint.results import RunLock, RunRecord, environment, write_json

METRIC = {"value": 0.979, "low": 0.927, "high": 0.994, "n": 96, "base": 0.021, "higher_is_better": True}


def record(**changes: Any) -> RunRecord:
    content: dict[str, Any] = {
        "run_id": "0123456789ab",
        "status": "complete",
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:02:00+00:00",
        "method": "esd",
        "concept": "cat",
        "model": "picturebook",
        "seed": 0,
        "config": {"concept": {"target": "a cat", "axis": "object", "evaluation": {"cross_domain": "style"}}},
        "cost": {"erase_seconds": 61.26, "seconds_to_ua95": None, "changed_parameters": 1234567, "edit_bytes": 3 << 20},
        "metrics": {
            "erasure/ua": METRIC | {"title": "asked for “{target}”: it is gone", "unit": "rate"},
            "retention/ira": METRIC | {"title": "asked for another {axis}: it is there", "value": 0.5, "base": 0.96},
            "fidelity/clip_score": METRIC | {"value": 0.2871, "base": 0.2901, "unit": "cosine", "title": "fits"},
        },
    }
    return RunRecord(**content | changes)


def test_round_trip(tmp_path: Path) -> None:
    written = record(environment=environment("cpu"))
    path = written.save(tmp_path / "run")
    assert RunRecord.load(path) == RunRecord.load(tmp_path / "run") == written
    assert next(iter(json.loads(path.read_text()))) == "schema"
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]


def damaged(**changes: Any) -> str:
    content = json.loads(json.dumps(vars(record())))
    return json.dumps({key: value for key, value in (content | changes).items() if value != "DROP"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged"),
        (damaged()[:-20], "is damaged"),
        ("[]", "not a JSON object"),
        (damaged(schema=2), "has schema 2, this unpaint reads schema 1"),
        (damaged(metrics="DROP"), "it lacks 'metrics'"),
        (damaged(seed="0"), "seed is '0'"),
        (damaged(status="done"), "status is 'done'"),
        (damaged(metrics={"erasure/ua": {}}), "metric erasure/ua has no value"),
        (damaged(metric={}), "unknown key 'metric'; did you mean metrics?"),
    ],
)
def test_damage_is_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(UserError) as error:
        RunRecord.load(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_no_record(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no record at"):
        RunRecord.load(tmp_path)


def test_a_failed_write_keeps_the_old_record(tmp_path: Path) -> None:
    path = write_json(tmp_path / "record.json", {"a": 1})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def shown(what: RunRecord, width: int = 120) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    show(what, {"pictures": Path("outputs/picturebook/cat/esd/0123456789ab/images/before_after.png")}, console)
    return console.export_text()


def test_the_table_speaks_plainly() -> None:
    text = shown(record())
    assert "“a cat” erased from picturebook by esd, seed 0" in text
    row = next(line for line in text.splitlines() if "erasure/ua" in line)
    for part in ("asked for “a cat”: it is gone", "2.1 %", "97.9 %", "92.7–99.4 %", "96", "erased"):
        assert part in row
    assert "asked for another object: it is there" in text
    assert "28.71" in text
    for part in ("61.3 s", "never", "1,234,567", "3.0 MiB"):
        assert part in text


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_loses_neither_numbers_nor_paths(width: int) -> None:
    text = shown(record(), width)
    assert "outputs/picturebook/cat/esd/0123456789ab/images/before_after.png" in text
    for part in ("97.9 %", "2.1 %", "50.0 %", "28.71", "erasure/ua"):
        assert part in text


def test_a_number_that_a_budget_or_the_steps_bound_says_so() -> None:
    what = record()
    asr = {"value": 0.4, "low": 0.2, "high": 0.6, "n": 16, "base": 1.0, "higher_is_better": False, "unit": "rate"}
    steps = {"value": 200, "n": 32, "base": None, "higher_is_better": True, "unit": "steps", "relearned": False}
    what.metrics = {
        "attack/noise/asr": asr | {"stopped": 2},
        "attack/mma/asr": asr | {"stopped": 0},
        "restoration/relearning": steps,
        "restoration/nothing": steps | {"value": None, "relearned": None},
    }
    lines = shown(what).splitlines()
    noise, mma, back, nothing = (next(line for line in lines if name in line) for name in what.metrics)
    assert "≥ 40.0 %" in noise and "2 of 16 searches stopped" in noise
    assert "≥" not in mma and "stopped" not in mma
    assert "> 200" in back and "not back by then" in back
    assert "not measured" in nothing


def test_a_run_that_did_not_finish_says_so() -> None:
    assert "(interrupted, go on with the same command)" in shown(record(status="interrupted", metrics={}))


@pytest.mark.parametrize(
    ("name", "value", "base", "word"),
    [
        ("erasure/ua", 0.95, 0.0, "erased"),
        ("erasure/ua", 0.9, 0.0, "partly erased"),
        ("erasure/ua", 0.5, 0.0, "not erased"),
        ("retention/ira", 0.9, 1.0, "kept"),
        ("retention/ira", 0.8, 1.0, "partly lost"),
        ("retention/ira", 0.2, 1.0, "lost"),
        ("retention/ira", None, 1.0, "not measured"),
    ],
)
def test_verdicts(name: str, value: float | None, base: float, word: str) -> None:
    from rich.text import Text

    assert Text.from_markup(verdict(name, {"value": value, "base": base})).plain == word


def test_environment_names_versions_and_the_checkout() -> None:
    import torch

    found = environment("cuda:0")
    assert found["torch"] == torch.__version__
    assert found["device"] == "cuda:0"
    assert found["git"] is None or set(found["git"]) == {"commit", "dirty"}
    json.dumps(found)


HOLDER = """
import sys, time
from pathlib import Path
from unpaint.results import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_names_its_holder_and_goes_with_it(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} "), RunLock(tmp_path):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    deadline = time.monotonic() + 5
    while True:
        try:
            with RunLock(tmp_path):
                assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
            break
        except UserError:
            assert time.monotonic() < deadline
