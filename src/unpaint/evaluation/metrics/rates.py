"""Rates over pictures: what share of those that some prompts ask for shows what was asked, or does not.

UA, IRA and CRA are UnlearnCanvas's (Zhang et al. 2024, arXiv 2402.11846, section 4) for any concept of a world with two
axes: UA is the share of target pictures that do not show the target, IRA the share of pictures of the other labels of
its axis that show theirs, CRA the share of all pictures whose label of the crossed axis is right. The cells of a 2x2
table, composition and static attacks are such rates of other prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unpaint.cases import IN_DOMAIN, IN_SET, NEIGHBOUR, PARTS, RETAIN, ROLES, TARGET, Case
from unpaint.errors import UserError, nearest
from unpaint.evaluation.detectors import Detector, shows
from unpaint.evaluation.metrics import asked
from unpaint.evaluation.stats import rate_summary


@dataclass(frozen=True)
class Rate:
    """Share of the pictures that show all that is asked for in some roles, or (counts: absent) not all of it.

    Fields as in `Metric`; counts is `shown` or `absent`; at_least leaves out pictures with fewer labels in the roles.
    Intervals are Wilson's: one picture a prompt.
    """

    name: str
    title: str
    cost: str
    parts: tuple[str, ...]
    roles: tuple[str, ...]
    counts: str = "shown"
    at_least: int = 1
    higher_is_better: bool = True
    unit: str = "rate"
    reader: None = None

    def __post_init__(self) -> None:
        for key, known in (("parts", PARTS), ("roles", ROLES)):
            object.__setattr__(self, key, tuple(getattr(self, key)))
            for word in getattr(self, key):
                if word not in known:
                    raise UserError(
                        f"metric {self.name}: {key} are {', '.join(known)}, not '{word}'{nearest(word, known)}"
                    )
        if self.counts not in ("shown", "absent"):
            raise UserError(f"metric {self.name}: counts is 'shown' or 'absent', not '{self.counts}'")

    def part(self, cases: Sequence[Case], reading: NDArray[Any], detector: Detector) -> NDArray[np.float64]:
        """1 or 0 for every picture that counts, of probabilities (n, labels)."""
        rows = [(row, labels) for row, labels in asked(cases, self) if len(labels) >= self.at_least]
        right = shown(rows, reading, detector)
        return right if self.counts == "shown" else 1 - right

    def finish(self, edited: Sequence[NDArray[np.float64]], base: Sequence[NDArray[np.float64]]) -> Mapping[str, Any]:
        return rate_summary(np.concatenate(edited), np.concatenate(base))


def shown(rows: Sequence[tuple[int, Sequence[str]]], reading: NDArray[Any], detector: Detector) -> NDArray[np.float64]:
    """1 for each (row, labels) whose picture shows all the labels, else 0, of probabilities (n, labels)."""
    says = {label: shows(detector, reading, label) for label in {label for _, labels in rows for label in labels}}
    return np.array([all(says[label][row] for label in labels) for row, labels in rows], dtype=np.float64)


@dataclass(frozen=True)
class Damage:
    """One row of the matrix concept x concept: what share of each label's pictures shows it, beside the unedited model.

    The value is that of the retained label that lost most, `worst`; its interval is Wilson's and does not know that it
    was picked as the worst of many. `by_label` holds value, base and n of every label, the target's too.
    """

    title: str
    cost: str
    name: str = "retention/damage"
    unit: str = "rate"
    higher_is_better: bool = True
    parts: tuple[str, ...] = (IN_SET, RETAIN)
    roles: tuple[str, ...] = (TARGET, IN_DOMAIN, NEIGHBOUR)
    reader: None = None

    def part(self, cases: Sequence[Case], reading: NDArray[Any], detector: Detector) -> NDArray[Any]:
        """(n, 3) of texts: group, role and 1 or 0."""
        rows = asked(cases, self)
        right = shown(rows, reading, detector)
        return np.array(
            [
                (cases[row].group, cases[row].wants[labels[0]], str(int(one)))
                for (row, labels), one in zip(rows, right, strict=True)
            ]
        )

    def finish(self, edited: Sequence[NDArray[Any]], base: Sequence[NDArray[Any]]) -> Mapping[str, Any]:
        after, before = np.concatenate(edited), np.concatenate(base)
        of_label: dict[str, Mapping[str, Any]] = {}
        for group in dict.fromkeys(after[:, 0].tolist()):
            own = after[:, 0] == group
            of_label[group] = rate_summary(after[own, 2].astype(np.float64), before[own, 2].astype(np.float64))
        kept = [group for group in of_label if TARGET not in after[after[:, 0] == group, 1]]
        by_label = {group: {key: found[key] for key in ("value", "base", "n")} for group, found in of_label.items()}
        if not kept:
            return {"value": None, "low": None, "high": None, "n": 0, "base": None, "by_label": by_label}
        worst = min(kept, key=lambda group: (of_label[group]["delta"], group))
        return {**of_label[worst], "worst": worst, "by_label": by_label}
