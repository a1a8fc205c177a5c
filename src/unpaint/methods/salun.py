"""SalUn, saliency unlearning (Fan et al. 2024, arXiv 2310.12508).

The concept's prompt is taught to mean the anchor, on pictures of the concept, in the weights that matter most to it.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from unpaint.concepts import AnyConcept
from unpaint.edit import Edit
from unpaint.errors import UserError, nearest
from unpaint.latents import Noised, Paintings
from unpaint.methods.base import Job, checked_mode, erasing_prompts
from unpaint.model import GROUPS
from unpaint.sampling import Sampler

CHOICES = {"group": GROUPS, "prompts": ("all", "concept"), "target": ("frozen", "current")}
# Draws of the mask and of the training steps take streams of their own.
FORGET, RETAIN, MASK = range(3)


@dataclass(frozen=True)
class Batch:
    """Noised pictures of the concept and of what must stay, with their prompts; `anchors` beside those to forget."""

    forget: Noised
    prompts: list[str]
    anchors: list[str]
    retain: Noised
    retained: list[str]


class SalUn:
    """`group` names the weights, of which the `share` with the largest saliency is trained. `prompts`: `all` erasing
    prompts of the concept, or the bare `concept`. `alpha` weighs the retention term.

    Saliency is the gradient of the diffusion loss, summed over `mask_batches` batches of pictures of the concept; with
    `mask_guidance` w > 0 that of (1 + w) eps(x, c) - w eps(x, ""), as in the authors' code. `target`: the anchor's
    prediction is that of the `frozen` model, or of the `current` one.

    The model paints its own training set: `forget_size` and `retain_size` pictures, with `sampling_steps` of DDIM at
    `sampling_guidance`. `own` holds the mask, (N,) bool over the weights of the group in their order.
    """

    own: nn.Module | None = None

    def __init__(
        self,
        name: str,
        group: str,
        prompts: str,
        share: float,
        mask_guidance: float,
        mask_batches: int,
        target: str,
        alpha: float,
        forget_size: int,
        retain_size: int,
        sampling_steps: int,
        sampling_guidance: float,
        steps: int,
        lr: float,
        batch_size: int,
        mode: str,
    ) -> None:
        for option, value in (("group", group), ("prompts", prompts), ("target", target)):
            if value not in CHOICES[option]:
                known = ", ".join(CHOICES[option])
                raise UserError(f"method.{option} is one of {known}, not '{value}'{nearest(value, CHOICES[option])}")
        if not 0 < share <= 1:
            raise UserError(f"method.share is above 0 and at most 1, not {share:g}")
        if min(steps, batch_size, forget_size, retain_size, mask_batches) < 1:
            raise UserError(
                "method.steps, method.batch_size, method.forget_size, method.retain_size and method.mask_batches must "
                "be at least 1"
            )
        if lr <= 0 or alpha < 0 or mask_guidance < 0:
            raise UserError("method.lr must be above 0, method.alpha and method.mask_guidance not below it")
        self.name = name
        self.mode = checked_mode(name, mode)
        self.group = group
        self.asked = prompts
        self.share = share
        self.mask_guidance = mask_guidance
        self.mask_batches = mask_batches
        self.target = target
        self.alpha = alpha
        self.forget_size = forget_size
        self.retain_size = retain_size
        self.sampler = Sampler(sampling_steps, sampling_guidance)
        self.steps = steps
        self.lr = lr
        self.batch_size = batch_size

    def check(self, concept: AnyConcept) -> None:
        if not concept.retain_prompts():
            raise UserError(f"method=salun trains on what must stay, and '{concept.name}' names nothing that must")

    def begin(self, job: Job) -> None:
        self.job = job
        if self.batch_size % (job.mine.step or 1):
            raise UserError(f"method.batch_size={self.batch_size} does not divide over {job.mine.step} processes")
        entries = erasing_prompts(job.concept, self.asked)
        retained = job.concept.retain_prompts()
        random.Random(job.seed).shuffle(entries)
        random.Random(job.seed).shuffle(retained)
        self.prompts, self.anchors = [entry.prompt for entry in entries], [entry.anchor for entry in entries]
        self.forget = self._painted(self.prompts, self.forget_size, "pictures to forget")
        self.retain = self._painted(retained, self.retain_size, "pictures to retain")
        # A buffer: saved with the state, and rank 0's on all ranks, whatever order a GPU adds gradients in.
        self.own = nn.Module()
        self.own.register_buffer("mask", largest(self._saliency(), self.share))

    def _painted(self, prompts: list[str], size: int, text: str) -> Paintings:
        job = self.job
        advance = job.progress(text, size)
        folder = job.cache / "banks"
        paintings = Paintings.build(job.model, prompts, size, self.sampler, job.seed, folder, advance)
        job.account(paintings.saved_seconds)
        return paintings

    def _saliency(self) -> Tensor:
        """(N,): |sum of gradients| of the loss on pictures of the concept, the group's weights one after another."""
        job, model, w = self.job, self.job.model, self.mask_guidance
        leaves = {key: weight.detach().requires_grad_() for key, weight in job.weights.items()}
        total = [torch.zeros_like(leaf) for leaf in leaves.values()]
        advance = job.progress("saliency", self.mask_batches)
        for i in range(self.mask_batches):
            rows = self.forget.draw(job.seed, i, self.batch_size, MASK)
            text = model.encode([self.prompts[which] for which in rows.which.tolist()])
            if w == 0:
                predicted = model.predict(rows.latents, rows.t, text, weights=leaves)
            else:
                both = torch.cat([text, model.encode([""] * self.batch_size)])
                x, t = rows.latents.repeat(2, 1, 1, 1), rows.t.repeat(2)
                asked, nothing = model.predict(x, t, both, weights=leaves).chunk(2)
                predicted = (1 + w) * asked - w * nothing
            loss = F.mse_loss(predicted, rows.noise)
            for sum_, gradient in zip(
                total, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True
            ):
                if gradient is not None:
                    sum_ += gradient
            advance(1)
        return torch.cat([sum_.flatten() for sum_ in total]).abs()

    def optimizers(self) -> list[Optimizer]:
        return [Adam(self.job.weights.values(), lr=self.lr)]

    def batches(self, start: int) -> Iterator[Batch]:
        for step in range(start, self.steps):
            forget, retain = self._mine(self.forget, step, FORGET), self._mine(self.retain, step, RETAIN)
            asked = forget.which.tolist()
            yield Batch(
                forget,
                [self.prompts[which] for which in asked],
                [self.anchors[which] for which in asked],
                retain,
                [self.retain.prompts[which] for which in retain.which.tolist()],
            )

    def _mine(self, paintings: Paintings, step: int, stream: int) -> Noised:
        rows, mine = paintings.draw(self.job.seed, step, self.batch_size, stream), self.job.mine
        return Noised(rows.latents[mine], rows.t[mine], rows.noise[mine], rows.which[mine])

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """MSE(eps(x, c), eps0(x, anchor)) on pictures of c, plus alpha times the diffusion loss on what must stay."""
        model, forget, retain = self.job.model, batch.forget, batch.retain
        with torch.no_grad():
            weights = self.job.base if self.target == "frozen" else None
            goal = model.predict(forget.latents, forget.t, model.encode(batch.anchors), weights=weights)
        x, t = torch.cat([forget.latents, retain.latents]), torch.cat([forget.t, retain.t])
        redirected, kept = model.predict(x, t, model.encode(batch.prompts + batch.retained)).chunk(2)
        redirection, retention = F.mse_loss(redirected, goal), F.mse_loss(kept, retain.noise)
        loss = redirection + self.alpha * retention
        self.job.update(loss, adjust=self._mask_gradients)
        return {"loss": loss.detach(), "redirection": redirection.detach(), "retention": retention.detach()}

    def _mask_gradients(self) -> None:
        assert self.own is not None
        weights = list(self.job.weights.values())
        masks = self.own.get_buffer("mask").split([weight.numel() for weight in weights])
        for weight, mask in zip(weights, masks, strict=True):
            if weight.grad is not None:
                weight.grad *= mask.view_as(weight)

    def finish(self) -> Edit:
        job = self.job
        return Edit.from_change(job.model.pipe, job.base, method=self.name, concept=job.concept.name, config=job.config)


def largest(saliency: Tensor, share: float) -> Tensor:
    """Bool mask (N,) of the `share` of entries that are largest; never one that is 0, as nothing speaks for it."""
    count = max(1, round(share * len(saliency)))
    threshold = saliency.kthvalue(len(saliency) - count + 1).values
    return (saliency >= threshold) & (saliency > 0)
