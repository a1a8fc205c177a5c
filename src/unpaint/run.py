"""run(cfg): erase a concept, evaluate what is left of it, and keep one record of both. Callable from a notebook:

from unpaint.config import compose
from unpaint.run import run
record = run(compose(["concept=cat", "method=esd"]))
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from unpaint.concepts import AnyConcept
from unpaint.config import edit_id, instantiate, model_folder, part_of, run_folder, run_id, starts_over
from unpaint.errors import UserError, environment_fault
from unpaint.evaluation.heat import heat_map
from unpaint.evaluation.pictures import Batch, PictureStore, picture_key
from unpaint.evaluation.suite import Evaluator
from unpaint.making import cached_edit, copy_file, edit_is_there, erased
from unpaint.methods.base import Method
from unpaint.progress import close_all
from unpaint.report.terminal import show
from unpaint.results import FILE_NAME, RunLock, RunRecord, environment
from unpaint.training.launch import all_or_none, is_rank_zero, new_trainer
from unpaint.training.tracking import Tracking, harmless, tracking


@dataclass(frozen=True)
class Run:
    """A run's parts, made from its config and checked against each other before anything heavy is loaded."""

    cfg: DictConfig
    folder: Path
    concept: AnyConcept
    method: Method | None
    evaluator: Evaluator

    @property
    def cache(self) -> Path:
        return Path(str(self.cfg.outputs)).expanduser() / ".cache"

    @property
    def edit_file(self) -> Path:
        return self.folder / "edit.safetensors"


def run(cfg: DictConfig) -> RunRecord:
    """Erase, then evaluate. What is complete is not done again; what was interrupted goes on."""
    this = _prepared(cfg)
    _check_judges(this)
    with _locked(this):
        if (record := _finished(this)) is None:
            with tracking(cfg, this.folder, run_id(cfg), "run") as track:
                with _recording(this) as record, _model(this) as model:
                    record.cost.update(erased(this, model, track))
                    painted = _painted(this, model, this.edit_file)
                    _evaluated(this, model, painted, record)
                _mirrored(this, painted, record, track)
    return _shown(this, record)


def erase(cfg: DictConfig) -> Path:
    """The erasing half of `run`: the file of the edit, in the run's folder. Needs no detector if `probes` is 0."""
    this = _prepared(cfg)
    if cfg.probes:
        try:
            _check_judges(this)
        except UserError as error:
            raise UserError(f"{error}; to erase without measuring: probes=0") from error
    with _locked(this):
        if starts_over(cfg):
            _forget(this)
        if starts_over(cfg) or not edit_is_there(this):
            with tracking(cfg, this.folder, run_id(cfg), "erase") as track:
                with _model(this) as model:
                    erased(this, model, track)
                with harmless():
                    track.edit(this.edit_file, edit_id(cfg))
    if is_rank_zero():
        print(this.edit_file)
    return this.edit_file


def evaluate(cfg: DictConfig) -> RunRecord:
    """Evaluate the edit in `cfg.edit` on `cfg.concept`; the record says nothing of what the erasing cost."""
    this = _given(cfg)
    _check_judges(this)
    with _locked(this):
        if (record := _finished(this)) is None:
            with tracking(cfg, this.folder, run_id(cfg), "evaluate") as track:
                with _recording(this) as record, _model(this) as model:
                    given = Path(str(cfg.edit)).expanduser()
                    if is_rank_zero() and not (this.edit_file.exists() and this.edit_file.samefile(given)):
                        copy_file(given, this.edit_file)
                    painted = _painted(this, model, given)
                    _evaluated(this, model, painted, record)
                _mirrored(this, painted, record, track)
    return _shown(this, record)


def paint_part(cfg: DictConfig) -> None:
    """The share `cfg.part` of the pictures that `run` or `evaluate` would paint, into the shared cache; no record.

    For jobs side by side; `run` or `evaluate` after them finds all pictures there. Raises UserError if the edit is yet
    to be made.
    """
    this = _given(cfg) if cfg.edit else _prepared(cfg)
    _check_judges(this)
    share = part_of(cfg)
    assert share is not None
    if not cfg.edit and not edit_is_there(this):
        raise UserError(f"part={cfg.part}: there is no edit yet to paint with; make it with `unpaint erase` first")
    try:
        with _model(this) as model:
            _painted(this, model, Path(str(cfg.edit)).expanduser() if cfg.edit else this.edit_file, share)
    finally:
        close_all()
    if is_rank_zero():
        print(f"painted part {cfg.part}")


# --- before -------------------------------------------------------------------------------------------------------


