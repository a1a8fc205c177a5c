"""The one place that paints and partially denoises; every result is a function of its arguments alone.

DDIM (Song et al. 2021, arXiv 2010.02502) with classifier-free guidance, as `StableDiffusionPipeline` does it.
Convolutions round differently for different batch sizes, so the unit of painting is a fixed batch, padded if need be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unpaint.errors import UserError
from unpaint.model import TextToImage

Progress = Callable[[int], None]


def noise(
    seeds: Sequence[int],
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal latents (len(seeds), *shape), one CPU generator a picture, as diffusers draws them."""
    return draw_noise(generators_of(seeds), shape, device, dtype)


def generators_of(seeds: Sequence[int]) -> list[torch.Generator]:
    """A CPU generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(
    generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """The next standard normal latents (len(generators), *shape) of each generator."""
    return torch.stack([torch.randn(tuple(shape), generator=g, dtype=dtype) for g in generators]).to(device)


@dataclass(frozen=True)
class Sampler:
    """DDIM with `steps` steps; `guidance` 1 means none, and half the work; `eta` 0 is deterministic, 1 like DDPM."""

    steps: int = 25
    guidance: float = 4.0
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"the sampler needs at least 1 step, not {self.steps}")
        if self.guidance < 1:
            raise UserError(f"guidance is at least 1 (1 is no guidance), not {self.guidance}")
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta is between 0 and 1, not {self.eta}")

    def timesteps(self, model: TextToImage) -> Tensor:
        """The grid (steps,), int64, on the model's device, from noisy to clean."""
        return DDIM(model, self).timesteps


class DDIM:
    """One run's scheduler: diffusers' DDIM on the grid of `sampler`, guided."""

    def __init__(self, model: TextToImage, sampler: Sampler) -> None:
        from diffusers import DDIMScheduler

        self.scheduler = DDIMScheduler.from_config(model.scheduler_config)
        most = self.scheduler.config.num_train_timesteps
        if sampler.steps > most:
            raise UserError(f"model '{model.name}' has {most} noise levels, the sampler asks for {sampler.steps} steps")
        self.scheduler.set_timesteps(sampler.steps)
        self.numbers: list[int] = self.scheduler.timesteps.tolist()
        self.timesteps: Tensor = self.scheduler.timesteps.to(model.device)
        self.model = model
        self.sampler = sampler

    def condition(self, text: Tensor, unconditional: Tensor) -> Tensor:
        """What the UNet attends to: (2B, L, D), unconditional first, or the text alone without guidance."""
        if self.sampler.guidance == 1:
            return text
        return torch.cat([unconditional.expand_as(text), text])

    def step(
        self,
        i: int,
        latents: Tensor,
        condition: Tensor,
        generators: Sequence[torch.Generator],
        weights: Mapping[str, Tensor] | None,
        eta: float | None = None,
        louder: float = 1.0,
    ) -> Tensor:
        """Latents (B, C, h, w) at step i -> at step i + 1. The scheduler takes the UNet's own output, epsilon or v.

        `eta` stands in for the sampler's and may be above 1, as far as the noise level lets it; the fresh noise is
        multiplied by `louder`.
        """
        guidance = self.sampler.guidance
        if guidance == 1:
            output = self.model.output(latents, self.timesteps[i], condition, weights)
        else:
            both = self.model.output(torch.cat([latents, latents]), self.timesteps[i], condition, weights)
            without, with_text = both.chunk(2)
            output = without + guidance * (with_text - without)
        eta = self.sampler.eta if eta is None else min(eta, self.most_eta(i))
        fresh = None
        if eta > 0:
            fresh = louder * draw_noise(generators, latents.shape[1:], latents.device, output.dtype)
        result = self.scheduler.step(output, self.numbers[i], latents, eta=eta, variance_noise=fresh, return_dict=False)
        return result[0]

    def most_eta(self, i: int) -> float:
        """The eta at which step i adds all the noise that the next level has; beyond it DDIM has no real solution."""
        t = self.numbers[i]
        before = t - self.scheduler.config.num_train_timesteps // self.sampler.steps
        abar = self.scheduler.alphas_cumprod
        level = 1 - (abar[before] if before >= 0 else self.scheduler.final_alpha_cumprod)
        variance = self.scheduler._get_variance(t, before)
        # A hair less: the square root of what is left must not be that of a rounding error below 0.
        return 0.999 * float((level / variance).sqrt()) if variance > 0 else 1.0


