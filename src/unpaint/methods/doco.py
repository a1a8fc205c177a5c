"""DoCo, domain correction (Wu et al. 2025, AAAI, arXiv 2405.15304).

A discriminator learns to tell what the trained model predicts for the concept from what the frozen one predicts for
its anchor; the model learns to deceive it, and may not unlearn what must stay while it does.
"""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, AdamW, Optimizer

from unpaint.concepts import AnyConcept
from unpaint.edit import Edit
from unpaint.errors import UserError, nearest
from unpaint.latents import Noised, Paintings, check_clean_latents, clean_latents
from unpaint.methods.base import Job, checked_mode
from unpaint.model import GROUPS
from unpaint.sampling import Sampler
from unpaint.seeds import seed_of

CHOICES = {
    "variant": GROUPS,
    "surgery": ("projection", "cosine", "none"),
    "prior_prompts": ("retain", "anchor"),
    "discriminator_gradients": ("clean", "accumulated"),
    "bos": ("trained", "detached"),
}
REAL, FAKE = 0.0, 1.0  # as in the paper's code: the anchor's domain is 0


@dataclass(frozen=True)
class Batch:
    """Step number, noised pictures of the anchor and noised pictures of what must stay."""

    step: int
    anchor: Noised
    prior: Noised


class DoCo:
    """`variant` names the trained weights, a group of `TextToImage.group`; the paper's is `cross_attention.kv`.

    Of `steps` steps the share `warm_up` trains the discriminator alone; each of the others is one step of the model and
    one of the discriminator. `surgery` is how the gradient on pictures that must stay corrects the adversarial one, see
    `operate`, by `surgery_strength`; with `none` the two losses are added, the second times `prior_weight`. The
    pictures, `anchor_pictures` and `prior_pictures` of them, are the unedited model's, painted in `sampling_steps` of
    DDIM at `sampling_guidance`: for the anchor's prompts (with `erase_phrases`, also for those that stand beside the
    concept's `erase` phrases) and for its `retain` prompts (`prior_prompts`: or the `anchor` ones again, as in the
    paper). `bos`: whether gradients reach the weights through keys and values of the first token, which all prompts
    share. `discriminator_gradients`: `accumulated` adds the model's adversarial gradient to the discriminator's own.
    """

    own: nn.Module

    def __init__(
        self,
        name: str,
        variant: str,
        surgery: str,
        surgery_strength: float,
        prior_weight: float,
        max_grad_norm: float,
        erase_phrases: bool,
        prior_prompts: str,
        bos: str,
        discriminator_gradients: str,
        discriminator_width: int,
        discriminator_lr: float,
        anchor_pictures: int,
        prior_pictures: int,
        sampling_steps: int,
        sampling_guidance: float,
        warm_up: float,
        steps: int,
        lr: float,
        weight_decay: float,
        batch_size: int,
        mode: str,
    ) -> None:
        given = {
            "variant": variant,
            "surgery": surgery,
            "prior_prompts": prior_prompts,
            "bos": bos,
            "discriminator_gradients": discriminator_gradients,
        }
        for option, value in given.items():
            choices = CHOICES[option]
            if value not in choices:
                raise UserError(
                    f"method.{option} is one of {', '.join(choices)}, not '{value}'{nearest(value, choices)}"
                )
        if min(steps, batch_size, anchor_pictures, prior_pictures, discriminator_width) < 1:
            raise UserError(
                "method.steps, batch_size, anchor_pictures, prior_pictures and discriminator_width must be at least 1"
            )
        if not 0 <= warm_up < 1:
            raise UserError(f"method.warm_up is a share of the steps, from 0 and below 1, not {warm_up}")
        if min(lr, discriminator_lr, max_grad_norm) <= 0:
            raise UserError("method.lr, method.discriminator_lr and method.max_grad_norm must be above 0")
        if min(weight_decay, surgery_strength, prior_weight) < 0:
            raise UserError("method.weight_decay, method.surgery_strength and method.prior_weight are not below 0")
        self.name = name
        self.mode = checked_mode(name, mode)
        self.group = variant
        self.surgery = surgery
        self.surgery_strength = surgery_strength
        self.prior_weight = prior_weight
        self.max_grad_norm = max_grad_norm
        self.erase_phrases = erase_phrases
        self.prior_prompts = prior_prompts
        self.bos = bos
        self.discriminator_gradients = discriminator_gradients
        self.discriminator_width = discriminator_width
        self.discriminator_lr = discriminator_lr
        self.anchor_pictures = anchor_pictures
        self.prior_pictures = prior_pictures
        self.sampler = Sampler(sampling_steps, sampling_guidance)
        self.warm_up_steps = int(warm_up * steps)
        self.steps = steps
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size

    def check(self, concept: AnyConcept) -> None:
        for member in concept.members:
            if member.kind != "individual":
                raise UserError(f"method={self.name} erases individual concepts; '{member.name}' is a {member.kind}")
        if self.prior_prompts == "retain" and not concept.retained:
            raise UserError(
                f"concept '{concept.name}' names nothing that must stay (evaluation.in_domain); "
                "use method.prior_prompts=anchor"
            )

    def begin(self, job: Job) -> None:
        self.job = job
        if self.batch_size % (job.mine.step or 1):
            raise UserError(f"method.batch_size={self.batch_size} does not divide over {job.mine.step} processes")
        check_clean_latents(job.model)
        concept, rng = job.concept, random.Random(job.seed)
        pairs = list(zip(concept.prompts(self.erase_phrases), concept.anchor_prompts(self.erase_phrases), strict=True))
        rng.shuffle(pairs)
        self.targets, self.anchors = [target for target, _ in pairs], [anchor for _, anchor in pairs]
        self.anchor_bank = self._painted(self.anchors, self.anchor_pictures, "the anchor")
        if self.prior_prompts == "anchor":
            self.retained, self.prior_bank = self.anchors, self.anchor_bank
        else:
            self.retained = concept.retain_prompts()
            rng.shuffle(self.retained)
            self.prior_bank = self._painted(self.retained, self.prior_pictures, "what stays")
        self.own = patch_discriminator(job.model.latent_shape, self.discriminator_width, seed_of("tune", job.seed))
        self.own.to(job.model.device)

    def _painted(self, prompts: list[str], size: int, what: str) -> Paintings:
        job = self.job
        advance = job.progress(f"pictures of {what} by the unedited model", size)
        found = Paintings.build(job.model, prompts, size, self.sampler, job.seed, job.cache / "banks", advance)
        job.account(found.saved_seconds)
        return found

    def optimizers(self) -> list[Optimizer]:
        return [
            AdamW(self.job.weights.values(), lr=self.lr, weight_decay=self.weight_decay),
            Adam(self.own.parameters(), lr=self.discriminator_lr, betas=(0.5, 0.999)),
        ]

    def batches(self, start: int) -> Iterator[Batch]:
        seed, n, mine = self.job.seed, self.batch_size, self.job.mine
        for step in range(start, self.steps):
            anchor = self.anchor_bank.draw(seed, step, n, stream=0)
            prior = self.prior_bank.draw(seed, step, n, stream=1)
            yield Batch(step, _rows(anchor, mine), _rows(prior, mine))

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """After the warm-up one step of the model; always one of the discriminator, on what was predicted before it."""
        trains_model = batch.step >= self.warm_up_steps
        with torch.no_grad():
            real = self._clean(batch.anchor, self.anchors, self.job.base)
        with torch.set_grad_enabled(trains_model):
            fake = self._clean(batch.anchor, self.targets)
        # Taken before the model moves, and of no consequence for it.
        loss = _told(self.own(real), REAL) + _told(self.own(fake.detach()), FAKE)
        logs = {"discriminator": loss.detach()}
        if trains_model:
            logs |= self._step_model(fake, batch.prior)
            if self.discriminator_gradients == "accumulated":
                loss = loss + _told(self.own(fake.detach()), REAL)
        self.job.update(loss, 1)
        return logs

    def _step_model(self, fake: Tensor, prior: Noised) -> dict[str, Tensor]:
        deceit = _told(self.own(fake), REAL)
        text = self.job.model.encode([self.retained[i] for i in prior.which.tolist()])
        kept = F.mse_loss(self._predict(prior, text).float(), prior.noise.float())
        if self.surgery == "none":
            gradients = self._gradients(deceit + self.prior_weight * kept)
        else:
            pairs = zip(self._gradients(deceit), self._gradients(kept), strict=True)
            gradients = [operate(a, p, self.surgery, self.surgery_strength) for a, p in pairs]
        for parameter, gradient in zip(self.job.weights.values(), gradients, strict=True):
            parameter.grad = gradient
        self.job.step(0)
        return {"generator": deceit.detach(), "prior": kept.detach()}

    def _gradients(self, loss: Tensor) -> list[Tensor]:
        """The mean over ranks of the gradient of `loss`, clipped as a whole, a tensor a weight."""
        weights = list(self.job.weights.values())
        mine = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, weights)])
        whole = self.job.total(mine) / (self.job.mine.step or 1)
        whole = whole * (self.max_grad_norm / (whole.norm() + 1e-6)).clamp(max=1)
        return [part.view_as(w) for part, w in zip(whole.split([w.numel() for w in weights]), weights, strict=True)]

    def _clean(self, noised: Noised, prompts: list[str], weights: dict[str, Tensor] | None = None) -> Tensor:
        text = self.job.model.encode([prompts[i] for i in noised.which.tolist()])
        return clean_latents(
            noised.latents, self._predict(noised, text, weights), self.job.model.alphas_cumprod[noised.t]
        )

    def _predict(self, noised: Noised, text: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        model = self.job.model
        with first_token_detached(model.pipe.unet) if self.bos == "detached" else nullcontext():
            return model.predict(noised.latents, noised.t, text, weights)

    def finish(self) -> Edit:
        job = self.job
        return Edit.from_change(job.model.pipe, job.base, method=self.name, concept=job.concept.name, config=job.config)


def operate(adversarial: Tensor, prior: Tensor, surgery: str, strength: float = 1.0) -> Tensor:
    """The adversarial gradient of one tensor without what would undo the prior's; unchanged where the two agree.

    `projection` takes away `strength` times the component along the prior gradient, as the paper says; `cosine`, as the
    authors' code does, the cosine between the two times the prior's unit vector, however small the gradient is.
    """
    unit = F.normalize(prior.flatten(), dim=0).view_as(prior)
    along = (adversarial * unit).sum()
    if surgery == "cosine":
        along = along / adversarial.norm().clamp(min=1e-12)
    return torch.where(along < 0, adversarial - strength * along * unit, adversarial)


def patch_discriminator(latent_shape: tuple[int, int, int], width: int, seed: int) -> nn.Module:
    """A patch discriminator of latents (B, C, h, w), with logits (B, 1, h', w'): 3 x 3 for 8, 16, 32, 64.

    The paper's, for 64: 4 x 4 convolutions that halve, `width` channels then twice as many each time and at most
    8 `width`, and a last one. Latents of other sizes are halved until the smaller side is below 8. The paper's batch
    norms are group norms: statistics of a batch would differ from rank to rank.
    """
    channels, height, other = latent_shape
    size = min(height, other)
    if size < 4:
        raise UserError(f"latents of {height} x {other} are too small for a discriminator, at least 4 x 4 are needed")
    layers: list[nn.Module] = []
    # The processor's generator alone, and as it was afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for depth in range(int(math.log2(size // 4))):
            wider = width * 2 ** min(depth, 3)
            layers.append(nn.Conv2d(channels, wider, 4, stride=2, padding=1))
            if depth:
                layers.append(nn.GroupNorm(math.gcd(32, wider), wider))
            layers.append(nn.LeakyReLU(0.2))
            channels = wider
        layers.append(nn.Conv2d(channels, 1, 4, padding=1))
    return nn.Sequential(*layers)


def _told(logits: Tensor, domain: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.float(), torch.full_like(logits, domain, dtype=torch.float32))


def _rows(noised: Noised, mine: slice) -> Noised:
    return Noised(noised.latents[mine], noised.t[mine], noised.noise[mine], noised.which[mine])


@contextmanager
def first_token_detached(unet: nn.Module) -> Iterator[None]:
    """Meanwhile no gradient reaches the weights through keys and values of the first token in cross-attention."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)

    names = (".attn2.to_k", ".attn2.to_v")
    handles = [module.register_forward_hook(hook) for name, module in unet.named_modules() if name.endswith(names)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
