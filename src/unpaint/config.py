"""The config tree: where it is, composing it, checking it before anything heavy is loaded, and what it hashes to.

Importing this module costs Hydra, not torch.
"""

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import version as hydra_version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.utils import setup_globals
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf._utils import split_key
from omegaconf.errors import OmegaConfBaseException

import unpaint
from unpaint.errors import UserError, nearest
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
    cfg = _load(overrides, tree or ConfTree.default())
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def _load(overrides: Sequence[str], tree: ConfTree) -> DictConfig:
    with refusals():
        return tree.loader().load_configuration(tree.name, list(overrides), run_mode=RunMode.RUN)


@contextmanager
def refusals() -> Iterator[None]:
    """What Hydra and OmegaConf refuse, as UserError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error)) from error


def _one_line(error: BaseException) -> str:
    parts = [str(error)] + ([str(error.__cause__)] if error.__cause__ is not None else [])
    lines = [line.strip() for part in parts for line in part.partition("Config search path:")[0].splitlines()]
    kept = [line for line in lines if line and not line.startswith(("full_key:", "object_type=", "See https"))]
    text = " ".join(dict.fromkeys(kept)) or type(error).__name__
    for plugin, extra in (("submitit", "slurm"), ("optuna", "sweep")):
        if re.search(rf"Could not find 'hydra/\w+/{plugin}", text):
            return f"this needs an optional part of unpaint: pip install 'unpaint[{extra}]' ({text})"
    return text


# --- checking


@dataclass(frozen=True)
class Checked:
    """What a command line asks for: whether many jobs, below which folder sweeps keep theirs, and whether its sweeper
    chooses the jobs by what they come to."""

    multirun: bool
    sweep_root: Path
    optimises: bool


def check(
    overrides: Sequence[str], command: str | None = None, tree: ConfTree | None = None, multirun: bool = False
) -> Checked:
    """Refuse a bad command line before torch is imported.

    Composes the config for every value that a discrete sweep takes (each value once, not every combination).
    `command` is run, erase or evaluate; None checks only that the config composes.

    Raises UserError: an option that a group does not have, an unknown key, a value of another type than the default
    that it replaces, a class outside the allowed packages, an unwritable `outputs`, a model folder that does not exist,
    an edit file that is damaged or was made for another model, jobs of several processes in a sweep without a cluster.
    """
    tree = tree or ConfTree.default()
    parsed = _parse(overrides, tree)
    choices = [_values(override, tree) for override in parsed]
    first = [lines[0] for lines in choices]
    loaded: dict[tuple[str, ...], DictConfig] = {}
    cfg = _check_one(first, command, tree, loaded)
    multirun = multirun or cfg.hydra.mode == RunMode.MULTIRUN
    swept = [override.input_line for override in parsed if override.is_sweep_override()]
    if swept and not multirun:
        raise UserError(f"{swept[0]} is a sweep: add -m to run all its values")
    if command and multirun:
        _check_ranks(cfg, cfg)
    for position, lines in enumerate(choices):
        for line in lines[1:]:
            other = _check_one([*first[:position], line, *first[position + 1 :]], command, tree, loaded)
            if command and multirun:
                _check_ranks(other, cfg)
    with _as_hydra_config(cfg):
        root = Path(str(cfg.hydra.sweep.dir))
    return Checked(multirun, root, "optuna" in str(cfg.hydra.sweeper.get("_target_")))


def _parse(overrides: Sequence[str], tree: ConfTree) -> list[Override]:
    parser = OverridesParser.create(config_loader=tree.loader())
    parsed = []
    for line in overrides:
        try:
            parsed += parser.parse_overrides([line])
        except HydraException as error:
            raise UserError(f"{line}: expected key=value, +key=value or ~key ({_one_line(error)})") from error
    return parsed


def _values(override: Override, tree: ConfTree) -> list[str]:
    """The override as plain `key=value` lines, one for each value that it sweeps over."""
    line = str(override.input_line)
    if not override.is_sweep_override() or override.is_hydra_override():
        return [line]
    if override.is_discrete_sweep():
        lines = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if not lines:
            raise UserError(f"{line}: matches nothing; there are: {_listed(_options(override.key_or_group, tree))}")
        return lines
    interval = override.value()
    assert isinstance(interval, IntervalSweep)
    return [f"{override.get_key_element()}={end}" for end in (interval.start, interval.end)]


def _options(group: str, tree: ConfTree) -> list[str]:
    options = tree.loader().get_group_options(group, results_filter=ObjectType.CONFIG)
    return sorted(option for option in options if not option.startswith("_"))


def _listed(names: Iterable[str], most: int = 40) -> str:
    every = [str(name) for name in names]
    return ", ".join(every[:most]) + (", ..." if len(every) > most else "")


def _check_one(
    lines: list[str], command: str | None, tree: ConfTree, loaded: dict[tuple[str, ...], DictConfig]
) -> DictConfig:
    """Check one job; `loaded` remembers configs by their group choices. Returns the config, with Hydra's own node."""
    with refusals():
        overrides, repository = tree.loader()._parse_overrides_and_create_caching_repo(tree.name, lines)
    groups, values = [], []
    for override in overrides:
        if override.is_hydra_override():
            groups.append(str(override.input_line))
        elif repository.group_exists(override.key_or_group):
            options = repository.get_group_options(override.key_or_group, results_filter=ObjectType.CONFIG)
            _check_choice(override, sorted(options), repository.config_exists)
            groups.append(str(override.input_line))
        else:
            values.append(override)
    if (key := tuple(groups)) not in loaded:
        loaded[key] = _load(groups, tree)
    cfg = copy.deepcopy(loaded[key])
    defaults = OmegaConf.to_container(cfg)
    assert isinstance(defaults, dict)
    for override in values:
        _check_value(override, defaults)
    with refusals():
        # As Hydra does it; composing everything again would take as long as the rest of the check.
        ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
    _check_whole(cfg, command)
    return cfg


