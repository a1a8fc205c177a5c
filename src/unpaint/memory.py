"""How much memory something took at most: of the GPU if one is in use, else of the process."""

import contextlib
import resource
import sys
from pathlib import Path

_PROCESS = Path("/proc/self")


def forget_peak() -> None:
    """From here on `peak` counts anew. On systems other than Linux a process knows its own peak from its start only."""
    import torch

    if _on_gpu():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")


def peak() -> int:
    """Bytes, at most, since `forget_peak`."""
    import torch

    if _on_gpu():
        return int(torch.cuda.max_memory_allocated())
    try:
        status = (_PROCESS / "status").read_text()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_initialized()
