"""KID against the unedited model's pictures of the same prompts from other seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unpaint.cases import RETAIN, Case
from unpaint.evaluation.detectors import Detector
from unpaint.evaluation.metrics import Parts, Reader
from unpaint.evaluation.metrics.distances import check_enough, kid, summary
from unpaint.evaluation.metrics.features import KEPT, checked, rows_of
from unpaint.evaluation.metrics.same_seed import other_seeds


class Kid:
    """KID (Binkowski et al. 2018, arXiv 1801.01401) over the prompts that do not ask for the target.

    Unbiased: its floor (`base`, the unedited model from other seeds) is about 0 for any number of pictures, and it may
    be negative. features: a reader of features (n, d).
    """

    name = "fidelity/kid"
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
        """As `distances.summary`; n, features, subsets and the standard deviation over them (0 if there is one)."""
        n, d = check_enough(self.name, edited, reference)
        (values, subsets), (floor, _) = kid(edited, reference), kid(base, reference)
        return summary(values, floor) | {
            "n": n,
            "features": d,
            "subsets": len(subsets),
            "subset_std": float(subsets.std()),
        }
