"""FID and KID against plain formulas and hand-worked sets; same seed, diversity and drawings; both ends of each."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from unpaint.cases import Case
from unpaint.concepts import Concept
from unpaint.config import compose, instantiate
from unpaint.errors import UserError
from unpaint.evaluation.detectors.picturebook import PicturebookDetector
from unpaint.evaluation.metrics.distances import GROUPS, _t, fid, kid, summary
from unpaint.evaluation.metrics.diversity import Diversity
from unpaint.evaluation.metrics.drawings import Drawings
from unpaint.evaluation.metrics.features import ClipFeatures, DetectorFeatures
from unpaint.evaluation.metrics.fid import Fid
from unpaint.evaluation.metrics.kid import Kid
from unpaint.evaluation.metrics.lpips import Lpips
from unpaint.evaluation.metrics.pairs import Pairs, PixelRmse
from unpaint.evaluation.metrics.same_seed import SameSeed
from unpaint.evaluation.pictures import PictureStore
from unpaint.evaluation.suite import Evaluator
from unpaint.picturebook.styles import draw
from unpaint.picturebook.world import Scene
from unpaint.sampling import Sampler

Floats = NDArray[np.float64]


class Table:
    """A detector that is never asked."""

    labels = ("object/cat", "object/dog")
    thresholds: Mapping[str, float] = {}
    identity = "table"
    only_for = None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Means:
    """Features that a test can reckon: the mean of each colour, and of the left half."""

    identity = "means"

    def read(self, pictures: torch.Tensor, prompts: object) -> torch.Tensor:
        pictures = pictures.float() / 255
        return torch.cat([pictures.mean(dim=(2, 3)), pictures[..., :32].mean(dim=(1, 2, 3))[:, None]], dim=1)


def normal(n: int, d: int, seed: int, shift: float = 0.0) -> Floats:
    return np.random.default_rng(seed).normal(size=(n, d)) @ np.diag(np.linspace(0.5, 2, d)) + shift


def cut(rows: Floats) -> list[Floats]:
    return [rows[i : i + 7] for i in range(0, len(rows), 7)]


def plain_fid(x: Floats, y: Floats) -> float:
    """|mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1^(1/2) S2 S1^(1/2))^(1/2)), square roots by eigenvectors."""

    def root(matrix: torch.Tensor) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T

    a, b = torch.from_numpy(x), torch.from_numpy(y)
    s1, s2 = torch.cov(a.T), torch.cov(b.T)
    middle = root(root(s1) @ s2 @ root(s1))
    return float((a.mean(0) - b.mean(0)).square().sum() + torch.trace(s1 + s2 - 2 * middle))


def plain_kid(x: Floats, y: Floats) -> float:
    """Binkowski's unbiased estimate, pair by pair."""

    def k(a: Floats, b: Floats) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n = len(x)
    within = sum(k(z[i], z[j]) for z in (x, y) for i in range(n) for j in range(n) if i != j)
    between = sum(k(x[i], y[j]) for i in range(n) for j in range(n))
    return within / (n * (n - 1)) - 2 * between / n**2


@pytest.mark.parametrize("shift", [0.0, 0.3, 2.0])
def test_fid_is_the_plain_formula(shift: float) -> None:
    x, y = normal(60, 5, 0, shift), normal(50, 5, 1)
    found = fid(cut(x), cut(y))
    assert found[0] == pytest.approx(plain_fid(x, y), abs=1e-6)
    for k in range(GROUPS):
        some = [z[np.arange(len(z)) % GROUPS != k] for z in (x, y)]
        assert found[1 + k] == pytest.approx(plain_fid(*some), abs=1e-6)


def test_fid_of_equal_sets_is_zero_and_grows_with_a_shift_by_its_square() -> None:
    x = normal(80, 6, 0)
    found = [fid(cut(x + shift), cut(x))[0] for shift in (0.0, 0.5, 1.0)]
    assert found == pytest.approx([0.0, 6 * 0.25, 6 * 1.0], abs=1e-6)


