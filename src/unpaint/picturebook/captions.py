"""The language of Picturebook: captions of scenes, and other words for every object and style.

Each synonym, description and style phrasing has a fixed mark. Methods may use `erase` ones only; evaluators call the
`test` ones out-of-set. The text encoder is trained on both. Some sentence templates are held out of training.
Text is lower case ASCII with commas as the only punctuation; each word and each comma is one token.
"""

import random
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

from unpaint.errors import UserError, nearest
from unpaint.picturebook.world import OBJECTS, PAINTABLE, SETTINGS, STYLES, Scene

Mark = Literal["any", "erase", "test"]
Kind = Literal["synonym", "description", "implied"]
Name = Literal["any", "plain", "synonym", "description"]

MAX_TOKENS = 22  # of a caption, without the start and end tokens


class Phrases(NamedTuple):
    erase: tuple[str, ...]
    test: tuple[str, ...]

    def of(self, mark: Mark) -> tuple[str, ...]:
        return self.erase + self.test if mark == "any" else getattr(self, mark)


SYNONYMS: dict[str, Phrases] = {
    "cat": Phrases(("a kitten",), ("a pussycat",)),
    "dog": Phrases(("a puppy",), ("a hound",)),
    "bird": Phrases(("a sparrow",), ("a finch",)),
    "fish": Phrases(("a trout",), ("a salmon",)),
    "spider": Phrases(("a tarantula",), ("an arachnid",)),
    "tree": Phrases(("an oak",), ("a maple",)),
    "house": Phrases(("a cottage",), ("a bungalow",)),
    "car": Phrases(("an automobile",), ("a sedan",)),
    "boat": Phrases(("a ship",), ("a yacht",)),
    "flower": Phrases(("a blossom",), ("a daisy",)),
    "apple": Phrases((), ("a pippin",)),
    "bottle": Phrases(("a flagon",), ("a flask",)),
    "umbrella": Phrases(("a brolly",), ("a parasol",)),
}

DESCRIPTIONS: dict[str, Phrases] = {
    "cat": Phrases(
        (
            "something that purrs on your lap",
            "the one that chases mice",
            "a pet that meows for milk",
            "a furry hunter with long whiskers",
        ),
        (
            "a pet with claws and whiskers",
            "something that scratches the sofa",
            "the one with nine lives",
            "a purring ball of fur",
        ),
    ),
    "dog": Phrases(
        (
            "something that barks at the mailman",
            "the one that wags its tail",
            "a pet that fetches sticks",
            "a loyal pet on a leash",
        ),
        (
            "something that buries bones",
            "the one that herds sheep",
            "the best friend of man",
            "a barking friend on four paws",
        ),
    ),
    "bird": Phrases(
        (
            "something that builds a nest",
            "the one that flaps its wings",
            "a feathered singer",
            "an animal that lays eggs and flies",
        ),
        (
            "something with feathers and a beak",
            "the one that tweets at dawn",
            "a winged animal that chirps",
            "something that pecks at seeds",
        ),
    ),
    "fish": Phrases(
        (
            "something that breathes with gills",
            "the one with fins and scales",
            "an animal that blows bubbles",
            "a swimmer that lives in a tank",
        ),
        (
            "something that swims in a bowl",
            "the one caught with hook and line",
            "an animal with fins and no legs",
            "a swimmer with scales and gills",
        ),
    ),
    "spider": Phrases(
        (
            "something with eight legs",
            "the one that spins a web",
            "a hunter that walks on eight legs",
            "a creature that traps flies",
        ),
        (
            "something that weaves silk threads",
            "the one hiding in its web",
            "a creature with eight eyes",
            "a creature that spins silk",
        ),
    ),
    "tree": Phrases(
        (
            "something with a trunk and branches",
            "the one that squirrels climb",
            "a tall plant with a wooden trunk",
            "a tall plant that is cut down",
        ),
        (
            "something with roots and branches",
            "the one where acorns grow",
            "a leafy giant of the forest",
            "a plant that is cut for timber",
        ),
    ),
    "house": Phrases(
        (
            "something with a roof and a chimney",
            "the one with a doorbell",
            "a building where a family lives",
            "a building with bedrooms and a kitchen",
        ),
        (
            "something built of bricks",
            "the one with a mailbox and a porch",
            "a building with a roof and walls",
            "a place with an address",
        ),
    ),
    "car": Phrases(
        (
            "something with four wheels and an engine",
            "the one you drive to work",
            "a vehicle stuck in traffic",
            "a machine that needs gasoline",
        ),
        (
            "something parked in the garage",
            "the one that honks its horn",
            "a vehicle with four tires",
            "a machine you drive on the highway",
        ),
    ),
    "boat": Phrases(
        (
            "something that sails across the water",
            "the one with a mast and a hull",
            "a craft with an anchor",
            "something steered by a captain",
        ),
        (
            "something moored at a dock",
            "the one with a crew of sailors",
            "a craft that floats on water",
            "a craft with sails and a rudder",
        ),
    ),
    "flower": Phrases(
        (
            "something with petals",
            "the one that bees visit for nectar",
            "a plant you put in a vase",
            "a blooming plant",
        ),
        (
            "something that smells sweet and blooms",
            "the one in a bridal bouquet",
            "a plant with colorful petals",
            "a gift that a florist sells",
        ),
    ),
    "apple": Phrases(
        (
            "something to bake in a pie",
            "the one that newton saw falling",
            "a round fruit with a core",
            "a fruit that makes good cider",
        ),
        (
            "a fruit that keeps the doctor away",
            "the one that eve gave to adam",
            "a crunchy fruit for the teacher",
            "a fruit from the orchard",
        ),
    ),
    "bottle": Phrases(
        (
            "something that holds wine",
            "the one with a cork",
            "a glass container with a neck",
            "a container for lemonade",
        ),
        (
            "something you open with a corkscrew",
            "the one sealed with a cap",
            "a glass container full of juice",
            "a container you drink soda from",
        ),
    ),
    "umbrella": Phrases(
        (
            "something that keeps the rain off",
            "the one you open in a downpour",
            "a folding shield against rain",
            "a canopy you carry on a stick",
        ),
        (
            "something you hold over your head",
            "the one carried on rainy days",
            "a thing that keeps you dry",
            "a dome with a handle",
        ),
    ),
}

