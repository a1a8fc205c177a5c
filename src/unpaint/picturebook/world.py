"""Picturebook's world: what there is to see, and how a scene of it is laid out.

A scene is a small description (objects, style, setting, relation, seed). `layout` turns it into flat shapes in
painter's order; `unpaint.picturebook.styles` paints the shapes in the scene's style.
"""

import math
import random
from dataclasses import dataclass

from unpaint.picturebook.shapes import Rgb, Shape, ellipse, lighter, moved, poly, stroke, tinted

OBJECTS = (
    "cat",
    "dog",
    "bird",
    "fish",
    "spider",
    "tree",
    "house",
    "car",
    "boat",
    "flower",
    "apple",
    "bottle",
    "umbrella",
)
PAINTABLE = OBJECTS[:-1]
STYLES = ("flat", "sketch", "crayon", "watercolor", "mosaic", "pointillism", "woodcut", "neon")
SETTINGS = ("meadow", "beach", "night", "snow", "room")
RELATIONS = ("alone", "next to", "on a table")


@dataclass(frozen=True)
class Scene:
    """What one picture shows.

    `objects` holds no, one or two different names; `setting` may be "none" (plain paper); `relation` is "none" for
    an empty scene and "next to" for two objects. `seed` decides pose, size, place, colours and proportions.
    """

    objects: tuple[str, ...]
    style: str
    setting: str
    relation: str
    seed: int


def random_scene(rng: random.Random, objects: tuple[str, ...] = PAINTABLE) -> Scene:
    """A scene drawn at random: 4 % empty, 26 % pairs, 20 % on a table, the rest alone."""
    draw = rng.random()
    style, seed = rng.choice(STYLES), rng.getrandbits(48)
    setting = rng.choice(SETTINGS) if rng.random() < 0.8 else "none"
    if draw < 0.04:
        return Scene((), style, setting, "none", seed)
    if draw < 0.30:
        first, second = rng.sample(objects, 2)
        return Scene((first, second), style, setting, "next to", seed)
    relation = "on a table" if draw < 0.50 else "alone"
    return Scene((rng.choice(objects),), style, setting, relation, seed)


def layout(scene: Scene) -> list[Shape]:
    """Shapes of the scene in painter's order, on a unit square with y pointing down."""
    rng = random.Random(scene.seed)
    ground = rng.uniform(0.80, 0.90)
    shapes = background(scene.setting, rng)
    if scene.relation == "on a table":
        top = rng.uniform(0.68, 0.76)
        shapes += table(rng, top)
        size = rng.uniform(0.27, 0.33)
        shapes += placed(scene.objects[0], rng, rng.uniform(0.42, 0.58), top + 0.015, size)
    elif len(scene.objects) == 2:
        for i, x in enumerate((rng.uniform(0.24, 0.28), rng.uniform(0.72, 0.76))):
            bottom, size = ground + rng.uniform(-0.03, 0.05), rng.uniform(0.22, 0.25)
            shapes += placed(scene.objects[i], rng, x, bottom, size, thing=i + 1)
    elif scene.objects:
        size = rng.uniform(0.31, 0.42)
        shapes += placed(scene.objects[0], rng, rng.uniform(0.40, 0.60), min(0.96, ground + 0.06), size)
    return shapes


def placed(name: str, rng: random.Random, x: float, bottom: float, size: float, thing: int = 1) -> list[Shape]:
    """One object, drawn by its own function, moved so that it stands on `bottom` and is 2 * `size` high."""
    flip = rng.random() < 0.5
    stretch = rng.uniform(0.92, 1.08)
    wide = size * stretch * (-1 if flip else 1)
    return [moved(s, x, bottom - size, wide, size, thing) for s in DRAWN[name](rng)]


# --- settings -----------------------------------------------------------------------------------------------------


def background(setting: str, rng: random.Random) -> list[Shape]:
    if setting == "none":
        return [_box(0, 0, 1, 1, tinted((247, 242, 230), rng, 6), line=False)]
    return {"meadow": _meadow, "beach": _beach, "night": _night, "snow": _snow, "room": _room}[setting](rng)


