"""What a run tells its logger: curves while erasing, then results.

The record is what counts, so nothing in here can stop a run: what goes wrong is a warning, and the run goes on.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger
from omegaconf import DictConfig, OmegaConf

from unpaint.edit_header import read_header
from unpaint.errors import UserError, nearest
from unpaint.results import RunRecord
from unpaint.training.launch import is_rank_zero

LOGGERS = ("csv", "wandb", "none")
# Of a metric, under its name and these endings, beside the value under the name alone.
PARTS = ("base", "low", "high", "n")


class Guarded(Logger):
    """A Lightning logger that is silent after its first error."""

    def __init__(self, inner: Logger) -> None:
        super().__init__()
        self.inner: Logger | None = inner

    @property
    def name(self) -> str | None:
        return None

    @property
    def version(self) -> str | None:
        return None

    def _tell(self, tell: Callable[[Logger], None]) -> None:
        if self.inner is None:
            return
        try:
            tell(self.inner)
        except Exception as error:
            self.inner = None
            warn(error)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._tell(lambda inner: inner.log_metrics(metrics, step))

    def log_hyperparams(self, params: Any, *more: Any) -> None:
        """Nothing: the run's config is what it was made with."""

    def save(self) -> None:
        self._tell(lambda inner: inner.save())

    def finalize(self, status: str) -> None:
        self._tell(lambda inner: inner.finalize(status))


def warn(error: BaseException) -> None:
    """Say it, and that it costs nothing."""
    line = next(iter(str(error).splitlines()), "")
    warnings.warn(f"the logger failed ({type(error).__name__}: {line}); the run goes on without it", stacklevel=3)


class Tracking:
    """The logger of one run, on rank 0; with logger=wandb a wandb run is open for as long as this is."""

    def __init__(self, kind: str, folder: Path, wandb_run: Any = None) -> None:
        self.kind = kind
        self.folder = folder
        self.run = wandb_run

    def curves(self, version: str) -> Logger | None:
        """For a Trainer. `version` names the CSV file by the step it starts at: Lightning would delete the curves of
        the part before a kill."""
        if self.kind == "csv" and is_rank_zero():
            return Guarded(CSVLogger(self.folder, name="log", version=version, flush_logs_every_n_steps=1))
        if self.run is not None:
            from lightning.pytorch.loggers import WandbLogger

            return Guarded(WandbLogger(experiment=self.run))
        return None

    def results(self, record: RunRecord, pictures: Path) -> None:
        """The record's numbers as the run's summary, and the picture of before and after."""
        if self.run is not None:
            import wandb

            self.run.summary.update(summary(record))
            if pictures.exists():
                self.run.log({"before and after": wandb.Image(str(pictures))})

    def table(self, rows: Sequence[tuple[str, str, int, Any, Any]]) -> None:
        """Prompts with their pictures, arrays (H, W, 3): (asked for, prompt, seed, unedited, edited)."""
        if self.run is not None:
            import wandb

            cells = [[*words, wandb.Image(before), wandb.Image(after)] for *words, before, after in rows]
            columns = ["asked for", "prompt", "seed", "unedited", "edited"]
            self.run.log({"pictures": wandb.Table(columns=columns, data=cells)})

    def edit(self, file: Path, name: str) -> None:
        """The edit file, as an artifact that says what made it."""
        if self.run is not None:
            import wandb

            header = read_header(file)
            about = {key: header[key] for key in ("method", "concept", "base", "version", "config")}
            artifact = wandb.Artifact(f"edit-{name}", type="edit", metadata=about)
            artifact.add_file(str(file), name="edit.safetensors")
            self.run.log_artifact(artifact)


def summary(record: RunRecord) -> dict[str, Any]:
    """Stable names: `erasure/ua`, `erasure/ua_base`, `_low`, `_high`, `_n`, and `cost/erase_seconds` and so on."""
    found: dict[str, Any] = {}
    for name, metric in record.metrics.items():
        found[name] = metric["value"]
        found |= {f"{name}_{part}": metric[part] for part in PARTS if metric.get(part) is not None}
    return found | {f"cost/{key}": value for key, value in record.cost.items() if value is not None}


@contextmanager
def harmless() -> Iterator[None]:
    """What goes wrong in here is a warning."""
    try:
        yield
    except Exception as error:
        warn(error)


@contextmanager
def tracking(cfg: DictConfig, folder: Path, run_id: str, job_type: str) -> Iterator[Tracking]:
    """Opens what `cfg.logger` says and closes it, whatever happens, with the exit code. Raises UserError for a logger
    that there is not."""
    kind = str(cfg.logger.name)
    if kind not in LOGGERS:
        raise UserError(f"logger is {', '.join(LOGGERS)}, not '{kind}'{nearest(kind, LOGGERS)}")
    run = None
    if kind == "wandb" and is_rank_zero():
        with harmless():
            run = _begin(cfg, folder, run_id, job_type)
    try:
        yield Tracking(kind, folder, run)
    except BaseException as error:
        if run is not None:
            with harmless():
                if isinstance(error, SystemExit | KeyboardInterrupt):
                    run.mark_preempting()  # the same command goes on with it
                run.finish(exit_code=1)
        raise
    if run is not None:
        with harmless():
            run.finish(exit_code=0)


def _begin(cfg: DictConfig, folder: Path, run_id: str, job_type: str) -> Any:
    import wandb

    mode: Any = str(cfg.logger.mode)
    if mode == "auto":
        mode = "online" if wandb.login(prompt=False) else "offline"
    folder.mkdir(parents=True, exist_ok=True)
    config: Mapping[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    kind = config["concept"].get("kind", "set")
    run = wandb.init(
        project=cfg.logger.project,
        entity=cfg.logger.entity,
        group=cfg.logger.group,
        job_type=job_type,
        name=f"{cfg.method.name} {cfg.concept.name} {cfg.seed}",
        tags=list(dict.fromkeys([cfg.model.name, cfg.method.name, cfg.concept.name, kind, *cfg.logger.tags])),
        config={key: value for key, value in config.items() if key != "logger"},
        id=run_id,
        resume="allow",
        mode=mode,
        dir=folder,
        settings=wandb.Settings(silent=mode == "offline"),
    )
    run.define_metric("trainer/global_step")
    run.define_metric("erase/*", step_metric="trainer/global_step")
    return run
