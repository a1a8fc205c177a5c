"""Errors that are the user's to fix, and how to tell a full disk from a bug. Imports nothing heavy."""

import errno
import os
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path


class UserError(Exception):
    """Something the user can put right.

    The message is one line: what is wrong, what was expected, the nearest valid name. The command line prints it
    without a traceback and exits with 2.
    """


def nearest(name: str, candidates: Iterable[str]) -> str:
    """The hint `"; did you mean X?"`, or an empty string if nothing is close to `name`."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    close = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.55)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""


_FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EEXIST: "there is a file where a folder is needed",
    errno.ENAMETOOLONG: "the path is too long",
    errno.EIO: "the disk reports an input/output error",
}


def environment_fault(error: BaseException) -> str | None:
    """One line that blames the disk or the folder if that is what failed, else None.

    Looks through the chain of causes, and knows how safetensors and torch.save report a failed write.
    """
    for link in _chain(error):
        if line := _fault_of(link):
            return line
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _fault_of(error: BaseException) -> str | None:
    path = None
    code = None
    if isinstance(error, OSError):
        code = error.errno
        path = error.filename2 or error.filename
    elif type(error).__name__ == "SafetensorError" and (match := re.search(r"\(os error (\d+)\)", str(error))):
        code = int(match.group(1))
    elif isinstance(error, RuntimeError) and re.search(
        r"PytorchStreamWriter failed writing|unexpected pos", str(error)
    ):
        return _line("a file could not be written (is the disk full?)", None)
    # Opening a missing file for reading may well be a bug; a missing parent folder means that it went away.
    if code == errno.ENOENT and path is not None and not Path(os.fsdecode(path)).absolute().parent.is_dir():
        return _line("the folder does not exist (any more)", path)
    if code == errno.EEXIST and (path is None or Path(os.fsdecode(path)).is_dir()):
        return None
    return _line(_FAULTS[code], path) if code in _FAULTS else None


def _line(reason: str, path: str | bytes | int | None) -> str:
    where = "" if path is None or isinstance(path, int) else f": {os.fsdecode(path)}"
    return f"{reason}{where} (the disk or folder, not a bug in unpaint); another folder is chosen with outputs=FOLDER"
