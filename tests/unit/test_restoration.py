"""Relearning and the subset matrix on a tiny pipeline: what they report, and that they leave no trace."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unpaint.concepts import Concept
from unpaint.edit import Edit, applied
from unpaint.errors import UserError
from unpaint.evaluation.metrics.rates import Rate
from unpaint.evaluation.restoration import Relearning, _loss, _trainable, relearn, subsets
from unpaint.evaluation.suite import Evaluator
from unpaint.model import TextToImage, load_model
from unpaint.sampling import Sampler, paint

OPTIONS = Relearning(pictures=2, lr=1e-3, steps=4, every=2, batch_size=2, judged=6)


class Colours:
    """A cat is green and a dog is red: the mean of that colour is the probability."""

    labels: Sequence[str] = ("object/cat", "object/dog")
    identity = "colours"
    only_for = None

    def __init__(self, cat: float, dog: float = 0.5) -> None:
        self.thresholds: Mapping[str, float] = {"object/cat": cat, "object/dog": dog}

    def __call__(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))[:, [1, 0]]


def concept(word: str = "cat") -> Concept:
    evaluation: Any = {
        "templates": ["{concept} {n}"],
        "slots": {"n": {f"n/{i}": str(i) for i in range(6)}},
        "target_pictures": 6,
    }
    return Concept(
        name=word,
        kind="individual",
        axis="object",
        labels=(f"object/{word}",),
        target=f"a {word}",
        anchor="a thing",
        templates=("{concept}", "one {concept}"),
        evaluation=evaluation,
    )


def evaluator(detector: Colours) -> Evaluator:
    return Evaluator(
        {"ua": Rate("erasure/ua", "", "", ("target",), ("target",))}, detector, Sampler(steps=2, guidance=1), 4
    )


@pytest.fixture(scope="module")
def model(tiny_pipeline_folder: Path) -> TextToImage:
    return load_model({"name": "tiny", "path": str(tiny_pipeline_folder), "device": "cpu"})


def change(model: TextToImage, name: str, factor: float) -> Edit:
    """The edit that multiplies one of the UNet's tensors."""
    key = f"unet.{name}"
    weight = dict(model.pipe.unet.named_parameters())[name]
    before = weight.detach().clone()
    weight.mul_(factor)
    edit = Edit.from_change(model.pipe, {key: before}, method="test", concept="cat", config={})
    weight.copy_(before)
    return edit


def bits(model: TextToImage) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.pipe.unet.state_dict().items()}


def greens(model: TextToImage) -> list[float]:
    cases = concept().cases(0)
    pictures = torch.cat(list(paint(model, [c.prompt for c in cases], [c.seed for c in cases], Sampler(2, 1), 4)))
    return (pictures.float() / 255).mean(dim=(2, 3))[:, 1].tolist()


@pytest.fixture(scope="module")
def ungreen(model: TextToImage) -> Edit:
    """Shifts the noise that is predicted by 3: pictures lose their green, of which a cat has 0.48 or more."""
    bias = model.pipe.unet.conv_out.bias
    before = bias.detach().clone()
    bias.data.add_(3)
    edit = Edit.from_change(model.pipe, {"unet.conv_out.bias": before}, method="test", concept="cat", config={})
    bias.data.copy_(before)
    return edit


def test_an_edit_that_does_nothing_is_relearned_in_no_step(model: TextToImage) -> None:
    edit = change(model, "conv_out.weight", 1.0001)
    found = relearn(model, edit, concept(), evaluator(Colours(cat=0.0)), 0, OPTIONS)
    assert (found["value"], found["relearned"], found["shown"], found["n"]) == (0, True, 1.0, 6)
    assert [point[:2] for point in found["curve"]] == [[0, 1.0]]


def test_what_does_not_come_back_has_a_curve_to_the_end_and_the_model_its_bits(
    model: TextToImage, ungreen: Edit
) -> None:
    before, rng = bits(model), torch.get_rng_state()
    steps: list[int] = []
    found = relearn(model, ungreen, concept(), evaluator(Colours(cat=0.48)), 0, OPTIONS, steps.append)
    assert (found["value"], found["relearned"], found["shown"]) == (4, False, 1.0)
    assert [point[:2] for point in found["curve"]] == [[0, 0.0], [2, 0.0], [4, 0.0]]
    assert sum(steps) == 4
    assert all(torch.equal(value, before[key]) for key, value in model.pipe.unet.state_dict().items())
    assert applied(model.pipe) == []
    assert not any(p.requires_grad or p.grad is not None for p in model.pipe.unet.parameters())
    assert torch.equal(torch.get_rng_state(), rng)
    assert relearn(model, ungreen, concept(), evaluator(Colours(cat=0.48)), 0, OPTIONS) == found


def test_what_was_pushed_aside_comes_back(model: TextToImage, ungreen: Edit) -> None:
    options = Relearning(pictures=2, lr=0.1, steps=60, every=15, batch_size=2, judged=6)
    found = relearn(model, ungreen, concept(), evaluator(Colours(cat=0.48)), 0, options)
    assert found["relearned"] and 0 < found["value"] <= 60 and found["value"] % 15 == 0
    assert found["curve"][0][1] == 0 and found["curve"][-1][1] >= 0.5


