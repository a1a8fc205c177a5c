"""Flat shapes, the only thing the world is made of: closed outlines and thick strokes with one colour each."""

import math
import random
from dataclasses import dataclass, replace

Point = tuple[float, float]
Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class Shape:
    """A filled outline (`width` 0) or a stroke of that width.

    `line` says whether styles draw its contour; `thing` numbers the object that it is part of (0: the setting).
    """

    points: tuple[Point, ...]
    color: Rgb
    width: float = 0.0
    line: bool = True
    thing: int = 0


def poly(points: list[Point], color: Rgb, line: bool = True) -> Shape:
    return Shape(tuple(points), color, 0.0, line)


def stroke(points: list[Point], width: float, color: Rgb, line: bool = False) -> Shape:
    return Shape(tuple(points), color, width, line)


def ellipse(x: float, y: float, rx: float, ry: float, color: Rgb, line: bool = True, turn: float = 0.0) -> Shape:
    """An ellipse with half axes `rx`, `ry`, turned by `turn` radians about its centre."""
    c, s = math.cos(turn), math.sin(turn)
    points = []
    for i in range(24):
        u, v = rx * math.cos(i * math.pi / 12), ry * math.sin(i * math.pi / 12)
        points.append((x + c * u - s * v, y + s * u + c * v))
    return Shape(tuple(points), color, 0.0, line)


def moved(shape: Shape, x: float, y: float, sx: float, sy: float, thing: int) -> Shape:
    """The shape scaled by (`sx`, `sy`) about its origin, then moved to (`x`, `y`), as part of object `thing`."""
    points = tuple((x + sx * px, y + sy * py) for px, py in shape.points)
    return replace(shape, points=points, width=shape.width * abs(sy), thing=thing)


def lighter(color: Rgb, by: float) -> Rgb:
    """Mixed with white (`by` > 0) or black (`by` < 0)."""
    goal = 255 if by > 0 else 0
    r, g, b = (round(c + (goal - c) * abs(by)) for c in color)
    return r, g, b


def tinted(color: Rgb, rng: random.Random, by: int) -> Rgb:
    """Every channel moved by at most `by`."""
    r, g, b = (min(255, max(0, c + rng.randint(-by, by))) for c in color)
    return r, g, b