def _prepared(cfg: DictConfig) -> Run:
    concept: AnyConcept = instantiate(cfg.concept, cfg.plugins)
    method: Method = instantiate(cfg.method, cfg.plugins)
    # One by one a method meets the members, and never the set.
    for one in (concept,) if method.mode == "joint" else concept.members:
        method.check(one)
    precision = str(cfg.trainer.precision)
    if precision in ("16-mixed", "16"):
        # Lightning scales the loss, and divides by the scale what a method may have got without it.
        raise UserError(
            f"trainer.precision={precision} scales the loss, which spoils gradients that a method computes itself; "
            "use trainer.precision=bf16-mixed"
        )
    if cfg.model.dtype != "float32" and precision not in ("bf16-mixed", "bf16"):
        raise UserError(
            f"model.dtype={cfg.model.dtype}: what is trained stays in float32, which takes "
            f"trainer.precision=bf16-mixed, not {precision}"
        )
    return Run(cfg, run_folder(cfg), concept, method, instantiate(cfg.evaluator, cfg.plugins))


def _given(cfg: DictConfig) -> Run:
    """The parts of a run that measures the edit in `cfg.edit`."""
    concept, evaluator = instantiate(cfg.concept, cfg.plugins), instantiate(cfg.evaluator, cfg.plugins)
    return Run(cfg, run_folder(cfg), concept, None, evaluator)


def _check_judges(this: Run) -> None:
    this.evaluator.check_model(str(this.cfg.model.name))
    this.evaluator.plan(this.concept, int(this.cfg.seed))
    if this.evaluator.relearning is not None and this.cfg.model.dtype != "float32":
        raise UserError(
            f"relearning trains all weights in float32, and model.dtype={this.cfg.model.dtype}; leave it out: "
            "evaluator.relearning=null"
        )
    source = model_folder(this.cfg.model) or this.cfg.model.hub
    this.evaluator.check_attacks(str(source), this.concept, int(this.cfg.seed))


def _finished(this: Run) -> RunRecord | None:
    """The record of a run that is complete and need not be done again."""
    file = this.folder / FILE_NAME
    if starts_over(this.cfg):
        _forget(this)
        return None
    if not file.exists():
        return None
    record = RunRecord.load(file)
    return record if record.status == "complete" else None


def _forget(this: Run) -> None:
    """Removes what the run left, and the shared edit if it is the run's own to make; shared pictures stay."""
    if not is_rank_zero():
        return
    (this.folder / FILE_NAME).unlink(missing_ok=True)
    if this.method is not None:
        parts = [file for member in this.concept.members for file in cached_edit(this, member.name)]
        for file in (this.edit_file, *cached_edit(this), *parts):
            file.unlink(missing_ok=True)
        shutil.rmtree(this.folder / "edits", ignore_errors=True)
    for name in ("checkpoints", "log"):
        shutil.rmtree(this.folder / name, ignore_errors=True)


@contextmanager
def _locked(this: Run) -> Iterator[None]:
    try:
        with RunLock(this.folder) if is_rank_zero() else nullcontext():
            yield
    finally:
        close_all()


@contextmanager
def _recording(this: Run) -> Iterator[RunRecord]:
    """The record while the run goes on: on disk as `interrupted` until it is complete, `failed` after an error."""
    cfg = this.cfg
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    record = RunRecord(
        run_id=run_id(cfg),
        status="interrupted",
        started=_started(this) or _now(),
        finished=None,
        method=str(cfg.method.name),
        concept=this.concept.name,
        model=str(cfg.model.name),
        seed=int(cfg.seed),
        config={str(key): value for key, value in config.items()},
    )
    if is_rank_zero():
        record.save(this.folder)
        OmegaConf.save(OmegaConf.create(config), this.folder / "config.yaml")
    try:
        yield record
        record.status = "complete"
    except Exception as error:
        # On a full disk nothing more can be written; `interrupted` stands there already.
        record.status = "interrupted" if environment_fault(error) else "failed"
        raise
    finally:
        record.finished = None if record.status == "interrupted" else _now()
        if is_rank_zero() and record.status != "interrupted":
            record.save(this.folder)


def _started(this: Run) -> str | None:
    """When the run began, if it was interrupted."""
    try:
        record = RunRecord.load(this.folder)
    except UserError:
        return None
    return record.started if record.status == "interrupted" else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


_kept: dict[str, Any] = {}


@contextmanager
def _model(this: Run) -> Iterator[Any]:
    """The run's model, unedited, on the CPU or where the last run of this process left it: a sweep loads it once."""
    from unpaint.model import load_model

    # The trainer moves it to its device.
    wanted: dict[str, Any] = {**this.cfg.model, "device": "cpu"}
    folder = model_folder(this.cfg.model)
    files = sorted(folder.rglob("*.safetensors")) if folder else []
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = json.dumps([wanted, state], sort_keys=True)
    model = _kept.pop(key, None)
    _kept.clear()
    if model is None:
        model = load_model(wanted)
    yield model
    # Not after an error, which may have left it half trained.
    _kept[key] = model


