"""run(cfg): erase a concept, evaluate what is left of it, and keep one record of both. Callable from a notebook:

from unpaint.config import compose
from unpaint.run import run
record = run(compose(["concept=cat", "method=esd"]))
"""

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from unpaint.concepts import Concept
from unpaint.config import edit_id, identity, instantiate, run_folder, run_id
from unpaint.edit_header import read_header
from unpaint.errors import UserError
from unpaint.evaluation.pictures import Batch, PictureStore, picture_key
from unpaint.evaluation.suite import Evaluator
from unpaint.methods.base import Method
from unpaint.report.terminal import show
from unpaint.results import FILE_NAME, RunLock, RunRecord, environment, write_json


@dataclass(frozen=True)
class Run:
    """A run's parts, made from its config and checked against each other before anything heavy is loaded."""

    cfg: DictConfig
    folder: Path
    concept: Concept
    method: Method
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
    if (done := _finished(this)) is not None:
        return done
    with _recording(this) as record:
        model = _load(this)
        cost = _erased(this, model)
        record.cost.update(cost)
        _evaluated(this, model, this.edit_file, record)
    return _shown(this, record)


def erase(cfg: DictConfig) -> Path:
    """The erasing half of `run`: the file of the edit, in the run's folder."""
    this = _prepared(cfg)
    with _locked(this):
        if not _edit_is_there(this):
            _erased(this, _load(this))
    if _is_rank_zero():
        print(this.edit_file)
    return this.edit_file


def evaluate(cfg: DictConfig) -> RunRecord:
    """Evaluate the edit in `cfg.edit`; its record says nothing of what the erasing cost."""
    this = _prepared(cfg)
    if (done := _finished(this)) is not None:
        return done
    with _recording(this) as record:
        if _is_rank_zero():
            shutil.copyfile(Path(str(cfg.edit)).expanduser(), this.edit_file)
        _evaluated(this, _load(this), Path(str(cfg.edit)).expanduser(), record)
    return _shown(this, record)


# --- before -------------------------------------------------------------------------------------------------------


def _prepared(cfg: DictConfig) -> Run:
    concept: Concept = instantiate(cfg.concept, cfg.plugins)
    method: Method = instantiate(cfg.method, cfg.plugins)
    evaluator: Evaluator = instantiate(cfg.evaluator, cfg.plugins)
    if not cfg.edit:
        method.check(concept)
    evaluator.plan(concept, cfg.seed)
    return Run(cfg, run_folder(cfg), concept, method, evaluator)


def _finished(this: Run) -> RunRecord | None:
    """The record, if this run is complete (printed again), else None; with `force` what there is is removed."""
    file = this.folder / FILE_NAME
    if this.cfg.force and _is_rank_zero():
        for old in (file, this.edit_file, *_cached_edit(this)):
            old.unlink(missing_ok=True)
        shutil.rmtree(this.folder / "checkpoints", ignore_errors=True)
    if not file.exists() or this.cfg.force:
        return None
    record = RunRecord.load(file)
    return _shown(this, record) if record.status == "complete" else None


def _is_rank_zero() -> bool:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    return int(rank_zero_only.rank or 0) == 0


@contextmanager
def _locked(this: Run) -> Iterator[None]:
    with RunLock(this.folder) if _is_rank_zero() else nullcontext():
        yield


@contextmanager
def _recording(this: Run) -> Iterator[RunRecord]:
    """The record while the run goes on: on disk as `interrupted` until it is complete, `failed` after an error."""
    cfg = this.cfg
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    record = RunRecord(
        run_id=run_id(cfg),
        status="interrupted",
        started=_now(),
        finished=None,
        method=str(cfg.method.name),
        concept=this.concept.name,
        model=str(cfg.model.name),
        seed=int(cfg.seed),
        config={str(key): value for key, value in config.items()},
    )
    with _locked(this):
        if _is_rank_zero():
            record.save(this.folder)
            OmegaConf.save(OmegaConf.create(config), this.folder / "config.yaml")
        try:
            yield record
            record.status = "complete"
        except Exception:
            record.status = "failed"
            raise
        finally:
            record.finished = None if record.status == "interrupted" else _now()
            if _is_rank_zero() and (record.status != "failed" or not isinstance(sys.exception(), OSError)):
                record.save(this.folder)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _load(this: Run) -> Any:
    from unpaint.model import load_model

    return load_model(this.cfg.model)


# --- erasing --------------------------------------------------------------------------------------------------------


def _cached_edit(this: Run) -> tuple[Path, Path]:
    folder = this.cache / "edits"
    name = edit_id(this.cfg)
    return folder / f"{name}.safetensors", folder / f"{name}.json"


