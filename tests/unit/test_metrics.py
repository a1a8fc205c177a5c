"""Metrics on hand-made logs and a hand-worked table; CLIP score against transformers by hand."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unpaint.concepts import Case
from unpaint.config import compose, instantiate
from unpaint.errors import UserError
from unpaint.evaluation.detectors import shows
from unpaint.evaluation.metrics.clip_score import ClipCosine, ClipScore
from unpaint.evaluation.metrics.rates import Rate


class Table:
    """A detector that knows five labels and is never asked to look."""

    labels = ("object/cat", "object/dog", "style/flat", "style/neon", "style/none")
    thresholds: Mapping[str, float] = {"object/cat": 0.6, "object/dog": 0.3}
    identity = "table"
    only_for = None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def test_shows_is_a_threshold_or_the_best_of_an_axis() -> None:
    log = np.array([[0.60, 0.29, 0.2, 0.5, 0.3], [0.59, 0.30, 0.4, 0.2, 0.4], [0.9, 0.9, 0.1, 0.1, 0.8]])
    assert shows(Table(), log, "object/cat").tolist() == [True, False, True]
    assert shows(Table(), log, "object/dog").tolist() == [False, True, True]
    assert shows(Table(), log, "style/neon").tolist() == [True, False, False]
    assert shows(Table(), log, "style/none").tolist() == [False, False, True]
    with pytest.raises(UserError, match=r"does not know the label 'object/catt'; did you mean object/cat\?"):
        shows(Table(), log, "object/catt")


def case(role: str, label: str, style: str) -> Case:
    return Case(f"{label} {style}", 0, {label: role, style: "cross_domain", "setting/beach": "context"}, label)


# Erasing "cat": four pictures of it, three of its neighbour dog. Probabilities: cat, dog, flat, neon, none.
CASES = [
    case("target", "object/cat", "style/flat"),
    case("target", "object/cat", "style/neon"),
    case("target", "object/cat", "style/flat"),
    case("target", "object/cat", "style/neon"),
    case("neighbour", "object/dog", "style/flat"),
    case("neighbour", "object/dog", "style/neon"),
    case("in_domain", "object/dog", "style/flat"),
]
EDITED = np.array(
    [
        [0.1, 0.9, 0.8, 0.1, 0.1],  # gone, right style
        [0.2, 0.9, 0.8, 0.1, 0.1],  # gone, wrong style
        [0.7, 0.1, 0.8, 0.1, 0.1],  # still a cat, right style
        [0.5, 0.1, 0.1, 0.8, 0.1],  # gone, right style
        [0.1, 0.9, 0.1, 0.1, 0.8],  # a dog, style lost
        [0.9, 0.2, 0.1, 0.8, 0.1],  # no dog, right style
        [0.1, 0.4, 0.8, 0.1, 0.1],  # a dog, right style
    ]
)
BASE = np.array([[0.9, 0.1, 0.8, 0.1, 0.1], [0.9, 0.1, 0.1, 0.8, 0.1]] * 2 + [[0.1, 0.9, 0.8, 0.1, 0.1]] * 3)


@pytest.mark.parametrize(
    ("name", "value", "n", "base"),
    [("ua", 3 / 4, 4, 0.0), ("ira", 2 / 3, 3, 1.0), ("neighbours", 1 / 2, 2, 1.0), ("cra", 5 / 7, 7, 6 / 7)],
)
def test_rates_on_a_hand_worked_table(name: str, value: float, n: int, base: float) -> None:
    metric: Rate = instantiate(compose().evaluator.metrics[name])
    # in two batches, as they come from the store
    parts = [[metric.part(CASES[s], log[s], Table()) for s in (slice(0, 4), slice(4, 7))] for log in (EDITED, BASE)]
    found = metric.finish(*parts)
    assert (found["value"], found["n"], found["base"]) == pytest.approx((value, n, base))
    assert found["delta"] == pytest.approx(value - base)
    assert found["low"] < value < found["high"]


def test_a_rate_refuses_roles_that_do_not_exist() -> None:
    with pytest.raises(UserError, match="did you mean target"):
        Rate("a/b", "", "", ("targt",))
    with pytest.raises(UserError, match="'shown' or 'absent'"):
        Rate("a/b", "", "", ("target",), counts="gone")


PROMPTS = ["a cat in flat style", "a dog", "a bird at night, in a long and winding description"]


def by_hand(folder: Path, pictures: torch.Tensor) -> list[float]:
    """Normalised embeddings from the two towers, one picture and one prompt at a time."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    scores = []
    for picture, prompt in zip(pictures, PROMPTS, strict=True):
        small = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((32, 32), Image.Resampling.BICUBIC)
        pixels = (torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1) / 255 - mean) / std
        tokens = tokenizer(prompt, truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            out = model(input_ids=tokens.input_ids, pixel_values=pixels[None])
        scores.append(float((out.image_embeds * out.text_embeds).sum()))
    return scores


def test_clip_score_against_transformers_by_hand(tiny_clip_folder: Path) -> None:
    pictures = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = by_hand(tiny_clip_folder, pictures)
    metric = ClipScore("", "", str(tiny_clip_folder))
    cosines = metric.reader.read(pictures, PROMPTS)
    assert cosines.tolist() == pytest.approx(expected, abs=1e-5)
    cases = [
        Case(PROMPTS[0], 0, {"object/cat": "target"}, ""),
        Case(PROMPTS[1], 0, {"object/dog": "neighbour"}, ""),
        Case(PROMPTS[2], 0, {"object/bird": "in_domain"}, ""),
    ]
    part = metric.part(cases, cosines.numpy(), Table())
    found = metric.finish([part], [part - 0.25])
    assert found["n"] == 2
    assert found["value"] == pytest.approx((expected[1] + expected[2]) / 2, abs=1e-5)
    assert (found["delta"], found["delta_low"], found["delta_high"]) == pytest.approx((0.25,) * 3)


def test_a_clip_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a transformers model"):
        ClipCosine(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="does not load"):
        ClipCosine(tmp_path).read(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a cat"])
