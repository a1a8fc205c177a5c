"""A concept set, erased jointly, in sequence and as an edit a member."""

from pathlib import Path
from typing import Any

import pytest
import torch

from unpaint.concepts import AnyConcept
from unpaint.config import compose, conf_dir
from unpaint.edit import Edit
from unpaint.errors import UserError
from unpaint.methods.base import MODES, checked_mode
from unpaint.model import load_model
from unpaint.run import erase

METHODS = sorted(file.stem for file in (conf_dir() / "method").glob("*.yaml"))
SHORT = {"steps": 2, "sampling_steps": 4, "bank_size": 4, "batch_size": 4}


def made(method: str, mode: str, folder: Path, outputs: Path, *more: str) -> Path:
    own = compose([f"method={method}"]).method
    short = [f"method.{key}={value}" for key, value in SHORT.items() if key in own]
    options = ["concept=pets", "model=sd15", f"model.path={folder}", "trainer=cpu", "logger=csv", "probes=0"]
    return erase(compose([f"method={method}", f"method.mode={mode}", *options, *short, f"outputs={outputs}", *more]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["esd", "uce"])
def test_every_mode_gives_an_edit_of_the_unedited_model(
    method: str, mode: str, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    file = made(method, mode, tiny_pipeline_folder, tmp_path)
    edit = Edit.load(file)
    model = load_model({"name": "tiny", "path": str(tiny_pipeline_folder)})
    edit.apply(model.pipe)
    edit.remove(model.pipe)
    assert edit.changed_parameters > 0 and edit.header.concept == "pets"
    parts = sorted(part.stem for part in (file.parent / "edits").glob("*.safetensors"))
    assert parts == (["bird", "cat", "dog", "fish"] if mode == "composed" else [])


def test_a_composed_edit_does_what_its_parts_do_together_to_the_bit(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    file = made("esd", "composed", tiny_pipeline_folder, tmp_path)
    parts = [Edit.load(part) for part in (file.parent / "edits").glob("*.safetensors")]
    whole, added = (load_model({"name": "tiny", "path": str(tiny_pipeline_folder)}) for _ in range(2))
    Edit.load(file).apply(whole.pipe)
    for part in parts:
        part.apply(added.pipe)
    for key, weight in whole.group("all").items():
        assert weight.equal(added.group("all")[key])
    parts[0].remove(added.pipe)
    assert any(not weight.equal(added.group("all")[key]) for key, weight in whole.group("all").items())


def test_any_subset_of_a_set_is_erased_or_restored_to_the_bit(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    options = ("method.variant=direct", "method.pictures=2", "method.stop_after=1000")
    file = made("sepme", "composed", tiny_pipeline_folder, tmp_path, *options)
    parts = [Edit.load(part) for part in sorted((file.parent / "edits").glob("*.safetensors"))]
    assert len(parts) == 4
    model = load_model({"name": "tiny", "path": str(tiny_pipeline_folder)})
    base = {key: weight.detach().clone() for key, weight in model.group("all").items()}
    for number in range(16):
        chosen = [part for i, part in enumerate(parts) if number >> i & 1]
        moved = {key: torch.zeros_like(weight) for key, weight in base.items()}
        for part in sorted(chosen, key=lambda part: part.id):
            for key, move in part.delta.items():
                moved[key] += move
        for part in parts:
            part.apply(model.pipe)
        for part in parts:
            if part not in chosen:
                part.remove(model.pipe)
        assert all(weight.equal(base[key] + moved[key]) for key, weight in model.group("all").items()), number
        for part in chosen:
            part.remove(model.pipe)
        assert all(weight.equal(base[key]) for key, weight in model.group("all").items())


def test_a_sequence_goes_on_from_what_came_before(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    file = made("esd", "sequential", tiny_pipeline_folder, tmp_path)
    stages = {
        part.stem.partition("-")[2]: Edit.load(part) for part in (tmp_path / ".cache/edits").glob("*-*.safetensors")
    }
    assert stages["fish"].delta.keys() == Edit.load(file).delta.keys()
    last = Edit.load(file).delta
    assert all(last[key].equal(stages["fish"].delta[key]) for key in last)
    moved = [
        sum(float(d.square().sum()) for d in stages[name].delta.values()) for name in ("cat", "dog", "bird", "fish")
    ]
    assert moved == sorted(moved)


def test_killed_between_members_it_goes_on_to_the_same_edit(
    tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unpaint import run

    whole = made("esd", "composed", tiny_pipeline_folder, tmp_path / "whole").read_bytes()
    real = run._made
    done: list[str] = []
    most = 2

    def counted(this: run.Run, model: Any, concept: AnyConcept, *more: Any) -> Any:
        if len(done) == most:
            raise KeyboardInterrupt
        done.append(concept.name)
        return real(this, model, concept, *more)

    monkeypatch.setattr(run, "_made", counted)
    with pytest.raises(KeyboardInterrupt):
        made("esd", "composed", tiny_pipeline_folder, tmp_path / "killed")
    most = 4
    assert made("esd", "composed", tiny_pipeline_folder, tmp_path / "killed").read_bytes() == whole
    assert done == ["cat", "dog", "bird", "fish"], "members that were finished were made again"


@pytest.mark.parametrize("method", METHODS)
def test_a_mode_that_a_method_cannot_do_is_refused(method: str, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"method\.mode is"):
        made(method, "jointly", tiny_pipeline_folder, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_method_can_do_is_named() -> None:
    assert checked_mode("x", "joint", ("joint",)) == "joint"
    with pytest.raises(UserError, match=r"method=x: method\.mode is joint, sequential is not"):
        checked_mode("x", "sequential", ("joint",))


def test_total_keeps_zeroed_positions(tiny_pipeline_folder: Path) -> None:
    model = load_model({"name": "tiny", "path": str(tiny_pipeline_folder)})
    key, weight = next(iter(model.group("feed_forward.out").items()))
    about: dict[str, Any] = {"method": "m", "concept": "c", "config": {}}
    masks = [torch.zeros(weight.shape, dtype=torch.bool) for _ in range(2)]
    masks[0][0, :3], masks[1][0, 2:5] = True, True
    parts = [Edit.from_zeros(model.pipe, {key: mask}, **about) for mask in masks]
    total = Edit.total(model.pipe, parts, **about)
    assert total.zero[key].equal(masks[0] | masks[1]) and not total.delta
