"""A SLURM of one node, installed and started for these tests."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "slurm"


class Cluster:
    """Commands of SLURM, and where the jobs' output goes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *command: str | Path, **environment: str) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", number)))

    def jobs(self) -> list[str]:
        """The numbers of all jobs so far."""
        return re.findall(r"^JobId=(\d+)", self.run("scontrol", "show", "jobs"), flags=re.MULTILINE)

    def wait(self, ready: Callable[[], object], what: str, seconds: float = 420) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            logs = "\n".join(file.read_text() for file in self.folder.rglob("unpaint-*.log"))
            assert time.monotonic() < deadline, f"{what}\n{self.run('squeue')}\n{logs[-3000:]}"
            time.sleep(0.2)

    def finished(self, *numbers: str) -> None:
        """Waits for the jobs; all of them must have succeeded."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.wait(lambda: all(self.job(number)["JobState"] in ended for number in numbers), f"jobs {numbers}")
        states = {number: self.job(number)["JobState"] for number in numbers}
        logs = "\n".join(file.read_text() for file in self.folder.rglob("unpaint-*.log"))
        assert set(states.values()) == {"COMPLETED"}, f"{states}\n{logs[-3000:]}"

    def requeued(self, number: str) -> None:
        """Waits until the job is back in the queue, and starts it without SLURM's two minutes of waiting."""
        self.wait(lambda: self.job(number)["JobState"] == "PENDING", f"job {number} to be requeued")
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    script = str(SCRIPTS / "one_machine.sh")
    started = subprocess.run([script, "start", folder], capture_output=True, text=True)
    if started.returncode:
        pytest.fail(f"no SLURM to test with: {started.stderr.strip()}", pytrace=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        patch.setenv("OMP_NUM_THREADS", "1")
        # As in an activated environment: the templates call `python`.
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        one = Cluster(folder)
        try:
            yield one
            print(one.run("squeue", "--states=all", "--format=%i %j %T %D node %C cpu %S to %e"))
        finally:
            subprocess.run(["scancel", "--user=root"], check=False)
            subprocess.run([script, "stop", folder], check=True)
