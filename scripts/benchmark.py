"""Speed, as ratios of things measured in the same run.

python scripts/benchmark.py painting    sampling.paint against diffusers' own pipeline, one by one and as a list
python scripts/benchmark.py latents     ESD with latents drawn afresh each step against stored and moving trajectories
python scripts/benchmark.py methods     seconds to UA 95 % of every method, and in all, against TRUST's
python scripts/benchmark.py erasing     peak memory of erasing by every method, against UCE's
python scripts/benchmark.py memory      peak memory of scoring 10,000 pictures against that of scoring 100
python scripts/benchmark.py ranks       an evaluation by one process against two, one thread each; and what they find
python scripts/benchmark.py sweep       the first job of a sweep against the second, which shares what is the same
python scripts/benchmark.py attacks --edit FILE   UnlearnDiffAtk on many prompts at once against one at a time
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unpaint.cases import Case
from unpaint.config import compose, instantiate
from unpaint.edit import Edit
from unpaint.evaluation.attacks.engine import Campaign
from unpaint.evaluation.metrics.clip_score import ClipScore
from unpaint.evaluation.metrics.diversity import Diversity
from unpaint.evaluation.metrics.fid import Fid
from unpaint.evaluation.metrics.kid import Kid
from unpaint.evaluation.metrics.rates import Rate
from unpaint.evaluation.metrics.same_seed import SameSeed
from unpaint.evaluation.pictures import PictureStore, batches_of
from unpaint.evaluation.suite import Evaluator
from unpaint.memory import peak
from unpaint.methods.esd import GROUPS as ESD_VARIANTS
from unpaint.model import load_model
from unpaint.picturebook.world import STYLES
from unpaint.run import run
from unpaint.sampling import Sampler, paint
from unpaint.seeds import seed_of


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
    """Erase seconds and what came out, all ways with the same steps of training, on a grid of 50 noise levels; what a
    way paints or denoises beforehand is within its time."""
    out: dict[str, object] = {}
    seconds = {}
    for way in ("student", "bank", "fresh"):
        with tempfile.TemporaryDirectory() as folder:
            options = [f"concept={concept}", f"method.latents={way}", "method.sampling_steps=50", "probes=0"]
            record = run(compose([*options, "logger=none", f"outputs={folder}"]))
        seconds[way] = record.cost["erase_seconds"]
        out[f"{way}: erase seconds"] = seconds[way]
        for name in ("erasure/ua", "retention/ira", "retention/cra"):
            metric = record.metrics[name]
            out[f"{way}: {name}"] = "{value:.3f} [{low:.3f}, {high:.3f}], unedited {base:.3f}".format(**metric)
    for way in ("student", "bank"):
        out[f"fresh / {way}"] = round(seconds["fresh"] / seconds[way], 2)
    return out


METHODS = {
    "trust": ["method=trust"],
    **{f"esd {variant}": ["method=esd", f"method.variant={variant}"] for variant in ESD_VARIANTS},
    **{name: [f"method={name}"] for name in ("salun", "doco", "sepme", "uce", "concept_prune")},
}


def methods(concept: str = "cat") -> dict[str, object]:
    """Erase seconds until UA first reaches 95 % (looked for 20 times on the way) and in all, each from nothing: what
    another run has painted is not used. `never`: the probes did not see 95 %."""
    only_ua = [
        "logger=none",
        *(f"~metric@evaluator.metrics.{name}" for name in ("ira", "cra", "neighbours", "clip_score")),
    ]
    out: dict[str, object] = {}
    until: dict[str, float | None] = {}
    for name, options in METHODS.items():
        with tempfile.TemporaryDirectory() as folder:
            record = run(compose([*options, *only_ua, f"concept={concept}", "probes=20", f"outputs={folder}"]))
        until[name] = record.cost["seconds_to_ua95"]
        out[f"{name}: seconds to UA 95 %"] = until[name] or "never"
        out[f"{name}: erase seconds"] = record.cost["erase_seconds"]
        ua = record.metrics["erasure/ua"]
        out[f"{name}: erasure/ua"] = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**ua)
    own = until.pop("trust")
    for name, seconds in until.items():
        out[f"{name} / trust"] = round(seconds / own, 2) if seconds and own else "one of them never"
    return out


def erasing(concept: str = "cat") -> dict[str, object]:
    """Peak MiB of a process that erases, without probes, and of its own for each method, so that none finds what
    another left. The model is in it."""
    peaks = {}
    for name, options in METHODS.items():
        with tempfile.TemporaryDirectory() as folder:
            common = [f"concept={concept}", "probes=0", "logger=none", "trainer=cpu", f"outputs={folder}"]
            _unpaint("erase", *options, *common)
            (file,) = Path(folder).glob(".cache/edits/*.json")
            peaks[name] = json.loads(file.read_text())["peak_memory_bytes"] / 2**20
    return {
        **{f"{name}: peak MiB": round(mib) for name, mib in peaks.items()},
        **{f"{name} / uce": round(mib / peaks["uce"], 2) for name, mib in peaks.items()},
    }


class Cheap:
    """A detector and a reader in one, that costs next to nothing: 160 numbers from an 8 x 8 thumbnail."""

    labels: Sequence[str] = ("object/cat", "object/dog")
    thresholds: Mapping[str, float] = {"object/cat": 0.5, "object/dog": 0.5}
    only_for = None

    def __init__(self, width: int) -> None:
        self.identity = f"cheap-{width}"
        self.mix = torch.randn(192, width, generator=torch.Generator().manual_seed(0))

    def read(self, pictures: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        small = torch.nn.functional.avg_pool2d(pictures.float() / 255, pictures.shape[-1] // 8)
        return (small.flatten(1) - 0.5) @ self.mix

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.read(images * 255, []).sigmoid()


def score_made_up(n: int, kid: bool) -> dict[str, float]:
    """Score n pictures of random numbers, and as many unedited ones and references; seconds and peak MiB of this
    process before and after."""
    features, detector = Cheap(160), Cheap(2)
    clip = ClipScore("", "")
    metrics: dict[str, Any] = {
        "ua": Rate("erasure/ua", "", "", ("target",), ("target",), counts="absent"),
        "ira": Rate("retention/ira", "", "", ("retain",), ("in_domain",)),
        "clip": clip,
        "fid": Fid("", "", features),
        "seed": SameSeed("", "", features),
        "diversity": Diversity("", "", features),
    }
    if kid:
        metrics["kid"] = Kid("", "", features)
    evaluator = Evaluator(metrics, detector, Sampler())
    wants = ({"object/cat": "target"}, {"object/dog": "in_domain"})
    batches = batches_of(
        [Case(f"{i}", i, wants[i % 4 > 0], f"{i % 4}", ("target", "retain")[i % 4 > 0]) for i in range(n)],
        16,
        evaluator.sampler,
    )
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        store = PictureStore(Path(folder))
        for batch in (*batches, *evaluator.references(batches)):
            for key in ("base", "edited"):
                shape = (len(batch.cases), 3, 64, 64)
                store.keep_pictures(key, batch, torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))
                store.keep_reading(key, clip.reader.identity, batch, torch.rand(shape[:1], generator=generator))
        before, started = round(peak() / 2**20, 1), time.perf_counter()
        found = evaluator.score(store, "edited", "base", batches)
        seconds = time.perf_counter() - started
    assert found["retention/ira"]["n"] > n // 2
    return {"seconds": round(seconds, 1), "peak MiB before": before, "peak MiB": round(peak() / 2**20, 1)}


def memory() -> dict[str, object]:
    """Each in a process of its own. KID's kernels are of at most 1,000 pictures at a time."""
    out: dict[str, object] = {}
    for kid in (False, True):
        peaks = {}
        for n in (100, 10_000):
            code = f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import benchmark; "
            code += f"print(json.dumps(benchmark.score_made_up({n}, {kid})))"
            done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
            figures = json.loads(done.stdout.splitlines()[-1])
            out[f"{n} pictures{', with KID' if kid else ''}"] = figures
            peaks[n] = figures["peak MiB"]
        out[f"10000 / 100{', with KID' if kid else ''}"] = round(peaks[10_000] / peaks[100], 3)
    return out