def _box(x0: float, y0: float, x1: float, y1: float, color: Rgb, line: bool = True) -> Shape:
    return poly([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], color, line=line)


def _hill(rng: random.Random, base: float, height: float, color: Rgb, line: bool = True) -> Shape:
    phase, waves = rng.uniform(0, 6.28), rng.uniform(0.7, 1.3)
    top = [(i / 16, base - height * math.sin(phase + waves * 6.28 * i / 16)) for i in range(17)]
    return poly([(-0.02, 1.02), (-0.02, top[0][1]), *top, (1.02, top[-1][1]), (1.02, 1.02)], color, line=line)


def _meadow(rng: random.Random) -> list[Shape]:
    shapes = [_box(-0.02, -0.02, 1.02, 1.02, tinted((160, 214, 245), rng, 12), line=False)]
    shapes.append(ellipse(rng.choice((0.13, 0.87)), 0.13, 0.08, 0.08, (252, 215, 80)))
    shapes.append(_hill(rng, 0.60, 0.05, tinted((150, 205, 110), rng, 14)))
    shapes.append(_hill(rng, 0.72, 0.03, tinted((112, 182, 82), rng, 14)))
    for _ in range(11):
        x, y = rng.uniform(0.02, 0.98), rng.uniform(0.76, 0.98)
        for lean in (-0.022, 0.0, 0.022):
            shapes.append(stroke([(x, y), (x + lean, y - 0.055)], 0.014, (58, 130, 50)))
    return shapes


def _beach(rng: random.Random) -> list[Shape]:
    shapes = [_box(-0.02, -0.02, 1.02, 1.02, tinted((178, 226, 250), rng, 10), line=False)]
    shapes.append(ellipse(rng.choice((0.15, 0.85)), 0.14, 0.075, 0.075, (255, 200, 70)))
    shapes.append(_box(-0.02, 0.42, 1.02, 1.02, tinted((45, 140, 200), rng, 14)))
    for row in (0.485, 0.555):
        offset = rng.uniform(0, 0.1)
        wave = [(offset - 0.1 + i * 0.04, row + (0.014 if i % 2 else -0.014)) for i in range(32)]
        shapes.append(stroke(wave, 0.014, (210, 238, 250)))
    shore = rng.uniform(0.63, 0.68)
    points = [(i / 12, shore + 0.018 * math.sin(i * 1.1)) for i in range(13)]
    shapes.append(poly([(-0.02, 1.02), (-0.02, shore), *points, (1.02, shore), (1.02, 1.02)], (238, 215, 150)))
    for _ in range(10):
        x, y = rng.uniform(0.03, 0.97), rng.uniform(0.74, 0.98)
        shapes.append(ellipse(x, y, 0.011, 0.011, (205, 172, 105), line=False))
    return shapes


def _night(rng: random.Random) -> list[Shape]:
    shapes = [_box(-0.02, -0.02, 1.02, 1.02, tinted((38, 48, 116), rng, 8), line=False)]
    x = rng.choice((0.16, 0.84))
    shapes.append(_crescent(x, 0.16, 0.105))
    for _ in range(9):
        sx, sy = rng.uniform(0.04, 0.96), rng.uniform(0.04, 0.5)
        if abs(sx - x) > 0.15 or sy > 0.32:
            shapes.append(_star(sx, sy, rng.uniform(0.026, 0.038)))
    shapes.append(_hill(rng, 0.74, 0.03, tinted((54, 82, 98), rng, 8)))
    return shapes


def _crescent(x: float, y: float, r: float) -> Shape:
    outer = [(x + r * math.cos(a), y + r * math.sin(a)) for a in _angles(0.9, 5.4, 16)]
    inner = [(x + 0.42 * r + 0.8 * r * math.cos(a), y + 0.8 * r * math.sin(a)) for a in _angles(5.1, 1.2, 14)]
    return poly(outer + inner, (250, 240, 190))


