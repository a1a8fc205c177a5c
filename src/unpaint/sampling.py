"""The one place that paints and partially denoises; every result is a function of its arguments alone.

DDIM (Song et al. 2021, arXiv 2010.02502) with classifier-free guidance, as `StableDiffusionPipeline` does it.
Convolutions round differently for different batch sizes, so the unit of painting is a fixed batch, padded if need be.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from unpaint.errors import UserError
from unpaint.model import TextToImage
from unpaint.seeds import seed_of
from unpaint.tensor_file import read_tensor, write_tensor

Progress = Callable[[int], None]


def noise(
    seeds: Sequence[int],
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal latents (len(seeds), *shape), one CPU generator a picture, as diffusers draws them."""
    return _draw(_generators(seeds), shape, device, dtype)


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _draw(
    generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device | str, dtype: torch.dtype
) -> Tensor:
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
        return _DDIM(model, self).timesteps


class _DDIM:
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
            fresh = louder * _draw(generators, latents.shape[1:], latents.device, output.dtype)
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
    run = _DDIM(model, sampler)

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


def _final(run: _DDIM, condition: Tensor, seeds: Sequence[int], weights: Mapping[str, Tensor] | None) -> Tensor:
    generators = _generators(seeds)
    latents = _draw(generators, run.model.latent_shape, run.model.device, run.model.dtype)
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
    run = _DDIM(model, sampler)
    wanted = [k] * len(seeds) if isinstance(k, int) else [int(value) for value in k]
    if not len(text) == len(seeds) == len(wanted):
        raise ValueError(f"{len(text)} texts, {len(seeds)} seeds and {len(wanted)} values of k do not fit")
    if any(not 0 <= value < sampler.steps for value in wanted):
        raise ValueError(f"k is between 0 and {sampler.steps - 1}, got {wanted}")
    # Longest way first: those still on their way are then always the first rows.
    order = sorted(range(len(wanted)), key=lambda row: -wanted[row])
    generators = _generators([seeds[row] for row in order])
    latents = _draw(generators, model.latent_shape, model.device, model.dtype)
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
    run = _DDIM(model, sampler)
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
    run = _DDIM(model, sampler)
    generators = _generators(seeds)
    latents = _draw(generators, model.latent_shape, model.device, model.dtype)
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


