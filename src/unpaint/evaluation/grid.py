"""Before and after, side by side: one PNG with a row a label, and pairs of the same prompt and seed."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unpaint.cases import CELLS, COMPOSITION, IMPLICIT, IN_SET, OUT_OF_SET, RETAIN, STATIC
from unpaint.concepts import AnyConcept
from unpaint.evaluation.pictures import Batch
from unpaint.files import replacing

CELL, GAP, PAIR_GAP, MARGIN, LABEL, CAPTION, HEAD = 112, 4, 22, 20, 150, 40, 66
PAPER, INK, FAINT = (255, 255, 255), (30, 30, 34), (110, 110, 118)
RED, AMBER, GREEN = (190, 40, 40), (176, 112, 0), (34, 120, 70)
GONE, NEAR, KEPT = (RED, "to be erased"), (AMBER, "a near relative, to stay"), (GREEN, "to stay")
# What a row of a part is called, if not by the words of its label.
NAMES = {
    OUT_OF_SET: "other words",
    IMPLICIT: "implied",
    STATIC: "from the file",
    COMPOSITION: "several things",
    "first_only": "only the first",
    "second_only": "only the second",
    "neither": "neither",
}

Shown = tuple[Batch, Tensor, Tensor]


def grid(shown: Sequence[Shown], concept: AnyConcept, path: Path, pairs: int = 4, others: int = 5) -> Path:
    """Write the PNG and return its path.

    shown: for each group a batch with its pictures by the unedited and the edited model, uint8 (n, 3, H, W) each.
    Rows: the target twice (each member of a set once), its other words, the cells of its table, the neighbours, up to
    `others` further labels, a composition. A row holds `pairs` pairs, each captioned
    with its prompt; left in a pair is the unedited model, right the edited one, from the same seed.
    """
    rows = _rows(shown, concept, pairs, others)
    pair_width = 2 * CELL + GAP
    row_height = CELL + CAPTION
    columns = max((len(picks) for *_, picks in rows), default=1)
    width = 2 * MARGIN + LABEL + columns * pair_width + (columns - 1) * PAIR_GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + HEAD + len(rows) * row_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    title, head, small = (ImageFont.load_default(size) for size in (22, 14, 12))
    draw.text((MARGIN, MARGIN), f"Erasing “{concept.target}”", INK, title)
    lefts = [MARGIN + LABEL + i * (pair_width + PAIR_GAP) for i in range(columns)]
    for left in lefts:
        for offset, word in ((0, "unedited"), (CELL + GAP, "edited")):
            draw.text((left + offset + CELL / 2, MARGIN + HEAD - 8), word, FAINT, head, anchor="ms")
    for i, (name, (accent, words), (batch, before, after), picks) in enumerate(rows):
        top = MARGIN + HEAD + i * row_height
        lines = textwrap.wrap(name, 18) or [""]
        fitting = ImageFont.load_default(min(22, max(11, 22 * 12 // max(map(len, lines)))))
        draw.multiline_text((MARGIN, top + CELL / 2 - 2), "\n".join(lines), accent, fitting, anchor="ld")
        draw.multiline_text((MARGIN, top + CELL / 2 + 8), textwrap.fill(words, 20), FAINT, small)
        for left, pick in zip(lefts, picks, strict=False):
            sheet.paste(_picture(before[pick]), (left, top))
            sheet.paste(_picture(after[pick]), (left + CELL + GAP, top))
            caption = textwrap.fill(batch.cases[pick].prompt, 38, max_lines=2, placeholder=" …")
            draw.multiline_text((left, top + CELL + 4), caption, INK, small, spacing=2)
    return _write(sheet, path)


Row = tuple[str, tuple[tuple[int, int, int], str], Shown, list[int]]


def _rows(shown: Sequence[Shown], concept: AnyConcept, pairs: int, others: int) -> list[Row]:
    """(name, accent and what should happen, pictures, which of them) in the order of the sheet."""
    by_part: dict[str, list[Shown]] = {}
    for entry in shown:
        by_part.setdefault(entry[0].cases[0].part, []).append(entry)

    def row(name: str, fate: tuple[tuple[int, int, int], str], entry: Shown, start: int = 0) -> Row:
        return name, fate, entry, list(range(start, min(start + pairs, len(entry[0].cases))))

    words = {member.group: member.target for member in concept.members} | concept.retained
    targets = by_part.get(IN_SET, [])
    rows = [
        row(words[_group(entry)], GONE, entry, start)
        for entry in targets
        for start in ((0, pairs) if len(targets) == 1 else (0,))
    ]
    for part, fate in ((OUT_OF_SET, GONE), (IMPLICIT, GONE), (STATIC, GONE), *((cell, KEPT) for cell in CELLS)):
        rows += [row(NAMES[part], fate, entry) for entry in by_part.get(part, [])[:1]]
    kept = by_part.get(RETAIN, [])
    near = [entry for entry in kept if _group(entry) in concept.neighbours]
    rows += [row(words[_group(entry)], NEAR, entry) for entry in near]
    for i, entry in enumerate([entry for entry in kept if _group(entry) not in concept.neighbours][:others]):
        # Every other row from further on, where the prompts name other styles (or objects).
        start = pairs if i % 2 and len(entry[0].cases) >= 2 * pairs else 0
        rows.append(row(words[_group(entry)], KEPT, entry, start))
    rows += [row(NAMES[COMPOSITION], KEPT, entry) for entry in by_part.get(COMPOSITION, [])]
    return [entry for entry in rows if entry[3]]


def _group(entry: Shown) -> str:
    return entry[0].cases[0].group


def _picture(picture: Tensor) -> Image.Image:
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    return image.resize((CELL, CELL), Image.Resampling.LANCZOS)


def _write(sheet: Image.Image, path: Path) -> Path:
    with replacing(path) as beside:
        sheet.save(beside, "png")
    return path
