"""What is shipped: the wheel, what importing it costs, and the files around it."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import unpaint
from unpaint.doctor import damaged, diagnose

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_configs_and_weights(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"unpaint/conf/{file.relative_to(ROOT / 'conf')}" for file in (ROOT / "conf").rglob("*.yaml")}
    assert configs
    assert configs <= held
    weights = ROOT / "src/unpaint/picturebook/weights"
    shipped = {str(file.relative_to(ROOT / "src")) for file in weights.rglob("*") if file.is_file()}
    assert shipped <= held
    assert {f"unpaint/report/page.{kind}" for kind in ("html.j2", "css", "js")} <= held
    assert not any(name.startswith(("tests", "conf/", "outputs")) for name in held)


def test_the_installed_wheel_finds_its_configs(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = "import unpaint.cli, sys; assert 'site' in unpaint.__file__, unpaint.__file__; sys.exit(unpaint.cli.main())"
    environment = os.environ | {"PYTHONPATH": str(site)}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "esd" in run("ls", "methods")
    assert "name: dog" in run("run", "concept=dog", "--cfg", "job")
    assert str(site / "unpaint" / "conf") in run("run", "--info", "searchpath")


def test_importing_unpaint_does_not_import_torch() -> None:
    code = (
        "import sys, unpaint, unpaint.cli, unpaint.config, unpaint.errors, unpaint.listing, unpaint.edit_header, "
        "unpaint.concepts, unpaint.compare; assert 'torch' not in sys.modules; "
        "unpaint.Edit; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_edit_is_an_attribute_and_other_names_are_not() -> None:
    from unpaint.edit import Edit

    assert unpaint.Edit is Edit
    with pytest.raises(AttributeError, match="Edits"):
        _ = unpaint.Edits


def test_every_dependency_is_pinned_in_the_constraints() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, _, version in names}
    assert all(pins.values())
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        name = re.split(r"[<>=!\[ ]", requirement)[0]
        assert re.sub(r"[-_.]+", "-", name).lower() in pins, requirement


def test_the_version_is_the_same_everywhere() -> None:
    assert f"version: {unpaint.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_make_without_a_target_prints_the_help() -> None:
    done = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, check=True, timeout=60)
    for target in ("setup", "demo", "test", "lint", "clean"):
        assert f"make {target}" in done.stdout


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()


def test_damage_to_the_weights_is_found(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_bytes(b"{}")
    names = ["unet/weights.safetensors", "config.json"]
    files = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names}
    assert "missing" in damaged(tmp_path)[0][0]
    (tmp_path / "provenance.json").write_text(json.dumps({"files": files}))
    assert damaged(tmp_path) == ([], 2)
    (tmp_path / "unet" / "weights.safetensors").write_bytes(b"weightz")
    (tmp_path / "config.json").unlink()
    faults, _ = damaged(tmp_path)
    assert len(faults) == 2
    assert "lacks config.json" in faults[0]
    assert "weights.safetensors was altered" in faults[1]


def test_doctor_reports_versions_and_devices() -> None:
    report, _ = diagnose()
    for word in ("torch", "hydra-core", "cpu", "picturebook", "nudenet"):
        assert word in report
