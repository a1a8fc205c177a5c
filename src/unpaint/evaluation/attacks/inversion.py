"""Concept inversion: a token that is learned on the edited model (Pham et al. 2024, arXiv 2308.01508).

Textual inversion (Gal et al. 2022, arXiv 2208.01618): the embedding of one new token is fitted, with everything else
frozen, so that the model denoises a few pictures of the concept. It then stands in the concept's place in its prompts.
What is found is no text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unpaint.concepts import Concept
from unpaint.errors import UserError
from unpaint.evaluation.attacks import Scene, Try
from unpaint.evaluation.attacks.words import Words
from unpaint.seeds import seed_of
from unpaint.tensor_file import read_tensor, write_tensor


@dataclass(frozen=True)
class Inversion:
    """A learned token. Fields beside those of `Attack`:

    pictures: how many pictures of the concept it is learned from, of other prompts than those that are attacked as far
    as there are so many. start: the words whose last token it starts from. steps, lr, batch_size: of Adam, on the
    denoising loss with noise levels drawn at random.
    """

    name: str
    title: str
    pictures: int
    start: str
    steps: int
    lr: float
    batch_size: int
    prompts: int
    max_seconds: float
    at_n = tries = 1
    once = True

    def __post_init__(self) -> None:
        for key in ("pictures", "batch_size"):
            if getattr(self, key) < 1:
                raise UserError(f"attack {self.name}: {key} is at least 1, not {getattr(self, key)}")

    def attempts(self, scene: Scene) -> Iterator[Try | None]:
        if not self.steps:
            return
        words = Words(scene.model)
        file = scene.folder / "token.safetensors"
        if (kept := read_tensor(file)) is None:
            lesson = Lesson(self, scene, words)
            for step in range(self.steps):
                lesson.step(step)
                yield None
            token = lesson.token.detach()
            if not torch.isfinite(token).all():
                raise UserError(f"attack {self.name}: what it learned is NaN; try a smaller lr than {self.lr}")
            write_tensor(file, token)
        else:
            token = kept[0].to(scene.model.device)
        rows = list(scene.open)
        with torch.no_grad():
            text = with_token(words, scene.concept, scene.prompts(rows), token)
        yield scene.painted_by_text(rows, text)


class Lesson:
    """The fitting of one token, (D,)."""

    def __init__(self, attack: Inversion, scene: Scene, words: Words) -> None:
        self.attack, self.scene, self.words = attack, scene, words
        pictures, self.prompts = scene.examples(attack.pictures)
        self.latents = scene.model.latents_of(pictures)
        first = words.encoder.get_input_embeddings().weight[words.ids(attack.start)[-1]]
        self.token: Tensor = first.detach().float().clone().requires_grad_(True)
        self.optimizer: Any = torch.optim.Adam([self.token], lr=attack.lr)

    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        self.loss(step).backward()
        self.optimizer.step()

    def loss(self, step: int) -> Tensor:
        """Mean squared error of the predicted noise, t uniform over all noise levels."""
        model, count = self.scene.model, self.attack.batch_size
        rng = torch.Generator().manual_seed(seed_of("attack", self.scene.seed, 10, step))
        which = torch.randint(len(self.latents), (count,), generator=rng)
        t = torch.randint(len(model.alphas_cumprod), (count,), generator=rng).to(model.device)
        eps = torch.randn((count, *model.latent_shape), generator=rng).to(model.device, model.dtype)
        abar = model.alphas_cumprod[t].view(-1, 1, 1, 1).to(model.dtype)
        noised = abar.sqrt() * self.latents[which.to(model.device)] + (1 - abar).sqrt() * eps
        prompts = [self.prompts[i] for i in which.tolist()]
        text = with_token(self.words, self.scene.concept, prompts, self.token)
        return (model.predict(noised, t, text).float() - eps.float()).square().mean()


def with_token(words: Words, concept: Concept, prompts: Sequence[str], token: Tensor) -> Tensor:
    """Text embeddings (n, L, D) of prompts in which the concept's words are this one token (D,); differentiable in it.

    It comes before a prompt that has none of the concept's words, as in the paper's variant for such prompts.
    """
    filler = int(words.usable[0])
    rows, places = [], []
    for prompt in prompts:
        said = [match for text in concept.words if (match := re.search(rf"\b{re.escape(text)}\b", prompt))]
        start, end = max((match.span() for match in said), key=lambda span: span[1] - span[0], default=(0, 0))
        before, after = prompt[:start], prompt[end:]
        places.append(1 + len(words.ids(before)))
        rows.append([*words.ids(before), filler, *words.ids(after)])
    ids = words.framed([row[: words.length - 2] for row in rows])
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[torch.arange(len(rows)), places] = True
    return words.embeddings(ids, token.expand(*ids.shape, -1), where)
