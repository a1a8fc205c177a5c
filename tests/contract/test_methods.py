"""What holds for every method: walks conf/method/*, so a new method is tested by being there."""

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from unpaint import run
from unpaint.config import compose, conf_dir, instantiate
from unpaint.edit import Edit
from unpaint.evaluation.suite import Evaluator
from unpaint.memory import forget_peak, peak
from unpaint.model import TextToImage, load_model
from unpaint.run import erase
from unpaint.training.erasing import SaveState

METHODS = sorted(file.stem for file in (conf_dir() / "method").glob("*.yaml"))
# A closed form and no change at all leave nothing to chance.
WITHOUT_CHANCE = ("none", "uce")


@pytest.fixture(scope="module")
def options(tiny_pipeline_folder: Path) -> list[str]:
    """Two steps on the tiny pipeline."""
    return [
        "model=sd15",
        f"model.path={tiny_pipeline_folder}",
        "trainer=cpu",
        "logger=none",
        "probes=0",
        "method.steps=2",
        "method.sampling_steps=4",
    ]


def config(method: str, options: list[str], outputs: Path, *more: str) -> DictConfig:
    """The options that this method has; one without steps, say, has nothing to shorten."""
    keys = {str(key) for key in compose([f"method={method}"]).method}
    own = [o for o in options if not o.startswith("method.") or o.removeprefix("method.").split("=")[0] in keys]
    return compose([f"method={method}", f"outputs={outputs}", *own, *more])


def made_by(method: str, options: list[str], outputs: Path, *more: str) -> Edit:
    return Edit.load(erase(config(method, options, outputs, *more)))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_file_and_another_seed_another(
    method: str, options: list[str], tmp_path: Path
) -> None:
    first = erase(config(method, options, tmp_path / "a")).read_bytes()
    again = erase(config(method, options, tmp_path / "b")).read_bytes()
    assert first == again
    other, own = made_by(method, options, tmp_path / "c", "seed=1"), Edit.load(tmp_path / "a" / _only(tmp_path / "a"))
    assert other.header.config["seed"] == 1
    assert alike(own, other) == (method in WITHOUT_CHANCE)


def alike(one: Edit, other: Edit) -> bool:
    """Whether both change the same weights to the same bits, whatever their headers say."""
    return all(
        a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)
        for a, b in ((one.delta, other.delta), (one.zero, other.zero))
    )


@pytest.mark.parametrize("method", METHODS)
def test_after_another_method_in_the_same_process_it_makes_the_same_file(
    method: str, options: list[str], tmp_path: Path
) -> None:
    run._kept.clear()
    alone = erase(config(method, options, tmp_path / "alone")).read_bytes()
    run._kept.clear()
    erase(config("esd", options, tmp_path / "esd", "method.variant=all"))
    erase(config("concept_prune", options, tmp_path / "prune"))
    assert run._kept, "the model is that of the jobs before"
    assert erase(config(method, options, tmp_path / "after")).read_bytes() == alone


def _only(outputs: Path) -> Path:
    (file,) = outputs.glob("*/*/*/*/edit.safetensors")
    return file.relative_to(outputs)


