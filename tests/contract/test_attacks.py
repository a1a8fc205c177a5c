"""What holds for every attack: walks conf/attack/*, so a new attack is tested by being there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from unpaint.config import compose, conf_dir
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


def config(attack: str, pipeline: Path, outputs: Path, *more: str) -> DictConfig:
    """The attack with as little of everything as it has, on the tiny pipeline, whose pictures show nothing."""
    key = f"evaluator.attacks.{attack}"
    keys = set(compose([f"+attack@{key}={attack}"]).evaluator.attacks[attack])
    return compose(
        [
            "model=picturebook",
            f"model.path={pipeline}",
            "method=esd",
            "method.steps=1",
            "method.sampling_steps=2",
            "trainer=cpu",
            "logger=none",
            "probes=0",
            "concept.evaluation.target_pictures=2",
            "concept.evaluation.templates=['{concept} 1','{concept} 2']",
            "concept.evaluation.per_label=1",
            "evaluator.sampler.steps=2",
            "evaluator.batch_size=2",
            f"outputs={outputs}",
            f"+attack@{key}={attack}",
            *(f"{key}.{name}={value}" for name, value in SMALL.items() if name in keys),
            *more,
        ]
    )


def outcomes(outputs: Path) -> dict[str, Any]:
    files = (outputs / ".cache" / "attacks").rglob("*.json")
    found = {str(file.relative_to(outputs)): json.loads(file.read_text()) for file in files}
    return {name: {**o, "seconds": 0} if isinstance(o, dict) else o for name, o in found.items()}


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_record_holds_what_it_found_and_nothing_is_left_behind(
    attack: str, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    rng = torch.get_rng_state()
    record = run(config(attack, tiny_pipeline_folder, tmp_path / "a"))
    asr, pre = (record.metrics[f"attack/{attack}/{key}"] for key in ("asr", "pre_asr"))
    assert asr["n"] == pre["n"] == 2 and asr["value"] >= pre["value"]
    assert {"low", "high", "base", "detector", "seconds", "queries"} <= asr.keys()
    assert torch.get_rng_state().equal(rng) and torch.is_grad_enabled()
    first = outcomes(tmp_path / "a")
    assert first
    run(config(attack, tiny_pipeline_folder, tmp_path / "b"))
    assert outcomes(tmp_path / "b") == first
