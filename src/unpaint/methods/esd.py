"""ESD, Erased Stable Diffusion (Gandikota et al. 2023, arXiv 2303.07345).

The model is trained to answer a prompt for the concept with what the frozen model predicts away from it.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from unpaint.concepts import AnyConcept
from unpaint.edit import Edit
from unpaint.errors import UserError, nearest
from unpaint.methods.base import Job, checked_mode
from unpaint.sampling import Away, Bank, Sampler, denoise_to, drawn_levels, seed_of

GROUPS = {
    "x": "cross_attention",
    "x-strict": "cross_attention.kv",
    "u": "not_cross_attention",
    "all": "all",
}


TRAJECTORIES = ("concept", "erased", "both")


@dataclass(frozen=True)
class Batch:
    """Latents x_t (B, C, h, w) on the way to a picture of the concept, their t (B,), and the prompt of each."""

    latents: Tensor
    t: Tensor
    prompts: list[str]


class ESD:
    """`variant` names the trained weights: x (cross-attention), x-strict (its keys and values), u (all others), all.

    `prompts`: `all` trains on every erasing prompt of the concept (other words, styles, settings), `concept` on its
    bare words as in the paper. `erase_from`: train on this prompt alone ("a cowboy", to take the hat off).
    `negative_guidance` is eta of eq. 7. `latents`: `bank` takes them from `bank_size` stored trajectories of the
    unedited model, `fresh` denoises anew for every step; both with `sampling_steps` of DDIM at `sampling_guidance`.
    `trajectories`: the bank's are on the way to the `concept`, as in the paper; or on the way that a perfectly `erased`
    model would take, by the goal of eq. 7; or half of them each (`both`): an edited model leaves the first way early.
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
        if trajectories not in TRAJECTORIES:
            hint = nearest(trajectories, TRAJECTORIES)
            raise UserError(f"method.trajectories is {', '.join(TRAJECTORIES)}, not '{trajectories}'{hint}")
        if latents == "fresh" and trajectories != "concept":
            raise UserError(f"method.trajectories={trajectories} needs a bank: method.latents=bank")
        if trajectories == "both" and (bank_size % 2 or batch_size % 2):
            raise UserError("method.trajectories=both needs an even method.bank_size and method.batch_size")
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
        every = {entry.prompt: entry.bare for entry in job.concept.erasing(further=True)}
        bare = list(dict.fromkeys(every.values()))
        if self.erase_from:
            every = {self.erase_from: bare[0]}
        elif self.asked == "concept":
            every = dict(zip(bare, bare, strict=True))
        # Prompt -> the bare prompt of the concept that it asks for: in a set, of its member.
        self.bare = every
        self.prompts = list(every)
        random.Random(job.seed).shuffle(self.prompts)
        away = Away(tuple(self.bare[prompt] for prompt in self.prompts), 1 + self.negative_guidance)
        ways: dict[str, list[Away | None]] = {"concept": [None], "erased": [away], "both": [None, away]}
        chosen = ways[self.trajectories] if self.latents == "bank" else []
        self.banks = [self._bank(way, self.bank_size // len(chosen)) for way in chosen]

    def _bank(self, away: Away | None, size: int) -> Bank:
        job = self.job
        advance = job.progress("trajectories away from the concept" if away else "trajectories to the concept", size)
        folder = job.cache / "banks"
        bank = Bank.build(job.model, self.prompts, size, self.sampler, job.seed, folder, advance, away=away)
        job.account(bank.saved_seconds)
        return bank

    def optimizers(self) -> list[Optimizer]:
        return [Adam(self.job.weights.values(), lr=self.lr)]

    def batches(self, start: int) -> Iterator[Batch]:
        for step in range(start, self.steps):
            yield self._from_bank(step) if self.banks else self._fresh(step)

    def _from_bank(self, step: int) -> Batch:
        each = self.batch_size // len(self.banks)
        drawn = [bank.draw(self.job.seed, step, each, self.noise_bias) for bank in self.banks]
        latents, t, which = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        mine = self.job.mine
        return Batch(latents[mine], t[mine], [self.prompts[i] for i in which.tolist()[mine]])

    def _fresh(self, step: int) -> Batch:
        """As the authors' current code does it: k uniform, then k guided steps of the unedited model (methods 4.2)."""
        seed, model = self.job.seed, self.job.model
        rng = torch.Generator().manual_seed(seed_of("fresh", seed, step))
        k = drawn_levels(self.sampler.steps, self.batch_size, rng, self.noise_bias)
        which = torch.randint(len(self.prompts), (self.batch_size,), generator=rng)
        rows = list(range(self.batch_size))[self.job.mine]
        prompts = [self.prompts[which[row]] for row in rows]
        seeds = [seed_of("fresh", seed, step, row) for row in rows]
        text, empty = model.encode(prompts), model.encode([""])
        latents, t = denoise_to(model, text, empty, seeds, k[rows], self.sampler, weights=self.job.base)
        return Batch(latents, t, prompts)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Eq. 7 for a prompt p and the bare concept c: eps(x, p) becomes eps0(x, p) - (1 + eta)(eps0(x, c) - eps0(x)).

        For p = c this is the paper's eps0(x) - eta (eps0(x, c) - eps0(x)); for another p it takes the concept, and only
        the concept, out of it. It is what the authors' current code does with their eta = 1 + eta.
        """
        model, n = self.job.model, len(batch.t)
        text = model.encode(batch.prompts)
        bare = model.encode([self.bare[prompt] for prompt in batch.prompts])
        asked = torch.cat([text, bare, model.encode([""] * n)])
        with torch.no_grad():
            x, t = batch.latents.repeat(3, 1, 1, 1), batch.t.repeat(3)
            whole, concept, nothing = model.predict(x, t, asked, weights=self.job.base).chunk(3)
            goal = whole - (1 + self.negative_guidance) * (concept - nothing)
        loss = F.mse_loss(model.predict(batch.latents, batch.t, text), goal)
        self.job.update(loss)
        return {"loss": loss.detach()}

    def finish(self) -> Edit:
        job = self.job
        return Edit.from_change(job.model.pipe, job.base, method=self.name, concept=job.concept.name, config=job.config)
