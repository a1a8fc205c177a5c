"""Evaluator: which pictures to paint, and what they say. Knows nothing of Lightning, ranks or run folders.

A rank paints `missing(...)[rank::world]` batch by batch (`paint`, and `read` if it likes); then `score` turns what is
on disk into numbers, one batch in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unpaint.concepts import IN_SET, NEUTRAL, OUT_OF_SET, STATIC, TARGET, AnyConcept
from unpaint.errors import UserError, nearest
from unpaint.evaluation.detectors import Detector
from unpaint.evaluation.grid import grid
from unpaint.evaluation.metrics import Metric, asked
from unpaint.evaluation.metrics.rates import shown
from unpaint.evaluation.pictures import Batch, PictureStore, batches_of, neutral
from unpaint.evaluation.prompt_lists import cases_of, prompts_from_csv

if TYPE_CHECKING:
    from unpaint.model import TextToImage
    from unpaint.sampling import Sampler


class Evaluator:
    """Metrics that share a detector, a sampler and the pictures.

    metrics: any name -> Metric; the order is the record's. prompts_csv: a file of prompts that ask for the concept,
    see `prompt_lists`; prompts_part: the part that they belong to, `static` or `out_of_set`. times: how many times as
    many pictures as the concept says, as far as it has different prompts.
    Raises UserError on two metrics of one name.
    """

    def __init__(
        self,
        metrics: Mapping[str, Metric],
        detector: Detector,
        sampler: Sampler,
        batch_size: int = 16,
        prompts_csv: str | None = None,
        prompts_part: str = STATIC,
        times: int = 1,
    ) -> None:
        self.metrics = list(metrics.values())
        self.detector = detector
        self.sampler = sampler
        self.batch_size = batch_size
        self.prompts_csv = prompts_csv
        self.prompts_part = prompts_part
        self.times = times
        names = [metric.name for metric in self.metrics]
        if not names:
            raise UserError("the evaluator has no metrics; give it one, e.g. +metric@evaluator.metrics.ua=ua")
        if len(set(names)) < len(names):
            raise UserError(f"two metrics of the evaluator are called '{max(names, key=names.count)}'")
        for key, number in (("batch_size", batch_size), ("times", times)):
            if number < 1:
                raise UserError(f"evaluator.{key} is at least 1, not {number}")
        if prompts_part not in (STATIC, OUT_OF_SET):
            raise UserError(f"evaluator.prompts_part is {STATIC} or {OUT_OF_SET}, not '{prompts_part}'")

    def check_model(self, name: str) -> None:
        """Raises UserError if the detector does not know this model's pictures."""
        only = self.detector.only_for
        if only not in (None, name):
            raise UserError(
                f"the detector knows the pictures of model '{only}' only, not those of '{name}'; "
                "give another: detector@evaluator.detector=NAME"
            )

    def plan(self, concept: AnyConcept, seed: int) -> list[Batch]:
        """The batches to paint, a pure function of concept, seed, sampler and file of prompts.

        The same for edited and unedited, but for those of neutral prompts (`Batch.answers`), which only the unedited
        model paints. Only parts that some metric looks at are painted. Raises UserError when there is nothing to
        paint or the detector does not know a label that a metric counts.
        """
        parts = {part for metric in self.metrics for part in metric.parts}
        wanted = parts | ({IN_SET} if NEUTRAL in parts else set())
        cases = concept.cases(seed, self.times)
        if self.prompts_csv:
            cases += cases_of(prompts_from_csv(Path(self.prompts_csv).expanduser()), concept, self.prompts_part, seed)
        cases = [case for case in cases if case.part in wanted]
        if not cases:
            raise UserError(f"concept '{concept.name}' has no prompts for the metrics of this evaluator: zero pictures")
        known = list(self.detector.labels)
        for metric in self.metrics:
            for label in (label for _, labels in asked(cases, metric) for label in labels if metric.reader is None):
                if label not in known:
                    raise UserError(
                        f"concept '{concept.name}': detector {self.detector.identity} lacks '{label}'"
                        f"{nearest(label, known)}"
                    )
        batches = batches_of(cases, self.batch_size, self.sampler)
        targets = [batch for batch in batches if NEUTRAL in parts and batch.cases[0].part == IN_SET]
        return batches + [neutral(batch, self.batch_size) for batch in targets]

    def missing(self, store: PictureStore, key: str, batches: Iterable[Batch]) -> list[Batch]:
        """Those whose pictures are not in the store, or not intact."""
        return [batch for batch in batches if store.pictures(key, batch) is None]

    def paint(self, model: TextToImage, store: PictureStore, key: str, batch: Batch) -> None:
        """Paint one batch with the model as it is now, and keep it."""
        from unpaint.sampling import paint

        # One call a batch, padded there: the pictures do not depend on what else is painted.
        pictures = list(paint(model, batch.prompts, batch.seeds, batch.sampler, self.batch_size))
        store.keep_pictures(key, batch, torch.cat(pictures))

    def read(
        self, store: PictureStore, key: str, batch: Batch, device: str | torch.device = "cpu", of: Batch | None = None
    ) -> list[NDArray[Any] | None]:
        """What each metric's reader says of the batch, from the store or by looking at the stored pictures.

        One array (n, ...) a metric, in order; None for a metric that no case of the batch concerns. With `of`, the
        pictures are those of that batch, and only the prompts are the batch's own. Raises UserError if the pictures
        are not there, or on an answer that is not a number.
        """
        pictures: Tensor | None = None
        found: dict[str, Tensor] = {}
        readings: list[NDArray[Any] | None] = []
        for metric in self.metrics:
            if not asked(batch.cases, metric):
                readings.append(None)
                continue
            name = (metric.reader or self.detector).identity + (".answers" if of else "")
            if name not in found:
                kept = store.reading(key, name, batch)
                if kept is None:
                    pictures = self._pictures(store, key, of or batch).to(device) if pictures is None else pictures
                    kept = self._look(metric, pictures, batch).float().cpu()
                    if not torch.isfinite(kept).all():
                        raise UserError(f"{name} answers with NaN for the pictures of '{batch.prompts[0]}' and after")
                    store.keep_reading(key, name, batch, kept)
                found[name] = kept
            readings.append(found[name].numpy())
        return readings

    def _look(self, metric: Metric, pictures: Tensor, batch: Batch) -> Tensor:
        # The batch is filled up: as with painting, the last bits may depend on how many rows run together.
        count = len(pictures)
        rows = [min(row, count - 1) for row in range(self.batch_size)]
        if metric.reader is None:
            return self.detector(pictures[rows].float() / 255)[:count]
        return metric.reader.read(pictures[rows], [batch.prompts[row] for row in rows])[:count]

    def _beside_base(
        self, store: PictureStore, key: str, base: str, batch: Batch, device: str | torch.device
    ) -> list[NDArray[Any] | None]:
        """As `read`, and for neutral prompts (n, 2, ...): of this model's answers to the prompts with the concept, and
        of the unedited model's pictures."""
        if batch.answers is None:
            return self.read(store, key, batch, device)
        own, reference = self.read(store, key, batch, device, batch.answers), self.read(store, base, batch, device)
        return [
            None if one is None or other is None else np.stack([one, other], axis=1)
            for one, other in zip(own, reference, strict=True)
        ]

    def _pictures(self, store: PictureStore, key: str, batch: Batch) -> Tensor:
        pictures = store.pictures(key, batch)
        if pictures is None:
            raise UserError(
                f"the pictures of '{batch.cases[0].prompt}' (and {len(batch.cases) - 1} more) are missing or damaged "
                f"in {store.folder}; the same command again paints them"
            )
        return pictures

    def score(
        self,
        store: PictureStore,
        edited: str,
        base: str,
        batches: Sequence[Batch],
        device: str | torch.device = "cpu",
    ) -> dict[str, dict[str, Any]]:
        """Metric name -> what the record holds of it, from the stored pictures of both models.

        Keys: value, low, high, n, base, base_low, base_high, delta, delta_low, delta_high (edited - base, paired by
        prompt and seed), higher_is_better, unit, title, detector. A metric that nothing in the batches concerns (a
        concept without neighbours) is left out.
        """
        parts: dict[str, list[list[NDArray[np.float64]]]] = {metric.name: [[], []] for metric in self.metrics}
        for batch in batches:
            for side, key in enumerate((edited, base)):
                readings = self._beside_base(store, key, base, batch, device)
                for metric, reading in zip(self.metrics, readings, strict=True):
                    if reading is not None:
                        parts[metric.name][side].append(metric.part(batch.cases, reading, self.detector))
        return {
            metric.name: {
                **metric.finish(*parts[metric.name]),
                "higher_is_better": metric.higher_is_better,
                "unit": metric.unit,
                "title": metric.title,
                "detector": (metric.reader or self.detector).identity,
            }
            for metric in self.metrics
            if any(len(part) for part in parts[metric.name][0])
        }

    def unlearning_accuracy(self, model: TextToImage, concept: AnyConcept, seed: int, pictures: int = 64) -> float:
        """A quick look at the model as it is now: UA over the first target prompts, with seeds that no report uses."""
        from unpaint.sampling import paint, seed_of

        cases = [case for case in concept.cases(seed) if case.part == IN_SET][:pictures]
        labels = [[label for label, role in case.wants.items() if role == TARGET] for case in cases]
        seeds = [seed_of("probe", seed, row) for row in range(len(cases))]
        found = 0
        rows = iter(labels)
        for batch in paint(model, [case.prompt for case in cases], seeds, self.sampler, self.batch_size):
            probabilities = self.detector(batch.to(model.device).float() / 255).cpu().numpy()
            asked_for = [(row, next(rows)) for row in range(len(batch))]
            found += int(shown(asked_for, probabilities, self.detector).sum())
        return 1 - found / len(cases)

    def grid(
        self, store: PictureStore, edited: str, base: str, batches: Sequence[Batch], concept: AnyConcept, path: Path
    ) -> Path:
        """Write a before/after picture of what was painted; see `grid.grid`."""
        first: dict[str, Batch] = {}
        for batch in batches:
            if batch.answers is None:
                first.setdefault(batch.cases[0].group, batch)
        beside = [(b, self._pictures(store, base, b), self._pictures(store, edited, b)) for b in first.values()]
        return grid(beside, concept, path)