def _star(x: float, y: float, r: float) -> Shape:
    radii = (r, 0.4 * r)
    points = [
        (x + radii[i % 2] * math.sin(i * math.pi / 4), y - radii[i % 2] * math.cos(i * math.pi / 4)) for i in range(8)
    ]
    return poly(points, (252, 244, 200))


def _snow(rng: random.Random) -> list[Shape]:
    shapes = [_box(-0.02, -0.02, 1.02, 1.02, tinted((176, 196, 218), rng, 8), line=False)]
    shapes.append(_hill(rng, 0.60, 0.06, (226, 234, 244)))
    shapes.append(_hill(rng, 0.74, 0.03, (250, 252, 255)))
    for row in range(5):
        for column in range(5):
            x, y = 0.1 + 0.2 * column + rng.uniform(-0.06, 0.06), 0.06 + 0.13 * row + rng.uniform(-0.03, 0.03)
            shapes.append(_flake(x + 0.1 * (row % 2) - 0.05, y, rng.uniform(0.022, 0.03)))
    return shapes


def _flake(x: float, y: float, r: float) -> Shape:
    return ellipse(x, y, r, r, (255, 255, 255))


def _room(rng: random.Random) -> list[Shape]:
    wall = tinted(rng.choice(((244, 206, 170), (226, 190, 196), (214, 210, 160))), rng, 8)
    shapes = [_box(-0.02, -0.02, 1.02, 1.02, wall, line=False)]
    x = rng.choice((0.08, 0.66))
    shapes.append(_box(x, 0.08, x + 0.26, 0.38, (250, 250, 246)))
    shapes.append(_box(x + 0.025, 0.105, x + 0.235, 0.355, (150, 205, 240)))
    shapes.append(stroke([(x + 0.13, 0.105), (x + 0.13, 0.355)], 0.018, (250, 250, 246)))
    shapes.append(stroke([(x + 0.025, 0.23), (x + 0.235, 0.23)], 0.018, (250, 250, 246)))
    floor = rng.uniform(0.66, 0.71)
    shapes.append(_box(-0.02, floor, 1.02, 1.02, tinted((176, 118, 70), rng, 10)))
    for i in range(1, 3):
        y = floor + i * (1 - floor) / 3
        shapes.append(stroke([(0, y), (1, y)], 0.013, (130, 82, 46)))
    for i in range(7):
        y = floor + (i % 3) * (1 - floor) / 3
        px = (0.1 + i * 0.137) % 1
        shapes.append(stroke([(px, y), (px, y + (1 - floor) / 3)], 0.011, (130, 82, 46)))
    return shapes


def table(rng: random.Random, top: float) -> list[Shape]:
    wood = tinted(rng.choice(((150, 92, 48), (120, 72, 44), (186, 128, 76))), rng, 10)
    left, right = rng.uniform(0.05, 0.11), rng.uniform(0.89, 0.95)
    legs = [_box(x, top + 0.05, x + 0.065, 1.01, wood) for x in (left + 0.05, right - 0.115)]
    return [*legs, _box(left, top, right, top + 0.075, lighter(wood, 0.25))]


def _angles(start: float, end: float, n: int) -> list[float]:
    return [start + (end - start) * i / (n - 1) for i in range(n)]


# --- objects, each in a box from -1 to 1, standing on y = 1 ---------------------------------------------------------

FUR: tuple[Rgb, ...] = ((236, 150, 62), (120, 118, 122), (58, 52, 54), (240, 226, 200), (150, 98, 60))
BRIGHT: tuple[Rgb, ...] = ((222, 58, 50), (58, 118, 210), (246, 196, 48), (70, 168, 88), (150, 84, 190), (242, 132, 40))
DARK: Rgb = (34, 30, 34)
WHITE: Rgb = (252, 252, 250)


