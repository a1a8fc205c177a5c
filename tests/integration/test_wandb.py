"""wandb's offline files, read back: alone, in a sweep, on two ranks, after a crash, after a kill and a resume."""

import json
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from unpaint.config import compose
from unpaint.results import RunRecord
from unpaint.run import run
from unpaint.training.tracking import Guarded

STEPS = 6
MIRRORED = [f"method.steps={STEPS}", "logger=wandb", "logger.mode=offline", "logger.tags=[mine]", "logger.pictures=20"]


def records(file: Path) -> Iterator[Any]:
    """LevelDB's log format after a header of 7 bytes: blocks of 32 KiB, of records of which the long ones are cut."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


class Told:
    """What a .wandb file says."""

    def __init__(self, file: Path) -> None:
        self.folder = file.parent
        every = list(records(file))
        self.run = next(r.run for r in every if r.HasField("run"))
        self.history = [
            {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item}
            for r in every
            if r.HasField("history")
        ]
        self.summary: dict[str, Any] = {}
        for r in every:
            if r.HasField("summary"):
                self.summary |= {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.summary.update}
        self.artifacts = [r.request.log_artifact.artifact for r in every if r.request.HasField("log_artifact")]
        self.artifacts += [r.artifact for r in every if r.HasField("artifact")]
        self.exits = [r.exit.exit_code for r in every if r.HasField("exit")]
        self.preempting = any(r.HasField("preempting") for r in every)
        self.config = {i.key: json.loads(i.value_json) for i in self.run.config.update}

    @property
    def steps(self) -> list[int]:
        """The steps of which there is a loss."""
        return [row["trainer/global_step"] for row in self.history if "erase/loss" in row]


def told(outputs: Path) -> list[Told]:
    """Of all runs, in the order in which they began."""
    files = outputs.glob("*/*/*/*/wandb/offline-run-*/*.wandb")
    return [Told(file) for file in sorted(files, key=lambda file: file.parent.stat().st_ctime_ns)]


def unpaint(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "unpaint", *options], capture_output=True, text=True)


def only_record(outputs: Path) -> RunRecord:
    (file,) = outputs.glob("*/*/*/*/record.json")
    return RunRecord.load(file)


def test_a_run_is_mirrored_whole(small: list[str], tmp_path: Path) -> None:
    done = unpaint("run", *small, *MIRRORED, f"outputs={tmp_path}")
    assert done.returncode == 0, done.stderr
    (run,), record = told(tmp_path), only_record(tmp_path)
    assert (run.run.run_id, run.run.job_type, run.run.project) == (record.run_id, "run", "unpaint")
    assert list(run.run.tags) == ["sd15", "esd", "cat", "individual", "mine"]
    assert run.config["method"]["steps"] == STEPS and run.config["concept"]["name"] == "cat"
    assert run.steps == list(range(STEPS))
    assert run.exits == [0] and not run.preempting
    for name, metric in record.metrics.items():
        assert run.summary[name] == metric["value"]
        for part in ("base", "low", "high", "n"):
            assert run.summary[f"{name}_{part}"] == metric[part]
    assert run.summary["cost/optimizer_steps"] == STEPS
    (table,) = (row for row in run.history if "pictures.path" in row)
    content = json.loads((run.folder / "files" / table["pictures.path"]).read_text())
    assert content["columns"] == ["asked for", "prompt", "seed", "unedited", "edited"]
    rows = len(content["data"])
    assert 10 <= rows <= 20 and all(prompt and seed for _, prompt, seed, *_ in content["data"])
    assert any("before and after.path" in row for row in run.history)
    artifacts = {artifact.type: artifact for artifact in run.artifacts}
    assert set(artifacts) == {"run_table", "edit"}
    painted = [e for e in artifacts["run_table"].manifest.contents if e.path.endswith(".png")]
    # A picture that two rows share, of a model of random weights say, is there once.
    assert 2 <= len(painted) <= 2 * rows and all(Path(entry.local_path).stat().st_size for entry in painted)
    edit = artifacts["edit"]
    assert edit.name.startswith("edit-") and json.loads(edit.metadata)["method"] == "esd"
    assert [entry.path for entry in edit.manifest.contents] == ["edit.safetensors"]


@pytest.mark.slow
def test_the_runs_of_a_sweep_are_a_group_and_each_its_own(small: list[str], tmp_path: Path) -> None:
    done = unpaint("run", "-m", *small, *MIRRORED, "seed=0,1", f"outputs={tmp_path}")
    assert done.returncode == 0, done.stderr
    first, second = told(tmp_path)
    assert first.run.run_id != second.run.run_id
    assert first.run.run_group == second.run.run_group != ""
    assert f"sweep {first.run.run_group}" in done.stdout
    assert first.exits == second.exits == [0]
    assert first.steps == second.steps == list(range(STEPS))
    assert [run.config["seed"] for run in (first, second)] == [0, 1]


@pytest.mark.slow
def test_of_two_ranks_one_speaks(small: list[str], tmp_path: Path) -> None:
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    done = unpaint("run", *small, *MIRRORED, *ranks, f"outputs={tmp_path}")
    assert done.returncode == 0, done.stderr
    (run,) = told(tmp_path)
    assert run.steps == list(range(STEPS)) and run.exits == [0]
    assert run.summary["erasure/ua"] == only_record(tmp_path).metrics["erasure/ua"]["value"]


@pytest.mark.slow
def test_a_run_that_fails_is_not_shown_as_finished(small: list[str], tmp_path: Path) -> None:
    done = unpaint("run", *small, *MIRRORED, "method.lr=1e30", f"outputs={tmp_path}")
    assert done.returncode == 2, done.stderr
    assert "NaN" in done.stderr
    (run,) = told(tmp_path)
    assert run.exits == [1] and not run.preempting
    assert only_record(tmp_path).status == "failed"


@pytest.mark.slow
def test_told_to_stop_and_started_again_it_is_one_run(small: list[str], tmp_path: Path) -> None:
    options = [*small, *MIRRORED, "method.steps=200", "checkpoint_seconds=0", f"outputs={tmp_path}"]
    process = subprocess.Popen([sys.executable, "-m", "unpaint", "run", *options], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("*/*/*/*/checkpoints/last.ckpt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command goes on from here" in errors
    assert only_record(tmp_path).status == "interrupted"
    done = unpaint("run", *options)
    assert done.returncode == 0, done.stderr
    first, second = told(tmp_path)
    assert first.run.run_id == second.run.run_id == only_record(tmp_path).run_id
    assert first.exits == [1] and first.preempting and second.exits == [0]
    assert first.steps + second.steps == list(range(200))


class Broken(CSVLogger):
    def log_metrics(self, *_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host\nand more")


def test_a_logger_that_breaks_is_left_alone(tmp_path: Path) -> None:
    guarded = Guarded(Broken(tmp_path))
    with pytest.warns(UserWarning, match="ConnectionError: no route to host\\); the run goes on"):
        guarded.log_metrics({"loss": 1.0}, 0)
    guarded.log_metrics({"loss": 1.0}, 1)
    guarded.finalize("success")


def test_without_wandb_a_run_has_its_record(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**_: Any) -> None:
        raise wandb.Error("the server says no")

    monkeypatch.setattr(wandb, "init", refuse)
    # A method without steps: what is tested comes before and after it.
    options = [option for option in (*small, *MIRRORED) if not option.startswith("method.")]
    with pytest.warns(UserWarning, match="the server says no"):
        record = run(compose([*options, "method=none", f"outputs={tmp_path}"]))
    assert record.status == "complete" and only_record(tmp_path).metrics == record.metrics