def _check_ranks(cfg: DictConfig, first: DictConfig) -> None:
    """Whether a job of a sweep can have the processes that its trainer wants. `first`: the sweep's first job, whose
    trainer the launcher's request is derived from."""
    trainer = cfg.trainer
    devices = trainer.devices
    if str(cfg.hydra.launcher._target_).endswith("BasicLauncher"):
        if devices not in (1, "1") or trainer.num_nodes != 1:
            raise UserError(
                f"trainer.devices={devices}, trainer.num_nodes={trainer.num_nodes} in a sweep: the processes that "
                "Lightning starts would run the whole sweep again; cluster=local gives each job processes of its own "
                "on this machine, cluster=slurm on a cluster; or one device a job: trainer.devices=1"
            )
        return
    if not isinstance(devices, int) or devices < 1:
        raise UserError(f"trainer.devices={devices}: with cluster=NAME it is a number, the processes of a node")
    if "slurm" in str(cfg.hydra.launcher._target_).lower() and trainer.accelerator == "auto":
        raise UserError(
            "trainer.accelerator=auto: with cluster=slurm it decides whether GPUs are asked for; say trainer=gpu, "
            "trainer=cpu or trainer.accelerator=gpu"
        )
    for key in ("devices", "num_nodes", "accelerator"):
        if trainer[key] != first.trainer[key]:
            raise UserError(
                f"trainer.{key} is {first.trainer[key]} and {trainer[key]} in one sweep: the jobs that a launcher "
                "submits are all of one size; make it two sweeps"
            )


def _gpus(accelerator: str, devices: Any) -> Any:
    """What a job asks for on each node: as many GPUs as processes, or none."""
    return devices if accelerator in ("gpu", "cuda") else None


OmegaConf.register_new_resolver("unpaint.gpus", _gpus, replace=True)


def quoted(text: str) -> str:
    """A text as a value in Hydra's override grammar, whatever is in it."""
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", text) + "'"


