"""Picturebook's captions and tokenizer."""

import random
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import pytest

from unpaint.errors import UserError
from unpaint.picturebook import captions
from unpaint.picturebook.captions import (
    MAX_TOKENS,
    Kind,
    Mark,
    Name,
    caption,
    corpus,
    erase_prompts,
    implied_prompts,
    length,
    out_of_set_prompts,
    phrases,
)
from unpaint.picturebook.tokenizer import build, unused_ids
from unpaint.picturebook.world import OBJECTS, PAINTABLE, SETTINGS, STYLES, Scene, random_scene

KINDS: tuple[Kind, ...] = get_args(Kind)
NAMES: tuple[Name, ...] = get_args(Name)
MARKS: tuple[Mark, ...] = get_args(Mark)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    build(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def some_captions(n: int) -> Iterator[tuple[Scene, str]]:
    rng = random.Random(0)
    for _ in range(n):
        scene = random_scene(rng, OBJECTS)
        name, mark = rng.choice(NAMES), rng.choice(MARKS)
        yield scene, caption(scene, rng, "all", name, mark, drop=0.2)


def words_of(name: str) -> set[str]:
    """Name and synonyms, as they would appear in a text, with plurals."""
    singles = {name, *(phrase.split()[-1] for phrase in phrases(name, "synonym"))}
    return singles | {f"{word}s" for word in singles} | {f"{word}es" for word in singles}


@pytest.mark.parametrize("name", OBJECTS)
def test_each_object_has_enough_phrases_of_each_mark(name: str) -> None:
    assert len(phrases(name, "synonym", "test")) >= 1
    assert len(phrases(name, "description", "test")) >= 3
    assert len(phrases(name, "description", "erase")) >= 3
    assert len(phrases(name, "description")) >= 8


def test_every_phrase_belongs_to_one_object_and_one_mark() -> None:
    everything = [p for name in OBJECTS for kind in KINDS for p in phrases(name, kind)]
    assert len(everything) == len(set(everything))
    styled = [
        p for table in (captions.STYLE_HEADS, captions.STYLE_TAILS) for group in table.values() for p in chain(*group)
    ]
    assert len(styled) == len(set(styled))


def test_descriptions_name_no_object_style_or_setting() -> None:
    names = set(chain.from_iterable(words_of(name) for name in OBJECTS)) | set(STYLES) | set(SETTINGS) | {"table"}
    for name in OBJECTS:
        for phrase in phrases(name, "description") + phrases(name, "implied"):
            assert not names & set(phrase.split()), phrase


def test_erase_prompts_hold_no_test_phrase() -> None:
    for name in OBJECTS:
        own = set(erase_prompts(name))
        assert own.isdisjoint(out_of_set_prompts(name))
        hidden = phrases(name, "synonym", "test") + phrases(name, "description", "test")
        assert not any(phrase in prompt for phrase in hidden for prompt in own)
        assert all(any(phrase in prompt for prompt in out_of_set_prompts(name)) for phrase in hidden)
    for style in STYLES:
        assert len(erase_prompts(style)) == len(out_of_set_prompts(style)) == 2 * len(PAINTABLE)
        assert not any(style in prompt.split() for prompt in out_of_set_prompts(style))


def test_only_the_spider_is_implied() -> None:
    assert [name for name in OBJECTS if phrases(name, "implied")] == ["spider"]
    assert len(implied_prompts("spider")) >= 24
    assert set(implied_prompts("spider", "erase")).isdisjoint(implied_prompts("spider", "test"))
    assert implied_prompts("cat") == []


def test_captions_are_plain_text_within_the_limit() -> None:
    for _, text in some_captions(20_000):
        assert re.fullmatch(r"[a-z]+(,? [a-z]+)*", text), text
        assert length(text) <= MAX_TOKENS, text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text


def test_captions_name_what_the_scene_shows() -> None:
    rng = random.Random(1)
    for _ in range(3_000):
        scene = random_scene(rng)
        text = caption(scene, rng, "all", name="plain")
        named = {name for name in OBJECTS if re.search(rf"\b{name}\b", text)}
        assert named == set(scene.objects), text
        assert ("on a table" in text or "a table with" in text) == (scene.relation == "on a table"), text
        styles = [s for s in STYLES if any(f in text for f in style_forms(s))]
        assert styles == [scene.style], text
        places = [p for p in SETTINGS if scene.objects and any(f in text for f in captions.SETTING_PHRASES[p])]
        assert places == ([scene.setting] if scene.objects and scene.setting != "none" else []), text


def style_forms(style: str) -> list[str]:
    own = [*captions.STYLE_HEADS[style].of("any"), *captions.STYLE_TAILS[style].of("any")]
    return [f"a {style} picture", f"in {style} style", *own]


def test_marks_and_names_are_obeyed() -> None:
    scene = Scene(("cat", "dog"), "neon", "snow", "next to", 0)
    described = {name: phrases(name, "description", "erase") for name in scene.objects}
    for i in range(500):
        text = caption(scene, random.Random(i), name="description", mark="erase")
        assert sum(phrase in text for group in described.values() for phrase in group) == 1, text
        assert "glowing" not in text
        text = caption(scene, random.Random(i), name="synonym", mark="test")
        assert "a pussycat" in text, text
        assert "a hound" in text, text


def test_dropping_leaves_out_style_and_setting() -> None:
    scene = Scene(("apple",), "mosaic", "night", "alone", 0)
    bare = {caption(scene, random.Random(i), name="plain", drop=1.0) for i in range(300)}
    assert all(not re.search("mosaic|tile|night|stars|moonlight", text) for text in bare)
    assert "an apple" in bare
    assert "a photo of an apple" in bare


def test_empty_scenes() -> None:
    scene = Scene((), "crayon", "beach", "none", 0)
    texts = {caption(scene, random.Random(i)) for i in range(300)}
    assert "an empty beach in crayon style" in texts
    assert all("empty" in text for text in texts)


def test_common_forms_occur_in_training() -> None:
    scene = Scene(("cat",), "watercolor", "beach", "alone", 0)
    texts = {caption(scene, random.Random(i), name="plain", drop=0.3) for i in range(3_000)}
    assert {
        "a cat",
        "a picture of a cat",
        "a cat in watercolor style",
        "a watercolor picture of a cat",
        "a watercolor painting of a cat by the sea",
        "a cat in watercolor style on a beach",
    } <= texts


def test_held_out_templates_stay_out_of_training() -> None:
    assert len(captions.TEMPLATES["train"]) + len(captions.TEMPLATES["held_out"]) >= 14
    for scene in (
        Scene(("cat",), "watercolor", "beach", "alone", 0),
        Scene(("cat", "boat"), "flat", "night", "next to", 0),
        Scene(("apple",), "neon", "room", "on a table", 0),
    ):
        trained = {caption(scene, random.Random(i)) for i in range(1_500)}
        held_out = {caption(scene, random.Random(i), templates="held_out") for i in range(1_500)}
        assert trained.isdisjoint(held_out)


def test_captions_are_a_function_of_scene_and_random_state() -> None:
    assert list(some_captions(300)) == list(some_captions(300))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean cat"):
        phrases("kat")
    with pytest.raises(UserError, match="did you mean mosaic"):
        out_of_set_prompts("mosaik")


def test_tokenizer_is_the_same_every_time(folder: Path, tmp_path: Path) -> None:
    build(tmp_path)
    files = sorted(p.name for p in folder.iterdir())
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= set(files)
    assert sorted(p.name for p in tmp_path.iterdir()) == files
    assert all((folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in files)


def test_tokenizer_special_tokens(tokenizer: Any) -> None:
    assert type(tokenizer).__name__ == "CLIPTokenizer"
    assert len(tokenizer) <= 1000
    assert tokenizer.eos_token_id == len(tokenizer) - 1 == max(tokenizer.get_vocab().values())
    assert tokenizer.eos_token_id != 2
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.model_max_length == 24
    ids = tokenizer("a cat", padding="max_length", truncation=True).input_ids
    assert len(ids) == 24
    assert ids[0] == tokenizer.bos_token_id
    assert ids[3:] == [tokenizer.eos_token_id] * 21
    assert len(tokenizer("a cat " * 30, padding="max_length", truncation=True).input_ids) == 24
    # An unknown byte must not end the sentence early.
    assert tokenizer("a caf\u00e9 cat").input_ids.count(tokenizer.eos_token_id) == 1


def test_tokenizer_takes_each_word_as_one_token_and_gives_it_back(tokenizer: Any) -> None:
    texts = dict.fromkeys([*corpus(), *(text for _, text in some_captions(5_000))])
    for text in texts:
        ids = tokenizer(text).input_ids
        assert len(ids) == length(text) + 2, text
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert decoded.replace(" ,", ",") == text  # CLIP's decoder puts a space before a comma
        assert tokenizer(decoded).input_ids == ids


def test_unused_ids_are_those_that_captions_never_have(tokenizer: Any) -> None:
    unused = set(unused_ids(tokenizer))
    used = {i for _, text in some_captions(5_000) for i in tokenizer(text).input_ids}
    assert unused.isdisjoint(used)
    assert tokenizer.unk_token_id in unused
    assert len(unused) < len(tokenizer) - 300


def test_tokenizer_loads_from_vocabulary_and_merges_alone(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    other = CLIPTokenizer.from_pretrained(tmp_path)
    for text in corpus():
        assert other(text).input_ids == tokenizer(text).input_ids
