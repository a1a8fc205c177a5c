"""Aligners against the judges that they have to agree with, and against finite differences."""

from pathlib import Path
from typing import Any

import pytest
import torch

from unpaint.aligners.clip import ClipAligner, preprocessed
from unpaint.aligners.detector import DetectorAligner
from unpaint.errors import UserError
from unpaint.evaluation.detectors.picturebook import PicturebookDetector
from unpaint.evaluation.metrics.clip_score import ClipCosine

PROMPTS = ["a cat", "a dog at night"]


def grey_values(n: int, height: int, width: int) -> torch.Tensor:
    # Smooth, as pictures are.
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (fine * 255).round().to(torch.uint8)


def test_clip_agrees_with_the_metric(tiny_clip_folder: Path) -> None:
    pictures = grey_values(2, 64, 64)
    aligner = ClipAligner(str(tiny_clip_folder))
    expected = ClipCosine(tiny_clip_folder).read(pictures, PROMPTS)
    # 64 to 32 pixels: the processor rounds to whole grey values on the way, the aligner does not.
    torch.testing.assert_close(aligner(pictures / 255, PROMPTS), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("size", "crop", "resample"),
    [
        ({"shortest_edge": 24}, {"height": 24, "width": 24}, 3),
        ({"shortest_edge": 33}, {"height": 20, "width": 25}, 2),
        ({"height": 30, "width": 17}, {"height": 32, "width": 14}, 3),
    ],
)
def test_preprocessing_is_the_processors(size: Any, crop: Any, resample: int) -> None:
    from transformers import CLIPImageProcessorPil

    pictures = grey_values(2, 60, 48)
    processor = CLIPImageProcessorPil(size=size, crop_size=crop, resample=resample)
    images = [picture.permute(1, 2, 0).numpy() for picture in pictures]
    expected = processor(images=images, return_tensors="pt", input_data_format="channels_last").pixel_values
    config = {key: value for key, value in processor.to_dict().items() if value is not None}
    found = preprocessed(pictures / 255, config)
    assert found.shape == expected.shape
    # One grey value is 1 / 255 / std, about 0.015.
    assert (found - expected).abs().max() < 0.02


def test_an_unknown_filter_is_refused() -> None:
    with pytest.raises(UserError, match="filter 5"):
        preprocessed(torch.zeros(1, 3, 8, 8), {"size": {"shortest_edge": 4}, "resample": 5})


def test_no_clip_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a transformers model"):
        ClipAligner(str(tmp_path))


@pytest.mark.parametrize("label", ["object/cat", "style/mosaic"])
def test_detector_scores_rise_with_the_detectors_probability(label: str, tiny_detector_folder: Path) -> None:
    detector = PicturebookDetector(str(tiny_detector_folder))
    images = (grey_values(4, 64, 64) / 255).requires_grad_(True)
    scores = DetectorAligner([label], str(tiny_detector_folder))(images, ["unread"] * 4)
    probabilities = detector(images)[:, detector.labels.index(label)]
    expected = scores.sigmoid() if label.startswith("object/") else scores.exp()
    torch.testing.assert_close(expected, probabilities, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.any() and gradient.isfinite().all()


def test_detector_does_not_know_the_label(tiny_detector_folder: Path) -> None:
    with pytest.raises(UserError, match="did you mean object/cat"):
        DetectorAligner(["object/cats"], str(tiny_detector_folder))