def _cat(rng: random.Random) -> list[Shape]:
    fur = tinted(rng.choice(FUR), rng, 12)
    inner, shade = (240, 170, 170), lighter(fur, -0.18)
    fat, tail = rng.uniform(0.9, 1.15), rng.choice((-1, 1))
    curl = [(0.35 * tail, 0.80), (0.80 * tail, 0.78), (0.95 * tail, 0.35), (0.78 * tail, -0.02)]
    shapes = [stroke(curl, 0.17, fur, line=True)]
    shapes.append(ellipse(0, 0.48, 0.50 * fat, 0.52, fur))
    for x in (-0.2, 0.2):
        shapes.append(ellipse(x, 0.90, 0.16, 0.10, fur))
    shapes.append(ellipse(0, 0.56, 0.24, 0.30, lighter(fur, 0.35), line=False))
    for side in (-1, 1):
        shapes.append(poly([(0.12 * side, -0.62), (0.50 * side, -1.02), (0.54 * side, -0.34)], fur))
        shapes.append(poly([(0.24 * side, -0.62), (0.44 * side, -0.84), (0.46 * side, -0.44)], inner, line=False))
    shapes.append(ellipse(0, -0.32, 0.55, 0.44, fur))
    for side in (-1, 1):
        shapes.append(ellipse(0.22 * side, -0.38, 0.10, 0.13, (196, 224, 90) if fur[0] < 130 else WHITE, line=False))
        shapes.append(ellipse(0.22 * side, -0.38, 0.055, 0.12, DARK, line=False))
        for lift in (-0.10, 0.04):
            shapes.append(
                stroke([(0.18 * side, -0.16), (0.78 * side, -0.16 + lift)], 0.035, shade if fur[0] > 130 else WHITE)
            )
    shapes.append(poly([(-0.08, -0.23), (0.08, -0.23), (0, -0.13)], (226, 110, 120), line=False))
    return shapes


def _dog(rng: random.Random) -> list[Shape]:
    fur = tinted(rng.choice(((186, 124, 66), (238, 222, 190), (96, 70, 52), (206, 160, 96), (70, 66, 70))), rng, 12)
    ear = lighter(fur, -0.38)
    leg, long = rng.uniform(0.85, 1.0), rng.uniform(0.95, 1.1)
    shapes = [stroke([(-0.66 * long, 0.05), (-0.92 * long, -0.22), (-0.90 * long, -0.46)], 0.15, fur, line=True)]
    for x in (-0.58, -0.34, 0.18, 0.42):
        shapes.append(_leg(x * long, 0.35, 0.98, 0.20, lighter(fur, -0.12) if x in (-0.34, 0.18) else fur))
    shapes.append(ellipse(-0.08 * long, 0.26, 0.70 * long, 0.34 * leg, fur))
    shapes.append(poly([(0.12, 0.12), (0.30, -0.55), (0.68, -0.42), (0.62, 0.28)], fur))
    shapes.append(ellipse(0.48, -0.52, 0.36, 0.34, fur))
    shapes.append(ellipse(0.80, -0.40, 0.28, 0.18, lighter(fur, 0.2)))
    shapes.append(ellipse(1.00, -0.46, 0.095, 0.085, DARK, line=False))
    shapes.append(ellipse(0.22, -0.42, 0.16, 0.40, ear, turn=0.25))
    shapes.append(ellipse(0.56, -0.62, 0.075, 0.085, DARK, line=False))
    if rng.random() < 0.5:
        shapes.append(ellipse(0.86, -0.22, 0.09, 0.13, (232, 96, 110)))
    if rng.random() < 0.6:
        shapes.append(stroke([(0.20, -0.10), (0.62, -0.06)], 0.11, rng.choice(BRIGHT), line=True))
    return shapes


def _leg(x: float, top: float, bottom: float, width: float, color: Rgb) -> Shape:
    h = width / 2
    return poly([(x - h, top), (x + h, top), (x + h, bottom), (x - h, bottom)], color)


