"""Reads the parts of a concept from plain containers, and refuses one that contradicts itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from unpaint.cases import CELLS, RETAIN, Evaluation, clashes, named, twin_of
from unpaint.errors import UserError, nearest
from unpaint.prompts import CONCEPT, same, slots_of

if TYPE_CHECKING:
    from unpaint.concepts import AnyConcept, Concept, ConceptSet

KINDS = ("individual", "combination", "conditional")


def check_concept(concept: Concept) -> None:
    """Raises UserError for a concept that contradicts itself or lacks prompts."""
    name, evaluation = concept.name, concept.evaluation
    if concept.kind not in KINDS:
        raise fault(name, f"kind is {', '.join(KINDS)}, not '{concept.kind}'{nearest(concept.kind, KINDS)}")
    for words in concept.words:
        if not words.strip():
            raise fault(name, "target is empty; it holds the words for what is to be erased")
        if same(concept.anchor, words):
            raise fault(name, f"anchor and target are both '{words}': erasing would change nothing")
    _check_labels(concept)
    _check_templates(name, "templates", concept.templates, evaluation.slots)
    _check_templates(name, "evaluation.templates", evaluation.templates, evaluation.slots)
    for key in ("target_templates", "other_templates"):
        if templates := getattr(evaluation, key):
            _check_templates(name, f"evaluation.{key}", templates, evaluation.slots)
    for key in ("out_of_set", "implicit", "composition"):
        for text in getattr(evaluation, key):
            _check_slots(name, f"evaluation.{key}", text, {*evaluation.slots, "concept"})
    _check_erase(concept)
    for slot, filling in evaluation.slots.items():
        if not filling or slot == "concept":
            raise fault(name, f"slot '{slot}' is {'reserved' if filling else 'empty'}")
    cross = evaluation.cross_domain
    if cross is not None and cross not in evaluation.slots:
        raise fault(name, f"cross_domain '{cross}' is not one of the slots{nearest(cross, evaluation.slots)}")
    if evaluation.target_pictures < 1 or evaluation.per_label < 1:
        raise fault(name, "target_pictures and per_label must be at least 1")
    _check_retained(concept)
    _check_cells(concept)
    _check_lists(concept)


def _check_labels(concept: Concept) -> None:
    name, labels = concept.name, concept.labels
    if concept.kind == "individual" and len(labels) != 1:
        raise fault(name, f"an individual concept has one label, not {len(labels)}")
    if concept.kind != "individual" and len(set(labels)) < 2:
        raise fault(name, f"a {concept.kind} concept has at least two different labels, as [object/cat, relation/...]")
    for label in labels:
        if not all(label.partition("/")):
            raise fault(name, f"label '{label}' must look like '{concept.axis}/...'")
    if labels[0].split("/")[0] != concept.axis:
        raise fault(name, f"label '{labels[0]}' must look like '{concept.axis}/...', its axis is '{concept.axis}'")


def _check_retained(concept: Concept) -> None:
    name, in_domain = concept.name, concept.evaluation.in_domain
    own_words = in_domain.get(concept.labels[0]) if len(concept.labels) == 1 else None
    if own_words is not None and not same(own_words, concept.target):
        raise fault(name, f"in_domain calls {concept.labels[0]} '{own_words}', but target is '{concept.target}'")
    for label, words in concept.retained.items():
        if named(concept, words):
            raise fault(name, f"in_domain asks for '{words}' to stay ({label}), but that is the target")
    for label in concept.neighbours:
        if (label,) == concept.labels:
            raise fault(name, f"neighbours asks for {label} to stay, but that is the target")
        if label not in in_domain:
            raise fault(name, f"neighbour '{label}' is not among in_domain{nearest(label, in_domain)}")


def _check_cells(concept: Concept) -> None:
    name, cells = concept.name, concept.evaluation.cells
    if cells and concept.kind == "individual":
        raise fault(name, "cells belong to a combination or conditional concept, this one is individual")
    for cell, entries in cells.items():
        if cell not in CELLS:
            raise fault(name, f"cells are {', '.join(CELLS)}, not '{cell}'{nearest(cell, CELLS)}")
        for words, labels in entries.items():
            if not labels:
                raise fault(name, f"cells.{cell}: '{words}' has no labels")
            if clashes(concept, set(labels), words):
                raise fault(name, f"cells.{cell} asks for '{words}' to stay, but that is the target")


def _check_lists(concept: AnyConcept) -> None:
    for part, group, asked, count, setting in concept.lists:
        if count < 0:
            raise fault(concept.name, f"{setting} is {count}; it must be at least 0")
        if len(asked) < count:
            raise fault(
                concept.name,
                f"its templates and slots make {len(asked)} different prompts for {group} but {count} pictures are "
                f"asked for, one a prompt; add templates or slots, or lower {setting}",
            )
        if part in (RETAIN, *CELLS):
            for prompt, _, _ in asked[:count]:
                if any(named(member, prompt) for member in concept.members):
                    raise fault(concept.name, f"'{prompt}' must stay ({group}), but it names the target")


def check_set(concept: ConceptSet) -> None:
    """Raises UserError for members that contradict each other."""
    name, members = concept.name, concept.members
    if len(members) < 2:
        raise fault(name, f"a set has at least two members, not {len(members)}")
    for i, member in enumerate(members):
        for other in (*members[:i], *members[i + 1 :]):
            if member.labels == other.labels or named(other, member.target):
                raise fault(name, f"its members '{member.name}' and '{other.name}' are the same or one holds the other")
            if any(same(member.anchor, words) for words in other.words):
                raise fault(
                    name,
                    f"'{member.name}' would become '{member.anchor}', which is to be erased as well; give it another "
                    "anchor in the set's file",
                )
    _check_lists(concept)


def _check_erase(concept: Concept) -> None:
    for text in concept.erase:
        try:
            twin = twin_of(text, concept.templates)
        except ValueError as error:
            raise fault(concept.name, f"erase: '{text}': {error}") from error
        if twin is None:
            raise fault(concept.name, f"erase: '{text}': no template has just its slots, so it has no anchor prompt")


def _check_templates(name: str, key: str, templates: Sequence[str], slots: Mapping[str, Any]) -> None:
    if not templates:
        raise fault(name, f"{key} is empty; it needs at least one, like 'a picture of {{concept}}'")
    for template in templates:
        _check_slots(name, key, template, {*slots, "concept"})
        if CONCEPT not in template:
            raise fault(name, f"{key}: '{template}' has no slot {{concept}}")


def _check_slots(name: str, key: str, text: str, slots: set[str]) -> None:
    try:
        used = slots_of(text)
    except ValueError as error:
        raise fault(name, f"{key}: '{text}': {error}") from error
    for slot in used - slots:
        raise fault(name, f"{key}: '{text}' has a slot {{{slot}}} that slots lacks{nearest(slot, slots)}")


def evaluation_of(concept: str, given: Any) -> Evaluation:
    """An `Evaluation` from a mapping of its fields. Raises UserError for a key that it lacks and for a wrong type."""
    if not isinstance(given, Mapping):
        raise fault(concept, f"evaluation must be a mapping, not {type(given).__name__}")
    known = [f.name for f in fields(Evaluation)]
    for key in given:
        if key not in known:
            raise fault(concept, f"unknown key 'evaluation.{key}'; there are {', '.join(known)}{nearest(key, known)}")
    if "templates" not in given:
        raise fault(concept, "evaluation.templates is missing")
    plain = dict(given.items())
    for key in ("templates", "target_templates", "other_templates", "out_of_set", "implicit", "composition"):
        plain[key] = texts_of(concept, f"evaluation.{key}", plain.get(key) or ())
    slots = plain.get("slots") or {}
    plain["slots"] = {str(slot): _words(concept, f"slots.{slot}", filling) for slot, filling in slots.items()}
    plain["in_domain"] = _words(concept, "in_domain", plain.get("in_domain") or {})
    plain["cells"] = {
        str(cell): {
            str(words): texts_of(concept, f"evaluation.cells.{cell}.{words}", labels)
            for words, labels in (entries or {}).items()
        }
        for cell, entries in (plain.get("cells") or {}).items()
    }
    return Evaluation(**plain)


def texts_of(concept: str, key: str, given: Any) -> tuple[str, ...]:
    """A list of texts as a tuple. Raises UserError for anything else."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise fault(concept, f"{key} must be a list of texts, not {type(given).__name__}")
    return tuple(str(text) for text in given)


def _words(concept: str, key: str, given: Any) -> dict[str, str]:
    if not isinstance(given, Mapping):
        raise fault(concept, f"evaluation.{key} must map detector labels to words, not {type(given).__name__}")
    return {str(label): str(words) for label, words in given.items()}


def fault(concept: str, text: str) -> UserError:
    """What is wrong with a concept, by its name."""
    return UserError(f"concept '{concept}': {text}")
