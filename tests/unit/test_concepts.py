"""Concepts: the shipped ones are valid and ask for what they should; contradictions are refused in one line."""

import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from omegaconf import OmegaConf

from unpaint.concepts import Concept
from unpaint.config import compose, instantiate
from unpaint.errors import UserError
from unpaint.listing import conf_dir
from unpaint.picturebook import captions
from unpaint.picturebook.world import OBJECTS, PAINTABLE, SETTINGS, STYLES


@cache
def shipped(name: str) -> Concept:
    return instantiate(compose([f"concept={name}"]).concept)


def test_there_is_a_concept_for_every_object_and_style() -> None:
    files = {path.stem for path in Path(conf_dir(), "concept").glob("*.yaml")}
    assert files >= {*OBJECTS, *STYLES}


@pytest.mark.parametrize("name", [*OBJECTS, *STYLES])
def test_shipped_concepts_ask_for_what_they_say(name: str) -> None:
    concept = shipped(name)
    axis, cross = ("style", "object") if name in STYLES else ("object", "style")
    assert (concept.name, concept.labels, concept.axis) == (name, (f"{axis}/{name}",), axis)
    cases = [case for case in concept.cases(0) if case.part in ("target", "retain")]
    known = {f"{a}/{w}" for a, ws in (("object", OBJECTS), ("style", STYLES)) for w in ws}
    known |= {f"setting/{word}" for word in (*SETTINGS, "none")}
    assert {label for case in cases for label in case.wants} <= known
    for case in cases:
        roles = Counter(case.wants.values())
        assert roles["cross_domain"] == 1
        assert roles["target"] + roles["in_domain"] + roles["neighbour"] == 1
        # what is wanted is asked for in words, and a retained prompt never names the target
        assert all(f"{label.split('/')[1]}" in case.prompt for label in case.wants if label.split("/")[0] != "setting")
        assert (name in case.prompt.replace(",", "").split()) == ("target" in case.wants.values())
        assert "  " not in case.prompt
        assert not case.prompt.endswith((" ", ","))
    targets = [case for case in cases if "target" in case.wants.values()]
    assert len({case.prompt for case in targets}) == len(targets) == 96
    assert len({case.prompt for case in cases}) == len({case.seed for case in cases}) == len(cases)
    kept = Counter(case.group for case in cases if case not in targets)
    everything = STYLES if axis == "style" else PAINTABLE
    assert kept == {f"{axis}/{word}": 16 for word in everything if word != name}
    crossed = Counter(label for case in targets for label in case.wants if label.startswith(f"{cross}/"))
    assert len(set(crossed.values())) == 1


def test_cases_are_a_pure_function_of_the_seed() -> None:
    assert shipped("cat").cases(3) == shipped("cat").cases(3)
    one, other = shipped("cat").cases(3), shipped("cat").cases(4)
    assert [case.prompt for case in one] == [case.prompt for case in other]
    assert {case.seed for case in one}.isdisjoint(case.seed for case in other)


def test_concepts_of_one_base_share_their_pictures() -> None:
    def pictures(name: str) -> dict[str, list[tuple[str, int]]]:
        found: dict[str, list[tuple[str, int]]] = {}
        for case in shipped(name).cases(0):
            if case.part in ("target", "retain"):
                found.setdefault(case.group, []).append((case.prompt, case.seed))
        return found

    cat, dog = pictures("cat"), pictures("dog")
    assert all(cat[label] == dog[label] for label in cat if label not in ("object/cat", "object/dog"))
    assert cat["object/cat"][:16] == dog["object/cat"]
    assert dog["object/dog"][:16] == cat["object/dog"]


def test_erasing_prompts_and_anchors_are_aligned() -> None:
    words = {"templates": ["{concept} in {style} style", "{concept}"], "erase": ["a {style} kitten", "a kitten"]}
    concept = Concept(**described(**words))
    assert concept.prompts() == ["a cat", "a cat in flat style", "a cat in neon style"]
    assert concept.anchor_prompts() == ["a dog", "a dog in flat style", "a dog in neon style"]
    assert dict(zip(concept.prompts(further=True), concept.anchor_prompts(further=True), strict=True)) == {
        "a cat": "a dog",
        "a kitten": "a dog",
        "a cat in flat style": "a dog in flat style",
        "a cat in neon style": "a dog in neon style",
        "a flat kitten": "a dog in flat style",
        "a neon kitten": "a dog in neon style",
    }


@pytest.mark.parametrize("name", [*OBJECTS, *STYLES])
def test_shipped_concepts_speak_picturebooks_language(name: str) -> None:
    concept = shipped(name)
    erasing = concept.prompts(further=True)
    assert len(erasing) == len(concept.anchor_prompts(further=True)) == len(set(erasing))
    words = set(re.findall(r"[a-z]+", " ".join(captions.corpus())))
    for prompt in [*erasing, *concept.anchor_prompts(further=True), *(case.prompt for case in concept.cases(0))]:
        assert set(re.findall(r"[a-z]+", prompt)) <= words
        assert captions.length(prompt) <= captions.MAX_TOKENS


