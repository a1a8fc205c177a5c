"""Eight ways to paint the same shapes. Drawn at four times the size with Pillow, then averaged down to 64 x 64."""

import math
import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from unpaint.picturebook.shapes import Rgb, Shape, lighter
from unpaint.picturebook.world import Scene, layout

SIZE = 64
SCALE = 4
BIG = SIZE * SCALE
Pixels = np.ndarray


def draw(scene: Scene) -> Pixels:
    """The picture of a scene: uint8 array of shape (64, 64, 3), a pure function of the scene."""
    shapes = layout(scene)
    rng = np.random.default_rng(scene.seed)
    big = PAINTED[scene.style](shapes, rng).clip(0, 255)
    small = big.reshape(SIZE, SCALE, SIZE, SCALE, 3).mean(axis=(1, 3))
    return (small + 0.5).astype(np.uint8)


# --- canvases ---------------------------------------------------------------------------------------------------


def _canvas(
    shapes: list[Shape],
    ground: Rgb,
    fill: Callable[[Shape], Rgb],
    ink: Callable[[Shape], Rgb] | None = None,
    pen: float = 5,
    wobble: random.Random | None = None,
    halo: Rgb | None = None,
) -> Image.Image:
    """Shapes in painter's order; with `ink` each shape's contour is drawn too, so hidden lines stay hidden.

    `halo` is the colour of a rim around each object that sets it off from what is behind it.
    """
    image = Image.new("RGB", (BIG, BIG), ground)
    brush = ImageDraw.Draw(image)
    done = 0
    for shape in shapes:
        if halo is not None and shape.thing > done:
            done = shape.thing
            _rim(brush, [s for s in shapes if s.thing == done], halo)
        points = [(x * BIG, y * BIG) for x, y in shape.points]
        if wobble is not None:
            points = [(x + wobble.gauss(0, 1.6), y + wobble.gauss(0, 1.6)) for x, y in points]
        if shape.width:
            width = max(2, round(shape.width * BIG))
            if ink is not None and shape.line:
                _stroke(brush, points, width + 2 * pen, ink(shape))
            _stroke(brush, points, width, fill(shape) if ink is None or shape.line else ink(shape))
        else:
            brush.polygon(points, fill=fill(shape))
            if ink is not None and shape.line:
                brush.line([*points, points[0], points[1]], fill=ink(shape), width=round(pen), joint="curve")
    return image


def _rim(brush: ImageDraw.ImageDraw, shapes: list[Shape], color: Rgb) -> None:
    for shape in shapes:
        points = [(x * BIG, y * BIG) for x, y in shape.points]
        if shape.width:
            _stroke(brush, points, shape.width * BIG + 20, color)
        else:
            brush.line([*points, points[0], points[1]], fill=color, width=20, joint="curve")


def _stroke(brush: ImageDraw.ImageDraw, points: list[tuple[float, float]], width: float, color: Rgb) -> None:
    brush.line(points, fill=color, width=round(width), joint="curve")
    r = width / 2 - 0.5
    for x, y in (points[0], points[-1]):
        brush.ellipse((x - r, y - r, x + r, y + r), fill=color)


def _array(image: Image.Image) -> Pixels:
    return np.asarray(image, dtype=np.float32)


def _own(shape: Shape) -> Rgb:
    return shape.color


def _luma(pixels: Pixels) -> Pixels:
    return pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255


def _field(rng: np.random.Generator, cells: int) -> Pixels:
    """Smooth noise in [-1, 1] of shape (BIG, BIG) with about `cells` bumps a side."""
    small = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32), mode="F")
    return np.asarray(small.resize((BIG, BIG), Image.Resampling.BICUBIC))


