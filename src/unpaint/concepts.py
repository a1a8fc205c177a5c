"""Concept: what is to be erased, what it is mapped to, what must stay, and which prompts ask for all of it.

Pure data: nothing heavy is imported, so that a concept that contradicts itself is refused at once.
"""

import random
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import product, zip_longest
from string import Formatter
from typing import Any

from unpaint.errors import UserError, nearest

KINDS = ("individual", "combination", "conditional")
TARGET, NEIGHBOUR, IN_DOMAIN, CROSS_DOMAIN, CONTEXT = ROLES = (
    "target",
    "neighbour",
    "in_domain",
    "cross_domain",
    "context",
)


@dataclass(frozen=True)
class Case:
    """One picture to paint: a prompt and a seed, and what the prompt asks for.

    `wants` maps detector labels to a role: `target` (must be gone), `in_domain` or `neighbour` (another label of the
    target's axis, must stay; a neighbour is also in-domain), `cross_domain` (a label of the crossed axis, must stay),
    `context` (named as well, counted by no rate). `group` is the label whose words stand for the concept.
    """

    prompt: str
    seed: int
    wants: Mapping[str, str]
    group: str


@dataclass(frozen=True)
class Evaluation:
    """The prompts by which a concept is judged.

    templates: with `{concept}` and any of the slots. slots: name -> {detector label: words}; words may be empty.
    in_domain: {detector label: words} of the target's axis; the target's own entry, if there, is left out of what
    must stay, so that one list serves every concept of an axis. cross_domain: the slot whose label CRA counts.
    target_pictures, per_label: how many pictures of the target and of each in-domain label, each of its own prompt.
    """

    templates: tuple[str, ...]
    slots: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    in_domain: Mapping[str, str] = field(default_factory=dict)
    cross_domain: str | None = None
    target_pictures: int = 96
    per_label: int = 16


@dataclass(frozen=True)
class Concept:
    """Something to erase. Takes plain or OmegaConf containers; `evaluation` may be a mapping of `Evaluation`'s fields.

    label: the detector label that decides, `axis/word`. target: the words for it. anchor: the words it is mapped to.
    templates: prompts for erasing, with `{concept}` and any of the evaluation's slots. erase: further prompts that mean
    the target without its words and that methods may use; with slots, but each must have a template of the same slots.
    neighbours: in-domain labels that are most at risk.
    Raises UserError when the concept contradicts itself.
    """

    name: str
    kind: str
    axis: str
    label: str
    target: str
    anchor: str
    templates: tuple[str, ...]
    evaluation: Evaluation
    neighbours: tuple[str, ...] = ()
    erase: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("templates", "neighbours", "erase"):
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
    def retained(self) -> dict[str, str]:
        """In-domain labels that must stay, with their words."""
        return {label: words for label, words in self.evaluation.in_domain.items() if label != self.label}

    def prompts(self, further: bool = False) -> list[str]:
        """The target's prompts for methods: those without slots first, each once; `further`: and the `erase` ones."""
        return [prompt for prompt, _ in self._erasing(further)]

    def anchor_prompts(self, further: bool = False) -> list[str]:
        """The anchor's prompts: entry i says with the anchor's words what entry i of `prompts(further)` says."""
        return [anchor for _, anchor in self._erasing(further)]

    def retain_prompts(self) -> list[str]:
        """Prompts for what must stay, for methods: the target's templates with the words of each in-domain label."""
        plain_first = sorted(self.templates, key=lambda template: len(_slots_of(template)))
        return list(
            dict.fromkeys(
                _fill(template, {"concept": words, **filling})
                for template in plain_first
                for filling in _fillings(template, self.evaluation.slots)
                for words in self.retained.values()
            )
        )

    def _erasing(self, further: bool) -> list[tuple[str, str]]:
        pairs = [(template, template) for template in self.templates]
        if further:
            pairs += [(text, _twin(text, self.templates) or "") for text in self.erase]
        found: dict[str, str] = {}
        # Plain ones first: a method that wants few prompts takes the head of the list.
        for template, twin in sorted(pairs, key=lambda pair: len(_slots_of(pair[1]))):
            for words in _fillings(template, self.evaluation.slots):
                prompt = _fill(template, {"concept": self.target, **words})
                found.setdefault(prompt, _fill(twin, {"concept": self.anchor, **words}))
        return list(found.items())

    def cases(self, seed: int) -> list[Case]:
        """Every picture the evaluation asks for: the target's first, then each in-domain label's.

        A pure function of the concept and the seed. A label's cases depend on its words, the evaluation's templates
        and slots, and the seed only: concepts that share these ask the unedited model for the same pictures.
        """
        found = self._cases_of(self.label, self.target, TARGET, self.evaluation.target_pictures, seed)
        for label, words in self.retained.items():
            role = NEIGHBOUR if label in self.neighbours else IN_DOMAIN
            found += self._cases_of(label, words, role, self.evaluation.per_label, seed)
        return found

    def _cases_of(self, label: str, words: str, role: str, count: int, seed: int) -> list[Case]:
        from unpaint.sampling import seed_of

        cases = []
        for i, (prompt, labels) in enumerate(_questions(self.evaluation, label, words)[:count]):
            wants = {label: role}
            for slot, slot_label in labels.items():
                wants[slot_label] = CROSS_DOMAIN if slot == self.evaluation.cross_domain else CONTEXT
            cases.append(Case(prompt, seed_of("score", seed, zlib.crc32(label.encode()), i), wants, label))
        return cases