# --- erasing --------------------------------------------------------------------------------------------------------


# --- evaluating -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Painted:
    """What there is to score: the pictures of both models, by key, in the store."""

    store: PictureStore
    batches: list[Batch]
    base: str
    edited: str
    edit: Any
    seconds: float
    world_size: int


def _painted(this: Run, model: Any, edit_file: Path, share: slice = slice(None)) -> Painted:
    """Paints and reads what is missing, unedited and edited; of both, the batches in `share`. `seconds`: the second."""
    from unpaint.edit import Edit
    from unpaint.training.leaving import Leaving
    from unpaint.training.painting import paint_all

    cfg, evaluator = this.cfg, this.evaluator
    # Always in the model's own precision: what is measured must not depend on how it was trained.
    trainer = new_trainer(cfg, this.folder, [Leaving()], precision="32-true")
    model.to(trainer.strategy.root_device)
    store = PictureStore(this.cache)
    batches: list[Batch] = evaluator.plan(this.concept, int(cfg.seed))
    base = picture_key(model)
    unedited = [*batches, *evaluator.references(batches)]
    paint_all(trainer, evaluator, model, store, base, unedited[share], "painting, unedited")
    started = time.perf_counter()
    edit = Edit.load(edit_file)
    edited = picture_key(model, edit.id)
    edit.apply(model.pipe)
    try:
        trainer = new_trainer(cfg, this.folder, [Leaving()], precision="32-true")
        answers = [batch for batch in batches if batch.answers is None]
        paint_all(trainer, evaluator, model, store, edited, answers[share], "painting, edited")
    finally:
        edit.remove(model.pipe)
    if cfg.part is None:
        rank, world = trainer.global_rank, trainer.world_size
        with all_or_none(trainer.strategy):
            evaluator.attack(model, edit, this.concept, int(cfg.seed), this.cache, rank, world)
    return Painted(store, batches, base, edited, edit, time.perf_counter() - started, trainer.world_size)


def _evaluated(this: Run, model: Any, painted: Painted, record: RunRecord) -> None:
    """Counts what is painted, and fills the record."""
    from unpaint.edit import Edit

    cfg, evaluator, started = this.cfg, this.evaluator, time.perf_counter()
    store, batches, base, edited = painted.store, painted.batches, painted.base, painted.edited
    record.metrics = evaluator.score(store, edited, base, batches, model.device)
    if is_rank_zero():
        evaluator.grid(store, edited, base, batches, this.concept, _grid(this))
        if damage := record.metrics.get("retention/damage"):
            name, erased = this.concept.name, [member.group for member in this.concept.members]
            heat_map({name: damage["by_label"]}, {name: erased}, _damage(this))
        parts = {file.stem: Edit.load(file) for file in sorted((this.folder / "edits").glob("*.safetensors"))}
        seed, attacks = int(cfg.seed), this.folder / "attacks"
        record.metrics |= evaluator.attacked(model, painted.edit, this.concept, seed, this.cache, attacks)
        record.metrics |= evaluator.restored(model, painted.edit, parts, this.concept, int(cfg.seed))
    record.cost["evaluate_seconds"] = round(painted.seconds + time.perf_counter() - started, 3)
    for key, value in (
        ("changed_parameters", painted.edit.changed_parameters),
        ("edit_bytes", painted.edit.nbytes),
        ("world_size", painted.world_size),
    ):
        record.cost.setdefault(key, value)
    record.environment = environment(str(model.device))


def _grid(this: Run) -> Path:
    return this.folder / "images" / "grid.png"


def _damage(this: Run) -> Path:
    return this.folder / "images" / "damage.png"


def _mirrored(this: Run, painted: Painted, record: RunRecord, track: Tracking) -> None:
    """The finished record, and pictures and edit with it, to the logger."""
    if not is_rank_zero() or track.run is None:
        return
    with harmless():
        track.results(record, _grid(this))
        most = int(this.cfg.logger.pictures)
        track.table(this.evaluator.samples(painted.store, painted.edited, painted.base, painted.batches, most))
        track.edit(this.edit_file, edit_id(this.cfg) if this.method is not None else record.run_id)


def _shown(this: Run, record: RunRecord) -> RunRecord:
    if is_rank_zero():
        paths = {"record": this.folder / FILE_NAME, "edit": this.edit_file, "before and after": _grid(this)}
        show(record, paths | ({"damage": _damage(this)} if "retention/damage" in record.metrics else {}))
    return record
