"""TRUST, selective fine-tuning of concept neurons (Mansi, Kori, Toni and Demetriou 2026, arXiv 2602.07919).

The weights of cross-attention that an alignment score answers to are found again and again while training, and only
they are trained: to predict for the concept what belongs to its anchor, and to matter less.
"""

import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from unpaint.aligners import Aligner
from unpaint.concepts import AnyConcept
from unpaint.curvature import Scalar, Tensors, gradient, gradient_and_curvature
from unpaint.edit import Edit
from unpaint.errors import UserError, nearest
from unpaint.latents import Bank, Noised, Paintings, Underway, check_clean_latents, clean_latents
from unpaint.methods.base import MODES, Job, checked_mode, erasing_prompts
from unpaint.saliency import ConceptNeurons
from unpaint.sampling import Sampler, denoise_on, denoise_to
from unpaint.seeds import seed_of

CHOICES = {
    "objective": ("csr", "cip", "zero"),
    "previous": ("redirection", "none"),
    "retain_goal": ("noise", "teacher"),
    "prompts": ("all", "concept"),
    "latents": ("student", "bank"),
    "sensitivity": ("projection", "energy"),
    "surrogate": ("sigmoid", "hinge"),
    "second_order": ("exact", "finite_difference"),
    "image": ("one_step", "trajectory"),
    "align_to": ("concept", "prompt"),
    "granularity": ("weight", "head"),
    "zscore_within": ("projection", "layer"),
}


@dataclass(frozen=True)
class Pictures:
    """What pictures are made of: latents (B, C, h, w) at t (B,), or seeds to start from; what they are painted for."""

    latents: Tensor | None
    t: Tensor | None
    seeds: list[int]
    prompts: list[str]


@dataclass(frozen=True)
class Batch:
    """One step's rows of this rank.

    latents x_t (B, C, h, w), t (B,), which prompt (B,); directions (B, C, h, w), standard normal, for the sensitivity;
    pictures: for the saliency, none in a step that needs none; retain: noised pictures of what must stay; trajectories
    (batch size,): which ones all ranks' rows are, if they are under way.
    """

    step: int
    latents: Tensor
    t: Tensor
    which: list[int]
    directions: Tensor
    pictures: list[Pictures]
    retain: Noised | None
    trajectories: Tensor | None


