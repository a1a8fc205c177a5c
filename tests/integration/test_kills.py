"""A run that is killed, in five ways and at random moments, and goes on to what an undisturbed one comes to."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

KILLS, A_RUN = 20, 4
STEPS = 60


# About as long in erasing as in evaluating. Without `student`, whose trajectories are most of the state.
LONGER = [
    "checkpoint_seconds=0",
    f"method.steps={STEPS}",
    "concept.evaluation.target_pictures=48",
    "concept.evaluation.per_label=8",
    "evaluator.batch_size=8",
    "evaluator.sampler.steps=8",
]


def started(outputs: Path, small: list[str]) -> subprocess.Popen[str]:
    """The run, from where it holds the lock of its folder on: all imports are done, and the work begins."""
    command = [sys.executable, "-m", "unpaint", "run", *small, *LONGER, f"outputs={outputs}"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell lets what it starts in the background ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 300
    while not any(file.read_text().strip() == str(process.pid) for file in outputs.glob("*/*/*/*/.lock")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def outcome(outputs: Path) -> tuple[bytes, dict[str, Any]]:
    (file,) = outputs.glob("*/*/*/*/record.json")
    record = json.loads(file.read_text())
    return (file.parent / "edit.safetensors").read_bytes(), {
        "status": record["status"],
        "metrics": record["metrics"],
        "steps": record["cost"]["optimizer_steps"],
        "changed": record["cost"]["changed_parameters"],
    }


def done_so_far(outputs: Path) -> str:
    steps = sum(len(file.read_text().splitlines()) - 1 for file in outputs.glob("*/*/*/*/log/*/metrics.csv"))
    pictures = {key: len(list(outputs.glob(f".cache/pictures/{key}/*"))) for key in ("????????????", "*-*")}
    return f"{steps} steps logged, {pictures['????????????']} + {pictures['*-*']} batches painted"


class Disk:
    """A small file system of its own, which can be filled up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True)
        self.real = mounted.returncode == 0

    def fill(self) -> None:
        # dd ends with "No space left on device".
        ballast = ["dd", "if=/dev/zero", f"of={self.folder / 'ballast'}", "bs=4096"]
        assert "No space left" in subprocess.run(ballast, capture_output=True, text=True).stderr

    def free(self) -> None:
        (self.folder / "ballast").unlink(missing_ok=True)

    def close(self) -> None:
        if self.real:
            subprocess.run(["umount", "--lazy", self.folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    try:
        if not disk.real:
            pytest.skip("needs leave to mount a tmpfs: a disk that can be filled")
        yield disk
    finally:
        disk.close()


def strike(kind: str, process: subprocess.Popen[str], disk: Disk) -> None:
    if kind == "disk full":
        disk.fill()
    elif kind == "out of memory":
        # Not a byte more than it has: the next allocation that needs the system fails.
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE")
        resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))
    else:
        process.send_signal(signal.Signals[kind])


@pytest.mark.kills
@pytest.mark.timeout(5400)
def test_killed_twenty_times_it_comes_to_the_same(small: list[str], tmp_path: Path, disk: Disk) -> None:
    began = time.monotonic()
    process = started(tmp_path / "whole", small)
    work = time.monotonic()
    assert process.wait() == 0, process.communicate()[1]
    seconds = time.monotonic() - work
    whole = outcome(tmp_path / "whole")
    print(f"\nundisturbed: {seconds:.1f} s of work", flush=True)

    moments = random.Random(0)
    kinds = ["SIGKILL", "SIGTERM", "SIGINT", "disk full", "out of memory"] * (KILLS // 5)
    moments.shuffle(kinds)
    killed, runs, hit = 0, 0, 0
    while killed < KILLS:
        runs += 1
        outputs = disk.folder / f"run{runs}"
        while hit < A_RUN and killed < KILLS:
            process, kind = started(outputs, small), kinds[killed]
            delay = moments.uniform(0, seconds / (A_RUN - 1))
            time.sleep(delay)
            if process.poll() is not None:
                break  # it was through already: the next run
            strike(kind, process, disk)
            try:
                _, errors = process.communicate(timeout=300)
            finally:
                disk.free()
            last = (errors.strip().splitlines() or [""])[-1]
            if process.returncode == 0:
                print(f"   -: {kind} after {delay:.1f} s, but the run had all it needed", flush=True)
                break
            killed, hit = killed + 1, hit + 1
            print(f"  {killed:2}: {kind} after {delay:.1f} s: exit code {process.returncode}; {done_so_far(outputs)}")
            print(f"      {last[:150]}", flush=True)
            _expected(kind, process.returncode, errors)
            assert _status(outputs) in ("interrupted", "failed")
        done = subprocess.run(
            [sys.executable, "-m", "unpaint", "run", *small, *LONGER, f"outputs={outputs}"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert outcome(outputs) == whole
        print(f"run {runs}, killed {hit} times, went on to the same edit, metrics and steps", flush=True)
        hit = 0
    print(f"{killed} kills in {runs} runs, {time.monotonic() - began:.0f} s", flush=True)


def _status(outputs: Path) -> str:
    """Of the record, if the run came so far as to write one."""
    records = list(outputs.glob("*/*/*/*/record.json"))
    return json.loads(records[0].read_text())["status"] if records else "interrupted"


def _expected(kind: str, code: int, errors: str) -> None:
    """Whether it ended as it should. Out of memory may take any way out, even the interpreter's own."""
    if kind == "SIGKILL":
        assert code == -signal.SIGKILL
    elif kind == "SIGTERM":  # at the end of a step or a batch, or at once where there is none
        assert code in (128 + signal.SIGTERM, -signal.SIGTERM)
    elif kind == "SIGINT":
        assert code in (130, -signal.SIGINT)
    elif kind == "disk full":
        assert code == 2 and "(the disk or folder, not a bug in unpaint)" in errors, errors


def test_two_processes_of_one_run_are_one_too_many(small: list[str], tmp_path: Path) -> None:
    first = started(tmp_path, small)
    command = [sys.executable, "-m", "unpaint", "run", *small, *LONGER, f"outputs={tmp_path}"]
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 2
    assert f"already going on (process {first.pid}" in second.stderr
    assert first.wait() == 0, first.communicate()[1]
    assert outcome(tmp_path)[1]["status"] == "complete" and outcome(tmp_path)[1]["steps"] == STEPS