def _bird(rng: random.Random) -> list[Shape]:
    body = tinted(rng.choice(BRIGHT), rng, 14)
    fat = rng.uniform(0.92, 1.1)
    shapes = [stroke([(x, 0.55), (x + 0.02, 0.97)], 0.06, (226, 140, 40)) for x in (-0.08, 0.16)]
    for x in (-0.08, 0.16):
        shapes.append(stroke([(x - 0.12, 0.97), (x + 0.16, 0.97)], 0.06, (226, 140, 40)))
    shapes.append(poly([(-0.40, 0.12), (-1.02, -0.18), (-0.98, 0.18), (-0.52, 0.44)], lighter(body, -0.25)))
    shapes.append(ellipse(0, 0.18, 0.62 * fat, 0.46, body, turn=-0.3))
    shapes.append(ellipse(0.16, 0.34, 0.34, 0.28, lighter(body, 0.5), line=False))
    shapes.append(poly([(0.76, -0.55), (1.12, -0.40), (0.74, -0.26)], (248, 170, 40)))
    shapes.append(ellipse(0.50, -0.42, 0.36, 0.34, body))
    shapes.append(ellipse(0.60, -0.50, 0.10, 0.10, WHITE, line=False))
    shapes.append(ellipse(0.62, -0.50, 0.055, 0.06, DARK, line=False))
    lift = rng.uniform(-0.35, 0.1)
    wing = [(0.16, -0.02), (-0.30, -0.10 + lift * 0.4), (-0.82, 0.10 + lift), (-0.44, 0.40), (-0.05, 0.44)]
    shapes.append(poly(wing, lighter(body, -0.3)))
    return shapes


def _fish(rng: random.Random) -> list[Shape]:
    body = tinted(rng.choice(BRIGHT), rng, 14)
    fin = lighter(body, -0.25)
    tall = rng.uniform(0.85, 1.15)
    y = rng.uniform(-0.05, 0.25)
    shapes = [poly([(-0.50, y), (-1.05, y - 0.52), (-0.88, y), (-1.05, y + 0.52)], fin)]
    shapes.append(poly([(-0.30, y - 0.40 * tall), (0.10, y - 0.78 * tall), (0.36, y - 0.42 * tall)], fin))
    shapes.append(poly([(-0.10, y + 0.40 * tall), (-0.20, y + 0.72 * tall), (0.26, y + 0.44 * tall)], fin))
    shapes.append(ellipse(0.14, y, 0.78, 0.50 * tall, body))
    if rng.random() < 0.6:
        stripe = lighter(body, 0.55)
        for x in (-0.26, 0.06):
            shapes.append(ellipse(x, y, 0.085, 0.42 * tall, stripe, line=False))
    shapes.append(ellipse(0.58, y - 0.12, 0.13, 0.14, WHITE))
    shapes.append(ellipse(0.62, y - 0.12, 0.06, 0.07, DARK, line=False))
    shapes.append(stroke([(0.72, y + 0.20), (0.90, y + 0.14)], 0.05, lighter(body, -0.5)))
    for i in range(rng.randint(1, 3)):
        shapes.append(ellipse(1.0 + 0.04 * (i % 2), y - 0.38 - 0.26 * i, 0.075, 0.075, (220, 240, 252)))
    return shapes


def _spider(rng: random.Random) -> list[Shape]:
    body = tinted(rng.choice(((48, 42, 48), (92, 58, 40), (70, 40, 82), (120, 34, 34))), rng, 8)
    y, reach = rng.uniform(0.05, 0.2), rng.uniform(0.92, 1.08)
    shapes = []
    if rng.random() < 0.5:
        shapes.append(stroke([(0, -2.2), (0, y - 0.3)], 0.035, (236, 236, 240)))
    for i in range(4):
        knee_y, foot_y = y - 0.62 + 0.30 * i, y - 0.20 + 0.36 * i
        for side in (-1, 1):
            path = [(0.2 * side, y - 0.12 + 0.10 * i), (0.72 * side * reach, knee_y), (1.08 * side * reach, foot_y)]
            shapes.append(stroke(path, 0.095, body))
    shapes.append(ellipse(0, y + 0.18, 0.44, 0.48, body))
    shapes.append(ellipse(0, y - 0.34, 0.29, 0.25, lighter(body, 0.12)))
    for side in (-1, 1):
        shapes.append(ellipse(0.11 * side, y - 0.38, 0.085, 0.09, WHITE, line=False))
        shapes.append(ellipse(0.11 * side, y - 0.36, 0.04, 0.045, DARK, line=False))
    if rng.random() < 0.5:
        mark = rng.choice(BRIGHT)
        shapes.append(poly([(0, y - 0.02), (0.13, y + 0.20), (0, y + 0.42), (-0.13, y + 0.20)], mark, line=False))
    return shapes


