"""The networks of Picturebook, from the classes that Stable Diffusion 1.x is made of, and what each is trained on."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    ResNetConfig,
    ResNetForImageClassification,
)

from unpaint.picturebook.captions import Name, caption
from unpaint.picturebook.data import Pictures, scenes
from unpaint.picturebook.world import OBJECTS, RELATIONS, SETTINGS, STYLES, Scene

TEXT_WIDTH = 256
TEXT_LENGTH = 24
LATENT_CHANNELS = 8
LATENT_SIZE = 16
AXES = {"object": OBJECTS, "style": (*STYLES, "none"), "setting": (*SETTINGS, "none"), "relation": (*RELATIONS, "none")}
LABELS = [f"{axis}/{name}" for axis, names in AXES.items() for name in names]


def picks(name: str, step: int, n: int, count: int) -> np.ndarray:
    """`n` indices below `count`, a pure function of stage and step."""
    return np.random.default_rng([*name.encode(), step]).integers(0, count, n)


def as_input(pictures: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (n, H, W, 3) to float (n, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- autoencoder --------------------------------------------------------------------------------------------------


def new_autoencoder() -> AutoencoderKL:
    """64 x 64 x 3 to 16 x 16 x 8 and back."""
    levels = 3
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
    )


def autoencoder_losses(vae: AutoencoderKL, x: Tensor, seed: int) -> dict[str, Tensor]:
    """Absolute error, error of the pictures' gradients (keeps lines sharp) and a slight pull to unit Gaussians."""
    posterior = vae.encode(x).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)
    y = vae.decode(posterior.mean + posterior.std * noise).sample
    edges = (y.diff(dim=2) - x.diff(dim=2)).abs().mean() + (y.diff(dim=3) - x.diff(dim=3)).abs().mean()
    kl = posterior.kl().mean() / (x[0].numel())
    return {"error": (y - x).abs().mean() + F.mse_loss(y, x), "edges": 0.3 * edges, "kl": 1e-3 * kl}


# --- detector -----------------------------------------------------------------------------------------------------


def new_detector() -> ResNetForImageClassification:
    """One small residual network with all labels on its last layer; the axes are slices of its logits."""
    config = ResNetConfig(
        embedding_size=40,
        hidden_sizes=[40, 80, 128, 160],
        depths=[1, 2, 2, 1],
        layer_type="basic",
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    return ResNetForImageClassification(config)


def slices() -> dict[str, slice]:
    """Where each axis lies among the detector's logits."""
    out, start = {}, 0
    for axis, names in AXES.items():
        out[axis] = slice(start, start + len(names))
        start += len(names)
    return out


@dataclass(frozen=True)
class Answers:
    """What the detector should say: objects (n, 13) in {0, 1}; style, setting and relation (n,) as indices."""

    objects: Tensor
    style: Tensor
    setting: Tensor
    relation: Tensor

    def to(self, device: torch.device) -> "Answers":
        return Answers(*(t.to(device) for t in (self.objects, self.style, self.setting, self.relation)))


def answers(of: list[Scene]) -> Answers:
    objects = torch.tensor([[float(name in scene.objects) for name in OBJECTS] for scene in of])
    style = torch.tensor([AXES["style"].index(scene.style) for scene in of])
    setting = torch.tensor([AXES["setting"].index(scene.setting) for scene in of])
    relation = torch.tensor([AXES["relation"].index(scene.relation) for scene in of])
    return Answers(objects, style, setting, relation)


def detector_losses(logits: Tensor, right: Answers) -> dict[str, Tensor]:
    part = slices()
    return {
        "object": 4 * F.binary_cross_entropy_with_logits(logits[:, part["object"]], right.objects),
        "style": 0.5 * F.cross_entropy(logits[:, part["style"]], right.style),
        "setting": 0.5 * F.cross_entropy(logits[:, part["setting"]], right.setting),
        "relation": 0.5 * F.cross_entropy(logits[:, part["relation"]], right.relation),
    }


def spoil(x: Tensor, right: Answers, step: int, vae: AutoencoderKL) -> tuple[Tensor, Answers]:
    """Drawings made as imperfect as painted ones: an eighth through the autoencoder with noise on the latents, an
    eighth blurred, an eighth blended with another picture so far that neither counts (every label off or none)."""
    rng = torch.Generator().manual_seed(step)
    n = len(x)
    eighth = n // 8
    x, objects = x.clone(), right.objects.clone()
    style, setting, relation = right.style.clone(), right.setting.clone(), right.relation.clone()
    with torch.no_grad():
        z = vae.encode(x[:eighth]).latent_dist.mean
        strength = 0.35 * torch.rand((eighth, 1, 1, 1), generator=rng).to(x.device) * z.std()
        x[:eighth] = vae.decode(z + strength * torch.randn(z.shape, generator=rng).to(x.device)).sample.clamp(-1, 1)
    blurred = slice(eighth, 2 * eighth)
    small = F.interpolate(x[blurred], scale_factor=0.6, mode="bilinear", antialias=True)
    x[blurred] = F.interpolate(small, size=x.shape[-1], mode="bilinear")
    blend = slice(2 * eighth, 3 * eighth)
    other = x[-eighth:]
    share = 0.45 + 0.1 * torch.rand((eighth, 1, 1, 1), generator=rng).to(x.device)
    x[blend] = share * x[blend] + (1 - share) * other
    objects[blend] = 0
    style[blend], setting[blend] = AXES["style"].index("none"), AXES["setting"].index("none")
    relation[blend] = AXES["relation"].index("none")
    flip = torch.rand(n, generator=rng) < 0.5
    x[flip] = x[flip].flip(-1)
    return x, Answers(objects, style, setting, relation)


# --- CLIP -----------------------------------------------------------------------------------------------------------


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=320,
        projection_dim=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
    )
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