def _check_choice(override: Override, options: list[str], exists: Any) -> None:
    group, value = override.key_or_group, override.value()
    for name in value if isinstance(value, list) else [value]:
        if name is None or exists(f"{group}/{name}"):
            continue
        line = override.input_line
        shown = [option for option in options if not option.startswith("_")]
        is_folder = Path(str(name)).expanduser().is_dir()
        if group == "model" and (is_folder or os.sep in str(name)):
            if is_folder:
                raise UserError(f"{line}: a folder is given as model.path; try: model=sd15 model.path={name}")
            raise UserError(
                f"{line}: no such folder, and no such model config; there are: {_listed(shown)} "
                "(a diffusers folder is given as model.path=FOLDER)"
            )
        raise UserError(f"{line}: no such {group}{nearest(str(name), shown)}; there are: {_listed(shown)}")


def _check_value(override: Override, defaults: dict[Any, Any]) -> None:
    # What is deleted or added has no default to be compared with; Hydra refuses what cannot be done.
    if override.is_delete() or override.is_add() or override.is_force_add():
        return
    line = str(override.input_line)
    if override.package is not None:
        groups = [key for key, value in defaults.items() if isinstance(value, dict)]
        raise UserError(f"{line}: there is no config group {override.key_or_group}{nearest(line, groups)}")
    node: Any = defaults
    path: list[str] = []
    for part in split_key(override.key_or_group):
        where = ".".join(path) or "the config"
        if isinstance(node, dict):
            keys = [str(key) for key in node if not str(key).startswith("_") and (path or key != "hydra")]
            if part not in node:
                raise UserError(f"{line}: {where} has no key {part}{nearest(part, keys)}; it has: {_listed(keys)}")
            node = node[part]
        elif isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(f"{line}: {where} is a list of {len(node)}, and {part} is not a position in it")
            node = node[int(part)]
        else:
            raise UserError(f"{line}: {where} is a value, not a section")
        path.append(part)
    # Lightning takes unions (devices=2|auto|[0,1]) and checks them itself.
    if path[0] != "trainer" and (expected := _mismatch(node, override.value())) is not None:
        raise UserError(f"{line}: expected {expected}, like the default {_shown(node)}")


def _mismatch(default: Any, value: Any) -> str | None:
    """What was expected, or None if `value` may replace `default`."""
    if default is None or (isinstance(default, str) and default.startswith(("${", "???"))):
        return None
    if isinstance(value, str) and value.startswith("${"):
        return None
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int):
        return None if isinstance(value, int) and not isinstance(value, bool) else "a whole number"
    if isinstance(default, float):
        return None if isinstance(value, int | float) and not isinstance(value, bool) else "a number"
    if isinstance(default, str):
        return "a text" if isinstance(value, dict | list) else None
    if isinstance(default, list):
        return None if isinstance(value, list) else "a list, [a,b]"
    return None if isinstance(value, dict) or value is None else "a section, {key: value}"


