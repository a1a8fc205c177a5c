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
    concept's words, its axis and the crossed axis. unit: `rate` (0 to 1), `cosine` or `ratio`. cost: in words. parts,
    roles: it looks at the cases of these parts in which some label has one of these roles. reader: None for the
    detector.
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
    def parts(self) -> Sequence[str]: ...
    @property
    def roles(self) -> Sequence[str]: ...
    @property
    def reader(self) -> Reader | None: ...

    def part(self, cases: Sequence[Case], reading: NDArray[Any], detector: Detector) -> NDArray[np.float64]:
        """What one batch contributes, from its cases and the rows (n, ...) that were read from their pictures.

        For cases of the part `neutral` the rows are (n, 2, ...): what was read, with the neutral prompt, from this
        model's picture for the prompt with the concept, and from the unedited model's for the neutral one.
        """
        ...

    def finish(self, edited: Sequence[NDArray[np.float64]], base: Sequence[NDArray[np.float64]]) -> Mapping[str, Any]:
        """value, low, high, n, base and what else the record shall hold, from the parts in the same order.

        Not called if the parts are all empty."""
        ...


def asked(cases: Sequence[Case], metric: Metric) -> list[tuple[int, list[str]]]:
    """(row, labels) of every case that the metric looks at: its labels that have one of the metric's roles."""
    rows = [
        (row, [label for label, role in case.wants.items() if role in metric.roles])
        for row, case in enumerate(cases)
        if case.part in metric.parts
    ]
    return [(row, labels) for row, labels in rows if labels]
