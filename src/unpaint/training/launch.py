"""The Lightning Trainer of a run: device, ranks and precision from the config, and nothing printed twice."""

import logging
import warnings
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from unpaint.errors import UserError


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
