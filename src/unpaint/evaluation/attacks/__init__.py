"""Attacks: ways to make an edited model show what was erased. One file an attack, or a family of them.

An attack is a generator. It works on a scene, a batch of prompts for which the edited model does not show the concept,
and yields pictures; between two of them the scene's `open` shrinks by what was shown. `engine` judges, counts, keeps
and stops it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from unpaint.cases import IN_SET, Case
from unpaint.concepts import Concept
from unpaint.errors import UserError
from unpaint.model import TextToImage
from unpaint.sampling import Sampler, denoise_on, noise, paint
from unpaint.seeds import seed_of


@dataclass(frozen=True)
class Try:
    """Pictures (n, 3, H, W), uint8 on the CPU, one for each of these rows of the scene, and the prompts that painted
    them if they are plain text."""

    rows: Sequence[int]
    pictures: Tensor
    texts: Sequence[str] | None = None


@dataclass
class Scene:
    """What an attack works on, and with.

    model: as it is attacked, with the edit on it. base: the tensors of the UNet before the edit, of those that it
    changes, for `TextToImage.predict(weights=)`. cases: prompts and seeds that ask for the concept. pictures: uint8
    (N, 3, H, W), one a case, that do show it: the unedited model's, or drawings (`drawn`) if the concept is a control
    that no model can paint. sampler: deterministic. open: the rows that nothing has shown yet. folder: for what an
    attack keeps of this model and concept; shared: the same, of what does not depend on the edit.
    """

    model: TextToImage
    base: Mapping[str, Tensor]
    concept: Concept
    cases: Sequence[Case]
    pictures: Tensor
    drawn: bool
    sampler: Sampler
    seed: int
    folder: Path
    shared: Path
    open: list[int]

    def examples(self, count: int) -> tuple[Tensor, list[str]]:
        """Pictures (count, 3, H, W), as `pictures`, of the last of the concept's target prompts, and these prompts."""
        asked = [case for case in self.concept.cases(self.seed) if case.part == IN_SET][-count:]
        return pictures_of(asked, self.drawn, self.model, self.base, self.sampler), [case.prompt for case in asked]

    def generator(self, row: int, *purpose: int) -> torch.Generator:
        """Chance of one row: it does not depend on which other rows are attacked beside it."""
        return torch.Generator().manual_seed(seed_of("attack", self.seed, 8, *purpose, self.cases[row].seed))

    def prompts(self, rows: Sequence[int]) -> list[str]:
        return [self.cases[row].prompt for row in rows]

    def seeds(self, rows: Sequence[int]) -> list[int]:
        return [self.cases[row].seed for row in rows]

    def painted(self, rows: Sequence[int], texts: Sequence[str]) -> Try:
        """These rows from their own seeds, as the model paints these prompts."""
        return Try(rows, torch.cat(list(paint(self.model, texts, self.seeds(rows), self.sampler, len(rows)))), texts)

    @torch.no_grad()
    def finished(self, latents: Tensor) -> Tensor:
        """The pictures, uint8 on the CPU, of finished latents. Raises UserError on NaN."""
        decoded = self.model.decode(latents)
        # As bytes it would be a black picture, on which nothing is shown: the attack would seem to have failed.
        if not torch.isfinite(decoded).all():
            raise UserError(
                f"an attack on '{self.concept.name}' paints NaN: the weights or dtype of the model, or the attack's "
                "options, are broken"
            )
        return (decoded.float() * 255).round().to(torch.uint8).cpu()

    @torch.no_grad()
    def painted_by_text(self, rows: Sequence[int], text: Tensor) -> Try:
        """As `painted`, for embeddings (n, L, D) that no prompt has."""
        model = self.model
        start = noise(self.seeds(rows), model.latent_shape, model.device, model.dtype)
        return Try(rows, self.finished(denoise_on(model, start, 0, text, model.encode([""]), self.sampler)))


def pictures_of(
    cases: Sequence[Case], drawn: bool, model: TextToImage, base: Mapping[str, Tensor], sampler: Sampler
) -> Tensor:
    """What the cases ask for, uint8 (n, 3, H, W): drawn by Picturebook's code, or painted with the base weights."""
    if drawn:
        from unpaint.evaluation.metrics.drawings import drawing

        return torch.stack([torch.from_numpy(drawing(case)).permute(2, 0, 1) for case in cases])
    prompts, seeds = [case.prompt for case in cases], [case.seed for case in cases]
    return torch.cat(list(paint(model, prompts, seeds, sampler, min(16, len(cases)), weights=base)))


@dataclass(frozen=True)
class Terms:
    """What an attack is told before anything heavy is loaded. steps: the sampler's. length: how many tokens a prompt of
    the model takes, without both ends. prompts: the tokens, without ends, of each prompt that is to be attacked."""

    steps: int
    length: int
    prompts: Sequence[Sequence[int]]


@runtime_checkable
class Particular(Protocol):
    """An attack whose options do not fit every model, prompt and sampler."""

    def check(self, terms: Terms) -> None:
        """Raises UserError if they do not fit these."""
        ...


@runtime_checkable
class Once(Protocol):
    """An attack that looks for one thing, the same for all prompts of a concept, and keeps it in the scene's folder.
    The first batch may take the time of all, and the others try what it found; if its time was over before that, so is
    theirs."""

    @property
    def once(self) -> bool: ...


class Attack(Protocol):
    """A way to bring a concept back; a frozen dataclass whose fields are its options.

    name: as in `attack/<name>/asr`. title: a few words for the table. prompts: how many of the target's prompts are
    attacked. at_n: pictures a found prompt gets, from as many seeds, for `asr_at_n`; 1 where what is found is no text.
    max_seconds: the search ends after so long, for one concept. tries: how many times at most it yields pictures of a
    row.
    """

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def prompts(self) -> int: ...

    @property
    def at_n(self) -> int: ...

    @property
    def max_seconds(self) -> float: ...

    @property
    def tries(self) -> int: ...

    def attempts(self, scene: Scene) -> Iterator[Try | None]:
        """Pictures of rows that are still open, until it knows no more; None now and then, to be stopped there."""
        ...


def digest(content: object) -> str:
    """16 hex digits of what can be written as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def digest_of(case: Case) -> str:
    """Names a case: prompt, seed, labels, and its guidance if it has its own."""
    own = [] if case.guidance is None else [case.guidance]
    return digest([case.prompt, case.seed, sorted(case.wants.items()), *own])
