"""The Lightning Trainer of a run: device, ranks and precision from the config, and nothing printed twice."""

import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from unpaint.errors import UserError

# How long a rank waits for another, which may prepare, attack or score alone meanwhile. PyTorch says 30 or 10 minutes.
PATIENCE = timedelta(days=7)
# Seconds in which a rank may finish what it is at when the one that started it has gone.
GRACE = 30.0
# Whether this process is a rank that Lightning started; known when there is a Trainer.
started_by_lightning = False
_STARTED_BY = "UNPAINT_STARTED_BY"


def new_trainer(
    cfg: DictConfig, folder: Path, callbacks: list[Callback], logger: Logger | None = None, **more: Any
) -> Trainer:
    """A Trainer with the arguments of `cfg.trainer`, and `more`. Raises UserError where Lightning refuses them."""
    _quiet()
    _watch_parent()
    arguments: dict[str, Any] = {**OmegaConf.to_container(cfg.trainer, resolve=True), **more}  # type: ignore[dict-item]
    try:
        if SLURMEnvironment.detect():
            # See `Leaving`: Lightning is not to requeue the job.
            arguments.setdefault("plugins", SLURMEnvironment(auto_requeue=False))
        trainer = Trainer(
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
        # No argument says so for every strategy that comes to it: `auto` with several devices, `ddp_...`.
        if isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy._timeout = PATIENCE
        return trainer
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"trainer: {line}") from error


def is_rank_zero() -> bool:
    """Whether this process prints and writes what is written once. Known before there is a Trainer."""
    return int(rank_zero_only.rank or 0) == 0


@contextmanager
def all_or_none(strategy: Strategy) -> Iterator[None]:
    """A barrier at the end; and if a rank does not come through, no rank does: UserError on the others."""
    try:
        yield
    except Exception:
        strategy.reduce_boolean_decision(True, all=False)
        raise
    if strategy.reduce_boolean_decision(False, all=False):
        raise UserError("another process of this run failed; its message says why")


def _watch_parent() -> None:
    """Lets a rank that Lightning started end soon after the one that started it, however that ended: killed, say, or by
    an error while this one waits for it, for as long as `PATIENCE`."""
    global started_by_lightning
    parent = os.getppid()
    if os.environ.get(_STARTED_BY) == str(parent) and not is_rank_zero():
        started_by_lightning = True
        threading.Thread(target=_watch, args=(parent,), daemon=True, name="parent-process-observer").start()
    os.environ[_STARTED_BY] = str(os.getpid())


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(GRACE)
    # Not SIGTERM: who waits in a collective does not hear of it.
    os.kill(os.getpid(), signal.SIGKILL)


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