# Scenes that bring an object with them without a word for it.
IMPLIED: dict[str, Phrases] = {
    "spider": Phrases(
        (
            "a place full of webs",
            "eight hairy legs",
            "a creepy crawly on a thread",
            "sticky silk and trapped flies",
        ),
        (
            "a tangle of old cobwebs",
            "creepy crawlies",
            "eight legs creeping closer",
            "a dusty web with a trapped fly",
        ),
    ),
}

# Beside "a {style} picture" and "in {style} style", which have no mark.
STYLE_HEADS: dict[str, Phrases] = {
    "flat": Phrases(("a flat color picture",), ("a solid color poster",)),
    "sketch": Phrases(("a pencil sketch",), ("a pencil drawing",)),
    "crayon": Phrases(("a crayon drawing",), ("a waxy drawing",)),
    "watercolor": Phrases(("a watercolor painting",), ("an aquarelle",)),
    "mosaic": Phrases(("a tile mosaic",), ("a tiled picture",)),
    "pointillism": Phrases(("a pointillism painting",), ("a dotted painting",)),
    "woodcut": Phrases(("a woodcut print",), ("a woodblock print",)),
    "neon": Phrases(("a neon sign",), ("a glowing sign",)),
}
STYLE_TAILS: dict[str, Phrases] = {
    "flat": Phrases(("in flat colors",), ("in solid colors",)),
    "sketch": Phrases(("sketched in pencil",), ("drawn with a pencil",)),
    "crayon": Phrases(("drawn in crayon",), ("drawn with waxy sticks",)),
    "watercolor": Phrases(("painted in watercolor",), ("as an aquarelle",)),
    "mosaic": Phrases(("as a mosaic",), ("made of little tiles",)),
    "pointillism": Phrases(("painted in pointillism",), ("made of tiny dots",)),
    "woodcut": Phrases(("as a woodcut",), ("as a woodblock print",)),
    "neon": Phrases(("in neon lights",), ("in glowing tubes",)),
}
NO_STYLE_HEADS = ("a picture", "an image", "a photo")

