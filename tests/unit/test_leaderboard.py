"""The leaderboard's script: what it keeps is small and says the same, and its commands are commands."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from unpaint.checking import check
from unpaint.config import compose, instantiate
from unpaint.edit_header import METADATA_KEY
from unpaint.errors import UserError
from unpaint.evaluation.pictures import PictureStore, batches_of
from unpaint.results import RunRecord


@pytest.fixture(scope="module")
def leaderboard() -> ModuleType:
    file = Path(__file__).parents[2] / "scripts" / "leaderboard.py"
    spec = importlib.util.spec_from_file_location("leaderboard", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(seed: int, *overrides: str) -> RunRecord:
    from omegaconf import OmegaConf

    config: Any = OmegaConf.to_container(compose(["outputs=/home/somebody/outputs", *overrides]), resolve=True)
    metric = {"value": 2 / 3, "low": 0.5, "high": 0.8, "n": 96, "base": 0.0, "unit": "rate", "higher_is_better": True}
    return RunRecord(
        run_id=f"{seed:012d}",
        status="complete",
        started="2026-01-01T00:00:00+00:00",
        finished="2026-01-01T00:02:00+00:00",
        method=config["method"]["name"],
        concept=config["concept"]["name"],
        model="picturebook",
        seed=seed,
        config=config,
        metrics={"erasure/ua": metric, "retention/ira": metric},
        cost={"erase_seconds": 3.0, "peak_memory_bytes": 2**30},
        environment={"unpaint": "0.1.0", "platform": "somebody's machine", "packages": {}},
    )


def test_it_keeps_records_and_writes_tables_and_commands_between_the_marks(
    leaderboard: ModuleType, tmp_path: Path
) -> None:
    for seed in (0, 1):
        record(seed, "method=esd", "concept=dog", "method.lr=0.5").save(tmp_path / "outputs" / str(seed))
    kept = leaderboard.keep(tmp_path / "outputs", tmp_path / "results")
    assert len(kept) == 2
    text = kept[0].read_text()
    assert "somebody" not in text
    assert json.loads(text)["cost"] == {"erase_seconds": 3.0}
    assert json.loads(text)["metrics"]["erasure/ua"]["value"] == 0.666667
    page = tmp_path / "results.md"
    page.write_text(f"# Results\n\nBy hand.\n\n{leaderboard.BEGIN}old{leaderboard.END}\n\nBelow.\n")
    leaderboard.write(tmp_path / "results", page)
    leaderboard.write(tmp_path / "results", page)
    written = page.read_text()
    assert written.startswith("# Results\n\nBy hand.")
    assert written.endswith("Below.\n")
    assert "old" not in written
    assert written.count("| esd | 1 | 2 | 66.7 ") == 1
    command = next(line for line in written.splitlines() if line.startswith("unpaint run"))
    assert command == "unpaint run -m method=esd concept=dog evaluator=quick seed=0,1 method.lr=0.5"
    check(command.split()[3:], multirun=True)


def test_commands_name_the_sweep_and_the_seeds_that_were_run_so(leaderboard: ModuleType, tmp_path: Path) -> None:
    for seed in (0, 1):
        record(seed, "method=esd", "concept=cat", "+sweep=table").save(tmp_path / str(seed))
    record(2, "method=esd", "concept=cat", "+sweep=attacks", "evaluator.attacks.mma.at_n=1").save(tmp_path / "2")
    found = list(leaderboard.commands(leaderboard.summarized(leaderboard.gather(tmp_path))))
    assert found == [
        "unpaint run method=esd concept=cat +sweep=table seed=0,1",
        "unpaint run method=esd concept=cat +sweep=attacks seed=2 evaluator.attacks.mma.at_n=1",
    ]
    for command in found:
        check(command.split()[2:], "run")


def test_the_pictures_of_kept_runs_stand_beside_each_other(leaderboard: ModuleType, tmp_path: Path) -> None:
    outputs, results = tmp_path / "outputs", tmp_path / "results"
    counts = ("target_pictures", "per_label", "out_of_set_pictures", "composition_pictures")
    few = [f"concept.evaluation.{name}=1" for name in counts]
    for seed, method, edit, shade in ((0, "esd", "aaaa", 100), (0, "uce", "bbbb", 200), (1, "trust", "cccc", 50)):
        one = record(seed, f"method={method}", "concept=dog", "+sweep=leaderboard", *few)
        one.run_id = edit * 3
        folder = outputs / method
        one.save(folder)
        save_file(
            {"x": np.zeros(1, np.float32)},
            folder / "edit.safetensors",
            metadata={METADATA_KEY: json.dumps({"sha256": edit * 16})},
        )
        store, evaluator = PictureStore(outputs / ".cache"), instantiate(compose(["+sweep=leaderboard"]).evaluator)
        for batch in batches_of(instantiate(one.config["concept"]).cases(seed), 16, evaluator.sampler):
            for key, value in (("base", 0), (f"base-{(edit * 16)[:12]}", shade)):
                store.keep_pictures(key, batch, torch.full((len(batch.cases), 3, 64, 64), value, dtype=torch.uint8))
    leaderboard.keep(outputs, results)
    with Image.open(leaderboard.show(outputs, results, tmp_path / "wall.png")) as picture:
        row = [
            picture.convert("L").getpixel((leaderboard.LABEL + i * (leaderboard.CELL + leaderboard.GAP) + 8, 100))
            for i in range(3)
        ]
        assert picture.width == leaderboard.LABEL + 3 * (leaderboard.CELL + leaderboard.GAP)
    assert row == pytest.approx([0, 100, 200], abs=3)


def test_without_a_browser_there_is_no_picture_and_it_says_so(
    leaderboard: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="apt-get install chromium"):
        leaderboard.draw(tmp_path, tmp_path / "tradeoff.png")


@pytest.mark.slow
def test_the_picture_shows_the_plot_alone(leaderboard: ModuleType, tmp_path: Path) -> None:
    if not any(map(shutil.which, leaderboard.CHROMIUMS)):
        pytest.skip("no Chromium here")
    for seed, method in enumerate(("esd", "uce")):
        record(seed, f"method={method}", "concept=dog").save(tmp_path / "results" / str(seed))
    with Image.open(leaderboard.draw(tmp_path / "results", tmp_path / "tradeoff.png")) as picture:
        assert picture.size == (2 * leaderboard.WIDTH, 2 * leaderboard.HEIGHT)
        found = {colour for count, colour in picture.convert("RGB").getcolors() or [] if count > 50}
    # The paper, and the marks' own colours.
    assert len(found) > 4 and (255, 255, 255) in found
