"""UCE, Unified Concept Editing (Gandikota et al. 2024, arXiv 2308.14761).

Keys and values of cross-attention are rewritten in closed form: the concept's tokens get those of its guide.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from unpaint.concepts import AnyConcept
from unpaint.edit import Edit
from unpaint.errors import UserError, nearest
from unpaint.methods.base import Job, checked_mode, erasing_prompts

CHOICES = {"tokens": ("last_subject", "span"), "prompts": ("concept", "all"), "guide": ("anchor", "empty")}


@dataclass(frozen=True)
class States:
    """Token states, float64 on the CPU: `erased` (n, D), the `guides` (n, D) that they are mapped to, and those
    `preserved` (m, D), m may be 0."""

    erased: Tensor
    guides: Tensor
    preserved: Tensor


class UCE:
    """`erase_scale`, `preserve_scale`, `lamb`: weights of the three terms of eq. 7; a `preserve_scale` of 0 preserves
    nothing but what `lamb` does. `prompts`: `concept` edits the concept's bare prompt and preserves the bare ones of
    what must stay, `all` edits every erasing prompt and preserves every one for what must stay. `guide`: where they are
    mapped to, the same prompt with the anchor's words or the `empty` prompt. `tokens`: in each prompt the
    `last_subject` token alone, as in the authors' newer code, or the `span` from there to the last padding token, as in
    the older one; with it, all tokens of a preserved prompt are preserved.
    """

    group = "cross_attention.kv"
    steps = 1
    own = None

    def __init__(
        self,
        name: str,
        tokens: str,
        prompts: str,
        guide: str,
        erase_scale: float,
        preserve_scale: float,
        lamb: float,
        mode: str,
    ) -> None:
        for option, value in (("tokens", tokens), ("prompts", prompts), ("guide", guide)):
            if value not in CHOICES[option]:
                known = " or ".join(CHOICES[option])
                raise UserError(f"method.{option} is {known}, not '{value}'{nearest(value, CHOICES[option])}")
        if erase_scale <= 0 or lamb <= 0 or preserve_scale < 0:
            raise UserError("method.erase_scale and method.lamb must be above 0, method.preserve_scale not below it")
        self.name = name
        self.mode = checked_mode(name, mode)
        self.tokens = tokens
        self.asked = prompts
        self.guide = guide
        self.erase_scale = erase_scale
        self.preserve_scale = preserve_scale
        self.lamb = lamb

    def check(self, concept: AnyConcept) -> None:
        """Any concept that has prompts and anchor prompts will do."""

    def begin(self, job: Job) -> None:
        self.job = job

    def optimizers(self) -> list[Optimizer]:
        return []

    def batches(self, start: int) -> Iterator[States]:
        for _ in range(start, self.steps):
            yield self._states()

    def _states(self) -> States:
        concept = self.job.concept
        entries = erasing_prompts(concept, self.asked)
        retained = concept.retain_prompts() if self.preserve_scale else []
        if self.asked == "concept":
            retained = retained[: len(concept.retained)]
        ids = [self._ids(entry.prompt) for entry in entries]
        erased, guides = [], []
        for own, (prompt, anchor, _) in zip(ids, entries, strict=True):
            first, of_anchor = subject_ends(own, self._ids(anchor))
            # The empty prompt has no subject: its beginning of text stands for it, as in the authors' code.
            guide, of_guide = (anchor, of_anchor) if self.guide == "anchor" else ("", 0)
            states, goal = self._encoded(prompt), self._encoded(guide)
            length = 1 if self.tokens == "last_subject" else len(states) - max(first, of_guide)
            erased.append(states[first : first + length])
            guides.append(goal[of_guide : of_guide + length])
        preserved = [erased[0][:0]]
        for prompt in retained:
            states = self._encoded(prompt)
            preserved.append(states[[self._subject_end(prompt, ids)]] if self.tokens == "last_subject" else states)
        return States(torch.cat(erased), torch.cat(guides), torch.cat(preserved))

    def _subject_end(self, prompt: str, others: list[list[int]]) -> int:
        """The last subject token of what must stay: where its prompt differs from the erasing prompt most like it."""
        ids = self._ids(prompt)
        return subject_ends(ids, max(others, key=lambda other: sum(_shared(ids, other))))[0]

    def _encoded(self, prompt: str) -> Tensor:
        return self.job.model.encode([prompt])[0].double().cpu()

    def _ids(self, prompt: str) -> list[int]:
        length = len(self._encoded(prompt))
        return self.job.model.pipe.tokenizer(prompt, truncation=True, max_length=length).input_ids

    def step(self, batch: States) -> dict[str, Tensor]:
        """Eq. 7. As v* = W g, all matrices are multiplied by the same one from the right."""
        right = multiplier(batch, self.erase_scale, self.preserve_scale, self.lamb)
        change = torch.zeros((), dtype=torch.float64)
        whole = torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            for key, parameter in self.job.weights.items():
                if parameter.ndim != 2:  # a bias adds the same to what is and to what shall be
                    continue
                old = self.job.base[key].double().cpu()
                new = old @ right
                parameter.copy_(new)
                change += (new - old).square().sum()
                whole += old.square().sum()
        return {"relative_change": (change / whole).sqrt().float()}

    def finish(self) -> Edit:
        job = self.job
        return Edit.from_change(job.model.pipe, job.base, method=self.name, concept=job.concept.name, config=job.config)


def multiplier(states: States, erase_scale: float, preserve_scale: float, lamb: float) -> Tensor:
    """M (D, D) with W' = W M, the minimum over W' of the objective of eq. 7:

    s_e sum |W' c - W g|^2 + s_p sum |W' p - W p|^2 + lamb |W' - W|^2, over erased c with guide g, and preserved p.
    """
    c, g, p = states.erased, states.guides, states.preserved
    identity = torch.eye(c.shape[1], dtype=c.dtype)
    gram = lamb * identity + erase_scale * c.T @ c + preserve_scale * p.T @ p
    # W' gram = W (lamb I + s_e sum g c^T + s_p sum p p^T); less W gram on both sides, which loses no digits.
    moved = erase_scale * (g - c).T @ c
    return identity + torch.linalg.solve(gram, moved.T).T


def subject_ends(prompt: Sequence[int], other: Sequence[int]) -> tuple[int, int]:
    """Where the part ends in which two prompts differ: the positions, in each, of its last token.

    Where one only lacks words that the other has, it is the token before them. Both hold the tokens that begin and end
    a text, and no padding.
    """
    _, suffix = _shared(prompt, other)
    return len(prompt) - suffix - 1, len(other) - suffix - 1


def _shared(prompt: Sequence[int], other: Sequence[int]) -> tuple[int, int]:
    """How many tokens at their beginning, and at their end, two prompts share; no token counts twice."""
    shorter = min(len(prompt), len(other))
    prefix = next((i for i in range(shorter) if prompt[i] != other[i]), shorter)
    most = shorter - prefix
    return prefix, next((i for i in range(most) if prompt[-1 - i] != other[-1 - i]), most)
