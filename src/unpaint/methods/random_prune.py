"""Random pruning: zeroes as many weights as ConceptPrune would, at random: what pruning does without aiming."""

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from unpaint.concepts import AnyConcept
from unpaint.edit import Edit
from unpaint.errors import UserError, nearest
from unpaint.methods.base import Job, checked_mode
from unpaint.model import GROUPS
from unpaint.seeds import seed_of


class RandomPrune:
    """`share` of each matrix of the group `layers` (`TextToImage.group`) becomes zero; the seed alone decides which
    ones."""

    steps = 1
    own = None

    def __init__(self, name: str, layers: str, share: float, mode: str) -> None:
        for part in layers.split("+"):
            if part not in GROUPS:
                raise UserError(f"method.layers is {', '.join(GROUPS)}, not '{part}'{nearest(part, GROUPS)}")
        if not 0 < share <= 1:
            raise UserError(f"method.share is above 0 and at most 1, not {share:g}")
        self.name = name
        self.mode = checked_mode(name, mode, ("joint",))
        self.group = layers
        self.share = share

    def check(self, concept: AnyConcept) -> None:
        """The concept plays no part."""

    def begin(self, job: Job) -> None:
        self.job = job

    def optimizers(self) -> list[Optimizer]:
        return []

    def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        for _ in range(start, self.steps):
            yield self._masks()

    def _masks(self) -> dict[str, Tensor]:
        matrices = {key: weight.shape for key, weight in self.job.base.items() if weight.dim() == 2}
        return {key: random_mask(shape, self.share, self.job.seed, key) for key, shape in matrices.items()}

    def step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            for key, mask in batch.items():
                parameter = self.job.weights[key]
                parameter.masked_fill_(mask.to(parameter.device), 0)
        return {}

    def finish(self) -> Edit:
        job = self.job
        with torch.no_grad():  # an edit of zeros is made of the unedited model
            for key, parameter in job.weights.items():
                parameter.copy_(job.base[key])
        pipe, concept = job.model.pipe, job.concept.name
        return Edit.from_zeros(pipe, self._masks(), method=self.name, concept=concept, config=job.config)


def random_mask(shape: torch.Size, share: float, seed: int, key: str) -> Tensor:
    """A bool mask of `shape` with `share` of its entries True (rounded, at least one), a function of seed and key."""
    generator = torch.Generator().manual_seed(seed_of("tune", seed, zlib.crc32(key.encode())))
    mask = torch.zeros(shape.numel(), dtype=torch.bool)
    mask[torch.randperm(len(mask), generator=generator)[: max(1, round(share * len(mask)))]] = True
    return mask.view(shape)
