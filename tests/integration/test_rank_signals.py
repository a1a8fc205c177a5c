"""What becomes of the ranks that Lightning started when the one that started them is told to stop, or killed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from unpaint.training import launch

TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


def gone(pid: str) -> bool:
    """Or soon; here perhaps nobody fetches the exit code of an orphan."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if "(zombie)" in Path(f"/proc/{pid}/status").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_a_later_trainer_tells_the_ranks_of_the_first(small: list[str], tmp_path: Path) -> None:
    own = [option for option in small if not option.startswith("method.")]
    longer = ["concept.evaluation.target_pictures=48", "concept.evaluation.per_label=8", "evaluator.batch_size=4"]
    options = [*own, *longer, "evaluator.sampler.steps=8", "method=none", "logger=none", *TWO, f"outputs={tmp_path}"]
    command = [sys.executable, "-m", "unpaint", "run", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob(".cache/pictures/*-*/*.safetensors")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, errors
    # The other rank was not left to find out when it next waited for this one.
    assert "Traceback" not in errors and errors.count("told to stop") == 1
    assert gone(child)


RANK = """
import os, subprocess, sys, time
from unpaint.training import launch

launch.GRACE = 0
launch._watch_parent()
if "LOCAL_RANK" not in os.environ:
    child = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env={**os.environ, "LOCAL_RANK": "1"})
else:
    print(os.getpid(), launch.started_by_lightning, flush=True)
time.sleep(600)
"""


def test_a_rank_does_not_outlive_the_one_that_started_it() -> None:
    process = subprocess.Popen([sys.executable, "-c", RANK], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child, known = process.stdout.readline().split()
    assert known == "True" and launch.started_by_lightning is False
    process.kill()
    process.wait()
    assert gone(child)
