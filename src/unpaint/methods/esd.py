"""ESD, Erased Stable Diffusion (Gandikota et al. 2023, arXiv 2303.07345).

The model is trained to answer a prompt for the concept with what the frozen model predicts away from it.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from unpaint.concepts import AnyConcept
from unpaint.edit import Edit
from unpaint.errors import UserError, nearest
from unpaint.methods.base import Job, checked_mode
from unpaint.sampling import Bank, Sampler, denoise_to, drawn_levels, seed_of

GROUPS = {
    "x": "cross_attention",
    "x-strict": "cross_attention.kv",
    "u": "not_cross_attention",
    "all": "all",
}


@dataclass(frozen=True)
class Lesson:
    """A prompt to unlearn, the same with the anchor's words, the concept's bare prompt, and the prompt that latents are
    painted for."""

    prompt: str
    anchor: str
    bare: str
    painted: str


@dataclass(frozen=True)
class Batch:
    """Latents x_t (B, C, h, w) on the way to a picture, their t (B,), and what is learned on each."""

    latents: Tensor
    t: Tensor
    lessons: list[Lesson]


class ESD:
    """`variant` names the trained weights: x (cross-attention), x-strict (its keys and values), u (all others), all.

    `prompts`: `all` trains on every erasing prompt of the concept (other words, styles, settings), `concept` on its
    bare words as in the paper. `erase_from`: train on this prompt alone ("a cowboy", to take the hat off).
    `negative_guidance` is eta of eq. 7. `latents`: `bank` takes them from `bank_size` stored trajectories of the
    unedited model, `fresh` denoises anew for every step; both with `sampling_steps` of DDIM at `sampling_guidance`.
    `noise_bias` above 1 draws noisy levels more often than clean ones, see `drawn_levels`; the paper draws uniformly.
    """

    own = None

    def __init__(
        self,
        name: str,
        variant: str,
        prompts: str,
        erase_from: str | None,
        negative_guidance: float,
        latents: str,
        trajectories: str,
        bank_size: int,
        sampling_steps: int,
        sampling_guidance: float,
        noise_bias: float,
        weighting: str,
        steps: int,
        lr: float,
        batch_size: int,
        mode: str,
    ) -> None:
        if variant not in GROUPS:
            raise UserError(f"method.variant is {', '.join(GROUPS)}, not '{variant}'{nearest(variant, GROUPS)}")
        if latents not in ("bank", "fresh"):
            raise UserError(f"method.latents is bank or fresh, not '{latents}'{nearest(latents, ('bank', 'fresh'))}")
        if prompts not in ("all", "concept"):
            raise UserError(f"method.prompts is all or concept, not '{prompts}'{nearest(prompts, ('all', 'concept'))}")
        if trajectories not in ("concept", "both"):
            hint = nearest(trajectories, ("concept", "both"))
            raise UserError(f"method.trajectories is concept or both, not '{trajectories}'{hint}")
        if weighting not in ("squared", "relative"):
            hint = nearest(weighting, ("squared", "relative"))
            raise UserError(f"method.weighting is squared or relative, not '{weighting}'{hint}")
        if steps < 1 or batch_size < 1 or bank_size < 1:
            raise UserError("method.steps, method.batch_size and method.bank_size must be at least 1")
        if lr <= 0 or negative_guidance < 0:
            raise UserError("method.lr must be above 0 and method.negative_guidance not below it")
        if noise_bias <= 0:
            raise UserError(f"method.noise_bias is above 0, and 1 for no bias, not {noise_bias}")
        self.name = name
        self.mode = checked_mode(name, mode)
        self.group = GROUPS[variant]
        self.asked = prompts
        self.erase_from = erase_from
        self.negative_guidance = negative_guidance
        self.latents = latents
        self.trajectories = trajectories
        self.bank_size = bank_size
        self.sampler = Sampler(sampling_steps, sampling_guidance)
        self.noise_bias = noise_bias
        self.weighting = weighting
        self.steps = steps
        self.lr = lr
        self.batch_size = batch_size

    def check(self, concept: AnyConcept) -> None:
        if self.erase_from and len(concept.members) > 1:
            raise UserError(f"method.erase_from takes one concept out of one prompt; '{concept.name}' is a set of them")

    def begin(self, job: Job) -> None:
        self.job = job
        if self.batch_size % (job.mine.step or 1):
            raise UserError(f"method.batch_size={self.batch_size} does not divide over {job.mine.step} processes")
        every = [Lesson(*entry, painted=entry.prompt) for entry in job.concept.erasing(further=True)]
        if self.erase_from:
            every = [replace(every[0], prompt=self.erase_from, painted=self.erase_from)]
        elif self.asked == "concept":
            every = [lesson for lesson in every if lesson.prompt == lesson.bare]
        random.Random(job.seed).shuffle(every)
        if self.trajectories == "both":
            every = [one for lesson in every for one in (lesson, replace(lesson, painted=lesson.anchor))]
        self.lessons = every
        self.bank = self._bank() if self.latents == "bank" else None

    def _bank(self) -> Bank:
        job = self.job
        advance = job.progress("trajectories of the unedited model", self.bank_size)
        folder = job.cache / "banks"
        painted = [lesson.painted for lesson in self.lessons]
        bank = Bank.build(job.model, painted, self.bank_size, self.sampler, job.seed, folder, advance)
        job.account(bank.saved_seconds)
        return bank

    def optimizers(self) -> list[Optimizer]:
        return [Adam(self.job.weights.values(), lr=self.lr)]

    def batches(self, start: int) -> Iterator[Batch]:
        for step in range(start, self.steps):
            yield self._from_bank(step) if self.bank else self._fresh(step)

    def _from_bank(self, step: int) -> Batch:
        assert self.bank is not None
        latents, t, which = self.bank.draw(self.job.seed, step, self.batch_size, self.noise_bias)
        rows = list(range(self.batch_size))[self.job.mine]
        return Batch(latents[rows], t[rows], [self.lessons[which[row]] for row in rows])

    def _fresh(self, step: int) -> Batch:
        """As the authors' current code does it: k uniform, then k guided steps of the unedited model (methods 4.2)."""
        seed, model = self.job.seed, self.job.model
        rng = torch.Generator().manual_seed(seed_of("fresh", seed, step))
        k = drawn_levels(self.sampler.steps, self.batch_size, rng, self.noise_bias)
        which = torch.randint(len(self.lessons), (self.batch_size,), generator=rng)
        rows = list(range(self.batch_size))[self.job.mine]
        lessons = [self.lessons[which[row]] for row in rows]
        seeds = [seed_of("fresh", seed, step, row) for row in rows]
        text, empty = model.encode([lesson.painted for lesson in lessons]), model.encode([""])
        latents, t = denoise_to(model, text, empty, seeds, k[rows], self.sampler, weights=self.job.base)
        return Batch(latents, t, lessons)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Eq. 7 for a prompt p and the bare concept c: eps(x, p) becomes eps0(x, p) - (1 + eta)(eps0(x, c) - eps0(x)).

        For p = c this is the paper's eps0(x) - eta (eps0(x, c) - eps0(x)); for another p it takes the concept, and only
        the concept, out of it. It is what the authors' current code does with their eta = 1 + eta.
        """
        model, n = self.job.model, len(batch.t)
        text = model.encode([lesson.prompt for lesson in batch.lessons])
        bare = model.encode([lesson.bare for lesson in batch.lessons])
        asked = torch.cat([text, bare, model.encode([""] * n)])
        with torch.no_grad():
            x, t = batch.latents.repeat(3, 1, 1, 1), batch.t.repeat(3)
            whole, concept, nothing = model.predict(x, t, asked, weights=self.job.base).chunk(3)
            goal = whole - (1 + self.negative_guidance) * (concept - nothing)
        errors = (model.predict(batch.latents, batch.t, text) - goal).square().mean(dim=(1, 2, 3))
        if self.weighting == "relative":
            errors = errors / (goal - whole).square().mean(dim=(1, 2, 3)).clamp(min=1e-8)
        loss = errors.mean()
        self.job.update(loss)
        return {"loss": loss.detach()}

    def finish(self) -> Edit:
        job = self.job
        return Edit.from_change(job.model.pipe, job.base, method=self.name, concept=job.concept.name, config=job.config)
