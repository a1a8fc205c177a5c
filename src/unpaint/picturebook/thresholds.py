"""The detector's decision thresholds, set on drawings that it was not trained on."""

import numpy as np
import torch
from torch import Tensor
from transformers import ResNetForImageClassification

from unpaint.picturebook import parts
from unpaint.picturebook.data import Pictures, scenes
from unpaint.picturebook.world import OBJECTS

FALSE_POSITIVES = 0.01
CALIBRATION = slice(0, 2000)
TESTING = slice(2000, 4000)


def calibrated(detector: ResNetForImageClassification, pictures: Pictures) -> dict[str, float]:
    """For each object the probability that 1 % of the pictures without it exceed, or 0.5 if that is more."""
    probabilities = look(detector, pictures, CALIBRATION)[:, parts.slices()["object"]].sigmoid()
    of = list(scenes("held_out"))[CALIBRATION]
    found = {}
    for i, name in enumerate(OBJECTS):
        without = torch.tensor([name not in scene.objects for scene in of])
        level = float(torch.quantile(probabilities[without, i], 1 - FALSE_POSITIVES))
        found[f"object/{name}"] = round(max(0.5, level), 4)
    return found


def look(detector: ResNetForImageClassification, pictures: Pictures, rows: slice) -> Tensor:
    """Logits (n, labels) of some drawings."""
    device, out = detector.device, []
    with torch.inference_mode():
        for i in range(rows.start, rows.stop, 100):
            x = parts.as_input(pictures.take(np.arange(i, i + 100)), device)
            out.append(detector(x.to(detector.dtype)).logits.float().cpu())
    return torch.cat(out)
