"""Concepts: what is to be erased, what it is mapped to, what must stay, and which prompts ask for all of it.

Pure data: nothing heavy is imported, so that a concept that contradicts itself is refused at once.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import chain, zip_longest
from typing import Any, NamedTuple

from unpaint.errors import UserError, nearest
from unpaint.prompts import (
    CONCEPT,
    Question,
    drawn,
    fill,
    fillings,
    names,
    put,
    questions,
    same,
    slots_of,
)
from unpaint.seeds import seed_of

KINDS = ("individual", "combination", "conditional")
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


@dataclass(frozen=True)
class Concept:
    """Something to erase. Takes plain or OmegaConf containers; `evaluation` may be a mapping of `Evaluation`'s fields.

    kind: `individual`; `combination` (things that must go together and stay each alone); `conditional` (a thing under
    a condition). labels: the detector labels that decide, `axis/word`; one for an individual concept, and for the
    others all that must be there together, the first thing first. target: the words for it. wordings: further words
    for it of the same standing. anchor: the words it is mapped to. templates: prompts for erasing, with `{concept}`
    and any of the evaluation's slots. erase: further prompts that mean the target without its words and that methods
    may use; with slots, but each must have a template of the same slots. neighbours: in-domain labels that are most at
    risk.
    Raises UserError when the concept contradicts itself.
    """

    name: str
    kind: str
    axis: str
    labels: tuple[str, ...]
    target: str
    anchor: str
    templates: tuple[str, ...]
    evaluation: Evaluation
    wordings: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    erase: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("labels", "templates", "wordings", "neighbours", "erase"):
            object.__setattr__(self, name, _texts(self.name, name, getattr(self, name)))
        given: Any = self.evaluation
        if not isinstance(given, Evaluation):
            object.__setattr__(self, "evaluation", _evaluation(self.name, given))
        _check(self)

    @property
    def members(self) -> tuple["Concept", ...]:
        """The concepts that it consists of: itself."""
        return (self,)

    @property
    def words(self) -> tuple[str, ...]:
        """The target and its further wordings."""
        return (self.target, *self.wordings)

    @property
    def group(self) -> str:
        """The group of the target's own cases: its label, or its labels joined."""
        return "+".join(self.labels)

    @property
    def retained(self) -> dict[str, str]:
        """In-domain labels that must stay, with their words. The parts of a combination are among them."""
        return {label: words for label, words in self.evaluation.in_domain.items() if (label,) != self.labels}

    @cached_property
    def lists(self) -> list["List"]:
        """Every list of prompts that `cases` takes from, the target's first."""
        return _lists(self, 1)

    def counted_labels(self) -> list[str]:
        """The labels that a detector must know: the target's, what must stay, the cells' and the crossed slot's."""
        evaluation = self.evaluation
        cells = chain(*(labels for cell in evaluation.cells.values() for labels in cell.values()))
        crossed = evaluation.slots[evaluation.cross_domain] if evaluation.cross_domain else ()
        return list(dict.fromkeys([*self.labels, *self.retained, *cells, *crossed]))

    def prompts(self, further: bool = False) -> list[str]:
        """The target's prompts for methods: those without slots first, each once; `further`: and the `erase` ones."""
        return [entry.prompt for entry in self.erasing(further)]

    def anchor_prompts(self, further: bool = False) -> list[str]:
        """The anchor's prompts: entry i says with the anchor's words what entry i of `prompts(further)` says."""
        return [entry.anchor for entry in self.erasing(further)]

    def bare_prompts(self, further: bool = False) -> list[str]:
        """The target's shortest prompt, once for each entry of `prompts(further)`; in a set, that of its member."""
        return [entry.bare for entry in self.erasing(further)]

    def retain_prompts(self) -> list[str]:
        """Prompts for what must stay, for methods: the target's templates with the words of each in-domain label, and
        of the cells of its table. None asks for all that makes the target."""
        return _retaining(self, [self])

    def erasing(self, further: bool) -> list[Erasing]:
        pairs = [(put(template, words), template) for template in self.templates for words in self.words]
        if further:
            pairs += [(text, _twin(text, self.templates) or "") for text in self.erase]
        found: dict[str, str] = {}
        # Plain ones first: a method that wants few prompts takes the head of the list.
        for form, twin in sorted(pairs, key=lambda pair: len(slots_of(pair[1]))):
            for filling in fillings(form, self.evaluation.slots):
                words = {slot: pair[1] for slot, pair in filling.items()}
                found.setdefault(fill(form, words), fill(put(twin, self.anchor), words))
        bare = next(iter(found))
        return [Erasing(prompt, anchor, bare) for prompt, anchor in found.items()]

    def cases(self, seed: int, times: int = 1) -> list[Case]:
        """Every picture that an evaluation may ask for: the target's first. `times` as many of each list as the
        evaluation says, as far as there are different prompts.

        A pure function of the concept and the seed. A label's cases depend on its words, the evaluation's templates
        and slots, and the seed only: concepts that share these ask the unedited model for the same pictures.
        """
        return _seeded(self.lists if times == 1 else _lists(self, times), seed)


