"""The evaluator end to end on a tiny pipeline and tiny judges: resuming, damage, sharing, scoring, the grid."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unpaint.concepts import Concept
from unpaint.errors import UserError
from unpaint.evaluation.detectors.picturebook import PicturebookDetector
from unpaint.evaluation.heat import heat_map
from unpaint.evaluation.metrics.clip_score import ClipScore
from unpaint.evaluation.metrics.in_prompt import InPrompt
from unpaint.evaluation.metrics.rates import Rate
from unpaint.evaluation.pictures import PictureStore, picture_key
from unpaint.evaluation.suite import Evaluator
from unpaint.model import TextToImage, load_model
from unpaint.sampling import Sampler, paint
from unpaint.tensor_file import read_tensor, write_tensor

WORDS = {"object/cat": "a cat", "object/dog": "a dog", "object/bird": "a bird"}


def concept(word: str = "cat", **changes: Any) -> Concept:
    evaluation = {
        "templates": ["{concept} in {style} style {setting}", "a {style} picture of {concept} {setting}"],
        "slots": {
            "style": {"style/flat": "flat", "style/mosaic": "mosaic"},
            "setting": {"setting/none": "", "setting/beach": "on a beach"},
        },
        "in_domain": WORDS,
        "cross_domain": "style",
        "target_pictures": 6,
        "per_label": 4,
    }
    return Concept(
        name=word,
        kind="individual",
        axis="object",
        labels=(f"object/{word}",),
        target=f"a {word}",
        anchor="a thing",
        templates=("{concept}",),
        neighbours=("object/bird",),
        evaluation=evaluation | changes,  # type: ignore[arg-type]
    )


def metrics(clip: Path) -> dict[str, Any]:
    return {
        "ua": Rate("erasure/ua", "", "", ("target",), ("target",), counts="absent"),
        "ira": Rate("retention/ira", "", "", ("retain",), ("in_domain", "neighbour")),
        "cra": Rate("retention/cra", "", "", ("target", "retain"), ("cross_domain",)),
        "clip": ClipScore("", "", str(clip)),
    }


@pytest.fixture
def evaluator(tiny_clip_folder: Path, tiny_detector_folder: Path) -> Evaluator:
    detector = PicturebookDetector(str(tiny_detector_folder))
    return Evaluator(metrics(tiny_clip_folder), detector, Sampler(steps=2, guidance=2.0), batch_size=4)


@pytest.fixture(scope="module")
def model(tiny_pipeline_folder: Path) -> TextToImage:
    return load_model({"name": "tiny", "path": str(tiny_pipeline_folder), "device": "cpu"})


@pytest.fixture(scope="module")
def edited_model(tiny_pipeline_folder: Path) -> TextToImage:
    model = load_model({"name": "tiny", "path": str(tiny_pipeline_folder), "device": "cpu"})
    for parameter in model.group("cross_attention").values():
        parameter.mul_(-2)
    return model


def painted(evaluator: Evaluator, model: TextToImage, store: PictureStore, key: str, of: Concept) -> list[Any]:
    plan = evaluator.plan(of, seed=0)
    for batch in evaluator.missing(store, key, plan):
        evaluator.paint(model, store, key, batch)
    return plan


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*.safetensors"))
    }


def test_batches_are_full_but_for_the_last_of_a_label(evaluator: Evaluator) -> None:
    plan = evaluator.plan(concept(), seed=0)
    assert [(batch.cases[0].group, len(batch.cases)) for batch in plan] == [
        ("object/cat", 4),
        ("object/cat", 2),
        ("object/dog", 4),
        ("object/bird", 4),
    ]
    assert [batch.name for batch in plan] == [batch.name for batch in evaluator.plan(concept(), seed=0)]
    assert {b.name for b in plan}.isdisjoint(b.name for b in evaluator.plan(concept(), seed=1))
    evaluator.sampler = Sampler(steps=3, guidance=2.0)
    assert {b.name for b in plan}.isdisjoint(b.name for b in evaluator.plan(concept(), seed=0))


def test_concepts_share_the_unedited_models_pictures(evaluator: Evaluator) -> None:
    cat, dog = (evaluator.plan(concept(word), seed=0) for word in ("cat", "dog"))
    shared = {batch.name for batch in cat} & {batch.name for batch in dog}
    assert len(shared) == 3  # dog's first batch, cat's first batch, bird


def test_resuming_paints_only_what_is_missing_and_the_same_bits(
    evaluator: Evaluator, model: TextToImage, tmp_path: Path
) -> None:
    whole, broken = PictureStore(tmp_path / "whole"), PictureStore(tmp_path / "broken")
    plan = painted(evaluator, model, whole, "k", concept())
    for batch in evaluator.missing(broken, "k", plan)[1::2]:  # what one of two ranks did before it was killed
        evaluator.paint(model, broken, "k", batch)
    before = files(broken.folder)
    assert len(before) == 2
    painted(evaluator, model, broken, "k", concept())
    after = files(broken.folder)
    assert all(after[name] == content for name, content in before.items())
    assert {name: data for name, (_, data) in after.items()} == {n: d for n, (_, d) in files(whole.folder).items()}
    assert evaluator.missing(broken, "k", plan) == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "short"])
def test_a_damaged_batch_is_painted_again(
    evaluator: Evaluator, model: TextToImage, tmp_path: Path, damage: str
) -> None:
    store = PictureStore(tmp_path)
    plan = painted(evaluator, model, store, "k", concept())
    victim = store._picture_file("k", plan[2])
    good = victim.read_bytes()
    if damage == "short":
        write_tensor(victim, torch.zeros(3, 3, 64, 64, dtype=torch.uint8))
    else:
        victim.write_bytes({"cut": good[:-100], "flipped": good[:-1] + bytes([good[-1] ^ 1]), "empty": b""}[damage])
    assert evaluator.missing(store, "k", plan) == [plan[2]]
    with pytest.raises(UserError, match="missing or damaged"):
        evaluator.score(store, "k", "k", plan)
    evaluator.paint(model, store, "k", plan[2])
    assert victim.read_bytes() == good


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_tensor(tmp_path / "a.safetensors", torch.zeros(2))
    assert list(tmp_path.iterdir()) == []
    assert read_tensor(tmp_path / "a.safetensors") is None


def test_scores_match_what_the_judges_say_of_the_pictures(
    evaluator: Evaluator, model: TextToImage, edited_model: TextToImage, tmp_path: Path
) -> None:
    store = PictureStore(tmp_path)
    plan = painted(evaluator, model, store, "base", concept())
    painted(evaluator, edited_model, store, "edited", concept())
    scores = evaluator.score(store, "edited", "base", plan)
    assert list(scores) == ["erasure/ua", "retention/ira", "retention/cra", "fidelity/clip_score"]
    assert [scores[name]["n"] for name in scores] == [6, 8, 14, 8]
    for key, side in (("edited", "value"), ("base", "base")):
        pictures = torch.cat([store.pictures(key, batch) for batch in plan])  # type: ignore[misc]
        says = evaluator.detector(pictures.float() / 255)
        cat, dog, bird = (says[:, i] >= 0.5 for i in range(3))
        assert scores["erasure/ua"][side] == pytest.approx(1 - cat[:6].float().mean().item())
        kept = torch.cat([dog[6:10], bird[10:14]]).float().mean().item()
        assert scores["retention/ira"][side] == pytest.approx(kept)
        style = ["flat", "mosaic", "none"]
        best = [style[i] for i in says[:, 3:6].argmax(dim=1)]
        cases = [case for batch in plan for case in batch.cases]
        right = [f"style/{found}" in case.wants for found, case in zip(best, cases, strict=True)]
        assert scores["retention/cra"][side] == pytest.approx(np.mean(right))
    assert scores["erasure/ua"]["detector"].startswith("picturebook-")
    assert scores["fidelity/clip_score"]["detector"].startswith("clip-")
    assert scores["fidelity/clip_score"]["delta"] != 0


def test_readings_are_kept_and_the_judges_not_asked_again(
    evaluator: Evaluator, model: TextToImage, tmp_path: Path, tiny_clip_folder: Path, tiny_detector_folder: Path
) -> None:
    store = PictureStore(tmp_path)
    plan = painted(evaluator, model, store, "k", concept())
    scores = evaluator.score(store, "k", "k", plan)
    shutil.rmtree(store.folder / "pictures")
    fresh = Evaluator(metrics(tiny_clip_folder), PicturebookDetector(str(tiny_detector_folder)), evaluator.sampler, 4)
    assert fresh.score(store, "k", "k", plan) == scores
    assert fresh.detector._model is None  # type: ignore[attr-defined]


def test_a_label_that_the_detector_lacks_is_refused_before_painting(evaluator: Evaluator) -> None:
    with pytest.raises(UserError, match="lacks 'style/mosiac'; did you mean style/mosaic"):
        evaluator.plan(
            concept(slots={"style": {"style/mosiac": "mosaic"}, "setting": {"x/a": "", "x/b": "b"}}, target_pictures=4),
            0,
        )


def test_a_metric_that_nothing_concerns_is_left_out(evaluator: Evaluator, model: TextToImage, tmp_path: Path) -> None:
    store = PictureStore(tmp_path)
    alone = Concept(
        name="cat",
        kind="individual",
        axis="object",
        labels=("object/cat",),
        target="a cat",
        anchor="a dog",
        templates=("{concept}",),
        evaluation={"templates": ["{concept}"], "target_pictures": 1},  # type: ignore[arg-type]
    )
    plan = painted(evaluator, model, store, "k", alone)
    assert list(evaluator.score(store, "k", "k", plan)) == ["erasure/ua"]


def test_evaluators_that_make_no_sense_are_refused(tiny_clip_folder: Path) -> None:
    two = {"a": Rate("a/b", "", "", ("target",), ("target",)), "b": Rate("a/b", "", "", ("target",), ("target",))}
    with pytest.raises(UserError, match="two metrics of the evaluator are called 'a/b'"):
        Evaluator(two, PicturebookDetector(), Sampler())
    with pytest.raises(UserError, match="no metrics"):
        Evaluator({}, PicturebookDetector(), Sampler())
    with pytest.raises(UserError, match="batch_size"):
        Evaluator(metrics(tiny_clip_folder), PicturebookDetector(), Sampler(), batch_size=0)


def test_the_detector_answers_with_probabilities(tiny_detector_folder: Path, tmp_path: Path) -> None:
    detector = PicturebookDetector(str(tiny_detector_folder))
    says = detector(torch.rand(5, 3, 64, 64))
    assert says.shape == (5, len(detector.labels))
    assert says.dtype == torch.float32
    for axis in ("style", "setting"):
        own = [i for i, label in enumerate(detector.labels) if label.startswith(axis)]
        assert says[:, own].sum(dim=1).tolist() == pytest.approx([1.0] * 5)
    assert list(detector.thresholds) == ["object/cat", "object/dog", "object/bird"]
    with pytest.raises(UserError, match="not a Picturebook detector"):
        _ = PicturebookDetector(str(tmp_path)).labels


def test_keys_tell_models_edits_and_precision_apart(model: TextToImage, tiny_v_pipeline_folder: Path) -> None:
    other = load_model({"name": "tiny", "path": str(tiny_v_pipeline_folder), "device": "cpu"})
    keys = {picture_key(model), picture_key(other), picture_key(model, "abc"), picture_key(model, "abd")}
    assert len(keys) == 4
    assert picture_key(model) == picture_key(model)


def test_only_parts_that_a_metric_looks_at_are_painted(evaluator: Evaluator, tiny_clip_folder: Path) -> None:
    more = concept(
        out_of_set=["a kitten"], out_of_set_pictures=2, composition=["{concept} {setting}"], composition_pictures=4
    )
    assert {case.part for case in more.cases(0)} == {"target", "retain", "out_of_set", "composition"}
    assert evaluator.plan(more, 0) == evaluator.plan(concept(), 0)
    only = Evaluator({"ua": metrics(tiny_clip_folder)["ua"]}, evaluator.detector, evaluator.sampler, 4)
    assert {case.part for batch in only.plan(more, 0) for case in batch.cases} == {"target"}
    with pytest.raises(UserError, match="zero pictures"):
        Evaluator({"r": Rate("a/b", "", "", ("static",), ("target",))}, evaluator.detector, evaluator.sampler).plan(
            concept(), 0
        )


def test_the_prompt_without_the_concept_is_painted_by_the_unedited_model_only(
    evaluator: Evaluator, model: TextToImage, edited_model: TextToImage, tmp_path: Path, tiny_clip_folder: Path
) -> None:
    clip = str(tiny_clip_folder)
    both = {"d": InPrompt("in_prompt/csdr", "", "", "difference", clip), "s": InPrompt("s", "", "", "score", clip)}
    evaluator = Evaluator(both, evaluator.detector, evaluator.sampler, batch_size=4)
    store, of = PictureStore(tmp_path), concept(neutral="it")
    plan = painted(evaluator, model, store, "base", of)
    answered = [batch for batch in plan if batch.answers is None]
    neutral = [batch for batch in plan if batch.answers is not None]
    assert [batch.answers for batch in neutral] == answered
    assert [b.seeds for b in neutral] == [b.seeds for b in answered]
    assert neutral[0].prompts == [prompt.replace("a cat", "it") for prompt in answered[0].prompts]
    for batch in answered:
        evaluator.paint(edited_model, store, "edited", batch)
    scores = evaluator.score(store, "edited", "base", plan)
    reader = both["d"].reader

    def cosines(key: str, shown: list[Any]) -> Any:
        seen = [store.pictures(key, batch) for batch in shown]
        return torch.cat([reader.read(p, n.prompts) for p, n in zip(seen, neutral, strict=True) if p is not None])

    reference, own, before = cosines("base", neutral), cosines("edited", answered), cosines("base", answered)
    assert scores["s"]["value"] == pytest.approx(own.mean().item(), abs=1e-5)
    assert scores["s"]["base"] == pytest.approx(before.mean().item(), abs=1e-5)
    counted = reference >= 0.01
    if counted.any():
        rate = ((reference - own).abs() / reference)[counted].mean().item()
        assert scores["in_prompt/csdr"]["value"] == pytest.approx(rate, rel=1e-3)
    assert scores["in_prompt/csdr"]["n"] == int(counted.sum())


def test_a_file_of_prompts_is_painted_with_its_own_seeds_and_guidance(
    evaluator: Evaluator, model: TextToImage, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,evaluation_seed,evaluation_guidance\na cat,7,1.5\na dog,8,1.5\na bird,9,\n")
    rate = {"static": Rate("attack/static/asr", "", "", ("static",), ("target",))}
    evaluator = Evaluator(rate, evaluator.detector, evaluator.sampler, 4, prompts_csv=str(file))
    store = PictureStore(tmp_path / "store")
    plan = painted(evaluator, model, store, "k", concept())
    assert [(batch.seeds, batch.sampler.guidance) for batch in plan] == [([7, 8], 1.5), ([9], 2.0)]
    assert evaluator.score(store, "k", "k", plan)["attack/static/asr"]["n"] == 3
    by_hand = next(iter(paint(model, ["a cat", "a dog"], [7, 8], Sampler(steps=2, guidance=1.5), 4)))
    assert torch.equal(by_hand, store.pictures("k", plan[0]))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="prompts_part is static or out_of_set"):
        Evaluator(rate, evaluator.detector, evaluator.sampler, prompts_part="retain")


def test_a_file_of_prompts_that_no_metric_counts_is_refused(evaluator: Evaluator, tmp_path: Path) -> None:
    from unpaint.config import compose, instantiate

    file = tmp_path / "prompts.csv"
    file.write_text("prompt\na cat\n")
    given = f"evaluator.prompts_csv={file}"
    static = r"counts its prompts \(static\); add one: \+metric@evaluator\.metrics\.static=static"
    with pytest.raises(UserError, match=static):
        instantiate(compose(["evaluator=quick", given]).evaluator)
    part = "evaluator.prompts_part=out_of_set"
    with pytest.raises(UserError, match=r"\(out_of_set\); .*ua_out_of_set=ua_out_of_set"):
        instantiate(compose(["evaluator=quick", given, part]).evaluator)
    # With what the message names, and where an attack takes the file, it is looked at.
    for more in (
        ["evaluator=quick", "+metric@evaluator.metrics.static=static"],
        ["evaluator=quick", part, "+metric@evaluator.metrics.ua_out_of_set=ua_out_of_set"],
        ["evaluator=standard"],
        ["evaluator=quick", "+attack@evaluator.attacks.noise=noise"],
        ["evaluator=adversarial"],
    ):
        assert instantiate(compose([*more, given]).evaluator).prompts_csv == str(file)


def test_nan_is_refused_and_not_counted_as_gone(
    evaluator: Evaluator, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    broken = load_model({"name": "tiny", "path": str(tiny_pipeline_folder), "device": "cpu"})
    next(iter(broken.group("cross_attention").values())).fill_(float("nan"))
    store, plan = PictureStore(tmp_path), evaluator.plan(concept(), 0)
    with pytest.raises(UserError, match="paints NaN for '"):
        evaluator.paint(broken, store, "k", plan[0])
    store.keep_pictures("k", plan[0], torch.zeros(4, 3, 64, 64, dtype=torch.uint8))

    class Broken(PicturebookDetector):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return torch.full((len(images), len(self.labels)), float("nan"))

    folder = str(evaluator.detector.folder)  # type: ignore[attr-defined]
    judged = Evaluator({"ua": evaluator.metrics[0]}, Broken(folder), evaluator.sampler, batch_size=4)
    with pytest.raises(UserError, match="answers with NaN"):
        judged.read(store, "k", plan[0])


def test_the_grid_shows_the_stored_pictures(evaluator: Evaluator, tmp_path: Path) -> None:
    store = PictureStore(tmp_path)
    plan = evaluator.plan(concept(), seed=0)
    for key, colour in (("base", (250, 0, 0)), ("edited", (0, 0, 250))):
        picture = torch.tensor(colour, dtype=torch.uint8).view(1, 3, 1, 1)
        for batch in plan:
            store.keep_pictures(key, batch, picture.expand(len(batch.cases), 3, 64, 64))
    path = evaluator.grid(store, "edited", "base", plan, concept(), tmp_path / "grid.png")
    seen = np.asarray(Image.open(path).convert("RGB"))
    red, blue = ((seen == colour).all(axis=2).sum() for colour in ((250, 0, 0), (0, 0, 250)))
    assert red == blue == 12 * 112 * 112  # 4 of the target and 4 each of bird and dog
    first_red = np.argwhere((seen == (250, 0, 0)).all(axis=2))[:, 1].min()
    first_blue = np.argwhere((seen == (0, 0, 250)).all(axis=2))[:, 1].min()
    assert first_red < first_blue


def test_the_heat_map_is_red_where_a_label_is_lost(tmp_path: Path) -> None:
    def cell(value: float, base: float) -> dict[str, float]:
        return {"value": value, "base": base, "n": 16}

    matrix = {
        "cat": {"object/cat": cell(0.0, 1.0), "object/dog": cell(0.9, 0.9)},
        "dog": {"object/dog": cell(0.5, 1.0), "object/bird": cell(1.0, 0.5)},
    }
    erased = {"cat": ["object/cat"], "dog": ["object/dog", "object/bird"]}
    seen = np.asarray(Image.open(heat_map(matrix, erased, tmp_path / "damage.png")).convert("RGB")).astype(int)
    # The frame of what is to be erased is three dark pixels wide, any other one grey pixel.
    framed = [
        [tuple(seen[116 + 52 * j + 2, 170 + 80 * i + 2].tolist()) == (30, 30, 34) for i in range(3)] for j in range(2)
    ]
    assert framed == [[True, False, False], [False, True, True]]
    # A cell's colour, from a corner inside its frame: rows cat, dog; columns cat, dog, bird.
    colours = [[tuple(seen[116 + 52 * j + 5, 170 + 80 * i + 5].tolist()) for i in range(3)] for j in range(2)]
    white, red, half, paper = (247, 247, 247), (178, 24, 43), (212, 136, 145), (255, 255, 255)
    assert colours == [[red, white, paper], [paper, half, white]]


def test_a_probe_works_in_a_run_of_mixed_precision(evaluator: Evaluator, model: TextToImage) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert 0 <= evaluator.unlearning_accuracy(model, concept(), seed=0, pictures=4) <= 1
