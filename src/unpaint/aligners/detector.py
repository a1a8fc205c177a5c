"""Picturebook's detector as an aligner: how sure it is of some labels, whatever the prompt says."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unpaint.errors import UserError, nearest
from unpaint.evaluation.detectors.picturebook import PicturebookDetector


class DetectorAligner:
    """The label's logit; for a label that competes within its axis, its logarithm of the softmax probability. Of
    several labels, which a combination must show together, the sum.

    labels: `axis/word` each. path: the detector's folder, None for the one in the package.
    Raises UserError when the detector does not know the label.
    """

    def __init__(self, labels: Sequence[str], path: str | None = None) -> None:
        self.detector = PicturebookDetector(path)
        self.only_for = self.detector.only_for
        self.labels = list(labels)
        known = self.detector.labels
        for label in self.labels:
            if label not in known:
                raise UserError(f"the aligner's detector does not know the label '{label}'{nearest(label, known)}")

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (n,) of images (n, 3, H, W) between 0 and 1; the prompts are not read."""
        logits = self.detector.logits(images)
        return torch.stack([self._score(logits, label) for label in self.labels]).sum(dim=0)

    def _score(self, logits: Tensor, label: str) -> Tensor:
        known = list(self.detector.labels)
        axis = label.split("/")[0]
        if axis == "object":
            return logits[:, known.index(label)]
        rivals = [i for i, other in enumerate(known) if other.startswith(f"{axis}/")]
        return logits[:, rivals].log_softmax(dim=1)[:, rivals.index(known.index(label))]