def test_kid_is_the_plain_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(40, 4, 0, 0.5), normal(40, 4, 1)
    values, subsets = kid(cut(x), cut(y))
    assert values[0] == pytest.approx(plain_kid(x, y))
    keep = np.arange(40) % GROUPS != 3
    assert values[4] == pytest.approx(plain_kid(x[keep], y[keep]))
    assert len(subsets) == 1
    monkeypatch.setattr("unpaint.evaluation.metrics.distances.SUBSET", 20)
    values, subsets = kid(cut(x), cut(y))
    assert subsets.tolist() == pytest.approx([plain_kid(x[i::2], y[i::2]) for i in range(2)])
    assert values[0] == pytest.approx(subsets.mean())
    with pytest.raises(UserError, match="equally many pictures, not 40 with 39"):
        kid(cut(x), cut(y[:-1]))


def test_the_interval_is_the_jackknifes_and_covers() -> None:
    assert _t(9) == pytest.approx(2.262, abs=5e-3)
    values = np.array([5.0, *range(1, 11)])
    found = summary(values, np.zeros(11), lowest=0.0)
    half = _t(9) * np.sqrt(9 / 10 * 82.5)
    assert found["high"] == pytest.approx(5 + half)
    assert found["low"] == 0
    assert found["delta_low"] == pytest.approx(5 - half)
    x, y = normal(2000, 4, 1000, 0.5), normal(2000, 4, 1001)
    kid_of_all = kid([x[:1000], x[1000:]], [y[:1000], y[1000:]])[0][0]
    hits = 0
    for seed in range(20):
        values, _ = kid([normal(100, 4, 2 * seed, 0.5)], [normal(100, 4, 2 * seed + 1)])
        found = summary(values, np.zeros(11))
        hits += found["low"] <= kid_of_all <= found["high"]
    assert hits >= 16


def cases(n: int, label: str = "object/dog", role: str = "in_domain") -> list[Case]:
    return [Case(f"{label} {i}", 8 * i, {label: role}, label, "retain") for i in range(n)]


def test_fid_and_kid_at_both_ends() -> None:
    reader = Means()
    base, other = normal(60, 4, 0), normal(60, 4, 1)
    for metric in (Fid("", "", reader), Kid("", "", reader)):
        same = metric.finish(cut(base), cut(base), cut(other))
        assert same["value"] == same["base"]  # an edit that changes nothing stands at the floor
        assert (same["delta"], same["delta_low"], same["delta_high"]) == (0, 0, 0)
        far = metric.finish(cut(base + 3), cut(base), cut(other))
        assert far["value"] > far["delta_low"] > 0 and far["n"] == 60 and far["features"] == 4
        with pytest.raises(UserError, match=r"at least 20 pictures .* there are 14"):
            metric.finish(cut(base[:14]), cut(base[:14]), cut(other[:14]))
    few = Fid("", "", reader).finish(cut(normal(30, 40, 0)), cut(normal(30, 40, 0)), cut(normal(30, 40, 1)))
    assert "30 pictures do not fix a covariance of 40 features" in few["note"]


def test_the_reference_has_other_seeds_and_the_same_prompts() -> None:
    given = cases(20)
    other = Fid("", "", Means()).reference(given)
    assert [case.prompt for case in other] == [case.prompt for case in given]
    seeds = {case.seed for case in other}
    assert len(seeds) == 20 and seeds.isdisjoint(case.seed for case in given)
    assert all(seed % 8 == 3 for seed in seeds)  # the namespace `score`


def test_nan_features_are_one_clear_line() -> None:
    reading = np.ones((3, 4), dtype=np.float32)
    reading[1, 2] = np.nan
    with pytest.raises(UserError, match="features of 1 pictures hold NaN or infinity, the first of 'object/dog 1'"):
        Fid("", "", Means()).part(cases(3), reading, Table())


def test_only_pictures_that_do_not_ask_for_the_target_count() -> None:
    mixed = [*cases(2, role="target"), *cases(3), *cases(1, role="neighbour")]
    reading = np.arange(24, dtype=np.float32).reshape(6, 4)
    assert Fid("", "", Means()).part(mixed, reading, Table()).tolist() == reading[2:].tolist()