def _questions(evaluation: Evaluation, label: str, words: str) -> list[tuple[str, dict[str, str]]]:
    """All distinct prompts for one label with the labels of their slots, any head of the list balanced over the
    crossed slot."""
    cross = evaluation.cross_domain
    others = [name for name in evaluation.slots if name != cross]
    columns: list[dict[str, dict[str, str]]] = []
    for crossed_label, crossed_words in evaluation.slots[cross].items() if cross else [("", "")]:
        rows = list(product(evaluation.templates, *(evaluation.slots[name].items() for name in others)))
        random.Random(f"unpaint/{label}/{crossed_label}").shuffle(rows)
        column: dict[str, dict[str, str]] = {}
        for row in rows:
            template, fillings = str(row[0]), row[1:]
            chosen = dict(zip(others, fillings, strict=True)) | (
                {cross: (crossed_label, crossed_words)} if cross else {}
            )
            chosen = {name: pair for name, pair in chosen.items() if name in _slots_of(template)}
            prompt = _fill(template, {"concept": words} | {name: pair[1] for name, pair in chosen.items()})
            column.setdefault(prompt, {name: pair[0] for name, pair in chosen.items()})
        columns.append(column)
    questions: dict[str, dict[str, str]] = {}
    for turn in zip_longest(*(column.items() for column in columns)):
        for question in turn:
            if question is not None:
                questions.setdefault(*question)
    return list(questions.items())


def _fillings(template: str, slots: Mapping[str, Mapping[str, str]]) -> Iterator[dict[str, str]]:
    """Every way to fill the template's slots with words, the concept's own slot left out."""
    used = [name for name in slots if name in _slots_of(template)]
    for filling in product(*(slots[name].values() for name in used)):
        yield dict(zip(used, filling, strict=True))


def _fill(template: str, words: Mapping[str, str]) -> str:
    """The template with its slots filled; an empty slot leaves no stray space or comma."""
    text = re.sub(r"\s+", " ", template.format_map(words))
    return re.sub(r"( ?,)+", ",", text).strip(" ,")


@lru_cache(maxsize=4096)
def _slots_of(template: str) -> frozenset[str]:
    return frozenset(name for _, name, _, _ in Formatter().parse(template) if name is not None)


def _twin(text: str, templates: Sequence[str]) -> str | None:
    """The first template with the slots of `text`, and the concept's."""
    return next((template for template in templates if _slots_of(template) == _slots_of(text) | {"concept"}), None)


# --- checks -------------------------------------------------------------------------------------------------------


