"""Files that are there whole or not at all. Imports nothing heavy."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WEIGHTS = Path(__file__).parent / "picturebook" / "weights"


@contextmanager
def replacing(path: Path, sync: bool = False) -> Iterator[Path]:
    """A path beside `path` to write to: renamed over it in the end, removed after an error.

    Whoever reads `path` sees the old file or the new one. `sync` waits until it is on the disk, for what a crash of
    the machine must not take along.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield beside
        if sync:
            _sync(beside)
        os.replace(beside, path)
        if sync:
            _sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
