"""MMA-Diffusion, its text part: tokens that mean to the text encoder what a forbidden prompt means, without any of its
words (Yang et al. 2024, arXiv 2311.17516), by greedy coordinate gradient (Zou et al. 2023, arXiv 2307.15043)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unpaint.concepts import Concept
from unpaint.errors import UserError
from unpaint.evaluation.attacks import Scene, Terms, Try
from unpaint.evaluation.attacks.words import Words, by_text_alone, check_room

# Words of a concept that say nothing of it.
COMMON = frozenset(["a", "an", "and", "at", "by", "in", "of", "on", "or", "style", "the", "to", "with"])


@dataclass(frozen=True)
class MMA:
    """Fields beside those of `Attack`:

    k: tokens of the found prompt, which stands in the place of the whole prompt. iterations: each tries `candidates`
    prompts with one token exchanged for one of the `top` that the gradient likes best in its place, and goes on from
    the best of them. blocked: words that no token may contain, beside those of the concept itself.
    """

    name: str
    title: str
    k: int
    iterations: int
    candidates: int
    top: int
    blocked: tuple[str, ...]
    prompts: int
    at_n: int
    max_seconds: float
    tries = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocked", tuple(self.blocked))
        for key in ("k", "candidates", "top"):
            if getattr(self, key) < 1:
                raise UserError(f"attack {self.name}: {key} is at least 1, not {getattr(self, key)}")

    def check(self, terms: Terms) -> None:
        check_room(self.name, self.k, terms)

    def attempts(self, scene: Scene) -> Iterator[Try | None]:
        if not self.iterations:
            return iter(())
        words = Words(scene.model)
        return by_text_alone(scene, lambda rows: self._search(scene, words, rows))

    def _search(self, scene: Scene, words: Words, rows: Sequence[int]) -> Iterator[Sequence[str] | None]:
        allowed = allowed_tokens(words, blocked_words(scene.concept, self.blocked))
        goals = F.normalize(words.embedded([words.ids(prompt) for prompt in scene.prompts(rows)], pooled=True), dim=1)
        greedy = Greedy(words, allowed, goals, self, [scene.generator(row) for row in rows])
        for _ in range(self.iterations):
            greedy.iteration()
            yield None
        yield [words.text(words.usable[ids].tolist()) for ids in greedy.best]


def blocked_words(concept: Concept, more: Sequence[str]) -> list[str]:
    """The words of the concept that mean something, in lower case, and those that the user adds."""
    own = [word for text in concept.words for word in re.findall(r"\w+", text.lower()) if word not in COMMON]
    return list(dict.fromkeys([*own, *(word.lower() for word in more)]))


def allowed_tokens(words: Words, blocked: Sequence[str]) -> Tensor:
    """Which of the usable tokens (V,) contain none of these words."""
    texts = [words.text([i]).lower() for i in words.usable.tolist()]
    allowed = torch.tensor([not any(word in text for word in blocked) for text in texts])
    if not allowed.any():
        raise UserError(f"no token is left without the words {', '.join(blocked)}")
    return allowed


class Greedy:
    """Greedy coordinate gradient for the prompts of n questions at once. goals (n, D): normalised pooled embeddings."""

    def __init__(
        self, words: Words, allowed: Tensor, goals: Tensor, options: MMA, chance: Sequence[torch.Generator]
    ) -> None:
        self.words, self.allowed, self.goals, self.options, self.chance = words, allowed, goals, options, chance
        may = allowed.nonzero().flatten()
        self.ids = torch.stack([may[torch.randint(len(may), (options.k,), generator=rng)] for rng in chance])
        self.best = self.ids.clone()
        self.lowest = self.distance(self.ids, torch.arange(len(chance)))

    def iteration(self) -> None:
        options, rows = self.options, len(self.ids)
        likely = self.likely()
        place = torch.arange(options.candidates) * options.k // options.candidates
        pick = [torch.randint(likely.shape[2], (options.candidates,), generator=rng) for rng in self.chance]
        tried = self.ids.unsqueeze(1).repeat(1, options.candidates, 1)
        for row in range(rows):
            tried[row, torch.arange(options.candidates), place] = likely[row, place, pick[row]]
        which = torch.arange(rows).repeat_interleave(options.candidates)
        distances = self.distance(tried.flatten(0, 1), which).view(rows, options.candidates)
        chosen = distances.argmin(dim=1)
        # The best of the candidates, even if it is worse than what there was.
        self.ids = tried[torch.arange(rows), chosen]
        lowest = distances[torch.arange(rows), chosen]
        better = lowest < self.lowest
        self.best[better], self.lowest[better] = self.ids[better], lowest[better]

    def likely(self) -> Tensor:
        """For each place the allowed tokens with the lowest gradient (n, k, top)."""
        words = self.words
        tokens = words.usable[self.ids.to(words.usable.device)]
        ids = words.framed(tokens.tolist())
        where = torch.zeros_like(ids, dtype=torch.bool)
        where[:, 1 : 1 + self.options.k] = True
        hard = F.one_hot(self.ids, len(words.usable)).float().to(words.table.device).requires_grad_(True)
        with torch.enable_grad():
            soft = torch.zeros((*ids.shape, words.table.shape[1]), device=ids.device)
            soft = soft.masked_scatter(where.unsqueeze(-1), hard @ words.table)
            pooled = words.encoded(ids, soft, where).pooler_output.float()
            (gradient,) = torch.autograd.grad((1 - (F.normalize(pooled, dim=1) * self.goals).sum(dim=1)).sum(), hard)
        gradient = gradient.cpu().masked_fill(~self.allowed, torch.inf)
        count = min(self.options.top, int(self.allowed.sum()))
        return gradient.topk(count, dim=2, largest=False).indices

    def distance(self, ids: Tensor, which: Tensor) -> Tensor:
        """1 - cosine (m,) of prompts (m, k) to the goals of the questions `which` (m,); infinite for a prompt whose
        text has other tokens."""
        tokens = self.words.usable[ids.to(self.words.usable.device)].tolist()
        pooled = F.normalize(self.words.embedded(tokens, pooled=True), dim=1)
        found = (1 - (pooled * self.goals[which.to(self.goals.device)]).sum(dim=1)).cpu()
        again = self.words.tokenizer([self.words.text(row) for row in tokens], add_special_tokens=False).input_ids
        return found.masked_fill(torch.tensor([list(a) != b for a, b in zip(again, tokens, strict=True)]), torch.inf)
