"""The damage matrix as a picture: what each erasing leaves of each label, one row a concept."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from unpaint.evaluation.grid import FAINT, GAP, INK, MARGIN, PAPER
from unpaint.files import replacing

CELL, ROW_LABEL, HEAD = (76, 48), 150, 96
LOST, KEPT = (178, 24, 43), (247, 247, 247)
LEGEND = "share of pictures that show what they were asked for: edited (unedited); red: lost beside the unedited model"


def heat_map(
    matrix: Mapping[str, Mapping[str, Mapping[str, Any]]], erased: Mapping[str, Collection[str]], path: Path
) -> Path:
    """Write the PNG and return its path.

    matrix: erased concept -> label -> value, base and n, as `retention/damage` has them in `by_label`. A cell is white
    where the edited model shows the label as often as the unedited one and red where it never does; a label that a row
    does not know stays empty. erased: concept -> the labels that it is to erase, which are framed.
    """
    labels = list(dict.fromkeys(label for row in matrix.values() for label in row))
    width = 2 * MARGIN + ROW_LABEL + len(labels) * (CELL[0] + GAP)
    sheet = Image.new("RGB", (width, 2 * MARGIN + HEAD + len(matrix) * (CELL[1] + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    title, head, small = (ImageFont.load_default(size) for size in (20, 14, 12))
    draw.text((MARGIN, MARGIN), "Damage: erased (rows) against asked for (columns)", INK, title)
    draw.text((MARGIN, MARGIN + 30), LEGEND, FAINT, small)
    for i, label in enumerate(labels):
        middle = MARGIN + ROW_LABEL + i * (CELL[0] + GAP) + CELL[0] / 2
        draw.text((middle, MARGIN + HEAD - 8), _words(label), INK, _fitting(_words(label)), anchor="ms")
    for j, (concept, row) in enumerate(matrix.items()):
        top = MARGIN + HEAD + j * (CELL[1] + GAP)
        draw.text((MARGIN, top + CELL[1] / 2), _words(concept), INK, head, anchor="lm")
        for i, label in enumerate(labels):
            if label not in row:
                continue
            left = MARGIN + ROW_LABEL + i * (CELL[0] + GAP)
            value, base = (float(row[label][key]) for key in ("value", "base"))
            lost = min(1.0, max(0.0, 1 - value / base)) if base else 0.0
            box = (left, top, left + CELL[0], top + CELL[1])
            aim = label in erased[concept]
            draw.rectangle(box, _mixed(lost), INK if aim else FAINT, 3 if aim else 1)
            ink = PAPER if lost > 0.5 else INK
            draw.text((left + CELL[0] / 2, top + CELL[1] / 2 - 2), f"{value:.0%}", ink, head, anchor="ms")
            draw.text((left + CELL[0] / 2, top + CELL[1] / 2 + 14), f"({base:.0%})", ink, small, anchor="ms")
    with replacing(path) as beside:
        sheet.save(beside, "png")
    return path


def _mixed(lost: float) -> tuple[int, int, int]:
    red, green, blue = (round(kept + lost * (gone - kept)) for kept, gone in zip(KEPT, LOST, strict=True))
    return red, green, blue


def _words(label: str) -> str:
    return " + ".join(part.rpartition("/")[2] for part in label.split("+")).replace("_", " ")


def _fitting(words: str) -> Any:
    return ImageFont.load_default(min(14, max(9, 14 * 10 // max(len(words), 1))))
