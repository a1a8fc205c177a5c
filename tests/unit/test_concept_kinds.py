"""Combinations, conditions and sets; out-of-set, implicit, composition and cell prompts of the shipped concepts."""

import re
from functools import cache
from typing import Any

import pytest

from unpaint.cases import CELLS, Case
from unpaint.checking import check
from unpaint.concepts import AnyConcept, Concept, ConceptSet
from unpaint.config import compose, conf_dir, instantiate
from unpaint.errors import UserError
from unpaint.picturebook import captions
from unpaint.picturebook.world import OBJECTS, STYLES

PAIRED = (
    "bottle_and_car",
    "cat_and_dog",
    "fish_in_mosaic",
    "spider_in_room",
    "cat_on_table",
    "car_at_night",
    "boat_in_sketch",
)
SETS = sorted(file.stem for file in (conf_dir() / "concept").glob("*.yaml") if "ConceptSet" in file.read_text())
VOCABULARY = set(re.findall(r"[a-z]+", " ".join(captions.corpus())))


@cache
def shipped(name: str) -> AnyConcept:
    return instantiate(compose([f"concept={name}"]).concept)


@cache
def cases(name: str) -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {}
    for case in shipped(name).cases(0):
        found.setdefault(case.part, []).append(case)
    return found


def with_role(case: Case, role: str) -> set[str]:
    return {label for label, own in case.wants.items() if own == role}


@pytest.mark.parametrize("name", PAIRED)
def test_a_table_asks_for_both_one_other_and_neither(name: str) -> None:
    concept = shipped(name)
    first, second = concept.members[0].labels
    by_part = cases(name)
    assert all(with_role(case, "target") == {first, second} for case in by_part["target"])
    for cell, there in (("first_only", {first}), ("second_only", {second}), ("neither", set())):
        assert len(by_part[cell]) == 96
        for case in by_part[cell]:
            assert with_role(case, "asked") & {first, second} == there
            assert with_role(case, "asked")
            assert not {first, second} <= set(case.wants)
            assert not with_role(case, "target")
    assert len({case.prompt for part in ("target", *CELLS) for case in by_part[part]}) == 4 * 96


@pytest.mark.parametrize("name", [*PAIRED, *SETS])
def test_no_picture_that_is_to_stay_asks_for_a_target(name: str) -> None:
    concept = shipped(name)
    targets = [set(member.labels) for member in concept.members]
    kept = [case for part in ("retain", "composition", *CELLS) for case in cases(name).get(part, [])]
    assert not any(target <= set(case.wants) for case in kept for target in targets)
    words = [word for member in concept.members for word in member.words]
    assert not any(word in text for text in [*concept.retain_prompts(), *(c.prompt for c in kept)] for word in words)


@pytest.mark.parametrize("name", [*PAIRED, *SETS, "cat", "spider", "mosaic"])
def test_shipped_prompts_are_in_picturebooks_language(name: str) -> None:
    concept = shipped(name)
    texts = {text for part in cases(name).values() for case in part for text in (case.prompt, case.neutral)}
    for text in texts.union(concept.prompts(True), concept.anchor_prompts(True), concept.retain_prompts()):
        assert set(re.findall(r"[a-z]+", text)) <= VOCABULARY
        assert captions.length(text) <= captions.MAX_TOKENS
        assert "{" not in text
    assert len(concept.prompts(True)) == len(concept.anchor_prompts(True)) == len(concept.bare_prompts(True))
    own = [case for part in cases(name).values() for case in part]
    assert len({case.seed for case in own}) == len(own)


