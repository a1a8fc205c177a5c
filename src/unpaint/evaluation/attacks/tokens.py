"""Token attacks: free tokens in a prompt, found through the gradient of the edited model's own denoising.

One engine for UnlearnDiffAtk (Zhang et al. 2024, arXiv 2310.11868) and P4D (Chin et al. 2024, arXiv 2309.06135). What
they have in common: noise a picture that shows the concept, ask what the edited model predicts there for the prompt
with the free tokens, and make that right. All rows are optimised side by side; each has its own chance and its own
gradient, as the losses are added up and Adam works number by number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unpaint.errors import UserError, nearest
from unpaint.evaluation.attacks import Scene, Terms, Try
from unpaint.evaluation.attacks.words import SLOTS, Layout, Words, layout

CHOICES = {
    "variable": ("simplex", "nearest"),
    "objective": ("noise", "teacher"),
    "timesteps": ("in_order", "random"),
    "slots": SLOTS,
}


@dataclass(frozen=True)
class TokenAttack:
    """Adversarial tokens. Fields beside those of `Attack`:

    variable: what is optimised for each free token. `simplex`: a distribution over the vocabulary, from which a token
    is drawn each step; the gradient goes straight through to it, each number cut to [-1, 1], and Adam's step is
    projected back onto the simplex (UnlearnDiffAtk). `nearest`: an embedding, whose nearest token by cosine is used,
    with the gradient there (P4D, after PEZ, Wen et al. 2023, arXiv 2302.03668).
    objective: what the prediction shall be: the `noise` that was added (UnlearnDiffAtk, eq. 5), or what the unedited
    model predicts for the original prompt, as a `teacher` (P4D, eq. 4).
    timesteps: `in_order`, one noise level a round, from low to high, or `random`, another each step.
    slots, k: where the free tokens are, and how many; see `words.layout`.
    rounds, iterations: after so many steps each, the prompt is painted and judged.
    """

    name: str
    title: str
    variable: str
    objective: str
    timesteps: str
    slots: str
    k: int
    rounds: int
    iterations: int
    lr: float
    weight_decay: float
    prompts: int
    at_n: int
    max_seconds: float

    def __post_init__(self) -> None:
        for key, known in CHOICES.items():
            if (value := getattr(self, key)) not in known:
                raise UserError(
                    f"attack {self.name}: {key} is {' or '.join(known)}, not '{value}'{nearest(value, known)}"
                )
        if self.k < 1:
            raise UserError(f"attack {self.name}: k is at least 1, not {self.k}")

    @property
    def tries(self) -> int:
        return self.rounds

    def check(self, terms: Terms) -> None:
        for tokens in terms.prompts:
            try:
                layout(tokens, self.slots, self.k, terms.length, 0)
            except UserError as error:
                raise UserError(f"attack {self.name}: {error}") from error

    def attempts(self, scene: Scene) -> Iterator[Try | None]:
        if not self.rounds or not self.iterations:
            return
        search = Search(self, scene, Words(scene.model))
        asked: set[tuple[int, str]] = set()
        for i in range(self.rounds):
            for _ in range(self.iterations):
                search.step(i)
                yield None
            found = dict(zip(scene.open, search.texts(scene.open), strict=True))
            # The same text would be painted as the same picture.
            new = {row: text for row, text in found.items() if (row, text) not in asked}
            asked |= new.items()
            if new:
                yield scene.painted(list(new), list(new.values()))


class Search:
    """The optimisation of one scene: the free places of all rows in one list of M, `row` (M,) and `place` (M,) each."""

    def __init__(self, attack: TokenAttack, scene: Scene, words: Words) -> None:
        self.attack, self.scene, self.words = attack, scene, words
        most, filler = words.length - 2, int(words.usable[0])
        self.layouts: dict[int, Layout] = {
            row: layout(words.ids(scene.cases[row].prompt), attack.slots, attack.k, most, filler) for row in scene.open
        }
        self.latents = {row: scene.model.latents_of(scene.pictures[row : row + 1]) for row in scene.open}
        self.original = {row: scene.model.encode([scene.cases[row].prompt]) for row in scene.open}
        self.chance = {row: scene.generator(row) for row in scene.open}
        self.owner = torch.tensor([row for row, own in self.layouts.items() for _ in own.free])
        self.variable = self._begin()
        kind = torch.optim.Adam if attack.variable == "simplex" else torch.optim.AdamW
        self.optimizer = kind([self.variable], lr=attack.lr, weight_decay=attack.weight_decay)

    def _begin(self) -> Tensor:
        count, vocabulary = len(self.owner), len(self.words.usable)
        if self.attack.variable == "simplex":
            start = torch.full((count, vocabulary), 1 / vocabulary, device=self.words.table.device)
        else:
            drawn = [
                torch.randint(vocabulary, (len(own.free),), generator=self.chance[row])
                for row, own in self.layouts.items()
            ]
            start = self.words.table[torch.cat(drawn).to(self.words.table.device)].clone()
        return start.requires_grad_(True)

    def step(self, i: int) -> None:
        """One step of all open rows, of round i."""
        rows = list(self.scene.open)
        self.optimizer.zero_grad()
        self.losses(rows, self.mixed(rows), *self.noised(rows, i)).sum().backward()
        self.optimizer.step()
        if self.attack.variable == "simplex":
            with torch.no_grad():
                self.variable.copy_(on_simplex(self.variable))

    def mine(self, rows: Sequence[int]) -> Tensor:
        """Which of the M free places belong to these rows (m,), in the order of `rows`."""
        return torch.cat([(self.owner == row).nonzero().flatten() for row in rows]).to(self.variable.device)

    def mixed(self, rows: Sequence[int]) -> Tensor:
        """The embeddings (m, D) of the free places of these rows, with the gradient that the variable gets."""
        chosen = self.variable[self.mine(rows)]
        if self.attack.variable == "nearest":
            return chosen + (self.words.table[nearest_token(chosen, self.words.table)] - chosen).detach()
        drawn = []
        for row in rows:
            own = self.variable.detach()[self.mine([row])].cpu()
            drawn.append(torch.multinomial(own, 1, generator=self.chance[row]).flatten())
        hard = F.one_hot(torch.cat(drawn).to(chosen.device), chosen.shape[1]).float()
        return straight_through(hard, chosen) @ self.words.table

    def noised(self, rows: Sequence[int], i: int) -> tuple[Tensor, Tensor, Tensor]:
        """x_t (n, C, h, w) of the pictures of these rows, t (n,) and the noise in it (n, C, h, w), in round i."""
        model = self.scene.model
        levels = len(model.alphas_cumprod)
        if self.attack.timesteps == "in_order":
            t = torch.full((len(rows),), level_of(i, self.attack.rounds, levels))
        else:
            t = torch.cat([torch.randint(levels, (1,), generator=self.chance[row]) for row in rows])
        eps = torch.stack([torch.randn(model.latent_shape, generator=self.chance[row]) for row in rows])
        t, eps = t.to(model.device), eps.to(model.device, model.dtype)
        abar = model.alphas_cumprod[t].view(-1, 1, 1, 1).to(model.dtype)
        clean = torch.cat([self.latents[row] for row in rows]).to(model.dtype)
        return abar.sqrt() * clean + (1 - abar).sqrt() * eps, t, eps

    def losses(self, rows: Sequence[int], embeddings: Tensor, noised: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The objective (n,) of these rows with these embeddings (m, D) in their free places."""
        model = self.scene.model
        if self.attack.objective == "teacher":
            with torch.no_grad():
                original = torch.cat([self.original[row] for row in rows])
                eps = model.predict(noised, t, original, weights=self.scene.base)
        predicted = model.predict(noised, t, self.text(rows, embeddings))
        return (predicted.float() - eps.float()).square().mean(dim=(1, 2, 3))

    def text(self, rows: Sequence[int], embeddings: Tensor) -> Tensor:
        """Text embeddings (n, L, D) of the rows' prompts with embeddings (m, D) in the free places."""
        ids = self.words.framed([self.layouts[row].tokens for row in rows])
        where = torch.zeros_like(ids, dtype=torch.bool)
        for j, row in enumerate(rows):
            where[j, [1 + place for place in self.layouts[row].free]] = True
        soft = torch.zeros((*ids.shape, embeddings.shape[1]), device=ids.device).masked_scatter(
            where.unsqueeze(-1), embeddings.float()
        )
        return self.words.embeddings(ids, soft, where)

    @torch.no_grad()
    def texts(self, rows: Sequence[int]) -> list[str]:
        """The rows' prompts as they are now: the most probable token in each free place, or the nearest."""
        found = []
        for row in rows:
            own = self.variable[self.mine([row])]
            chosen = own.argmax(dim=1) if self.attack.variable == "simplex" else nearest_token(own, self.words.table)
            found.append(self.words.text(self.layouts[row].filled(self.words.usable[chosen].tolist())))
        return found


