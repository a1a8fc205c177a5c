"""CLIP zero-shot, Hugging Face classifiers and NudeNet: against their networks by hand, on tiny random weights."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from unpaint.errors import UserError
from unpaint.evaluation.detectors import shows
from unpaint.evaluation.detectors.clip_zero_shot import ClipZeroShot
from unpaint.evaluation.detectors.hugging_face import HuggingFaceClassifier
from unpaint.evaluation.detectors.nudenet import CLASSES, NudeNet

TEXTS = {"object/cat": "a cat", "object/dog": "a dog", "style/flat": "flat"}


def images(n: int = 4, size: int = 32) -> torch.Tensor:
    whole = torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(0))
    return whole.float() / 255


def test_clip_zero_shot_is_a_softmax_within_each_axis(tiny_clip_folder: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    detector = ClipZeroShot(str(tiny_clip_folder), TEXTS, neutral="a thing")
    assert detector.labels == ["object/cat", "object/dog", "style/flat", "object/none", "style/none"]
    says = detector(images())
    model = CLIPModel.from_pretrained(tiny_clip_folder, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(tiny_clip_folder)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    for columns, texts in (([0, 1, 3], ["a cat", "a dog", "a thing"]), ([2, 4], ["flat", "a thing"])):
        tokens = tokenizer(texts, padding="max_length", max_length=24, return_tensors="pt")
        with torch.no_grad():
            logits = model(**tokens, pixel_values=(images() - mean) / std).logits_per_image
        torch.testing.assert_close(says[:, columns], logits.softmax(dim=1), atol=1e-5, rtol=1e-4)


def test_clip_zero_shot_refuses_what_does_not_fit(tiny_clip_folder: Path) -> None:
    folder = str(tiny_clip_folder)
    ids = {
        ClipZeroShot(folder, TEXTS).identity,
        ClipZeroShot(folder, TEXTS, neutral="a thing").identity,
        ClipZeroShot(folder, TEXTS, thresholds={"object/cat": 0.7}).identity,
        ClipZeroShot(folder, TEXTS | {"object/cat": "one cat"}).identity,
    }
    assert len(ids) == 4
    assert ClipZeroShot(folder, TEXTS).identity in ids
    with pytest.raises(UserError, match=r"'object/catt' is not one of the labels; did you mean object/cat\?"):
        ClipZeroShot(folder, TEXTS, thresholds={"object/catt": 0.7})
    with pytest.raises(UserError, match="looks like axis/word, not 'cat'"):
        ClipZeroShot(folder, {"cat": "a cat"})
    with pytest.raises(UserError, match="needs labels"):
        ClipZeroShot(folder, {})
    with pytest.raises(UserError, match="not a transformers model"):
        ClipZeroShot("no/such/model", TEXTS)
    hub = ClipZeroShot("somebody/clip", TEXTS, revision="abc")
    assert "somebody--clip@abc" in hub.identity and "/" not in hub.identity
    with pytest.raises(UserError, match=r"'somebody/clip' from .* does not load: .*; where there is a network"):
        hub(images())


NAMES = {0: "tabby, tabby cat", 1: "Dalmatian", 2: "beagle", 3: "teapot"}
MAP = {"object/cat": ["tabby"], "object/dog": ["dalmatian", "Beagle"]}


@pytest.fixture(scope="module", params=["vit", "resnet"])
def classifier_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import (
        ConvNextImageProcessorPil,
        ResNetConfig,
        ResNetForImageClassification,
        ViTConfig,
        ViTForImageClassification,
        ViTImageProcessorPil,
    )

    folder = tmp_path_factory.mktemp(request.param)
    names: dict[str, Any] = {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if request.param == "vit":
            config = ViTConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                image_size=32,
                patch_size=8,
                **names,
            )
            ViTForImageClassification(config).save_pretrained(folder)
            ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
        else:
            shape: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
            ResNetForImageClassification(ResNetConfig(layer_type="basic", **shape, **names)).save_pretrained(folder)
            half = [0.5, 0.5, 0.5]
            processor = ConvNextImageProcessorPil(
                size={"shortest_edge": 32}, crop_pct=1.0, image_mean=half, image_std=half
            )
            processor.save_pretrained(folder)
    return folder


def by_hand(folder: Path) -> NDArray[Any]:
    """Softmax over the four classes; both processors only bring [0, 1] to [-1, 1] at this size."""
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(pixel_values=images() * 2 - 1).logits.softmax(dim=1).numpy()


def test_a_classifier_is_read_through_the_map(classifier_folder: Path) -> None:
    detector = HuggingFaceClassifier(str(classifier_folder), MAP)
    assert detector.labels == ["object/cat", "object/dog", "object/none"]
    p = by_hand(classifier_folder)
    says = detector(images()).numpy()
    expected = np.stack([p[:, 0], p[:, 1:3].max(axis=1), p[:, 3]], axis=1)
    np.testing.assert_allclose(says, expected, atol=1e-5)
    first = p.argmax(axis=1)
    assert shows(detector, says, "object/cat").tolist() == (first == 0).tolist()
    assert shows(detector, says, "object/dog").tolist() == ((first == 1) | (first == 2)).tolist()


def test_nan_is_no_answer(classifier_folder: Path) -> None:
    for thresholds in ({}, {"object/cat": 0.5}):
        detector = HuggingFaceClassifier(str(classifier_folder), MAP, thresholds=thresholds)
        says = detector(images()).numpy()
        says[2] = np.nan  # as a network in half precision answers that overflows
        with pytest.raises(UserError, match=r"answers with NaN for 'object/cat'$"):
            shows(detector, says, "object/cat")
        assert shows(detector, says[:2], "object/cat").shape == (2,)


def test_a_class_that_the_classifier_lacks_is_refused_at_once(classifier_folder: Path) -> None:
    folder = str(classifier_folder)
    with pytest.raises(UserError, match=r"object/dog: the classifier has no class 'beegle'; did you mean beagle\?"):
        HuggingFaceClassifier(folder, {"object/dog": ["beegle"]})
    with pytest.raises(UserError, match="take all classes"):
        HuggingFaceClassifier(folder, {"object/any": ["tabby", "dalmatian", "beagle", "teapot"]})
    with pytest.raises(UserError, match="at least one class"):
        HuggingFaceClassifier(folder, {"object/dog": []})
    hub = HuggingFaceClassifier("microsoft/resnet-50", MAP)
    assert hub.identity.startswith("hugging-face-microsoft--resnet-50@main-")


needs_nudenet = pytest.mark.skipif(find_spec("nudenet") is None, reason="needs unpaint[nsfw]")


@needs_nudenet
def test_nudenet_looks_at_pictures() -> None:
    detector = NudeNet(classes=6, threshold=0.5)
    says = detector(images(2, 64))
    assert says.shape == (2, 7)
    assert says.tolist() == [[0.0] * 7] * 2
    assert "6-classes-0.5" in detector.identity
    assert detector.identity != NudeNet(classes=9, threshold=0.5).identity != NudeNet(classes=9).identity
    assert set(detector.thresholds.values()) == {0.5}


@needs_nudenet
def test_nudenet_knows_the_classes_that_are_counted() -> None:
    from nudenet.nudenet import __labels

    assert set(CLASSES[9]) <= set(__labels)


class Recorder:
    """In the place of nudenet's network: keeps what it is shown, and answers with two boxes."""

    def detect(self, picture: NDArray[Any]) -> list[dict[str, Any]]:
        self.shown = picture
        boxes = [("BELLY_EXPOSED", 0.8), ("BUTTOCKS_EXPOSED", 0.4), ("BUTTOCKS_EXPOSED", 0.3), ("FACE_FEMALE", 0.9)]
        return [{"class": name, "score": score, "box": [0, 0, 1, 1]} for name, score in boxes]


@needs_nudenet
def test_nudenet_is_shown_blue_first_and_the_best_class_counts() -> None:
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    for classes, best in ((9, 0.8), (6, 0.4)):
        detector = NudeNet(classes=classes)
        detector.__dict__["_net"] = recorder = Recorder()
        says = detector(red)[0]
        assert recorder.shown[0, 0].tolist() == [0, 0, 255]
        assert says[0].item() == pytest.approx(best)
        assert says[detector.labels.index("content/buttocks_exposed")].item() == pytest.approx(0.4)
        assert says[detector.labels.index("content/anus_exposed")].item() == 0


def test_nudenet_refuses_what_makes_no_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="classes is 6"):
        NudeNet(classes=7)
    with pytest.raises(UserError, match=r"threshold is between 0\.25 and 1, not 0\.1"):
        NudeNet(threshold=0.1)
    if find_spec("nudenet") is None:
        with pytest.raises(UserError, match=r"pip install unpaint\[nsfw\]"):
            NudeNet()
