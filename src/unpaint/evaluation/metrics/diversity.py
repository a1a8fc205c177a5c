"""Diversity: how much a label's pictures differ from each other, beside the unedited model's."""

from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from unpaint.cases import RETAIN, Case
from unpaint.errors import UserError
from unpaint.evaluation.detectors import Detector
from unpaint.evaluation.metrics import Parts, Reader
from unpaint.evaluation.metrics.features import KEPT, checked, rows_of
from unpaint.evaluation.stats import mean_summary


class Diversity:
    """Mean over labels of the mean 1 - cosine between any two pictures that ask for the label.

    A model that paints one and the same thing whatever the seed has 0. The prompts of a label differ, so read it
    against `base`, which has the same prompts. Bootstrap over labels. features: a reader of features (n, d).
    """

    name = "fidelity/diversity"
    unit = "distance"
    higher_is_better = True
    parts = (RETAIN,)
    roles = KEPT

    def __init__(self, title: str, cost: str, features: Reader) -> None:
        self.title = title
        self.cost = cost
        self.reader = checked(features, self.name)

    def part(self, cases: Sequence[Case], reading: NDArray[Any], detector: Detector) -> NDArray[np.float64]:
        """For each group in the batch: a number for its name, how many pictures, the sum of their unit features."""
        rows, features = rows_of(cases, reading, self)
        units = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        names = np.array([crc32(cases[row].group.encode()) for row in rows])
        sums = [(name, np.sum(names == name), *units[names == name].sum(axis=0)) for name in np.unique(names)]
        return np.array(sums, dtype=np.float64)

    def finish(self, edited: Parts, base: Parts) -> Mapping[str, Any]:
        """As `mean_summary` over labels, with n the number of pictures and `labels` that of labels with two or more."""
        (ours, n), (theirs, _) = _spreads(edited), _spreads(base)
        return mean_summary(ours, theirs) | {"n": n, "labels": len(ours)}


def _spreads(parts: Parts) -> tuple[NDArray[np.float64], int]:
    """Mean distance of two different pictures of each group: 1 - (|sum of units|^2 - n) / (n (n - 1))."""
    sums: dict[float, NDArray[np.float64]] = {}
    for part in parts:
        for name, *rest in part:
            sums[name] = sums.get(name, 0.0) + np.array(rest)
    counts = np.array([of[0] for of in sums.values()])
    squares = np.array([np.sum(of[1:] ** 2) for of in sums.values()])
    some = counts > 1
    if not some.any():
        raise UserError("fidelity/diversity needs a label with at least two pictures, there is none")
    n, square = counts[some], squares[some]
    return 1 - (square - n) / (n * (n - 1)), int(n.sum())