def _edit_is_there(this: Run) -> bool:
    """Whether the run has its edit, perhaps copied from another run's that was made by the same config."""
    cached, cost = _cached_edit(this)
    try:
        read_header(cached)
        json.loads(cost.read_text())
    except (UserError, OSError, ValueError):
        return False
    if _is_rank_zero():
        _copy(cached, this.edit_file)
    return True


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, beside)
    os.replace(beside, target)


def _erased(this: Run, model: Any) -> dict[str, Any]:
    """Makes the edit unless it is there; returns its cost."""
    from unpaint.training.erasing import Erasing, Probe, SaveState, ShowProgress
    from unpaint.training.launch import close, new_logger, new_trainer

    cached, cost_file = _cached_edit(this)
    if _edit_is_there(this):
        return json.loads(cost_file.read_text())
    cfg, state = this.cfg, this.folder / "checkpoints" / "last.ckpt"
    state.parent.mkdir(parents=True, exist_ok=True)
    module = Erasing(this.method, model, this.concept, int(cfg.seed), identity(cfg), this.cache)
    callbacks = [ShowProgress(f"erasing {this.concept.target} with {this.method.name}")]
    if cfg.probes:
        accuracy = lambda: this.evaluator.unlearning_accuracy(model, this.concept, int(cfg.seed))  # noqa: E731
        callbacks.append(Probe(cfg.probes, accuracy))
    callbacks.append(SaveState(state, cfg.checkpoint_seconds))
    logger = new_logger(cfg, this.folder, run_id(cfg), _steps_in(state))
    trainer = new_trainer(cfg, this.folder, callbacks, logger)
    try:
        trainer.fit(module, ckpt_path=state if state.exists() else None, weights_only=True)
    finally:
        close(logger)
    if trainer.interrupted:
        raise KeyboardInterrupt
    started = time.perf_counter()
    edit = module.finish()
    cost = {
        "erase_seconds": round(module.seconds + time.perf_counter() - started, 3),
        "seconds_to_ua95": None if module.seconds_to_ua95 is None else round(module.seconds_to_ua95, 3),
        "optimizer_steps": module.optimizer_steps,
        "peak_memory_bytes": _peak_memory(),
        "trainable_parameters": sum(p.numel() for p in module.weights.values()),
        "changed_parameters": edit.changed_parameters,
        "edit_bytes": edit.nbytes,
        "world_size": trainer.world_size,
    }
    if trainer.is_global_zero:
        cached.parent.mkdir(parents=True, exist_ok=True)
        edit.save(cached)
        write_json(cost_file, cost)
        _copy(cached, this.edit_file)
        shutil.rmtree(state.parent)
    trainer.strategy.barrier()
    return cost


def _steps_in(state: Path) -> int:
    import torch

    return torch.load(state, map_location="cpu", weights_only=True)["unpaint"]["steps_done"] if state.exists() else 0


def _peak_memory() -> int:
    """Bytes: of the GPU if there is one in use, else of the process."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- evaluating -------------------------------------------------------------------------------------------------------


def _evaluated(this: Run, model: Any, edit_file: Path, record: RunRecord) -> None:
    """Paints what is missing, unedited and edited, and fills the record."""
    from unpaint.edit import Edit
    from unpaint.training.launch import mirror, new_trainer
    from unpaint.training.painting import paint_all

    cfg, evaluator = this.cfg, this.evaluator
    trainer = new_trainer(cfg, this.folder, [])
    model.to(trainer.strategy.root_device)
    edit = Edit.load(edit_file)
    store = PictureStore(this.cache)
    batches: list[Batch] = evaluator.plan(this.concept, int(cfg.seed))
    base, edited = picture_key(model), picture_key(model, edit.id)
    paint_all(trainer, evaluator, model, store, base, batches, "painting, unedited")
    started = time.perf_counter()
    edit.apply(model.pipe)
    trainer = new_trainer(cfg, this.folder, [])
    paint_all(trainer, evaluator, model, store, edited, batches, "painting, edited")
    edit.remove(model.pipe)
    record.metrics = evaluator.score(store, edited, base, batches, model.device)
    if trainer.is_global_zero:
        grid = evaluator.grid(store, edited, base, batches, this.concept, this.folder / "images" / "grid.png")
        mirror(cfg, this.folder, record.run_id, record.metrics, grid)
    record.cost |= {
        "evaluate_seconds": round(time.perf_counter() - started, 3),
        "changed_parameters": edit.changed_parameters,
        "edit_bytes": edit.nbytes,
        "world_size": trainer.world_size,
    }
    record.environment = environment(str(model.device))


def _shown(this: Run, record: RunRecord) -> RunRecord:
    if _is_rank_zero():
        grid = this.folder / "images" / "grid.png"
        show(record, {"record": this.folder / FILE_NAME, "edit": this.edit_file, "before and after": grid})
    return record