def _tree(rng: random.Random) -> list[Shape]:
    trunk = tinted((122, 80, 48), rng, 12)
    leaf = tinted(rng.choice(((58, 140, 62), (92, 160, 60), (36, 108, 74), (214, 134, 48))), rng, 12)
    shapes = [poly([(-0.15, 0.0), (0.15, 0.0), (0.20, 1.0), (-0.20, 1.0)], trunk)]
    if rng.random() < 0.35:
        for width, low, high in ((0.80, 0.52, -0.15), (0.64, 0.10, -0.58), (0.46, -0.32, -1.0)):
            shapes.append(poly([(-width, low), (0, high), (width, low)], leaf))
        return shapes
    lobes = ((-0.44, -0.02, 0.40), (0.44, -0.02, 0.40), (-0.30, -0.50, 0.40), (0.32, -0.50, 0.40), (0, -0.62, 0.40))
    for x, y, r in lobes:
        shapes.append(ellipse(x, y, r, r * 0.95, leaf))
    shapes.append(ellipse(0, -0.22, 0.52, 0.50, leaf, line=False))
    if rng.random() < 0.4:
        for x, y in ((-0.4, -0.1), (0.25, -0.55), (0.42, 0.02), (-0.15, -0.45)):
            shapes.append(ellipse(x, y, 0.085, 0.085, (222, 58, 50), line=False))
    return shapes


def _house(rng: random.Random) -> list[Shape]:
    wall = tinted(rng.choice(((246, 222, 170), (232, 176, 150), (190, 214, 226), (246, 240, 228))), rng, 8)
    roof = tinted(rng.choice(((186, 62, 48), (92, 76, 92), (130, 78, 46), (60, 110, 140))), rng, 10)
    w, eave = rng.uniform(0.68, 0.82), rng.uniform(-0.22, -0.08)
    shapes = []
    if rng.random() < 0.7:
        shapes.append(poly([(0.36, -0.92), (0.58, -0.92), (0.58, -0.2), (0.36, -0.2)], lighter(roof, -0.25)))
    shapes.append(poly([(-w, eave), (w, eave), (w, 1.0), (-w, 1.0)], wall))
    shapes.append(poly([(-w - 0.18, eave + 0.03), (0, -1.0), (w + 0.18, eave + 0.03)], roof))
    door = rng.uniform(-0.12, 0.12)
    shapes.append(
        poly([(door - 0.16, 0.40), (door + 0.16, 0.40), (door + 0.16, 1.0), (door - 0.16, 1.0)], lighter(roof, -0.2))
    )
    for x in (-0.46, 0.46):
        shapes.append(poly([(x - 0.15, 0.12), (x + 0.15, 0.12), (x + 0.15, 0.46), (x - 0.15, 0.46)], (255, 232, 130)))
        shapes.append(stroke([(x, 0.12), (x, 0.46)], 0.045, lighter(roof, -0.2)))
        shapes.append(stroke([(x - 0.15, 0.29), (x + 0.15, 0.29)], 0.045, lighter(roof, -0.2)))
    return shapes


