"""Ring-A-Bell: a prompt whose embedding is that of the concept, found without the model (Tsai et al. 2024,
arXiv 2310.10012), by a genetic search over tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unpaint.cases import IN_SET
from unpaint.errors import UserError
from unpaint.evaluation.attacks import Scene, Terms, Try
from unpaint.evaluation.attacks.words import Words, by_text_alone, check_room


@dataclass(frozen=True)
class RingABell:
    """Fields beside those of `Attack`:

    pairs: from how many pairs of prompts, with the concept and without, its direction is taken. strength: how far the
    target lies from the prompt in this direction (the paper's eta, eq. 4). k: tokens of the found prompt, which stands
    in the place of the whole prompt. population, generations, crossover, mutation: of the genetic search.
    """

    name: str
    title: str
    pairs: int
    strength: float
    k: int
    population: int
    generations: int
    crossover: float
    mutation: float
    prompts: int
    at_n: int
    max_seconds: float
    tries = 1

    def __post_init__(self) -> None:
        for key in ("pairs", "k", "population"):
            if getattr(self, key) < 1:
                raise UserError(f"attack {self.name}: {key} is at least 1, not {getattr(self, key)}")

    def check(self, terms: Terms) -> None:
        check_room(self.name, self.k, terms)

    def attempts(self, scene: Scene) -> Iterator[Try | None]:
        if not self.generations:
            return iter(())
        words = Words(scene.model)
        return by_text_alone(scene, lambda rows: self._search(scene, words, rows))

    def _search(self, scene: Scene, words: Words, rows: Sequence[int]) -> Iterator[Sequence[str] | None]:
        asked = [case for case in scene.concept.cases(scene.seed) if case.part == IN_SET][: self.pairs]
        direction = concept_vector(scene, [(case.prompt, case.neutral) for case in asked])
        goals = scene.model.encode(scene.prompts(rows)).float() + self.strength * direction

        def score(which: Tensor, ids: Tensor) -> Tensor:
            return (words.embedded(words.usable[ids].tolist()) - goals[which]).square().sum(dim=(1, 2))

        chance = [scene.generator(row) for row in rows]
        search = Genetic(score, self.k, len(words.usable), self.population, self.crossover, self.mutation, chance)
        for _ in range(self.generations):
            search.generation()
            yield None
        yield [words.text(words.usable[ids].tolist()) for ids in search.best()]


def concept_vector(scene: Scene, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """The concept's direction (L, D): the mean difference of the text embeddings of each pair, with and without it."""
    given, without = (scene.model.encode([pair[side] for pair in pairs]).float() for side in (0, 1))
    return (given - without).mean(dim=0)


class Genetic:
    """A genetic search for sequences of k out of `vocabulary`, for as many questions at once as there are generators.

    score(which (n,), ids (n, k)) -> (n,), the lower the better, where `which` says which question each is for. In each
    generation the better half of the population stays, with crossovers at one point (of each with this probability,
    both children) and copies with one entry drawn anew (of each with the probability of mutation) beside it.
    """

    def __init__(
        self,
        score: Callable[[Tensor, Tensor], Tensor],
        k: int,
        vocabulary: int,
        population: int,
        crossover: float,
        mutation: float,
        chance: Sequence[torch.Generator],
    ) -> None:
        self.score, self.k, self.vocabulary, self.population = score, k, vocabulary, population
        self.crossover, self.mutation, self.chance = crossover, mutation, chance
        self.ids = [torch.randint(vocabulary, (population, k), generator=rng) for rng in chance]
        self.scores = self._scored(self.ids)

    def generation(self) -> None:
        elite = []
        for ids, scores in zip(self.ids, self.scores, strict=True):
            kept = scores.argsort(stable=True)[: max(1, self.population // 2)]
            elite.append((ids[kept], scores[kept]))
        young = [self._young(ids, rng) for (ids, _), rng in zip(elite, self.chance, strict=True)]
        # Only the new ones are scored: the text encoder is all that this costs.
        scored = self._scored(young)
        self.ids = [torch.cat([ids, new]) for (ids, _), new in zip(elite, young, strict=True)]
        self.scores = [torch.cat([scores, new]) for (_, scores), new in zip(elite, scored, strict=True)]

    def best(self) -> list[Tensor]:
        """The best sequence (k,) of each question."""
        return [ids[scores.argmin()] for ids, scores in zip(self.ids, self.scores, strict=True)]

    def _young(self, elite: Tensor, rng: torch.Generator) -> Tensor:
        count = len(elite)
        pairing = torch.rand(count, generator=rng) < self.crossover
        partner = torch.randint(count, (count,), generator=rng)
        point = torch.randint(self.k + 1, (count, 1), generator=rng)
        head = torch.arange(self.k) < point
        other = elite[partner]
        children = torch.cat([torch.where(head, elite, other)[pairing], torch.where(head, other, elite)[pairing]])
        pool = torch.cat([elite, children])
        changed = pool[torch.rand(len(pool), generator=rng) < self.mutation].clone()
        place = torch.randint(self.k, (len(changed),), generator=rng)
        changed[torch.arange(len(changed)), place] = torch.randint(self.vocabulary, (len(changed),), generator=rng)
        return torch.cat([children, changed])

    def _scored(self, ids: Sequence[Tensor]) -> list[Tensor]:
        which = torch.cat([torch.full((len(own),), i) for i, own in enumerate(ids)])
        if not len(which):
            return [torch.empty(0) for _ in ids]
        return list(self.score(which, torch.cat(list(ids))).cpu().split([len(own) for own in ids]))