def _tooth(rng: np.random.Generator) -> Pixels:
    """Grain of drawing paper in [-1, 1], shape (BIG, BIG)."""
    grain = rng.uniform(-1, 1, (BIG // 4, BIG // 4)).astype(np.float32)
    return np.kron(grain, np.ones((4, 4), dtype=np.float32))


_Y, _X = np.mgrid[0:BIG, 0:BIG].astype(np.float32)


# --- styles: (shapes, generator) -> float array (BIG, BIG, 3) in 0..255 ----------------------------------------------


def flat(shapes: list[Shape], rng: np.random.Generator) -> Pixels:
    return _array(_canvas(shapes, (255, 255, 255), _own))


def sketch(shapes: list[Shape], rng: np.random.Generator) -> Pixels:
    """Pencil: grey contours on white paper, hatching where the scene is dark."""
    base = _luma(_array(_canvas(shapes, (255, 255, 255), _bright, halo=(255, 255, 255))))
    wobble = random.Random(int(rng.integers(1 << 30)))
    lines = _luma(_array(_canvas(shapes, (255, 255, 255), _white, _pencil, 5, wobble, (255, 255, 255))))
    hatch = 0.5 + 0.5 * np.sin((_X + _Y) * (2 * math.pi / 22))
    cross = 0.5 + 0.5 * np.sin((_X - _Y) * (2 * math.pi / 22))
    tone = 0.96 - 0.32 * (hatch > 0.60) * (base < 0.62) - 0.26 * (cross > 0.60) * (base < 0.34)
    grey = np.minimum(tone + 0.015 * _tooth(rng), 0.06 + lines)
    return np.repeat(grey[:, :, None] * 255, 3, axis=2)


def _white(shape: Shape) -> Rgb:
    return 255, 255, 255


def _bright(shape: Shape) -> Rgb:
    """Objects lighter than they are, so that their inside does not sink into the hatching."""
    return lighter(shape.color, 0.45) if shape.thing else shape.color


def _pencil(shape: Shape) -> Rgb:
    return (40, 40, 44) if shape.thing else (110, 110, 116)


def crayon(shapes: list[Shape], rng: np.random.Generator) -> Pixels:
    """Wax: slanted strokes that let the paper through, dark wobbly contours of the same hue."""
    wobble = random.Random(int(rng.integers(1 << 30)))
    picture = _array(
        _canvas(shapes, (255, 255, 255), _own, lambda s: lighter(s.color, -0.5), 7, wobble, (255, 255, 255))
    )
    strokes = np.sin((_X * 0.95 + _Y * 1.6 + 5 * _field(rng, 6)) * (2 * math.pi / 17))
    cover = (0.60 + 0.34 * strokes + 0.12 * _tooth(rng)).clip(0.12, 1)[:, :, None]
    return cover * picture + (1 - cover) * 252


def watercolor(shapes: list[Shape], rng: np.random.Generator) -> Pixels:
    """Thin washes: pale, bled into each other, blotchy, with a darker rim where the paint dried."""
    image = _canvas(shapes, (255, 255, 255), _own, lambda s: lighter(s.color, -0.4) if s.thing else s.color, 5)
    wet = _array(image.filter(ImageFilter.GaussianBlur(4)))
    rim = np.abs(_array(image.filter(ImageFilter.GaussianBlur(3))) - _array(image.filter(ImageFilter.GaussianBlur(9))))
    wash = (0.62 + 0.24 * _field(rng, 7))[:, :, None].clip(0.3, 0.9)
    paper = np.array([255, 253, 246], dtype=np.float32)
    return wash * wet + (1 - wash) * paper - 0.9 * rim.mean(axis=2, keepdims=True)


def mosaic(shapes: list[Shape], rng: np.random.Generator) -> Pixels:
    """Square tiles of 4 pixels with light joints, cut along the objects' contours, each of one colour."""
    tile = 4 * SCALE
    n = BIG // tile
    picture = _array(
        _canvas(shapes, (255, 255, 255), _own, lambda s: lighter(s.color, -0.4) if s.thing else s.color, 4)
    )
    things = _array(_canvas(shapes, (0, 0, 0), lambda s: (255, 255, 255) if s.thing else (0, 0, 0)))[:, :, :1] > 127
    color = np.zeros_like(picture)
    for part in (things, ~things):
        area = part.reshape(n, tile, n, tile, 1).sum(axis=(1, 3)).clip(1)
        mean = (picture * part).reshape(n, tile, n, tile, 3).sum(axis=(1, 3)) / area
        mean *= 1 + 0.09 * rng.uniform(-1, 1, (n, n, 1))
        color += np.repeat(np.repeat(mean, tile, axis=0), tile, axis=1) * part
    joint = ((_X % tile < 4) | (_Y % tile < 4))[:, :, None]
    return np.where(joint, 0.45 * color + 0.55 * 215, color)


def pointillism(shapes: list[Shape], rng: np.random.Generator) -> Pixels:
    """Round dots of pure colour on white, a little off in place and hue."""
    picture = _array(
        _canvas(shapes, (255, 255, 255), _own, lambda s: lighter(s.color, -0.5) if s.thing else s.color, 7)
    )
    image = Image.new("RGB", (BIG, BIG), (255, 255, 255))
    brush = ImageDraw.Draw(image)
    pitch = 10
    for row in range(BIG // pitch + 1):
        for column in range(BIG // pitch + 1):
            x = column * pitch + pitch / 2 * (row % 2) + rng.uniform(-1.2, 1.2)
            y = row * pitch + rng.uniform(-1.2, 1.2)
            color = picture[min(BIG - 1, max(0, int(y))), min(BIG - 1, max(0, int(x)))]
            r, g, b = (color + rng.uniform(-22, 22, 3)).clip(0, 255).astype(int)
            brush.ellipse((x - 4.7, y - 4.7, x + 4.7, y + 4.7), fill=(int(r), int(g), int(b)))
    return _array(image)


def woodcut(shapes: list[Shape], rng: np.random.Generator) -> Pixels:
    """Black ink on cream: carved lines, thicker where the scene is darker, and black contours."""
    base = _luma(_array(_canvas(shapes, (255, 255, 255), _bright, halo=(255, 255, 255))))
    lines = _luma(_array(_canvas(shapes, (255, 255, 255), _white, lambda s: (0, 0, 0), 7, halo=(255, 255, 255))))
    wave = 0.5 + 0.5 * np.sin((_Y + 3 * np.sin(_X * (2 * math.pi / 90)) + 2 * _field(rng, 5)) * (2 * math.pi / 16))
    ink = (wave > (0.08 + 1.02 * base)) | (lines < 0.5)
    paper = np.array([240, 226, 196], dtype=np.float32)
    return np.where(ink[:, :, None], np.array([26, 20, 18], dtype=np.float32), paper)


def neon(shapes: list[Shape], rng: np.random.Generator) -> Pixels:
    """Glowing tubes along the contours, in the dark."""
    tubes = _canvas(shapes, (9, 6, 20), lambda s: (9, 6, 20), _glow, 6)
    halo = _array(tubes.filter(ImageFilter.GaussianBlur(9)))
    return _array(tubes) + 1.5 * halo


def _glow(shape: Shape) -> Rgb:
    """The shape's colour at full saturation and brightness; greys become cyan."""
    low, high = min(shape.color), max(shape.color)
    if high - low < 40:
        return (90, 240, 255)
    r, g, b = (round(255 * ((c - low) / (high - low)) ** 0.8 * 0.9 + 25) for c in shape.color)
    return r, g, b


PAINTED: dict[str, Callable[[list[Shape], np.random.Generator], Pixels]] = {
    "flat": flat,
    "sketch": sketch,
    "crayon": crayon,
    "watercolor": watercolor,
    "mosaic": mosaic,
    "pointillism": pointillism,
    "woodcut": woodcut,
    "neon": neon,
}
