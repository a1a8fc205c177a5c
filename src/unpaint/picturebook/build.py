"""Builds Picturebook from nothing, stage by stage: drawings, autoencoder, detector, CLIP, latents, denoiser, export.

Every stage continues where it was killed. The data are a pure function of stage and step, so a stage that was
interrupted sees the same batches as one that was not.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    ResNetForImageClassification,
)

from unpaint.files import WEIGHTS, replacing
from unpaint.picturebook import parts, tokenizer
from unpaint.picturebook.data import SPLITS, Pictures, draw_split, scenes
from unpaint.picturebook.fit import fit
from unpaint.picturebook.thresholds import calibrated

# Styles in which two objects were found least often on the way here.
HARD = ("mosaic", "woodcut", "neon")


@dataclass(frozen=True)
class Plan:
    """How long each part is trained; the shipped weights' own values are in their provenance.json.

    `start`: a pipeline folder whose parts are taken as they are instead of trained; only the polish is.
    """

    work: Path
    device: torch.device
    autoencoder_steps: int = 1800
    detector_steps: int = 1800
    clip_steps: int = 900
    denoiser_steps: int = 8000
    polish_steps: int = 2000
    seed: int = 0
    start: Path | None = None

    @property
    def drawings(self) -> Path:
        return self.work / "drawings"


def build(plan: Plan, until: str = "export") -> None:
    """Runs all stages up to and including `until`."""
    plan.work.mkdir(parents=True, exist_ok=True)
    for name, stage in STAGES.items():
        stage(plan)
        if name == until:
            return


def stage_drawings(plan: Plan) -> None:
    for split in SPLITS:
        if not (plan.start and split == "world"):
            draw_split(split, plan.drawings, os.cpu_count() or 1)
    if not plan.start:
        tokenizer.build(plan.work / "tokenizer")


def stage_autoencoder(plan: Plan) -> None:
    load_autoencoder(plan, train=True)


def load_autoencoder(plan: Plan, train: bool = False) -> AutoencoderKL:
    if plan.start:
        return AutoencoderKL.from_pretrained(plan.start / "vae", dtype=torch.float32).to(plan.device).eval()
    torch.manual_seed(plan.seed)
    vae = parts.new_autoencoder().to(plan.device, memory_format=torch.channels_last)
    pictures = Pictures("world", plan.drawings) if train else None

    def loss_of(step: int) -> dict[str, Tensor]:
        assert pictures is not None
        x = parts.as_input(pictures.take(parts.picks("autoencoder", step, 16, pictures.count)), plan.device)
        return parts.autoencoder_losses(vae, x, step)

    steps = plan.autoencoder_steps
    fit(vae, loss_of, file=plan.work / "autoencoder.pt", steps=steps, lr=1.5e-3, average=0.99, cooldown=0.5)
    return vae.requires_grad_(False)


def stage_detector(plan: Plan) -> None:
    load_detector(plan, train=True)


def load_detector(plan: Plan, train: bool = False) -> ResNetForImageClassification:
    if plan.start:
        return ResNetForImageClassification.from_pretrained(plan.start / "detector", dtype=torch.float32).eval()
    torch.manual_seed(plan.seed + 1)
    detector = parts.new_detector().to(plan.device)
    vae = load_autoencoder(plan) if train else None
    data = parts.Batches("world", plan.drawings) if train else None

    def loss_of(step: int) -> dict[str, Tensor]:
        assert data is not None and vae is not None
        indices = parts.picks("detector", step, 64, data.pictures.count)
        x = parts.as_input(data.pictures.take(indices), plan.device)
        right = parts.answers([data.scenes[i] for i in indices])
        x, right = parts.spoil(x, right, step, vae)
        return parts.detector_losses(detector(x).logits, right.to(plan.device))

    steps = plan.detector_steps
    fit(detector, loss_of, file=plan.work / "detector.pt", steps=steps, lr=2e-3, cooldown=0.5)
    return detector.requires_grad_(False)


def stage_clip(plan: Plan) -> None:
    load_clip(plan, train=True)


def load_clip(plan: Plan, train: bool = False) -> CLIPModel:
    torch.manual_seed(plan.seed + 2)
    if plan.start:
        return CLIPModel.from_pretrained(plan.start / "clip", dtype=torch.float32).to(plan.device).eval()
    tokens = CLIPTokenizer.from_pretrained(plan.work / "tokenizer")
    clip = parts.Clip(parts.new_clip(tokens)).to(plan.device)
    data = parts.Batches("world", plan.drawings) if train else None

    def loss_of(step: int) -> dict[str, Tensor]:
        assert data is not None
        indices = parts.picks("clip", step, 96, data.pictures.count)
        x = parts.as_input(data.pictures.take(indices), plan.device)
        ids = tokenize(tokens, data.captions(indices, step)).to(plan.device)
        right = parts.answers([data.scenes[i] for i in indices]).to(plan.device)
        return clip.losses(x, ids, right)

    steps = plan.clip_steps
    fit(clip, loss_of, file=plan.work / "clip.pt", steps=steps, lr=1e-3, weight_decay=0.05, cooldown=0.5)
    return clip.model.requires_grad_(False)


def tokenize(tokens: CLIPTokenizer, text: list[str]) -> Tensor:
    """Token ids (n, 24)."""
    return tokens(text, padding="max_length", truncation=True, max_length=24, return_tensors="pt").input_ids


def stage_latents(plan: Plan) -> None:
    """Latent means of all drawings for the denoiser, float16 (n, 8, 16, 16), and their overall scale."""
    file = plan.work / "latents.npy"
    if file.exists():
        return
    vae = load_autoencoder(plan)
    pictures = Pictures("painted", plan.drawings)
    latents = np.empty((pictures.count, parts.LATENT_CHANNELS, parts.LATENT_SIZE, parts.LATENT_SIZE), dtype=np.float16)
    with torch.inference_mode():
        for i in track(range(0, pictures.count, 100), "encoding"):
            x = parts.as_input(pictures.take(np.arange(i, i + 100)), plan.device)
            latents[i : i + 100] = vae.encode(x).latent_dist.mean.half().cpu().numpy()
    with replacing(file) as beside, beside.open("wb") as out:
        np.save(out, latents)


def scale_of(latents: np.ndarray) -> float:
    """Stable Diffusion's scaling factor: one over the latents' standard deviation."""
    return round(1 / float(latents[:4000].astype(np.float32).std()), 5)


def stage_denoiser(plan: Plan) -> None:
    load_denoiser(plan, train=True)


def load_denoiser(plan: Plan, train: bool = False) -> UNet2DConditionModel:
    torch.manual_seed(plan.seed + 3)
    unet = parts.new_denoiser().to(plan.device)
    if plan.start:
        unet.load_state_dict(load_file(plan.start / "unet" / "diffusion_pytorch_model.safetensors"))
        return unet
    everything = np.arange(SPLITS["painted"][0])
    loss_of = _denoising(plan, unet, "denoiser", [everything]) if train else _untrained
    file, steps = plan.work / "denoiser.pt", plan.denoiser_steps
    fit(unet, loss_of, file=file, steps=steps, lr=1.2e-3, average=0.999, cooldown=0.3)
    return unet.requires_grad_(False)


def stage_polish(plan: Plan) -> None:
    load_polished(plan, train=True)


def load_polished(plan: Plan, train: bool = False) -> UNet2DConditionModel:
    """The denoiser, trained on with more of what it finds hard: two objects, above all in the grainy styles."""
    unet = load_denoiser(plan).requires_grad_(True)
    loss_of: Callable[[int], dict[str, Tensor]] = _untrained
    if train:
        two = [i for i, scene in enumerate(scenes("painted")) if len(scene.objects) == 2]
        hard = [i for i, scene in enumerate(scenes("painted")) if len(scene.objects) == 2 and scene.style in HARD]
        everything = np.arange(SPLITS["painted"][0])
        loss_of = _denoising(plan, unet, "polish", [everything, np.array(two), everything, np.array(hard), everything])
    file, steps = plan.work / "polish.pt", plan.polish_steps
    fit(unet, loss_of, file=file, steps=steps, lr=4e-4, average=0.998, cooldown=0.6)
    return unet.requires_grad_(False)


def _untrained(step: int) -> dict[str, Tensor]:
    raise FileNotFoundError("this part is not trained yet: run the stages before")


def _denoising(
    plan: Plan, unet: UNet2DConditionModel, stage: str, rows_from: list[np.ndarray]
) -> Callable[[int], dict[str, Tensor]]:
    """The loss of a step: 64 pictures, row i one of `rows_from[i % len(rows_from)]`, every tenth without a caption."""
    latents = np.load(plan.work / "latents.npy")
    scale = scale_of(latents)
    data = parts.Batches("painted", plan.drawings)
    tokens = CLIPTokenizer.from_pretrained(plan.start / "tokenizer" if plan.start else plan.work / "tokenizer")
    encoder = load_clip(plan).text_model
    abar = parts.new_scheduler().alphas_cumprod.to(plan.device)

    def loss_of(step: int) -> dict[str, Tensor]:
        drawn = parts.picks(stage, step, 64, SPLITS["painted"][0])
        pools = [rows_from[row % len(rows_from)] for row in range(64)]
        indices = np.array([pool[i % len(pool)] for pool, i in zip(pools, drawn, strict=True)])
        z = torch.from_numpy(latents[indices]).to(plan.device).float() * scale
        text = data.captions(indices, step)
        for row in range(0, len(text), 10):
            text[row] = ""
        with torch.no_grad():
            states = encoder(tokenize(tokens, text).to(plan.device)).last_hidden_state
        return parts.denoiser_loss(unet, z, states, abar, step)

    return loss_of


def stage_export(plan: Plan) -> None:
    """Writes the pipeline folder, CLIP and detector in float16, and the provenance of all of it."""
    if plan.start:
        load_polished(plan).half().save_pretrained(WEIGHTS / "unet")
        write_provenance(plan)
        return
    tokens = CLIPTokenizer.from_pretrained(plan.work / "tokenizer")
    clip, detector, vae = load_clip(plan), load_detector(plan), load_autoencoder(plan)
    vae.register_to_config(scaling_factor=scale_of(np.load(plan.work / "latents.npy", mmap_mode="r")))
    encoder = CLIPTextModel(clip.config.text_config)
    encoder.load_state_dict(text_tower(clip))
    pipe = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=encoder.half(),
        tokenizer=tokens,
        unet=load_polished(plan).half(),
        scheduler=parts.new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    detector.config.thresholds = calibrated(detector, Pictures("held_out", plan.drawings))
    pipe.save_pretrained(WEIGHTS, safe_serialization=True)
    clip.half().save_pretrained(WEIGHTS / "clip")
    tokens.save_pretrained(WEIGHTS / "clip")
    half = [0.5, 0.5, 0.5]
    size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    CLIPImageProcessorPil(image_mean=half, image_std=half, **size).save_pretrained(WEIGHTS / "clip")
    detector.half().save_pretrained(WEIGHTS / "detector")
    write_provenance(plan)


def text_tower(clip: CLIPModel) -> dict[str, Tensor]:
    """Weights of CLIP's text tower under the names of a stand-alone `CLIPTextModel`."""
    return clip.text_model.state_dict()