def test_same_seed_on_a_hand_worked_case() -> None:
    metric = SameSeed("", "", Means())
    base = [np.array([[1.0, 0, 0, 0], [0, 2, 0, 0]]), np.array([[0.0, 0, 3, 0]])]
    edited = [np.array([[2.0, 0, 0, 0], [0, 1, 1, 0]]), np.array([[0.0, 0, 0, 1]])]
    other = [np.array([[0.0, 1, 0, 0]]), np.array([[0.0, 1, 0, 0], [1.0, 0, 0, 0]])]  # cut elsewhere
    found = metric.finish(edited, base, other)
    assert found["value"] == pytest.approx((0 + (1 - 0.5**0.5) + 1) / 3)
    assert (found["base"], found["n"]) == (0, 3)
    assert found["other_seed"] == pytest.approx((1 + 0 + 1) / 3)
    assert metric.finish(base, base, other)["value"] == 0


def test_diversity_is_the_mean_distance_of_all_pairs() -> None:
    metric = Diversity("", "", Means())
    features = np.abs(normal(9, 4, 0))
    given = [*cases(5, "object/dog"), *cases(4, "object/bird")]
    parts = [metric.part(given[s], features[s], Table()) for s in (slice(0, 3), slice(3, 9))]

    def spread(rows: Floats) -> float:
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        pairs = [1 - units[i] @ units[j] for i in range(len(units)) for j in range(i)]
        return float(np.mean(pairs))

    one = [metric.part(given, np.ones((9, 4)), Table())]  # all pictures alike
    found = metric.finish(parts, one)
    assert found["value"] == pytest.approx((spread(features[:5]) + spread(features[5:])) / 2)
    assert found["base"] == pytest.approx(0, abs=1e-12)
    assert (found["n"], found["labels"]) == (9, 2)
    alone = [metric.part(given[:1], features[:1], Table())]
    with pytest.raises(UserError, match="a label with at least two pictures"):
        metric.finish(alone, alone)


