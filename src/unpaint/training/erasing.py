"""One LightningModule that drives any method, with what it takes to stop and go on anywhere."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from unpaint.concepts import AnyConcept, Concept
from unpaint.edit import Edit
from unpaint.methods.base import Job, Method
from unpaint.model import TextToImage
from unpaint.progress import bar
from unpaint.training.launch import all_or_none


class Erasing(LightningModule):
    """Runs a method's steps, from the unedited model or from what the edit `start` made of it.

    Only what the method trains, and its `own`, is in the saved state; the pipeline stays outside.

    `seconds` is erase time: preparation, steps and `finish`, without probes and checkpoints. `steps_done` counts
    batches: neither Lightning's `global_step` (optimiser steps) nor its epochs mean the same for every method.
    """

    def __init__(
        self,
        method: Method,
        model: TextToImage,
        concept: AnyConcept,
        seed: int,
        config: dict[str, Any],
        cache: Path,
        beside: tuple[Concept, ...] = (),
        start: Edit | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.method = method
        self.text_to_image = model
        self.concept = concept
        self.beside = beside
        self.start = start
        self.seed = seed
        self.header_config = config
        self.cache = cache
        self.steps_done = 0
        self.seconds = 0.0
        self.optimizer_steps = 0
        self.seconds_to_ua95: float | None = None

    def setup(self, stage: str) -> None:
        """Rank 0 prepares first, so that what it leaves in the cache is there for the others."""
        model = self.text_to_image.to(self.trainer.strategy.root_device)
        started = self.now()
        model.pipe.unet.requires_grad_(False)
        self.unedited = model.base_weights(self.method.group)
        self.weights = model.group(self.method.group)
        for key, parameter in self.weights.items():
            parameter.data = parameter.data.float()
            if self.start is not None and key in self.start.delta:
                parameter.data += self.start.delta[key].to(parameter.device)
            parameter.requires_grad_(True)
        self.base = model.base_weights(self.method.group) if self.start is not None else self.unedited
        for turn in (True, False):
            with all_or_none(self.trainer.strategy), self.mixed():
                if self.trainer.is_global_zero == turn:
                    self.method.begin(self._job())
        self.trained = nn.ParameterList(self.weights.values())
        self.own = self.method.own
        self.seconds += self.now() - started

    def now(self) -> float:
        """The time in seconds, once the device has done all that it was asked to: a GPU works through a queue."""
        device = self.text_to_image.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def mixed(self) -> AbstractContextManager[None]:
        """For what Lightning does not run in the precision of the steps. In a model of lower precision the weights
        that are trained, in float32, meet inputs that are not."""
        if self.text_to_image.dtype == torch.float32:
            return nullcontext()
        return self.trainer.precision_plugin.forward_context()

    def _job(self) -> Job:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        show = self.trainer.is_global_zero
        return Job(
            model=self.text_to_image,
            concept=self.concept,
            beside=self.beside,
            seed=self.seed,
            weights=self.weights,
            base=self.base,
            config=self.header_config,
            # What is painted after an edit is not the unedited model's.
            cache=self.cache / "after" / self.start.id if self.start else self.cache,
            mine=slice(rank, None, world),
            update=self.update,
            step=self.step,
            total=self.total,
            progress=lambda text, total: bar(text, total, show=show),
            account=self._account,
        )

    def _account(self, seconds: float) -> None:
        self.seconds += seconds

    def finish(self) -> Edit:
        """The method's edit; the model is left as it was before."""
        # Lightning has moved the trained parameters, and only them, off the device.
        self.text_to_image.to(self.trainer.strategy.root_device)
        started = self.now()
        edit = self.method.finish()
        if self.start is not None:
            pipe, name = self.text_to_image.pipe, self.concept.name
            edit = Edit.from_change(
                pipe, self.unedited, method=self.method.name, concept=name, config=self.header_config
            )
        with torch.no_grad():
            for key, parameter in self.weights.items():
                parameter.requires_grad_(False)
                parameter.grad = None
                parameter.data = self.unedited[key]
        self.seconds += self.now() - started
        return edit

    def update(self, loss: Tensor, i: int = 0, adjust: Callable[[], None] | None = None) -> None:
        """See `Job.update`."""
        optimizer = self._optimizer(i)
        optimizer.zero_grad()
        # DDP's own reduction waits for every parameter, and not every loss concerns all that a method trains.
        with self.trainer.model.no_sync() if self.trainer.world_size > 1 else nullcontext():
            self.manual_backward(loss)
        self._average_gradients(optimizer)
        if adjust is not None:
            adjust()
        self.step(i)

    def step(self, i: int = 0) -> None:
        """See `Job.step`."""
        self._optimizer(i).step()
        self.optimizer_steps += 1

    def total(self, tensor: Tensor) -> Tensor:
        """See `Job.total`."""
        return self.trainer.strategy.reduce(tensor.clone(), reduce_op="sum")

    def _optimizer(self, i: int) -> Any:
        optimizers = self.optimizers()
        return optimizers[i] if isinstance(optimizers, list) else optimizers

    def _average_gradients(self, optimizer: Any) -> None:
        world = self.trainer.world_size
        if world == 1:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # As one tensor: a reduction costs a round trip, and a UNet has hundreds of small ones.
        whole = self.total(torch.cat([gradient.flatten() for gradient in gradients])) / world
        for gradient, mean in zip(gradients, whole.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def configure_optimizers(self) -> list[Optimizer]:
        return self.method.optimizers()

    def train_dataloader(self) -> "Steps":
        return Steps(self)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> None:
        started = self.now()
        logs = self.method.step(batch)
        self.steps_done += 1
        self.seconds += self.now() - started
        self.log_dict({f"erase/{name}": value for name, value in logs.items()}, batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["unpaint"] = {name: getattr(self, name) for name in _COUNTS}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in _COUNTS:
            setattr(self, name, checkpoint["unpaint"][name])


_COUNTS = ("steps_done", "seconds", "optimizer_steps", "seconds_to_ua95")


class Steps:
    """The method's batches from where the module stands; as long as all steps, which is how Lightning counts."""

    def __init__(self, module: Erasing) -> None:
        self.module = module

    def __len__(self) -> int:
        return self.module.method.steps

    def __iter__(self) -> Iterator[Any]:
        batches = self.module.method.batches(self.module.steps_done)
        while True:
            started = self.module.now()
            with self.module.mixed():
                batch = next(batches, None)
            self.module.seconds += self.module.now() - started
            if batch is None:
                return
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"steps_done": self.module.steps_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing to do: the module's own count says where to go on."""


class SaveState(Callback):
    """Saves the state every `seconds`, beside and then renamed, so that there is always one whole file.

    Never more than a tenth of the time goes into it: a large model's state takes a while to write.
    """

    def __init__(self, file: Path, seconds: float) -> None:
        self.file = file
        self.seconds = seconds
        self.saved = time.monotonic()
        self.took = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        started = time.monotonic()
        due = started - self.saved >= (max(self.seconds, 10 * self.took) if self.seconds else 0)
        if not trainer.strategy.broadcast(due):
            return
        self.save(trainer)
        self.took = self.saved - started

    def save(self, trainer: Trainer) -> None:
        """Now, by all ranks."""
        beside = self.file.with_suffix(".tmp")
        trainer.save_checkpoint(beside)
        if trainer.is_global_zero:
            os.replace(beside, self.file)
        self.saved = time.monotonic()


class ShowProgress(Callback):
    """A bar over the method's steps."""

    def __init__(self, description: str) -> None:
        self.description = description

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Erasing)
        total = pl_module.method.steps
        self.advance = bar(self.description, total, pl_module.steps_done, trainer.is_global_zero)

    def on_train_batch_end(self, *_: Any) -> None:
        self.advance(1)


class Probe(Callback):
    """Measures unlearning accuracy `times` times, off the clock, until it first reaches 95 %: on the way, and at last
    that of the edit itself, which some methods make in the end."""

    def __init__(self, times: int, unlearning_accuracy: Callable[[], float]) -> None:
        self.times = times
        self.unlearning_accuracy = unlearning_accuracy

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Erasing)
        steps = pl_module.method.steps
        due = {round((i + 1) * steps / self.times) for i in range(self.times)} - {steps}
        if pl_module.seconds_to_ua95 is None and pl_module.steps_done in due:
            self._look(trainer, pl_module, trainer.precision_plugin.forward_context())

    def last(self, trainer: Trainer, module: Erasing, edit: Edit) -> None:
        """After `Erasing.finish`."""
        if module.seconds_to_ua95 is not None:
            return
        edit.apply(module.text_to_image.pipe)
        try:
            self._look(trainer, module, nullcontext())
        finally:
            edit.remove(module.text_to_image.pipe)

    def _look(self, trainer: Trainer, module: Erasing, precision: AbstractContextManager[None]) -> None:
        reached = False
        if trainer.is_global_zero:
            with precision:
                reached = self.unlearning_accuracy() >= 0.95
        if trainer.strategy.broadcast(reached):
            module.seconds_to_ua95 = module.seconds