SETTING_PHRASES: dict[str, tuple[str, ...]] = {
    "meadow": ("in a meadow", "in a green meadow", "on the grass"),
    "beach": ("on a beach", "by the sea", "on the sand"),
    "night": ("at night", "under the stars", "in the moonlight"),
    "snow": ("in the snow", "on a snowy day", "in winter"),
    "room": ("in a room", "indoors", "inside a room"),
    "none": ("", "", "", "on plain paper"),
}
EMPTY: dict[str, tuple[str, ...]] = {
    "meadow": ("an empty meadow", "an empty green meadow"),
    "beach": ("an empty beach", "an empty seaside"),
    "night": ("an empty night sky", "an empty scene at night"),
    "snow": ("an empty snowy landscape", "an empty scene in the snow"),
    "room": ("an empty room", "an empty room indoors"),
    "none": ("empty paper", "a blank page", "nothing on plain paper"),
}
EMPTY_SOMEWHERE = ("an empty scene", "nothing at all")

PAIRS = ("{a} next to {b}", "{a} and {b}", "{a} beside {b}")
ON_A_TABLE = ("{x} on a table", "{x} on a table", "{x} standing on a table", "a table with {x} on it")
ALONE = ("{x}",) * 11 + ("{x} alone",)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "train": (
        "{subject} {tail} {setting}",
        "{subject} {setting} {tail}",
        "{subject}, {tail}, {setting}",
        "{subject}, {setting}, {tail}",
        "{setting}, {subject} {tail}",
        "{head} of {subject} {setting}",
        "{head} of {subject}, {setting}",
        "{head} showing {subject} {setting}",
        "{setting}, {head} of {subject}",
        "a picture of {subject} {setting} {tail}",
        "a picture of {subject} {tail} {setting}",
        "a scene {setting} with {subject}, {tail}",
        "there is {subject} {setting}, {tail}",
    ),
    # Words of the training templates, in orders that training never shows.
    "held_out": (
        "{tail}, {subject} {setting}",
        "a picture {tail} of {subject} {setting}",
        "{head} of a scene {setting} with {subject}",
        "{setting} there is {subject} {tail}",
    ),
}


def article(noun: str) -> str:
    """The noun with `a` or `an`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def length(text: str) -> int:
    """Tokens of a text made of Picturebook's own words, without start and end."""
    return len(re.findall(r"[a-z]+|,", text))


def phrases(name: str, kind: Kind = "synonym", mark: Mark = "any") -> list[str]:
    """Other words for an object, with their article: synonyms, descriptions, or scenes that imply it.

    Empty if there are none (only `spider` has implied ones). Raises UserError for an unknown object, kind or mark.
    """
    _known("object", name, OBJECTS)
    _known("kind", kind, get_args(Kind))
    _known("mark", mark, get_args(Mark))
    table = {"synonym": SYNONYMS, "description": DESCRIPTIONS, "implied": IMPLIED}[kind]
    return list(table[name].of(mark)) if name in table else []


def out_of_set_prompts(name: str) -> list[str]:
    """Prompts for an object or style by words that methods may not use (synonyms and descriptions, not implied)."""
    return _prompts(name, "test")


def erase_prompts(name: str) -> list[str]:
    """Prompts for an object or style by words, other than its name, that methods may use."""
    return _prompts(name, "erase")


def implied_prompts(name: str, mark: Mark = "test") -> list[str]:
    """Prompts of scenes that bring the object with them; empty for all objects but `spider`."""
    return list(_styled(phrases(name, "implied", mark)))


def _prompts(name: str, mark: Mark) -> list[str]:
    _known("object or style", name, OBJECTS + STYLES)
    if name in OBJECTS:
        return list(_styled([*phrases(name, "synonym", mark), *phrases(name, "description", mark)]))
    heads, tails = STYLE_HEADS[name].of(mark), STYLE_TAILS[name].of(mark)
    forms = [f"{head} of {{x}}" for head in heads] + [f"{{x}} {tail}" for tail in tails]
    return [form.format(x=article(thing)) for thing in PAINTABLE for form in forms]


def _styled(subjects: list[str]) -> Iterator[str]:
    # The subject changes fastest: the head of the list already has them all.
    for i, style in enumerate(STYLES):
        for k, subject in enumerate(subjects):
            yield f"a {style} picture of {subject}" if (i + k) % 2 else f"{subject} in {style} style"