def _shown(default: Any) -> str:
    text = json.dumps(default, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_whole(cfg: DictConfig, command: str | None) -> None:
    with _as_hydra_config(cfg):
        job = copy.deepcopy(cfg)
        with open_dict(job):
            del job["hydra"]
        with refusals():
            missing = sorted(OmegaConf.missing_keys(job))
            plain = OmegaConf.to_container(job, resolve=True)
    if missing:
        raise UserError(f"{missing[0]} has no default: give it as {missing[0]}=VALUE")
    assert isinstance(plain, dict)
    whole = OmegaConf.create(plain)
    for target in _targets(plain):
        _check_target(target, whole.get("plugins") or ())
    if command is None:
        return
    _check_outputs(str(whole.outputs))
    if command == "evaluate" and not whole.get("edit"):
        raise UserError("evaluate needs an edit file: unpaint evaluate edit=outputs/.../edit.safetensors")
    if command != "evaluate" and whole.get("edit"):
        raise UserError(f"edit={whole.edit}: {command} makes its own edit; to measure a finished one: unpaint evaluate")
    if command == "erase" and whole.part:
        raise UserError(f"part={whole.part}: a share of an evaluation's pictures; erase makes none")
    part_of(whole)
    if str(whole.concept.get("_target_")).startswith("unpaint.concepts."):
        concept = instantiate(whole.concept)  # pure data: it says at once if it contradicts itself
        if command != "erase" or whole.probes:
            _check_labels(concept, whole.evaluator.get("detector"))
    _check_model(whole.model)
    if whole.get("edit"):
        _check_edit(Path(str(whole.edit)).expanduser(), whole.model)


@contextmanager
def _as_hydra_config(cfg: DictConfig) -> Iterator[None]:
    # Configs may refer to ${hydra:...}, which reads a singleton.
    singleton = HydraConfig.instance()
    before = singleton.cfg
    singleton.set_config(cfg)
    try:
        yield
    finally:
        singleton.cfg = before


def _check_outputs(outputs: str) -> None:
    folder = Path(outputs).expanduser().absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir():
        raise UserError(f"outputs={outputs}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"outputs={outputs}: no permission to write in {there}")


def model_folder(model: DictConfig) -> Path | None:
    """The local folder of a model config: its `path`, or the package's own weights; None if it comes from the hub."""
    if model.get("path"):
        return Path(str(model.path)).expanduser()
    return None if model.get("hub") else WEIGHTS


def _check_labels(concept: Any, detector: DictConfig | None) -> None:
    """Whether Picturebook's detector knows what is counted; other detectors are asked by the evaluator."""
    if detector is None or detector.get("_target_") != "unpaint.evaluation.detectors.picturebook.PicturebookDetector":
        return
    folder = Path(str(detector.path)).expanduser() if detector.get("path") else WEIGHTS / "detector"
    try:
        known = list(json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"].values())
    except (OSError, ValueError, KeyError):
        return  # the detector itself says what is wrong with its folder
    for label in concept.counted_labels():
        if label not in known:
            raise UserError(
                f"concept '{concept.name}': Picturebook's detector does not know '{label}'{nearest(label, known)}; "
                "another: detector@evaluator.detector=NAME"
            )


def _check_model(model: DictConfig) -> None:
    folder = model_folder(model)
    if folder is None or not model.get("path"):
        return
    if not folder.is_dir():
        raise UserError(f"model.path={model.path}: no such folder")
    if not (folder / "model_index.json").is_file():
        raise UserError(f"model.path={model.path}: not a diffusers model (it has no model_index.json)")


def _check_edit(file: Path, model: DictConfig) -> None:
    from unpaint.edit_header import base_mismatch, read_header

    header = read_header(file)
    folder = model_folder(model)
    if folder is not None and (mismatch := base_mismatch(header, folder)) is not None:
        raise UserError(f"edit={file}: {mismatch}")


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
    for target in _targets(plain):
        _check_target(target, plugins)
        try:
            found = hydra.utils.get_object(target)
        except (ImportError, InstantiationException, ValueError) as error:
            raise UserError(f"_target_: {target} cannot be imported: {_one_line(error)}") from error
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


def _targets(plain: Any) -> Iterator[str]:
    if isinstance(plain, Mapping):
        if "_target_" in plain:
            yield str(plain["_target_"])
        for value in plain.values():
            yield from _targets(value)
    elif isinstance(plain, list | tuple):
        for value in plain:
            yield from _targets(value)


def _allowed(name: str, plugins: Iterable[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in (*ALLOWED_TARGETS, *plugins))


def _packages(plugins: Iterable[str]) -> str:
    return ", ".join((*ALLOWED_TARGETS, *plugins))


def _check_target(target: str, plugins: Iterable[str]) -> None:
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
    """What an edit's header holds of the config: resolved model, concept, method and seed; no path and no hub."""
    plain = _plain({part: cfg[part] for part in ("model", "concept", "method", "seed")})
    plain["model"] = {key: value for key, value in plain["model"].items() if key not in _NOT_IDENTITY}
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
        for target in _targets(config[part]):
            if target.partition(".")[0] not in ("unpaint", *(cfg.get("plugins") or ())):
                raise UserError(f"edit={cfg.edit}: its header names {target}, which is not unpaint's; give {part}=NAME")
        with open_dict(cfg):
            cfg[part] = config[part]


def _edit_key(cfg: DictConfig) -> dict[str, Any]:
    where = {key: cfg.model.get(key) for key in ("path", "hub")}
    if where["path"]:
        where["path"] = str(Path(str(where["path"])).expanduser().resolve())
    return identity(cfg) | {"where": where, "version": unpaint.__version__}


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
