"""Evaluator: which pictures to paint, and what they say. Knows nothing of Lightning, ranks or run folders.

A rank paints `missing(...)[rank::world]` batch by batch (`paint`, and `read` if it likes); then `score` turns what is
on disk into numbers, one batch in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unpaint.cases import IN_SET, NEUTRAL, OUT_OF_SET, STATIC, TARGET
from unpaint.concepts import AnyConcept, Concept
from unpaint.errors import UserError, nearest
from unpaint.evaluation.detectors import Detector
from unpaint.evaluation.grid import grid
from unpaint.evaluation.metrics import Metric, PairReader, ReferenceMetric, asked
from unpaint.evaluation.metrics.rates import shown
from unpaint.evaluation.pictures import Batch, PictureStore, batches_of, neutral
from unpaint.evaluation.prompt_lists import cases_of, prompts_from_csv
from unpaint.progress import bar

if TYPE_CHECKING:
    from unpaint.edit import Edit
    from unpaint.evaluation.attacks import Attack
    from unpaint.evaluation.restoration import Relearning
    from unpaint.model import TextToImage
    from unpaint.sampling import Sampler


class _FromDisk(Sequence[NDArray[np.float64]]):
    """One part a batch, made each time it is asked for."""

    def __init__(self, batches: Sequence[Batch], part: Callable[[Batch], NDArray[np.float64]]) -> None:
        self.batches = batches
        self.part = part

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: Any) -> Any:
        return [self.part(batch) for batch in self.batches[i]] if isinstance(i, slice) else self.part(self.batches[i])


class Evaluator:
    """Metrics that share a detector, a sampler and the pictures.

    metrics: any name -> Metric; the order is the record's. prompts_csv: a file of prompts that ask for the concept,
    see `prompt_lists`; prompts_part: the part that they belong to, `static` or `out_of_set`. times: how many times as
    many pictures as the concept says, as far as it has different prompts. relearning: how to try whether what was
    erased can be brought back, None to leave that out; see `restoration`. attacks: any name -> Attack; control: a
    concept that the model never learned, attacked in the same way, None to leave that out; see `attacks`.
    control_prompts: with at most so many prompts, None for as many as the concept.
    Raises UserError on two metrics or attacks of one name, and on a file of prompts that nothing looks at.
    """

    def __init__(
        self,
        metrics: Mapping[str, Metric | ReferenceMetric],
        detector: Detector,
        sampler: Sampler,
        batch_size: int = 16,
        prompts_csv: str | None = None,
        prompts_part: str = STATIC,
        times: int = 1,
        relearning: Relearning | None = None,
        attacks: Mapping[str, Attack] | None = None,
        control: Concept | None = None,
        control_prompts: int | None = None,
    ) -> None:
        self.metrics = list(metrics.values())
        self.detector = detector
        self.sampler = sampler
        self.batch_size = batch_size
        self.prompts_csv = prompts_csv
        self.prompts_part = prompts_part
        self.times = times
        self.relearning = relearning
        self.attacks = list((attacks or {}).values())
        self.control = control
        self.control_prompts = control_prompts
        names = [metric.name for metric in self.metrics]
        if not names:
            raise UserError("the evaluator has no metrics; give it one, e.g. +metric@evaluator.metrics.ua=ua")
        if len(set(names)) < len(names):
            raise UserError(f"two metrics of the evaluator are called '{max(names, key=names.count)}'")
        attacked_by = [attack.name for attack in self.attacks]
        if len(set(attacked_by)) < len(attacked_by):
            raise UserError(f"two attacks of the evaluator are called '{max(attacked_by, key=attacked_by.count)}'")
        least_one = {"batch_size": batch_size, "times": times, "control_prompts": control_prompts}
        for key, number in least_one.items():
            if number is not None and number < 1:
                raise UserError(f"evaluator.{key} is at least 1, not {number}")
        if prompts_part not in (STATIC, OUT_OF_SET):
            raise UserError(f"evaluator.prompts_part is {STATIC} or {OUT_OF_SET}, not '{prompts_part}'")
        if prompts_csv and not self.attacks and not any(prompts_part in metric.parts for metric in self.metrics):
            name = {STATIC: "static", OUT_OF_SET: "ua_out_of_set"}[prompts_part]
            raise UserError(
                f"evaluator.prompts_csv: no metric of this evaluator counts its prompts ({prompts_part}); "
                f"add one: +metric@evaluator.metrics.{name}={name}"
            )

    def check_model(self, name: str) -> None:
        """Raises UserError if the detector or the control of attacks does not know this model's pictures."""
        if self.control is not None:
            if name != "picturebook":
                raise UserError(
                    f"the control of attacks ({self.control.name}) is drawn as Picturebook draws, not for model "
                    f"'{name}'; leave it out: ~concept@evaluator.control"
                )
            self._check_known(self.control.name, self.control.labels)
        only = self.detector.only_for
        if only not in (None, name):
            raise UserError(
                f"the detector knows the pictures of model '{only}' only, not those of '{name}'; "
                "give another: detector@evaluator.detector=NAME"
            )

    def check_attacks(self, source: str, concept: AnyConcept, seed: int) -> None:
        """Raises UserError if the options of an attack do not fit the model or a prompt. source: folder or hub id of
        the model, of which only the tokenizer is loaded; nothing is checked of a model that is not on this machine."""
        if not self.attacks:
            return
        from transformers import CLIPTextConfig, CLIPTokenizer

        from unpaint.evaluation.attacks.engine import check
        from unpaint.model import prompt_length

        try:
            tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", local_files_only=True)
            config = CLIPTextConfig.from_pretrained(source, subfolder="text_encoder", local_files_only=True)
        except (OSError, ValueError):
            return  # loading the model says what is wrong
        for attack in self.attacks:
            check(attack, self, concept, seed, tokenizer, prompt_length(tokenizer, config))

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
        for metric in self.metrics:
            if metric.reader is None:
                self._check_known(concept.name, [label for _, labels in asked(cases, metric) for label in labels])
        batches = batches_of(cases, self.batch_size, self.sampler)
        targets = [batch for batch in batches if NEUTRAL in parts and batch.cases[0].part == IN_SET]
        return batches + [neutral(batch, self.batch_size) for batch in targets]

    def _check_known(self, concept: str, labels: Iterable[str]) -> None:
        known = list(self.detector.labels)
        for label in labels:
            if label not in known:
                raise UserError(
                    f"concept '{concept}': detector {self.detector.identity} lacks '{label}'{nearest(label, known)}"
                )

    def references(self, batches: Sequence[Batch]) -> list[Batch]:
        """What the unedited model paints beside the plan, for metrics that compare with it; each batch once."""
        found = {batch.name: batch for metric in self.metrics for batch in self._reference(metric, batches)}
        planned = {batch.name for batch in batches}
        return [batch for name, batch in found.items() if name not in planned]

    def _reference(self, metric: Metric | ReferenceMetric, batches: Sequence[Batch]) -> list[Batch]:
        if not isinstance(metric, ReferenceMetric):
            return []
        cases = [case for batch in batches for case in batch.cases if asked([case], metric)]
        return batches_of(metric.reference(cases), self.batch_size, self.sampler)

    def missing(self, store: PictureStore, key: str, batches: Iterable[Batch]) -> list[Batch]:
        """Those whose pictures are not in the store, or not intact."""
        return [batch for batch in batches if store.pictures(key, batch) is None]

    def paint(self, model: TextToImage, store: PictureStore, key: str, batch: Batch) -> None:
        """Paint one batch with the model as it is now, and keep it."""
        from unpaint.sampling import paint

        # One call a batch, padded there: the pictures do not depend on what else is painted.
        pictures = list(paint(model, batch.prompts, batch.seeds, batch.sampler, self.batch_size))
        store.keep_pictures(key, batch, torch.cat(pictures))

    def read(self, store: PictureStore, key: str, batch: Batch, device: str | torch.device = "cpu") -> None:
        """Let every judge that is asked about the batch look at its stored pictures, unless it has already.

        Pairs, and the answers to neutral prompts, are left to `score`. Raises UserError if the pictures are not there,
        or on an answer that is not a number.
        """
        for metric in self.metrics:
            if asked(batch.cases, metric) and not isinstance(metric.reader, PairReader):
                self._reading(metric, store, key, key, batch, batch, device)

    def _reading(
        self,
        metric: Metric | ReferenceMetric,
        store: PictureStore,
        key: str,
        base: str,
        batch: Batch,
        of: Batch,
        device: str | torch.device,
    ) -> NDArray[Any]:
        """What the metric's judge says, (n, ...), with the batch's prompts, of the pictures of the batch `of`; from the
        store or by looking at the stored pictures."""
        pairs = isinstance(metric.reader, PairReader)
        name = (metric.reader or self.detector).identity
        kind = name + (f"-{base}" if pairs else "") + ("" if of is batch else ".answers")
        kept = store.reading(key, kind, batch)
        if kept is None:
            sides = [self._pictures(store, side, of).to(device) for side in ((key, base) if pairs else (key,))]
            kept = self._look(metric, sides, batch).float().cpu()
            if not torch.isfinite(kept).all():
                raise UserError(f"{name} answers with NaN for the pictures of '{batch.prompts[0]}' and after")
            store.keep_reading(key, kind, batch, kept)
        return kept.numpy()

    def _look(self, metric: Metric | ReferenceMetric, sides: Sequence[Tensor], batch: Batch) -> Tensor:
        # The batch is filled up: as with painting, the last bits may depend on how many rows run together.
        count = len(batch.cases)
        rows = [min(row, count - 1) for row in range(self.batch_size)]
        pictures, *unedited = (side[rows] for side in sides)
        if metric.reader is None:
            return self.detector(pictures.float() / 255)[:count]
        if isinstance(metric.reader, PairReader):
            return metric.reader.compare(pictures, *unedited)[:count]
        return metric.reader.read(pictures, [batch.prompts[row] for row in rows])[:count]

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
        prompt and seed), higher_is_better, unit, title, detector and its false_positive_rate where known. A metric that
        nothing in the batches concerns (a concept without neighbours) is left out.
        """
        scores: dict[str, dict[str, Any]] = {}
        for metric in self.metrics:
            own = [batch for batch in batches if asked(batch.cases, metric)]
            after, before = (self._parts(metric, store, key, base, own, device) for key in (edited, base))
            if not any(len(part) for part in after):
                continue
            if isinstance(metric, ReferenceMetric):
                reference = self._parts(metric, store, base, base, self._reference(metric, batches), device)
                found = metric.finish(after, before, reference)
            else:
                found = metric.finish(after, before)
            scores[metric.name] = {
                **found,
                "higher_is_better": metric.higher_is_better,
                "unit": metric.unit,
                "title": metric.title,
                "detector": (metric.reader or self.detector).identity,
            }
            false_positives = getattr(self.detector, "false_positive_rate", None)
            if metric.reader is None and false_positives is not None:
                scores[metric.name]["false_positive_rate"] = false_positives
        return scores

    def _parts(
        self,
        metric: Metric | ReferenceMetric,
        store: PictureStore,
        key: str,
        base: str,
        batches: Sequence[Batch],
        device: str | torch.device,
    ) -> Sequence[NDArray[np.float64]]:
        def part(batch: Batch) -> NDArray[np.float64]:
            reading = self._reading(metric, store, key, base, batch, batch.answers or batch, device)
            if batch.answers is not None:
                # Neutral prompts: beside this model's answer to the concept, the unedited model's to them.
                neutral = self._reading(metric, store, base, base, batch, batch, device)
                reading = np.stack([reading, neutral], axis=1)
            return metric.part(batch.cases, reading, self.detector)

        return _FromDisk(batches, part)

    def restored(
        self, model: TextToImage, edit: Edit, parts: Mapping[str, Edit], concept: AnyConcept, seed: int
    ) -> dict[str, dict[str, Any]]:
        """How easily what was erased comes back, if `relearning` says so: by fine-tuning, and for a concept set with an
        edit a member (`parts`) by taking edits out. `model` is unedited when it comes in and goes out."""
        from unpaint.evaluation.restoration import relearn, subsets

        if self.relearning is None:
            return {}
        advance = bar("relearning", self.relearning.steps)
        found = {"restoration/relearning": relearn(model, edit, concept, self, seed, self.relearning, progress=advance)}
        if parts:
            members = {member.name: member for member in concept.members}
            count = self.relearning.judged
            advance = bar("edits put on and taken off", count * len(parts) * (2 * len(parts) + 2))
            found["restoration/subsets"] = subsets(model, parts, members, self, seed, count, progress=advance)
        return found

    def attack(
        self,
        model: TextToImage,
        edit: Edit,
        concept: AnyConcept,
        seed: int,
        cache: Path,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """This rank's share of all attacks; what came out is kept in the cache, for `attacked`. `model` is unedited
        when it comes in and goes out."""
        from unpaint.evaluation.attacks.engine import Campaign

        if not self.attacks:
            return
        campaign = Campaign(self, model, edit, concept, seed, cache)
        for attack in self.attacks:
            advance = bar(f"attack: {attack.name}", campaign.work(attack, rank, world), show=rank == 0)
            campaign.run(attack, rank, world, advance)

    def attacked(
        self, model: TextToImage, edit: Edit, concept: AnyConcept, seed: int, cache: Path, folder: Path
    ) -> dict[str, dict[str, Any]]:
        """What all ranks' attacks came to, by the metric's name; the prompts found are written to `folder`."""
        from unpaint.evaluation.attacks.engine import Campaign
        from unpaint.evaluation.attacks.outcomes import found_prompts

        if not self.attacks:
            return {}
        campaign = Campaign(self, model, edit, concept, seed, cache)
        found_prompts(
            {attack.name: campaign.outcomes(attack, concept) for attack in self.attacks}, self.sampler.guidance, folder
        )
        scores = {name: score for attack in self.attacks for name, score in campaign.scores(attack).items()}
        return scores | campaign.union_scores(self.attacks)

    def unlearning_accuracy(self, model: TextToImage, concept: AnyConcept, seed: int, pictures: int = 64) -> float:
        """A quick look at the model as it is now: UA over the first target prompts, with seeds that no report uses."""
        from unpaint.sampling import paint
        from unpaint.seeds import seed_of

        cases = [case for case in concept.cases(seed) if case.part == IN_SET][:pictures]
        labels = [[label for label, role in case.wants.items() if role == TARGET] for case in cases]
        seeds = [seed_of("probe", seed, row) for row in range(len(cases))]
        found = 0
        rows = iter(labels)
        for batch in paint(model, [case.prompt for case in cases], seeds, self.sampler, self.batch_size):
            # In a run with mixed precision it answers in half.
            probabilities = self.detector(batch.to(model.device).float() / 255).float().cpu().numpy()
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

    def samples(
        self, store: PictureStore, edited: str, base: str, batches: Sequence[Batch], most: int
    ) -> list[tuple[str, str, int, NDArray[np.uint8], NDArray[np.uint8]]]:
        """Up to `most` of what was painted, from every group the same number: (group, prompt, seed, picture of the
        unedited model, of the edited one), pictures (H, W, 3)."""
        first: dict[str, Batch] = {}
        for batch in batches:
            if batch.answers is None:
                first.setdefault(batch.cases[0].group, batch)
        each = max(1, most // max(1, len(first)))
        rows = []
        for group, batch in list(first.items())[:most]:
            before, after = (self._pictures(store, key, batch).permute(0, 2, 3, 1).numpy() for key in (base, edited))
            rows += [(group, batch.prompts[i], batch.seeds[i], before[i], after[i]) for i in range(len(before))][:each]
        return rows
