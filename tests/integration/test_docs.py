"""Every command and every snippet of the documentation does what it is shown for.

`unpaint run`, `erase` and `evaluate` go through the command line up to the point where a model would be loaded; those
in `FOR_REAL` go all the way, made small. The other commands of unpaint are run as they stand. What cannot be run is in
`ELSEWHERE`, with the reason; a command that is in neither fails.
"""

import contextlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from unpaint import checking, cli, run
from unpaint.config import adopt_edit, compose, identity
from unpaint.edit import Edit
from unpaint.files import WEIGHTS
from unpaint.results import RunRecord

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
PROGRAMS = ("unpaint", "make", "python", "pip", "sbatch", "wandb", "source", "scripts/", ".venv/")

# Run to the end, with the settings of a tiny run before them; all but the first two are slow.
FOR_REAL = (
    "unpaint run --config-dir my_conf method=rename plugins=[my_methods]",
    "unpaint evaluate edit=FILE",
    "unpaint run concept=mosaic method=esd",
    "unpaint run --config-dir my_conf method=remap plugins=[my_methods]",
    "unpaint run +metric@evaluator.metrics.brightness=brightness",
)

# A pattern of the whole command: why it is not run here, and what stands in for it.
ELSEWHERE = {
    r"unpaint (run|erase|evaluate)|python -m unpaint": "the command's name, not a call",
    r"make [a-z-]+": "minutes: `make -n` prints what it would do, and CI does `make test` and `make test-slurm`",
    r"pip install .*|pre-commit install": "needs a network: the extras that it names are compared with pyproject.toml",
    r"source \.venv/bin/activate": "a line of the reader's own shell",
    r"python scripts/\w+\.py.*": "minutes or hours: the script's --help knows all that is shown of it",
    r"sbatch .*|PARTS=8 scripts/.*": "a cluster: tests/slurm runs the scripts, here their overrides are checked",
    r"scripts/slurm/one_machine.sh start FOLDER": "installs and starts a SLURM: tests/slurm does",
    r"wandb (login|sync.*)": "needs an account",
    r"unpaint git python .*": "keys of a record, not a command",
}


@dataclass(frozen=True)
class Shown:
    page: Path
    line: int
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def fences(page: Path) -> Iterator[tuple[str, Shown]]:
    """The fenced blocks: language ("" for none) and text."""
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield block[1], Shown(page, text.count("\n", 0, block.start(2)) + 1, block[2])


