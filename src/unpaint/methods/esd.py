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
from unpaint.latents import Bank, Underway
from unpaint.methods.base import MODES, Job, checked_mode, erasing_prompts
from unpaint.sampling import Sampler, denoise_to
from unpaint.seeds import seed_of

GROUPS = {
    "x": "cross_attention",
    "x-strict": "cross_attention.kv",
    "u": "not_cross_attention",
    "all": "all",
}
LATENTS = ("student", "bank", "fresh")


@dataclass(frozen=True)
class Batch:
    """Of step number `step`: latents x_t (B, C, h, w) on the way to a picture of the concept, their t (B,), and the
    prompt of each."""

    step: int
    latents: Tensor
    t: Tensor
    prompts: list[str]


@dataclass(frozen=True)
class Rows:
    """Which trajectories step number `step` trains on and moves on: the global batch's, (B,). Where they are is known
    when the step before is over."""

    step: int
    which: Tensor


class ESD:
    """`variant` names the trained weights: x (cross-attention), x-strict (its keys and values), u (all others), all.

    `prompts`: `all` trains on every erasing prompt of the concept (other words, styles, settings), `concept` on its
    bare words as in the paper. `erase_from`: train on this prompt alone ("a cowboy", to take the hat off).
    `negative_guidance` is eta of eq. 7. `latents`: `student` takes them from `bank_size` trajectories that the model
    under training moves on, as in the authors' first code; `bank` from as many stored ones of the unedited model;
    `fresh` denoises anew for every step, with the unedited model, as in their present code. All use `sampling_steps` of
    DDIM at `sampling_guidance`. `lr_decay`: the rate falls to 0 in a straight line, as in none of their code.
    """

    def __init__(
        self,
        name: str,
        variant: str,
        prompts: str,
        erase_from: str | None,
        negative_guidance: float,
        latents: str,
        bank_size: int,
        sampling_steps: int,
        sampling_guidance: float,
        steps: int,
        lr: float,
        lr_decay: bool,
        batch_size: int,
        mode: str,
    ) -> None:
        if variant not in GROUPS:
            raise UserError(f"method.variant is {', '.join(GROUPS)}, not '{variant}'{nearest(variant, GROUPS)}")
        if latents not in LATENTS:
            raise UserError(f"method.latents is {', '.join(LATENTS)}, not '{latents}'{nearest(latents, LATENTS)}")
        if prompts not in ("all", "concept"):
            raise UserError(f"method.prompts is all or concept, not '{prompts}'{nearest(prompts, ('all', 'concept'))}")
        if steps < 1 or batch_size < 1 or bank_size < 1:
            raise UserError("method.steps, method.batch_size and method.bank_size must be at least 1")
        if lr <= 0 or negative_guidance < 0:
            raise UserError("method.lr must be above 0 and method.negative_guidance not below it")
        if latents == "student" and bank_size < batch_size:
            raise UserError(
                f"method.latents=student moves {batch_size} of method.bank_size={bank_size} a step: too few"
            )
        self.name = name
        # One by one every member would be trained on that one prompt.
        self.mode = checked_mode(name, mode, ("joint",) if erase_from else MODES)
        self.group = GROUPS[variant]
        self.asked = prompts
        self.erase_from = erase_from
        self.negative_guidance = negative_guidance
        self.latents = latents
        self.bank_size = bank_size
        self.sampler = Sampler(sampling_steps, sampling_guidance)
        self.steps = steps
        self.lr = lr
        self.lr_decay = lr_decay
        self.batch_size = batch_size
        self.own: Underway | None = None

    def check(self, concept: AnyConcept) -> None:
        if self.erase_from and len(concept.members) > 1:
            raise UserError(f"method.erase_from takes one concept out of one prompt; '{concept.name}' is a set of them")

    def begin(self, job: Job) -> None:
        self.job = job
        if self.batch_size % (job.mine.step or 1):
            raise UserError(f"method.batch_size={self.batch_size} does not divide over {job.mine.step} processes")
        # Prompt -> the bare prompt of the concept that it asks for: in a set, of its member.
        self.bare = {entry.prompt: entry.bare for entry in erasing_prompts(job.concept, self.asked)}
        if self.erase_from:
            self.bare = {self.erase_from: next(iter(self.bare.values()))}
        self.prompts = list(self.bare)
        random.Random(job.seed).shuffle(self.prompts)
        self.adam = Adam(job.weights.values(), lr=self.lr)
        if self.latents == "student":
            advance = job.progress("first steps of the trajectories", self.bank_size)
            self.own = Underway(
                job.model, self.prompts, self.bank_size, self.sampler, job.seed, job.base, progress=advance
            )
        elif self.latents == "bank":
            advance = job.progress("trajectories to the concept", self.bank_size)
            folder = job.cache / "banks"
            self.bank = Bank.build(job.model, self.prompts, self.bank_size, self.sampler, job.seed, folder, advance)
            job.account(self.bank.saved_seconds)

    def optimizers(self) -> list[Optimizer]:
        return [self.adam]

    def batches(self, start: int) -> Iterator[Batch | Rows]:
        for step in range(start, self.steps):
            if self.latents == "student":
                yield self._rows(step)
            else:
                yield self._from_bank(step) if self.latents == "bank" else self._fresh(step)

    def _rows(self, step: int) -> Rows:
        assert self.own is not None
        return Rows(step, self.own.drawn(step, self.batch_size))

    def _from_bank(self, step: int) -> Batch:
        latents, t, which = self.bank.draw(self.job.seed, step, self.batch_size)
        mine = self.job.mine
        return Batch(step, latents[mine], t[mine], [self.prompts[i] for i in which.tolist()[mine]])

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
        return Batch(step, latents, t, prompts)

    def step(self, batch: Batch | Rows) -> dict[str, Tensor]:
        """Eq. 7 for a prompt p and the bare concept c: eps(x, p) becomes eps0(x, p) - (1 + eta)(eps0(x, c) - eps0(x)).

        For p = c this is the paper's eps0(x) - eta (eps0(x, c) - eps0(x)); for another p it takes the concept, and only
        the concept, out of it. It is what the authors' current code does with their eta = 1 + eta.
        """
        rows = batch if isinstance(batch, Rows) else None
        if isinstance(batch, Rows):
            batch = self._under_way(batch)
        model, n = self.job.model, len(batch.t)
        text = model.encode(batch.prompts)
        bare = model.encode([self.bare[prompt] for prompt in batch.prompts])
        asked = torch.cat([text, bare, model.encode([""] * n)])
        with torch.no_grad():
            x, t = batch.latents.repeat(3, 1, 1, 1), batch.t.repeat(3)
            whole, concept, nothing = model.predict(x, t, asked, weights=self.job.base).chunk(3)
            goal = whole - (1 + self.negative_guidance) * (concept - nothing)
        if self.lr_decay:
            for group in self.adam.param_groups:
                group["lr"] = self.lr * (1 - batch.step / self.steps)
        predicted = model.predict(batch.latents, batch.t, text)
        loss = F.mse_loss(predicted, goal)
        if rows is not None:
            self._move(rows, batch, predicted.detach())
        self.job.update(loss)
        return {"loss": loss.detach()}

    def _under_way(self, rows: Rows) -> Batch:
        """This rank's share of the trajectories, where they are now."""
        assert self.own is not None
        latents, t, which = self.own.at(rows.which[self.job.mine])
        return Batch(rows.step, latents, t, [self.prompts[i] for i in which.tolist()])

    def _move(self, rows: Rows, batch: Batch, predicted: Tensor) -> None:
        """A step of DDIM for the trajectories, with the prediction that there is already and one without a prompt.
        Every rank moves its own, and learns of the others'."""
        assert self.own is not None
        model, mine, own = self.job.model, self.job.mine, self.own
        with torch.no_grad():
            nothing = model.predict(batch.latents, batch.t, model.encode([""] * len(batch.t)))
        moved = torch.zeros_like(own.latents[rows.which])
        moved[mine] = own.moved(rows.which[mine], predicted, nothing)
        own.move(rows.step, rows.which, self.job.total(moved))

    def finish(self) -> Edit:
        job = self.job
        return Edit.from_change(job.model.pipe, job.base, method=self.name, concept=job.concept.name, config=job.config)
