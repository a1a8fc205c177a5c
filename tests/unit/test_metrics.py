"""Metrics on hand-made logs and a hand-worked table; CLIP score against transformers by hand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unpaint.cases import Case
from unpaint.config import compose, instantiate
from unpaint.errors import UserError
from unpaint.evaluation.detectors import shows
from unpaint.evaluation.metrics.clip_score import ClipCosine, ClipScore
from unpaint.evaluation.metrics.erase_retain import EraseRetain
from unpaint.evaluation.metrics.in_prompt import InPrompt
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
    return Case(
        f"{label} {style}",
        0,
        {label: role, style: "cross_domain", "setting/beach": "context"},
        label,
        "target" if role == "target" else "retain",
    )


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
        Rate("a/b", "", "", ("target",), ("targt",))
    with pytest.raises(UserError, match="'shown' or 'absent'"):
        Rate("a/b", "", "", ("target",), ("target",), counts="gone")


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
        Case(PROMPTS[0], 0, {"object/cat": "target"}, "", "target"),
        Case(PROMPTS[1], 0, {"object/dog": "neighbour"}, "", "retain"),
        Case(PROMPTS[2], 0, {"object/bird": "in_domain"}, "", "retain"),
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


# --- several labels, tables, what else is in the prompt --------------------------------------------------------------


def configured(name: str) -> Any:
    return instantiate(compose(["evaluator=standard"]).evaluator.metrics[name])


def paired(part: str, *labels: str) -> Case:
    role = "target" if part in ("target", "out_of_set", "implicit", "static") else "asked"
    return Case(" and ".join(labels), 0, dict.fromkeys(labels, role), part, part)


CAT, DOG = "object/cat", "object/dog"
BOTH = [0.9, 0.9, 0.1, 0.1, 0.8]
ONLY_CAT = [0.9, 0.1, 0.1, 0.1, 0.8]
ONLY_DOG = [0.1, 0.9, 0.1, 0.1, 0.8]
NONE = [0.1, 0.1, 0.1, 0.1, 0.8]
# Both together four times, each alone twice, neither (in neon style) twice.
PAIRS = [paired("target", CAT, DOG)] * 4 + [paired("first_only", CAT)] * 2 + [paired("second_only", DOG)] * 2
PAIRS += [paired("neither", "style/none")] * 2
PAIRS_BASE = np.array([BOTH, BOTH, BOTH, ONLY_CAT, ONLY_CAT, BOTH, ONLY_DOG, ONLY_DOG, NONE, NONE])
PAIRS_EDITED = np.array([ONLY_CAT, ONLY_DOG, NONE, BOTH, ONLY_CAT, NONE, ONLY_DOG, BOTH, NONE, [0.1, 0.1, 0.9, 0, 0.1]])


@pytest.mark.parametrize(
    ("name", "value", "base"),
    [
        ("ua", 3 / 4, 1 / 4),  # a picture shows the concept only if it shows both
        ("fsr", 3 / 4, 1 / 4),
        ("both", 1 / 4, 3 / 4),
        ("first_only", 1 / 2, 1.0),
        ("second_only", 1.0, 1.0),
        ("neither", 1 / 2, 1.0),
    ],
)
def test_the_two_by_two_table_by_hand(name: str, value: float, base: float) -> None:
    metric = configured(name)
    found = metric.finish(*([metric.part(PAIRS, log, Table())] for log in (PAIRS_EDITED, PAIRS_BASE)))
    assert (found["value"], found["base"]) == pytest.approx((value, base))
    assert found["n"] == (4 if name in ("ua", "fsr", "both") else 2)


def test_an_individual_concept_has_no_table() -> None:
    alone = [paired("target", CAT)]
    assert len(configured("both").part(alone, np.array([BOTH]), Table())) == 0
    assert len(configured("erase_retain").part(alone, np.array([0.3]), Table())) == 0


def test_fsr_counts_all_that_asks_for_the_concept_and_ua_one_list_each() -> None:
    cases = [paired("target", CAT), paired("out_of_set", CAT), paired("implicit", CAT), paired("static", CAT)]
    log = np.array([ONLY_CAT, NONE, NONE, ONLY_CAT])
    values = {
        name: configured(name).part(cases, log, Table()).tolist()
        for name in ("ua", "ua_out_of_set", "ua_implicit", "fsr", "static")
    }
    assert values == {
        "ua": [0.0],
        "ua_out_of_set": [1.0],
        "ua_implicit": [1.0],
        "fsr": [0.0, 1.0, 1.0],
        "static": [1.0],
    }


def test_composition_takes_all_that_was_asked_for() -> None:
    case = Case("", 0, {CAT: "asked", DOG: "asked", "style/none": "asked"}, "", "composition")
    log = np.array([BOTH, ONLY_CAT, [0.9, 0.9, 0.8, 0.1, 0.1]])
    assert configured("composition").part([case] * 3, log, Table()).tolist() == [1.0, 0.0, 0.0]


def test_damage_is_a_row_of_the_matrix() -> None:
    metric = configured("damage")
    found = metric.finish(*([metric.part(CASES, log, Table())] for log in (EDITED, BASE)))
    assert found["by_label"] == {
        CAT: {"value": 1 / 4, "base": 1.0, "n": 4},
        DOG: {"value": 2 / 3, "base": 1.0, "n": 3},
    }
    assert (found["worst"], found["value"], found["base"], found["n"]) == (DOG, 2 / 3, 1.0, 3)
    only = metric.part(CASES[:4], EDITED[:4], Table())
    assert metric.finish([only], [only])["value"] is None


def test_erase_retain_by_hand() -> None:
    metric = configured("erase_retain")
    base = np.array([0.30, 0.32, 0.34, 0.36, 0.30, 0.30, 0.28, 0.28, 0.9, 0.9])
    edited = np.array([0.20, 0.22, 0.20, 0.22, 0.29, 0.27, 0.30, 0.26, 0.0, 0.0])
    found = metric.finish([metric.part(PAIRS, edited, Table())], [metric.part(PAIRS, base, Table())])
    # forgotten: 0.33 to 0.21; retained: 0.29 to 0.28; the neither cell is no part of it
    assert found["forget_delta"] == pytest.approx(0.12)
    assert found["retain_delta"] == pytest.approx(0.01)
    assert found["value"] == pytest.approx(12.0)
    assert (found["n"], found["base"]) == (8, 0.0)
    assert found["low"] < 12 < found["high"]
    # nothing retained was lost, or it even gained: epsilon bounds the score, the sign stands beside it
    better = np.where(np.arange(10) < 4, edited, base + 0.002)
    found = metric.finish([metric.part(PAIRS, better, Table())], [metric.part(PAIRS, base, Table())])
    assert found["value"] == pytest.approx(0.12 / metric.epsilon)
    assert found["retain_delta"] == pytest.approx(-0.002)
    same = metric.part(PAIRS, base, Table())
    assert metric.finish([same], [same])["value"] == 0.0
    alone = metric.part(PAIRS[:4], base[:4], Table())
    assert metric.finish([alone], [alone])["value"] is None
    with pytest.raises(UserError, match="epsilon is above 0"):
        EraseRetain("", "", 0.0)


def test_csdr_and_in_prompt_score_by_hand() -> None:
    cases = [Case("a picture", i, {CAT: "target"}, "", "neutral") for i in range(3)]
    # columns: the picture for the prompt with the concept; the unedited model's for the prompt without it
    edited = np.array([[0.15, 0.30], [0.44, 0.40], [0.50, 0.001]])
    base = np.array([[0.27, 0.30], [0.30, 0.40], [0.10, 0.001]])
    difference, score = configured("csdr"), configured("in_prompt")
    found = difference.finish([difference.part(cases, edited, Table())], [difference.part(cases, base, Table())])
    assert found["n"] == 2  # the third has no reference to speak of
    assert found["value"] == pytest.approx((0.5 + 0.1) / 2)
    assert found["base"] == pytest.approx((0.1 + 0.25) / 2)
    found = score.finish([score.part(cases, edited, Table())], [score.part(cases, base, Table())])
    assert (found["value"], found["base"]) == pytest.approx(((0.15 + 0.44 + 0.5) / 3, (0.27 + 0.3 + 0.1) / 3))
    nothing = difference.part(cases[2:], edited[2:], Table())
    assert difference.finish([nothing], [nothing])["value"] is None
    with pytest.raises(UserError, match="measure is 'score' or 'difference'"):
        InPrompt("a/b", "", "", "ratio")