def is_command(text: str) -> bool:
    words = [word for word in text.split() if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    return bool(words) and words[0].startswith(PROGRAMS) and (words[0] in PROGRAMS or "/" in words[0])


def commands(page: Path) -> Iterator[Shown]:
    """Lines of the blocks without a language that hold a command, and inline code that is one."""
    for language, block in fences(page):
        lines = block.text.splitlines()
        if language == "" and any(map(is_command, lines)):
            for number, line in enumerate(lines, block.line):
                if line.strip():
                    yield Shown(page, number, line)
    blank = re.sub(
        r"^```.*?^```$", lambda m: "\n" * m[0].count("\n"), page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    for code in re.finditer(r"`([^`]+)`", blank):
        if is_command(code[1]) and " " in code[1]:
            yield Shown(page, blank.count("\n", 0, code.start()) + 1, " ".join(code[1].split()))


def words(command: str) -> list[str]:
    """As a shell would split it, without comments; an override's brackets and globs are left alone."""
    return shlex.split(command, comments=True)


def in_configs() -> Iterator[Shown]:
    """The commands in the comments of the shipped configs."""
    for file in sorted((ROOT / "conf").rglob("*.yaml")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if found := re.match(r"#.*?(unpaint run .*)", line):
                yield Shown(file, number, found[1])


def every_command() -> list[Shown]:
    """Each command once, where it is shown first, without its comment."""
    found: dict[str, Shown] = {}
    for shown in chain(*map(commands, PAGES), in_configs()):
        for text in re.split(r"\s+&&\s+", re.sub(r"\s+#\s.*", "", shown.text).strip()):
            found.setdefault(text, Shown(shown.page, shown.line, text))
    return list(found.values())


EVERY = every_command()


def is_listed(text: str) -> bool:
    return any(re.fullmatch(pattern, text) for pattern in ELSEWHERE)


def is_job(text: str) -> bool:
    return re.match(r"unpaint (run|erase|evaluate) ", text) is not None and text not in FOR_REAL


def is_made(shown: Shown) -> bool:
    """Whether it is one of many: the leaderboard's script has written the line, or it is in a config."""
    lines = shown.page.read_text(encoding="utf-8").splitlines()
    return shown.page.suffix == ".yaml" or "<!-- made by scripts/leaderboard.py -->" in lines[: shown.line]


def shown(kind: str) -> list[Any]:
    """The commands of a kind, as test parameters. Of the many that are made or in configs all but one are slow."""
    kinds = {
        "real": lambda text: text in FOR_REAL,
        "elsewhere": is_listed,
        "job": lambda text: is_job(text) and not is_listed(text),
    }
    parameters, many = [], False
    for one in EVERY:
        own = next((name for name, holds in kinds.items() if holds(one.text)), "rest")
        if own != kind:
            continue
        made = is_made(one)
        marks = [pytest.mark.slow] if (made and many) or one.text in FOR_REAL[2:] else []
        many = many or made
        parameters.append(pytest.param(one, id=f"{one.where} {one.text[:60]}", marks=marks))
    return parameters


# --- what a reader has by then


def block(page: str, holds: str) -> str:
    """The one fenced block of a page that has this text in it."""
    (found,) = [shown.text for _, shown in fences(ROOT / page) if holds in shown.text]
    return found


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline_folder: Path) -> Path:
    """A folder with what the pages take for granted: their own files, some runs, an edit of the built-in model."""
    from diffusers import StableDiffusionPipeline

    desk = tmp_path_factory.mktemp("desk")
    files = {
        "my_methods/__init__.py": "",
        "my_methods/rename.py": block("README.md", "class Rename"),
        "my_methods/remap.py": block("CONTRIBUTING.md", "class Remap"),
        "my_conf/method/rename.yaml": block("README.md", "my_methods.rename.Rename"),
        "my_conf/method/remap.yaml": block("CONTRIBUTING.md", "unpaint.methods.remap.Remap").replace(
            "unpaint.methods", "my_methods"
        ),
        "my_conf/concept/lighthouse.yaml": block("CONTRIBUTING.md", "name: lighthouse"),
        "my_conf/concept/dog_as_bird.yaml": block("CONTRIBUTING.md", "name: dog_as_bird"),
        "my_conf/metric/brightness.yaml": block("CONTRIBUTING.md", "brightness.Brightness"),
        "my_conf/detector/mine.yaml": "_target_: my_package.Brought\n",
        "my_package/__init__.py": BRINGS,
        "prompts.csv": "prompt,seed\na cat,1\n",
    }
    for name, text in files.items():
        (desk / name).parent.mkdir(parents=True, exist_ok=True)
        (desk / name).write_text(text, encoding="utf-8")
    (desk / "src").symlink_to(ROOT / "src")
    shutil.copytree(ROOT / "docs" / "results", desk / "docs" / "results")
    shutil.copytree(ROOT / "docs" / "results" / "cat", desk / "outputs" / "picturebook" / "cat")
    for name, model, folder in (("edit", "picturebook", WEIGHTS), ("tiny", "sd15", tiny_pipeline_folder)):
        pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        before = pipe.unet.conv_out.bias.detach().clone()
        with torch.no_grad():
            pipe.unet.conv_out.bias += 0.01
        own = identity(compose([f"model={model}", "concept=dog"]))
        edit = Edit.from_change(pipe, {"unet.conv_out.bias": before}, method="esd", concept="dog", config=own)
        edit.save(desk / f"{name}.safetensors")
    return desk


# A detector that knows the lighthouse's labels and looks at nothing.
BRINGS = """
class Brought:
    labels = [*("object/" + word for word in ("lighthouse", "dog", "bridge")),
              *("place/" + word for word in ("town", "hill", "snow", "lake"))]
    thresholds, identity, only_for = {}, "brought", None
"""


@pytest.fixture
def at_desk(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(desk)
    monkeypatch.syspath_prepend(desk)
    yield desk
    # Other tests have packages of the same names.
    for name in [name for name in sys.modules if name.partition(".")[0] in ("my_methods", "my_package")]:
        del sys.modules[name]


def filled_in(text: str, edit: str = "edit.safetensors") -> list[str]:
    """The command's words after `unpaint`, with the files of the desk for the names in capitals."""
    runs = sorted(Path("outputs").glob("*/*/*/*/record.json"))
    for name, value in (
        ("prompts_csv=FILE", "prompts_csv=prompts.csv"),
        ("FILE", edit),
        ("RUN_A", str(runs[0].parent)),
        ("RUN_B", str(runs[1].parent)),
        ("FOLDER", "made_up"),
    ):
        text = text.replace(name, value)
    # CONTRIBUTING.md puts this method into the package; here it lies outside.
    own = ["--config-dir", "my_conf", "plugins=[my_methods]"] if "method=remap concept" in text else []
    return words(text)[1:] + own


# --- the tests


def test_commands_are_found_where_they_are_shown() -> None:
    texts = {one.text for one in EVERY}
    assert {"make demo", "unpaint compare", "unpaint run concept=mosaic method=esd"} <= texts
    assert set(FOR_REAL) <= texts
    assert [pattern for pattern in ELSEWHERE if not any(re.fullmatch(pattern, text) for text in texts)] == []


@pytest.mark.parametrize("command", shown("job"))
def test_a_job_is_one_that_can_be_done(command: Shown, at_desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(filled_in(command.text), monkeypatch)


def prepared(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line, as far as it goes without loading a model: parsed, every value of a sweep checked, and the
    first job made into objects, which are compared with each other."""
    checked: list[Any] = []
    check_whole = checking._check_whole

    def remembered(cfg: Any, command: str | None) -> None:
        checked.append(cfg)
        check_whole(cfg, command)

    monkeypatch.setattr(checking, "_check_whole", remembered)
    asked: list[Any] = []
    monkeypatch.setattr("hydra._internal.utils._run_hydra", lambda **given: asked.append(given["args"]))
    assert cli.main(arguments) == 0
    (args,), cfg = asked, checked[0]
    if arguments[0] == "evaluate":
        adopt_edit(cfg, args.overrides)
    this = run._given(cfg) if arguments[0] == "evaluate" else run._prepared(cfg)
    if arguments[0] != "erase" or cfg.probes:
        run._check_judges(this)


@pytest.mark.parametrize("command", shown("real"))
def test_a_small_job_is_done(
    command: Shown, at_desk: Path, small: list[str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    first, *rest = filled_in(command.text, edit="tiny.safetensors")
    if "brightness" in command.text:
        # Where the page puts the file, in the package, without writing there.
        name = "unpaint.evaluation.metrics.brightness"
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(block("CONTRIBUTING.md", "class Brightness"), module.__dict__)
        monkeypatch.setattr("unpaint.evaluation.metrics.brightness", module, raising=False)
        rest += ["--config-dir", "my_conf"]
    takes = options_of_method(rest)
    given = [line for line in small if not line.startswith("method.") or line.partition("=")[0][7:] in takes]
    if first == "evaluate":
        given = [line for line in given if not line.startswith(("method.", "concept="))]
    folder = at_desk / f"outputs_of_{abs(hash(command.text))}"
    assert cli.main([first, *given, *rest, f"outputs={folder}"]) == 0
    (file,) = folder.glob("*/*/*/*/edit.safetensors")
    record = file.with_name("record.json")
    assert Edit.load(file).header.method in (*rest, "esd", "rename", "remap")
    if first != "erase":
        assert RunRecord.load(record).status == "complete"
    if "brightness" in command.text:
        assert 0 < RunRecord.load(record).metrics["fidelity/brightness"]["value"] < 1


def options_of_method(overrides: list[str]) -> set[str]:
    """The options of the method that the overrides choose."""
    own = next((line.partition("=")[2] for line in overrides if line.startswith("method=")), "esd")
    file = next(
        file for folder in (ROOT / "conf", Path("my_conf")) if (file := folder / f"method/{own}.yaml").is_file()
    )
    return set(OmegaConf.load(file))


@pytest.mark.parametrize("command", shown("rest"))
def test_a_command_runs_as_it_stands(
    command: Shown, at_desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, *arguments = words(command.text)
    if program == "python":
        monkeypatch.setattr(sys, "argv", [str(ROOT / arguments[0]), *filled_in(command.text)[1:]])
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        assert program == "unpaint", f"{command.where}: {command.text}: not known how to run it; see ELSEWHERE"
        assert cli.main(filled_in(command.text)) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", shown("elsewhere"))
def test_what_is_not_run_here_is_there(command: Shown, at_desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *rest = words(command.text)
    if program == "make":
        done = subprocess.run(["make", "-n", "-C", ROOT, *rest], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for recipe in re.findall(r"^\.venv/bin/unpaint (.*)$", done.stdout, re.MULTILINE):
            prepared(words(recipe), monkeypatch)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"unpaint\[(\w+)\]", command.text)) <= set(extras)
    elif program == "python" and rest[0] != "-m":
        told = helped(rest[0], monkeypatch)
        assert [word for word in rest[1:] if word.startswith("--") and word not in told] == []
        if len(rest) > 1 and rest[1].islower() and not rest[1].startswith("-") and not (ROOT / rest[1]).exists():
            assert rest[1] in told
    elif "scripts/" in command.text:
        (path,) = [word for word in (program, *rest) if word.startswith("scripts/")]
        assert (ROOT / path).is_file()
        if overrides := [word for word in rest if "=" in word and not word.startswith("-")]:
            prepared(["run", *overrides], monkeypatch)


def helped(file: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the script's --help says."""
    printed = io.StringIO()
    monkeypatch.setattr(sys, "argv", [file, "--help"])
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / file), run_name="__main__")
    return printed.getvalue() + (left.value.code if isinstance(left.value.code, str) else "")


SNIPPETS = [shown for page in PAGES for language, shown in fences(page) if language == "python"]
# Files of their own, of which the commands above make use; the attack is tried below.
FILES = ("class Rename", "class Remap", "class Brightness", "class Please")


@pytest.mark.parametrize(
    "snippet",
    [pytest.param(one, id=one.where) for one in SNIPPETS if not any(name in one.text for name in FILES)],
)
def test_a_snippet_runs(snippet: Shown, at_desk: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    exec(compile(snippet.text, snippet.where, "exec"), {"pipe": pipe})


def test_the_attack_that_is_shown_asks_politely() -> None:
    """It gets a scene as the engine gives it, and what it yields are the engine's tries."""
    from unpaint.evaluation.attacks import Scene, Try

    names: dict[str, Any] = {"dataclass": dataclass, "Iterator": Iterator, "Scene": Scene, "Try": Try}
    module = ModuleType("please")
    module.__dict__.update(names)
    exec(block("CONTRIBUTING.md", "class Please"), module.__dict__)
    asked: list[tuple[list[int], list[str]]] = []
    scene = SimpleNamespace(
        open=[0, 2], prompts=lambda rows: [f"prompt {row}" for row in rows], painted=lambda *given: asked.append(given)
    )
    attack = module.Please(name="please", title="", words=("please,", "kindly"), prompts=2, at_n=1, max_seconds=9.0)
    assert len(list(attack.attempts(scene))) == attack.tries == 2
    assert asked[0] == ([0, 2], ["please, prompt 0", "please, prompt 2"])
