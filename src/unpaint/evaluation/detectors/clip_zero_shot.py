"""CLIP zero-shot: which of the texts of an axis fits a picture best (Radford et al. 2021, arXiv 2103.00020)."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from unpaint.errors import UserError, nearest
from unpaint.evaluation.pretrained import Clip, Source


class ClipZeroShot:
    """Probabilities by softmax over the texts of an axis, with CLIP's own logit scale.

    path: a transformers CLIPModel folder or a hub id, at `revision`. labels: `axis/word` -> the text that stands for
    it. Each axis also has the label `axis/none`, with the text `neutral` unless `labels` gives one. thresholds: labels
    that are decided by themselves; the others must be the best of their axis. The network is loaded at the first call.
    Raises UserError when there is no such model, or on labels and thresholds that do not fit.
    """

    only_for = None

    def __init__(
        self,
        path: str,
        labels: Mapping[str, str],
        neutral: str = "a photo",
        thresholds: Mapping[str, float] | None = None,
        revision: str | None = None,
    ) -> None:
        self.texts = with_none(labels, neutral)
        self.labels = list(self.texts)
        self.thresholds = checked_thresholds(thresholds or {}, self.labels)
        self.clip = Clip(Source(path, revision))
        self._meant: Tensor | None = None

    @property
    def identity(self) -> str:
        return f"clip-zero-shot-{self.clip.source.identity}-{digest(self.texts, self.thresholds)}"

    def __call__(self, images: Tensor) -> Tensor:
        """Probabilities (N, labels), float32, of images (N, 3, H, W) between 0 and 1."""
        if self._meant is None:
            self._meant = self.clip.read(list(self.texts.values()), images.device)
        seen = self.clip.see((images * 255).round().to(torch.uint8))
        logits = self.clip.scale * seen @ self._meant.to(images.device).T
        probabilities = torch.empty_like(logits)
        for own in by_axis(self.labels):
            probabilities[:, own] = logits[:, own].softmax(dim=1)
        return probabilities


def with_none(labels: Mapping[str, str], neutral: str) -> dict[str, str]:
    """The labels, and `axis/none` for each axis that lacks it. Raises UserError on none, or one without an axis."""
    if not labels:
        raise UserError("a detector needs labels, like object/cat: a photo of a cat")
    for label in labels:
        if not all(label.partition("/")):
            raise UserError(f"a detector's label looks like axis/word, not '{label}'")
    return {**labels, **{f"{axis}/none": neutral for axis in _axes(labels) if f"{axis}/none" not in labels}}


def by_axis(labels: list[str]) -> list[list[int]]:
    """The places of each axis' labels."""
    return [[i for i, label in enumerate(labels) if label.startswith(f"{axis}/")] for axis in _axes(labels)]


def _axes(labels: Mapping[str, str] | list[str]) -> list[str]:
    return list(dict.fromkeys(label.split("/")[0] for label in labels))


def checked_thresholds(thresholds: Mapping[str, float], labels: list[str]) -> dict[str, float]:
    for label, threshold in thresholds.items():
        if label not in labels:
            raise UserError(f"thresholds: '{label}' is not one of the labels{nearest(label, labels)}")
        if not 0 < threshold < 1:
            raise UserError(f"thresholds: {label} is between 0 and 1, not {threshold}")
    return {label: float(threshold) for label, threshold in thresholds.items()}


def digest(*content: object) -> str:
    """8 hex digits over plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
