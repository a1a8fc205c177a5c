"""Detectors: pictures to probabilities of labels. One file a detector; anything of this shape is one."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unpaint.errors import UserError, nearest


class Detector(Protocol):
    """Judges pictures.

    labels: `axis/word`, in the order of the probabilities. thresholds: the labels that are decided by themselves, with
    the probability from which they count as shown; the others compete within their axis. identity: changes when the
    answers may change, names the detector in records and caches. only_for: the one model whose pictures it knows, None
    for any. Reading these loads no network. One that knows how often it sees what is not there says so in a further
    attribute, false_positive_rate.
    """

    @property
    def labels(self) -> Sequence[str]: ...

    @property
    def thresholds(self) -> Mapping[str, float]: ...

    @property
    def identity(self) -> str: ...

    @property
    def only_for(self) -> str | None: ...

    def __call__(self, images: Tensor) -> Tensor:
        """Probabilities (N, labels) of images (N, 3, H, W), floats between 0 and 1, on the images' device."""
        ...


def shows(detector: Detector, probabilities: NDArray[Any], label: str) -> NDArray[np.bool_]:
    """Which of the pictures with these probabilities (N, labels) show the label, (N,).

    A label with a threshold is shown from that probability on (equal counts), any other if it is the most probable
    of its axis. Raises UserError when the detector does not know the label, or answers with NaN, which would be less
    than any threshold.
    """
    labels = list(detector.labels)
    if label not in labels:
        raise UserError(f"detector {detector.identity} does not know the label '{label}'{nearest(label, labels)}")
    own = labels.index(label)
    alone = label in detector.thresholds
    axis = [own] if alone else [i for i, other in enumerate(labels) if other.split("/")[0] == label.split("/")[0]]
    if np.isnan(probabilities[:, axis]).any():
        raise UserError(f"detector {detector.identity} answers with NaN for '{label}'")
    if alone:
        return probabilities[:, own] >= detector.thresholds[label]
    return np.asarray(axis)[probabilities[:, axis].argmax(axis=1)] == own
