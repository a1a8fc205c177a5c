"""Progress bars for all long work, on rank 0 only."""

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_OPEN: list[Progress] = []


def bar(description: str, total: int, done: int = 0, show: bool = True) -> Callable[[int], None]:
    """Opens a bar and returns its advance function; the bar closes by itself when `total` is reached."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not show)
    task = progress.add_task(description, total=total, completed=done)
    progress.start()
    _OPEN.append(progress)

    def advance(n: int) -> None:
        progress.advance(task, n)
        if progress.finished and progress in _OPEN:
            progress.stop()
            _OPEN.remove(progress)

    if done >= total:
        advance(0)
    return advance


def close_all() -> None:
    """Closes what an error or Ctrl-C left open, so that nothing goes on drawing over the message."""
    while _OPEN:
        _OPEN.pop().stop()
