"""The command line, run for real in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SECONDS = 3.0


def unpaint(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "unpaint", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def spent() -> float:
    """Processor seconds of all child processes so far: unlike the clock, no matter of what else the machine does."""
    times = os.times()
    return times.children_user + times.children_system


def refused(*arguments: str, cwd: Path | None = None) -> str:
    """The one line with which bad input is refused, soon and with exit code 2."""
    before = spent()
    done = unpaint(*arguments, cwd=cwd)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("unpaint: ")
    assert spent() - before < SECONDS
    return lines[0]


@pytest.fixture(scope="module")
def edit_file(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An edit of the tiny pipeline that changes one bias of its UNet."""
    from diffusers import StableDiffusionPipeline

    from unpaint.config import compose, identity
    from unpaint.edit import Edit

    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder, safety_checker=None)
    before = pipe.unet.conv_out.bias.detach().clone()
    with torch.no_grad():
        pipe.unet.conv_out.bias += 0.5
    config = identity(compose(["concept=dog", "seed=7"]))
    edit = Edit.from_change(pipe, {"unet.conv_out.bias": before}, method="esd", concept="dog", config=config)
    file = tmp_path_factory.mktemp("edit") / "edit.safetensors"
    edit.save(file)
    return file


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("method=edsx", "did you mean esd"),
        ("concept=kat", "did you mean cat"),
        ("method.lr=abc", "expected a number"),
        ("method.steps=1.5", "expected a whole number"),
        ("method.learning_rat=1e-4", "method has no key learning_rat"),
        ("methd.lr=1e-4", "did you mean method"),
        ("model=/no/such/folder", "no such folder"),
        ("model.path=/no/such/folder", "no such folder"),
        ("outputs=/dev/null/runs", "is a file"),
        ("seed=0,1", "add -m"),
        ("nonsense", "expected key=value"),
    ],
)
def test_a_bad_override_is_refused_in_one_line(override: str, says: str, tmp_path: Path) -> None:
    line = refused("run", override, cwd=tmp_path)
    assert override in line
    assert says in line


def test_every_value_of_a_sweep_is_checked_before_the_first_job(tmp_path: Path) -> None:
    assert "concept=kat" in refused("run", "-m", "concept=cat,dog,kat", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_edit_is_refused(edit_file: Path, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(edit_file.read_bytes()[:-3])
    assert "truncated" in refused("evaluate", f"edit={truncated}", f"model.path={tiny_pipeline_folder}")


def test_an_edit_of_another_base_is_refused(edit_file: Path, tiny_v_pipeline_folder: Path) -> None:
    line = refused("evaluate", f"edit={edit_file}", f"model.path={tiny_v_pipeline_folder}")
    assert "was made for base weights" in line


def test_evaluate_needs_an_edit_and_run_makes_its_own(edit_file: Path) -> None:
    assert "needs an edit file" in refused("evaluate")
    assert "no edit file" in refused("evaluate", "edit=/no/such/file")
    assert "makes its own edit" in refused("run", f"edit={edit_file}")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rum"], "did you mean run"),
        (["comparee"], "did you mean compare"),
        (["compare", "/no/such/folder"], "no such folder"),
        (["compare", "a", "b", "c"], "one folder or two"),
        (["compare", "a", "--score", "erasure/ua"], "METRIC=WEIGHT"),
        (["run", "--multi"], "--multi"),
        (["run", "--resolve"], "--resolve"),
        (["run", "hydra/launcher=nowhere"], "hydra/launcher/nowhere"),
        (["run", "--config-dir", "/no/such/folder"], "no such folder"),
        (["ls", "methds"], "did you mean methods"),
        (["generate"], "--prompt"),
        (["generate", "--promp", "a cat"], "--prompt"),
        (["generate", "--prompt", "a cat", "--seed", "x"], "--seed"),
        (["generate", "--prompt", "a cat", "--out", "cat.jpg"], ".png"),
        (["generate", "--prompt", "a cat", "--model", "/no/such/folder"], "--model"),
        (["generate", "--prompt", "a cat", "--edit", "/no/such/file:0.5"], "no edit file /no/such/file"),
    ],
)
def test_a_bad_command_is_refused_in_one_line(arguments: list[str], says: str) -> None:
    assert says in refused(*arguments)


def test_no_command_prints_the_help_and_is_an_error() -> None:
    done = unpaint()
    assert done.returncode == 2
    assert "usage: unpaint" in done.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["generate", "--help"], ["compare", "--help"], ["ls"], ["--version"]]
)
def test_help_and_ls_answer_at_once_without_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from unpaint.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'diffusers', 'transformers', 'lightning', 'wandb'} & set(sys.modules); "
        "sys.exit(f'imports {heavy}' if heavy else code)"
    )
    before = spent()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert spent() - before < 1.0


def test_run_help_names_what_there_is_to_choose() -> None:
    text = unpaint("run", "--help").stdout
    assert "esd" in text
    assert "mosaic" in text
    assert "usage: unpaint run" in text


def test_ls_shows_one_kind_with_its_cost() -> None:
    text = unpaint("ls", "methods").stdout
    assert "esd" in text
    assert "minute" in text
    assert "picturebook" not in text


