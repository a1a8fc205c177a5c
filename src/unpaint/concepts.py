"""Concepts: what is to be erased, what it is mapped to, what must stay, and which prompts ask for all of it.

Pure data: nothing heavy is imported, so that a concept that contradicts itself is refused at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from unpaint.cases import (
    Case,
    Erasing,
    Evaluation,
    List,
    alternating,
    lists_of,
    named,
    retaining,
    seeded,
    twin_of,
)
from unpaint.concept_checks import check_concept, check_set, evaluation_of, fault, texts_of
from unpaint.prompts import fill, fillings, put, slots_of


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
            object.__setattr__(self, name, texts_of(self.name, name, getattr(self, name)))
        given: Any = self.evaluation
        if not isinstance(given, Evaluation):
            object.__setattr__(self, "evaluation", evaluation_of(self.name, given))
        check_concept(self)

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
        return lists_of(self, 1)

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
        return retaining(self, [self])

    def erasing(self, further: bool) -> list[Erasing]:
        pairs = [(put(template, words), template) for template in self.templates for words in self.words]
        if further:
            pairs += [(text, twin_of(text, self.templates) or "") for text in self.erase]
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
        return seeded(self.lists if times == 1 else lists_of(self, times), seed)


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
        for member in self.members:
            if not isinstance(member, Concept):
                raise fault(self.name, f"its members are concepts, not {type(member).__name__}")
        check_set(self)

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
                if not any((label,) == other.labels or named(other, words) for other in self.members):
                    found.setdefault(label, words)
        return found

    @property
    def neighbours(self) -> tuple[str, ...]:
        every = dict.fromkeys(chain(*(member.neighbours for member in self.members)))
        return tuple(label for label in every if label in self.retained)

    @cached_property
    def lists(self) -> list[List]:
        """As `Concept.lists`."""
        return lists_of(self, 1)

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
        return list(dict.fromkeys(alternating(retaining(member, self.members) for member in self.members)))

    def erasing(self, further: bool) -> list[Erasing]:
        every = alternating(member.erasing(further) for member in self.members)
        return list({entry.prompt: entry for entry in reversed(every)}.values())[::-1]

    def cases(self, seed: int, times: int = 1) -> list[Case]:
        """As `Concept.cases`; the members' target cases alternate. A picture that asks for two members is none."""
        return seeded(self.lists if times == 1 else lists_of(self, times), seed)


AnyConcept = Concept | ConceptSet


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
