"""One tensor in a safetensors file, with a checksum: what the caches under outputs/.cache are made of."""

import hashlib
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unpaint.files import replacing


def write_tensor(path: Path, tensor: Tensor, notes: dict[str, str] | None = None) -> None:
    """Write the tensor, and some notes to be read back with it."""
    tensor = tensor.detach().cpu().contiguous()
    with replacing(path) as beside:
        save_file({"tensor": tensor}, beside, metadata={**(notes or {}), "sha256": _sha256(tensor)})


def read_tensor(path: Path) -> tuple[Tensor, dict[str, str]] | None:
    """The tensor and its notes; None when the file is missing, cut short or altered."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor("tensor")
            notes = file.metadata() or {}
    except (SafetensorError, FileNotFoundError):
        return None
    return (tensor, notes) if notes.get("sha256") == _sha256(tensor) else None


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
