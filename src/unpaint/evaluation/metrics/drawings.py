"""FID or KID against drawings of the same labels: Picturebook's world as it is, without a model in between."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unpaint.cases import RETAIN, Case
from unpaint.errors import UserError, nearest
from unpaint.evaluation.detectors import Detector
from unpaint.evaluation.metrics import Parts, Reader
from unpaint.evaluation.metrics.distances import check_enough, fid, kid, summary
from unpaint.evaluation.metrics.features import KEPT, checked, rows_of
from unpaint.evaluation.metrics.fid import sizes
from unpaint.picturebook.styles import draw
from unpaint.picturebook.world import OBJECTS, SETTINGS, STYLES, Scene

DISTANCES = ("fid", "kid")
WORDS = {"object": OBJECTS, "style": STYLES, "setting": (*SETTINGS, "none")}
CODE = 6
AT_ONCE = 64


class Drawings:
    """`distance` fid or kid, from one drawing a picture of the prompts that do not ask for the target.

    A drawing shows the objects, style and setting that its prompt's labels name; `base` is the unedited model's
    distance, which is not 0: no model draws as the code does. Only for Picturebook's labels, of which there are at most
    two objects a prompt. Drawn anew each time, 26 ms a drawing. features: a reader of features (n, d).
    """

    unit = "distance"
    higher_is_better = False
    parts = (RETAIN,)
    roles = KEPT

    def __init__(self, title: str, cost: str, features: Reader, distance: str = "kid") -> None:
        if distance not in DISTANCES:
            raise UserError(
                f"metric drawings: distance is {' or '.join(DISTANCES)}, not '{distance}'{nearest(distance, DISTANCES)}"
            )
        self.name = f"fidelity/{distance}_drawings"
        self.distance = distance
        self.title = title
        self.cost = cost
        self.reader = checked(features, self.name)

    def part(self, cases: Sequence[Case], reading: NDArray[Any], detector: Detector) -> NDArray[np.float64]:
        """What to draw for each picture that counts, in CODE numbers, and the picture's features: (n, CODE + d)."""
        rows, features = rows_of(cases, reading, self)
        codes = np.array([_code(cases[row]) for row in rows], dtype=np.float64).reshape(-1, CODE)
        return np.concatenate([codes, features], axis=1)

    def finish(self, edited: Parts, base: Parts) -> Mapping[str, Any]:
        """As `Fid.finish` or `Kid.finish`."""
        ours, theirs = ([part[:, CODE:] for part in parts] for parts in (edited, base))
        n, d = check_enough(self.name, ours, theirs)
        drawn = [self._features(part[:, :CODE]) for part in base]
        if self.distance == "fid":
            return summary(fid(ours, drawn), fid(theirs, drawn), lowest=0.0) | sizes(n, d)
        return summary(kid(ours, drawn)[0], kid(theirs, drawn)[0]) | {"n": n, "features": d}

    def _features(self, codes: NDArray[np.float64]) -> NDArray[np.float64]:
        found = []
        for first in range(0, len(codes), AT_ONCE):
            drawn = np.stack([draw(_scene(code)) for code in codes[first : first + AT_ONCE]])
            found.append(self.reader.read(torch.from_numpy(drawn).permute(0, 3, 1, 2), [""] * len(drawn)).numpy())
        return np.concatenate(found).astype(np.float64)


def drawing(case: Case) -> NDArray[np.uint8]:
    """A drawing (H, W, 3) of what the case's labels name. Raises UserError on labels that are not Picturebook's."""
    return draw(_scene(np.array(_code(case), dtype=np.float64)))


def _code(case: Case) -> tuple[int, ...]:
    """First and second object, style, setting, whether on a table, seed; -1 for what the prompt leaves open."""
    named: dict[str, list[int]] = {"object": [], "style": [], "setting": []}
    on_table = False
    for label in case.wants:
        axis, _, word = label.partition("/")
        if axis == "relation":
            on_table = word.replace("_", " ") == "on a table"
        elif word in WORDS.get(axis, ()):
            named[axis].append(WORDS[axis].index(word))
        elif word != "none":
            raise UserError(f"metric drawings: Picturebook has no '{label}'{nearest(word, WORDS.get(axis, ()))}")
    if len(named["object"]) > 2 or len(named["style"]) > 1 or len(named["setting"]) > 1:
        raise UserError(f"metric drawings: '{case.prompt}' asks for more than one drawing can show")
    first, second = [*named["object"], -1, -1][:2]
    return first, second, [*named["style"], -1][0], [*named["setting"], -1][0], int(on_table), case.seed


def _scene(code: NDArray[np.float64]) -> Scene:
    *places, on_table, seed = (int(number) for number in code)
    first, second, style, setting = places
    objects = tuple(OBJECTS[i] for i in (first, second) if i >= 0)
    return Scene(
        objects=objects,
        style=STYLES[style if style >= 0 else seed % len(STYLES)],
        setting=WORDS["setting"][setting if setting >= 0 else seed % len(WORDS["setting"])],
        relation="next to"
        if len(objects) == 2
        else "on a table"
        if on_table and objects
        else "alone"
        if objects
        else "none",
        seed=seed,
    )
