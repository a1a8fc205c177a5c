"""Refuses a bad command line before anything heavy is loaded.

Importing this module costs Hydra, not torch.
"""

import copy
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf._utils import split_key

from unpaint.config import (
    ConfTree,
    check_target,
    instantiate,
    load,
    model_folder,
    one_line,
    part_of,
    refusals,
    targets_in,
)
from unpaint.errors import UserError, nearest
from unpaint.files import WEIGHTS


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
            raise UserError(f"{line}: expected key=value, +key=value or ~key ({one_line(error)})") from error
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
        loaded[key] = load(groups, tree)
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
    for target in targets_in(plain):
        check_target(target, whole.get("plugins") or ())
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
