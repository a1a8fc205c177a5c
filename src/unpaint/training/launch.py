"""The Lightning Trainer of a run: device, ranks, precision and logger from the config, and nothing printed twice."""

import logging
import warnings
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from unpaint.errors import UserError, nearest


def new_trainer(
    cfg: DictConfig, folder: Path, callbacks: list[Callback], logger: Logger | None = None, **more: Any
) -> Trainer:
    """A Trainer with the arguments of `cfg.trainer`, and `more`. Raises UserError where Lightning refuses them."""
    _quiet()
    arguments: dict[str, Any] = {**OmegaConf.to_container(cfg.trainer, resolve=True), **more}  # type: ignore[dict-item]
    try:
        if SLURMEnvironment.detect():
            # See `Leaving`: Lightning is not to requeue the job.
            arguments.setdefault("plugins", SLURMEnvironment(auto_requeue=False))
        return Trainer(
            **arguments,
            max_epochs=1,
            default_root_dir=folder,
            callbacks=callbacks,
            logger=logger or False,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            inference_mode=False,
        )
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"trainer: {line}") from error


def new_logger(cfg: DictConfig, folder: Path, run_id: str, curves: str = "") -> Logger | None:
    """The logger of the erasing half. `curves` names the CSV file by the step it starts at: Lightning would delete the
    curves of the part before a kill."""
    if cfg.logger.name == "none":
        return None
    if cfg.logger.name == "csv":
        return CSVLogger(save_dir=folder, name="log", version=curves, flush_logs_every_n_steps=1)
    if cfg.logger.name == "wandb":
        import wandb
        from lightning.pytorch.loggers import WandbLogger

        keys = ["project", "entity", "group", "tags"]
        settings: Any = OmegaConf.to_container(OmegaConf.masked_copy(cfg.logger, keys))
        mode = str(cfg.logger.mode)
        if mode == "auto":
            mode = "online" if wandb.login(prompt=False) else "offline"
        folder.mkdir(parents=True, exist_ok=True)
        # Not WandbLogger's own `offline`: it sets an environment variable that outlives the run.
        return WandbLogger(save_dir=folder, id=run_id, resume="allow", mode=mode, **settings)
    name = str(cfg.logger.name)
    raise UserError(f"logger is csv, wandb or none, not '{name}'{nearest(name, ('csv', 'wandb', 'none'))}")


def close(logger: Logger | None, failed: bool = False) -> None:
    """Ends what the logger opened: a wandb run would otherwise swallow the next run of the same process."""
    if logger is not None:
        logger.finalize("failed" if failed else "success")
        if hasattr(logger.experiment, "finish"):
            logger.experiment.finish(exit_code=int(failed))


def mirror(cfg: DictConfig, folder: Path, run_id: str, metrics: dict[str, dict[str, Any]], picture: Path) -> None:
    """The record's numbers and the before/after picture, to wandb if that is the logger. The record is what counts:
    a mirror that fails is a warning."""
    if cfg.logger.name != "wandb":
        return
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    try:
        logger = new_logger(cfg, folder, run_id)
        assert isinstance(logger, WandbLogger)
        logger.log_metrics({name: metric["value"] for name, metric in metrics.items()})
        logger.log_image("before and after", [str(picture)])
        close(logger)
    except wandb.Error as error:
        warnings.warn(f"wandb did not take the results: {error}", stacklevel=2)


def is_rank_zero() -> bool:
    """Whether this process prints and writes what is written once. Known before there is a Trainer."""
    return int(rank_zero_only.rank or 0) == 0


def _quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*LeafSpec.*",
        ".*GPU available but.*",
        ".*predict returned None.*",
        ".*across ranks is zero.*",
        ".*`srun` command is available.*",
    ):
        warnings.filterwarnings("ignore", message=text)
