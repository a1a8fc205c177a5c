"""Prompts from templates: slots, their fillings, and lists that are balanced from the head on. Pure text, no torch.

A template is a format string with `{concept}` and any of the slots; a slot maps detector labels to words.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import product, zip_longest
from string import Formatter
from typing import NamedTuple

Slots = Mapping[str, Mapping[str, str]]
CONCEPT = "{concept}"


class Question(NamedTuple):
    """A prompt, the words that stand for `{concept}` in it, the label of each of its slots, and the same prompt with
    other words (`neutral`) in the concept's place."""

    prompt: str
    words: str
    labels: dict[str, str]
    neutral: str


def questions(
    templates: Sequence[str],
    words: Sequence[str],
    slots: Slots,
    cross: str | None,
    key: str,
    neutral: str | None = None,
) -> list[Question]:
    """Every distinct prompt for the words, each once; any head of the list is balanced over the slot `cross`.

    The words may have slots of their own. `key` shuffles: the same key, templates, words and slots, the same list.
    `neutral` None: no neutral prompts.
    """
    forms = [
        (put(template, word), word, None if neutral is None else put(template, neutral))
        for template in templates
        for word in words
    ]
    used = frozenset[str]().union(*(slots_of(form) for form, _, _ in forms))
    others = [name for name in slots if name in used and name != cross]
    columns = []
    rest = list(product(*(slots[name].items() for name in others)))
    for crossed in slots[cross].items() if cross in used and cross is not None else [("", "")]:
        rows = list(product(forms, rest))
        random.Random(f"unpaint/{key}/{crossed[0]}").shuffle(rows)
        column: dict[str, Question] = {}
        for (form, word, plain), row in rows:
            filling = dict(zip(others, row, strict=True)) | ({cross: crossed} if cross else {})
            question = _question(form, word, plain, filling)
            column.setdefault(question.prompt, question)
        columns.append(column.values())
    found: dict[str, Question] = {}
    for turn in zip_longest(*columns):
        for question in turn:
            if question is not None:
                found.setdefault(question.prompt, question)
    return list(found.values())


def drawn(templates: Sequence[str], words: Sequence[str], slots: Slots, key: str, draws: int) -> Iterator[Question]:
    """So many questions drawn at random, the templates in turn: for products that are too large to write out."""
    rng = random.Random(f"unpaint/{key}")
    for i in range(draws):
        word = rng.choice(words) if words else ""
        form = put(templates[i % len(templates)], word)
        filling = {name: rng.choice(list(slots[name].items())) for name in slots if name in slots_of(form)}
        yield _question(form, word, None, filling)


def _question(form: str, word: str, plain: str | None, filling: Mapping[str, tuple[str, str]]) -> Question:
    words = {name: pair[1] for name, pair in filling.items()}
    labels = {name: pair[0] for name, pair in filling.items() if name in slots_of(form)}
    return Question(fill(form, words), word, labels, "" if plain is None else fill(plain, words))


def fillings(template: str, slots: Slots) -> Iterator[dict[str, tuple[str, str]]]:
    """Every way to fill the template's slots, slot -> (label, words), the concept's own slot left out."""
    used = [name for name in slots if name in slots_of(template)]
    for filling in product(*(slots[name].items() for name in used)):
        yield dict(zip(used, filling, strict=True))


def put(template: str, words: str) -> str:
    """The template with words (or a template) in the concept's place."""
    return template.replace(CONCEPT, words)


def fill(template: str, words: Mapping[str, str]) -> str:
    """The template with its slots filled; an empty slot leaves no stray space or comma."""
    text = re.sub(r"\s+", " ", template.format_map(words))
    return re.sub(r"( ?,)+", ",", text).strip(" ,")


@lru_cache(maxsize=4096)
def slots_of(template: str) -> frozenset[str]:
    """The slots' names. Raises ValueError on braces that do not match."""
    return frozenset(name for _, name, _, _ in Formatter().parse(template) if name is not None)


def names(text: str, words: str) -> bool:
    """Whether a text contains the words as whole words, their article aside: "a pet cat" names "a cat"."""
    return _whole_words(words).search(text) is not None


@lru_cache(maxsize=1024)
def _whole_words(words: str) -> re.Pattern[str]:
    bare = re.sub(r"^(a|an|the)\s+", "", words.strip(), flags=re.IGNORECASE)
    return re.compile(rf"(?<!\w){re.escape(bare)}(?!\w)", re.IGNORECASE)


def same(one: str, other: str) -> bool:
    return one.strip().lower() == other.strip().lower()