def ranks(rounds: int = 3, *more: str) -> dict[str, object]:
    """Seconds of painting and scoring the edited model's pictures, median of `rounds`, the two ways taking turns."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    metrics: dict[int, dict[str, float]] = {}
    options = ["trainer.accelerator=cpu", "logger=none", "+metric@evaluator.metrics.fid=fid", *more]
    with tempfile.TemporaryDirectory() as folder:
        _unpaint("erase", "method=uce", "trainer=cpu", "logger=none", "probes=0", f"outputs={folder}/edit")
        (edit,) = Path(folder, "edit").glob("*/*/*/*/edit.safetensors")
        for i in range(rounds):
            for world in (1, 2):
                outputs = Path(folder, f"{world}-{i}")
                trainer = ["trainer=ddp", "trainer.devices=2"] if world == 2 else ["trainer=cpu"]
                _unpaint("evaluate", f"edit={edit}", *trainer, *options, f"outputs={outputs}")
                (file,) = outputs.glob("*/*/*/*/record.json")
                record = json.loads(file.read_text())
                assert record["cost"]["world_size"] == world
                seconds[world].append(record["cost"]["evaluate_seconds"])
                metrics[world] = {name: metric["value"] for name, metric in record["metrics"].items()}
    median = {world: statistics.median(times) for world, times in seconds.items()}
    return {
        "one process, seconds": seconds[1],
        "two processes, seconds": seconds[2],
        "one / two": round(median[1] / median[2], 2),
        "metrics that differ": {
            name: [metrics[1][name], value] for name, value in metrics[2].items() if value != metrics[1][name]
        },
        "FID": [metrics[world]["fidelity/fid"] for world in (1, 2)],
    }


def _unpaint(*arguments: str) -> None:
    """The command, in a process of its own, with one thread; Lightning's processes inherit that."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "unpaint", *arguments], env=environment, check=True, stdout=subprocess.PIPE)


