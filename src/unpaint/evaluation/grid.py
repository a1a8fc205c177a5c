"""Before and after, side by side: one PNG with a row a label, and pairs of the same prompt and seed."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unpaint.concepts import Concept
from unpaint.evaluation.pictures import Batch
from unpaint.files import replacing

CELL, GAP, PAIR_GAP, MARGIN, LABEL, CAPTION, HEAD = 112, 4, 22, 20, 150, 40, 66
PAPER, INK, FAINT = (255, 255, 255), (30, 30, 34), (110, 110, 118)
ACCENT = {"target": (190, 40, 40), "neighbour": (176, 112, 0), "kept": (34, 120, 70)}
WORDS = {"target": "to be erased", "neighbour": "a near relative, to stay", "kept": "to stay"}

Shown = tuple[Batch, Tensor, Tensor]


def grid(shown: Sequence[Shown], concept: Concept, path: Path, pairs: int = 4, others: int = 5) -> Path:
    """Write the PNG and return its path.

    shown: for each label a batch with its pictures by the unedited and the edited model, uint8 (n, 3, H, W) each.
    Rows: the target twice, the neighbours, up to `others` further labels. A row holds `pairs` pairs, each captioned
    with its prompt; left in a pair is the unedited model, right the edited one, from the same seed.
    """
    rows = _rows(shown, concept, pairs, others)
    pair_width = 2 * CELL + GAP
    row_height = CELL + CAPTION
    columns = max(len(picks) for *_, picks in rows)
    width = 2 * MARGIN + LABEL + columns * pair_width + (columns - 1) * PAIR_GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + HEAD + len(rows) * row_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    title, head, small = (ImageFont.load_default(size) for size in (22, 14, 12))
    draw.text((MARGIN, MARGIN), f"Erasing “{concept.target}”", INK, title)
    lefts = [MARGIN + LABEL + i * (pair_width + PAIR_GAP) for i in range(columns)]
    for left in lefts:
        for offset, word in ((0, "unedited"), (CELL + GAP, "edited")):
            draw.text((left + offset + CELL / 2, MARGIN + HEAD - 8), word, FAINT, head, anchor="ms")
    for i, (kind, label, (batch, before, after), picks) in enumerate(rows):
        top = MARGIN + HEAD + i * row_height
        name = concept.target if kind == "target" else concept.retained.get(label, label)
        fitting = ImageFont.load_default(min(22, max(10, 22 * 12 // max(1, len(name)))))
        draw.text((MARGIN, top + CELL / 2 - 10), name, ACCENT[kind], fitting, anchor="lm")
        draw.multiline_text((MARGIN, top + CELL / 2 + 8), textwrap.fill(WORDS[kind], 20), FAINT, small)
        for left, pick in zip(lefts, picks, strict=False):
            sheet.paste(_picture(before[pick]), (left, top))
            sheet.paste(_picture(after[pick]), (left + CELL + GAP, top))
            caption = textwrap.fill(batch.cases[pick].prompt, 38, max_lines=2, placeholder=" …")
            draw.multiline_text((left, top + CELL + 4), caption, INK, small, spacing=2)
    return _write(sheet, path)


def _rows(shown: Sequence[Shown], concept: Concept, pairs: int, others: int) -> list[tuple[str, str, Shown, list[int]]]:
    """(kind, label, pictures, which of them) in the order of the sheet."""
    by_label = {entry[0].cases[0].group: entry for entry in shown}

    def picks(entry: Shown, start: int) -> list[int]:
        return list(range(start, min(start + pairs, len(entry[0].cases))))

    rows = []
    for label in (concept.label, *concept.neighbours):
        if label in by_label:
            kind = "target" if label == concept.label else "neighbour"
            for start in (0, pairs) if kind == "target" else (0,):
                rows.append((kind, label, by_label[label], picks(by_label[label], start)))
    rest = [label for label in by_label if label != concept.label and label not in concept.neighbours]
    for i, label in enumerate(rest[:others]):
        # Every other row from further on, where the prompts name other styles (or objects).
        start = pairs if i % 2 and len(by_label[label][0].cases) >= 2 * pairs else 0
        rows.append(("kept", label, by_label[label], picks(by_label[label], start)))
    return [row for row in rows if row[3]]


def _picture(picture: Tensor) -> Image.Image:
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    return image.resize((CELL, CELL), Image.Resampling.LANCZOS)


def _write(sheet: Image.Image, path: Path) -> Path:
    with replacing(path) as beside:
        sheet.save(beside, "png")
    return path
