"""SepME, Separable Multi-concept Erasure (Zhao et al. 2024, arXiv 2402.05947).

The model's answer to the concept is decorrelated from what it was, by a change of the keys and values of
cross-attention that leaves those of chosen other prompts as they are: edits of several concepts can be put on and
taken off one by one.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from unpaint.concepts import AnyConcept
from unpaint.edit import Edit
from unpaint.errors import UserError, nearest
from unpaint.latents import Paintings
from unpaint.methods.base import Job, checked_mode
from unpaint.sampling import Sampler

GROUPS = {"separable": "cross_attention.kv", "direct": "cross_attention"}
PROMPTS = ("concept", "all")
PROTECT = ("none", "neighbours", "in_domain")
ROUNDING = 1e-6


@dataclass(frozen=True)
class Batch:
    """Noised pictures of the concept x_t (B, C, h, w), their t (B,), and the prompt of each."""

    latents: Tensor
    t: Tensor
    prompts: list[str]


class State(nn.Module):
    """What SepME keeps from step to step: coefficients V_l (d_l, m) of the basis (m, D), with no basis none; the moving
    average of the correlation; and, if gradients accumulate, their sums over the steps.

    The basis is kept too: another machine would find another one of the same space, for which V means nothing.
    """

    basis: Tensor
    average: Tensor
    seen: Tensor
    stopped: Tensor

    def __init__(self, base: Sequence[Tensor], basis: Tensor | None) -> None:
        super().__init__()
        device = base[0].device
        if basis is not None:
            self.register_buffer("basis", basis.to(device, torch.float32))
            self.coefficients = nn.ParameterList(torch.zeros(len(w), len(basis), device=device) for w in base)
        self.register_buffer("average", torch.zeros((), device=device))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("stopped", torch.zeros((), dtype=torch.bool, device=device))

    def accumulate(self, parameters: Sequence[nn.Parameter]) -> None:
        """Makes room for the sums of the gradients of `parameters`."""
        for i, parameter in enumerate(parameters):
            self.register_buffer(f"gradients_{i}", torch.zeros_like(parameter))


class SepME:
    """`variant`: `separable` trains coefficients of a null space (section "weight decoupling"), `direct` all of
    cross-attention (the paper's non-recoverable variant), which fixes no prompt.

    What must not move, for `separable`: the blank prompt and the first `decouple` prompts (bare words first) of each
    concept in `job.beside`, or, if there is none and `neighbours` is set, of each of the concept's neighbours. Singular
    values of their text states below `tolerance` times the largest count as zero. `protect` names retained concepts
    all of whose prompts are held as still as can be by giving up dimensions, until `protect_share` of those that the
    blank prompt leaves are gone. Fewer than `least_dimensions` in the end is a UserError.

    `prompts`: train on `all` erasing prompts or on the bare `concept`; `pictures` of them are painted by the unedited
    model with `sampling_steps` of DDIM at `sampling_guidance`. `basis_scale` is beta, `drift_weight` lambda,
    `stop_below` tau, `stop_smoothing` alpha; no run stops before `stop_after` steps, so `steps` there means never.
    """

    own: State

    def __init__(
        self,
        name: str,
        variant: str,
        decouple: int,
        neighbours: bool,
        tolerance: float,
        protect: str,
        protect_share: float,
        least_dimensions: int,
        prompts: str,
        pictures: int,
        sampling_steps: int,
        sampling_guidance: float,
        basis_scale: float,
        drift_weight: float,
        stop_below: float,
        stop_smoothing: float,
        stop_after: int,
        accumulate_gradients: bool,
        steps: int,
        lr: float,
        batch_size: int,
        mode: str,
    ) -> None:
        for option, value, known in (
            ("variant", variant, tuple(GROUPS)),
            ("prompts", prompts, PROMPTS),
            ("protect", protect, PROTECT),
        ):
            if value not in known:
                raise UserError(f"method.{option} is {', '.join(known)}, not '{value}'{nearest(value, known)}")
        if min(steps, batch_size, pictures, decouple, least_dimensions) < 1:
            counts = "steps, batch_size, pictures, decouple and least_dimensions"
            raise UserError(f"method.{counts} must be at least 1")
        if lr <= 0 or basis_scale <= 0 or drift_weight < 0 or stop_after < 0:
            raise UserError(
                "method.lr and method.basis_scale must be above 0, method.drift_weight and method.stop_after not below"
            )
        for option, share in (
            ("tolerance", tolerance),
            ("protect_share", protect_share),
            ("stop_smoothing", stop_smoothing),
        ):
            if not 0 <= share < 1:
                raise UserError(f"method.{option} is at least 0 and below 1, not {share}")
        self.name = name
        self.mode = checked_mode(name, mode, ("sequential", "composed"))
        self.separable = variant == "separable"
        self.group = GROUPS[variant]
        self.decouple = decouple
        self.neighbours = neighbours
        self.tolerance = tolerance
        self.protect = protect
        self.protect_share = protect_share
        self.least_dimensions = least_dimensions
        self.asked = prompts
        self.pictures = pictures
        self.sampler = Sampler(sampling_steps, sampling_guidance)
        self.basis_scale = basis_scale
        self.drift_weight = drift_weight
        self.stop_below = stop_below
        self.stop_smoothing = stop_smoothing
        self.stop_after = stop_after
        self.accumulate_gradients = accumulate_gradients
        self.steps = steps
        self.lr = lr
        self.batch_size = batch_size

    def check(self, concept: AnyConcept) -> None:
        if concept.kind != "individual":
            raise UserError(f"method=sepme erases individual concepts; '{concept.name}' is a {concept.kind}")

    # ------------------------------------------------------------ before the first step

    def begin(self, job: Job) -> None:
        self.job = job
        if self.batch_size % (job.mine.step or 1):
            raise UserError(f"method.batch_size={self.batch_size} does not divide over {job.mine.step} processes")
        every = job.concept.prompts(further=True)
        self.prompts = every if self.asked == "all" else every[:1]
        random.Random(job.seed).shuffle(self.prompts)
        self.own = State(list(job.base.values()), self._basis() if self.separable else None)
        self.trained = list(self.own.coefficients if self.separable else job.weights.values())
        if self.accumulate_gradients:
            self.own.accumulate(self.trained)
        advance = job.progress("pictures of the unedited model", self.pictures)
        folder = job.cache / "banks"
        self.bank = Paintings.build(job.model, self.prompts, self.pictures, self.sampler, job.seed, folder, advance)
        job.account(self.bank.saved_seconds)

    def _basis(self) -> Tensor:
        fixed, protected = self.fixed_prompts(), self.protected_prompts()
        states, own = self._states(fixed), self._states(self.prompts).double()
        basis = null_space(states, self.tolerance)
        left = len(basis)
        if protected:
            # What prompts that must not move have taken is no loss a second time.
            alone = len(null_space(self._states([""]), self.tolerance))
            basis = stillest(basis, self._states(protected), min(left, alone - int(self.protect_share * alone)))
        lacking = ""
        if len(basis) < self.least_dimensions:
            lacking = f"method.least_dimensions={self.least_dimensions}"
        elif (own @ basis.T).norm() <= ROUNDING * own.norm():
            lacking = f"and the prompts of '{self.job.concept.name}' lie along none of those"
        if lacking:
            given_up = f", {left - len(basis)} of them given up to protect others" if protected else ""
            raise UserError(
                f"method=sepme: {len(fixed)} prompts that must not move leave {left} of {states.shape[1]} dimensions"
                f"{given_up}, {lacking}; erase fewer concepts at once, or lower "
                f"method.decouple={self.decouple} (prompts a concept), or raise method.tolerance={self.tolerance:g}"
            )
        return basis

    def _states(self, prompts: Sequence[str]) -> Tensor:
        return self.job.model.encode(prompts).flatten(0, 1)

    def fixed_prompts(self) -> list[str]:
        """The prompts whose keys and values must not move at all, the blank one first."""
        concept, beside = self.job.concept, self.job.beside
        others = [other.prompts() for other in beside]
        if not beside and self.neighbours:
            others = [_prompts_of(concept, label) for label in concept.neighbours]
        heads = [prompt for prompts in others for prompt in self._without_target(prompts)[: self.decouple]]
        return list(dict.fromkeys(["", *heads]))

    def protected_prompts(self) -> list[str]:
        """The prompts whose keys and values should move as little as can be."""
        concept = self.job.concept
        if self.protect == "none":
            return []
        labels = concept.neighbours if self.protect == "neighbours" else concept.retained
        others = [_prompts_of(concept, label) for label in labels] + [other.prompts() for other in self.job.beside]
        return list(dict.fromkeys(prompt for prompts in others for prompt in self._without_target(prompts)))

    def _without_target(self, prompts: Sequence[str]) -> list[str]:
        """A style's prompts name objects: one that is to be erased is not to be held."""
        words = "|".join(re.escape(member.target) for member in self.job.concept.members)
        target = re.compile(rf"\b({words})\b")
        return [prompt for prompt in prompts if not target.search(prompt)]

    def optimizers(self) -> list[Optimizer]:
        return [Adam(self.trained, lr=self.lr)]

    # ------------------------------------------------------------ steps

    def batches(self, start: int) -> Iterator[Batch | None]:
        """None after the early stop. The steps go on, so that what is measured at a step still is."""
        for step in range(start, self.steps):
            yield None if self.own.stopped else self._draw(step)

    def _draw(self, step: int) -> Batch:
        drawn = self.bank.draw(self.job.seed, step, self.batch_size)
        mine = self.job.mine
        return Batch(drawn.latents[mine], drawn.t[mine], [self.prompts[which] for which in drawn.which[mine].tolist()])

    def step(self, batch: Batch | None) -> dict[str, Tensor]:
        """The correlation of the answers r = eps(x, c) - eps(x, "") after and before, mean of r' r, plus the drift."""
        if batch is None or self.own.stopped:
            return {"stopped": self.own.stopped.float()}
        job, model = self.job, self.job.model
        text, blank = model.encode(batch.prompts), model.encode([""] * len(batch.t))
        both = (batch.latents.repeat(2, 1, 1, 1), batch.t.repeat(2), torch.cat([text, blank]))
        with torch.no_grad():
            asked, nothing = model.predict(*both, weights=job.base).chunk(2)
        before = asked - nothing
        if self.separable:
            changes = self.changes()
            weights = {key: w + change for (key, w), change in zip(job.base.items(), changes, strict=True)}
            after = model.predict(batch.latents, batch.t, text, weights=weights) - nothing
        else:
            changes = [p - w for p, w in zip(job.weights.values(), job.base.values(), strict=True)]
            asked, nothing = model.predict(*both).chunk(2)
            after = asked - nothing
        correlation = (after * before).mean()
        drift = torch.stack([change.abs().sum() for change in changes]).mean()
        job.update(correlation + self.drift_weight * drift, adjust=self._sum_up if self.accumulate_gradients else None)
        if self.separable:
            self._write()
        correlation = job.total(correlation.detach()) / (job.mine.step or 1)
        self._watch(correlation)
        return {
            "correlation": correlation,
            "average": self.own.average,
            "drift": drift.detach(),
            "stopped": self.own.stopped.float(),
        }

    def changes(self) -> list[Tensor]:
        """dW_l = V_l beta S of each weight; in full precision, or the fixed prompts would move."""
        own = self.own
        with torch.autocast(own.basis.device.type, enabled=False):
            return [v @ (self.basis_scale * own.basis) for v in own.coefficients]

    @torch.no_grad()
    def _write(self) -> None:
        job = self.job
        for (key, weight), change in zip(job.weights.items(), self.changes(), strict=True):
            weight.copy_(job.base[key] + change)

    def _sum_up(self) -> None:
        for i, parameter in enumerate(self.trained):
            total = self.own.get_buffer(f"gradients_{i}")
            assert parameter.grad is not None
            parameter.grad.copy_(total.add_(parameter.grad))

    def _watch(self, correlation: Tensor) -> None:
        """M_0 = L_0, M_n = alpha M_{n-1} + (1 - alpha) L_n; stops when n > `stop_after` and M_n < tau."""
        own = self.own
        n = int(own.seen)
        alpha = self.stop_smoothing if n else 0.0
        own.average.mul_(alpha).add_(correlation.float(), alpha=1 - alpha)
        own.seen.add_(1)
        if n > self.stop_after and float(own.average) < self.stop_below:
            own.stopped.fill_(True)

    def finish(self) -> Edit:
        job = self.job
        return Edit.from_change(job.model.pipe, job.base, method=self.name, concept=job.concept.name, config=job.config)


def null_space(rows: Tensor, tolerance: float) -> Tensor:
    """An orthonormal basis (m, D), float64, of the vectors that all `rows` (n, D) are orthogonal to.

    Singular values up to `tolerance` times the largest count as zero. m may be 0.
    """
    # The triangle of a QR has the same singular values and right vectors, and at most D rows.
    triangle = torch.linalg.qr(rows.double(), mode="r").R
    _, values, right = torch.linalg.svd(triangle, full_matrices=True)
    return right[int((values > tolerance * values[0]).sum()) :]


def stillest(basis: Tensor, rows: Tensor, count: int) -> Tensor:
    """The `count` directions (count, D) within the span of `basis` (m, D) along which `rows` (n, D) are smallest."""
    triangle = torch.linalg.qr(rows.double() @ basis.T, mode="r").R
    right = torch.linalg.svd(triangle, full_matrices=True).Vh
    return right[len(right) - count :] @ basis


def _prompts_of(concept: AnyConcept, label: str) -> list[str]:
    """A retained label's prompts, by the templates of the target that it is retained beside."""
    member = next(member for member in concept.members if label in member.retained)
    return replace(member, anchor=member.retained[label]).anchor_prompts()
