"""How good Picturebook is: the detector on drawings, CLIP on captions, and what the shipped pipeline paints."""

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from unpaint.evaluation.detectors import shows
from unpaint.evaluation.detectors.picturebook import PicturebookDetector
from unpaint.evaluation.stats import wilson
from unpaint.model import load_model
from unpaint.picturebook import parts
from unpaint.picturebook.captions import SETTING_PHRASES, article, caption, out_of_set_prompts
from unpaint.picturebook.data import Pictures, scenes
from unpaint.picturebook.thresholds import TESTING
from unpaint.picturebook.world import OBJECTS, PAINTABLE, SETTINGS, STYLES, Scene
from unpaint.progress import bar
from unpaint.sampling import Sampler, paint
from unpaint.seeds import seed_of

SAMPLER = Sampler(steps=25, guidance=4.0)
BATCH = 32


@dataclass(frozen=True)
class Line:
    """One line of the quality table: hits out of n, and the goal. The interval is Wilson's if none is given."""

    what: str
    hits: float
    n: int
    goal: float | None
    at_most: bool = False
    interval: tuple[float, float] | None = None

    @property
    def value(self) -> float:
        return self.hits / self.n

    @property
    def met(self) -> bool:
        if self.goal is None:
            return True
        return self.value <= self.goal if self.at_most else self.value >= self.goal


@dataclass(frozen=True)
class Asked:
    """A picture to paint, and the labels it must show."""

    prompt: str
    labels: tuple[str, ...]


def check(weights: Path, drawings: Path, per_object: int = 104) -> list[Line]:
    """Measures everything, prints the table and writes it to `weights/quality.json`."""
    detector = PicturebookDetector(str(weights / "detector"))
    lines = on_drawings(detector, Pictures("held_out", drawings))
    lines += [retrieval(weights / "clip", Pictures("held_out", drawings))]
    lines += on_paintings(detector, weights, per_object)
    rows = [{"what": a.what, "value": round(a.value, 4), **_interval(a), "n": a.n, "goal": a.goal} for a in lines]
    sampler = {"steps": SAMPLER.steps, "guidance": SAMPLER.guidance}
    (weights / "quality.json").write_text(json.dumps({"sampler": sampler, "lines": rows}, indent=2) + "\n")
    sheet(weights)
    show(lines)
    return lines


def _interval(line: Line) -> dict[str, float]:
    low, high = line.interval or wilson(round(line.hits), line.n)
    return {"low": round(low, 4), "high": round(high, 4)}


def show(lines: Iterable[Line]) -> None:
    table = Table(title="Picturebook")
    for heading in ("what", "value", "95 % interval", "n", "goal", ""):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for line in lines:
        sign = "<=" if line.at_most else ">="
        interval = _interval(line)
        value, between = f"{line.value:.1%}", f"{interval['low']:.1%} – {interval['high']:.1%}"
        goal = "" if line.goal is None else f"{sign} {line.goal:.0%}"
        table.add_row(line.what, value, between, str(line.n), goal, "" if line.met else "missed")
    Console().print(table)


# --- drawings -------------------------------------------------------------------------------------------------------