@dataclass(frozen=True)
class Bank:
    """Stored trajectories of a model: every state on the way from noise to picture, to train on without painting.

    latents (size, steps, C, h, w) float16, `latents[i, k]` after k steps, at noise level timesteps[k] (steps,);
    trajectory i was painted for prompt `i % len(prompts)`, with guidance. All on the CPU; what `draw` returns is on
    `device` in `dtype`. `saved_seconds` is what painting them took another run; 0 if this call painted them.
    """

    latents: Tensor
    timesteps: Tensor
    prompts: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    saved_seconds: float

    @classmethod
    def build(
        cls,
        model: TextToImage,
        prompts: Sequence[str],
        size: int,
        sampler: Sampler,
        seed: int,
        folder: Path | None = None,
        progress: Progress | None = None,
        batch_size: int = 16,
    ) -> Bank:
        """Paint `size` trajectories of the model as it is now (build before training), or take them from `folder`.

        The file's name is a hash of all that goes into it; a damaged file is replaced. `progress` is called with the
        number of trajectories each batch brought; with `size` at once if they were there.
        """
        latents, saved = _stored(model, prompts, size, sampler, seed, folder, progress, batch_size, sampler.steps)
        return cls(latents, sampler.timesteps(model).cpu(), tuple(prompts), model.device, model.dtype, saved)

    def draw(self, seed: int, step: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """The n rows of training step `step`: latents (n, C, h, w), t (n,) and the index (n,) of each row's prompt.

        Trajectory and noise level are drawn with replacement, as a pure function of (seed, step, n). The rows are the
        global batch; each rank takes its slice.
        """
        generator = torch.Generator().manual_seed(seed_of("tune", seed, step))
        size, steps = self.latents.shape[:2]
        trajectory = torch.randint(size, (n,), generator=generator)
        k = torch.randint(steps, (n,), generator=generator)
        latents = self.latents[trajectory, k].to(self.device, self.dtype)
        return latents, self.timesteps[k].to(self.device), (trajectory % len(self.prompts)).to(self.device)


class Underway(nn.Module):
    """Trajectories that are moved on while a method learns, each a step whenever it is drawn: latents of the model as
    it is being trained, which cost no painting of their own.

    Buffers, saved and restored with a method's `own`: latents (size, C, h, w) in float32, k (size,) steps taken, which
    (size,) the index of the prompt. Trajectory i starts k = i * steps // size steps of the way, so that all noise
    levels are there.
    """

    latents: Tensor
    k: Tensor
    which: Tensor

    def __init__(
        self,
        model: TextToImage,
        prompts: Sequence[str],
        size: int,
        sampler: Sampler,
        seed: int,
        weights: Mapping[str, Tensor] | None = None,
        progress: Progress | None = None,
        batch_size: int = 16,
    ) -> None:
        """Takes the first steps with `weights`, see `TextToImage.predict`. Raises UserError on a sampler with eta."""
        from diffusers import DDIMScheduler

        super().__init__()
        if sampler.eta > 0:
            raise UserError(f"trajectories under way are moved on without noise: eta 0, not {sampler.eta}")
        # It moves on by predicted noise, whatever the network itself predicts.
        config = {**model.scheduler_config, "prediction_type": "epsilon"}
        self.scheduler = DDIMScheduler.from_config(config)
        self.scheduler.set_timesteps(sampler.steps)
        self.sampler, self.seed, self.prompts, self.dtype = sampler, seed, len(prompts), model.dtype
        k = torch.arange(size) * sampler.steps // size
        which = torch.arange(size) % len(prompts)
        empty = model.encode([""])
        parts = []
        for rows in torch.arange(size).split(batch_size):
            text = model.encode([prompts[i] for i in which[rows].tolist()])
            seeds = [seed_of("fresh", seed, row) for row in rows.tolist()]
            parts.append(denoise_to(model, text, empty, seeds, k[rows], sampler, weights)[0].float())
            if progress:
                progress(len(rows))
        self.register_buffer("latents", torch.cat(parts))
        self.register_buffer("k", k.to(model.device))
        self.register_buffer("which", which.to(model.device))

    def drawn(self, step: int, n: int) -> Tensor:
        """The n trajectories (n,) of training step `step`, different ones: a pure function of seed, step and n."""
        generator = torch.Generator().manual_seed(seed_of("tune", self.seed, step))
        return torch.randperm(len(self.k), generator=generator)[:n].to(self.k.device)

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where these (n,) are: latents (n, C, h, w), t (n,) and the index (n,) of each one's prompt."""
        t = self.scheduler.timesteps.to(self.k.device)[self.k[rows]]
        return self.latents[rows].to(self.dtype), t, self.which[rows]

    @torch.no_grad()
    def moved(self, rows: Tensor, predicted: Tensor, unconditional: Tensor) -> Tensor:
        """Latents (n, C, h, w) of these (n,) a step on, by the predicted noise with and without the prompt."""
        latents, t = self.latents[rows], self.scheduler.timesteps[self.k[rows].cpu()]
        eps = (unconditional + self.sampler.guidance * (predicted - unconditional)).to(latents.dtype)
        parts = [
            self.scheduler.step(eps[i : i + 1], int(t[i]), latents[i : i + 1], eta=0.0, return_dict=False)[0]
            for i in range(len(rows))
        ]
        return torch.cat(parts)

    def move(self, step: int, rows: Tensor, latents: Tensor) -> None:
        """Puts these (n,) where `moved` says. One that has arrived starts again, from new noise for a new prompt."""
        self.latents[rows] = latents
        self.k[rows] += 1
        for row in (self.k >= self.sampler.steps).nonzero().flatten().tolist():
            generators = _generators([seed_of("fresh", self.seed, step, row)])
            self.latents[row] = _draw(generators, self.latents.shape[1:], self.latents.device, self.latents.dtype)[0]
            self.which[row] = torch.randint(self.prompts, (), generator=generators[0])
            self.k[row] = 0


@dataclass(frozen=True)
class Noised:
    """A batch of noised pictures: x_t (n, C, h, w), t (n,), the noise in it (n, C, h, w), the index of each prompt."""

    latents: Tensor
    t: Tensor
    noise: Tensor
    which: Tensor


@dataclass(frozen=True)
class Paintings:
    """Latents of finished pictures that the model painted itself, to be noised again (a method's own training set).

    latents (size, C, h, w) float16 on the CPU; picture i was painted for prompt `i % len(prompts)`, with guidance.
    `saved_seconds` as in `Bank`.
    """

    latents: Tensor
    prompts: tuple[str, ...]
    alphas_cumprod: Tensor
    device: torch.device
    dtype: torch.dtype
    saved_seconds: float

    @classmethod
    def build(
        cls,
        model: TextToImage,
        prompts: Sequence[str],
        size: int,
        sampler: Sampler,
        seed: int,
        folder: Path | None = None,
        progress: Progress | None = None,
        batch_size: int = 16,
    ) -> Paintings:
        """Paint `size` pictures with the model as it is now, or take them from `folder`; see `Bank.build`."""
        latents, saved = _stored(model, prompts, size, sampler, seed, folder, progress, batch_size, None)
        return cls(latents, tuple(prompts), model.alphas_cumprod.cpu(), model.device, model.dtype, saved)

    def draw(self, seed: int, step: int, n: int, stream: int = 0) -> Noised:
        """The n rows of a training step, noised as in training a diffusion model: t uniform over all noise levels,
        x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (Ho et al. 2020, arXiv 2006.11239, eq. 4).

        A pure function of (seed, step, n, stream); several draws of one step take a `stream` each. The rows are the
        global batch; each rank takes its slice.
        """
        generator = torch.Generator().manual_seed(seed_of("tune", seed, step, stream))
        which = torch.randint(len(self.latents), (n,), generator=generator)
        t = torch.randint(len(self.alphas_cumprod), (n,), generator=generator)
        eps = torch.randn((n, *self.latents.shape[1:]), generator=generator)
        abar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        noised = abar.sqrt() * self.latents[which].float() + (1 - abar).sqrt() * eps
        prompt = (which % len(self.prompts)).to(self.device)
        noised, eps = noised.to(self.device, self.dtype), eps.to(self.device, self.dtype)
        return Noised(noised, t.to(self.device), eps, prompt)


def _stored(
    model: TextToImage,
    prompts: Sequence[str],
    size: int,
    sampler: Sampler,
    seed: int,
    folder: Path | None,
    progress: Progress | None,
    batch_size: int,
    states: int | None,
) -> tuple[Tensor, float]:
    """What `_paint_bank` paints and 0, or the same from `folder` and the seconds that it took then."""
    if not prompts or size < 1:
        raise UserError(f"a bank of latents needs a prompt and a size of at least 1, not {len(prompts)} and {size}")
    key = _bank_key(model, prompts, size, sampler, seed, batch_size)
    path = folder / f"{'paintings' if states is None else 'bank'}-{key}.safetensors" if folder else None
    shape = (size, *model.latent_shape) if states is None else (size, states, *model.latent_shape)
    stored = read_tensor(path) if path else None
    if stored is not None and tuple(stored[0].shape) == shape:
        if progress:
            progress(size)
        return stored[0], float(stored[1]["seconds"])
    started = time.perf_counter()
    latents = _paint_bank(model, prompts, shape, sampler, seed, progress, batch_size, states)
    if path:
        write_tensor(path, latents, {"seconds": f"{time.perf_counter() - started:.3f}"})
    return latents, 0.0


def _bank_key(
    model: TextToImage,
    prompts: Sequence[str],
    size: int,
    sampler: Sampler,
    seed: int,
    batch_size: int,
) -> str:
    # Device and dtype count: a bank painted on a GPU must not change what the same command writes on a CPU.
    scheduler = {key: str(value) for key, value in model.scheduler_config.items() if not key.startswith("_")}
    parts = {
        "format": 1,
        "model": [model.fingerprint, scheduler, model.device.type, str(model.dtype)],
        "prompts": list(prompts),
        "size": size,
        "sampler": asdict(sampler),
        "seed": seed,
        "batch_size": batch_size,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@torch.no_grad()
def _paint_bank(
    model: TextToImage,
    prompts: Sequence[str],
    shape: tuple[int, ...],
    sampler: Sampler,
    seed: int,
    progress: Progress | None,
    batch_size: int,
    states: int | None,
) -> Tensor:
    """The first `states` states of every trajectory, or (None) the finished pictures."""
    run = _DDIM(model, sampler)
    size = shape[0]
    bank = torch.empty(shape, dtype=torch.float16)
    unconditional = model.encode([""])
    for first in range(0, size, batch_size):
        count = min(batch_size, size - first)
        rows = range(first, first + batch_size)
        asked = [row % len(prompts) for row in rows]
        condition = run.condition(model.encode([prompts[i] for i in asked]), unconditional)
        generators = _generators([seed_of("bank", seed, row) for row in rows])
        latents = _draw(generators, model.latent_shape, model.device, model.dtype)
        for i in range(sampler.steps):
            if states is not None:
                bank[first : first + count, i] = latents[:count].to("cpu", torch.float16)
                if i + 1 == states:
                    break
            latents = run.step(i, latents, condition, generators, None)
        if states is None:
            bank[first : first + count] = latents[:count].to("cpu", torch.float16)
        if progress:
            progress(count)
    return bank
