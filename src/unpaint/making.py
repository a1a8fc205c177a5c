"""The edit of a run: taken from another run that was given the same, or made, whole or a member of a set at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from unpaint.concepts import AnyConcept, Concept
from unpaint.config import edit_id, identity, starts_over
from unpaint.edit_header import read_header
from unpaint.errors import UserError
from unpaint.files import replacing
from unpaint.memory import forget_peak, peak
from unpaint.results import write_json
from unpaint.training.launch import is_rank_zero, new_trainer
from unpaint.training.tracking import Tracking

if TYPE_CHECKING:
    from unpaint.run import Run


def cached_edit(this: Run, member: str = "") -> tuple[Path, Path]:
    """Where the edit and its cost are shared between runs: the whole edit's, or that of a member of a set."""
    folder = this.cache / "edits"
    name = edit_id(this.cfg) + (f"-{member}" if member else "")
    return folder / f"{name}.safetensors", folder / f"{name}.json"


def edit_is_there(this: Run) -> bool:
    """Whether the run has its edit, perhaps copied from another run's that was made by the same config."""
    cached, cost = cached_edit(this)
    try:
        read_header(cached)
        json.loads(cost.read_text())
    except (UserError, OSError, ValueError):
        return False
    if is_rank_zero():
        assert this.method is not None
        copy_file(cached, this.edit_file)
        for member in this.concept.members if this.method.mode == "composed" else ():
            if (part := cached_edit(this, member.name)[0]).exists():
                copy_file(part, this.folder / "edits" / part.name.partition("-")[2])
        shutil.rmtree(this.folder / "checkpoints", ignore_errors=True)
    return True


def copy_file(source: Path, target: Path) -> None:
    """Whole or not at all."""
    with replacing(target) as beside:
        shutil.copyfile(source, beside)


def erased(this: Run, model: Any, track: Tracking) -> dict[str, Any]:
    """Makes the edit unless it is there; returns its cost.

    A concept set takes one way of three, `method.mode`: `joint`, one edit for all members at once; `composed`, one edit
    a member, each made from the unedited model, and their sum; `sequential`, one member after the other.
    """
    cached, cost_file = cached_edit(this)
    # Starting over, no rank looks for what rank 0 may not have come to remove yet: an edit, a member's, a saved state.
    if not starts_over(this.cfg) and edit_is_there(this):
        return json.loads(cost_file.read_text())
    assert this.method is not None
    members = this.concept.members
    if len(members) == 1 or this.method.mode == "joint":
        edit, cost = _made(this, model, this.concept, track)
    else:
        edit, cost = _made_in_parts(this, model, track, members)
    if is_rank_zero():
        edit.save(cached)
        write_json(cost_file, cost)
        edit_is_there(this)
    return cost


def _made_in_parts(this: Run, model: Any, track: Tracking, members: tuple[Concept, ...]) -> tuple[Any, dict[str, Any]]:
    """The edit of a set whose members are erased one by one. What is finished is kept, should the run be killed."""
    from unpaint.edit import Edit

    assert this.method is not None
    one_by_one = this.method.mode == "sequential"
    edits: list[Any] = []
    costs: list[dict[str, Any]] = []
    for i, member in enumerate(members):
        file, cost_file = cached_edit(this, member.name)
        found = None if starts_over(this.cfg) else _loaded(file, cost_file)
        if found is None:
            # One by one, those that are gone already; those that are yet to go need not stay as they are.
            others = members[:i] if one_by_one else members[:i] + members[i + 1 :]
            found = _made(this, model, member, track, others, edits[-1] if one_by_one and edits else None)
            if is_rank_zero():
                found[0].save(file)
                write_json(cost_file, found[1])
        edits.append(found[0])
        costs.append(found[1])
    method, config = str(this.cfg.method.name), identity(this.cfg)
    parts = edits[-1:] if one_by_one else edits
    whole = Edit.total(model.pipe, parts, method=method, concept=this.concept.name, config=config)
    return whole, _cost_of_all(costs, whole)


def _loaded(file: Path, cost_file: Path) -> tuple[Any, dict[str, Any]] | None:
    from unpaint.edit import Edit

    try:
        return Edit.load(file), json.loads(cost_file.read_text())
    except (UserError, OSError, ValueError):
        return None


def _cost_of_all(costs: list[dict[str, Any]], edit: Any) -> dict[str, Any]:
    """Times and steps add up; the rest is that of the whole edit, or the largest."""
    cost = {key: sum(part[key] for part in costs) for key in ("erase_seconds", "optimizer_steps")}
    cost |= {
        key: max(part[key] for part in costs) for key in ("peak_memory_bytes", "trainable_parameters", "world_size")
    }
    return cost | {"changed_parameters": edit.changed_parameters, "edit_bytes": edit.nbytes}


def _made(
    this: Run,
    model: Any,
    concept: AnyConcept,
    track: Tracking,
    beside: tuple[Concept, ...] = (),
    start: Any = None,
) -> tuple[Any, dict[str, Any]]:
    """Runs the method once: the edit and its cost. `start` is the edit that it goes on from."""
    from unpaint.training.erasing import Erasing, Probe, SaveState, ShowProgress
    from unpaint.training.leaving import Leaving

    cfg = this.cfg
    name = "last" if concept is this.concept else concept.name
    state = this.folder / "checkpoints" / f"{name}.ckpt"
    state.parent.mkdir(parents=True, exist_ok=True)
    goes_on = state.exists() and not starts_over(cfg)
    assert this.method is not None
    module = Erasing(this.method, model, concept, int(cfg.seed), identity(cfg), this.cache, beside, start)
    callbacks: list[Any] = [ShowProgress(f"erasing {concept.target} with {this.method.name}")]
    accuracy = lambda: this.evaluator.unlearning_accuracy(model, concept, int(cfg.seed))  # noqa: E731
    probe = Probe(cfg.probes, accuracy) if cfg.probes and concept is this.concept else None
    if probe is not None:
        callbacks.append(probe)
    save_state = SaveState(state, cfg.checkpoint_seconds)
    callbacks += [save_state, Leaving(save_state.save)]
    part = "" if concept is this.concept else f"{concept.name}_"
    curves = f"{part}from_step_{_steps_in(state) if goes_on and cfg.logger.name == 'csv' else 0}"
    trainer = new_trainer(cfg, this.folder, callbacks, track.curves(curves))
    forget_peak()
    trainer.fit(module, ckpt_path=state if goes_on else None, weights_only=True)
    edit = module.finish()
    cost = {
        "erase_seconds": round(module.seconds, 3),
        "optimizer_steps": module.optimizer_steps,
        "peak_memory_bytes": peak(),
        "trainable_parameters": sum(p.numel() for p in module.weights.values()),
        "changed_parameters": edit.changed_parameters,
        "edit_bytes": edit.nbytes,
        "world_size": trainer.world_size,
    }
    if probe is not None:
        probe.last(trainer, module, edit)
        cost["seconds_to_ua95"] = None if module.seconds_to_ua95 is None else round(module.seconds_to_ua95, 3)
    trainer.strategy.barrier()
    return edit, cost


def _steps_in(state: Path) -> int:
    import torch

    try:
        return int(torch.load(state, map_location="cpu", weights_only=True, mmap=True)["unpaint"]["steps_done"])
    except (RuntimeError, EOFError, KeyError, UnpicklingError) as error:
        raise UserError(f"the saved state '{state}' is damaged; force=true starts over") from error