@dataclass(frozen=True)
class ConceptSet:
    """Several concepts to erase at once, with the interface of one. members: any name -> Concept.

    Prompts of the members alternate, so that any head of a list covers them all. What is retained names no member.
    Raises UserError when the members contradict each other.
    """

    name: str
    members: tuple[Concept, ...]
    kind = "set"

    def __post_init__(self) -> None:
        given: Any = self.members
        object.__setattr__(self, "members", tuple(given.values()) if isinstance(given, Mapping) else tuple(given))
        _check_set(self)

    @property
    def target(self) -> str:
        """The members' words, as a list in a sentence."""
        return _listed([member.target for member in self.members])

    @property
    def anchor(self) -> str:
        return _listed([member.anchor for member in self.members])

    @property
    def axis(self) -> str:
        """The members' axis, `concept` if they have several."""
        axes = {member.axis for member in self.members}
        return axes.pop() if len(axes) == 1 else "concept"

    @property
    def retained(self) -> dict[str, str]:
        """What some member retains and no member is."""
        found: dict[str, str] = {}
        for member in self.members:
            for label, words in member.retained.items():
                if not any((label,) == other.labels or _named(other, words) for other in self.members):
                    found.setdefault(label, words)
        return found

    @property
    def neighbours(self) -> tuple[str, ...]:
        every = dict.fromkeys(chain(*(member.neighbours for member in self.members)))
        return tuple(label for label in every if label in self.retained)

    @cached_property
    def lists(self) -> list[List]:
        """As `Concept.lists`."""
        return _lists(self, 1)

    def counted_labels(self) -> list[str]:
        """As `Concept.counted_labels`."""
        return list(dict.fromkeys(chain(*(member.counted_labels() for member in self.members))))

    def prompts(self, further: bool = False) -> list[str]:
        """As `Concept.prompts`."""
        return [entry.prompt for entry in self.erasing(further)]

    def anchor_prompts(self, further: bool = False) -> list[str]:
        """As `Concept.anchor_prompts`."""
        return [entry.anchor for entry in self.erasing(further)]

    def bare_prompts(self, further: bool = False) -> list[str]:
        """As `Concept.bare_prompts`: that of the member that the prompt belongs to."""
        return [entry.bare for entry in self.erasing(further)]

    def retain_prompts(self) -> list[str]:
        """As `Concept.retain_prompts`."""
        return list(dict.fromkeys(_alternating(_retaining(member, self.members) for member in self.members)))

    def erasing(self, further: bool) -> list[Erasing]:
        every = _alternating(member.erasing(further) for member in self.members)
        return list({entry.prompt: entry for entry in reversed(every)}.values())[::-1]

    def cases(self, seed: int, times: int = 1) -> list[Case]:
        """As `Concept.cases`; the members' target cases alternate. A picture that asks for two members is none."""
        return _seeded(self.lists if times == 1 else _lists(self, times), seed)


AnyConcept = Concept | ConceptSet

# --- the lists of prompts -----------------------------------------------------------------------------------------


def _lists(concept: AnyConcept, times: int) -> list[List]:
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
        if len(wants) == len(labels) and not any(_clashes(m, wants, question.prompt) for m in concept.members):
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


def _seeded(lists: Sequence[List], seed: int) -> list[Case]:
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
    return [*_alternating(targets), *chain(*rest)]


def _retaining(member: Concept, avoid: Sequence[Concept]) -> list[str]:
    """The member's templates with what must stay, without what asks for one of the concepts to avoid."""
    labelled: list[tuple[tuple[str, ...], str]] = [((label,), words) for label, words in member.retained.items()]
    labelled += [(labels, words) for cell in member.evaluation.cells.values() for words, labels in cell.items()]
    found: dict[str, None] = {}
    for template in sorted(member.templates, key=lambda template: len(slots_of(template))):
        for filling in fillings(template, member.evaluation.slots):
            for labels, words in labelled:
                prompt = fill(put(template, words), {slot: pair[1] for slot, pair in filling.items()})
                asked = {*labels, *(label for label, _ in filling.values())}
                if not any(_clashes(concept, asked, prompt) for concept in avoid):
                    found.setdefault(prompt)
    return list(found)


