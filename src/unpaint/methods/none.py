"""None: changes nothing. The floor under every other method's numbers: what the measuring itself makes of a model."""

from collections.abc import Iterator

from torch import Tensor
from torch.optim import Optimizer

from unpaint.concepts import AnyConcept
from unpaint.edit import Edit
from unpaint.methods.base import Job, checked_mode


class NoErasing:
    """No steps, and an empty edit; it declares the smallest of the groups that every model has."""

    group = "cross_attention.kv"
    steps = 0
    own = None

    def __init__(self, name: str, mode: str) -> None:
        self.name = name
        self.mode = checked_mode(name, mode)

    def check(self, concept: AnyConcept) -> None:
        """Any concept can be left alone."""

    def begin(self, job: Job) -> None:
        self.job = job

    def optimizers(self) -> list[Optimizer]:
        return []

    def batches(self, start: int) -> Iterator[None]:
        return iter(())

    def step(self, batch: None) -> dict[str, Tensor]:
        return {}

    def finish(self) -> Edit:
        job = self.job
        return Edit.from_change(job.model.pipe, job.base, method=self.name, concept=job.concept.name, config=job.config)