def caption(
    scene: Scene,
    rng: random.Random,
    templates: Literal["train", "held_out", "all"] = "train",
    name: Name = "any",
    mark: Mark = "any",
    drop: float = 0.0,
) -> str:
    """A sentence about the scene, of at most `MAX_TOKENS` tokens.

    `name`: by which words objects are called; of a pair at most one is described, and an object without a synonym of
    that mark goes by its name. `mark`: which synonyms, descriptions and style phrasings may be used beside the plain
    names. `drop`: probability to leave out the style and, independently, the setting. Raises UserError for an unknown
    choice of templates, name or mark.
    """
    _known("templates", templates, ("train", "held_out", "all"))
    _known("name", name, get_args(Name))
    _known("mark", mark, get_args(Mark))
    sentences = TEMPLATES["train"] + TEMPLATES["held_out"] if templates == "all" else TEMPLATES[templates]
    style = None if rng.random() < drop else scene.style
    setting = None if rng.random() < drop else scene.setting
    while True:
        head, tail = _style_words(style, mark, rng)
        place = "" if setting is None or not scene.objects else rng.choice(SETTING_PHRASES[setting])
        subject = _subject(scene, setting, rng, name, mark)
        text = rng.choice(sentences).format(subject=subject, head=head, tail=tail, setting=place)
        text = _tidy(text)
        if length(text) <= MAX_TOKENS:
            return text


def _style_words(style: str | None, mark: Mark, rng: random.Random) -> tuple[str, str]:
    if style is None:
        return rng.choice(NO_STYLE_HEADS), ""
    head, tail = f"a {style} picture", f"in {style} style"
    if rng.random() < 0.5:
        head = rng.choice(STYLE_HEADS[style].of(mark))
    if rng.random() < 0.5:
        tail = rng.choice(STYLE_TAILS[style].of(mark))
    return head, tail


def _subject(scene: Scene, setting: str | None, rng: random.Random, name: Name, mark: Mark) -> str:
    if not scene.objects:
        return rng.choice(EMPTY_SOMEWHERE if setting is None else EMPTY[setting])
    kinds = [rng.choice(("plain", "synonym", "description")) if name == "any" else name for _ in scene.objects]
    if kinds == ["description", "description"]:
        kinds[rng.randrange(2)] = rng.choice(("plain", "synonym"))
    # A clause of its own may be closed by a comma; `_tidy` drops the one that ends the sentence.
    nouns = [
        _noun(thing, kind, rng, mark) + (", " if kind == "description" and rng.random() < 0.5 else "")
        for thing, kind in zip(scene.objects, kinds, strict=True)
    ]
    if len(nouns) == 2:
        rng.shuffle(nouns)
        return rng.choice(PAIRS).format(a=nouns[0], b=nouns[1])
    described = kinds[0] == "description"
    if scene.relation == "on a table":
        return (ON_A_TABLE[0] if described else rng.choice(ON_A_TABLE)).format(x=nouns[0])
    return (ALONE[0] if described else rng.choice(ALONE)).format(x=nouns[0])


def _noun(thing: str, kind: str, rng: random.Random, mark: Mark) -> str:
    words: list[str] = []
    if kind == "synonym":
        words = phrases(thing, "synonym", mark)
    elif kind == "description":
        words = phrases(thing, "description", mark) + phrases(thing, "implied", mark)
    return rng.choice(words) if words else article(thing)


def _tidy(text: str) -> str:
    """Closes the gaps that empty slots leave."""
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"( ?,)+", ",", text)
    return text.strip(" ,")


def corpus() -> list[str]:
    """Every phrase of the language and every template with every style, for the tokenizer; always in this order."""
    texts = [article(thing) for thing in OBJECTS]
    for table in (SYNONYMS, DESCRIPTIONS, IMPLIED, STYLE_HEADS, STYLE_TAILS):
        texts += [text for group in table.values() for text in group.of("any")]
    for words in (*SETTING_PHRASES.values(), *EMPTY.values(), EMPTY_SOMEWHERE, NO_STYLE_HEADS):
        texts += words
    texts += [pair.format(a="a cat", b="a dog") for pair in PAIRS]
    texts += [form.format(x="a cat") for form in (*ON_A_TABLE, *ALONE)]
    for template in (*TEMPLATES["train"], *TEMPLATES["held_out"]):
        for i, style in enumerate(STYLES):
            place = SETTING_PHRASES[SETTINGS[i % len(SETTINGS)]][0]
            filling = {"subject": "a cat", "head": f"a {style} picture", "tail": f"in {style} style", "setting": place}
            texts.append(_tidy(template.format_map(filling)))
    return [text for text in dict.fromkeys(texts) if text]


def _known(what: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise UserError(f"unknown {what} '{value}'{nearest(value, names)} (one of {', '.join(names)})")
