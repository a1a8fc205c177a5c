"""CoGFD's erase-retain score for combinations and conditions (Nie et al. 2025, ICLR; evaluated as in its code)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unpaint.cases import ASKED, IN_SET, TARGET, Case
from unpaint.errors import UserError
from unpaint.evaluation.detectors import Detector
from unpaint.evaluation.metrics import asked
from unpaint.evaluation.metrics.clip_score import BUILT_IN, ClipCosine


class EraseRetain:
    """|F| / max(|R|, epsilon): F and R are how far the mean CLIP score fell (base - edited) for the prompts that ask
    for both, and for those that ask for one without the other; `forget_delta` and `retain_delta` have the sign.

    The score does not see the sign of R, and is large by chance where R is near 0: epsilon (a cosine) bounds it.
    path: a CLIPModel folder, None for Picturebook's. Percentile bootstrap over pictures, forgotten and retained apart.
    """

    name = "pairs/erase_retain"
    unit = "ratio"
    higher_is_better = True
    parts = (IN_SET, "first_only", "second_only")
    roles = (TARGET, ASKED)

    def __init__(self, title: str, cost: str, epsilon: float, path: str | None = None) -> None:
        if epsilon <= 0:
            raise UserError(f"metric {self.name}: epsilon is above 0, not {epsilon}")
        self.title = title
        self.cost = cost
        self.epsilon = epsilon
        self.reader = ClipCosine(Path(path) if path else BUILT_IN)

    def part(self, cases: Sequence[Case], reading: NDArray[Any], detector: Detector) -> NDArray[np.float64]:
        """(n, 2) of cosines (n,): 1 if the picture was to show both, 0 if one without the other; and the cosine."""
        rows = [
            (float(cases[row].part == IN_SET), float(reading[row]))
            for row, labels in asked(cases, self)
            if cases[row].part != IN_SET or len(labels) > 1
        ]
        return np.array(rows, dtype=np.float64).reshape(-1, 2)

    def finish(self, edited: Sequence[NDArray[np.float64]], base: Sequence[NDArray[np.float64]]) -> Mapping[str, Any]:
        after, before = np.concatenate(edited), np.concatenate(base)
        fell = before[:, 1] - after[:, 1]
        forget, retain = fell[after[:, 0] == 1], fell[after[:, 0] == 0]
        empty = {"value": None, "low": None, "high": None, "n": len(fell), "base": None}
        if not len(forget) or not len(retain):
            return empty
        rng = np.random.default_rng(0)
        means = [fell[rng.integers(0, len(fell), (2000, len(fell)))].mean(axis=1) for fell in (forget, retain)]
        low, high = np.quantile(self._score(*means), [0.025, 0.975])
        return {
            "value": float(self._score(forget.mean(), retain.mean())),
            "low": float(low),
            "high": float(high),
            "n": len(fell),
            "base": 0.0,
            "forget_delta": float(forget.mean()),
            "retain_delta": float(retain.mean()),
            "epsilon": self.epsilon,
        }

    def _score(self, forget: Any, retain: Any) -> Any:
        return np.abs(forget) / np.maximum(np.abs(retain), self.epsilon)