class Clip(nn.Module):
    """CLIP with two helpers that are dropped after training: linear read-outs of the labels from either side."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model
        self.read_picture = nn.Linear(128, len(LABELS))
        self.read_text = nn.Linear(128, len(LABELS))

    def losses(self, x: Tensor, tokens: Tensor, right: Answers) -> dict[str, Tensor]:
        picture = projected(self.model.get_image_features(pixel_values=x))
        text = projected(self.model.get_text_features(input_ids=tokens))
        p, t = F.normalize(picture, dim=-1), F.normalize(text, dim=-1)
        logits = self.model.logit_scale.exp().clamp(max=60) * p @ t.T
        goal = torch.arange(len(x), device=x.device)
        contrast = (F.cross_entropy(logits, goal) + F.cross_entropy(logits.T, goal)) / 2
        seen = torch.stack(list(detector_losses(self.read_picture(picture), right).values())).sum()
        told = torch.stack(list(detector_losses(self.read_text(text), right).values())).sum()
        return {"contrast": contrast, "seen": 0.3 * seen, "told": 0.3 * told}


def projected(output: object) -> Tensor:
    """The embedding, whichever of tensor and output object this version of transformers returns."""
    return output if isinstance(output, Tensor) else output.pooler_output  # type: ignore[attr-defined]


# --- denoiser ---------------------------------------------------------------------------------------------------------


def new_denoiser() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.x's own noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def denoiser_loss(unet: UNet2DConditionModel, z: Tensor, text: Tensor, abar: Tensor, step: int) -> dict[str, Tensor]:
    """Noise prediction, weighted by min(SNR, 5) / SNR (arXiv 2303.09556, eq. 5 for epsilon prediction)."""
    rng = torch.Generator().manual_seed(step)
    n = len(z)
    t = ((torch.arange(n) + torch.rand(n, generator=rng)) * (1000 / n)).long().to(z.device)
    noise = torch.randn(z.shape, generator=rng).to(z.device)
    a = abar[t].view(-1, 1, 1, 1)
    predicted = unet(a.sqrt() * z + (1 - a).sqrt() * noise, t, text).sample
    snr = (a / (1 - a)).flatten()
    error = (predicted - noise).square().mean(dim=(1, 2, 3))
    return {"noise": (error * snr.clamp(max=5) / snr).mean()}


class Batches:
    """Pictures with their scenes, and captions written afresh for each step."""

    def __init__(self, split: str, folder: Path) -> None:
        self.pictures = Pictures(split, folder)
        self.scenes = list(scenes(split))

    def captions(self, indices: np.ndarray, step: int) -> list[str]:
        return [training_caption(self.scenes[i], random.Random(f"{step}/{row}")) for row, i in enumerate(indices)]


def training_caption(scene: Scene, rng: random.Random) -> str:
    names: tuple[Name, ...] = ("plain", "synonym", "description")
    name = rng.choices(names, (0.5, 0.2, 0.3))[0]
    return caption(scene, rng, templates="train", name=name, mark="any", drop=0.12)