def _car(rng: random.Random) -> list[Shape]:
    paint = tinted(rng.choice(BRIGHT), rng, 12)
    roof, long = rng.uniform(-0.42, -0.25), rng.uniform(0.98, 1.1)
    glass = (196, 228, 244)
    cabin = [(-0.66 * long, 0.22), (-0.42 * long, roof), (0.36 * long, roof), (0.66 * long, 0.22)]
    shapes = [poly(cabin, paint)]
    shapes.append(poly([(-0.50 * long, 0.18), (-0.34 * long, roof + 0.12), (-0.06, roof + 0.12), (-0.06, 0.18)], glass))
    shapes.append(poly([(0.06, 0.18), (0.06, roof + 0.12), (0.28 * long, roof + 0.12), (0.48 * long, 0.18)], glass))
    body = [
        (-1.04 * long, 0.30),
        (-0.9 * long, 0.16),
        (0.86 * long, 0.16),
        (1.04 * long, 0.40),
        (1.04 * long, 0.74),
        (-1.04 * long, 0.74),
    ]
    shapes.append(poly(body, paint))
    shapes.append(ellipse(0.94 * long, 0.42, 0.085, 0.085, (255, 236, 140), line=False))
    for x in (-0.56, 0.56):
        shapes.append(ellipse(x * long, 0.74, 0.27, 0.27, DARK))
        shapes.append(ellipse(x * long, 0.74, 0.12, 0.12, (200, 202, 206)))
    return shapes


def _boat(rng: random.Random) -> list[Shape]:
    hull = tinted(rng.choice(((158, 92, 50), (210, 58, 52), (50, 96, 170), (66, 140, 96))), rng, 12)
    sail = tinted(rng.choice(((252, 250, 242), (252, 232, 180), (248, 190, 170))), rng, 6)
    mast, deep = rng.uniform(-0.06, 0.06), rng.uniform(0.9, 1.0)
    shapes = [stroke([(mast, 0.48), (mast, -1.0)], 0.07, (96, 64, 40))]
    shapes.append(poly([(mast + 0.07, -0.92), (mast + 0.80, 0.36), (mast + 0.07, 0.36)], sail))
    shapes.append(poly([(mast - 0.07, -0.66), (mast - 0.62, 0.36), (mast - 0.07, 0.36)], sail))
    if rng.random() < 0.6:
        shapes.append(poly([(mast, -1.0), (mast + 0.3, -0.9), (mast, -0.80)], rng.choice(BRIGHT)))
    shapes.append(poly([(-1.02, 0.46), (1.02, 0.46), (0.66, deep), (-0.66, deep)], hull))
    shapes.append(stroke([(-0.88, 0.62), (0.88, 0.62)], 0.07, lighter(hull, 0.55)))
    return shapes


def _flower(rng: random.Random) -> list[Shape]:
    petal = tinted(
        rng.choice(((240, 110, 150), (250, 206, 60), (170, 96, 200), (228, 64, 60), (250, 250, 246))), rng, 10
    )
    stem = tinted((70, 150, 66), rng, 10)
    count, y = rng.choice((5, 6, 8)), rng.uniform(-0.46, -0.38)
    shapes = [stroke([(0, y), (rng.uniform(-0.08, 0.08), 0.3), (0, 1.0)], 0.10, stem)]
    shapes.append(ellipse(-0.30, 0.52, 0.30, 0.13, stem, turn=0.5))
    shapes.append(ellipse(0.30, 0.36, 0.30, 0.13, stem, turn=-0.5))
    turn, length = rng.uniform(0, 1), rng.uniform(0.30, 0.36)
    for i in range(count):
        a = turn + i * 2 * math.pi / count
        width = 0.62 * math.pi * length / count + 0.03
        shapes.append(ellipse(0.36 * math.cos(a), y + 0.36 * math.sin(a), length * 0.78, width, petal, turn=a))
    center = (120, 76, 40) if petal[0] > 235 and petal[2] < 100 else (252, 200, 60)
    shapes.append(ellipse(0, y, 0.19, 0.19, center))
    return shapes


