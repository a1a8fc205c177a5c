"""kill -9 while erasing and while evaluating; the same command then gives what an uninterrupted run gives."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SMALL = [
    "concept=cat",
    "trainer=cpu",
    "logger=none",
    "probes=0",
    "checkpoint_seconds=0",
    "method.steps=12",
    "method.sampling_steps=8",
    "method.bank_size=16",
    "concept.evaluation.target_pictures=32",
    "concept.evaluation.per_label=4",
    "evaluator.sampler.steps=5",
]


def command(outputs: Path) -> list[str]:
    return [sys.executable, "-m", "unpaint", "run", f"outputs={outputs}", *SMALL]


def killed_when(outputs: Path, ready: Callable[[], bool]) -> None:
    """Starts the command and kills it as soon as `ready`; fails if it ends before."""
    process = subprocess.Popen(command(outputs), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def finished(outputs: Path) -> tuple[bytes, dict[str, Any]]:
    """Runs the command to its end; the edit's bytes and the record."""
    subprocess.run(command(outputs), check=True, capture_output=True)
    (record,) = outputs.glob("*/*/*/*/record.json")
    return (record.parent / "edit.safetensors").read_bytes(), json.loads(record.read_text())


def test_killed_twice_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole_edit, whole = finished(tmp_path / "whole")

    outputs = tmp_path / "killed"
    killed_when(outputs, lambda: any(outputs.glob("*/*/*/*/checkpoints/last.ckpt")))
    (record,) = outputs.glob("*/*/*/*/record.json")
    assert json.loads(record.read_text())["status"] == "interrupted"
    assert not (record.parent / "edit.safetensors").exists()
    saved = (record.parent / "checkpoints" / "last.ckpt").stat().st_size

    killed_when(outputs, lambda: len(list(outputs.glob(".cache/pictures/*-*/*.safetensors"))) >= 2)
    assert json.loads(record.read_text())["status"] == "interrupted"
    painted = {file: file.stat().st_mtime_ns for file in outputs.glob(".cache/pictures/*/*.safetensors")}
    edit, resumed = finished(outputs)
    assert edit == whole_edit
    assert resumed["metrics"] == whole["metrics"]
    assert resumed["status"] == whole["status"] == "complete"
    assert resumed["cost"]["optimizer_steps"] == 12
    # What is saved is what is trained, not the pipeline: beside the edit's like, Adam's two moments in float32.
    assert saved <= 3 * len(edit) + 2 * 4 * resumed["cost"]["trainable_parameters"]
    assert all(file.stat().st_mtime_ns == when for file, when in painted.items()), "painted again"

    before = {file: file.stat().st_mtime_ns for file in outputs.rglob("*") if file.name != ".lock"}
    finished(outputs)
    assert {file: file.stat().st_mtime_ns for file in before} == before, "a finished run was touched"


def test_a_sweep_in_processes_goes_on_past_one_that_is_killed(small: list[str], tmp_path: Path) -> None:
    options = ["cluster=local", "seed=0,1", "logger=csv", "method.steps=60", f"outputs={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "unpaint", "run", *small, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not (begun := list(tmp_path.glob("*/*/*/*/log/*/metrics.csv"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    lock = begun[0].parents[2] / ".lock"
    os.kill(int(lock.read_text()), signal.SIGKILL)
    out, errors = process.communicate()
    assert process.returncode == 1, errors
    assert "1 of 2 jobs failed" in errors and "Traceback" not in errors
    assert "interrupted" in out and "complete" in out
    records = [json.loads(file.read_text())["status"] for file in tmp_path.glob("*/*/*/*/record.json")]
    assert sorted(records) == ["complete", "interrupted"]