def on_drawings(detector: PicturebookDetector, pictures: Pictures) -> list[Line]:
    """Accuracy of each axis on single scenes, and F1 of the objects on pairs."""
    of = list(scenes("held_out"))[TESTING]
    seen = []
    for i in range(TESTING.start, TESTING.stop, 100):
        x = torch.from_numpy(pictures.take(np.arange(i, i + 100))).permute(0, 3, 1, 2).float() / 255
        seen.append(detector(x).numpy())
    probabilities = np.concatenate(seen)
    labels, lines = list(detector.labels), []
    single = [i for i, scene in enumerate(of) if len(scene.objects) == 1]
    of_axis: dict[str, Callable[[Scene], str]] = {
        "object": lambda scene: scene.objects[0],
        "style": lambda scene: scene.style,
        "setting": lambda scene: scene.setting,
        "relation": lambda scene: scene.relation,
    }
    for axis, right in of_axis.items():
        own = [i for i, label in enumerate(labels) if label.startswith(f"{axis}/")]
        best = [labels[own[i]] for i in probabilities[:, own].argmax(axis=1)]
        rows = single if axis == "object" else range(len(of))
        found = sum(best[i] == f"{axis}/{right(of[i])}" for i in rows)
        lines.append(Line(f"drawings: {axis}", found, len(rows), 0.98))
    said = np.stack([shows(detector, probabilities, f"object/{name}") for name in OBJECTS], axis=1)
    true = np.array([[name in scene.objects for name in OBJECTS] for scene in of])
    wrong = int((said & ~true).sum())
    lines.append(Line("drawings: object seen that is not there", wrong, int((~true).sum()), 0.01, at_most=True))
    pairs = [i for i, scene in enumerate(of) if len(scene.objects) == 2]
    hits, counted = 2 * (said & true)[pairs].sum(axis=1), (said.sum(axis=1) + true.sum(axis=1))[pairs]
    draws = np.random.default_rng(0).integers(0, len(pairs), (2000, len(pairs)))
    low, high = np.quantile(hits[draws].sum(axis=1) / counted[draws].sum(axis=1), (0.025, 0.975))
    bootstrapped = (float(low), float(high))
    f1 = Line("drawings: F1 of objects on pairs", float(hits.sum()), int(counted.sum()), 0.97, interval=bootstrapped)
    lines.append(f1)
    return lines


def retrieval(folder: Path, pictures: Pictures, among: int = 100, rounds: int = 10) -> Line:
    """Top-1 retrieval of a held-out picture's caption (held-out templates, everything named) among `among`."""
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)
    of = list(scenes("held_out"))
    rng, hits = random.Random("retrieval"), 0
    for round_ in range(rounds):
        rows = np.arange(TESTING.start + round_ * among, TESTING.start + (round_ + 1) * among)
        texts = [caption(of[i], rng, templates="held_out", name="any") for i in rows]
        ids = tokens(texts, padding="max_length", max_length=24, truncation=True, return_tensors="pt").input_ids
        with torch.inference_mode():
            x = parts.as_input(pictures.take(rows), torch.device("cpu"))
            picture = F.normalize(parts.projected(clip.get_image_features(pixel_values=x)), dim=-1)
            text = F.normalize(parts.projected(clip.get_text_features(input_ids=ids)), dim=-1)
        hits += int((((picture @ text.T).argmax(dim=1)) == torch.arange(among)).sum())
    return Line("CLIP: caption found among 100", hits, among * rounds, 0.80)


# --- paintings ------------------------------------------------------------------------------------------------------


def on_paintings(detector: PicturebookDetector, weights: Path, per_object: int) -> list[Line]:
    """What the pipeline paints, judged by the detector."""
    sets = {
        "single": list(single(per_object)),
        "pairs": list(pairs(216)),
        "on a table": list(on_a_table(216)),
        "words": list(out_of_set()),
        "umbrella": [
            Asked(a.prompt.replace("a cat", "an umbrella"), ("object/umbrella",)) for a in single(104, ("cat",))
        ],
    }
    shown = painted(detector, weights, sets)
    by_label: dict[str, list[bool]] = defaultdict(list)
    for asked, seen in zip(sets["single"], shown["single"], strict=True):
        for label in asked.labels:
            by_label[label].append(seen[label])
    lines = []
    for axis, names, mean, least in (
        ("object", PAINTABLE, 0.95, 0.90),
        ("style", STYLES, 0.95, 0.88),
        ("setting", SETTINGS, 0.95, None),
    ):
        every = [hit for name in names for hit in by_label[f"{axis}/{name}"]]
        lines.append(Line(f"painted: {axis}s, all", sum(every), len(every), mean))
        lines += [
            Line(f"painted: {name}", sum(by_label[f"{axis}/{name}"]), len(by_label[f"{axis}/{name}"]), least)
            for name in names
        ]
    goals = {"pairs": ("two objects, both found", 0.85), "on a table": ("on a table", 0.85)}
    goals["words"] = ("test synonyms and descriptions", 0.80)
    for name, (what, goal) in goals.items():
        hits = sum(all(seen.values()) for seen in shown[name])
        lines.append(Line(f"painted: {what}", hits, len(shown[name]), goal))
    hits = sum(seen["object/umbrella"] for seen in shown["umbrella"])
    lines.append(Line("painted: umbrella, never shown", hits, len(shown["umbrella"]), 0.05, at_most=True))
    return lines


