"""Latents to train on: stored trajectories and pictures of a model, and trajectories that move on as it learns.

Every draw is a pure function of seed, step and number of rows. Rows are the global batch; each rank takes its slice.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from unpaint.errors import UserError
from unpaint.model import TextToImage
from unpaint.sampling import DDIM, Progress, Sampler, denoise_to, draw_noise, generators_of
from unpaint.seeds import seed_of
from unpaint.tensor_file import read_tensor, write_tensor


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
            generators = generators_of([seed_of("fresh", self.seed, step, row)])
            _, *shape = self.latents.shape
            self.latents[row] = draw_noise(generators, shape, self.latents.device, self.latents.dtype)[0]
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
    run = DDIM(model, sampler)
    size = shape[0]
    bank = torch.empty(shape, dtype=torch.float16)
    unconditional = model.encode([""])
    for first in range(0, size, batch_size):
        count = min(batch_size, size - first)
        rows = range(first, first + batch_size)
        asked = [row % len(prompts) for row in rows]
        condition = run.condition(model.encode([prompts[i] for i in asked]), unconditional)
        generators = generators_of([seed_of("bank", seed, row) for row in rows])
        latents = draw_noise(generators, model.latent_shape, model.device, model.dtype)
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


def clean_latents(noised: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """x_0 as predicted, (B, C, h, w) float32, of x_t and the predicted noise (B, C, h, w) and abar_t (B,)."""
    abar = abar.view(-1, 1, 1, 1)
    return (noised.float() - (1 - abar).sqrt() * noise.float()) / abar.sqrt()


def check_clean_latents(model: TextToImage) -> None:
    """Raises UserError for a model of which `clean_latents` would divide by zero at some noise level."""
    if not model.alphas_cumprod.min() > 0:
        raise UserError(
            f"model '{model.name}' has a noise level of noise alone, from which no clean latents can be told"
        )