def _apple(rng: random.Random) -> list[Shape]:
    skin = tinted(rng.choice(((214, 44, 44), (126, 186, 60), (236, 190, 60), (196, 60, 70))), rng, 12)
    w = rng.uniform(0.78, 0.92)
    outline = []
    for i in range(40):
        a = 2 * math.pi * i / 40
        dip = 0.20 * math.exp(-((math.sin(a / 2 + math.pi / 4) ** 2 - 1) ** 2) * 60)
        bottom = 0.08 * math.exp(-((math.sin(a / 2 - math.pi / 4) ** 2 - 1) ** 2) * 60)
        r = 1 + 0.08 * abs(math.cos(a))
        y = 0.25 + 0.72 * r * math.sin(a)
        outline.append((w * r * math.cos(a), y + (-bottom if math.sin(a) > 0 else 0) + (dip if math.sin(a) < 0 else 0)))
    outline = [(x, y + (0.17 * math.exp(-((x / 0.2) ** 2)) if y < 0 else 0)) for x, y in outline]
    shapes = [stroke([(0, -0.30), (0.03, -0.62), (0.12, -0.92)], 0.095, (110, 72, 44))]
    shapes.append(poly(outline, skin))
    shapes.append(ellipse(0.38, -0.72, 0.28, 0.13, (88, 170, 72), turn=-0.4))
    shapes.append(ellipse(-0.42, 0.02, 0.12, 0.20, lighter(skin, 0.6), line=False, turn=0.4))
    return shapes


def _bottle(rng: random.Random) -> list[Shape]:
    glass = tinted(rng.choice(((64, 140, 84), (60, 120, 190), (160, 88, 48), (150, 196, 200))), rng, 12)
    w, neck = rng.uniform(0.38, 0.48), rng.uniform(-0.30, -0.15)
    body = [(-0.15, -0.80), (0.15, -0.80), (0.15, neck - 0.12), (w, neck + 0.18), (w, 0.92), (w - 0.08, 1.0)]
    body += [(-w + 0.08, 1.0), (-w, 0.92), (-w, neck + 0.18), (-0.15, neck - 0.12)]
    shapes = [poly(body, glass)]
    shapes.append(poly([(-0.19, -1.0), (0.19, -1.0), (0.19, -0.78), (-0.19, -0.78)], rng.choice(BRIGHT)))
    shapes.append(poly([(-w, 0.20), (w, 0.20), (w, 0.66), (-w, 0.66)], (250, 244, 226)))
    shapes.append(stroke([(-w * 0.5, 0.43), (w * 0.5, 0.43)], 0.09, lighter(glass, -0.3)))
    shapes.append(stroke([(-w * 0.6, 0.02), (-w * 0.6, 0.16)], 0.07, lighter(glass, 0.6)))
    return shapes


def _umbrella(rng: random.Random) -> list[Shape]:
    cloth = tinted(rng.choice(BRIGHT), rng, 12)
    other = lighter(cloth, 0.55) if rng.random() < 0.6 else lighter(cloth, -0.15)
    hook = [(0, -0.1), (0, 0.78), (0.08, 0.94), (0.24, 0.94), (0.32, 0.78)]
    shapes = [stroke(hook, 0.09, (96, 64, 40)), stroke([(0, -0.80), (0, -1.0)], 0.08, (96, 64, 40))]
    edges = [-1.0, -0.36, 0.36, 1.0]
    dome = [(1.02 * math.cos(a), 0.02 + 0.84 * math.sin(a)) for a in _angles(math.pi, 2 * math.pi, 25)]
    rim: list[tuple[float, float]] = []
    for left, right in zip(edges[::-1], edges[::-1][1:], strict=False):
        mid, half = (left + right) / 2, (left - right) / 2
        rim += [(mid + half * math.cos(a), 0.02 - 0.14 * math.sin(a)) for a in _angles(0, math.pi, 8)]
    shapes.append(poly(dome + rim, cloth))
    panel = [(0.36 * math.sin(t * math.pi / 2), 0.02 - 0.84 * math.cos(t * math.pi / 2)) for t in (0, 0.3, 0.6, 1)]
    shapes.append(
        poly([*panel, *[(0.36 * c, -0.10) for c in (0.5, 0, -0.5)], *[(-x, y) for x, y in panel[::-1]]], other)
    )
    return shapes


DRAWN = {
    "cat": _cat,
    "dog": _dog,
    "bird": _bird,
    "fish": _fish,
    "spider": _spider,
    "tree": _tree,
    "house": _house,
    "car": _car,
    "boat": _boat,
    "flower": _flower,
    "apple": _apple,
    "bottle": _bottle,
    "umbrella": _umbrella,
}
