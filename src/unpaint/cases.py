"""The pictures that an evaluation asks for: which prompts, with which seeds, and what each must show.

Pure data, as concepts are: nothing heavy is imported.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

from unpaint.prompts import Question, drawn, fill, fillings, names, put, questions, slots_of
from unpaint.seeds import seed_of

if TYPE_CHECKING:
    from unpaint.concepts import AnyConcept, Concept

TARGET, NEIGHBOUR, IN_DOMAIN, CROSS_DOMAIN, ASKED, CONTEXT = ROLES = (
    "target",
    "neighbour",
    "in_domain",
    "cross_domain",
    "asked",
    "context",
)
CELLS = ("first_only", "second_only", "neither")
IN_SET, OUT_OF_SET, IMPLICIT, RETAIN, COMPOSITION, NEUTRAL, STATIC = (
    "target",
    "out_of_set",
    "implicit",
    "retain",
    "composition",
    "neutral",
    "static",
)
PARTS = (IN_SET, OUT_OF_SET, IMPLICIT, RETAIN, COMPOSITION, *CELLS, NEUTRAL, STATIC)


@dataclass(frozen=True)
class Case:
    """One picture to paint: a prompt and a seed, and what the prompt asks for.

    `wants` maps detector labels to a role: `target` (a picture shows the concept if it shows all of these),
    `in_domain` or `neighbour` (another label of the target's axis, must stay; a neighbour is also in-domain),
    `cross_domain` (a label of the crossed axis, must stay), `asked` (whatever else must be there), `context` (named as
    well, counted by no rate). `group` is the label, or the list, that the case belongs to; pictures of one group are
    painted together. `part` is the set of prompts, one of `PARTS`: `target` (by its plain names), `out_of_set`,
    `implicit`, `static` (from a file), `neutral` (painted by the unedited model only; `wants` is that of the prompt
    with the concept), `retain`, `composition`, and the cells of a table. `neutral` is the prompt without the concept.
    `guidance` overrides the sampler's.
    """

    prompt: str
    seed: int
    wants: Mapping[str, str]
    group: str
    part: str
    neutral: str = ""
    guidance: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """The prompts by which a concept is judged. Each picture has its own prompt.

    templates: with `{concept}` and any of the slots. slots: name -> {detector label: words}; words may be empty.
    in_domain: {detector label: words} of the target's axis; the target's own entry, if there, is left out of what
    must stay, so that one list serves every concept of an axis. cross_domain: the slot whose label CRA counts.
    target_templates: for the target and the cells, if they are not `templates`. neutral: the words that stand in the
    concept's place in the prompt without it.
    out_of_set, implicit: other words for the target that no method is given, and words that bring it along unnamed;
    they may have slots. They are put into `other_templates`, by default those of the target.
    composition: templates that ask for several things, `{concept}` being something that must stay; all that is asked
    for must be there.
    cells: for two things or a thing and its condition, `first_only`, `second_only`, `neither` -> {words: [labels]}.
    target_pictures, per_label, ...: how many pictures of the target, of each in-domain label, of each other list.
    """

    templates: tuple[str, ...]
    slots: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    in_domain: Mapping[str, str] = field(default_factory=dict)
    cross_domain: str | None = None
    target_templates: tuple[str, ...] = ()
    neutral: str = ""
    other_templates: tuple[str, ...] = ()
    out_of_set: tuple[str, ...] = ()
    implicit: tuple[str, ...] = ()
    composition: tuple[str, ...] = ()
    cells: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    target_pictures: int = 96
    per_label: int = 16
    out_of_set_pictures: int = 96
    implicit_pictures: int = 48
    composition_pictures: int = 96
    cell_pictures: int = 96


class Erasing(NamedTuple):
    """A prompt for the target, the same with the anchor's words, and the target's bare prompt."""

    prompt: str
    anchor: str
    bare: str


class Asked(NamedTuple):
    """A case without its seed."""

    prompt: str
    wants: dict[str, str]
    neutral: str


class List(NamedTuple):
    """One list of prompts: its part and group, the first `pictures` of `asked`, and which setting says how many."""

    part: str
    group: str
    asked: list[Asked]
    pictures: int
    setting: str


def lists_of(concept: AnyConcept, times: int) -> list[List]:
    """Every list of the concept, the target's first, for `times` as many pictures as it says."""
    members = concept.members
    found = [entry for member in members for entry in _of_target(member, [m for m in members if m is not member])]
    for label, words in concept.retained.items():
        member = next(m for m in members if m.retained.get(label) == words)
        evaluation = member.evaluation
        role = NEIGHBOUR if label in concept.neighbours else IN_DOMAIN
        asked = _questions(evaluation, evaluation.templates, (words,), label)
        kept = _asked(evaluation, asked, {words: {label: role}}, members)
        found.append(List(RETAIN, label, kept, evaluation.per_label, "per_label"))
    for member in members:
        found += _of_cells(member, members)
    found = [entry._replace(pictures=times * entry.pictures) for entry in found]
    return [*found, *_of_compositions(concept, times)]


def _of_target(member: Concept, others: Sequence[Concept]) -> Iterator[List]:
    evaluation = member.evaluation
    own = evaluation.target_templates or evaluation.templates
    other = evaluation.other_templates or own
    for part, templates, words, count in (
        (IN_SET, own, member.words, evaluation.target_pictures),
        (OUT_OF_SET, other, evaluation.out_of_set, evaluation.out_of_set_pictures),
        (IMPLICIT, other, evaluation.implicit, evaluation.implicit_pictures),
    ):
        if words:
            key = member.group if part == IN_SET else f"{member.group} {part}"
            wants = dict.fromkeys(words, dict.fromkeys(member.labels, TARGET))
            neutral = evaluation.neutral if part == IN_SET else None
            every = questions(templates, words, evaluation.slots, evaluation.cross_domain, key, neutral)
            asked = _asked(evaluation, every, wants, others)
            yield List(part, key, asked, count, f"{part}_pictures")


def _of_cells(member: Concept, members: Sequence[Concept]) -> Iterator[List]:
    evaluation = member.evaluation
    templates = evaluation.target_templates or evaluation.templates
    for cell in CELLS:
        if words := evaluation.cells.get(cell):
            key = f"{member.group} {cell}"
            wants = {word: dict.fromkeys(labels, ASKED) for word, labels in words.items()}
            asked = _questions(evaluation, templates, tuple(words), key)
            kept = _asked(evaluation, asked, wants, members)
            yield List(cell, key, kept, evaluation.cell_pictures, "cell_pictures")


def _of_compositions(concept: AnyConcept, times: int) -> Iterator[List]:
    """The first member's: the members of a set share a world."""
    evaluation, retained = concept.members[0].evaluation, concept.retained
    if not evaluation.composition:
        return
    count = times * evaluation.composition_pictures
    labels_of = {words: label for label, words in retained.items()}
    key = " ".join([*(member.group for member in concept.members), COMPOSITION])
    found: dict[str, Asked] = {}
    # Many draws fall away: they repeat a label or name the target.
    for question in drawn(evaluation.composition, list(labels_of), evaluation.slots, key, 20 * count):
        labels = [label for slot, label in question.labels.items() if evaluation.slots[slot][label]]
        labels += [labels_of[question.words]] if question.words in labels_of else []
        wants = dict.fromkeys(labels, ASKED)
        if len(wants) == len(labels) and not any(clashes(m, wants, question.prompt) for m in concept.members):
            found.setdefault(question.prompt, Asked(question.prompt, wants, ""))
        if len(found) == count:
            break
    yield List(COMPOSITION, key, list(found.values()), count, "composition_pictures")


def _questions(evaluation: Evaluation, templates: Sequence[str], words: Sequence[str], key: str) -> list[Question]:
    return questions(templates, words, evaluation.slots, evaluation.cross_domain, key)


def _asked(
    evaluation: Evaluation,
    asked: Sequence[Question],
    wants: Mapping[str, Mapping[str, str]],
    avoid: Sequence[Concept],
) -> list[Asked]:
    """The questions with their labels, without those that ask for all labels of a concept that is not meant."""
    found = []
    for question in asked:
        labels = dict(wants[question.words])
        for slot, label in question.labels.items():
            labels.setdefault(label, CROSS_DOMAIN if slot == evaluation.cross_domain else CONTEXT)
        if not any(set(concept.labels) <= labels.keys() for concept in avoid):
            found.append(Asked(question.prompt, labels, question.neutral))
    return found


def seeded(lists: Sequence[List], seed: int) -> list[Case]:
    """The lists' pictures, each with a seed of its own: the targets' first, in turn."""
    found: list[list[Case]] = []
    for part, group, asked, count, _ in lists:
        key = zlib.crc32(group.encode())
        found.append(
            [
                Case(prompt, seed_of("score", seed, key, i), wants, group, part, neutral)
                for i, (prompt, wants, neutral) in enumerate(asked[:count])
            ]
        )
    targets = [cases for cases, entry in zip(found, lists, strict=True) if entry.part == IN_SET]
    rest = [cases for cases, entry in zip(found, lists, strict=True) if entry.part != IN_SET]
    return [*alternating(targets), *chain(*rest)]


def retaining(member: Concept, avoid: Sequence[Concept]) -> list[str]:
    """The member's templates with what must stay, without what asks for one of the concepts to avoid."""
    labelled: list[tuple[tuple[str, ...], str]] = [((label,), words) for label, words in member.retained.items()]
    labelled += [(labels, words) for cell in member.evaluation.cells.values() for words, labels in cell.items()]
    found: dict[str, None] = {}
    for template in sorted(member.templates, key=lambda template: len(slots_of(template))):
        for filling in fillings(template, member.evaluation.slots):
            for labels, words in labelled:
                prompt = fill(put(template, words), {slot: pair[1] for slot, pair in filling.items()})
                asked = {*labels, *(label for label, _ in filling.values())}
                if not any(clashes(concept, asked, prompt) for concept in avoid):
                    found.setdefault(prompt)
    return list(found)


def clashes(concept: Concept, labels: Mapping[str, Any] | set[str], prompt: str) -> bool:
    """Whether a prompt that asks for these labels asks for the concept, by labels or by words."""
    return set(concept.labels) <= set(labels) or named(concept, prompt)


def named(concept: Concept, text: str) -> bool:
    """Whether the text holds the target's words."""
    return any(names(text, words) for words in concept.words)


def twin_of(text: str, templates: Sequence[str]) -> str | None:
    """The first template with the slots of `text`, and the concept's."""
    return next((template for template in templates if slots_of(template) == slots_of(text) | {"concept"}), None)


_NOTHING = object()


def alternating(lists: Any) -> list[Any]:
    """The first of each list, then the second of each, and so on."""
    return [item for turn in zip_longest(*lists, fillvalue=_NOTHING) for item in turn if item is not _NOTHING]
