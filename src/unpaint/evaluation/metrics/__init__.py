"""Metrics: what is read from pictures, to a value with its interval, beside the unedited model's. One file a metric."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unpaint.cases import Case
from unpaint.evaluation.detectors import Detector


class Reader(Protocol):
    """Something that looks at pictures besides the detector. Its readings are kept on disk under its identity."""

    @property
    def identity(self) -> str: ...

    def read(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """One row a picture, (n, ...), of pictures uint8 (n, 3, H, W) on any device, and the prompts they answer."""
        ...


@runtime_checkable
class PairReader(Protocol):
    """Something that looks at a picture and at the unedited model's of the same prompt and seed, side by side."""

    @property
    def identity(self) -> str: ...

    def compare(self, pictures: Tensor, unedited: Tensor) -> Tensor:
        """One row a pair, (n, ...), of pictures uint8 (n, 3, H, W) on any device."""
        ...


Parts = Sequence[NDArray[np.float64]]


class Declared(Protocol):
    """What every metric says of itself, and what it takes from one batch.

    name: `group/name`, stable. title: the same in plain words; `{target}`, `{axis}` and `{cross}` stand for the
    concept's words, its axis and the crossed axis. unit: `rate` (0 to 1), `cosine`, `ratio` or `distance`. cost: in
    words. parts, roles: it looks at the cases of these parts in which some label has one of these roles. reader: None
    for the detector.
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
    def reader(self) -> Reader | PairReader | None: ...

    def part(self, cases: Sequence[Case], reading: NDArray[Any], detector: Detector) -> NDArray[np.float64]:
        """What one batch contributes, from its cases and the rows (n, ...) that were read from their pictures.

        For cases of the part `neutral` the rows are (n, 2, ...): what was read, with the neutral prompt, from this
        model's picture for the prompt with the concept, and from the unedited model's for the neutral one.
        """
        ...


class Metric(Declared, Protocol):
    """A measure: two pure functions on arrays, `part` on one batch and `finish` on all.

    The parts of `finish` come from disk, one batch each time one is asked for: memory need not grow with pictures.
    """

    def finish(self, edited: Parts, base: Parts) -> Mapping[str, Any]:
        """value, low, high, n, base and what else the record shall hold, from the parts in the same order.

        Not called if the parts are all empty."""
        ...


@runtime_checkable
class ReferenceMetric(Declared, Protocol):
    """A measure against further pictures, which only the unedited model paints (from other seeds)."""

    def reference(self, cases: Sequence[Case]) -> list[Case]:
        """What is painted for it, a pure function of the cases of the plan that it looks at, in the plan's order."""
        ...

    def finish(self, edited: Parts, base: Parts, reference: Parts) -> Mapping[str, Any]:
        """As in `Metric`; `reference` are the parts of `batches_of(reference(cases))`."""
        ...


def asked(cases: Sequence[Case], metric: Declared) -> list[tuple[int, list[str]]]:
    """(row, labels) of every case that the metric looks at: its labels that have one of the metric's roles."""
    rows = [
        (row, [label for label, role in case.wants.items() if role in metric.roles])
        for row, case in enumerate(cases)
        if case.part in metric.parts
    ]
    return [(row, labels) for row, labels in rows if labels]