def test_a_concept_that_was_never_painted_is_not_trained(model: TextToImage) -> None:
    edit = change(model, "conv_out.weight", 2)
    found = relearn(model, edit, concept(), evaluator(Colours(cat=1.1)), 0, OPTIONS)
    assert (found["value"], found["relearned"], found["curve"], found["shown"]) == (None, None, [], 0.0)


def test_fine_tuning_lowers_the_loss(model: TextToImage) -> None:
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))

    def loss(step: int) -> Tensor:
        return _loss(model, latents, ["a cat"], 0, step, 4)

    before = bits(model)
    with _trainable(model) as parameters:
        optimizer = torch.optim.Adam(parameters, lr=3e-3)
        first = sum(float(loss(step).detach()) for step in range(5))
        for step in range(40):
            optimizer.zero_grad()
            loss(step).backward()
            optimizer.step()
        assert sum(float(loss(step).detach()) for step in range(5)) < 0.9 * first
    assert all(torch.equal(value, before[key]) for key, value in model.pipe.unet.state_dict().items())


def test_relearning_goes_on_from_an_exception_with_the_model_intact(model: TextToImage) -> None:
    edit, before = change(model, "conv_out.weight", -3), bits(model)

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    class Once(Colours):
        """Shows the concept to the unedited model only."""

        calls = 0

        def __call__(self, images: Tensor) -> Tensor:
            self.calls += 1
            return torch.full((len(images), 2), 1.0 if self.calls <= 2 else 0.0)

    with pytest.raises(KeyboardInterrupt):
        relearn(model, edit, concept(), evaluator(Once(cat=0.5)), 0, OPTIONS, stop)
    assert all(torch.equal(value, before[key]) for key, value in model.pipe.unet.state_dict().items())
    assert applied(model.pipe) == []


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"steps": 0}, {"pictures": 0}, {"judged": -1}])
def test_options_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"relearning.{next(iter(wrong))}"):
        Relearning(**wrong)


def test_the_subset_matrix_is_what_each_subset_paints(model: TextToImage) -> None:
    edits = {
        "cat": change(model, "conv_out.weight", -2),
        "dog": change(model, "conv_in.weight", 3),
        "both": change(model, "conv_out.bias", 5),
    }
    concepts = {"cat": concept("cat"), "dog": concept("dog"), "both": concept("cat")}
    plain = sorted(greens(model))
    judge = evaluator(Colours(cat=plain[3], dog=0.383))
    before = bits(model)
    found = subsets(model, edits, concepts, judge, 0, pictures=6)
    assert all(torch.equal(value, before[key]) for key, value in model.pipe.unet.state_dict().items())
    table = {tuple(row["applied"]): row["shown"] for row in found["rows"]}
    assert list(table) == [
        (),
        ("both",),
        ("cat",),
        ("dog",),
        ("cat", "dog"),
        ("both", "dog"),
        ("both", "cat"),
        ("both", "cat", "dog"),
    ]
    for names, row in table.items():
        for name in names:
            edits[name].apply(model.pipe)
        for member, label in (("cat", 0), ("dog", 1)):
            cases = concepts[member].cases(0)
            painted = paint(model, [c.prompt for c in cases], [c.seed for c in cases], Sampler(2, 1), 4)
            says = (torch.cat(list(painted)).float() / 255).mean(dim=(2, 3))[:, 1 - label]
            expected = (says >= judge.detector.thresholds[f"object/{member}"]).float().mean().item()
            assert row[member][0] == pytest.approx(expected)
        for name in names:
            edits[name].remove(model.pipe)
    others = [("both", "dog"), ("both", "cat"), ("cat", "dog")]
    restored = [table[of][name][0] for name, of in zip(("cat", "dog", "both"), others, strict=True)]
    assert found["value"] == pytest.approx(sum(restored) / 3)
    assert found["base"] == pytest.approx(sum(row[0] for row in table[()].values()) / 3)
    assert len({share[0] for row in table.values() for share in row.values()}) > 2
    some = [names for names in table if names]
    gone = [1 - table[names][name][0] for names in some for name in names]
    kept = [(table[names][name][0], table[()][name][0]) for names in some for name in edits if name not in names]
    assert found["gone"]["value"] == pytest.approx(sum(gone) / len(gone))
    assert found["gone"]["n"] == 6 * len(edits)
    assert found["kept"]["value"] == pytest.approx(sum(share for share, _ in kept) / len(kept))
    assert found["kept"]["base"] == pytest.approx(sum(base for _, base in kept) / len(kept))
    assert found["kept"]["n"] == 6 * len(edits)
    with pytest.raises(UserError, match="two or more members"):
        subsets(model, {"cat": edits["cat"]}, {"cat": concepts["cat"]}, judge, 0)
