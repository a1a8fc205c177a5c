"""Distances between the edited and the unedited model's picture of the same prompt and seed, from the pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unpaint.cases import RETAIN, Case
from unpaint.evaluation.detectors import Detector
from unpaint.evaluation.metrics import PairReader, Parts
from unpaint.evaluation.metrics.features import KEPT, rows_of
from unpaint.evaluation.stats import mean_summary


class PixelRmse:
    """Root mean square difference of the pixels of two pictures, between 0 and 1."""

    identity = "pixel-rmse-1"

    def compare(self, pictures: Tensor, unedited: Tensor) -> Tensor:
        """(n,), float32, of pictures uint8 (n, 3, H, W) each."""
        difference = pictures.float() - unedited.float()
        return difference.square().mean(dim=(1, 2, 3)).sqrt() / 255


class Pairs:
    """Mean of what a pair reader says of each picture and its unedited twin; `base` is 0. Bootstrap over pictures."""

    unit = "distance"
    higher_is_better = False
    parts = (RETAIN,)
    roles = KEPT

    def __init__(self, name: str, title: str, cost: str, reader: PairReader) -> None:
        self.name = name
        self.title = title
        self.cost = cost
        self.reader = reader

    def part(self, cases: Sequence[Case], reading: NDArray[Any], detector: Detector) -> NDArray[np.float64]:
        """The distances of the pictures that count, (n,)."""
        return rows_of(cases, reading[:, None], self)[1][:, 0]

    def finish(self, edited: Parts, base: Parts) -> Mapping[str, Any]:
        return mean_summary(np.concatenate(edited), np.concatenate(base))
