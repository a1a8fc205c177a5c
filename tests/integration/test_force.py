"""force=true: what starts over, and what does not although it says so; and what a run refuses before it paints."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from omegaconf import DictConfig

from unpaint import run
from unpaint.config import compose
from unpaint.errors import UserError

Stopping = Callable[[], AbstractContextManager[None]]


def config(small: list[str], outputs: Path, *more: str) -> DictConfig:
    return compose([*small, "method.steps=2", "checkpoint_seconds=0", "force=true", f"outputs={outputs}", *more])


def began_at(outputs: Path) -> set[str]:
    return {folder.name for folder in outputs.glob("*/*/*/*/log/*")}


def made(outputs: Path) -> int:
    """When the edit was made."""
    (file,) = outputs.glob(".cache/edits/*.safetensors")
    return file.stat().st_mtime_ns


def test_a_job_that_slurm_starts_once_more_goes_on(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopping: Stopping
) -> None:
    cfg = config(small, tmp_path)
    with stopping():
        run.erase(cfg)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run.erase(cfg)
    assert began_at(tmp_path) == {"from_step_0", "from_step_1"}
    before = made(tmp_path)
    run.erase(cfg)
    assert made(tmp_path) == before
    # Of a job that runs for the first time some clusters say so.
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    run.erase(cfg)
    assert made(tmp_path) > before and began_at(tmp_path) == {"from_step_0"}


def test_a_rank_does_not_take_what_rank_0_has_yet_to_remove(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopping: Stopping
) -> None:
    cfg = config(small, tmp_path)
    run.erase(cfg)
    before = made(tmp_path)
    # As another rank finds the folders that is there sooner.
    monkeypatch.setattr(run, "_forget", lambda _: None)
    run.erase(cfg)
    assert made(tmp_path) > before
    for file in tmp_path.glob(".cache/edits/*"):
        file.unlink()
    with stopping():
        run.erase(cfg)
    run.erase(cfg)
    assert began_at(tmp_path) == {"from_step_0"}


def test_a_member_of_a_set_is_made_again(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [option for option in small if not option.startswith(("method.", "concept."))]
    cfg = compose([*own, "concept=pets", "method=none", "method.mode=composed", "force=true", f"outputs={tmp_path}"])
    run.erase(cfg)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob(".cache/edits/*-*.safetensors")}
    assert len(before) > 1
    monkeypatch.setattr(run, "_forget", lambda _: None)
    run.erase(cfg)
    assert all(file.stat().st_mtime_ns > when for file, when in before.items())


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["trainer.precision=16-mixed"], "trainer.precision=bf16-mixed"),
        (["trainer.precision=16-mixed", "model.dtype=float16"], "trainer.precision=bf16-mixed"),
        (["model.dtype=bfloat16", "trainer.precision=bf16-mixed", "evaluator=full"], "evaluator.relearning=null"),
    ],
)
def test_precision_that_will_not_do_is_refused_before_anything_is_loaded(
    overrides: list[str], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        run.run(compose([*overrides, f"outputs={tmp_path}"]))
    assert not list(tmp_path.iterdir())
