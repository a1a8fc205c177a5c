"""The formulas of the attacks against cases worked by hand, on tiny models."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unpaint.cases import IN_SET
from unpaint.concepts import Concept
from unpaint.errors import UserError
from unpaint.evaluation.attacks import Attack, Scene, Terms, Try
from unpaint.evaluation.attacks.inversion import Inversion, Lesson, with_token
from unpaint.evaluation.attacks.mma import MMA, Greedy, allowed_tokens, blocked_words
from unpaint.evaluation.attacks.probes import Completion, Inpainting, LatentInversion, Noise, centre
from unpaint.evaluation.attacks.ring_a_bell import Genetic, RingABell, concept_vector
from unpaint.evaluation.attacks.tokens import (
    Search,
    TokenAttack,
    level_of,
    nearest_token,
    on_simplex,
    straight_through,
)
from unpaint.evaluation.attacks.words import Layout, Words, layout, usable_ids
from unpaint.files import WEIGHTS
from unpaint.model import TextToImage, load_model
from unpaint.sampling import Sampler, denoise_noisily, denoise_on, invert, noise, paint

SAMPLER = Sampler(steps=3, guidance=2.0)


def concept(word: str = "cat", target: str = "a cat", **more: Any) -> Concept:
    evaluation: Any = {
        "templates": ["{concept} {n}"],
        "slots": {"n": {f"n/{i}": str(i) for i in range(6)}},
        "neutral": "a thing",
        "target_pictures": 6,
    }
    return Concept(
        name=word,
        kind="individual",
        axis="object",
        labels=(f"object/{word}",),
        target=target,
        anchor="a thing",
        templates=("{concept}", "one {concept}"),
        evaluation=evaluation,
        **more,
    )


@pytest.fixture(scope="module")
def model(tiny_pipeline_folder: Path) -> TextToImage:
    return load_model({"name": "tiny", "path": str(tiny_pipeline_folder), "device": "cpu"})


@pytest.fixture(scope="module")
def words(model: TextToImage) -> Words:
    return Words(model)


@pytest.fixture
def scene(model: TextToImage, tmp_path: Path) -> Scene:
    """Three prompts on the unedited model, of which the last is open no more."""
    asked = concept()
    cases = [case for case in asked.cases(0) if case.part == IN_SET][:3]
    pictures = torch.cat(list(paint(model, [c.prompt for c in cases], [c.seed for c in cases], SAMPLER, 3)))
    return Scene(model, {}, asked, cases, pictures, False, SAMPLER, 0, tmp_path / "a", tmp_path / "b", [0, 1])


def token_attack(**options: Any) -> TokenAttack:
    given: dict[str, Any] = {
        "name": "test",
        "title": "",
        "variable": "simplex",
        "objective": "noise",
        "timesteps": "in_order",
        "slots": "prefix",
        "k": 2,
        "rounds": 2,
        "iterations": 2,
        "lr": 0.01,
        "weight_decay": 0.1,
        "prompts": 3,
        "at_n": 1,
        "max_seconds": 60.0,
    }
    return TokenAttack(**given | options)


# --- words ------------------------------------------------------------------------------------------------------------


def test_ids_and_soft_embeddings_are_encoded_as_the_prompt_is(model: TextToImage, words: Words) -> None:
    prompts = ["a cat 3", "dog in on, a"]
    ids = words.framed([words.ids(prompt) for prompt in prompts])
    assert words.embeddings(ids).equal(
        words.embeddings(ids, torch.ones(2, 24, 32), torch.zeros(2, 24, dtype=torch.bool))
    )
    assert torch.allclose(words.embeddings(ids), model.encode(prompts), atol=1e-5)
    own = words.encoder.get_input_embeddings().weight[ids]
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[:, 1:3] = True
    assert torch.allclose(words.embeddings(ids, own, where), model.encode(prompts), atol=1e-5)
    assert not torch.allclose(words.embeddings(ids, own.flip(2), where), model.encode(prompts), atol=1e-3)
    # The hook is gone.
    assert torch.allclose(words.embeddings(ids), model.encode(prompts), atol=1e-5)


def test_an_attack_proposes_tokens_that_come_back_from_their_text(words: Words) -> None:
    ids = words.usable.tolist()
    special = {words.tokenizer.bos_token_id, words.tokenizer.eos_token_id}
    assert ids and not special & set(ids)
    # "do" is only ever a piece of "dog"; "o" and "dog" are words.
    known = words.tokenizer.get_vocab()
    assert known["do"] not in ids and known["c"] not in ids and {known["dog</w>"], known["o</w>"]} <= set(ids)
    drawn = torch.tensor(ids)[torch.randint(len(ids), (40, 10), generator=torch.Generator().manual_seed(0))].tolist()
    plain = [row for row in drawn if not {",", ".", "'", "-"} & set("".join(words.tokenizer.batch_decode(row)))]
    assert plain and all(words.ids(words.text(row)) == row for row in plain)


def test_of_picturebook_only_the_words_of_its_language_are_proposed() -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    texts = set(tokenizer.batch_decode([[i] for i in usable_ids(tokenizer)]))
    assert {"cat", "kitten", "mosaic", ","} <= texts
    assert not {"q", "!", "umbre", "<|unknown|>", "<|endoftext|>"} & texts


@pytest.mark.parametrize(
    ("slots", "k", "tokens", "free"),
    [
        ("prefix", 2, [0, 0, 5, 6, 7], [0, 1]),
        ("suffix", 2, [5, 6, 7, 0, 0], [3, 4]),
        ("replace", 2, [0, 0], [0, 1]),
        ("every", 2, [5, 6, 0, 7], [2]),
        ("every", 1, [5, 0, 6, 0, 7, 0], [1, 3, 5]),
        ("every", 3, [5, 6, 7, 0], [3]),
    ],
)
def test_where_the_free_tokens_are(slots: str, k: int, tokens: list[int], free: list[int]) -> None:
    found = layout([5, 6, 7], slots, k, 6, 0)
    assert (found.tokens, found.free) == (tokens, free)
    filled = found.filled(range(90, 90 + len(free)))
    assert [filled[place] for place in free] == list(range(90, 90 + len(free)))
    assert [token for place, token in enumerate(filled) if place not in free] == (
        [] if slots == "replace" else [5, 6, 7]
    )


def test_the_end_of_a_prompt_makes_room() -> None:
    assert layout([5, 6, 7], "prefix", 4, 6, 0).tokens == [0, 0, 0, 0, 5, 6]
    assert layout([5, 6, 7], "suffix", 4, 6, 0).tokens == [5, 6, 0, 0, 0, 0]
    assert layout([5, 6, 7], "every", 1, 5, 0) == Layout([5, 0, 6, 0], [1, 3])
    with pytest.raises(UserError, match="7 free tokens do not fit into a prompt: the model takes 6"):
        layout([5, 6, 7], "replace", 7, 6, 0)
    with pytest.raises(UserError, match="3 tokens has no free place with one after every 4"):
        layout([5, 6, 7], "every", 4, 6, 0)


def test_an_attack_says_what_does_not_fit_before_it_starts() -> None:
    terms = Terms(25, 6, [[5, 6, 7], [5, 6]])
    for attack in (token_attack(k=6), token_attack(slots="every", k=2), mma(k=6), ring_a_bell(k=6)):
        attack.check(terms)
    with pytest.raises(UserError, match="attack test: 7 free tokens do not fit into a prompt: the model takes 6"):
        token_attack(k=7).check(terms)
    with pytest.raises(UserError, match="attack test: a prompt of 2 tokens has no free place with one after every 3"):
        token_attack(slots="every", k=3).check(terms)
    for name, attack in (("mma", mma(k=7)), ("ring_a_bell", ring_a_bell(k=7))):
        with pytest.raises(UserError, match=f"attack {name}: k is at most 6 tokens of this model, not 7"):
            attack.check(terms)


@pytest.mark.parametrize("nothing", ["rounds", "iterations", "generations", "steps"])
def test_an_attack_with_nothing_to_search_tries_nothing(scene: Scene, nothing: str) -> None:
    attacks: dict[str, Attack] = {
        "rounds": token_attack(rounds=0),
        "iterations": token_attack(iterations=0),
        "generations": ring_a_bell(generations=0),
        "steps": Inversion("inversion", "", 2, "a", 0, 1e-3, 2, 2, 9.0),
    }
    assert list(attacks[nothing].attempts(scene)) == []
    assert list(mma(iterations=0).attempts(scene)) == []


def test_the_same_text_is_painted_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter([["a", "b"], ["a", "c"], ["a", "b"], ["d", "b"]])
    monkeypatch.setattr(Search, "texts", lambda self, rows: next(said))
    painted: list[tuple[list[int], list[str]]] = []

    def keep(rows: list[int], texts: list[str]) -> Try:
        painted.append((rows, texts))
        return Try(rows, torch.zeros(len(rows), 3, 64, 64, dtype=torch.uint8), texts)

    monkeypatch.setattr(scene, "painted", keep)
    for _ in token_attack(rounds=4, iterations=1).attempts(scene):
        pass
    assert painted == [([0, 1], ["a", "b"]), ([1], ["c"]), ([0], ["d"])]


# --- the token engine -------------------------------------------------------------------------------------------------


def test_projection_onto_the_simplex() -> None:
    by_hand = torch.tensor([[0.6, 0.6, -1.0], [2.0, 0.0, 0.0], [0.2, 0.3, 0.5], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [1 / 3, 1 / 3, 1 / 3]])
    assert torch.allclose(on_simplex(by_hand), expected)
    points = torch.randn(20, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # The other way to it: the shift at which what is left adds up to 1, by bisection.
    low, high = points.min(dim=1).values - 1, points.max(dim=1).values
    for _ in range(100):
        middle = (low + high) / 2
        above = (points - middle[:, None]).clamp(0, 1).sum(dim=1) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    assert torch.allclose(on_simplex(points), (points - low[:, None]).clamp(0, 1), atol=1e-9)


def test_the_gradient_goes_straight_through_and_is_cut() -> None:
    soft = torch.tensor([[0.2, 0.3, 0.5]], requires_grad=True)
    hard = torch.tensor([[0.0, 1.0, 0.0]])
    out = straight_through(hard, soft)
    assert out.equal(hard)
    (out * torch.tensor([0.5, 7.0, -9.0])).sum().backward()
    assert soft.grad is not None and soft.grad.tolist() == [[0.5, 1.0, -1.0]]


def test_the_nearest_token_is_that_of_the_largest_cosine() -> None:
    table = torch.tensor([[1.0, 0.0], [0.0, 5.0], [-1.0, -1.0]])
    # (1, 2) is nearer to (1, 0) by distance, and to (0, 5) by angle.
    assert nearest_token(torch.tensor([[1.0, 2.0], [-3.0, -1.0]]), table).tolist() == [1, 2]


def test_noise_levels_in_order_are_those_of_the_paper() -> None:
    assert [level_of(i, 50, 1000) for i in range(50)] == list(range(10, 1000, 20))
    assert [level_of(i, 2, 1000) for i in range(2)] == [250, 750]


@pytest.mark.parametrize("objective", ["noise", "teacher"])
def test_the_gradient_of_the_objective_is_that_of_finite_differences(scene: Scene, objective: str) -> None:
    # The base predicts something else, so that the teacher's objective has a slope.
    bias = scene.model.pipe.unet.conv_out.bias
    scene.base = {"unet.conv_out.bias": bias.detach() + 0.5}
    search = Search(token_attack(objective=objective), scene, Words(scene.model))
    rows, rng = [0, 1], torch.Generator().manual_seed(1)
    noised = search.noised(rows, 1)
    point = torch.randn(4, 32, generator=rng).requires_grad_(True)
    search.losses(rows, point, *noised).sum().backward()
    assert point.grad is not None and point.grad.norm() > 0
    along = point.grad / point.grad.norm()
    step = 0.05
    with torch.no_grad():
        above, below = (search.losses(rows, point + sign * step * along, *noised).sum() for sign in (1, -1))
    assert float(above - below) / (2 * step) == pytest.approx(float(point.grad.norm()), rel=0.03)


def test_the_objectives_by_hand(scene: Scene) -> None:
    scene.base = {"unet.conv_out.bias": scene.model.pipe.unet.conv_out.bias.detach() + 0.5}
    words = Words(scene.model)
    for objective in ("noise", "teacher"):
        search = Search(token_attack(objective=objective, k=1), scene, words)
        ids = words.usable[[3, 4]]
        embeddings = words.encoder.get_input_embeddings().weight[ids]
        noised, t, eps = search.noised([0, 1], 0)
        assert t.tolist() == [250, 250]
        abar = scene.model.alphas_cumprod[250]
        clean = scene.model.latents_of(scene.pictures[:2])
        assert torch.allclose(noised, abar.sqrt() * clean + (1 - abar).sqrt() * eps, atol=1e-5)
        prompts = [f"{words.text([int(i)])} {case.prompt}" for i, case in zip(ids, scene.cases, strict=False)]
        predicted = scene.model.predict(noised, t, scene.model.encode(prompts))
        goal = eps
        if objective == "teacher":
            goal = scene.model.predict(noised, t, scene.model.encode(scene.prompts([0, 1]))) + 0.5
        expected = (predicted - goal).square().mean(dim=(1, 2, 3))
        assert torch.allclose(search.losses([0, 1], embeddings, noised, t, eps), expected, rtol=1e-3)


@pytest.mark.parametrize("variable", ["simplex", "nearest"])
def test_a_row_does_not_depend_on_those_beside_it(scene: Scene, variable: str) -> None:
    def end(rows: list[int], row: int) -> Tensor:
        scene.open = list(rows)
        options = {"variable": variable, "timesteps": "random", "lr": 0.1, "iterations": 3}
        search = Search(token_attack(**options), scene, Words(scene.model))
        for _ in range(3):
            search.step(0)
        return search.variable.detach()[search.mine([row])]

    assert torch.allclose(end([0, 1], 1), end([1], 1), atol=1e-4)
    assert not torch.allclose(end([1], 1), end([2], 2), atol=1e-3)


def test_the_search_stays_on_the_simplex_and_moves_only_what_is_free(scene: Scene) -> None:
    before = {key: value.clone() for key, value in scene.model.pipe.text_encoder.state_dict().items()}
    search = Search(token_attack(lr=0.1), scene, Words(scene.model))
    for _ in range(3):
        search.step(0)
    assert search.variable.shape[0] == 4
    assert torch.allclose(search.variable.sum(dim=1), torch.ones(4), atol=1e-4) and search.variable.min() >= 0
    assert search.variable.std() > 0.01
    assert all(value.equal(before[key]) for key, value in scene.model.pipe.text_encoder.state_dict().items())
    texts = search.texts([0, 1])
    assert [text.split(" ", 2)[2] for text in texts] == scene.prompts([0, 1])


@pytest.mark.parametrize("wrong", ["variable", "objective", "timesteps", "slots"])
def test_a_choice_that_there_is_not(wrong: str) -> None:
    with pytest.raises(UserError, match=f"attack test: {wrong} is "):
        token_attack(**{wrong: "nois"})


# --- the learned token ------------------------------------------------------------------------------------------------

INVERSION = Inversion(
    "inversion", "", pictures=2, start="a cat", steps=3, lr=0.05, batch_size=2, prompts=3, max_seconds=9
)


def test_a_token_that_is_the_word_itself_is_the_prompt(model: TextToImage, words: Words) -> None:
    own = words.encoder.get_input_embeddings().weight[words.ids("cat")[0]]
    asked = concept(target="cat", wordings=("cat in",))
    prompts = ["a cat 3", "dog, cat", "cat"]
    assert torch.allclose(with_token(words, asked, prompts, own), model.encode(prompts), atol=1e-5)
    # The longer wording is what the token stands for, and no part of another word is.
    assert torch.allclose(with_token(words, asked, ["a cat in on"], own), model.encode(["a cat on"]), atol=1e-5)
    # Before a prompt that does not name the concept, as for prompts from a file.
    assert torch.allclose(with_token(words, asked, ["a catdog"], own), model.encode(["cat a catdog"]), atol=1e-5)


def test_the_token_learns_and_nothing_else_does(scene: Scene) -> None:
    words = Words(scene.model)
    before = {key: value.clone() for key, value in scene.model.pipe.text_encoder.state_dict().items()}
    lesson = Lesson(INVERSION, scene, words)
    start = lesson.token.detach().clone()
    assert start.equal(words.encoder.get_input_embeddings().weight[words.ids("cat")[0]])

    def mean() -> float:
        with torch.no_grad():
            return sum(float(lesson.loss(step)) for step in range(20))

    first = mean()
    for step in range(20):
        lesson.step(step)
    assert mean() < first and not lesson.token.equal(start)
    assert all(value.equal(before[key]) for key, value in scene.model.pipe.text_encoder.state_dict().items())


def test_the_token_is_learned_once(scene: Scene) -> None:
    first = [attempt for attempt in INVERSION.attempts(scene) if attempt]
    again = list(INVERSION.attempts(scene))
    assert len(again) == len(first) == 1 and again[0] is not None
    assert again[0].pictures.equal(first[0].pictures) and first[0].texts is None


def test_a_token_that_is_nan_is_said_to_be_and_not_kept(scene: Scene) -> None:
    broken = replace(INVERSION, lr=1e37)
    with pytest.raises(UserError, match=r"attack inversion: what it learned is NaN; .* than 1e\+37"):
        list(broken.attempts(scene))
    assert not list(scene.folder.rglob("*.safetensors"))
    # So the next one learns anew.
    assert [attempt for attempt in INVERSION.attempts(scene) if attempt]


def test_pictures_of_nan_are_refused_and_not_counted_as_a_failed_attack(scene: Scene) -> None:
    start = noise(scene.seeds([0, 1]), scene.model.latent_shape, scene.model.device, scene.model.dtype)
    assert scene.finished(start).dtype == torch.uint8
    start[1, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="an attack on 'cat' paints NaN"):
        scene.finished(start)
    with pytest.raises(UserError, match="an attack on 'cat' paints NaN"):
        scene.painted_by_text([0], scene.model.encode(["a cat"]) * float("nan"))


# --- searches in text space -------------------------------------------------------------------------------------------


def test_the_genetic_search_finds_what_is_known() -> None:
    goals = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])

    def score(which: Tensor, ids: Tensor) -> Tensor:
        return (ids != goals[which]).sum(dim=1).float()

    chance = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    search = Genetic(score, 4, 10, 40, 0.5, 0.25, chance)
    best = [search.scores[0].min()]
    for _ in range(60):
        search.generation()
        best.append(search.scores[0].min())
    assert torch.stack(search.best()).equal(goals)
    assert best == sorted(best, reverse=True)  # the better half always stays
    assert all(
        own.equal(score(torch.full((len(ids),), i), ids))
        for i, (own, ids) in enumerate(zip(search.scores, search.ids, strict=True))
    )


def test_the_concept_vector_is_the_mean_difference(scene: Scene) -> None:
    pairs = [("a cat 1", "a thing 1"), ("a cat 2", "a thing 2")]
    encode = scene.model.encode
    expected = (encode(["a cat 1"]) + encode(["a cat 2"]) - encode(["a thing 1"]) - encode(["a thing 2"]))[0] / 2
    assert torch.allclose(concept_vector(scene, pairs), expected, atol=1e-6)


def mma(**options: Any) -> MMA:
    given: dict[str, Any] = {"k": 2, "iterations": 3, "candidates": 30, "top": 20, "blocked": ()}
    return MMA("mma", "", prompts=2, at_n=1, max_seconds=9, **given | options)


def ring_a_bell(**options: Any) -> RingABell:
    given: dict[str, Any] = {"pairs": 2, "strength": 3.0, "k": 2, "population": 4, "generations": 2}
    rates = {"crossover": 0.5, "mutation": 0.25}
    return RingABell("ring_a_bell", "", prompts=2, at_n=1, max_seconds=9, **given | rates | options)


def test_blocked_words_are_never_proposed(words: Words) -> None:
    asked = concept(target="a cat", wordings=("the dog on",))
    assert blocked_words(asked, ["In"]) == ["cat", "dog", "in"]
    allowed = allowed_tokens(words, blocked_words(asked, ["o"]))
    texts = [words.text([i]) for i in words.usable[allowed].tolist()]
    assert "a" in texts and "at" in texts
    assert not any(word in text for text in texts for word in ("cat", "dog", "o"))
    goals = F.normalize(words.embedded([words.ids("a dog"), words.ids("cat")], pooled=True), dim=1)
    chance = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    greedy = Greedy(words, allowed, goals, mma(), chance)
    seen = [*greedy.ids.flatten().tolist()]
    for _ in range(3):
        assert allowed[greedy.likely()].all()
        greedy.iteration()
        seen += greedy.ids.flatten().tolist()
    assert allowed[torch.tensor(seen)].all()
    with pytest.raises(UserError, match="no token is left"):
        allowed_tokens(words, [""])


def test_greedy_coordinates_find_what_is_known_and_remember_the_best(words: Words) -> None:
    known = [int(words.usable[7]), int(words.usable[11])]
    goals = F.normalize(words.embedded([known], pooled=True), dim=1)
    everything = torch.ones(len(words.usable), dtype=torch.bool)
    options = mma(candidates=200, top=len(words.usable))
    greedy = Greedy(words, everything, goals, options, [torch.Generator().manual_seed(0)])
    for _ in range(8):
        greedy.iteration()
    found = words.usable[greedy.best[0]].tolist()
    assert float(greedy.lowest[0]) == pytest.approx(0, abs=1e-4) and found == known
    pooled = F.normalize(words.embedded([found], pooled=True), dim=1)
    assert float(greedy.lowest[0]) == pytest.approx(1 - float((pooled * goals).sum()), abs=1e-5)


def test_a_prompt_that_is_tokenised_otherwise_is_no_candidate(words: Words) -> None:
    vocabulary = words.usable.tolist()
    a, dot = vocabulary.index(words.ids("a")[0]), vocabulary.index(words.ids(".")[0])
    goals = F.normalize(words.embedded([words.ids("a")], pooled=True), dim=1)
    greedy = Greedy(words, torch.ones(len(vocabulary), dtype=torch.bool), goals, mma(), [torch.Generator()])
    distances = greedy.distance(torch.tensor([[a, a], [dot, a]]), torch.tensor([0, 0]))
    assert torch.isfinite(distances).tolist() == [
        words.ids(words.text([vocabulary[i] for i in pair])) == [vocabulary[i] for i in pair]
        for pair in ([a, a], [dot, a])
    ]


# --- probes -----------------------------------------------------------------------------------------------------------


def test_completion_without_a_first_step_is_the_edited_model_alone(scene: Scene) -> None:
    scene.base = {"unet.conv_out.bias": scene.model.pipe.unet.conv_out.bias.detach() + 3}
    tries = list(Completion("completion", "", (0, 2), 3, 9.0).attempts(scene))
    plain = scene.pictures[:2]
    assert tries[0] is not None and tries[1] is not None
    assert (tries[0].pictures.int() - plain.int()).abs().max() <= 1
    assert (tries[1].pictures.int() - plain.int()).abs().max() > 1
    with pytest.raises(UserError, match="after is below the sampler's 3 steps"):
        Completion("completion", "", (3,), 3, 9.0).check(Terms(3, 6, []))


def test_completion_by_the_same_model_changes_nothing(scene: Scene) -> None:
    (attempt,) = Completion("completion", "", (2,), 3, 9.0).attempts(scene)
    assert attempt is not None and (attempt.pictures.int() - scene.pictures[:2].int()).abs().max() <= 1


def test_what_is_outside_the_hole_is_known(scene: Scene) -> None:
    model = scene.model
    text, empty = model.encode(scene.prompts([0, 1])), model.encode([""])
    known = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(5))
    start = noise(scene.seeds([0, 1]), model.latent_shape)
    inside = centre((8, 8), 0.5)
    assert inside.sum() == 16 and inside[2:6, 2:6].all()
    seen: list[int] = []

    def after(i: int, latents: Tensor) -> Tensor:
        seen.append(i)
        return torch.where(inside, latents, known)

    end = denoise_on(model, start, 0, text, empty, SAMPLER, after=after)
    assert seen == [1, 2, 3]
    assert end[..., ~inside].equal(known[..., ~inside]) and not end[..., inside].isclose(known[..., inside]).any()


def test_only_the_hole_is_judged(scene: Scene) -> None:
    (attempt,) = Inpainting("inpainting", "", 0.5, 3, 9.0).attempts(scene)
    (whole,) = Inpainting("inpainting", "", 1.0, 3, 9.0).attempts(scene)
    assert (
        attempt is not None and whole is not None and attempt.pictures.shape == whole.pictures.shape == (2, 3, 64, 64)
    )
    # A hole as large as the picture leaves nothing known: the plain answer.
    assert (whole.pictures.int() - scene.pictures[:2].int()).abs().max() <= 1


def flat(pipe: Any) -> TextToImage:
    """A model that predicts the same for everything: on it DDIM backwards is exact."""
    pipe.unet.conv_out.weight.data.zero_()
    return TextToImage(pipe, "flat")


def test_ddim_backwards_is_the_way_back(tiny_pipe: Any) -> None:
    model = flat(tiny_pipe)
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    empty = model.encode([""])
    start = invert(model, latents, empty.expand(2, -1, -1), 20)
    # At the noisiest level there is little left of it: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps.
    abar, eps = model.alphas_cumprod[951], model.pipe.unet.conv_out.bias.view(1, -1, 1, 1)
    assert torch.allclose(start, abar.sqrt() * latents + (1 - abar).sqrt() * eps, atol=1e-3)
    back = denoise_on(model, start, 0, empty.expand(2, -1, -1), empty, Sampler(steps=20, guidance=1.0))
    assert torch.allclose(back, latents, atol=1e-3)


def test_latent_inversion_starts_from_the_picture(tiny_pipe: Any, scene: Scene) -> None:
    scene.model = flat(tiny_pipe)
    tries = list(LatentInversion("latent_inversion", "", 0.0, ("same", "empty"), 20, 3, 9.0).attempts(scene))
    encoded = scene.finished(scene.model.latents_of(scene.pictures[:2]))
    assert len(tries) == 2
    assert all(attempt and (attempt.pictures.int() - encoded.int()).abs().max() <= 1 for attempt in tries)
    with pytest.raises(UserError, match="paint_with is same or empty, not 'sam'; did you mean same"):
        LatentInversion("latent_inversion", "", 0.0, ("sam",), 10, 3, 9.0)
    with pytest.raises(UserError, match="fresh is between 0 and 1, not 2"):
        LatentInversion("latent_inversion", "", 2, ("same",), 10, 3, 9.0)


def test_with_fresh_noise_alone_latent_inversion_is_the_plain_painting(scene: Scene) -> None:
    plain = list(LatentInversion("latent_inversion", "", 1.0, ("same",), 3, 3, 9.0).attempts(scene))
    assert plain[0] and (plain[0].pictures.int() - scene.pictures[:2].int()).abs().max() <= 1
    half = LatentInversion("latent_inversion", "", 0.5, ("same",), 3, 3, 9.0)
    ends = [LatentInversion("", "", fresh, ("same",), 3, 3, 9.0)._inverted(scene, [0, 1]) for fresh in (0.0, 1.0)]
    assert torch.allclose(half._inverted(scene, [0, 1]), 0.5**0.5 * (ends[0] + ends[1]), atol=1e-5)


def test_more_noise(model: TextToImage) -> None:
    text, empty, seeds = model.encode(["a cat", "a dog"]), model.encode([""]), [1, 2]
    start = noise(seeds, model.latent_shape)
    plain = denoise_on(model, start, 0, text, empty, SAMPLER)
    assert torch.allclose(denoise_noisily(model, text, empty, seeds, SAMPLER, 0.0), plain, atol=1e-5)
    once = denoise_noisily(model, text, empty, seeds, SAMPLER, 1.0)
    assert not once.allclose(plain, atol=0.1)
    louder = denoise_noisily(model, text, empty, seeds, SAMPLER, 1.0, 1.05)
    assert not louder.allclose(once, atol=1e-3)
    # An eta that no step has room for takes the room there is.
    assert torch.isfinite(denoise_noisily(model, text, empty, seeds, SAMPLER, 9.0)).all()
    sampler = Sampler(steps=3, guidance=2.0, eta=1.0)
    as_painted = model.decode(once)
    painted = torch.cat(list(paint(model, ["a cat", "a dog"], seeds, sampler, 2)))
    assert ((as_painted * 255).round() - painted).abs().max() <= 1


@pytest.mark.parametrize(("wrong", "says"), [({"etas": ()}, "empty list"), ({"louder": (-1.0,)}, "at least 0")])
def test_noise_that_makes_no_sense(wrong: Mapping[str, Sequence[float]], says: str) -> None:
    given: dict[str, Any] = {"etas": (1.0,), "louder": (1.0,)}
    with pytest.raises(UserError, match=says):
        Noise("noise", "", prompts=3, max_seconds=9.0, **given | dict(wrong))