def _clashes(concept: Concept, labels: Mapping[str, Any] | set[str], prompt: str) -> bool:
    """Whether a prompt that asks for these labels asks for the concept, by labels or by words."""
    return set(concept.labels) <= set(labels) or _named(concept, prompt)


def _named(concept: Concept, text: str) -> bool:
    return any(names(text, words) for words in concept.words)


def _twin(text: str, templates: Sequence[str]) -> str | None:
    """The first template with the slots of `text`, and the concept's."""
    return next((template for template in templates if slots_of(template) == slots_of(text) | {"concept"}), None)


_NOTHING = object()


def _alternating(lists: Any) -> list[Any]:
    return [item for turn in zip_longest(*lists, fillvalue=_NOTHING) for item in turn if item is not _NOTHING]


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# --- checks -------------------------------------------------------------------------------------------------------


def _check(concept: Concept) -> None:
    name, evaluation = concept.name, concept.evaluation
    if concept.kind not in KINDS:
        raise _fault(name, f"kind is {', '.join(KINDS)}, not '{concept.kind}'{nearest(concept.kind, KINDS)}")
    for words in concept.words:
        if not words.strip():
            raise _fault(name, "target is empty; it holds the words for what is to be erased")
        if same(concept.anchor, words):
            raise _fault(name, f"anchor and target are both '{words}': erasing would change nothing")
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
            raise _fault(name, f"slot '{slot}' is {'reserved' if filling else 'empty'}")
    cross = evaluation.cross_domain
    if cross is not None and cross not in evaluation.slots:
        raise _fault(name, f"cross_domain '{cross}' is not one of the slots{nearest(cross, evaluation.slots)}")
    if evaluation.target_pictures < 1 or evaluation.per_label < 1:
        raise _fault(name, "target_pictures and per_label must be at least 1")
    _check_retained(concept)
    _check_cells(concept)
    _check_lists(concept)


def _check_labels(concept: Concept) -> None:
    name, labels = concept.name, concept.labels
    if concept.kind == "individual" and len(labels) != 1:
        raise _fault(name, f"an individual concept has one label, not {len(labels)}")
    if concept.kind != "individual" and len(set(labels)) < 2:
        raise _fault(name, f"a {concept.kind} concept has at least two different labels, as [object/cat, relation/...]")
    for label in labels:
        if not all(label.partition("/")):
            raise _fault(name, f"label '{label}' must look like '{concept.axis}/...'")
    if labels[0].split("/")[0] != concept.axis:
        raise _fault(name, f"label '{labels[0]}' must look like '{concept.axis}/...', its axis is '{concept.axis}'")


def _check_retained(concept: Concept) -> None:
    name, in_domain = concept.name, concept.evaluation.in_domain
    own_words = in_domain.get(concept.labels[0]) if len(concept.labels) == 1 else None
    if own_words is not None and not same(own_words, concept.target):
        raise _fault(name, f"in_domain calls {concept.labels[0]} '{own_words}', but target is '{concept.target}'")
    for label, words in concept.retained.items():
        if _named(concept, words):
            raise _fault(name, f"in_domain asks for '{words}' to stay ({label}), but that is the target")
    for label in concept.neighbours:
        if (label,) == concept.labels:
            raise _fault(name, f"neighbours asks for {label} to stay, but that is the target")
        if label not in in_domain:
            raise _fault(name, f"neighbour '{label}' is not among in_domain{nearest(label, in_domain)}")


def _check_cells(concept: Concept) -> None:
    name, cells = concept.name, concept.evaluation.cells
    if cells and concept.kind == "individual":
        raise _fault(name, "cells belong to a combination or conditional concept, this one is individual")
    for cell, entries in cells.items():
        if cell not in CELLS:
            raise _fault(name, f"cells are {', '.join(CELLS)}, not '{cell}'{nearest(cell, CELLS)}")
        for words, labels in entries.items():
            if not labels:
                raise _fault(name, f"cells.{cell}: '{words}' has no labels")
            if _clashes(concept, set(labels), words):
                raise _fault(name, f"cells.{cell} asks for '{words}' to stay, but that is the target")