@pytest.mark.parametrize("name", OBJECTS)
def test_out_of_set_words_are_the_test_words(name: str) -> None:
    evaluation = shipped(name).members[0].evaluation
    words = [*captions.phrases(name, "synonym", "test"), *captions.phrases(name, "description", "test")]
    assert list(evaluation.out_of_set) == words
    assert list(evaluation.implicit) == captions.phrases(name, "implied", "test")
    for part in ("out_of_set", "implicit"):
        for case in cases(name).get(part, []):
            assert any(word in case.prompt for word in getattr(evaluation, part))
            assert name not in re.findall(r"[a-z]+", case.prompt)
            assert with_role(case, "target") == {f"object/{name}"}


@pytest.mark.parametrize("name", STYLES)
def test_out_of_set_styles_are_the_test_phrases(name: str) -> None:
    texts = shipped(name).members[0].evaluation.out_of_set
    phrases = [*captions.STYLE_HEADS[name].test, *captions.STYLE_TAILS[name].test]
    assert all(any(phrase in text for text in texts) for phrase in phrases)
    assert all(any(phrase in text for phrase in phrases) for text in texts)


def test_out_of_set_prompts_use_held_out_sentences() -> None:
    used = shipped("cat").members[0].evaluation.other_templates
    plain = {"tail": "in {style} style", "head": "a {style} picture", "subject": "{concept}", "setting": "{setting}"}
    assert {text.format(**plain) for text in captions.TEMPLATES["held_out"]} <= set(used)


def test_composition_asks_for_several_things_none_of_them_the_target() -> None:
    relations = set()
    for case in cases("cat")["composition"]:
        asked = with_role(case, "asked")
        assert len(asked) == len(case.wants) >= 2
        assert "object/cat" not in asked and "setting/none" not in asked
        assert all(label.split("/")[1] in case.prompt for label in asked)
        relations |= {label for label in asked if label.startswith("relation")}
    assert relations == {"relation/next to", "relation/on a table"}


def test_neutral_prompts_say_all_but_the_target() -> None:
    for case in cases("cat")["target"]:
        assert case.neutral == case.prompt.replace("a cat", "a scene")
    assert all(case.neutral == "" for case in cases("cat")["retain"])


def test_a_set_covers_its_members_from_the_head_on() -> None:
    pets = shipped("pets")
    assert isinstance(pets, ConceptSet)
    assert (pets.kind, pets.name, pets.target) == ("set", "pets", "a cat, a dog, a bird and a fish")
    assert pets.prompts()[:4] == ["a cat", "a dog", "a bird", "a fish"]
    assert pets.anchor_prompts()[:4] == ["a flower", "a house", "a tree", "a boat"]
    bare = dict(zip(pets.prompts(True), pets.bare_prompts(True), strict=True))
    assert (bare["a kitten in neon style"], bare["a puppy in neon style"]) == ("a cat", "a dog")
    assert set(pets.prompts(True)) == {p for member in pets.members for p in member.prompts(True)}
    groups = [case.group for case in cases("pets")["target"]]
    assert groups[:4] == ["object/cat", "object/dog", "object/bird", "object/fish"]
    assert {label: groups.count(label) for label in set(groups)} == dict.fromkeys(groups[:4], 32)
    assert set(pets.retained) == set(shipped("cat").retained) - set(groups)
    assert set(pets.neighbours) <= set(pets.retained)
    # what is retained is what the single concepts retain: the unedited model's pictures are shared
    kept = {(case.prompt, case.seed) for case in cases("pets")["retain"]}
    assert kept < {(case.prompt, case.seed) for case in cases("cat")["retain"]}


def test_a_set_over_two_axes_avoids_its_own_members() -> None:
    mixed = ConceptSet("mixed", (shipped("cat").members[0], shipped("mosaic").members[0]))
    for case in mixed.cases(0):
        assert not {"object/cat", "style/mosaic"} <= set(case.wants)
        if case.part != "target" and case.part != "out_of_set":
            assert not {"object/cat", "style/mosaic"} & set(case.wants)
    assert mixed.axis == "concept"


