"""What holds for every attack: walks conf/attack/*, so a new attack is tested by being there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from unpaint.config import compose, conf_dir, instantiate
from unpaint.edit import Edit, applied
from unpaint.errors import UserError
from unpaint.evaluation.attacks.engine import Campaign
from unpaint.model import load_model
from unpaint.run import run

ATTACKS = sorted(file.stem for file in (conf_dir() / "attack").glob("*.yaml"))
SMALL = {
    "rounds": 1,
    "iterations": 1,
    "steps": 2,
    "generations": 1,
    "population": 4,
    "candidates": 4,
    "pictures": 2,
    "pairs": 2,
    "k": 2,
    "prompts": 2,
    "after": "[1]",
    "etas": "[1.0]",
}


def config(attack: str, pipeline: Path, outputs: Path) -> DictConfig:
    """The attack with as little of everything as it has, on the tiny pipeline, whose pictures show nothing."""
    key = f"evaluator.attacks.{attack}"
    keys = set(compose([f"+attack@{key}={attack}"]).evaluator.attacks[attack])
    return compose(
        [
            f"model.path={pipeline}",
            "method.steps=1",
            "method.sampling_steps=2",
            "trainer=cpu",
            "logger=none",
            "probes=0",
            "concept.evaluation.target_pictures=2",
            "concept.evaluation.per_label=2",
            "concept.evaluation.templates=['{concept} 1','{concept} 2']",
            *(f"~metric@evaluator.metrics.{name}" for name in ("ira", "neighbours", "cra", "clip_score")),
            "evaluator.sampler.steps=2",
            "evaluator.batch_size=2",
            f"outputs={outputs}",
            f"+attack@{key}={attack}",
            *(f"{key}.{name}={value}" for name, value in SMALL.items() if name in keys),
        ]
    )


def outcomes(cache: Path) -> dict[str, Any]:
    """What was kept, but for the seconds that it took."""
    files = (cache / "attacks").rglob("*.json")
    found = {str(file.relative_to(cache)): json.loads(file.read_text()) for file in files}
    return {name: {**o, "seconds": 0} if isinstance(o, dict) else o for name, o in found.items()}


@pytest.mark.parametrize("attack", ATTACKS)
def test_it_finds_the_same_again_and_leaves_nothing_behind(
    attack: str, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    cfg = config(attack, tiny_pipeline_folder, tmp_path)
    evaluator, concept, model = instantiate(cfg.evaluator), instantiate(cfg.concept), load_model(cfg.model)
    bias = model.pipe.unet.conv_out.bias
    before = {"unet.conv_out.bias": bias.detach().clone()}
    bias.data.add_(0.5)
    edit = Edit.from_change(model.pipe, before, method="test", concept="cat", config={})
    bias.data.copy_(before["unet.conv_out.bias"])
    parts = (model.pipe.unet, model.pipe.text_encoder, model.pipe.vae)
    weights = [{key: value.clone() for key, value in part.state_dict().items()} for part in parts]
    rng, found = torch.get_rng_state(), []
    for name in ("a", "b"):
        campaign = Campaign(evaluator, model, edit, concept, 0, tmp_path / name)
        done: list[int] = []
        campaign.run(evaluator.attacks[0], progress=done.append)
        assert sum(done) == campaign.work(evaluator.attacks[0], 0, 1)
        found.append(outcomes(tmp_path / name))
    assert found[0] == found[1] and len(found[0]) >= 4
    assert campaign.scores(evaluator.attacks[0])[f"attack/{attack}/asr"]["n"] == 2
    assert applied(model.pipe) == [] and torch.is_grad_enabled() and torch.get_rng_state().equal(rng)
    for part, kept in zip(parts, weights, strict=True):
        assert all(value.equal(kept[key]) for key, value in part.state_dict().items())
        assert not any(p.requires_grad or p.grad is not None for p in part.parameters())
        assert not any(module._forward_hooks for module in part.modules())


def test_a_run_records_it(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    record = run(config("completion", tiny_pipeline_folder, tmp_path))
    asr, pre = (record.metrics[f"attack/completion/{key}"] for key in ("asr", "pre_asr"))
    assert asr["n"] == pre["n"] == 2 and asr["value"] >= pre["value"]
    assert {"low", "high", "base", "detector", "seconds", "queries"} <= asr.keys()


@pytest.mark.parametrize(
    ("attack", "option", "says"),
    [
        ("unlearn_diff", "k=200", "attack unlearn_diff: 200 free tokens do not fit"),
        ("p4d_n", "k=200", "attack p4d_n: 200 free tokens do not fit"),
        ("p4d_k", "k=200", "no free place with one after every 200"),
        ("mma", "k=200", "attack mma: k is at most"),
        ("ring_a_bell", "k=200", "attack ring_a_bell: k is at most"),
        ("completion", "after=[2]", "attack completion: after is below the sampler's 2 steps"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_erased(
    attack: str, option: str, says: str, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    cfg = config(attack, tiny_pipeline_folder, tmp_path)
    name, _, value = option.partition("=")
    cfg.evaluator.attacks[attack][name] = [2] if value == "[2]" else int(value)
    with pytest.raises(UserError, match=says):
        run(cfg)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("chosen", ["evaluator=full", "+sweep=attacks"])
def test_all_attacks_are_all(chosen: str) -> None:
    assert sorted(compose([chosen]).evaluator.attacks) == ATTACKS