@pytest.mark.parametrize("name", [*OBJECTS, *STYLES])
def test_shipped_concepts_offer_all_erase_phrases_and_no_test_phrase(name: str) -> None:
    def phrases(mark: captions.Mark) -> set[str]:
        if name in STYLES:
            return {*captions.STYLE_HEADS[name].of(mark), *captions.STYLE_TAILS[name].of(mark)}
        return {text for kind in get_args(captions.Kind) for text in captions.phrases(name, kind, mark)}

    erasing = shipped(name).prompts(further=True)
    assert all(any(phrase in prompt for prompt in erasing) for phrase in phrases("erase"))
    assert not any(phrase in prompt for prompt in erasing for phrase in phrases("test"))


def test_containers_of_omegaconf_do_as_well() -> None:
    plain = Concept(**described())
    wrapped = OmegaConf.create(described())
    assert Concept(**{str(key): wrapped[key] for key in wrapped}) == plain


def test_without_a_crossed_axis() -> None:
    some = {
        "templates": ["a photo of {concept}", "{concept}, {place}"],
        "slots": {"place": {"p/a": "", "p/b": "there"}},
    }
    concept = Concept(**described(evaluation=some | {"target_pictures": 3}, neighbours=[], templates=["{concept}"]))
    cases = concept.cases(0)
    assert {case.prompt for case in cases} == {"a photo of a cat", "a cat", "a cat, there"}
    assert {tuple(sorted(case.wants)) for case in cases} == {
        ("object/cat",),
        ("object/cat", "p/a"),
        ("object/cat", "p/b"),
    }


def described(**changes: Any) -> dict[str, Any]:
    evaluation = {
        "templates": ["a picture of {concept} in {style} style"],
        "slots": {"style": {"style/flat": "flat", "style/neon": "neon"}},
        "in_domain": {"object/cat": "a cat", "object/dog": "a dog"},
        "cross_domain": "style",
        "target_pictures": 2,
        "per_label": 2,
    }
    content = {
        "name": "cat",
        "kind": "individual",
        "axis": "object",
        "labels": ["object/cat"],
        "target": "a cat",
        "anchor": "a dog",
        "templates": ["{concept}"],
        "neighbours": ["object/dog"],
        "evaluation": evaluation | changes.pop("in_evaluation", {}),
    }
    return content | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anchor": "A cat "}, "anchor and target are both 'a cat'"),
        ({"kind": "individal"}, "did you mean individual"),
        ({"target": " "}, "target is empty"),
        ({"labels": ["style/cat"]}, "must look like 'object/...'"),
        ({"templates": []}, "templates is empty"),
        ({"templates": "a {concept}"}, "templates must be a list"),
        ({"templates": ["a picture"]}, "no slot {concept}"),
        ({"templates": ["{concept} in {stile}"]}, "a slot {stile} that slots lacks; did you mean style?"),
        ({"templates": ["{concept"]}, "templates: '{concept'"),
        ({"erase": ["a kitten in {setting}"]}, "erase: 'a kitten in {setting}': no template has just its slots"),
        ({"neighbours": ["object/cat"]}, "neighbours asks for object/cat to stay, but that is the target"),
        ({"neighbours": ["object/dgo"]}, "'object/dgo' is not among in_domain; did you mean object/dog?"),
        ({"evaluation": "quick"}, "evaluation must be a mapping"),
        ({"evaluation": {}}, "evaluation.templates is missing"),
        ({"in_evaluation": {"templates": []}}, "evaluation.templates is empty"),
        ({"in_evaluation": {"tempaltes": []}}, "unknown key 'evaluation.tempaltes'"),
        ({"in_evaluation": {"in_domain": {"object/kitten": "a cat"}}, "neighbours": []}, "but that is the target"),
        ({"in_evaluation": {"in_domain": {"object/cat": "a kitten"}}, "neighbours": []}, "but target is 'a cat'"),
        ({"in_evaluation": {"in_domain": ["a dog"]}, "neighbours": []}, "must map detector labels to words"),
        ({"in_evaluation": {"cross_domain": "stlye"}}, "'stlye' is not one of the slots; did you mean style?"),
        ({"in_evaluation": {"slots": {"style": {}}}}, "slot 'style' is empty"),
        ({"in_evaluation": {"target_pictures": 0}}, "at least 1"),
        (
            {"in_evaluation": {"target_pictures": 3}},
            "make 2 different prompts for object/cat but 3 pictures are asked for",
        ),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        Concept(**described(**changes))
    assert message in str(error.value)
    assert str(error.value).startswith("concept 'cat': ")
    assert "\n" not in str(error.value)


def test_a_concept_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, unpaint.concepts, unpaint.results; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