def painted(
    detector: PicturebookDetector, weights: Path, sets: dict[str, list[Asked]]
) -> dict[str, list[dict[str, bool]]]:
    """For each picture of each set: label asked for -> whether it is there."""
    model = load_model({"name": "picturebook", "path": str(weights)})
    advance = bar("painting", sum(map(len, sets.values())))
    out = {}
    for name, asked in sets.items():
        seeds = [seed_of("score", 0, i) for i in range(len(asked))]
        prompts = [a.prompt for a in asked]
        batches = paint(model, prompts, seeds, SAMPLER, BATCH, progress=advance)
        probabilities = np.concatenate(
            [detector(batch.to(model.device).float() / 255).cpu().numpy() for batch in batches]
        )
        hits = {label: shows(detector, probabilities, label) for label in {x for a in asked for x in a.labels}}
        out[name] = [{label: bool(hits[label][row]) for label in a.labels} for row, a in enumerate(asked)]
    return out


def sheet(weights: Path, cell: int = 96) -> None:
    """Every object in every style, painted by the pipeline, as `samples.png` beside the weights."""
    model = load_model({"name": "picturebook", "path": str(weights)})
    settings = tuple(SETTING_PHRASES)
    prompts = []
    for row, thing in enumerate(PAINTABLE):
        for column, style in enumerate(STYLES):
            place = SETTING_PHRASES[settings[(row + column) % len(settings)]][0]
            prompts.append(f"{article(thing)} in {style} style {place}".strip())
    seeds = [seed_of("score", 1, i) for i in range(len(prompts))]
    pictures = torch.cat(list(paint(model, prompts, seeds, SAMPLER, BATCH)))
    page = Image.new("RGB", (cell * len(STYLES), cell * len(PAINTABLE)))
    for i, picture in enumerate(pictures):
        one = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
        place_at = (cell * (i % len(STYLES)), cell * (i // len(STYLES)))
        page.paste(one.resize((cell, cell), Image.Resampling.LANCZOS), place_at)
    page.save(weights / "samples.png", optimize=True)


def _captioned(scene: Scene, rng: random.Random, labels: Callable[[Scene], Iterable[str]]) -> Asked:
    return Asked(caption(scene, rng, templates="all", name="plain"), tuple(labels(scene)))


def single(per_object: int, objects: tuple[str, ...] = PAINTABLE) -> Iterable[Asked]:
    """Each object alone, in all styles and settings in turn."""
    rng = random.Random("single")
    for i in range(per_object):
        for k, name in enumerate(objects):
            style, setting = STYLES[i % len(STYLES)], SETTINGS[(i // len(STYLES) + i + k) % len(SETTINGS)]
            yield _captioned(Scene((name,), style, setting, "alone", 0), rng, _all_of)


def _all_of(scene: Scene) -> list[str]:
    return [*(f"object/{name}" for name in scene.objects), f"style/{scene.style}", f"setting/{scene.setting}"]


def pairs(count: int) -> Iterable[Asked]:
    rng = random.Random("pairs")
    for i in range(count):
        two = tuple(rng.sample(PAINTABLE, 2))
        scene = Scene(two, STYLES[i % len(STYLES)], rng.choice(SETTINGS), "next to", 0)
        yield _captioned(scene, rng, lambda s: [f"object/{name}" for name in s.objects])


def on_a_table(count: int) -> Iterable[Asked]:
    rng = random.Random("on a table")
    for i in range(count):
        scene = Scene((PAINTABLE[i % 12],), STYLES[i % len(STYLES)], rng.choice(SETTINGS), "on a table", 0)
        yield _captioned(scene, rng, lambda s: [f"object/{s.objects[0]}", "relation/on a table"])


def out_of_set() -> Iterable[Asked]:
    """`test` synonyms and descriptions: 20 of each object's 40 prompts, in any style."""
    rng = random.Random("out of set")
    for name in PAINTABLE:
        for prompt in rng.sample(out_of_set_prompts(name), 20):
            yield Asked(prompt, (f"object/{name}",))