def _provenance(weights: Path) -> dict[str, Any]:
    return json.loads((weights / "provenance.json").read_text())


def write_provenance(plan: Plan) -> None:
    about = ("provenance.json", "quality.json", "samples.png", "README.md")
    files = sorted(p for p in WEIGHTS.rglob("*") if p.is_file() and p.name not in about)
    drawn = hashlib.sha256()
    for file in sorted(plan.drawings.glob("held_out-*.npy")):
        drawn.update(file.read_bytes())
    steps = {k: v for k, v in vars(plan).items() if k.endswith("steps")}
    if plan.start:
        steps |= {k: v for k, v in _provenance(plan.start)["steps"].items() if k != "polish_steps"}
    provenance = {
        "made": time.strftime("%Y-%m-%d"),
        "seed": plan.seed,
        "steps": steps,
        "data": {"splits": {k: v[0] for k, v in SPLITS.items()}, "held_out_sha256": drawn.hexdigest()},
        "packages": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "files": {str(p.relative_to(WEIGHTS)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
    }
    (WEIGHTS / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")


STAGES = {
    "drawings": stage_drawings,
    "autoencoder": stage_autoencoder,
    "detector": stage_detector,
    "clip": stage_clip,
    "latents": stage_latents,
    "denoiser": stage_denoiser,
    "polish": stage_polish,
    "export": stage_export,
}
