"""Same seed: how far the edited model's picture is from the unedited one's of the same prompt and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unpaint.cases import RETAIN, Case
from unpaint.evaluation.detectors import Detector
from unpaint.evaluation.metrics import Parts, Reader
from unpaint.evaluation.metrics.features import KEPT, checked, rows_of
from unpaint.evaluation.stats import mean_summary


def other_seeds(cases: Sequence[Case]) -> list[Case]:
    """The same cases with a seed each that no plan has."""
    from unpaint.seeds import seed_of

    return [replace(case, seed=seed_of("score", case.seed, 1)) for case in cases]


class SameSeed:
    """Mean of 1 - cosine of the features of both pictures, over the prompts that do not ask for the target.

    `base` is 0, the unedited model beside itself. `other_seed` in the record is the scale: the same distance between
    pictures of the unedited model from two seeds. Bootstrap over pictures. features: a reader of features (n, d).
    """

    name = "fidelity/same_seed"
    unit = "distance"
    higher_is_better = False
    parts = (RETAIN,)
    roles = KEPT

    def __init__(self, title: str, cost: str, features: Reader) -> None:
        self.title = title
        self.cost = cost
        self.reader = checked(features, self.name)

    def reference(self, cases: Sequence[Case]) -> list[Case]:
        return other_seeds(cases)

    def part(self, cases: Sequence[Case], reading: NDArray[Any], detector: Detector) -> NDArray[np.float64]:
        """The features of the pictures that count, (n, d)."""
        return rows_of(cases, reading, self)[1]

    def finish(self, edited: Parts, base: Parts, reference: Parts) -> Mapping[str, Any]:
        moved, still, elsewhere = [], [], []
        # The reference is cut into other batches where a batch of the plan holds cases that do not count.
        others = (row for part in reference for row in part)
        for ours, theirs in zip(edited, base, strict=True):
            moved.append(_distance(ours, theirs))
            still.append(np.zeros(len(theirs)))
            elsewhere.append(_distance(np.array(list(islice(others, len(theirs)))).reshape(theirs.shape), theirs))
        return mean_summary(np.concatenate(moved), np.concatenate(still)) | {
            "other_seed": float(np.concatenate(elsewhere).mean())
        }


def _distance(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    cosine = (one * other).sum(axis=1) / np.maximum(lengths, 1e-12)
    # Rounding must not give equal pictures a distance.
    return np.where((one == other).all(axis=1), 0.0, 1 - cosine)
