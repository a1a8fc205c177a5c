"""What else a prompt for the concept asked for: is it still there? Measured by CLIP against the prompt without it.

p is a prompt for the concept, p' the same prompt without it (`Case.neutral`). The edited model answers p, the unedited
model answers p' from the same seed, and CLIP compares both pictures with p'.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unpaint.cases import NEUTRAL, TARGET, Case
from unpaint.errors import UserError
from unpaint.evaluation.detectors import Detector
from unpaint.evaluation.metrics import asked
from unpaint.evaluation.metrics.clip_score import BUILT_IN, ClipCosine
from unpaint.evaluation.stats import mean_summary

SMALLEST = 0.01  # a reference cosine below this is no reference: its pictures are left out


class InPrompt:
    """`score`: mean cosine of the picture for p with p' (the in-prompt CLIP score of Six-CD, Ren et al. 2025, arXiv
    2406.14855). `difference`: CSDR, CLIP score difference rate, mean of |r - s| / r with s that cosine and r that of
    the unedited model's picture for p' (EvalIGMU, Liu et al. 2025, arXiv 2506.02761), as a fraction.

    measure: `score` or `difference`. path: a CLIPModel folder, None for Picturebook's. Bootstrap over pictures.
    """

    parts = (NEUTRAL,)
    roles = (TARGET,)

    def __init__(self, name: str, title: str, cost: str, measure: str, path: str | None = None) -> None:
        self.name = name
        self.title = title
        self.cost = cost
        if measure not in ("score", "difference"):
            raise UserError(f"metric {name}: measure is 'score' or 'difference', not '{measure}'")
        self.difference = measure == "difference"
        self.unit = "rate" if self.difference else "cosine"
        self.higher_is_better = not self.difference
        self.reader = ClipCosine(Path(path) if path else BUILT_IN)

    def part(self, cases: Sequence[Case], reading: NDArray[Any], detector: Detector) -> NDArray[np.float64]:
        """(n, 2) of cosines (n, 2): s and r."""
        return reading[[row for row, _ in asked(cases, self)]].astype(np.float64)

    def finish(self, edited: Sequence[NDArray[np.float64]], base: Sequence[NDArray[np.float64]]) -> Mapping[str, Any]:
        after, before = np.concatenate(edited), np.concatenate(base)
        if not self.difference:
            return mean_summary(after[:, 0], before[:, 0])
        counted = after[:, 1] >= SMALLEST
        if not counted.any():
            return {"value": None, "low": None, "high": None, "n": 0, "base": None}
        rates = [np.abs(side[counted, 1] - side[counted, 0]) / side[counted, 1] for side in (after, before)]
        return mean_summary(*rates)
