"""What a sweep says at its end, what it returns, and what it refuses."""

import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from unpaint.checking import check
from unpaint.config import compose, part_of, quoted
from unpaint.errors import UserError
from unpaint.sweep import Job, Sweep, pareto, show


def job(number: int, ua: float | None, kept: float | None, **more: Any) -> Job:
    values = {"erasure/ua": ua, "retention/ira": kept}
    return Job(number, ["method=esd", f"seed={number}"], "complete", values=values, **more)


def test_the_pareto_set_holds_what_nothing_beats() -> None:
    jobs = [job(0, 0.9, 0.5), job(1, 0.5, 0.9), job(2, 0.5, 0.8), job(3, 0.9, 0.5), job(4, None, 1.0), job(5, 0.4, 0.4)]
    # 2 is beaten by 1, 5 by all; 0 and 3 are equal, so neither beats the other; 4 was not measured.
    assert [found.number for found in pareto(jobs)] == [0, 1, 3]


def table(jobs: list[Job], front: bool = False) -> str:
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    show(Sweep("tune-01234567", Path()), jobs, front, console)
    return console.export_text()


def test_the_table_tells_what_differs_and_what_failed() -> None:
    failed = Job(2, ["method=esd", "seed=2"], "failed", "the disk is full [/x]", 0.5)
    text = table([job(0, 0.95, 0.5, seconds=30.0), job(1, None, 0.9, seconds=8.0), failed, Job(3, ["seed=3"])], True)
    row = {int(line.split()[0]): line for line in text.splitlines() if line.split()[:1] and line.split()[0].isdigit()}
    assert "seed=0" in row[0] and "0.950" in row[0] and "30.0" in row[0] and "complete" in row[0] and "★" in row[0]
    assert "–" in row[1] and "★" not in row[1]
    assert "failed" in row[2] and "interrupted" in row[3]
    assert "method=esd" in row[0]  # the job that did not begin with it has other overrides
    assert "failed, job 2: the disk is full [/x]" in text
    assert "the first job took 30.0 s, those after it 8.0 s" in text
    assert "1 of 4 jobs" in text


def test_jobs_leave_their_outcome_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep.of("run", ["+sweep=trust/all", "seed=0,1"], tmp_path)
    assert sweep.name.startswith("trust_all-") and sweep.folder == tmp_path / sweep.name
    assert sweep == Sweep.of("run", ["+sweep=trust/all", "seed=0,1"], tmp_path)
    assert sweep.name != Sweep.of("erase", ["+sweep=trust/all", "seed=0,1"], tmp_path).name
    with sweep.job(1, ["seed=1"]) as one:
        assert [(j.number, j.status) for j in sweep.jobs()] == [(1, "running")]
        one.status = "complete"
    with pytest.raises(KeyboardInterrupt), sweep.job(0, ["seed=0"]):
        raise KeyboardInterrupt
    assert [(j.number, j.status) for j in sweep.jobs()] == [(0, "running"), (1, "complete")]
    monkeypatch.setenv("SLURM_PROCID", "1")
    with sweep.job(2, ["seed=2"]):
        pass
    assert len(sweep.jobs()) == 2  # of several ranks, one writes
    sweep.start()
    assert sweep.jobs() == []


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["trainer=ddp"], "cluster=local gives each job processes of its own"),
        (["trainer=cpu", "trainer.devices=2"], "cluster=slurm on a cluster"),
        (["trainer.devices=1,2"], "trainer.devices=2"),
        (["trainer.num_nodes=2"], "trainer.num_nodes=2"),
        (["cluster=slurm"], "say trainer=gpu"),
        (["cluster=slurm", "trainer=ddp", "trainer.accelerator=gpu"], "trainer.devices=auto: with cluster=NAME"),
        (["cluster=local", "trainer=cpu", "trainer.devices=1,2"], "all of one size"),
    ],
)
def test_a_sweep_that_would_run_wrong_is_refused(overrides: list[str], says: str) -> None:
    if any(line.startswith("cluster") for line in overrides):
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    with pytest.raises(UserError, match=says):
        check([*overrides, "concept=cat,dog"], "run", multirun=True)


def test_ddp_alone_and_ddp_on_a_cluster_are_taken() -> None:
    assert not check(["trainer=ddp", "trainer.devices=2"], "run").multirun
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    checked = check(["trainer=ddp", "trainer.accelerator=gpu", "trainer.devices=2", "cluster=slurm"], "run")
    assert checked.multirun and not checked.optimises


@pytest.mark.parametrize(
    ("trainer", "nodes", "tasks", "gpus"),
    [
        (["trainer=gpu"], 1, 1, 1),
        (["trainer=cpu"], 1, 1, None),
        (["trainer=ddp", "trainer.accelerator=gpu", "trainer.devices=4", "trainer.num_nodes=2"], 2, 4, 4),
        (["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=4"], 1, 4, None),
    ],
)
def test_what_slurm_is_asked_for_is_what_the_trainer_wants(
    trainer: list[str], nodes: int, tasks: int, gpus: int | None
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from unpaint.config import ConfTree, load

    launcher = load(["cluster=slurm", *trainer], ConfTree.default()).hydra.launcher
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (nodes, tasks, gpus)


def test_an_optional_part_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra.core.config_store import ConfigStore

    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], "submitit_slurm.yaml", raising=False)
    monkeypatch.setattr("hydra.core.plugins.Plugins._scan_all_plugins", lambda *_, **__: ([], None))
    with pytest.raises(UserError, match=r"pip install 'unpaint\[slurm\]'"):
        compose(["cluster=slurm"])


@pytest.mark.parametrize("part", ["0/4", "5/4", "1", "x/2", "1/2/3", "-1/4"])
def test_a_part_is_a_share(part: str) -> None:
    with pytest.raises(UserError, match="expected a share like 1/8"):
        part_of(compose([f"part={part}"]))


def test_parts_make_a_whole() -> None:
    batches = list(range(11))
    shares = [batches[part_of(compose([f"part={i}/4"])) or slice(0)] for i in range(1, 5)]
    assert sorted(batch for share in shares for batch in share) == batches
    assert part_of(compose([])) is None
    with pytest.raises(UserError, match="erase makes none"):
        check(["part=1/4"], "erase")


@pytest.mark.parametrize("text", ["/a b/c", "it's", "a,b=c{d}[e](f)", r"back\slash", "'quoted'", "${x"])
def test_a_folder_of_any_name_survives_hydras_grammar(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (override,) = OverridesParser.create().parse_overrides([f"key={quoted(text)}"])
    assert str(override.value()) == text
