"""Painted pictures and what was read from them, kept on disk batch by batch. Imports no torch before a tensor is read.

A batch is the unit of painting, resuming and sharding: the same prompts and seeds always run through the network
together, so neither a resumed run nor the number of ranks changes a bit of a picture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from unpaint.cases import NEUTRAL, Case

if TYPE_CHECKING:
    from torch import Tensor

    from unpaint.model import TextToImage
    from unpaint.sampling import Sampler


@dataclass(frozen=True)
class Batch:
    """Cases that are painted together, all of one part. `name` is a hash of prompts, seeds, sampler and batch size.

    `answers`: for neutral prompts, which only the unedited model paints, the batch of the same questions with the
    concept in them, which both models paint.
    """

    cases: tuple[Case, ...]
    name: str
    sampler: Sampler
    answers: Batch | None = None

    @property
    def prompts(self) -> list[str]:
        return [case.prompt for case in self.cases]

    @property
    def seeds(self) -> list[int]:
        return [case.seed for case in self.cases]


def batches_of(cases: Sequence[Case], size: int, sampler: Sampler) -> list[Batch]:
    """Cut cases into batches of at most `size`, none of which spans two groups or two values of guidance.

    A batch's name depends on nothing outside it, so concepts that ask for the same label share its batches.
    """
    batches = []
    groups: dict[tuple[str, float | None], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.group, case.guidance), []).append(case)
    for (_, guidance), members in groups.items():
        own = sampler if guidance is None else replace(sampler, guidance=guidance)
        batches += [_batch(members[start : start + size], size, own) for start in range(0, len(members), size)]
    return batches


def neutral(batch: Batch, size: int) -> Batch:
    """The batch's prompts without the concept, from the same seeds."""
    cases = [replace(case, prompt=case.neutral, group=f"{case.group} neutral", part=NEUTRAL) for case in batch.cases]
    return replace(_batch(cases, size, batch.sampler), answers=batch)


def _batch(cases: Sequence[Case], size: int, sampler: Sampler) -> Batch:
    content = [[case.prompt for case in cases], [case.seed for case in cases], asdict(sampler), size]
    text = json.dumps(content, sort_keys=True)
    return Batch(tuple(cases), hashlib.sha256(text.encode()).hexdigest()[:16], sampler)


def picture_key(model: TextToImage, edit: str | None = None) -> str:
    """The store's key for what this model paints, unedited or with the edit of that id.

    Scheduler, device and dtype count: a GPU's picture must not stand in for a CPU's.
    """
    scheduler = {name: str(value) for name, value in model.scheduler_config.items() if not name.startswith("_")}
    content = [model.fingerprint, scheduler, model.device.type, str(model.dtype)]
    base = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    return base if edit is None else f"{base}-{edit}"


class PictureStore:
    """Files under `folder`: `pictures/<key>/<batch>.safetensors` and `readings/<key>/<reader>/<batch>.safetensors`.

    A key names the weights that painted, see `picture_key`. Several processes may
    write at once; a reader sees a whole file or none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def pictures(self, key: str, batch: Batch) -> Tensor | None:
        """The batch's pictures, uint8 (n, 3, H, W); None if not painted yet or damaged."""
        return self._read(self._picture_file(key, batch), batch)

    def keep_pictures(self, key: str, batch: Batch, pictures: Tensor) -> None:
        from unpaint.tensor_file import write_tensor

        write_tensor(self._picture_file(key, batch), pictures)

    def reading(self, key: str, reader: str, batch: Batch) -> Tensor | None:
        """What a reader (a detector, a CLIP) said of the batch's pictures, (n, ...); None if not there or damaged."""
        return self._read(self._reading_file(key, reader, batch), batch)

    def keep_reading(self, key: str, reader: str, batch: Batch, reading: Tensor) -> None:
        from unpaint.tensor_file import write_tensor

        write_tensor(self._reading_file(key, reader, batch), reading)

    def _read(self, path: Path, batch: Batch) -> Tensor | None:
        from unpaint.tensor_file import read_tensor

        found = read_tensor(path)
        return found[0] if found is not None and len(found[0]) == len(batch.cases) else None

    def _picture_file(self, key: str, batch: Batch) -> Path:
        return self.folder / "pictures" / key / f"{batch.name}.safetensors"

    def _reading_file(self, key: str, reader: str, batch: Batch) -> Path:
        return self.folder / "readings" / key / reader / f"{batch.name}.safetensors"


def folder_identity(folder: Path) -> str:
    """12 hex digits over names and contents of the files of a model folder that can change its answers."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*")):
        if file.suffix in (".json", ".safetensors", ".txt"):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers in here: a judge loads in a moment, and in the middle of our own bar."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()