def sweep(*more: str) -> dict[str, object]:
    """Three jobs of one process: a method, the same with another rate, and the same on another object. `processor`:
    what they took of it, all threads together, whatever else the machine does."""
    jobs = {"first": ["method.lr=1e-3"], "other rate": ["method.lr=2e-3"], "other object": ["concept=dog"]}
    out: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in jobs.items():
            started, processor = time.perf_counter(), time.process_time()
            record = run(compose([*options, "probes=0", "logger=none", f"outputs={folder}", *more]))
            out[name] = {
                "seconds": round(time.perf_counter() - started, 1),
                "processor": round(time.process_time() - processor, 1),
                "of that erasing": record.cost["erase_seconds"],
            }
    return out


def attacks(edit: Path, n: int = 16, *more: str) -> dict[str, object]:
    """UnlearnDiffAtk on an edit, in batches of 16 and one by one: seconds a picture tried, with the steps before it,
    and what both found. `processor`: what the search took of it, all threads together, whatever else the machine does;
    its ratio is that of the seconds with one thread, and leaves out what more threads bring."""
    name = "unlearn_diff"
    header = Edit.load(edit).header
    figures: dict[str, Any] = {"threads": torch.get_num_threads()}
    for size in (n, 1):
        chosen = [
            f"concept={header.concept}",
            f"+attack@evaluator.attacks.{name}={name}",
            f"evaluator.batch_size={size}",
        ]
        key = f"evaluator.attacks.{name}"
        cfg = compose([*chosen, f"{key}.prompts={n}", f"{key}.at_n=1", f"{key}.max_seconds=1e6", *more])
        evaluator, model = instantiate(cfg.evaluator), load_model(cfg.model)
        with tempfile.TemporaryDirectory() as cache:
            campaign = Campaign(evaluator, model, Edit.load(edit), instantiate(cfg.concept), 0, Path(cache))
            # What the search starts from is there before it, as after an evaluation.
            campaign.run(dataclasses.replace(evaluator.attacks[0], rounds=0))
            started, processor = time.perf_counter(), time.process_time()
            campaign.run(evaluator.attacks[0])
            seconds, processor = time.perf_counter() - started, time.process_time() - processor
            scores = campaign.scores(evaluator.attacks[0])
        asr = scores[f"attack/{name}/asr"]
        figures["batched" if size > 1 else "one by one"] = {
            "seconds": seconds,
            "processor": processor,
            "seconds_a_picture_tried": seconds / max(1, asr["queries"]),
            "processor_a_picture_tried": processor / max(1, asr["queries"]),
            **{key: asr[key] for key in ("value", "low", "high", "n", "queries")},
        }
    one, many = figures["one by one"], figures["batched"]
    figures["times_as_fast"] = one["seconds_a_picture_tried"] / many["seconds_a_picture_tried"]
    figures["times_less_processor"] = one["processor_a_picture_tried"] / many["processor_a_picture_tried"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", choices=("painting", "latents", "methods", "erasing", "memory", "ranks", "sweep", "attacks")
    )
    parser.add_argument("--concept", default="cat")
    parser.add_argument("--edit", type=Path, help="for attacks: the file of an edit of the built-in model")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON, too")
    parser.add_argument(
        "--override", nargs="*", default=[], help="of ranks, sweep and attacks: config overrides, for a smaller run"
    )
    args = parser.parse_args()
    ways: dict[str, Callable[[], dict[str, object]]] = {
        "painting": painting,
        "latents": lambda: latents(args.concept),
        "methods": lambda: methods(args.concept),
        "erasing": lambda: erasing(args.concept),
        "memory": memory,
        "ranks": lambda: ranks(3, *args.override),
        "sweep": lambda: sweep(*args.override),
        "attacks": lambda: attacks(args.edit, 16, *args.override),
    }
    if args.what == "attacks" and args.edit is None:
        parser.error("attacks needs an edit: --edit FILE")
    figures = ways[args.what]()
    print(json.dumps(figures, indent=2))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