def _check(concept: Concept) -> None:
    name, evaluation = concept.name, concept.evaluation
    if concept.kind not in KINDS:
        raise _fault(name, f"kind is {', '.join(KINDS)}, not '{concept.kind}'{nearest(concept.kind, KINDS)}")
    if not concept.target.strip():
        raise _fault(name, "target is empty; it holds the words for what is to be erased")
    if concept.label.split("/")[0] != concept.axis or "/" not in concept.label:
        raise _fault(name, f"label '{concept.label}' must look like '{concept.axis}/...', its axis is '{concept.axis}'")
    if _same(concept.anchor, concept.target):
        raise _fault(name, f"anchor and target are both '{concept.target}': erasing would change nothing")
    _check_templates(name, "templates", concept.templates, evaluation.slots)
    _check_templates(name, "evaluation.templates", evaluation.templates, evaluation.slots)
    _check_erase(concept)
    _check_retained(concept)
    for slot, filling in evaluation.slots.items():
        if not filling or slot == "concept":
            raise _fault(name, f"slot '{slot}' is {'reserved' if filling else 'empty'}")
    cross = evaluation.cross_domain
    if cross is not None and cross not in evaluation.slots:
        raise _fault(name, f"cross_domain '{cross}' is not one of the slots{nearest(cross, evaluation.slots)}")
    if evaluation.target_pictures < 1 or evaluation.per_label < 1:
        raise _fault(name, "target_pictures and per_label must be at least 1")
    distinct = len(_questions(evaluation, concept.label, concept.target))
    wanted = max(evaluation.target_pictures, evaluation.per_label if concept.retained else 0)
    if distinct < wanted:
        raise _fault(
            name,
            f"its templates and slots make {distinct} different prompts but {wanted} pictures are asked for, one a "
            "prompt; add templates or slots, or lower target_pictures or per_label",
        )


def _check_retained(concept: Concept) -> None:
    name, in_domain = concept.name, concept.evaluation.in_domain
    own_words = in_domain.get(concept.label)
    if own_words is not None and not _same(own_words, concept.target):
        raise _fault(name, f"in_domain calls {concept.label} '{own_words}', but target is '{concept.target}'")
    for label, words in concept.retained.items():
        if _same(words, concept.target):
            raise _fault(name, f"in_domain asks for '{words}' to stay ({label}), but that is the target")
    for label in concept.neighbours:
        if label == concept.label:
            raise _fault(name, f"neighbours asks for {label} to stay, but that is the target")
        if label not in in_domain:
            raise _fault(name, f"neighbour '{label}' is not among in_domain{nearest(label, in_domain)}")


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
        try:
            used = _slots_of(template)
        except ValueError as error:
            raise _fault(name, f"{key}: '{template}': {error}") from error
        if "concept" not in used:
            raise _fault(name, f"{key}: '{template}' has no slot {{concept}}")
        for slot in used - {"concept"} - set(slots):
            raise _fault(name, f"{key}: '{template}' has a slot {{{slot}}} that slots lacks{nearest(slot, slots)}")


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
    plain["templates"] = _texts(concept, "evaluation.templates", plain["templates"])
    slots = plain.get("slots") or {}
    plain["slots"] = {str(slot): _words(concept, f"slots.{slot}", filling) for slot, filling in slots.items()}
    plain["in_domain"] = _words(concept, "in_domain", plain.get("in_domain") or {})
    return Evaluation(**plain)


def _texts(concept: str, key: str, given: Any) -> tuple[str, ...]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise _fault(concept, f"{key} must be a list of texts, not {type(given).__name__}")
    return tuple(str(text) for text in given)


def _words(concept: str, key: str, given: Any) -> dict[str, str]:
    if not isinstance(given, Mapping):
        raise _fault(concept, f"evaluation.{key} must map detector labels to words, not {type(given).__name__}")
    return {str(label): str(words) for label, words in given.items()}


def _same(one: str, other: str) -> bool:
    return one.strip().lower() == other.strip().lower()


def _fault(concept: str, text: str) -> UserError:
    return UserError(f"concept '{concept}': {text}")