def test_the_config_is_shown_with_overrides_and_an_own_config_folder(tmp_path: Path) -> None:
    own = tmp_path / "method"
    own.mkdir()
    (own / "mine.yaml").write_text("# My own method\n_target_: my_methods.Mine\nname: mine\nlr: 0.5\n")
    arguments = ["--config-dir", str(tmp_path), "method=mine", "plugins=[my_methods]", "--cfg", "job", "method.lr=2"]
    done = unpaint("run", *arguments)
    assert done.returncode == 0, done.stderr
    assert "_target_: my_methods.Mine" in done.stdout
    assert "lr: 2" in done.stdout
    assert "My own method" in unpaint("ls", "methods", "--config-dir", str(tmp_path)).stdout
    assert "plugins=[my_methods]" in refused("run", "--config-dir", str(tmp_path), "method=mine")


def test_hydras_own_flags_work(tmp_path: Path) -> None:
    assert "name: unpaint" in unpaint("run", "--cfg", "hydra", cwd=tmp_path).stdout
    assert "pkg://hydra.conf" in unpaint("run", "--info", "searchpath", cwd=tmp_path).stdout
    assert "--multirun" in unpaint("erase", "--hydra-help", cwd=tmp_path).stdout
    assert list(tmp_path.iterdir()) == []


# A stand-in for what is run: it shows what the command hands over, and what it makes of errors.
RUNNER = """
import errno, sys, types
def answer(cfg):
    print("job", cfg.concept.name, cfg.method.lr, cfg.seed, flush=True)
    if cfg.seed == 1: raise ValueError("a bug")
    if cfg.seed == 2: raise OSError(errno.ENOSPC, "No space left on device", "/full/edit.safetensors")
    if cfg.seed == 3: raise KeyboardInterrupt
    if cfg.seed == 4:
        try: raise KeyboardInterrupt
        except KeyboardInterrupt: sys.exit(1)
run = types.ModuleType("unpaint.run")
run.run = run.erase = run.evaluate = answer
import unpaint
unpaint.run = sys.modules["unpaint.run"] = run
from unpaint.cli import main
sys.exit(main())
"""


def jobs(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUNNER, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_overrides_reach_the_run_from_both_sides_of_a_flag(tmp_path: Path) -> None:
    # Lightning starts its other processes with the same command line and these overrides at its end.
    children = ['hydra.run.dir="."', "hydra.job.name=train_ddp_process_1", "hydra.output_subdir=null"]
    done = jobs("run", "concept=dog", "-m", "method.lr=0.5,1", "outputs=runs", *children, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("job")] == ["job dog 0.5 0", "job dog 1 0"]
    assert [file.name for file in tmp_path.iterdir()] == ["runs"]


def test_a_bug_shows_its_traceback_and_a_full_disk_does_not(tmp_path: Path) -> None:
    bug = jobs("run", "seed=1", cwd=tmp_path)
    assert bug.returncode == 1
    assert "Traceback" in bug.stderr
    assert "ValueError: a bug" in bug.stderr
    full = jobs("run", "seed=2", cwd=tmp_path)
    assert full.returncode == 2
    assert full.stderr.splitlines() == [full.stderr.strip()]
    assert "the disk is full: /full/edit.safetensors" in full.stderr


@pytest.mark.parametrize("seed", [3, 4])
def test_an_interrupt_is_told_apart(seed: int, tmp_path: Path) -> None:
    # 4: Lightning turns Ctrl-C into sys.exit(1).
    done = jobs("run", f"seed={seed}", cwd=tmp_path)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


def test_a_failed_job_does_not_stop_the_others_of_a_sweep(tmp_path: Path) -> None:
    done = jobs("run", "-m", "seed=2,0,1,5", cwd=tmp_path)
    assert done.returncode == 1
    assert sum(line.startswith("job") for line in done.stdout.splitlines()) == 4
    assert "2 of 4 jobs failed" in done.stderr


def test_evaluate_takes_concept_and_seed_from_the_edit_unless_told(
    edit_file: Path, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    given = ["evaluate", f"edit={edit_file}", f"model.path={tiny_pipeline_folder}"]
    assert "job dog 0.001 7" in jobs(*given, cwd=tmp_path).stdout
    assert "job cat 0.001 7" in jobs(*given, "concept=cat", cwd=tmp_path).stdout


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_outputs_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "no permission" in refused("run", f"outputs={tmp_path / 'runs'}")


def test_generate_paints_unedited_beside_edited(
    edit_file: Path, tiny_pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image, ImageChops

    from unpaint.cli import main
    from unpaint.generate import GAP, HEAD, MARGIN

    def halves(scale: str) -> tuple[Image.Image, Image.Image]:
        """The first prompt's pictures, unedited and edited."""
        out = tmp_path / "grid" / f"{scale}.png"
        what = [
            "--edit",
            f"{edit_file}:{scale}",
            "--prompt",
            "a cat",
            "--prompt",
            "a dog in the snow",
            "--out",
            str(out),
        ]
        assert main(["generate", *what, "--model", str(tiny_pipeline_folder), "--steps", "2"]) == 0
        assert capsys.readouterr().out.strip() == str(out)
        sheet = Image.open(out).convert("RGB")
        cell = (sheet.width - 2 * MARGIN - GAP) // 2
        top, right = MARGIN + HEAD, MARGIN + cell + GAP
        return sheet.crop((MARGIN, top, MARGIN + cell, top + cell)), sheet.crop((right, top, right + cell, top + cell))

    left, same = halves("0")
    left_again, changed = halves("1")
    assert ImageChops.difference(left, same).getbbox() is None
    assert ImageChops.difference(left, left_again).getbbox() is None
    assert ImageChops.difference(left, changed).getbbox() is not None