def _check_lists(concept: AnyConcept) -> None:
    for part, group, asked, count, setting in concept.lists:
        if count < 0:
            raise _fault(concept.name, f"{setting} is {count}; it must be at least 0")
        if len(asked) < count:
            raise _fault(
                concept.name,
                f"its templates and slots make {len(asked)} different prompts for {group} but {count} pictures are "
                f"asked for, one a prompt; add templates or slots, or lower {setting}",
            )
        if part in (RETAIN, *CELLS):
            for prompt, _, _ in asked[:count]:
                if any(_named(member, prompt) for member in concept.members):
                    raise _fault(concept.name, f"'{prompt}' must stay ({group}), but it names the target")


def _check_set(concept: ConceptSet) -> None:
    name, members = concept.name, concept.members
    if len(members) < 2:
        raise _fault(name, f"a set has at least two members, not {len(members)}")
    for member in members:
        if not isinstance(member, Concept):
            raise _fault(name, f"its members are concepts, not {type(member).__name__}")
    for i, member in enumerate(members):
        for other in (*members[:i], *members[i + 1 :]):
            if member.labels == other.labels or _named(other, member.target):
                raise _fault(
                    name, f"its members '{member.name}' and '{other.name}' are the same or one holds the other"
                )
            if any(same(member.anchor, words) for words in other.words):
                raise _fault(
                    name,
                    f"'{member.name}' would become '{member.anchor}', which is to be erased as well; give it another "
                    "anchor in the set's file",
                )
    _check_lists(concept)


def _check_erase(concept: Concept) -> None:
    for text in concept.erase:
        try:
            twin = _twin(text, concept.templates)
        except ValueError as error:
            raise _fault(concept.name, f"erase: '{text}': {error}") from error
        if twin is None:
            raise _fault(concept.name, f"erase: '{text}': no template has just its slots, so it has no anchor prompt")


def _check_templates(name: str, key: str, templates: Sequence[str], slots: Mapping[str, Any]) -> None:
    if not templates:
        raise _fault(name, f"{key} is empty; it needs at least one, like 'a picture of {{concept}}'")
    for template in templates:
        _check_slots(name, key, template, {*slots, "concept"})
        if CONCEPT not in template:
            raise _fault(name, f"{key}: '{template}' has no slot {{concept}}")


def _check_slots(name: str, key: str, text: str, slots: set[str]) -> None:
    try:
        used = slots_of(text)
    except ValueError as error:
        raise _fault(name, f"{key}: '{text}': {error}") from error
    for slot in used - slots:
        raise _fault(name, f"{key}: '{text}' has a slot {{{slot}}} that slots lacks{nearest(slot, slots)}")


def _evaluation(concept: str, given: Any) -> Evaluation:
    if not isinstance(given, Mapping):
        raise _fault(concept, f"evaluation must be a mapping, not {type(given).__name__}")
    known = [f.name for f in fields(Evaluation)]
    for key in given:
        if key not in known:
            raise _fault(concept, f"unknown key 'evaluation.{key}'; there are {', '.join(known)}{nearest(key, known)}")
    if "templates" not in given:
        raise _fault(concept, "evaluation.templates is missing")
    plain = dict(given.items())
    for key in ("templates", "target_templates", "other_templates", "out_of_set", "implicit", "composition"):
        plain[key] = _texts(concept, f"evaluation.{key}", plain.get(key) or ())
    slots = plain.get("slots") or {}
    plain["slots"] = {str(slot): _words(concept, f"slots.{slot}", filling) for slot, filling in slots.items()}
    plain["in_domain"] = _words(concept, "in_domain", plain.get("in_domain") or {})
    plain["cells"] = {
        str(cell): {
            str(words): _texts(concept, f"evaluation.cells.{cell}.{words}", labels)
            for words, labels in (entries or {}).items()
        }
        for cell, entries in (plain.get("cells") or {}).items()
    }
    return Evaluation(**plain)


def _texts(concept: str, key: str, given: Any) -> tuple[str, ...]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise _fault(concept, f"{key} must be a list of texts, not {type(given).__name__}")
    return tuple(str(text) for text in given)


def _words(concept: str, key: str, given: Any) -> dict[str, str]:
    if not isinstance(given, Mapping):
        raise _fault(concept, f"evaluation.{key} must map detector labels to words, not {type(given).__name__}")
    return {str(label): str(words) for label, words in given.items()}


def _fault(concept: str, text: str) -> UserError:
    return UserError(f"concept '{concept}': {text}")
