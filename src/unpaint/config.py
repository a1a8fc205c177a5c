"""The config tree: where it is, composing it, the objects that it describes, and what it hashes to.

Importing this module costs Hydra, not torch.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import version as hydra_version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.utils import setup_globals
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

import unpaint
from unpaint.errors import UserError
from unpaint.files import WEIGHTS
from unpaint.listing import conf_dir

ALLOWED_TARGETS = ("unpaint", "torch.optim", "lightning", "torchmetrics", "transformers", "diffusers")
HYDRA_VERSION_BASE = "1.3"
# What a model is called here and where it lies says nothing about the pictures that it paints.
_NOT_IDENTITY = ("path", "hub")


@dataclass(frozen=True)
class ConfTree:
    """Where configs come from: a root, the primary config's name, and a folder of the user's own configs."""

    root: Path
    name: str = "config"
    extra: Path | None = None

    @classmethod
    def default(cls) -> "ConfTree":
        return cls(conf_dir())

    @property
    def folders(self) -> list[Path]:
        return [self.root] if self.extra is None else [self.root, self.extra]

    def loader(self) -> ConfigLoaderImpl:
        hydra_version.setbase(HYDRA_VERSION_BASE)
        setup_globals()
        search_path = create_config_search_path(str(self.root))
        if self.extra is not None:
            search_path.prepend("command-line", f"file://{self.extra.absolute()}", SearchPathQuery(provider="schema"))
        return ConfigLoaderImpl(search_path)


def compose(overrides: Sequence[str] = (), tree: ConfTree | None = None) -> DictConfig:
    """The config of one run, as `unpaint run <overrides>` would see it, without Hydra's own node.

    Leaves Hydra's global state alone, so it can be called anywhere. Raises UserError where Hydra refuses.
    """
    cfg = load(overrides, tree or ConfTree.default())
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def load(overrides: Sequence[str], tree: ConfTree) -> DictConfig:
    """The config of one run with Hydra's own node. Raises UserError where Hydra refuses."""
    with refusals():
        return tree.loader().load_configuration(tree.name, list(overrides), run_mode=RunMode.RUN)


@contextmanager
def refusals() -> Iterator[None]:
    """What Hydra and OmegaConf refuse, as UserError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    """What Hydra or OmegaConf says is wrong, in one line, without where it looked."""
    parts = [str(error)] + ([str(error.__cause__)] if error.__cause__ is not None else [])
    lines = [line.strip() for part in parts for line in part.partition("Config search path:")[0].splitlines()]
    kept = [line for line in lines if line and not line.startswith(("full_key:", "object_type=", "See https"))]
    text = " ".join(dict.fromkeys(kept)) or type(error).__name__
    for plugin, extra in (("submitit", "slurm"), ("optuna", "sweep")):
        if re.search(rf"Could not find 'hydra/\w+/{plugin}", text):
            return f"this needs an optional part of unpaint: pip install 'unpaint[{extra}]' ({text})"
    return text


def _gpus(accelerator: str, devices: Any) -> Any:
    """What a job asks for on each node: as many GPUs as processes, or none."""
    return devices if accelerator in ("gpu", "cuda") else None


OmegaConf.register_new_resolver("unpaint.gpus", _gpus, replace=True)


def quoted(text: str) -> str:
    """A text as a value in Hydra's override grammar, whatever is in it."""
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", text) + "'"


def model_folder(model: DictConfig) -> Path | None:
    """The local folder of a model config: its `path`, or the package's own weights; None if it comes from the hub."""
    if model.get("path"):
        return Path(str(model.path)).expanduser()
    return None if model.get("hub") else WEIGHTS


# --- objects


def instantiate(node: DictConfig | Mapping[str, Any], plugins: Iterable[str] = ()) -> Any:
    """Make the object that a config node describes: the one place where configs turn into code.

    `_target_` must lie in one of `ALLOWED_TARGETS` or in one of `plugins` (package names), and so must the module that
    defines what it names, so that `unpaint.some_module.os.system` is refused. Raises UserError for that, for a class
    that does not exist, and for arguments that the class does not take.
    """
    import hydra.utils

    plain = _container(node)
    plugins = tuple(plugins)
    for target in targets_in(plain):
        check_target(target, plugins)
        try:
            found = hydra.utils.get_object(target)
        except (ImportError, InstantiationException, ValueError) as error:
            raise UserError(f"_target_: {target} cannot be imported: {one_line(error)}") from error
        home = getattr(found, "__module__", None) or ""
        if not _allowed(home, plugins):
            raise UserError(f"_target_: {target} is defined in {home or 'no module'}, outside {_packages(plugins)}")
    try:
        return hydra.utils.instantiate(plain, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, TypeError) and _refused_by_call(cause):
            raise UserError(f"{plain.get('_target_')} does not fit its config: {cause}") from error
        raise


