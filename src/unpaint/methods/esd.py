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

from unpaint.concepts import Concept
from unpaint.edit import Edit
from unpaint.errors import UserError, nearest
from unpaint.methods.base import Job
from unpaint.sampling import Bank, Sampler, denoise_to, seed_of

GROUPS = {
    "x": "cross_attention",
    "x-strict": "cross_attention.kv",
    "u": "not_cross_attention",
    "all": "all",
}


@dataclass(frozen=True)
class Batch:
    """Latents x_t (B, C, h, w) on the way to a picture of the concept, their t (B,), and the prompt of each."""

    latents: Tensor
    t: Tensor
    prompts: list[str]


class ESD:
    """`variant` names the trained weights: x (cross-attention), x-strict (its keys and values), u (all others), all.

    `erase_from`: remove the concept only where this is asked for ("a hat" from "a cowboy"); None removes it as such.
    `negative_guidance` is eta of eq. 7. `latents`: `bank` takes them from `bank_size` stored trajectories of the
    unedited model, `fresh` denoises anew for every step; both with `sampling_steps` of DDIM at `sampling_guidance`.
    """

    def __init__(
        self,
        name: str,
        variant: str,
        erase_from: str | None,
        negative_guidance: float,
        latents: str,
        bank_size: int,
        sampling_steps: int,
        sampling_guidance: float,
        steps: int,
        lr: float,
        batch_size: int,
    ) -> None:
        if variant not in GROUPS:
            raise UserError(f"method.variant is {', '.join(GROUPS)}, not '{variant}'{nearest(variant, GROUPS)}")
        if latents not in ("bank", "fresh"):
            raise UserError(f"method.latents is bank or fresh, not '{latents}'{nearest(latents, ('bank', 'fresh'))}")
        if steps < 1 or batch_size < 1 or bank_size < 1:
            raise UserError("method.steps, method.batch_size and method.bank_size must be at least 1")
        if lr <= 0 or negative_guidance < 0:
            raise UserError("method.lr must be above 0 and method.negative_guidance not below it")
        self.name = name
        self.group = GROUPS[variant]
        self.erase_from = erase_from
        self.negative_guidance = negative_guidance
        self.latents = latents
        self.bank_size = bank_size
        self.sampler = Sampler(sampling_steps, sampling_guidance)
        self.steps = steps
        self.lr = lr
        self.batch_size = batch_size

    def check(self, concept: Concept) -> None:
        if concept.kind != "individual":
            raise UserError(f"method=esd erases individual concepts; '{concept.name}' is a {concept.kind}")

    def begin(self, job: Job) -> None:
        self.job = job
        if self.batch_size % (job.mine.step or 1):
            raise UserError(f"method.batch_size={self.batch_size} does not divide over {job.mine.step} processes")
        # Where the concept is erased from something, that something is painted and re-learned.
        self.prompts = [self.erase_from] if self.erase_from else job.concept.prompts()
        random.Random(job.seed).shuffle(self.prompts)
        self.bank = self._bank() if self.latents == "bank" else None

    def _bank(self) -> Bank:
        job = self.job
        advance = job.progress("trajectories of the unedited model", self.bank_size)
        folder = job.cache / "banks"
        bank = Bank.build(job.model, self.prompts, self.bank_size, self.sampler, job.seed, folder, advance)
        job.account(bank.saved_seconds)
        return bank

    def optimizers(self) -> list[Optimizer]:
        return [Adam(self.job.weights.values(), lr=self.lr)]

    def batches(self, start: int) -> Iterator[Batch]:
        for step in range(start, self.steps):
            yield self._from_bank(step) if self.bank else self._fresh(step)

    def _from_bank(self, step: int) -> Batch:
        assert self.bank is not None
        latents, t, which = self.bank.draw(self.job.seed, step, self.batch_size)
        rows = list(range(self.batch_size))[self.job.mine]
        return Batch(latents[rows], t[rows], [self.prompts[which[row]] for row in rows])

    def _fresh(self, step: int) -> Batch:
        """As the authors' current code does it: k uniform, then k guided steps of the unedited model (methods 4.2)."""
        seed, model = self.job.seed, self.job.model
        rng = torch.Generator().manual_seed(seed_of("fresh", seed, step))
        k = torch.randint(self.sampler.steps, (self.batch_size,), generator=rng)
        which = torch.randint(len(self.prompts), (self.batch_size,), generator=rng)
        rows = list(range(self.batch_size))[self.job.mine]
        prompts = [self.prompts[which[row]] for row in rows]
        seeds = [seed_of("fresh", seed, step, row) for row in rows]
        text, empty = model.encode(prompts), model.encode([""])
        latents, t = denoise_to(model, text, empty, seeds, k[rows], self.sampler, weights=self.job.base)
        return Batch(latents, t, prompts)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Eq. 7: match eps(x, c) to eps0(x) - eta (eps0(x, c) - eps0(x)).

        With `erase_from` f the student is asked f and the target starts from eps0(x, f) instead of eps0(x), as in the
        authors' code (their eta 2 without f is eta 1 here and in the paper).
        """
        model, n = self.job.model, len(batch.t)
        text = model.encode(batch.prompts)
        concept = model.encode([self.job.concept.target] * n) if self.erase_from else text
        empty = model.encode([""] * n)
        with torch.no_grad():
            asked = [concept, empty, text] if self.erase_from else [concept, empty]
            x, t = batch.latents.repeat(len(asked), 1, 1, 1), batch.t.repeat(len(asked))
            predicted = model.predict(x, t, torch.cat(asked), weights=self.job.base)
            with_concept, without, *start = predicted.chunk(len(asked))
            goal = (start[0] if start else without) - self.negative_guidance * (with_concept - without)
        loss = F.mse_loss(model.predict(batch.latents, batch.t, text), goal)
        self.job.update(loss)
        return {"loss": loss.detach()}

    def finish(self) -> Edit:
        job = self.job
        return Edit.from_change(job.model.pipe, job.base, method=self.name, concept=job.concept.name, config=job.config)
