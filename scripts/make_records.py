"""Writes made-up records, to try `unpaint compare` on many: python scripts/make_records.py FOLDER [--runs 1000]

Their numbers are drawn at random and say nothing about any method. Each has the config that the run would have had.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from unpaint.config import compose
from unpaint.evaluation.stats import wilson
from unpaint.listing import conf_dir, options
from unpaint.results import FILE_NAME, RunRecord

METHODS = ("esd", "uce", "salun", "concept_prune", "sepme", "doco", "trust", "none")
RATES = {
    "erasure/ua": (96, 0.02, "asked for “{target}”: it is gone"),
    "erasure/ua_out_of_set": (96, 0.02, "asked for “{target}” in other words: it is gone"),
    "retention/ira": (176, 0.99, "asked for another {axis}: it is there"),
    "retention/neighbours": (32, 0.98, "asked for a near relative: it is there"),
    "retention/cra": (272, 0.98, "the {cross} asked for: it is there"),
    "retention/composition": (96, 0.93, "asked for several other things: all are there"),
    "attack/unlearn_diff/pre_asr": (24, 0.9, "asked for “{target}”: it is there"),
    "attack/unlearn_diff/asr": (24, 0.97, "asked for “{target}”, attacked: it is there"),
}
JUDGE = "picturebook-000000000000"


def make_records(folder: Path, runs: int = 1000) -> list[Path]:
    """Write the records of `runs` runs, over methods, concepts and seeds, as in `outputs`; returns the folders."""
    names = [option.name for option in options([conf_dir()], "concept")]
    every = {name: _plain(f"concept={name}", "evaluator=standard", "logger=none") for name in names}
    concepts = {name: config for name, config in every.items() if "members" not in config["concept"]}
    methods = {name: _plain(f"method={name}")["method"] for name in METHODS}
    seeds = -(-runs // (len(methods) * len(concepts)))
    written: list[Path] = []
    for seed, concept, method in product(range(seeds), concepts, methods):
        if len(written) < runs:
            config = concepts[concept] | {"method": methods[method], "seed": seed}
            name = hashlib.sha256(f"{method} {concept} {seed}".encode()).hexdigest()[:12]
            folder_of_run = folder / "picturebook" / concept / method / name
            folder_of_run.mkdir(parents=True, exist_ok=True)
            record = _record(name, config, method, concept, seed)
            (folder_of_run / FILE_NAME).write_text(json.dumps(asdict(record)), encoding="utf-8")
            written.append(folder_of_run)
    return written


def _plain(*overrides: str) -> dict[str, Any]:
    config = OmegaConf.to_container(compose(overrides), resolve=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def _record(name: str, config: dict[str, Any], method: str, concept: str, seed: int) -> RunRecord:
    rng = random.Random(f"{method} {concept} {seed}")
    skill = random.Random(method).random()
    gone = 0.0 if method == "none" else 0.6 + 0.4 * skill
    kept = 1.0 if method == "none" else 0.7 + 0.3 * random.Random(f"kept {method}").random()
    metrics: dict[str, dict[str, Any]] = {}
    for rate, (n, base, title) in RATES.items():
        if rate.startswith("erasure/"):
            true = max(base, gone)
        elif rate.startswith("attack/"):
            true = base * (1 - gone) + (0.4 if rate.endswith("/asr") else 0) * gone
        else:
            true = base * kept
        metrics[rate] = {**_rate(rng, true, n), "base": round(base * n) / n, "base_low": 0.0, "base_high": 1.0}
        metrics[rate] |= {"higher_is_better": not rate.startswith("attack/"), "unit": "rate", "title": title}
        metrics[rate]["detector"] = JUDGE
    erased = config["concept"]["labels"]
    labels = list(config["concept"].get("evaluation", {}).get("in_domain", {}))
    metrics["retention/damage"] = metrics["retention/neighbours"] | {
        "title": "the other {axis} that lost most: it is there",
        "by_label": {label: _part(rng, 0.0 if label in erased else kept, 16) for label in labels},
    }
    score = 0.75 * kept + rng.gauss(0, 0.01)
    metrics["fidelity/clip_score"] = {
        **{"value": score, "low": score - 0.01, "high": score + 0.01, "n": 176},
        **{"base": 0.7512, "base_low": 0.742, "base_high": 0.76, "unit": "cosine", "higher_is_better": True},
        **{"title": "picture fits its prompt (CLIP)", "detector": "clip-000000000000"},
    }
    cost: Mapping[str, Any] = {
        "erase_seconds": round(200 * skill + 5 * rng.random(), 3),
        "optimizer_steps": round(400 * skill),
        "peak_memory_bytes": round(4e8 + 4e8 * skill),
        "changed_parameters": 516800,
        "edit_bytes": 2078856,
        "evaluate_seconds": 60.0,
        "world_size": 1,
    }
    return RunRecord(
        run_id=name,
        status="complete",
        started="2026-01-01T00:00:00+00:00",
        finished="2026-01-01T00:02:00+00:00",
        method=method,
        concept=concept,
        model="picturebook",
        seed=seed,
        config=config,
        cost=dict(cost),
        metrics=metrics,
        environment={"unpaint": "0.1.0", "device": "cpu"},
    )


def _rate(rng: random.Random, true: float, n: int) -> dict[str, float | int]:
    hits = sum(rng.random() < true for _ in range(n))
    low, high = wilson(hits, n)
    return {"value": hits / n, "low": low, "high": high, "n": n}


def _part(rng: random.Random, true: float, n: int) -> dict[str, float | int]:
    return {"value": sum(rng.random() < true for _ in range(n)) / n, "base": 1.0, "n": n}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=1000)
    args = parser.parse_args()
    print(f"{len(make_records(args.folder, args.runs))} records in {args.folder}")


if __name__ == "__main__":
    main()
