"""The drawn pictures that Picturebook's parts are trained on. Written once, read through a memory map."""

import random
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from rich.progress import track

from unpaint.files import replacing
from unpaint.picturebook.styles import SIZE, draw
from unpaint.picturebook.world import OBJECTS, PAINTABLE, Scene, random_scene

SPLITS = {
    # name: (pictures, objects); "world" trains CLIP, autoencoder and detector, "painted" the denoiser
    "world": (32_000, OBJECTS),
    "painted": (48_000, PAINTABLE),
    "held_out": (4_000, OBJECTS),
}
CHUNK = 1_000


def scenes(split: str, start: int = 0, stop: int | None = None) -> Iterator[Scene]:
    """Scenes of a split, a pure function of its name and the index."""
    count, objects = SPLITS[split]
    for i in range(start, count if stop is None else stop):
        yield random_scene(random.Random(f"picturebook/{split}/{i}"), objects)


def _draw_chunk(job: tuple[str, int, str]) -> None:
    split, start, path = job
    stop = min(start + CHUNK, SPLITS[split][0])
    chunk = np.stack([draw(scene) for scene in scenes(split, start, stop)])
    with replacing(Path(path)) as beside, beside.open("wb") as file:
        np.save(file, chunk)


def draw_split(split: str, folder: Path, workers: int) -> None:
    """Draws what is missing of a split, `CHUNK` pictures a file."""
    folder.mkdir(parents=True, exist_ok=True)
    count = SPLITS[split][0]
    jobs = [(split, i, str(folder / f"{split}-{i:06d}.npy")) for i in range(0, count, CHUNK)]
    missing = [job for job in jobs if not Path(job[2]).exists()]
    if not missing:
        return
    with get_context("spawn").Pool(workers) as pool:
        for _ in track(pool.imap_unordered(_draw_chunk, missing), f"drawing {split}", total=len(missing)):
            pass


class Pictures:
    """The drawn pictures of a split: `take(indices)` is uint8 of shape (n, 64, 64, 3)."""

    def __init__(self, split: str, folder: Path) -> None:
        self.count = SPLITS[split][0]
        files = [folder / f"{split}-{i:06d}.npy" for i in range(0, self.count, CHUNK)]
        self.chunks = [np.load(file, mmap_mode="r") for file in files]

    def take(self, indices: np.ndarray) -> np.ndarray:
        out = np.empty((len(indices), SIZE, SIZE, 3), dtype=np.uint8)
        for row, i in enumerate(indices):
            out[row] = self.chunks[i // CHUNK][i % CHUNK]
        return out