def test_times_adds_pictures_behind_the_same_ones() -> None:
    concept = shipped("fish_in_mosaic")
    once, thrice = concept.cases(0), concept.cases(0, times=3)
    for part in ("target", "retain", "composition", "neither"):
        short, long = ([case for case in some if case.part == part] for some in (once, thrice))
        kept = [case for case in long if case in short]
        assert kept == short and len(long) > len(short)
    assert len({case.prompt for case in thrice if case.part == "target"}) == 132  # all that there are


def described(**changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "name": "both",
        "kind": "combination",
        "axis": "object",
        "labels": ["object/cat", "object/dog"],
        "target": "a cat and a dog",
        "wordings": ["a dog and a cat"],
        "anchor": "a cat",
        "templates": ["{concept}"],
    }
    evaluation = {
        "templates": ["{concept}", "a picture of {concept}"],
        "in_domain": {"object/cat": "a cat", "object/dog": "a dog"},
        "cells": {"first_only": {"a cat": ["object/cat"]}},
        "target_pictures": 2,
        "per_label": 1,
        "cell_pictures": 2,
    }
    return content | changes | {"evaluation": evaluation | changes.get("evaluation", {})}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ["object/cat"]}, "at least two different labels"),
        ({"kind": "individual"}, "an individual concept has one label, not 2"),
        ({"anchor": "A dog and a cat"}, "anchor and target are both 'a dog and a cat'"),
        ({"evaluation": {"in_domain": {"object/x": "a small cat and a dog"}}}, "but that is the target"),
        ({"evaluation": {"cells": {"frist_only": {"a cat": ["object/cat"]}}}}, "did you mean first_only"),
        ({"evaluation": {"cells": {"neither": {"a dog and a cat": ["object/x"]}}}}, "but that is the target"),
        ({"evaluation": {"cells": {"neither": {"two pets": ["object/cat", "object/dog"]}}}}, "but that is the target"),
        ({"evaluation": {"cells": {"neither": {"a fish": []}}}}, "'a fish' has no labels"),
        ({"evaluation": {"cells": {"neither": {"a fish": "object/fish"}}}}, "must be a list"),
        ({"evaluation": {"cell_pictures": 3}}, "lower cell_pictures"),
        ({"evaluation": {"out_of_set": ["pets"], "out_of_set_pictures": 3}}, "lower out_of_set_pictures"),
        ({"evaluation": {"implicit_pictures": -1, "implicit": ["pets"]}}, "implicit_pictures is -1"),
        ({"evaluation": {"composition": ["{concept} and {othr}"]}}, "a slot {othr} that slots lacks"),
        ({"evaluation": {"templates": ["{concept}", "a dog and a cat with {concept}"]}}, "but it names the target"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        Concept(**described(**changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_sets_that_contradict_themselves_are_refused() -> None:
    cat, dog = shipped("cat").members[0], shipped("dog").members[0]
    with pytest.raises(UserError, match="'cat' would become 'a dog', which is to be erased as well"):
        ConceptSet("two", (cat, dog))
    with pytest.raises(UserError, match="at least two members"):
        ConceptSet("one", (cat,))
    with pytest.raises(UserError, match="are the same"):
        ConceptSet("twice", (dog, dog))
    with pytest.raises(UserError, match="'cat' would become 'a dog'"):
        check(["concept=pets", "concept.members.cat.anchor=a dog"], "run")


@pytest.mark.parametrize("name", [*PAIRED, *SETS])
def test_shipped_concepts_pass_the_check_of_a_run(name: str) -> None:
    check([f"concept={name}", "evaluator=standard"], "run")


@pytest.mark.parametrize("name", ["church", "van_gogh", "parachute"])
def test_concepts_for_another_model_need_another_detector(name: str) -> None:
    check([f"concept={name}", "model=sd14", "probes=0"], "erase")
    with pytest.raises(UserError, match=r"detector does not know '.*detector@evaluator\.detector=NAME"):
        check([f"concept={name}", "model=sd14"], "run")
