"""Rates over pictures: unlearning accuracy (UA), in-domain and cross-domain retention (IRA, CRA), neighbours.

As UnlearnCanvas defines them (Zhang et al. 2024, arXiv 2402.11846, section 4), for any concept of a world with two
axes: UA is the share of target pictures that do not show the target, IRA the share of pictures of the other labels of
its axis that show theirs, CRA the share of all pictures whose label of the crossed axis is right.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unpaint.concepts import ROLES, Case
from unpaint.errors import UserError, nearest
from unpaint.evaluation.detectors import Detector, shows
from unpaint.evaluation.metrics import asked
from unpaint.evaluation.stats import rate_summary


@dataclass(frozen=True)
class Rate:
    """Share of the labels asked for in some roles that the pictures show, or (counts: absent) do not show.

    Fields as in `Metric`; counts is `shown` or `absent`. Intervals are Wilson's: one picture a prompt.
    """

    name: str
    title: str
    cost: str
    roles: tuple[str, ...]
    counts: str = "shown"
    unit: str = "rate"
    higher_is_better: bool = True
    reader: None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "roles", tuple(self.roles))
        for role in self.roles:
            if role not in ROLES:
                raise UserError(f"metric {self.name}: roles are {', '.join(ROLES)}, not '{role}'{nearest(role, ROLES)}")
        if self.counts not in ("shown", "absent"):
            raise UserError(f"metric {self.name}: counts is 'shown' or 'absent', not '{self.counts}'")

    def part(self, cases: Sequence[Case], reading: NDArray[Any], detector: Detector) -> NDArray[np.float64]:
        """1 or 0 for every label asked for, of probabilities (n, labels)."""
        pairs = asked(cases, self.roles)
        shown = {label: shows(detector, reading, label) for label in {label for _, label in pairs}}
        return np.array([shown[label][row] == (self.counts == "shown") for row, label in pairs], dtype=np.float64)

    def finish(
        self, edited: Sequence[NDArray[np.float64]], base: Sequence[NDArray[np.float64]]
    ) -> Mapping[str, float | int]:
        return rate_summary(np.concatenate(edited), np.concatenate(base))
