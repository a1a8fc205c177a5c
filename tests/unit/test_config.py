"""Composing, checking, instantiating and naming configs."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from unpaint.checking import check
from unpaint.config import (
    ConfTree,
    adopt_edit,
    compose,
    conf_dir,
    edit_id,
    identity,
    instantiate,
    run_folder,
    run_id,
)
from unpaint.errors import UserError, environment_fault, nearest
from unpaint.listing import groups, options


def every_option() -> list[str]:
    folders = [conf_dir()]
    chosen = ("method", "concept", "model", "evaluator", "trainer", "logger")
    return [
        f"{group}={option.name}" for group in groups(folders) for option in options(folders, group) if group in chosen
    ]


@pytest.mark.parametrize("folder", ["experiment", "sweep"])
def test_every_shipped_experiment_and_sweep_composes(folder: str) -> None:
    files = sorted((conf_dir() / folder).rglob("*.yaml"))
    assert files
    for file in files:
        name = file.relative_to(conf_dir() / folder).with_suffix("")
        instantiate(compose([f"experiment={name}" if folder == "experiment" else f"+sweep={name}"]).method)


@pytest.mark.parametrize("choice", every_option())
def test_every_shipped_config_composes_and_is_described(choice: str) -> None:
    group, _, name = choice.partition("=")
    check([choice])
    if group in ("method", "concept", "model", "logger"):
        assert compose([choice])[group].name == name  # the names of run folders are those of the files
    assert next(option for option in options([conf_dir()], group) if option.name == name).description


def test_the_whole_default_config_can_be_made_into_objects() -> None:
    cfg = compose()
    for part in ("method", "concept", "evaluator"):
        instantiate(cfg[part])


@pytest.mark.parametrize(
    "override",
    [
        "method.lr=1",
        "method.erase_from='a picture of an animal'",
        "trainer.devices=2",
        "trainer.devices=[0,1]",
        "trainer.precision=16",
        "+experiment_note=hello",
        "outputs=new_folder",
        "model=sd14",
        "logger=none",
    ],
)
def test_good_overrides_pass(override: str) -> None:
    check([override], "run")


def test_sweeps_are_checked_value_by_value() -> None:
    check(["method.lr=choice(0.1,1)", "seed=range(0,3)", "concept=glob(f*)"], "run", multirun=True)
    check(["hydra.mode=MULTIRUN", "seed=0,1"], "run")
    check(["method.lr=interval(0.1,1)"], "run", multirun=True)
    with pytest.raises(UserError, match=r"method\.steps=two: expected a whole number"):
        check(["method.steps=1,two"], "run", multirun=True)
    with pytest.raises(UserError, match="matches nothing"):
        check(["concept=glob(zz*)"], "run", multirun=True)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("method.lr=null", "expected a number"),
        ("force=1", "expected true or false"),
        ("plugins=mine", "expected a list"),
        ("method.lr.x=1", "method.lr is a value"),
        ("concept@other=cat", "concept"),
        ("method.variant=${nowhere}", "nowhere"),
        ("method.variant=???", "method.variant has no default"),
        ("method._target_=os.system", "outside unpaint"),
        ("+method.inner={_target_: os.system}", "outside unpaint"),
        ("concept.kind=imaginary", "kind"),
        ("model=.", "model.path"),
    ],
)
def test_bad_overrides_are_refused(override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check([override], "run")


def test_a_model_folder_must_be_a_diffusers_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model_index\.json"):
        check([f"model.path={tmp_path}"], "run")


def test_an_own_config_folder_joins_and_does_not_shadow(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "long.yaml").write_text(
        "# @package _global_\n# Twice the steps\ndefaults:\n  - override /concept: dog\nmethod:\n  steps: 120\n"
    )
    cfg = compose(["experiment=long"], ConfTree(conf_dir(), extra=tmp_path))
    assert (cfg.concept.name, cfg.method.steps) == ("dog", 120)
    assert [(option.name, option.description) for option in options([tmp_path], "experiment")] == [
        ("long", "Twice the steps")
    ]
    check(["experiment=long"], "run", ConfTree(conf_dir(), extra=tmp_path))


def test_only_allowed_classes_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for target in ("os.system", "builtins.open", "unpaintx.Thing"):
        with pytest.raises(UserError, match="outside unpaint"):
            instantiate({"_target_": target})
    # Reachable through an allowed module, but not defined in one.
    with pytest.raises(UserError, match="is defined in"):
        instantiate({"_target_": "unpaint.config.os.system", "command": "true"})
    with pytest.raises(UserError, match="cannot be imported"):
        instantiate({"_target_": "unpaint.errors.NoSuchThing"})
    with pytest.raises(UserError, match="cannot be imported"):
        instantiate({"_target_": "unpaint.no_such_module.Thing"})

    (tmp_path / "made_here.py").write_text(
        "class Mine:\n    def __init__(self, lr, names):\n        self.lr, self.names = lr, names\n"
        "class Broken:\n    def __init__(self):\n        raise TypeError('an argument of the bug')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    made = instantiate(OmegaConf.create({"_target_": "made_here.Mine", "lr": 1, "names": ["a"]}), ["made_here"])
    assert made.lr == 1
    assert type(made.names) is list
    with pytest.raises(UserError, match="unexpected keyword argument 'rate'"):
        instantiate({"_target_": "made_here.Mine", "rate": 1}, ["made_here"])
    with pytest.raises(Exception, match="an argument of the bug") as caught:
        instantiate({"_target_": "made_here.Broken"}, ["made_here"])
    assert not isinstance(caught.value, UserError)


def test_a_constructors_own_refusal_stays_one() -> None:
    with pytest.raises(UserError, match=r"method\.variant"):
        instantiate(compose(["method.variant=y"]).method)


def test_ids_depend_on_what_matters_and_on_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose()
    same = ["outputs=elsewhere", "force=true", "logger=none", "trainer=cpu", "method.lr=0.001"]
    for override in same:
        assert run_id(compose([override])) == run_id(cfg)
    assert edit_id(compose(["method.negative_guidance=1.00"])) == edit_id(cfg)
    others = ["seed=1", "concept=dog", "method.lr=1", f"model.path={tmp_path}", "model=sd14", "model.dtype=float16"]
    ids = {edit_id(compose([override])) for override in others} | {edit_id(cfg)}
    assert len(ids) == len(others) + 1
    assert len({run_id(compose([override])) for override in others} | {run_id(cfg)}) == len(others) + 1

    changed = compose(["+evaluator.more=1"])
    assert edit_id(changed) == edit_id(cfg)
    assert run_id(changed) != run_id(cfg)

    edit = tmp_path / "edit"
    edit.write_bytes(b"one")
    one = run_id(compose([f"edit={edit}"]))
    edit.rename(tmp_path / "moved")
    assert run_id(compose([f"edit={tmp_path / 'moved'}"])) == one
    (tmp_path / "moved").write_bytes(b"two")
    assert run_id(compose([f"edit={tmp_path / 'moved'}"])) != one

    monkeypatch.chdir(tmp_path)
    assert edit_id(compose(["model.path=here"])) == edit_id(compose([f"model.path={tmp_path / 'here'}"]))


def test_ids_are_the_same_in_another_process() -> None:
    code = "from unpaint.config import compose, run_id; print(run_id(compose(['seed=3'])))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == run_id(compose(["seed=3"]))
    assert len(done.stdout.strip()) == 12


def test_identity_holds_no_paths() -> None:
    held = identity(compose(["model=sd15", "model.path=/somewhere"]))
    assert set(held) == {"model", "concept", "method", "seed"}
    assert held["model"] == {"name": "sd15", "dtype": "float32"}
    assert "somewhere" not in json.dumps(held)


def test_identity_holds_the_name_alone_of_an_aligners_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one" / "clip", tmp_path / "other" / "clip"
    for folder in (one, other):
        folder.mkdir(parents=True)
    first, second = (compose(["method=trust", f"method.aligner.path={folder}"]) for folder in (one, other))
    assert identity(first)["method"]["aligner"]["path"] == "clip"
    assert identity(first) == identity(second) and edit_id(first) != edit_id(second)
    monkeypatch.chdir(one.parent)
    assert edit_id(compose(["method=trust", "method.aligner.path=clip"])) == edit_id(first)
    hub = compose(["method=trust", "method.aligner.path=openai/clip"])
    assert identity(hub)["method"]["aligner"]["path"] == "openai/clip"


def test_the_run_folder_is_a_function_of_the_config(tmp_path: Path) -> None:
    cfg = compose([f"outputs={tmp_path}", "concept=dog"])
    assert run_folder(cfg) == tmp_path / "picturebook" / "dog" / "esd" / run_id(cfg)


def test_an_edits_header_may_not_name_foreign_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unpaint import edit_header

    base = {"architecture": {"unet": "X 0"}, "hash": "0"}
    config = {"concept": {"_target_": "transformers.AutoModel.from_pretrained", "name": "x"}, "seed": 3}
    fields = {"format": 1, "base": base, "method": "m", "concept": "x", "config": config, "version": "0"}
    file = tmp_path / "edit.safetensors"
    file.write_bytes(edit_header.to_bytes(edit_header.seal(fields, {}, {}), {}))
    cfg = compose([f"edit={file}"])
    with pytest.raises(UserError, match="not unpaint's"):
        adopt_edit(cfg, [])
    adopt_edit(cfg, ["concept=cat"])
    assert (cfg.concept.name, cfg.seed) == ("cat", 3)


def test_an_edit_that_no_run_made_keeps_the_name_of_its_method(tmp_path: Path) -> None:
    from unpaint import edit_header

    base = {"architecture": {"unet": "X 0"}, "hash": "0"}
    fields = {"format": 1, "base": base, "method": "by_hand", "concept": "x", "config": {}, "version": "0"}
    file = tmp_path / "edit.safetensors"
    file.write_bytes(edit_header.to_bytes(edit_header.seal(fields, {}, {}), {}))
    cfg = compose([f"edit={file}"])
    adopt_edit(cfg, [])
    assert cfg.method == {"name": "by_hand"}
    assert run_folder(cfg).parts[-2] == "by_hand" and run_id(cfg)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "the disk is full: /x/y"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "no permission: /x"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "read-only"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/no/such/folder/file"), "does not exist"),
        (
            RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0: file write failed"),
            "disk full",
        ),
    ],
)
def test_faults_of_the_disk_are_recognised(error: Exception, says: str) -> None:
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = error
    for each in (error, wrapped):
        line = environment_fault(each)
        assert line is not None
        assert says in line


def test_bugs_are_not_blamed_on_the_disk(tmp_path: Path) -> None:
    missing = FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "forgotten"))
    for error in (ValueError("x"), KeyError("x"), RuntimeError("shape"), missing, ConnectionError("gone")):
        assert environment_fault(error) is None


def test_a_real_full_disk_is_recognised() -> None:
    import torch
    from safetensors.torch import save_file

    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    for write in (
        lambda: Path("/dev/full").write_bytes(b"x" * 100_000),
        lambda: torch.save(torch.zeros(100_000), "/dev/full"),
        lambda: save_file({"x": torch.zeros(10)}, "/dev/null/x.safetensors"),
    ):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - each library has its own
            write()
        assert environment_fault(caught.value) is not None, repr(caught.value)


def test_nearest_is_silent_when_nothing_is_near() -> None:
    assert nearest("Kat", ["cat", "dog"]) == "; did you mean cat?"
    assert nearest("submarine", ["cat", "dog"]) == ""


def test_the_tuning_sweep_keeps_to_its_own_concepts_and_seed() -> None:
    cfg = compose(["+sweep=tune", "method=uce"])
    assert cfg.seed == 1000 and cfg.probes == 0 and cfg.logger.name == "none" and cfg.method.name == "uce"
    assert cfg.concept.evaluation.target_pictures == 24
    assert "concept: tree,flower,sketch,woodcut" in (conf_dir() / "sweep" / "tune.yaml").read_text()