def _refused_by_call(error: TypeError) -> bool:
    """Whether Python refused the arguments, rather than something inside the constructor."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("hydra.")


def _container(node: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    plain = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def targets_in(plain: Any) -> Iterator[str]:
    """Every `_target_` in nested plain containers."""
    if isinstance(plain, Mapping):
        if "_target_" in plain:
            yield str(plain["_target_"])
        for value in plain.values():
            yield from targets_in(value)
    elif isinstance(plain, list | tuple):
        for value in plain:
            yield from targets_in(value)


def _allowed(name: str, plugins: Iterable[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in (*ALLOWED_TARGETS, *plugins))


def _packages(plugins: Iterable[str]) -> str:
    return ", ".join((*ALLOWED_TARGETS, *plugins))


def check_target(target: str, plugins: Iterable[str]) -> None:
    """Raises UserError for a `_target_` outside `ALLOWED_TARGETS` and the plugins. Imports nothing."""
    if not _allowed(target, plugins):
        package = target.partition(".")[0]
        raise UserError(
            f"_target_: {target} is outside {_packages(plugins)}; if you trust it, add the package: plugins=[{package}]"
        )


def part_of(cfg: DictConfig) -> slice | None:
    """Which of the batches the share `cfg.part` is, None for all. Raises UserError for what is no share."""
    if not cfg.part:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", str(cfg.part))
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"part={cfg.part}: expected a share like 1/8, the first of eight, to 8/8")
    return slice(int(found[1]) - 1, None, int(found[2]))


def starts_over(cfg: DictConfig) -> bool:
    """Whether `cfg.force` is to be obeyed. Not by a job that SLURM starts once more, with the same command: it goes on
    with what it did before its time was up."""
    return bool(cfg.force) and os.environ.get("SLURM_RESTART_COUNT", "0") == "0"


# --- identity


def identity(cfg: DictConfig) -> dict[str, Any]:
    """What an edit's header holds of the config: resolved model, concept, method and seed; no path and no hub. Of a
    folder that a method is given, an aligner's CLIP, say, the name alone."""
    plain = _plain({part: cfg[part] for part in ("model", "concept", "method", "seed")})
    plain["model"] = {key: value for key, value in plain["model"].items() if key not in _NOT_IDENTITY}
    plain["method"] = _with_paths(plain["method"], lambda path: path.name)
    return plain


def edit_id(cfg: DictConfig) -> str:
    """12 hex digits that name the edit a config makes: model (with path and hub), concept, method, seed, version."""
    return _digest(_edit_key(cfg))


def run_id(cfg: DictConfig) -> str:
    """12 hex digits that name a run: what `edit_id` hashes, the evaluator, and the bytes of `edit` if one is given."""
    key = _edit_key(cfg) | {"evaluator": _plain(cfg.evaluator)}
    if cfg.get("edit"):
        key["edit"] = hashlib.sha256(Path(str(cfg.edit)).expanduser().read_bytes()).hexdigest()
    return _digest(key)


def run_folder(cfg: DictConfig) -> Path:
    """`<outputs>/<model>/<concept>/<method>/<run_id>`, a function of the config alone."""
    names = [re.sub(r"[^\w.+-]+", "_", str(cfg[part].name)) for part in ("model", "concept", "method")]
    return Path(str(cfg.outputs)).expanduser().joinpath(*names, run_id(cfg))


def adopt_edit(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Take concept, method and seed from the header of `cfg.edit`, except what `overrides` set (changes `cfg`).

    An edit file is data from anywhere, so its classes must be unpaint's own or a plugin's.
    """
    from unpaint.edit_header import read_header

    # `concept@evaluator.control=...` chooses another concept than the one that was erased.
    own = [line for line in overrides if "@" not in line.partition("=")[0]]
    told = {re.split(r"[.=]", line.lstrip("+~"), maxsplit=1)[0] for line in own}
    header = read_header(Path(str(cfg.edit)).expanduser())
    # An edit that no run made, with a config or without, is still not the default method's.
    config = {"method": {"name": header["method"]}} | header["config"]
    for part in ("concept", "method", "seed"):
        if part in told or part not in config:
            continue
        for target in targets_in(config[part]):
            if target.partition(".")[0] not in ("unpaint", *(cfg.get("plugins") or ())):
                raise UserError(f"edit={cfg.edit}: its header names {target}, which is not unpaint's; give {part}=NAME")
        with open_dict(cfg):
            cfg[part] = config[part]


def _edit_key(cfg: DictConfig) -> dict[str, Any]:
    where = {key: cfg.model.get(key) for key in ("path", "hub")}
    if where["path"]:
        where["path"] = str(Path(str(where["path"])).expanduser().resolve())
    method = _with_paths(_plain(cfg.method), str)
    return identity(cfg) | {"method": method, "where": where, "version": unpaint.__version__}


def _with_paths(value: Any, told: Callable[[Path], str]) -> Any:
    """A method's plain config, with what is told of each `path` in it that is on disk; a hub id stays as it is."""
    if not isinstance(value, dict):
        return value
    files = {key: Path(item).expanduser() for key, item in value.items() if key == "path" and isinstance(item, str)}
    found = {key: told(file.resolve()) for key, file in files.items() if file.exists()}
    return {key: found.get(key, _with_paths(item, told)) for key, item in value.items()}


def _plain(value: Any) -> Any:
    """Plain data with 2.0 written as 2, so that a float option given as a whole number is the same option."""
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
