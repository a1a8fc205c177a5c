"""Probes that no filter of prompts stops: they reach into the way from noise to picture.

After "When Are Concepts Erased From Diffusion Models?" (Lu et al. 2025, arXiv 2505.17013): completion, inpainting and
noise. Latent inversion asks, as Rusanovsky et al. 2024 (arXiv 2412.00782), whether the edited model still has a latent
that it makes a picture of the concept from. Each tries several settings and counts a prompt if one of them shows the
concept, which raises all rates: read them against the control's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from unpaint.errors import UserError, nearest
from unpaint.evaluation.attacks import Scene, Terms, Try
from unpaint.sampling import denoise_noisily, denoise_on, denoise_to, invert, noise

PROMPTS = ("same", "empty")


def _listed(attack: object, name: str, keys: Sequence[str]) -> None:
    for key in keys:
        object.__setattr__(attack, key, tuple(getattr(attack, key)))
        if not getattr(attack, key):
            raise UserError(f"attack {name}: {key} is an empty list")


@dataclass(frozen=True)
class Completion:
    """The unedited model takes the first steps with the prompt, the edited one the rest. after: how many, one try
    each, of the sampler's."""

    name: str
    title: str
    after: tuple[int, ...]
    prompts: int
    max_seconds: float
    at_n = 1

    def __post_init__(self) -> None:
        _listed(self, self.name, ["after"])

    @property
    def tries(self) -> int:
        return len(self.after)

    def check(self, terms: Terms) -> None:
        for k in self.after:
            if not 0 <= k < terms.steps:
                raise UserError(f"attack {self.name}: after is below the sampler's {terms.steps} steps, not {k}")

    def attempts(self, scene: Scene) -> Iterator[Try | None]:
        for k in self.after:
            rows = list(scene.open)
            yield Try(rows, _completed(scene, rows, k))


@torch.no_grad()
def _completed(scene: Scene, rows: Sequence[int], k: int) -> Tensor:
    model, sampler = scene.model, scene.sampler
    text, empty = model.encode(scene.prompts(rows)), model.encode([""])
    begun, _ = denoise_to(model, text, empty, scene.seeds(rows), k, sampler, weights=scene.base)
    return scene.finished(denoise_on(model, begun, k, text, empty, sampler))


@dataclass(frozen=True)
class Inpainting:
    """A hole in the middle of a picture of the concept, to be filled with the prompt; only the hole is judged, enlarged
    to the size of a picture. hole: its side, as a share of the picture's.

    What is known is put back, noised to the level of the latents, after every step, as diffusers' inpainting pipeline
    does it for models that are not made for it.
    """

    name: str
    title: str
    hole: float
    prompts: int
    max_seconds: float
    at_n = tries = 1

    def __post_init__(self) -> None:
        if not 0 < self.hole <= 1:
            raise UserError(f"attack {self.name}: hole is above 0 and at most 1, not {self.hole}")

    def attempts(self, scene: Scene) -> Iterator[Try | None]:
        rows = list(scene.open)
        yield Try(rows, _inpainted(scene, rows, self.hole))


@torch.no_grad()
def _inpainted(scene: Scene, rows: Sequence[int], hole: float) -> Tensor:
    model, sampler = scene.model, scene.sampler
    text, empty = model.encode(scene.prompts(rows)), model.encode([""])
    known = model.latents_of(scene.pictures[list(rows)])
    start = noise(scene.seeds(rows), model.latent_shape, model.device, model.dtype)
    inside = centre(known.shape[-2:], hole).to(model.device)
    abar = model.alphas_cumprod[sampler.timesteps(model)].to(model.dtype)

    def after(i: int, latents: Tensor) -> Tensor:
        outside = known if i == sampler.steps else abar[i].sqrt() * known + (1 - abar[i]).sqrt() * start
        return torch.where(inside, latents, outside)

    pictures = scene.finished(denoise_on(model, start, 0, text, empty, sampler, after=after))
    height, width = pictures.shape[-2:]
    mask = centre((height, width), hole)
    lines, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
    cut = pictures[:, :, lines[0] : lines[-1] + 1, columns[0] : columns[-1] + 1].float()
    return F.interpolate(cut, (height, width), mode="bilinear", antialias=True).round().clamp(0, 255).to(torch.uint8)


