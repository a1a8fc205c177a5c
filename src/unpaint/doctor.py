"""`unpaint doctor`: what is installed, what it can run on, and whether the built-in model is intact."""

import hashlib
import importlib
import json
import platform
import shutil
from importlib import metadata
from pathlib import Path

import unpaint
from unpaint.files import WEIGHTS
from unpaint.listing import conf_dir

CORE = ("torch", "diffusers", "transformers", "hydra-core", "omegaconf", "lightning", "wandb", "torchmetrics")
# package -> (the extra of unpaint that brings it, what it is for)
OPTIONAL = {
    "submitit": ("slurm", "run sweeps on a SLURM cluster"),
    "hydra-submitit-launcher": ("slurm", "run sweeps on a SLURM cluster"),
    "hydra-optuna-sweeper": ("sweep", "search for good settings"),
    "nudenet": ("nsfw", "detect nudity in pictures"),
}


def diagnose() -> tuple[str, bool]:
    """The report, and whether all that every run needs is there."""
    problems: list[str] = []
    sections = [
        ("versions", _versions(problems)),
        ("devices", _devices(problems)),
        ("optional parts", _optional()),
        ("built-in model", _built_in(problems)),
    ]
    lines = []
    for title, rows in sections:
        width = max(len(name) for name, _ in rows)
        lines += [title, *(f"  {name:<{width}}  {text}".rstrip() for name, text in rows), ""]
    lines += [f"problem: {problem}" for problem in problems] or ["All that every run needs is here."]
    return "\n".join(lines) + "\n", not problems


def installed(package: str) -> str | None:
    """The installed version of a package, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions(problems: list[str]) -> list[tuple[str, str]]:
    rows = [("unpaint", f"{unpaint.__version__} from {Path(unpaint.__file__).parent}"), ("configs", str(conf_dir()))]
    rows.append(("python", f"{platform.python_version()} on {platform.platform()}"))
    for package in CORE:
        version = installed(package)
        if version is None:
            problems.append(f"{package} is not installed: pip install {package}")
        rows.append((package, version or "missing"))
    return rows


def _devices(problems: list[str]) -> list[tuple[str, str]]:
    rows = []
    try:
        torch = importlib.import_module("torch")
        rows.append(("cpu", f"{torch.get_num_threads()} threads"))
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            rows.append((f"cuda:{index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB"))
        if not torch.cuda.is_available():
            rows.append(("cuda", "none (the built-in model runs well without)"))
    except ImportError as error:
        problems.append(f"torch does not load: {error}")
    rows.append(("disk", f"{shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB free here"))
    return rows


def _optional() -> list[tuple[str, str]]:
    rows = []
    for package, (extra, purpose) in OPTIONAL.items():
        state = installed(package) or f"not installed; pip install 'unpaint[{extra}]'"
        rows.append((package, f"{state} ({purpose})"))
    return rows


def _built_in(problems: list[str]) -> list[tuple[str, str]]:
    faults, count = damaged(WEIGHTS)
    problems += faults
    return [("picturebook", faults[0] if faults else f"intact, {count} files"), ("folder", str(WEIGHTS))]


def damaged(folder: Path) -> tuple[list[str], int]:
    """What is wrong with a folder of weights, judged by its `provenance.json` (`files`: {path: sha256}), and the number
    of files that it names."""
    try:
        files: dict[str, str] = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return [f"the built-in model is missing: there is no {folder / 'provenance.json'}"], 0
    except (ValueError, KeyError, TypeError) as error:
        return [f"{folder / 'provenance.json'} cannot be read: {error!r}"], 0
    faults = []
    for name, expected in sorted(files.items()):
        path = folder / name
        if not path.is_file():
            faults.append(f"the built-in model lacks {name}")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            faults.append(f"the built-in model's {name} was altered or damaged")
    return faults, len(files)
