"""CLIP score: how well a picture fits its prompt (Hessel et al. 2021, arXiv 2104.08718), as the raw cosine."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unpaint.cases import IN_DOMAIN, NEIGHBOUR, RETAIN, Case
from unpaint.evaluation.detectors import Detector
from unpaint.evaluation.metrics import asked
from unpaint.evaluation.pretrained import Clip, Source
from unpaint.evaluation.stats import mean_summary
from unpaint.files import WEIGHTS

BUILT_IN = WEIGHTS / "clip"


class ClipCosine:
    """Cosine of picture and prompt in the space of a transformers CLIPModel (weights, tokenizer, processor).

    path: a folder or a hub id. Loaded at the first `read`. Raises UserError when there is no such model.
    """

    def __init__(self, path: str | Path) -> None:
        self.clip = Clip(Source(path))

    @property
    def identity(self) -> str:
        return f"clip-{self.clip.source.identity}"

    def read(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines (n,), float32, of pictures uint8 (n, 3, H, W) and n prompts; computed on the pictures' device."""
        return (self.clip.see(pictures) * self.clip.read(prompts, pictures.device)).sum(dim=1)


class ClipScore:
    """Mean cosine over the pictures whose prompts do not name the target; bootstrap over pictures.

    path: a CLIPModel folder or a hub id, None for Picturebook's.
    """

    name = "fidelity/clip_score"
    unit = "cosine"
    higher_is_better = True
    parts = (RETAIN,)
    roles = (IN_DOMAIN, NEIGHBOUR)

    def __init__(self, title: str, cost: str, path: str | None = None) -> None:
        self.title = title
        self.cost = cost
        self.reader = ClipCosine(path or BUILT_IN)

    def part(self, cases: Sequence[Case], reading: NDArray[Any], detector: Detector) -> NDArray[np.float64]:
        """The cosines of the pictures that count, of cosines (n,)."""
        return reading[[row for row, _ in asked(cases, self)]].astype(np.float64)

    def finish(
        self, edited: Sequence[NDArray[np.float64]], base: Sequence[NDArray[np.float64]]
    ) -> Mapping[str, float | int]:
        return mean_summary(np.concatenate(edited), np.concatenate(base))
