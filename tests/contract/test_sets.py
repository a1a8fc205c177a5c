"""A concept set, erased jointly, in sequence and as an edit a member."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from unpaint.aligners.clip import ClipAligner
from unpaint.concepts import AnyConcept
from unpaint.config import compose, conf_dir, instantiate
from unpaint.edit import Edit
from unpaint.errors import UserError
from unpaint.methods.base import MODES, Job, checked_mode, erasing_prompts
from unpaint.methods.uce import UCE
from unpaint.model import load_model
from unpaint.run import erase

METHODS = sorted(file.stem for file in (conf_dir() / "method").glob("*.yaml"))
PETS = ["cat", "dog", "bird", "fish"]
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
    from unpaint import making
    from unpaint.run import Run

    whole = made("esd", "composed", tiny_pipeline_folder, tmp_path / "whole").read_bytes()
    real = making._made
    done: list[str] = []
    most = 2

    def counted(this: Run, model: Any, concept: AnyConcept, *more: Any) -> Any:
        if len(done) == most:
            raise KeyboardInterrupt
        done.append(concept.name)
        return real(this, model, concept, *more)

    monkeypatch.setattr(making, "_made", counted)
    with pytest.raises(KeyboardInterrupt):
        made("esd", "composed", tiny_pipeline_folder, tmp_path / "killed")
    most = 4
    assert made("esd", "composed", tiny_pipeline_folder, tmp_path / "killed").read_bytes() == whole
    assert done == ["cat", "dog", "bird", "fish"], "members that were finished were made again"


@pytest.mark.parametrize(
    ("mode", "others"),
    [
        ("sequential", [PETS[:i] for i in range(4)]),
        ("composed", [[name for name in PETS if name != own] for own in PETS]),
    ],
)
def test_a_member_knows_which_others_its_edit_must_leave_alone(
    mode: str, others: list[list[str]], tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = UCE.begin
    found: list[list[str]] = []

    def begun(self: UCE, job: Job) -> None:
        found.append([other.name for other in job.beside])
        real(self, job)

    monkeypatch.setattr(UCE, "begin", begun)
    made("uce", mode, tiny_pipeline_folder, tmp_path)
    assert found == others


def test_what_is_painted_after_an_edit_is_not_taken_for_the_unedited_models(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    few = ("method.forget_size=2", "method.retain_size=2")
    made("salun", "sequential", tiny_pipeline_folder, tmp_path / "after", *few)
    after, alone = (
        made("salun", "joint", tiny_pipeline_folder, tmp_path / name, *few, "concept=dog")
        for name in ("after", "alone")
    )
    assert after.read_bytes() == alone.read_bytes()


def test_the_bare_words_of_a_set_are_those_of_every_member() -> None:
    pets, cat = (instantiate(compose([f"concept={name}"]).concept) for name in ("pets", "cat"))
    assert [entry.prompt for entry in erasing_prompts(pets, "concept")] == ["a cat", "a dog", "a bird", "a fish"]
    assert [entry.prompt for entry in erasing_prompts(cat, "concept")] == ["a cat"]
    assert erasing_prompts(pets, "all") == pets.erasing(further=True)


def test_trust_asks_of_a_picture_what_its_own_member_is(
    tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ClipAligner.__call__
    asked: list[str] = []

    def heard(self: ClipAligner, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        asked.extend(prompts)
        return real(self, images, prompts)

    monkeypatch.setattr(ClipAligner, "__call__", heard)
    with pytest.warns(UserWarning, match="the aligner knows pictures of model 'picturebook'"):
        made("trust", "joint", tiny_pipeline_folder, tmp_path, "method.retain_size=2", "method.first_estimates=6")
    assert len(set(asked)) > 1 and set(asked) <= {"a cat", "a dog", "a bird", "a fish"}


@pytest.mark.parametrize(
    ("method", "mode", "option"),
    [
        ("trust", "sequential", "method.objective=zero"),
        ("concept_prune", "composed", "method.fill=mean"),
        ("sepme", "joint", "method.lr=1"),
        ("esd", "composed", "method.erase_from=a cat"),
    ],
)
def test_what_would_not_add_up_is_refused(method: str, mode: str, option: str) -> None:
    with pytest.raises(UserError, match=f"method.mode is .*, {mode} is not"):
        instantiate(compose([f"method={method}", f"method.mode={mode}", option]).method)


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
