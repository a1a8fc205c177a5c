"""Picturebook's detector as an aligner: how sure it is of one label, whatever the prompt says."""

from collections.abc import Sequence

from torch import Tensor

from unpaint.errors import UserError, nearest
from unpaint.evaluation.detectors.picturebook import PicturebookDetector


class DetectorAligner:
    """The label's logit; for a label that competes within its axis, its logarithm of the softmax probability.

    label: `axis/word`. path: the detector's folder, None for the one in the package.
    Raises UserError when the detector does not know the label.
    """

    def __init__(self, label: str, path: str | None = None) -> None:
        self.detector = PicturebookDetector(path)
        labels = self.detector.labels
        if label not in labels:
            raise UserError(f"the aligner's detector does not know the label '{label}'{nearest(label, labels)}")
        self.own = labels.index(label)
        axis = label.split("/")[0]
        self.rivals = [] if axis == "object" else [i for i, other in enumerate(labels) if other.startswith(f"{axis}/")]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (n,) of images (n, 3, H, W) between 0 and 1; the prompts are not read."""
        logits = self.detector.logits(images)
        if not self.rivals:
            return logits[:, self.own]
        return logits[:, self.rivals].log_softmax(dim=1)[:, self.rivals.index(self.own)]
