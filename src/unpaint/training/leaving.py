"""What happens when a job is told to go: by SLURM's signals before the time is up, by preemption, by `kill`."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from unpaint.training import launch

# Only the first trainer of a process starts others; they are the ranks of all trainers after it.
_launchers: list[Any] = []


class Leaving(Callback):
    """On SIGTERM, and on those of SIGUSR1 and SIGUSR2 that somebody handles, the step or batch at hand is finished and
    `save` called; only then is the signal handed on, to whoever handled it before. Nobody: exit with 128 + its number.

    unpaint itself requeues nothing: under submitit its handler does, else the batch script or SLURM. Lightning would
    save inside the signal handler, in the middle of a step, and its handler talks to the other ranks from there.
    """

    def __init__(self, save: Callable[[Trainer], None] | None = None) -> None:
        self.save = save
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
        # Here, as Lightning puts its own in their place when the trainer starts, and gives them back at its end.
        before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
        self.before = {n: handler for n, handler in before.items() if n == signal.SIGTERM or callable(handler)}
        self.told = self.saved = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if getattr(launcher := trainer.strategy.launcher, "procs", None) and launcher not in _launchers:
            _launchers.append(launcher)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()

    def _listen(self) -> None:
        def note(number: int, frame: FrameType | None) -> None:
            self.told = number
            # Processes that Lightning started get their signals from here.
            for launcher in _launchers:
                launcher.kill(number)

        if threading.current_thread() is threading.main_thread():
            for number in self.before:
                signal.signal(number, note)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # Saving takes all ranks, so they go together, when rank 0 does.
        self.saved = int(trainer.strategy.broadcast(self.told))
        if self.saved and self.save is not None:
            self.save(trainer)

    def on_train_batch_start(self, *_: Any) -> None:
        # Only now is what the last step said in the curves.
        if self.saved:
            self._go(self.saved)

    def on_train_end(self, *_: Any) -> None:
        if self.saved:
            self._go(self.saved)

    def on_predict_batch_end(self, *_: Any) -> None:
        # What is painted is on disk, and ranks need not have the same number of batches.
        if self.told:
            self._go(self.told)

    def _go(self, number: int) -> None:
        self.told = self.saved = 0
        if callable(handler := self.before.get(number)):
            handler(number, None)  # submitit's for SIGTERM, say, returns: the job goes on until it is killed
        else:
            # If one of its own ends otherwise than well, Lightning kills the rank that started it, whatever it is at.
            raise SystemExit(0 if launch.started_by_lightning else 128 + number)
