"""Metrics: what is read from pictures, to a value with its interval, beside the unedited model's. One file a metric."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unpaint.concepts import Case
from unpaint.evaluation.detectors import Detector


class Reader(Protocol):
    """Something that looks at pictures besides the detector. Its readings are kept on disk under its identity."""

    @property
    def identity(self) -> str: ...

    def read(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """One row a picture, (n, ...), of pictures uint8 (n, 3, H, W) on any device, and the prompts they answer."""
        ...


class Metric(Protocol):
    """A measure. Declares itself, and is two pure functions on arrays: `part` on one batch, `finish` on all.

    name: `group/name`, stable. title: the same in plain words; `{target}`, `{axis}` and `{cross}` stand for the
    concept's words, its axis and the crossed axis. unit: `rate` (0 to 1) or `cosine`. cost: in words. roles: it looks
    at the cases in which some label has one of these roles. reader: None for the detector.
    """

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def higher_is_better(self) -> bool: ...
    @property
    def cost(self) -> str: ...
    @property
    def roles(self) -> Sequence[str]: ...
    @property
    def reader(self) -> Reader | None: ...

    def part(self, cases: Sequence[Case], reading: NDArray[Any], detector: Detector) -> NDArray[np.float64]:
        """What one batch contributes, from its cases and the rows (n, ...) that were read from their pictures."""
        ...

    def finish(
        self, edited: Sequence[NDArray[np.float64]], base: Sequence[NDArray[np.float64]]
    ) -> Mapping[str, float | int]:
        """value, low, high, n, base and what else the record shall hold, from the parts in the same order."""
        ...


def asked(cases: Sequence[Case], roles: Sequence[str]) -> list[tuple[int, str]]:
    """(row, label) of every label that some case wants in one of the roles."""
    return [(row, label) for row, case in enumerate(cases) for label, role in case.wants.items() if role in roles]