def centre(shape: Sequence[int], share: float) -> Tensor:
    """Mask (H, W), true in the middle: `share` of each side, rounded to an even border."""
    mask = torch.zeros(tuple(shape), dtype=torch.bool)
    borders = [round(size * (1 - share) / 2) for size in shape]
    mask[borders[0] : shape[0] - borders[0], borders[1] : shape[1] - borders[1]] = True
    return mask


@dataclass(frozen=True)
class LatentInversion:
    """A picture of the concept is turned into noise by DDIM backwards, without a prompt, and painted from there.

    fresh: share of the start's variance that is fresh noise, of the case's own seed. DDIM backwards can be undone for
    anything that the autoencoder can show, learned or not; what is left of the picture must be little enough that the
    model has to know the rest. paint_with: the prompts to paint with, one try each: `same` (the case's own, guided) or
    `empty` (without guidance). steps: of both ways.
    """

    name: str
    title: str
    fresh: float
    paint_with: tuple[str, ...]
    steps: int
    prompts: int
    max_seconds: float
    at_n = 1

    def __post_init__(self) -> None:
        _listed(self, self.name, ["paint_with"])
        if not 0 <= self.fresh <= 1:
            raise UserError(f"attack {self.name}: fresh is between 0 and 1, not {self.fresh}")
        for which in self.paint_with:
            if which not in PROMPTS:
                known = " or ".join(PROMPTS)
                raise UserError(f"attack {self.name}: paint_with is {known}, not '{which}'{nearest(which, PROMPTS)}")

    @property
    def tries(self) -> int:
        return len(self.paint_with)

    def attempts(self, scene: Scene) -> Iterator[Try | None]:
        every = list(scene.open)
        found = self._inverted(scene, every)
        start = dict(zip(every, found, strict=True))
        for which in self.paint_with:
            rows = list(scene.open)
            yield Try(rows, self._painted(scene, rows, torch.stack([start[row] for row in rows]), which))

    @torch.no_grad()
    def _inverted(self, scene: Scene, rows: Sequence[int]) -> Tensor:
        model = scene.model
        latents = model.latents_of(scene.pictures[list(rows)])
        start = invert(model, latents, model.encode([""] * len(rows)), self.steps)
        own = noise(scene.seeds(rows), model.latent_shape, model.device, model.dtype)
        return (1 - self.fresh) ** 0.5 * start + self.fresh**0.5 * own

    @torch.no_grad()
    def _painted(self, scene: Scene, rows: Sequence[int], start: Tensor, which: str) -> Tensor:
        model, sampler = scene.model, replace(scene.sampler, steps=self.steps)
        empty = model.encode([""])
        if which == "empty":
            sampler, text = replace(sampler, guidance=1.0), empty.expand(len(rows), -1, -1)
        else:
            text = model.encode(scene.prompts(rows))
        return scene.finished(denoise_on(model, start, 0, text, empty, sampler))


@dataclass(frozen=True)
class Noise:
    """More noise on the way than the sampler has: etas x louder tries (eta of DDIM, which may be above 1, and a factor
    on the fresh noise of each step)."""

    name: str
    title: str
    etas: tuple[float, ...]
    louder: tuple[float, ...]
    prompts: int
    max_seconds: float
    at_n = 1

    def __post_init__(self) -> None:
        _listed(self, self.name, ["etas", "louder"])
        for key in ("etas", "louder"):
            if min(getattr(self, key)) < 0:
                raise UserError(f"attack {self.name}: {key} are at least 0, not {min(getattr(self, key))}")

    @property
    def tries(self) -> int:
        return len(self.etas) * len(self.louder)

    def attempts(self, scene: Scene) -> Iterator[Try | None]:
        for eta in self.etas:
            for louder in self.louder:
                rows = list(scene.open)
                yield Try(rows, _noisy(scene, rows, eta, louder))


@torch.no_grad()
def _noisy(scene: Scene, rows: Sequence[int], eta: float, louder: float) -> Tensor:
    model = scene.model
    text, empty = model.encode(scene.prompts(rows)), model.encode([""])
    return scene.finished(denoise_noisily(model, text, empty, scene.seeds(rows), scene.sampler, eta, louder))
