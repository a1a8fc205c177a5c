"""Picturebook's own detector: which objects, style, setting and relation a picture shows."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unpaint.errors import UserError
from unpaint.evaluation.pictures import folder_identity, quiet
from unpaint.files import WEIGHTS

BUILT_IN = WEIGHTS / "detector"


class PicturebookDetector:
    """A transformers ResNetForImageClassification with one head over the labels of several axes.

    `object/*` are independent (sigmoid, each with its threshold), the labels of every other axis exclude one another
    (softmax). path: the folder, None for the one in the package. The network is loaded at the first call.
    Raises UserError when the folder holds no such model.
    """

    def __init__(self, path: str | None = None) -> None:
        self.folder = Path(path) if path else BUILT_IN
        self.only_for = None if path else "picturebook"
        # At most: the objects' thresholds are set on drawings (picturebook/thresholds.py).
        self.false_positive_rate = None if path else 0.01
        self._model: Any = None

    @cached_property
    def _config(self) -> dict[str, Any]:
        try:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            config["id2label"], config["thresholds"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"'{self.folder}' is not a Picturebook detector: {error!r} on its config.json") from error
        return config

    @cached_property
    def labels(self) -> list[str]:
        names = self._config["id2label"]
        return [names[str(i)] for i in range(len(names))]

    @cached_property
    def thresholds(self) -> Mapping[str, float]:
        found = self._config["thresholds"]
        return {label: float(found[label]) for label in self.labels if label.startswith("object/")}

    @cached_property
    def identity(self) -> str:
        return f"picturebook-{folder_identity(self.folder)}"

    def __call__(self, images: Tensor) -> Tensor:
        """Probabilities (N, labels), float32, of images (N, 3, H, W) between 0 and 1."""
        with torch.inference_mode():
            logits = self.logits(images)
        probabilities = logits.sigmoid()
        for axis in sorted({label.split("/")[0] for label in self.labels} - {"object"}):
            own = [i for i, label in enumerate(self.labels) if label.startswith(f"{axis}/")]
            probabilities[:, own] = logits[:, own].softmax(dim=1)
        return probabilities

    def logits(self, images: Tensor) -> Tensor:
        """What the probabilities are made of, (N, labels), float32; differentiable in the images."""
        if self._model is None:
            # Ordinary tensors, whoever asks first: inference tensors cannot take part in a gradient later.
            with torch.inference_mode(False):
                self._model = self._load()
        self._model.to(images.device)
        return self._model(pixel_values=images.float() * 2 - 1).logits

    def _load(self) -> Any:
        from transformers import AutoModelForImageClassification

        try:
            with quiet():
                model = AutoModelForImageClassification.from_pretrained(
                    self.folder, local_files_only=True, dtype=torch.float32
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"the detector '{self.folder}' does not load: {str(error).splitlines()[0]}") from error
        return model.eval().requires_grad_(False)
