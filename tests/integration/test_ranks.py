"""Two gloo ranks against one: first gradients, the edit after five steps, pictures, detections and FID."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from unpaint.config import conf_dir
from unpaint.edit import Edit

WORKER = Path(__file__).with_name("ranks_worker.py")
METHODS_WORKER = Path(__file__).with_name("methods_worker.py")
# Methods as they are, and what their options change in what the ranks share.
CASES = {
    **{file.stem: [f"method={file.stem}"] for file in sorted((conf_dir() / "method").glob("*.yaml"))},
    "esd-fresh": ["method=esd", "method.latents=fresh"],
    "esd-sequential": ["method=esd", "method.mode=sequential", "concept=pets"],
    "salun-group": ["method=salun", "method.group=all"],
    "trust-cip": [
        "method=trust",
        "method.objective=cip",
        "method.beta=0.01",
        "method.mask_every=1",
        "method.mask_ema=0.5",
    ],
    "trust-finite": ["method=trust", "method.second_order=finite_difference", "method.image=trajectory"],
    "concept_prune-set": ["method=concept_prune", "method.fill=mean", "concept=pets"],
}
SMALL = [
    "concept=mosaic",
    "logger=none",
    "probes=0",
    "method.steps=2",
    "method.sampling_steps=4",
    "concept.evaluation.target_pictures=32",
    "concept.evaluation.per_label=4",
    "evaluator.sampler.steps=4",
]
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return float(sum(t.square().sum() for t in tensors.values())) ** 0.5


def test_gradients_and_edit(tmp_path: Path) -> None:
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        done = subprocess.run([sys.executable, WORKER, folder, str(world)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / world / "gradients.safetensors") for world in "12")
    change = {key: one[key] - two[key] for key in one}
    assert all(part.abs().max() < 1e-5 for part in change.values())
    # The loss is a small difference of large predictions, which float32 rounds in another way for 4 rows than for 8.
    assert norm(change) < 5e-5 * norm(one)
    # Single tensors far from the loss have small gradients, and other batch sizes round differently.
    assert all(change[key].norm() < 2e-4 * one[key].norm().clamp(min=1e-8) for key in one)
    # Both ranks hold the same weights, and those of one process up to rounding.
    first, second = (tmp_path / "2" / f"edit-{rank}.safetensors" for rank in (0, 1))
    assert first.read_bytes() == second.read_bytes()
    alone, shared = Edit.load(tmp_path / "1" / "edit-0.safetensors"), Edit.load(first)

    difference = {key: alone.delta[key] - shared.delta[key] for key in alone.delta}
    assert norm(difference) < 0.01 * norm(alone.delta)


@pytest.fixture(scope="module")
def edits(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `1` and `2`, of so many processes; in each one a method with the edit of every rank."""
    folder = tmp_path_factory.mktemp("methods")
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for world, launcher in (("1", []), ("2", two)):
        command = [
            sys.executable,
            *launcher,
            str(METHODS_WORKER),
            str(folder / world),
            str(tiny_pipeline_folder),
            world,
            json.dumps(CASES),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", CASES)
def test_every_method_on_two_ranks(case: str, edits: Path) -> None:
    first, second = (edits / "2" / case / f"edit-{rank}.safetensors" for rank in (0, 1))
    assert first.read_bytes() == second.read_bytes()
    alone, shared = Edit.load(edits / "1" / case / "edit-0.safetensors"), Edit.load(first)
    assert alone.delta.keys() == shared.delta.keys() and alone.zero.keys() == shared.zero.keys()
    difference = {key: alone.delta[key] - shared.delta[key] for key in alone.delta}
    assert norm(difference) <= 0.01 * norm(alone.delta)
    # A weight on the edge of a threshold may fall on either side.
    other = sum(int((alone.zero[key] ^ shared.zero[key]).sum()) for key in alone.zero)
    assert other <= 0.01 * alone.changed_parameters


def test_a_share_of_fewer_batches_than_ranks(edits: Path) -> None:
    pictures = list((edits / "2" / "part" / ".cache" / "pictures").glob("*/*.safetensors"))
    # One batch of the unedited model's, one of the edited one's.
    assert len(pictures) == len({file.parent for file in pictures}) == 2


def test_ranks_wait_long_and_fail_together(edits: Path) -> None:
    first, second = (json.loads((edits / "2" / f"found-{rank}.json").read_text()) for rank in (0, 1))
    assert first["error"] == "rank 0 cannot begin"
    assert second["error"] == "another process of this run failed; its message says why"
    # The default is half an hour, and one rank may attack or prepare alone for longer.
    assert min(first["hours"], second["hours"]) >= 24


def run(outputs: Path, *options: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "unpaint", *options, f"outputs={outputs}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (record,) = outputs.glob("*/*/*/*/record.json")
    return json.loads(record.read_text())


def test_pictures_and_detections(tmp_path: Path) -> None:
    run(tmp_path / "erase", "run", *SMALL, "trainer=cpu")
    (edit,) = (tmp_path / "erase").glob("*/*/*/*/edit.safetensors")
    options = [f"edit={edit}", *SMALL, "+metric@evaluator.metrics.fid=fid"]
    one = run(tmp_path / "one", "evaluate", *options, "trainer=cpu")
    two = run(tmp_path / "two", "evaluate", *options, *TWO)
    assert one["cost"]["world_size"] == 1 and two["cost"]["world_size"] == 2
    files = sorted(file.relative_to(tmp_path / "one") for file in (tmp_path / "one/.cache").rglob("*.safetensors"))
    assert any("pictures" in file.parts for file in files) and any("readings" in file.parts for file in files)
    for file in files:
        if "pictures" in file.parts:
            assert load_file(tmp_path / "one" / file)["tensor"].equal(load_file(tmp_path / "two" / file)["tensor"])
    # Of equal features: the root of a matrix takes as many threads as a process has, and rounds as they do.
    fids = [record["metrics"].pop("fidelity/fid") for record in (one, two)]
    for key in ("value", "low", "high", "base", "n"):
        assert fids[0][key] == pytest.approx(fids[1][key], rel=1e-5)
    assert one["metrics"] == two["metrics"]
