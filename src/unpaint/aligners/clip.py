"""CLIP as an aligner: the cosine of picture and prompt (Radford et al. 2021, arXiv 2103.00020)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unpaint.errors import UserError
from unpaint.evaluation.metrics.clip_score import BUILT_IN
from unpaint.evaluation.pretrained import Clip, Source

# PIL's numbers for the filters that a preprocessor may name.
_FILTERS = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}


class ClipAligner:
    """Cosine in the space of a transformers CLIPModel, loaded at the first call.

    path: its folder or hub id, None for Picturebook's. Raises UserError when it is neither.
    """

    def __init__(self, path: str | None = None) -> None:
        self.only_for = None if path else "picturebook"
        self.clip = Clip(Source(path or BUILT_IN))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines (n,) of images (n, 3, H, W) between 0 and 1 and n prompts."""
        with torch.inference_mode(False):
            model, tokenizer, processor = self.clip.parts
        model.to(images.device)
        length = model.config.text_config.max_position_embeddings
        tokens = tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(images.device)
        pixels = preprocessed(images.float(), processor.to_dict())
        seen = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        with torch.no_grad():
            text = model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            meant = model.text_projection(text.pooler_output)
        return F.cosine_similarity(seen.float(), meant.float(), dim=-1)


def preprocessed(images: Tensor, config: Mapping[str, Any]) -> Tensor:
    """What a CLIPImageProcessor of these options makes of images (n, 3, H, W) between 0 and 1,
    differentiable: nothing is rounded to whole grey values on the way.

    Raises UserError on a filter other than nearest, bilinear or bicubic.
    """
    if config.get("do_resize", True):
        images = _resized(images, config["size"], int(config.get("resample", 3)))
    if config.get("do_center_crop", True):
        images = _cropped(images, config["crop_size"])
    if config.get("do_normalize", True):
        mean, std = (images.new_tensor(config[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
        images = (images - mean) / std
    return images


def _resized(images: Tensor, size: Mapping[str, int] | int, resample: int) -> Tensor:
    height, width = images.shape[-2:]
    if isinstance(size, int):
        size = {"shortest_edge": size}
    if "shortest_edge" in size:
        short = size["shortest_edge"]
        wanted = (short, short * width // height) if height <= width else (short * height // width, short)
    else:
        wanted = (size["height"], size["width"])
    if resample not in _FILTERS:
        raise UserError(f"the CLIP's preprocessor resamples with PIL's filter {resample}; known: {sorted(_FILTERS)}")
    if wanted == (height, width):
        return images
    smooth = resample != 0
    resized = F.interpolate(images, wanted, mode=_FILTERS[resample], antialias=smooth)
    return resized.clamp(0, 1)


def _cropped(images: Tensor, size: Mapping[str, int] | int) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else (size["height"], size["width"])
    high, wide = height - images.shape[-2], width - images.shape[-1]
    # Negative padding crops.
    top, left = -(-high // 2), -(-wide // 2)
    return F.pad(images, (left, wide - left, top, high - top))
