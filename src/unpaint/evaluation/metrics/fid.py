"""FID against the unedited model's pictures of the same prompts from other seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unpaint.cases import RETAIN, Case
from unpaint.evaluation.detectors import Detector
from unpaint.evaluation.metrics import Parts, Reader
from unpaint.evaluation.metrics.distances import check_enough, fid, summary
from unpaint.evaluation.metrics.features import KEPT, checked, rows_of
from unpaint.evaluation.metrics.same_seed import other_seeds


class Fid:
    """FID (Heusel et al. 2017, arXiv 1706.08500) over the prompts that do not ask for the target.

    The reference are pictures of the unedited model from other seeds. So `base`, the unedited model's own FID, is the
    floor: what chance alone makes of a model that did not change. features: a reader of features (n, d).
    """

    name = "fidelity/fid"
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
        """As `distances.summary`; n, d (features), and a note if there are too few pictures for so many features."""
        n, d = check_enough(self.name, edited, reference)
        return summary(fid(edited, reference), fid(base, reference), lowest=0.0) | sizes(n, d)


def sizes(n: int, d: int) -> dict[str, Any]:
    """n, features, and what must be said of an FID of n pictures with d features."""
    found: dict[str, Any] = {"n": n, "features": d}
    if n <= d:
        found["note"] = f"{n} pictures do not fix a covariance of {d} features: not to be compared; read KID"
    return found
