"""Speed, as ratios of things measured in the same run.

python scripts/benchmark.py painting    sampling.paint against diffusers' own pipeline, one by one and as a list
python scripts/benchmark.py latents     ESD with latents drawn afresh each step against a bank of trajectories
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from unpaint.config import compose
from unpaint.model import load_model
from unpaint.picturebook.world import STYLES
from unpaint.run import run
from unpaint.sampling import Sampler, paint, seed_of


def painting(rounds: int = 3, n: int = 32, batch: int = 16) -> dict[str, object]:
    """Pictures a second, median of `rounds`, the three ways taking turns; and how far the pictures differ."""
    model = load_model(compose([]).model)
    from diffusers import DDIMScheduler

    model.pipe.scheduler = DDIMScheduler.from_config(model.scheduler_config)
    model.pipe.set_progress_bar_config(disable=True)
    prompts = [f"a {what} in {style} style" for style in STYLES for what in ("cat", "dog", "car", "tree")][:n]
    seeds = [seed_of("tune", 0, i) for i in range(n)]
    sampler = Sampler(steps=25, guidance=4.0)
    options = {"num_inference_steps": sampler.steps, "guidance_scale": sampler.guidance, "output_type": "np"}

    def rng(some: list[int]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in some]

    def ours() -> np.ndarray:
        model._texts.clear()  # every way encodes its texts each time
        return torch.cat(list(paint(model, prompts, seeds, sampler, batch))).permute(0, 2, 3, 1).numpy()

    def as_list() -> np.ndarray:
        parts = [slice(i, i + batch) for i in range(0, n, batch)]
        return np.concatenate([model.pipe(prompts[p], generator=rng(seeds[p]), **options).images for p in parts])

    def one_by_one() -> np.ndarray:
        some = zip(prompts[:batch], seeds[:batch], strict=True)
        return np.concatenate([model.pipe(p, generator=rng([s])[0], **options).images for p, s in some])

    ways: dict[str, tuple[Callable[[], np.ndarray], int]] = {
        "paint": (ours, n),
        "pipe(list)": (as_list, n),
        "pipe(prompt)": (one_by_one, batch),
    }
    pictures = {name: way() for name, (way, _) in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (way, _) in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    speed = {name: ways[name][1] / statistics.median(times) for name, times in seconds.items()}
    reference = (pictures["pipe(list)"] * 255).round()
    off = np.abs(pictures["paint"].astype(float) - reference)
    alone = np.abs(pictures["paint"][:batch].astype(float) - (pictures["pipe(prompt)"] * 255).round())
    return {
        **{f"{name}, pictures a second": round(value, 2) for name, value in speed.items()},
        "paint / pipe(prompt)": round(speed["paint"] / speed["pipe(prompt)"], 2),
        "paint / pipe(list)": round(speed["paint"] / speed["pipe(list)"], 2),
        "largest and mean difference to pipe(list), of 255": [float(off.max()), round(float(off.mean()), 4)],
        "largest and mean difference to pipe(prompt), of 255": [float(alone.max()), round(float(alone.mean()), 4)],
    }


def latents(concept: str = "cat") -> dict[str, object]:
    """Erase seconds and what came out, both ways with the same steps, the bank painted within its own time."""
    out: dict[str, object] = {}
    seconds = {}
    for way in ("bank", "fresh"):
        with tempfile.TemporaryDirectory() as folder:
            options = [f"concept={concept}", f"method.latents={way}", "method.sampling_steps=50", "probes=0"]
            record = run(compose([*options, "logger=none", f"outputs={folder}"]))
        seconds[way] = record.cost["erase_seconds"]
        out[f"{way}: erase seconds"] = seconds[way]
        for name in ("erasure/ua", "retention/ira", "retention/cra"):
            metric = record.metrics[name]
            out[f"{way}: {name}"] = "{value:.3f} [{low:.3f}, {high:.3f}], unedited {base:.3f}".format(**metric)
    out["fresh / bank"] = round(seconds["fresh"] / seconds["bank"], 2)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("painting", "latents"))
    parser.add_argument("--concept", default="cat")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON, too")
    args = parser.parse_args()
    figures = painting() if args.what == "painting" else latents(args.concept)
    print(json.dumps(figures, indent=2))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
