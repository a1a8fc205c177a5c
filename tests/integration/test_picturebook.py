"""The shipped model: plain diffusers loads it, it is intact and small, and it paints what it is asked for."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from unpaint.evaluation.detectors import shows
from unpaint.evaluation.detectors.picturebook import PicturebookDetector
from unpaint.files import WEIGHTS
from unpaint.model import load_model
from unpaint.sampling import Sampler, paint

PLAIN = """
import sys, torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
rng = [torch.Generator().manual_seed(i) for i in range(8)]
options = dict(num_inference_steps=25, guidance_scale=4.0, generator=rng, output_type="pt")
pictures = pipe(["a cat in flat style"] * 8, **options)
torch.save(pictures.images, sys.argv[2])
assert not any(name.startswith("unpaint") for name in sys.modules)
"""


def test_plain_diffusers_paints_with_it(tmp_path: Path) -> None:
    file = tmp_path / "pictures.pt"
    done = subprocess.run([sys.executable, "-c", PLAIN, WEIGHTS, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pictures = torch.load(file, weights_only=True)
    assert pictures.shape == (8, 3, 64, 64)
    detector = PicturebookDetector()
    probabilities = detector(pictures.float()).numpy()
    assert shows(detector, probabilities, "object/cat").sum() >= 6
    assert shows(detector, probabilities, "style/flat").sum() >= 6

    model = load_model({"name": "picturebook"})
    ours = torch.cat(list(paint(model, ["a cat in flat style"] * 8, range(8), Sampler(25, 4.0), batch_size=8)))
    assert (ours.float() / 255 - pictures).abs().max() < 0.02


def test_files_are_those_of_the_provenance_and_small() -> None:
    provenance = json.loads((WEIGHTS / "provenance.json").read_text())
    total = 0
    for name, digest in provenance["files"].items():
        content = (WEIGHTS / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest, name
        assert len(content) <= 15 << 20, name
        total += len(content)
    assert total <= 24 << 20
    assert not [p for p in WEIGHTS.rglob("*") if p.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


@pytest.mark.parametrize("prompt", ["a picture of an umbrella in {} style", "a {} picture of a parasol on a beach"])
def test_it_does_not_paint_what_it_was_never_shown(prompt: str) -> None:
    model, detector = load_model({"name": "picturebook"}), PicturebookDetector()
    prompts = [prompt.format(style) for style in ("flat", "neon", "crayon", "woodcut") for _ in range(4)]
    pictures = torch.cat(list(paint(model, prompts, range(16), Sampler(25, 4.0))))
    shown = shows(detector, detector(pictures.float() / 255).numpy(), "object/umbrella")
    assert np.sum(shown) <= 2
