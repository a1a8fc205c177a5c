"""A sweep, ranks, preemption and the batch templates on a real SLURM. Run by `make test-slurm`, in this order."""

import json
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

SCRIPTS = Path(__file__).parents[2] / "scripts" / "slurm"

# Long enough for a signal to arrive in the middle; the state is saved when told, and never by the clock.
LONG = ["method.steps=200", "checkpoint_seconds=3600"]
SUBMITTED = ["cluster=slurm", "hydra.launcher.cpus_per_task=1"]


def unpaint(*options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "unpaint", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def only_record(outputs: Path) -> tuple[Path, dict[str, Any]]:
    """The folder and the record of the one run there is."""
    (file,) = outputs.glob("*/*/*/*/record.json")
    return file.parent, json.loads(file.read_text())


def curves(outputs: Path) -> dict[int, int]:
    """The step that each process began at: how many steps it logged."""
    files = outputs.glob("*/*/*/*/log/from_step_*/metrics.csv")
    return {int(file.parent.name.rpartition("_")[2]): len(file.read_text().splitlines()) - 1 for file in files}


@pytest.fixture(scope="module")
def whole(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Any]]:
    """The edit and the metrics of the long run, never interrupted."""
    outputs = tmp_path_factory.mktemp("whole")
    process = unpaint("run", *small, *LONG, f"outputs={outputs}")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    folder, record = only_record(outputs)
    return (folder / "edit.safetensors").read_bytes(), record["metrics"]


def test_a_sweep_goes_on_past_a_failed_job(cluster: Any, small: list[str], tmp_path: Path) -> None:
    process = unpaint("run", *small, *SUBMITTED, "model.dtype=float32,float16", f"outputs={tmp_path}")
    out, errors = process.communicate()
    assert process.returncode == 1, errors
    assert "1 of 2 jobs failed" in errors
    table = re.sub(r"\s+", " ", out)
    assert "model.dtype=float32" in table and "complete" in table
    assert "failed, job 1: model.dtype=float16: what is trained stays in float32" in table
    assert only_record(tmp_path)[1]["status"] == "complete"


def test_two_tasks_are_two_ranks(cluster: Any, small: list[str], tmp_path: Path) -> None:
    before = cluster.jobs()
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    process = unpaint("run", *small, *SUBMITTED, *ranks, f"outputs={tmp_path}")
    out, errors = process.communicate()
    assert process.returncode == 0, out + errors
    (number,) = set(cluster.jobs()) - set(before)
    assert cluster.job(number)["NumTasks"] == "2"
    _, record = only_record(tmp_path)
    assert record["status"] == "complete" and record["cost"]["world_size"] == 2


def test_preempted_under_submitit(
    cluster: Any, small: list[str], whole: tuple[bytes, dict[str, Any]], tmp_path: Path
) -> None:
    before = cluster.jobs()
    process = unpaint("run", *small, *LONG, *SUBMITTED, f"outputs={tmp_path}")
    cluster.wait(lambda: sum(curves(tmp_path).values()) > 5, "the first steps")
    (number,) = set(cluster.jobs()) - set(before)
    cluster.run("scancel", "--signal=USR2", number)
    cluster.requeued(number)
    assert list(tmp_path.glob("*/*/*/*/checkpoints/last.ckpt")), "told to go, it did not save its state"
    out, errors = process.communicate()
    assert process.returncode == 0, out + errors
    assert cluster.job(number)["Restarts"] == "1"
    same_as_whole(tmp_path, whole)


def test_requeued_under_sbatch(
    cluster: Any, small: list[str], whole: tuple[bytes, dict[str, Any]], tmp_path: Path
) -> None:
    template = [SCRIPTS / "run.sbatch", *small, *LONG, f"outputs={tmp_path}"]
    number = cluster.run("sbatch", "--parsable", "--cpus-per-task=1", *template)
    cluster.wait(lambda: sum(curves(tmp_path).values()) > 5, "the first steps")
    # What SLURM itself sends to the script before the time is up.
    cluster.run("scancel", "--batch", "--signal=USR1", number)
    cluster.requeued(number)
    assert list(tmp_path.glob("*/*/*/*/checkpoints/last.ckpt")), "told to go, it did not save its state"
    cluster.finished(number)
    assert cluster.job(number)["Restarts"] == "1"
    same_as_whole(tmp_path, whole)


def same_as_whole(outputs: Path, whole: tuple[bytes, dict[str, Any]]) -> None:
    """In the same folder, no step done twice or left out, and nothing can be told from an uninterrupted run."""
    folder, record = only_record(outputs)
    first, second = sorted(curves(outputs).items())
    assert first[0] == 0 and second[0] == first[1] > 0 and first[1] + second[1] == 200
    assert (folder / "edit.safetensors").read_bytes() == whole[0]
    assert record["metrics"] == whole[1] and record["status"] == "complete"
    assert not (folder / "checkpoints").exists()


def test_an_array_has_a_config_a_task(cluster: Any, small: list[str], tmp_path: Path) -> None:
    (tmp_path / "configs.txt").write_text("method=none seed=0\nmethod=none seed=1\n")
    shared = [option for option in small if not option.startswith("method.")]
    options = ["--parsable", "--cpus-per-task=1", "--array=1-2"]
    number = cluster.run(
        "sbatch", *options, SCRIPTS / "array.sbatch", tmp_path / "configs.txt", *shared, f"outputs={tmp_path}"
    )
    cluster.finished(*(job for job in cluster.jobs() if cluster.job(job).get("ArrayJobId") == number))
    records = [json.loads(file.read_text()) for file in tmp_path.glob("*/*/*/*/record.json")]
    assert sorted(record["seed"] for record in records) == [0, 1]
    assert all(record["status"] == "complete" and record["method"] == "none" for record in records)


def test_erased_painted_in_parts_and_put_together(cluster: Any, small: list[str], tmp_path: Path) -> None:
    given = (*small, f"outputs={tmp_path}", "force=true")
    said = cluster.run(SCRIPTS / "erase_evaluate.sh", *given, PARTS="2", SBATCH_OPTIONS="--cpus-per-task=1")
    erase, paint, score = re.findall(r"\d+", said)
    cluster.finished(erase, score)
    parts = [job for job in cluster.jobs() if cluster.job(job).get("ArrayJobId") == paint]
    assert len(parts) == 2
    painted = [cluster.job(job)["EndTime"] for job in parts]
    assert cluster.job(erase)["EndTime"] <= min(painted) and max(painted) <= cluster.job(score)["StartTime"]
    assert "painted part 1/2" in (cluster.folder / f"unpaint-{paint}_1.log").read_text()
    # The last job found the edit and every picture there, although all began with force=true.
    began = datetime.fromisoformat(cluster.job(score)["StartTime"]).timestamp()
    pictures, edits = (list(tmp_path.glob(f".cache/{name}/**/*.safetensors")) for name in ("pictures", "edits"))
    assert pictures and edits and all(file.stat().st_mtime < began + 1 for file in (*pictures, *edits))
    assert only_record(tmp_path)[1]["status"] == "complete"
