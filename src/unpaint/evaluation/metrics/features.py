"""Readers of image features: what FID, KID, the same-seed distance and diversity are measured in."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unpaint.cases import IN_DOMAIN, NEIGHBOUR, Case
from unpaint.errors import UserError
from unpaint.evaluation.detectors.picturebook import BUILT_IN as DETECTOR
from unpaint.evaluation.metrics import Declared, Reader, asked
from unpaint.evaluation.metrics.clip_score import BUILT_IN as CLIP
from unpaint.evaluation.pretrained import Clip, Source

KEPT = (IN_DOMAIN, NEIGHBOUR)


class DetectorFeatures:
    """The pooled features of a ResNet classifier before its last layer, for pictures in [-1, 1], without resizing.

    path: a transformers ResNetForImageClassification folder, None for Picturebook's detector.
    """

    def __init__(self, path: str | None = None) -> None:
        self.source = Source(path or DETECTOR)
        self._model: Any = None

    @property
    def identity(self) -> str:
        return f"pooled-{self.source.identity}"

    def read(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Features (n, d), float32, of pictures uint8 (n, 3, H, W)."""
        if self._model is None:
            from transformers import ResNetForImageClassification

            model = self.source.load(ResNetForImageClassification.from_pretrained, dtype=torch.float32)
            self._model = model.resnet.eval().requires_grad_(False)
        self._model.to(pictures.device)
        with torch.inference_mode():
            return self._model(pixel_values=pictures.float() / 127.5 - 1).pooler_output.flatten(1)


class ClipFeatures:
    """CLIP's embedding of the picture, unit length.

    path: a transformers CLIPModel folder or a hub id, None for Picturebook's.
    """

    def __init__(self, path: str | None = None, revision: str | None = None) -> None:
        self.clip = Clip(Source(path or CLIP, revision))

    @property
    def identity(self) -> str:
        return f"clip-picture-{self.clip.source.identity}"

    def read(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Features (n, d), float32, of pictures uint8 (n, 3, H, W)."""
        return self.clip.see(pictures)


def rows_of(cases: Sequence[Case], reading: NDArray[Any], metric: Declared) -> tuple[list[int], NDArray[np.float64]]:
    """Which cases the metric looks at, and their features. Raises UserError on NaN and infinity."""
    rows = [row for row, _ in asked(cases, metric)]
    features = reading[rows].astype(np.float64)
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        prompt = cases[rows[int(bad.argmax())]].prompt
        raise UserError(f"the features of {int(bad.sum())} pictures hold NaN or infinity, the first of '{prompt}'")
    return rows, features


def checked(features: Reader, name: str) -> Reader:
    """The reader a metric was given. Raises UserError if it is none."""
    if not hasattr(features, "read"):
        raise UserError(f"metric {name}: features is a reader such as DetectorFeatures, not {features!r}")
    return features
