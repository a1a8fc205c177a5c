"""The wall: the same prompt and seed, painted by the unedited model and by every edited one, small enough to embed.

The pictures are those that the runs painted to be measured. They are found under `outputs/.cache` by what the records
say, without loading torch; a run whose pictures are gone is counted, and shown without.
"""

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open

from unpaint.cases import CELLS, COMPOSITION, IMPLICIT, IN_SET, OUT_OF_SET, RETAIN, Case
from unpaint.concepts import AnyConcept, Concept, ConceptSet
from unpaint.edit_header import ID_LENGTH, METADATA_KEY
from unpaint.errors import UserError
from unpaint.evaluation.pictures import batches_of
from unpaint.report.gather import Gathered, Run

SIDE, QUALITY = 160, 82
MOST_PICTURES, MOST_BYTES = 6000, 30_000_000
GONE, NEAR, KEPT = "to be erased", "a near relative, to stay", "to stay"


@dataclass(frozen=True)
class Painted:
    """The fields of `sampling.Sampler`, which cannot be imported without torch: they are part of a batch's name."""

    steps: int
    guidance: float
    eta: float


@dataclass(frozen=True)
class Card:
    """One prompt and seed. before: the unedited model's picture; after: (row, picture) of each run; pictures are
    positions in `Wall.pictures`."""

    protocol: int
    concept: str
    seed: int
    prompt: str
    fate: str
    before: int
    after: Sequence[tuple[int, int]]


@dataclass
class Wall:
    """cards, and the pictures on them as data URIs. prompts: how many of each concept and seed are shown, of how many
    that could be; without: how many runs have no pictures any more."""

    cards: list[Card] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    prompts: tuple[int, int] = (0, 0)
    without: int = 0


def wall(gathered: Gathered, most: int = MOST_PICTURES) -> Wall:
    """Up to `most` pictures, and `MOST_BYTES`. What there is room for goes by turns: the first prompt of every concept
    and seed, then the second, so that all are cut alike."""
    found, places = Wall(), dict[tuple[str, int], int]()
    groups: dict[tuple[int, str, int], list[tuple[int, Run]]] = {}
    for i, row in enumerate(gathered.rows):
        for seed, runs in row.runs.items():
            if runs[0].record.status == "complete":
                groups.setdefault((row.protocol, row.concept, seed), []).append((i, runs[0]))
    keys = {id(run): store_of(run) for painted in groups.values() for _, run in painted}
    plans = {
        where: _picks(painted[0][1]) if any(keys[id(run)] for _, run in painted) else []
        for where, painted in groups.items()
    }
    rounds = max((len(plan) for plan in plans.values()), default=0)
    each = len(keys) + len(groups)  # at most so many pictures a turn; there is always a first one
    sizes = [0]
    for turn in range(rounds):
        # A turn takes about as many bytes as the one before it.
        if turn and (len(found.pictures) + each > most or 2 * sizes[-1] - sizes[-2] > MOST_BYTES):
            break
        for where, painted in groups.items():
            if turn < len(plans[where]) and (card := _card(found, places, where, plans[where][turn], painted, keys)):
                found.cards.append(card)
        found.prompts = (turn + 1, rounds)
        sizes.append(sum(map(len, found.pictures)))
    seen = {(row, card.seed) for card in found.cards for row, _ in card.after}
    found.without = sum((i, seed) not in seen for (_, _, seed), painted in groups.items() for i, _ in painted)
    return found


def _card(
    found: Wall,
    places: dict[tuple[str, int], int],
    where: tuple[int, str, int],
    pick: tuple[Case, str, str, int],
    runs: Sequence[tuple[int, Run]],
    keys: Mapping[int, tuple[Path, str, str] | None],
) -> Card | None:
    case, fate, batch, position = pick

    def place(store: Path, key: str) -> int | None:
        file = str(store / key / f"{batch}.safetensors")
        if (file, position) not in places:
            if (text := _embedded(file, position)) is None:
                return None
            places[file, position] = len(found.pictures)
            found.pictures.append(text)
        return places[file, position]

    before, after = None, []
    for i, run in runs:
        if (key := keys[id(run)]) is not None:
            store, base, edited = key
            before = place(store, base) if before is None else before
            if (one := place(store, edited)) is not None:
                after.append((i, one))
    if before is None or not after:
        return None
    protocol, concept, seed = where
    return Card(protocol, concept, seed, case.prompt, fate, before, after)