@pytest.mark.parametrize("method", METHODS)
def test_only_the_declared_weights_move_and_the_edit_comes_off_without_a_trace(
    method: str, options: list[str], tmp_path: Path
) -> None:
    cfg = config(method, options, tmp_path)
    edit = Edit.load(erase(cfg))
    model = load_model(cfg.model)
    before = {key: value.clone() for key, value in model.pipe.unet.state_dict().items()}
    instance = instantiate(cfg.method)
    declared = set(model.group(instance.group))
    # A method that takes no step is a floor for the others, and changes nothing.
    assert (edit.changed_parameters > 0) == (instance.steps > 0)
    assert set(edit.delta) | set(edit.zero) <= declared
    edit.apply(model.pipe)
    moved = {f"unet.{key}" for key, value in model.pipe.unet.state_dict().items() if not value.equal(before[key])}
    assert moved == set(edit.delta) | set(edit.zero)
    edit.remove(model.pipe)
    assert all(value.equal(before[key]) for key, value in model.pipe.unet.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_nothing_global_is_left_behind(method: str, options: list[str], tmp_path: Path) -> None:
    def state() -> tuple[Any, ...]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()

    before, rng = state(), torch.get_rng_state()
    made_by(method, options, tmp_path)
    assert state() == before
    assert torch.get_rng_state().equal(rng)


@pytest.mark.parametrize(
    ("method", "chosen"),
    [
        # Its margin is for a model that was trained: of this one it prunes nothing.
        *((method, ["method.margin=1.0"] if method == "concept_prune" else []) for method in METHODS),
        *(("esd", [f"method.variant={variant}"]) for variant in ("x-strict", "u", "all")),
    ],
)
def test_v_prediction_models_are_erased_too(
    method: str, chosen: list[str], options: list[str], tiny_v_pipeline_folder: Path, tmp_path: Path
) -> None:
    of_v = [*options, "model=sd21", f"model.path={tiny_v_pipeline_folder}", *chosen]
    assert (made_by(method, of_v, tmp_path).changed_parameters > 0) == (method != "none")


HALF = ["model.dtype=bfloat16", "trainer.precision=bf16-mixed"]


@pytest.mark.parametrize("method", METHODS)
def test_a_model_in_bfloat16_is_erased_too(method: str, options: list[str], tmp_path: Path) -> None:
    few = ["bank_size", "pictures", "anchor_pictures", "prior_pictures", "forget_size", "retain_size"]
    cfg = config(method, [*options, *(f"method.{key}=16" for key in few)], tmp_path, *HALF)
    edit = Edit.load(erase(cfg))
    assert (edit.changed_parameters > 0) == (instantiate(cfg.method).steps > 0)
    edit.apply(load_model(cfg.model).pipe)


@pytest.mark.parametrize("latents", ["bank", "fresh"])
def test_latents_of_a_model_in_bfloat16(latents: str, options: list[str], tmp_path: Path) -> None:
    more = [f"method.latents={latents}", "method.bank_size=16", *HALF]
    assert made_by("esd", options, tmp_path, *more).changed_parameters > 0


@pytest.mark.parametrize(
    ("method", "chosen"),
    [
        *((method, []) for method in METHODS),
        # What is drawn for the mask in a later step, and from a bank, goes on as well.
        ("trust", ["objective=cip", "beta=0.01", "mask_every=1", "mask_ema=0.5"]),
        ("trust", ["second_order=finite_difference", "latents=bank", "image=trajectory"]),
        ("esd", ["latents=fresh"]),
    ],
)
def test_stopped_after_its_first_step_and_resumed_it_makes_the_same_file(
    method: str,
    chosen: list[str],
    options: list[str],
    tmp_path: Path,
    stopping: Callable[[], AbstractContextManager[None]],
) -> None:
    more = [f"method.{option}" for option in chosen]
    whole = erase(config(method, options, tmp_path / "whole", *more)).read_bytes()
    cfg = config(method, options, tmp_path / "stopped", "checkpoint_seconds=0", *more)
    with stopping() if instantiate(cfg.method).steps else nullcontext():
        erase(cfg)
    assert erase(cfg).read_bytes() == whole


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_was_for_the_next_job_of_a_sweep(
    method: str, options: list[str], tmp_path: Path
) -> None:
    cfg = config(method, options, tmp_path)
    erase(cfg)
    (left,) = run._kept.values()
    fresh = load_model({**cfg.model, "device": "cpu"})
    for part in ("unet", "vae", "text_encoder"):
        weights, expected = (getattr(model.pipe, part).state_dict() for model in (left, fresh))
        assert weights.keys() == expected.keys()
        assert all(weights[key].equal(expected[key]) for key in expected)
        modules = list(getattr(left.pipe, part).modules())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
        assert not any(p.requires_grad or p.grad is not None for p in getattr(left.pipe, part).parameters())
    processors = {name: type(found) for name, found in left.pipe.unet.attn_processors.items()}
    assert processors == {name: type(found) for name, found in fresh.pipe.unet.attn_processors.items()}


def test_a_model_that_a_failed_run_left_is_not_used_again(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    erase(config("esd", options, tmp_path / "good"))
    assert run._kept

    def fail(*_: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr(SaveState, "on_train_batch_end", fail)
    with pytest.raises(InterruptedError):
        erase(config("esd", options, tmp_path / "bad"))
    assert not run._kept


def test_the_last_probe_is_of_the_edit_that_is_made_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[bool] = []

    def zeros(_: Evaluator, model: TextToImage, *__: Any) -> float:
        weights = torch.cat([weight.flatten() for weight in model.group("cross_attention.kv").values()])
        looks.append(float((weights == 0).float().mean()) > 0.01)
        return float(looks[-1])

    monkeypatch.setattr(Evaluator, "unlearning_accuracy", zeros)
    short = ["concept=cat", "trainer=cpu", "logger=none", "probes=2"]
    erase(compose([*short, "method=concept_prune", "method.steps=2", f"outputs={tmp_path / 'a'}"]))
    (file,) = tmp_path.glob("a/.cache/edits/*.json")
    cost = json.loads(file.read_text())
    assert looks == [False, True] and cost["seconds_to_ua95"] == cost["erase_seconds"]
    erase(compose([*short, "method=none", f"outputs={tmp_path / 'b'}"]))
    (file,) = tmp_path.glob("b/.cache/edits/*.json")
    assert json.loads(file.read_text())["seconds_to_ua95"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process knows its peak from its start only")
def test_memory_is_that_of_what_was_done_since() -> None:
    mib = 2**20
    forget_peak()
    before = peak()
    torch.ones(100 * mib)
    assert peak() > before + 350 * mib
    forget_peak()
    assert peak() < before + 50 * mib
