"""Where the config tree is, and what there is to choose from. Reads the files' first lines only: no YAML, no Hydra."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unpaint.errors import UserError, nearest

_FIRST = ("method", "concept", "model", "evaluator")


def conf_dir() -> Path:
    """The folder of the config tree: the checkout's `conf`, or the copy inside the installed package."""
    package = Path(__file__).resolve().parent
    checkout = package.parents[1]
    if (checkout / "pyproject.toml").is_file() and (checkout / "conf" / "config.yaml").is_file():
        return checkout / "conf"
    return package / "conf"


def own_folder(folder: str) -> Path:
    """The absolute path of a user's own config tree; UserError if it is not there."""
    path = Path(folder).expanduser().absolute()
    if not path.is_dir():
        raise UserError(f"--config-dir {folder}: no such folder")
    return path


@dataclass(frozen=True)
class Option:
    """One choice of a config group; the texts are the file's first comment line and its `# cost:` line."""

    name: str
    description: str
    cost: str


def groups(folders: Sequence[Path]) -> list[str]:
    """Names of the config groups in `folders` (roots of config trees), the ones that make up a run first."""
    found = {folder.name for root in folders for folder in root.iterdir() if folder.is_dir()}
    found = {name for name in found if name != "hydra" and not name.startswith(("_", "."))}
    return sorted(found, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name))


def chosen_by(config: Path) -> set[str]:
    """The groups that the defaults list of a primary config chooses from, which are those that `GROUP=NAME` may set."""
    return set(re.findall(r"^\s+- (\w+):", config.read_text(encoding="utf-8"), flags=re.MULTILINE))


def options(folders: Sequence[Path], group: str) -> list[Option]:
    """What a group offers, by name; where two folders have the same, the first one's. Names with `_` are parts."""
    found: dict[str, Option] = {}
    for root in folders:
        for file in (root / group).rglob("*.yaml"):
            parts = file.relative_to(root / group).with_suffix("").parts
            name = "/".join(parts)
            if name not in found and not any(part.startswith(("_", ".")) for part in parts):
                found[name] = _read(name, file)
    return [found[name] for name in sorted(found)]


def _read(name: str, file: Path) -> Option:
    description = cost = ""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if not line.startswith("#"):
                break
            text = line.lstrip("#").strip()
            if text.startswith("@package"):
                continue
            if text.startswith("cost:"):
                cost = text.removeprefix("cost:").strip()
            elif not description:
                description = text
    return Option(name, description, cost)


def table(folders: Sequence[Path], what: Sequence[str] = ()) -> str:
    """The text of `unpaint ls`: a block for each group in `what` (singular or plural; empty: all groups)."""
    there = groups(folders)
    by_name = {name: group for group in there for name in (group, f"{group}s")}
    for name in what:
        if name not in by_name:
            kinds = ", ".join(map(_plural, there))
            raise UserError(f"ls {name}: no such kind{nearest(name, by_name)}; there are: {kinds}")
    shown = [by_name[name] for name in what] or there
    choosable = chosen_by(folders[0] / "config.yaml")
    return "\n".join(_block(group, options(folders, group), group in choosable) for group in shown)


def _plural(group: str) -> str:
    return f"{group}s"


def _block(group: str, rows: Sequence[Option], choosable: bool) -> str:
    names = max((len(row.name) for row in rows), default=0)
    costs = max((len(row.cost) for row in rows), default=0)
    lines = [_plural(group) + (f"  ({group}=NAME)" if choosable else "")]
    for row in rows:
        cells = [row.name.ljust(names), row.cost.ljust(costs), row.description]
        lines.append("  " + "  ".join(cell for cell in cells if cell).rstrip())
    return "\n".join(lines) + "\n"
