"""RunRecord: what a run did, what it cost and what came out, as `record.json`; and the lock of a run's folder."""

import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from unpaint import __version__
from unpaint.errors import UserError, nearest
from unpaint.files import replacing

SCHEMA = 1
FILE_NAME = "record.json"
STATUSES = ("complete", "failed", "interrupted")
PACKAGES = ("torch", "diffusers", "transformers", "lightning", "hydra-core", "numpy", "safetensors", "torchmetrics")


@dataclass
class RunRecord:
    """One run. The fields are the keys of `record.json`; docs/design.md says what is in cost, metrics, environment.

    started, finished: ISO 8601 with time zone. metrics: name -> {value, low, high, n, base, higher_is_better,
    detector, ...}.
    """

    run_id: str
    status: str
    started: str
    finished: str | None
    method: str
    concept: str
    model: str
    seed: int
    config: dict[str, Any]
    cost: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status is {', '.join(STATUSES)}, not {self.status!r}")

    def save(self, folder: Path) -> Path:
        """Write `record.json` in the folder; whoever reads it sees the old one or the new one, even after a crash."""
        content = asdict(self)
        ordered = {"schema": content.pop("schema"), **content}
        return write_json(folder / FILE_NAME, ordered)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read `record.json`, or that file in a folder. Raises UserError: not there, damaged, of another schema."""
        path = path / FILE_NAME if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"there is no record at '{path}'") from error
        except ValueError as error:
            raise UserError(
                f"the record '{path}' is damaged ({error}); the same run with force=true remakes it"
            ) from error
        if not isinstance(content, dict):
            raise UserError(f"the record '{path}' is damaged (not a JSON object); force=true remakes it")
        if content.get("schema") != SCHEMA:
            raise UserError(
                f"the record '{path}' has schema {content.get('schema')!r}, this unpaint reads schema {SCHEMA}"
            )
        _check_fields(cls, content, path)
        return cls(**content)


def _check_fields(cls: type[RunRecord], content: Mapping[str, Any], path: Path) -> None:
    kinds: dict[str, type | tuple[type, ...]] = {
        "finished": (str, type(None)),
        "seed": int,
        "schema": int,
        **dict.fromkeys(("config", "cost", "metrics", "environment"), dict),
    }
    known = [f.name for f in fields(cls)]
    for key in content:
        if key not in known:
            raise UserError(f"the record '{path}' has an unknown key '{key}'{nearest(key, known)}")
    for key in known:
        if key not in content:
            raise UserError(f"the record '{path}' is damaged: it lacks '{key}'; force=true remakes it")
        if not isinstance(content[key], kinds.get(key, str)):
            raise UserError(f"the record '{path}' is damaged: {key} is {content[key]!r}; force=true remakes it")
    if content["status"] not in STATUSES:
        raise UserError(f"the record '{path}' is damaged: status is {content['status']!r}; force=true remakes it")
    for name, metric in content["metrics"].items():
        if not isinstance(metric, dict) or "value" not in metric:
            raise UserError(f"the record '{path}' is damaged: metric {name} has no value; force=true remakes it")


def write_json(path: Path, content: Any) -> Path:
    """Write beside, flush to the disk, rename. Raises ValueError on NaN, which is no JSON."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path, sync=True) as beside:
        beside.write_text(text, encoding="utf-8")
    return path


# --- environment ----------------------------------------------------------------------------------------------------


def environment(device: str) -> dict[str, Any]:
    """The record's block of that name. Reads package metadata only; `git` is null outside a checkout of unpaint."""
    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "unpaint": __version__,
        "git": _git(),
        "python": platform.python_version(),
        "torch": packages["torch"],
        "device": device,
        "platform": platform.platform(),
        "packages": packages,
    }


def _git() -> dict[str, Any] | None:
    package = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # An unpaint installed in a venv may lie inside somebody else's repository.
    if not git("ls-files", "--error-unmatch", Path(__file__).name):
        return None
    commit = git("rev-parse", "HEAD")
    return {"commit": commit, "dirty": git("status", "--porcelain") != ""} if commit else None


# --- lock -----------------------------------------------------------------------------------------------------------


class RunLock:
    """One process a run folder: `with RunLock(folder): ...`; under several ranks, rank 0 only.

    An flock, so it goes with its process, `kill -9` included. Raises UserError, with the pid, if another holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._file: int | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(handle, 64).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise UserError(
                f"the same run is already going on (process {holder} holds '{self.path}'); wait for it or stop it"
            ) from error
        except BaseException:
            os.close(handle)
            raise
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        self._file = handle
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The file stays: removing it would let a third process lock a new one beside the second's.
        if self._file is not None:
            os.close(self._file)
            self._file = None