def test_features_are_what_the_networks_say_by_hand(tiny_detector_folder: Path, tiny_clip_folder: Path) -> None:
    from transformers import CLIPModel, ResNetForImageClassification

    pictures = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    reader = DetectorFeatures(str(tiny_detector_folder))
    network = ResNetForImageClassification.from_pretrained(tiny_detector_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found = reader.read(pictures, [])
        assert found.shape == (3, 16)
        logits = network(pixel_values=pictures.float() / 255 * 2 - 1).logits
        torch.testing.assert_close(network.classifier(found), logits)
    clip = ClipFeatures(str(tiny_clip_folder))
    network = CLIPModel.from_pretrained(tiny_clip_folder, dtype=torch.float32).eval()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        seen = network.visual_projection(network.vision_model((pictures / 255 - mean) / std).pooler_output)
    torch.testing.assert_close(clip.read(pictures, []), torch.nn.functional.normalize(seen, dim=-1))
    assert reader.identity != clip.identity
    with pytest.raises(UserError, match="not a transformers model"):
        DetectorFeatures(str(tiny_detector_folder.parent))
    with pytest.raises(UserError, match="features is a reader"):
        Fid("", "", "clip")  # type: ignore[arg-type]


def scene_cases() -> list[Case]:
    found = []
    for i in range(24):
        wants = {("object/dog", "object/bird")[i % 2]: "in_domain", "style/flat": "cross_domain"}
        wants |= {"setting/none": "context"} if i % 3 else {"setting/beach": "context"}
        found.append(Case(f"{i}", 8 * i + 3, wants, next(iter(wants)), "retain"))
    return found


def test_drawings_are_of_the_labels_that_the_prompt_names() -> None:
    given = scene_cases()
    pictures = np.stack(
        [
            draw(Scene((("dog", "bird")[i % 2],), "flat", "none" if i % 3 else "beach", "alone", 8 * i + 3))
            for i in range(24)
        ]
    )
    reader = Means()
    exact = reader.read(torch.from_numpy(pictures).permute(0, 3, 1, 2), []).numpy()
    metric = Drawings("", "", reader, distance="fid")
    assert metric.name == "fidelity/fid_drawings"
    parts = [metric.part(given[s], exact[s], Table()) for s in (slice(0, 13), slice(13, 24))]
    shifted = [metric.part(given[s], exact[s] + 1, Table()) for s in (slice(0, 13), slice(13, 24))]
    found = metric.finish(shifted, parts)
    assert found["base"] == pytest.approx(0, abs=1e-6)  # the model draws as the code does
    assert found["value"] == pytest.approx(4, abs=1e-4)
    with pytest.raises(UserError, match=r"Picturebook has no 'object/dgo'; did you mean dog\?"):
        metric.part(cases(1, "object/dgo"), exact[:1], Table())
    with pytest.raises(UserError, match="fid or kid"):
        Drawings("", "", reader, distance="is")


def test_pixels_by_hand() -> None:
    black, grey = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    grey[1, :, :, :4] = 255
    assert PixelRmse().compare(black, grey).tolist() == pytest.approx([0, 0.5**0.5])


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_lpips_says_what_it_needs() -> None:
    with pytest.raises(UserError, match="needs torchvision"):
        instantiate(compose(["+metric@evaluator.metrics.lpips=lpips"]).evaluator.metrics.lpips)
    with pytest.raises(UserError, match="did you mean alex"):
        Lpips("alexnet")


@pytest.mark.parametrize(
    "name", ["fid", "kid", "same_seed", "same_seed_pixels", "diversity", "fid_drawings", "kid_drawings"]
)
def test_configs_make_metrics(name: str) -> None:
    metric = instantiate(compose([f"+metric@evaluator.metrics.{name}={name}"]).evaluator.metrics[name])
    assert metric.name == f"fidelity/{name}" and metric.title and metric.cost


def test_the_evaluator_paints_references_once_and_looks_at_pairs(tiny_detector_folder: Path, tmp_path: Path) -> None:
    """FID, KID, same seed and pixels through plan, store and score, on pictures made up here."""
    reader = Means()
    metrics: dict[str, Any] = {
        "fid": Fid("", "", reader),
        "kid": Kid("", "", reader),
        "seed": SameSeed("", "", reader),
        "pixels": Pairs("fidelity/pixels", "", "", PixelRmse()),
    }
    evaluator = Evaluator(metrics, PicturebookDetector(str(tiny_detector_folder)), Sampler(2), batch_size=8)
    evaluation = {
        "templates": ["{concept} {n}"],
        "slots": {"n": {f"n/{i}": str(i) for i in range(12)}},
        "in_domain": {"object/dog": "a dog", "object/bird": "a bird"},
        "target_pictures": 6,
        "per_label": 12,
    }
    of = Concept(
        name="cat",
        kind="individual",
        axis="object",
        labels=("object/cat",),
        target="a cat",
        anchor="a thing",
        templates=("{concept}",),
        evaluation=evaluation,  # type: ignore[arg-type]
    )
    plan = evaluator.plan(of, seed=0)
    references = evaluator.references(plan)
    assert sum(len(batch.cases) for batch in references) == 24  # dog and bird, once for three metrics
    assert {batch.name for batch in references}.isdisjoint(batch.name for batch in plan)
    store, generator = PictureStore(tmp_path), torch.Generator().manual_seed(0)
    for batch in [*plan, *references]:
        some = torch.randint(0, 200, (len(batch.cases), 3, 64, 64), dtype=torch.uint8, generator=generator)
        store.keep_pictures("base", batch, some)
        store.keep_pictures("edited", batch, some + 51)
    evaluator.read(store, "base", references[0])
    found = evaluator.score(store, "edited", "base", plan)
    assert found["fidelity/pixels"]["value"] == pytest.approx(0.2, abs=1e-6)
    assert found["fidelity/pixels"]["base"] == 0
    assert found["fidelity/fid"]["value"] == pytest.approx(4 * 0.2**2 + found["fidelity/fid"]["base"], abs=1e-3)
    assert found["fidelity/kid"]["delta"] > 0 and found["fidelity/same_seed"]["n"] == 24
    again = evaluator.score(store, "base", "base", plan)
    assert again["fidelity/pixels"]["value"] == again["fidelity/same_seed"]["value"] == 0
    assert again["fidelity/fid"]["value"] == again["fidelity/fid"]["base"]