def _embedded(file: str, position: int) -> str | None:
    try:
        with safe_open(file, framework="np") as opened:
            pixels: NDArray[np.uint8] = opened.get_slice("tensor")[position]
    except (SafetensorError, OSError, IndexError):
        return None
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    memory = io.BytesIO()
    image.save(memory, "webp", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(memory.getvalue()).decode()}"


# --- which pictures -------------------------------------------------------------------------------------------------


def _picks(run: Run) -> list[tuple[Case, str, str, int]]:
    """(case, what should happen to it, name of its batch, its place in the batch), what says most first."""
    config = run.record.config
    evaluator = config.get("evaluator") or {}
    sampler = {key: value for key, value in (evaluator.get("sampler") or {}).items() if key != "_target_"}
    try:
        concept = _concept(json.dumps(config.get("concept")))
        cases = concept.cases(run.record.seed, int(evaluator.get("times") or 1))
        batches = batches_of(cases, int(evaluator["batch_size"]), Painted(**sampler))  # type: ignore[arg-type]
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return []  # a concept of a plugin's class, or of another version
    places = {
        (case.group, case.prompt, case.seed): (batch.name, position)
        for batch in batches
        for position, case in enumerate(batch.cases)
    }
    return [(case, fate, *places[case.group, case.prompt, case.seed]) for case, fate in _chosen(concept, cases)]


@lru_cache(maxsize=256)
def _concept(text: str) -> AnyConcept:
    config: dict[str, Any] = json.loads(text)
    if "members" in config:
        return ConceptSet(config["name"], tuple(_plain(member) for member in config["members"].values()))
    return _plain(config)


def _plain(config: Mapping[str, Any]) -> Concept:
    return Concept(**{key: value for key, value in config.items() if key != "_target_"})


def _chosen(concept: AnyConcept, cases: Sequence[Case]) -> Iterator[tuple[Case, str]]:
    by_part: dict[str, dict[str, list[Case]]] = {}
    for case in cases:
        by_part.setdefault(case.part, {}).setdefault(case.group, []).append(case)
    targets = [case for turn in zip(*by_part.get(IN_SET, {}).values(), strict=False) for case in turn]
    kept = by_part.get(RETAIN, {})
    near = [group[0] for label, group in kept.items() if label in concept.neighbours]
    others = [group[-1] for label, group in kept.items() if label not in concept.neighbours]
    further = [
        (group[0], GONE if part in (OUT_OF_SET, IMPLICIT) else KEPT)
        for part in (OUT_OF_SET, *CELLS, IMPLICIT, COMPOSITION)
        for group in list(by_part.get(part, {}).values())[:1]
    ]
    wished = [(targets[:1], GONE), (near[:1], NEAR), (others[:1], KEPT), (targets[1:2], GONE)]
    for some, fate in wished:
        yield from ((case, fate) for case in some)
    yield from further
    for some, fate in [(near[1:2], NEAR), (targets[2:4], GONE), (others[1:3], KEPT)]:
        yield from ((case, fate) for case in some)


def store_of(run: Run) -> tuple[Path, str, str] | None:
    """The folder of pictures, and in it the unedited and the edited model's; None if they are not there."""
    try:
        with safe_open(run.folder / "edit.safetensors", framework="np") as opened:
            edit = json.loads((opened.metadata() or {})[METADATA_KEY])["sha256"][:ID_LENGTH]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None
    for parent in list(run.folder.absolute().parents)[:5]:
        if (store := parent / ".cache" / "pictures").is_dir():
            key = next((name for name in _folders(store) if name.endswith(f"-{edit}")), None)
            return None if key is None else (store, key.partition("-")[0], key)
    return None


@lru_cache(maxsize=16)
def _folders(store: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in store.iterdir()))
