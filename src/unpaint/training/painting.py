"""Painting and reading an evaluation's pictures through the Trainer: each rank takes every world-size-th batch."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from unpaint.evaluation.pictures import Batch, PictureStore
from unpaint.evaluation.suite import Evaluator
from unpaint.model import TextToImage
from unpaint.progress import bar


class Painting(LightningModule):
    """Paints what is missing of the batches it is given, and reads all of them."""

    def __init__(
        self,
        evaluator: Evaluator,
        model: TextToImage,
        store: PictureStore,
        key: str,
        batches: Sequence[Batch],
        text: str,
    ) -> None:
        super().__init__()
        # There may be fewer batches than ranks.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.evaluator = evaluator
        self.text_to_image = model
        self.store = store
        self.key = key
        self.batches = batches
        self.text = text

    def predict_dataloader(self) -> Sequence[int]:
        return range(len(self.batches))[self.trainer.global_rank :: self.trainer.world_size]

    def on_predict_start(self) -> None:
        mine = self.predict_dataloader()
        pictures = sum(len(self.batches[i].cases) for i in mine)
        self.advance = bar(self.text, pictures, show=self.trainer.is_global_zero)

    def predict_step(self, batch: Tensor | int, batch_idx: int) -> None:
        paint = self.batches[int(batch)]
        if self.evaluator.missing(self.store, self.key, [paint]):
            self.evaluator.paint(self.text_to_image, self.store, self.key, paint)
        self.evaluator.read(self.store, self.key, paint, self.text_to_image.device)
        self.advance(len(paint.cases))


def paint_all(trainer: Trainer, *arguments: Any) -> None:
    """Everything painted and read, by all ranks; arguments as for `Painting`."""
    trainer.predict(Painting(*arguments), return_predictions=False)
    trainer.strategy.barrier()