def level_of(i: int, rounds: int, levels: int) -> int:
    """The noise level of round i of those that go through all of them in equal strides, each at its stride's middle."""
    return (2 * i + 1) * levels // (2 * rounds)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """`hard` (M, V) forwards; backwards the gradient goes to `soft` (M, V), each number cut to [-1, 1]."""
    passed = soft.clone()
    passed.register_hook(lambda gradient: gradient.clamp(-1, 1))
    return hard + (passed - passed.detach())


def on_simplex(points: Tensor) -> Tensor:
    """The nearest points of the probability simplex to points (M, V): exact, by sorting (Duchi et al. 2008, fig. 1)."""
    ordered = points.sort(dim=1, descending=True).values
    excess = ordered.cumsum(dim=1) - 1
    count = torch.arange(1, points.shape[1] + 1, device=points.device)
    support = (ordered - excess / count > 0).sum(dim=1, keepdim=True)
    return (points - excess.gather(1, support - 1) / support).clamp(min=0)


def nearest_token(embeddings: Tensor, table: Tensor) -> Tensor:
    """Index (M,) of the row of the table (V, D) that has the largest cosine with each embedding (M, D)."""
    return (F.normalize(embeddings, dim=1) @ F.normalize(table, dim=1).T).argmax(dim=1)