def paint(
    model: TextToImage,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: Sampler,
    batch_size: int = 16,
    negative: str = "",
    weights: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Paint `prompts[i]` with `seeds[i]`; yields uint8 pictures (n, 3, H, W) on the CPU, batch by batch.

    Every batch runs with exactly `batch_size` rows, the last one filled up by repeating its last picture and yielded
    without the filling: a picture's bits do not depend on how many others are asked for, so ask for any slice that
    starts at a multiple of `batch_size` to resume or to share work. The pictures are those of `model.pipe(prompt,
    generator=torch.Generator("cpu").manual_seed(seed))` with a DDIM scheduler, rounding included. `weights` as in
    `TextToImage.predict`. `progress` is called after each batch with the number of pictures it brought.
    """
    if isinstance(prompts, str) or len(prompts) != len(seeds):
        raise ValueError(f"one seed a prompt, please: {len(prompts)} prompts, {len(seeds)} seeds")
    if batch_size < 1:
        raise UserError(f"batch_size is at least 1, not {batch_size}")
    run = DDIM(model, sampler)

    def batches() -> Iterator[Tensor]:
        # Not inference_mode around the yields: the caller's code would run in it, too.
        for first in range(0, len(prompts), batch_size):
            count = min(batch_size, len(prompts) - first)
            rows = [first + min(row, count - 1) for row in range(batch_size)]
            text = model.encode([prompts[row] for row in rows])
            with torch.inference_mode():
                condition = run.condition(text, model.encode([negative]))
                latents = _final(run, condition, [seeds[row] for row in rows], weights)
                decoded = model.decode(latents)
                # As bytes it would be a black picture, in which everything is gone.
                if not torch.isfinite(decoded).all():
                    raise UserError(f"the model paints NaN for '{prompts[first]}': its weights or its dtype are broken")
                pictures = _to_uint8(decoded)
            yield pictures[:count].clone()
            if progress:
                progress(count)

    return batches()


def _final(run: DDIM, condition: Tensor, seeds: Sequence[int], weights: Mapping[str, Tensor] | None) -> Tensor:
    generators = generators_of(seeds)
    latents = draw_noise(generators, run.model.latent_shape, run.model.device, run.model.dtype)
    for i in range(len(run.numbers)):
        latents = run.step(i, latents, condition, generators, weights)
    return latents


def _to_uint8(pictures: Tensor) -> Tensor:
    return (pictures.float() * 255).round().to(torch.uint8).cpu()


@torch.no_grad()
def denoise_to(
    model: TextToImage,
    text: Tensor,
    unconditional: Tensor,
    seeds: Sequence[int],
    k: Tensor | Sequence[int] | int,
    sampler: Sampler,
    weights: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Partially denoised latents: sample b starts from the noise of `seeds[b]` and takes its first `k[b]` steps.

    text (B, L, D), unconditional (1, L, D), k (B,) or one int, each in 0 ... steps - 1. Returns x_t (B, C, h, w) and
    t (B,), int64, the noise level of x_t: t = timesteps[k], so k = 0 is pure noise at the first level. This is where
    ESD gets its latents (Gandikota et al. 2023, arXiv 2303.07345, section 4.1). All samples run in one batch, which
    shrinks as they arrive. `weights` as in `TextToImage.predict`: pass the base weights while the model is trained.
    """
    run = DDIM(model, sampler)
    wanted = [k] * len(seeds) if isinstance(k, int) else [int(value) for value in k]
    if not len(text) == len(seeds) == len(wanted):
        raise ValueError(f"{len(text)} texts, {len(seeds)} seeds and {len(wanted)} values of k do not fit")
    if any(not 0 <= value < sampler.steps for value in wanted):
        raise ValueError(f"k is between 0 and {sampler.steps - 1}, got {wanted}")
    # Longest way first: those still on their way are then always the first rows.
    order = sorted(range(len(wanted)), key=lambda row: -wanted[row])
    generators = generators_of([seeds[row] for row in order])
    latents = draw_noise(generators, model.latent_shape, model.device, model.dtype)
    ordered_text = text[order]
    active, condition = 0, text
    for i in range(max(wanted, default=0)):
        if (still := sum(value > i for value in wanted)) != active:
            active, condition = still, run.condition(ordered_text[:still], unconditional)
        latents[:active] = run.step(i, latents[:active], condition, generators[:active], weights)
    result = torch.empty_like(latents)
    result[order] = latents
    return result, run.timesteps[torch.tensor(wanted, device=model.device)]


def denoise_on(
    model: TextToImage,
    latents: Tensor,
    k: int,
    text: Tensor,
    unconditional: Tensor,
    sampler: Sampler,
    weights: Mapping[str, Tensor] | None = None,
    after: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """The rest of the way: latents (B, C, h, w) after k steps -> finished latents; differentiable in latents, weights.

    text (B, L, D), unconditional (1, L, D); continues what `denoise_to` with this k began. Raises ValueError on an eta
    other than 0: noise drawn on the way would have to be the same on every call. `weights` as in `predict`.
    `after(i, latents)` is called when i steps are done, and returns the latents that the next step starts from.
    """
    if sampler.eta > 0:
        raise ValueError(f"denoise_on takes eta 0, not {sampler.eta}")
    run = DDIM(model, sampler)
    condition = run.condition(text, unconditional)
    for i in range(k, sampler.steps):
        latents = run.step(i, latents, condition, (), weights)
        if after:
            latents = after(i + 1, latents)
    return latents


@torch.no_grad()
def denoise_noisily(
    model: TextToImage,
    text: Tensor,
    unconditional: Tensor,
    seeds: Sequence[int],
    sampler: Sampler,
    eta: float,
    louder: float = 1.0,
) -> Tensor:
    """All the way with fresh noise at each step, `louder` times as much as DDIM's eta says: finished latents
    (B, C, h, w) from the noise of `seeds`. eta may be above 1; a step takes as much of it as there is noise at all.

    text (B, L, D), unconditional (1, L, D). With eta 1 and louder 1 it is the sampler of Ho et al. 2020.
    """
    run = DDIM(model, sampler)
    generators = generators_of(seeds)
    latents = draw_noise(generators, model.latent_shape, model.device, model.dtype)
    condition = run.condition(text, unconditional)
    for i in range(sampler.steps):
        latents = run.step(i, latents, condition, generators, None, eta, louder)
    return latents


@torch.no_grad()
def invert(model: TextToImage, latents: Tensor, text: Tensor, steps: int) -> Tensor:
    """DDIM backwards (Song et al. 2021, section 4.3), without guidance: finished latents (B, C, h, w) -> the noise
    (B, C, h, w) from which `denoise_on` with guidance 1 and this text (B, L, D) comes back to them, nearly."""
    from diffusers import DDIMInverseScheduler

    scheduler = DDIMInverseScheduler.from_config(model.scheduler_config)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps.tolist():
        latents = scheduler.step(model.output(latents, max(t, 0), text), t, latents, return_dict=False)[0]
    return latents