class TRUST:
    """Options are described in conf/method/trust.yaml and docs/methods.md.

    aligner: images (n, 3, H, W) between 0 and 1 and n prompts to scores (n,), differentiable in the images.
    """

    group = "cross_attention.qkv"

    def __init__(
        self,
        name: str,
        aligner: Aligner,
        objective: str,
        beta: float,
        sensitivity: str,
        surrogate: str,
        temperature: float,
        second_order: str,
        difference: float,
        previous: str,
        retain: float,
        retain_goal: str,
        retain_size: int,
        image: str,
        gradient_steps: int,
        image_guidance: float,
        align_to: str,
        granularity: str,
        zscore_within: str,
        xi: float,
        mask_every: int,
        mask_ema: float,
        first_estimates: int,
        prompts: str,
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
        chosen = {
            "objective": objective,
            "previous": previous,
            "retain_goal": retain_goal,
            "prompts": prompts,
            "latents": latents,
            "sensitivity": sensitivity,
            "surrogate": surrogate,
            "second_order": second_order,
            "image": image,
            "align_to": align_to,
            "granularity": granularity,
            "zscore_within": zscore_within,
        }
        for key, value in chosen.items():
            if value not in CHOICES[key]:
                there = " or ".join(CHOICES[key])
                raise UserError(f"method.{key} is {there}, not '{value}'{nearest(value, CHOICES[key])}")
        if not callable(aligner):
            raise UserError("method.aligner is a callable, images and prompts to scores: aligner@method.aligner=clip")
        if min(steps, batch_size, bank_size, retain_size, first_estimates) < 1:
            raise UserError(
                "method.steps, batch_size, bank_size, retain_size and first_estimates must be at least 1 each"
            )
        if lr <= 0 or temperature <= 0 or difference <= 0:
            raise UserError("method.lr, method.temperature and method.difference must be above 0")
        if beta < 0 or retain < 0 or mask_every < 0:
            raise UserError("method.beta, method.retain and method.mask_every must not be below 0")
        if not 0 <= mask_ema < 1:
            raise UserError(f"method.mask_ema is at least 0 and below 1, not {mask_ema}")
        if image == "trajectory" and not 1 <= gradient_steps <= sampling_steps:
            raise UserError(f"method.gradient_steps is between 1 and sampling_steps={sampling_steps}")
        if latents == "student" and batch_size > bank_size:
            raise UserError(
                f"method.latents=student moves {batch_size} of method.bank_size={bank_size} a step: too few"
            )
        if objective == "cip" and beta > 1:
            warnings.warn(
                f"method.objective=cip with method.beta={beta:g} undoes the erasing, as its count is that much larger "
                "than csr's squares; 0.01 was tuned: experiment=trust/cip",
                stacklevel=2,
            )
        if objective != "zero" and previous == "none" and beta == 0:
            raise UserError("method.previous=none and method.beta=0 leave nothing to learn; give one of them")
        self.name = name
        # What is set to zero is handed on to no further member.
        self.mode = checked_mode(name, mode, ("joint", "composed") if objective == "zero" else MODES)
        self.aligner = aligner
        self.objective = objective
        self.beta = beta
        self.sensitivity = sensitivity
        self.surrogate = surrogate
        self.temperature = temperature
        self.second_order = second_order
        self.difference = difference
        self.previous = previous
        self.retain = retain
        self.retain_goal = retain_goal
        self.retain_size = retain_size
        self.image = image
        self.gradient_steps = gradient_steps
        self.painter = Sampler(sampling_steps, image_guidance)
        self.align_to = align_to
        self.granularity = granularity
        self.zscore_within = zscore_within
        self.xi = xi
        self.mask_every = mask_every
        self.mask_ema = mask_ema
        self.first_estimates = first_estimates
        self.asked = prompts
        self.latents = latents
        self.bank_size = bank_size
        self.sampler = Sampler(sampling_steps, sampling_guidance)
        # Zeroing is one step: it looks and then cuts.
        self.steps = 1 if objective == "zero" else steps
        self.lr = lr
        self.lr_decay = lr_decay
        self.batch_size = batch_size
        self.own: nn.Module | None = None

    def check(self, concept: AnyConcept) -> None:
        """Every kind of concept will do, as only the prompts differ; to retain, it must name something."""
        if self._retains and not concept.retain_prompts():
            raise UserError(
                f"method=trust trains on what must stay, and '{concept.name}' names nothing that must; without: "
                "method.retain=0"
            )

    def begin(self, job: Job) -> None:
        self.job = job
        self.world = job.mine.step or 1
        if self.image == "one_step":
            check_clean_latents(job.model)
        if self.batch_size % self.world:
            raise UserError(f"method.batch_size={self.batch_size} does not divide over {self.world} processes")
        if self.second_order == "finite_difference" and job.model.dtype != torch.float32:
            raise UserError(
                "method.second_order=finite_difference takes model.dtype=float32: differences drown in less"
            )
        only = getattr(self.aligner, "only_for", None)
        if only not in (None, job.model.name):
            warnings.warn(
                f"the aligner knows pictures of model '{only}', and finds no neurons of '{job.model.name}' that mean "
                "anything; give another: method.aligner.path=FOLDER",
                stacklevel=2,
            )
        entries = erasing_prompts(job.concept, self.asked)
        random.Random(job.seed).shuffle(entries)
        self.prompts, self.anchors = [entry.prompt for entry in entries], [entry.anchor for entry in entries]
        self.bare = {entry.prompt: entry.bare for entry in entries}
        self.adam = Adam(job.weights.values(), lr=self.lr)
        self.paintings = self._paintings() if self._retains else None
        self.neurons = ConceptNeurons(job.weights, self._units(), self.xi, self.zscore_within == "layer")
        self.own = nn.ModuleDict({"neurons": self.neurons})
        if self.latents == "student":
            advance = job.progress("first steps of the trajectories", self.bank_size)
            self.underway = Underway(
                job.model, self.prompts, self.bank_size, self.sampler, job.seed, job.base, progress=advance
            )
            self.own["trajectories"] = self.underway
        else:
            folder = job.cache / "banks"
            advance = job.progress("trajectories of the unedited model", self.bank_size)
            self.bank = Bank.build(job.model, self.prompts, self.bank_size, self.sampler, job.seed, folder, advance)
            job.account(self.bank.saved_seconds)

    def _units(self) -> dict[str, int]:
        weights, unet = self.job.weights, self.job.model.pipe.unet
        if self.granularity == "weight":
            return {key: weight.numel() for key, weight in weights.items()}
        return {key: unet.get_submodule(key.removeprefix("unet.").partition(".to_")[0]).heads for key in weights}

    @property
    def _retains(self) -> bool:
        return self.retain > 0 and self.previous == "redirection" and self.objective != "zero"

    def _paintings(self) -> Paintings:
        job = self.job
        prompts = job.concept.retain_prompts()
        random.Random(job.seed).shuffle(prompts)
        advance = job.progress("pictures of what must stay", self.retain_size)
        folder = job.cache / "banks"
        paintings = Paintings.build(job.model, prompts, self.retain_size, self.sampler, job.seed, folder, advance)
        job.account(paintings.saved_seconds)
        return paintings

    def optimizers(self) -> list[Optimizer]:
        return [] if self.objective == "zero" else [self.adam]

    # --- data

    def batches(self, start: int) -> Iterator[int]:
        """The numbers of the steps: where trajectories under way are is known when a step begins, and not before."""
        return iter(range(start, self.steps))

    def _batch(self, step: int) -> Batch:
        job, n = self.job, self.batch_size
        rows = list(range(n))[job.mine]
        latents, t, which, trajectories = self._latents(step)
        generator = torch.Generator().manual_seed(seed_of("tune", job.seed, step, 1))
        directions = torch.randn(latents.shape, generator=generator).to(latents)
        # No draw of pictures is used twice: those of step s follow all steps, the further first ones follow those.
        draws = [2 * self.steps + i for i in range(self.first_estimates - 1)] if step == 0 else []
        if self._looks(step) or self._counts:
            draws.append(self.steps + step)
        retain = None
        if self.paintings is not None:
            noised = self.paintings.draw(job.seed, step, n)
            retain = Noised(noised.latents[rows], noised.t[rows], noised.noise[rows], noised.which[rows])
        pictures = [self._pictures(draw) for draw in draws]
        return Batch(
            step, latents[rows], t[rows], which[rows].tolist(), directions[rows], pictures, retain, trajectories
        )

    def _latents(self, draw: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """A global batch: latents, t, which prompt; and which trajectories they are, if they are under way."""
        if self.latents == "bank":
            return *self.bank.draw(self.job.seed, draw, self.batch_size), None
        trajectories = self.underway.drawn(draw, self.batch_size)
        return *self.underway.at(trajectories), trajectories

    def _looks(self, step: int) -> bool:
        """Whether the mask is estimated in this step."""
        return step == 0 if self.mask_every == 0 else step % self.mask_every == 0

    @property
    def _counts(self) -> bool:
        return self.objective == "cip" and self.beta > 0

    def _pictures(self, draw: int) -> Pictures:
        seed, n = self.job.seed, self.batch_size
        rows = list(range(n))[self.job.mine]
        latents, t, which, _ = self._latents(draw)
        prompts = [self.prompts[which[row]] for row in rows]
        if self.image == "one_step":
            return Pictures(latents[rows], t[rows], [], prompts)
        return Pictures(None, None, [seed_of("fresh", seed, draw, row) for row in rows], prompts)

    # --- one step

    def step(self, number: int) -> dict[str, Tensor]:
        batch = self._batch(number)
        logs, pull = self._find(batch)
        if self.objective == "zero":
            return logs
        if self.objective == "csr" and self.beta > 0:
            _, found, curvature = self._first_and_second(self._noise(batch), True)
            logs["sensitivity_of_noise"], outer = _outer(self._mean_square, self._over_ranks(found))
            pull.append(curvature(outer))
        # A loss with the penalty's gradient, so that it is averaged and scaled as any other.
        loss = sum(
            (self.beta * (p * along[key]).sum() for along in pull for key, p in self.job.weights.items()),
            torch.zeros((), device=batch.latents.device),
        )
        asked = None
        if self.previous == "redirection":
            redirection, retention, asked = self._previous(batch)
            logs["redirection"] = redirection.detach()
            loss = loss + redirection
            if retention is not None:
                logs["retention"] = retention.detach()
                loss = loss + self.retain * retention
        if self.lr_decay:
            for group in self.adam.param_groups:
                group["lr"] = self.lr * (1 - batch.step / self.steps)
        if batch.trajectories is not None:
            self._move(batch, batch.trajectories, asked)
        self._update(loss)
        return logs

    def _move(self, batch: Batch, trajectories: Tensor, asked: Tensor | None) -> None:
        """A step of DDIM for the batch's trajectories, as the model predicts before this step's update; asked (B, C, h,
        w): its predictions with the prompts, if they are there. Every rank moves its own, and learns of the others'."""
        model, mine, own = self.job.model, self.job.mine, self.underway
        with torch.no_grad():
            if asked is None:
                asked = model.predict(batch.latents, batch.t, model.encode([self.prompts[i] for i in batch.which]))
            nothing = model.predict(batch.latents, batch.t, model.encode([""] * len(batch.t)))
        moved = torch.zeros_like(own.latents[trajectories])
        moved[mine] = own.moved(trajectories[mine], asked.detach(), nothing)
        own.move(batch.step, trajectories, self.job.total(moved))

    def _find(self, batch: Batch) -> tuple[dict[str, Tensor], list[Tensors]]:
        """Looks at the pictures: renews the mask when it is time to, and returns logs and CIP's gradient, if any."""
        logs = {"mask/jaccard_previous": torch.ones((), device=batch.latents.device)}
        pull: list[Tensors] = []
        if batch.pictures:
            *further, own = batch.pictures
            for pictures in further:
                _, found = gradient(self._alignment(pictures), self.job.weights)
                self.neurons.add(self._over_ranks(found), 1 / self.first_estimates, keep=1)
            logs["alignment"], found, curvature = self._first_and_second(self._alignment(own), self._counts)
            found = self._over_ranks(found)
            if self._looks(batch.step):
                first = batch.step == 0
                share, keep = (1 / self.first_estimates, 1.0) if first else (1 - self.mask_ema, self.mask_ema)
                self.neurons.add(found, share, keep)
                logs |= self.neurons.choose(first)
                # Not `<=`: the z-scores of a gradient that overflowed are no numbers.
                if first and not (highest := self.neurons.highest()) > self.xi:
                    raise UserError(
                        f"method.xi={self.xi:g} leaves no concept neurons: of the {self.granularity}s the largest "
                        f"z-score is {highest:.3g}"
                    )
            if self._counts:
                logs["influential"], outer = _outer(self._influential, found)
                pull.append(curvature(outer))
        return logs | self.neurons.drift(), pull

    def _update(self, loss: Tensor) -> None:
        """One step of Adam on the masked weights: the others' gradients are 0 and they keep their bits."""
        weights, mask = self.job.weights, self.neurons.mask()
        before = {key: p.detach().clone() for key, p in weights.items()}

        def adjust() -> None:
            for key, p in weights.items():
                if p.grad is not None:
                    p.grad.masked_fill_(~mask[key], 0)

        self.job.update(loss, adjust=adjust)
        with torch.no_grad():
            for key, p in weights.items():
                # Adam moves a weight that has left the mask on by its momentum.
                p.copy_(torch.where(mask[key], p, before[key]))

    def _first_and_second(self, scalar: Scalar, bends: bool) -> tuple[Tensor, Tensors, Callable[..., Tensors]]:
        if bends:
            return gradient_and_curvature(scalar, self.job.weights, self.second_order, self.difference)
        return *gradient(scalar, self.job.weights), lambda v: {}

    def _over_ranks(self, tensors: Tensors) -> Tensors:
        """The mean over ranks, each of which has seen its rows of the batch."""
        flat = self.job.total(torch.cat([tensor.flatten() for tensor in tensors.values()])) / self.world
        parts = flat.split([tensor.numel() for tensor in tensors.values()])
        return {key: part.view_as(tensors[key]) for key, part in zip(tensors, parts, strict=True)}

    # --- what is differentiated

    def _alignment(self, pictures: Pictures) -> Scalar:
        """Mean alignment score of pictures, as a function of the weights they are painted with."""
        model, painter, prompts = self.job.model, self.painter, pictures.prompts
        text, empty = model.encode(prompts), model.encode([""])
        asked = [self.bare[prompt] for prompt in prompts] if self.align_to == "concept" else prompts
        k = painter.steps - self.gradient_steps
        start = denoise_to(model, text, empty, pictures.seeds, k, painter)[0] if pictures.latents is None else None

        def score(weights: Mapping[str, Tensor]) -> Tensor:
            if start is not None:
                latents = denoise_on(model, start, k, text, empty, painter, weights)
            else:
                latents = self._clean(pictures, text, empty, weights)
            return self.aligner(model.decode(latents).float(), asked).mean()

        return score

    def _clean(self, pictures: Pictures, text: Tensor, empty: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The clean latents that partially denoised ones promise: (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)."""
        model, x, t = self.job.model, pictures.latents, pictures.t
        assert x is not None and t is not None
        guidance = self.painter.guidance
        if guidance == 1:
            noise = model.predict(x, t, text, weights)
        else:
            both = torch.cat([empty.expand_as(text), text])
            without, with_text = model.predict(x.repeat(2, 1, 1, 1), t.repeat(2), both, weights).chunk(2)
            noise = without + guidance * (with_text - without)
        return clean_latents(x, noise, model.alphas_cumprod[t])

    def _noise(self, batch: Batch) -> Scalar:
        """A scalar of the noise predicted for the concept.

        `projection`: sum(r eps) / sqrt(number of entries) over the global batch, r standard normal; the expected
        square of its gradient in a weight is the mean over entries of (d eps / d w)^2. `energy`: mean(eps^2).
        """
        model = self.job.model
        text = model.encode([self.prompts[i] for i in batch.which])
        entries = self.batch_size * batch.latents[0].numel()

        def scalar(weights: Mapping[str, Tensor]) -> Tensor:
            noise = model.predict(batch.latents, batch.t, text, weights).float()
            if self.sensitivity == "energy":
                return noise.square().mean()
            # Ranks are averaged, and this is a sum over the rows of all.
            return self.world * (batch.directions * noise).sum() / entries**0.5

        return scalar

    def _mean_square(self, found: Tensors) -> Tensor:
        """Mean square of a gradient over the masked weights: what CSR adds to the loss."""
        mask = self.neurons.mask()
        squares = torch.stack([(g.square() * mask[key]).sum() for key, g in found.items()]).sum()
        return squares / torch.stack([m.sum() for m in mask.values()]).sum().clamp(min=1)

    def _influential(self, found: Tensors) -> Tensor:
        """The share of units whose influence is above the threshold, made differentiable: what CIP adds to the loss."""
        excess = torch.cat(list(self.neurons.zscores(self.neurons.measure(found)).values())) - self.xi
        if self.surrogate == "hinge":
            return excess.relu().mean()
        return (excess / self.temperature).sigmoid().mean()

    # --- the previous loss

    def _previous(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor]:
        """SalUn's two terms, and the predictions (B, C, h, w) for the concept's prompts.

        Redirection: these are to be what the unedited model predicts for the anchor's prompts. Retention, if there is
        any: predict the noise in pictures of what must stay; or, `teacher`, what the unedited model predicts.
        """
        model, kept, n = self.job.model, batch.retain, len(batch.t)
        x, t, text = batch.latents, batch.t, [self.prompts[i] for i in batch.which]
        goals = [self.anchors[i] for i in batch.which]
        if kept is not None and self.paintings is not None:
            x, t = torch.cat([x, kept.latents]), torch.cat([t, kept.t])
            retained = [self.paintings.prompts[i] for i in kept.which.tolist()]
            text, goals = text + retained, goals + retained
        with torch.no_grad():
            rows = len(t) if self.retain_goal == "teacher" else n
            goal = model.predict(x[:rows], t[:rows], model.encode(goals[:rows]), weights=self.job.base)
        predicted = model.predict(x, t, model.encode(text))
        redirection, retention = F.mse_loss(predicted[:n], goal[:n]), None
        if kept is not None:
            retention = F.mse_loss(predicted[n:], goal[n:] if self.retain_goal == "teacher" else kept.noise)
        return redirection, retention, predicted[:n]

    def finish(self) -> Edit:
        job = self.job
        pipe, name, concept = job.model.pipe, self.name, job.concept.name
        if self.objective == "zero":
            return Edit.from_zeros(pipe, self.neurons.mask(), method=name, concept=concept, config=job.config)
        return Edit.from_change(pipe, job.base, method=name, concept=concept, config=job.config)


def _outer(penalty: Callable[[Tensors], Tensor], found: Tensors) -> tuple[Tensor, Tensors]:
    """A penalty on a gradient, and its derivative with respect to that gradient."""
    leaves = {key: g.detach().requires_grad_(True) for key, g in found.items()}
    value = penalty(leaves)
    return value.detach(), dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
