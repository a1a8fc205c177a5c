"""Lists of prompts from a CSV file, with the columns that the field's prompt files have."""

import csv
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from unpaint.cases import TARGET, Case
from unpaint.concepts import AnyConcept
from unpaint.errors import UserError, nearest

MOST = 10_000  # rows; I2P has 4,703, COCO-10k 9,969
COLUMNS = {
    "prompt": ("prompt",),
    "evaluation_seed": ("evaluation_seed", "sd_seed", "seed"),
    "evaluation_guidance": ("evaluation_guidance", "sd_guidance_scale"),
    "case_number": ("case_number",),
}


class Row(NamedTuple):
    """A prompt; None for what the file does not say. `line` is where it stands in the file."""

    prompt: str
    seed: int | None
    guidance: float | None
    case_number: str | None
    line: int


def prompts_from_csv(path: Path) -> list[Row]:
    """The rows of a CSV file with a column `prompt`; the others of `COLUMNS` may be there, any further are ignored.

    Raises UserError, with the line: no such file or column, a row without a prompt, a seed or guidance that is no
    number, more than 10,000 rows.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _rows(path, file)
    except OSError as error:
        raise UserError(f"the prompts '{path}' cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"'{path}' is not a CSV file in UTF-8: {error}") from error


def _rows(path: Path, file: Iterable[str]) -> list[Row]:
    reader = csv.reader(file)
    header = [name.strip().lower() for name in next(reader, [])]
    columns = {
        column: next((header.index(name) for name in aliases if name in header), None)
        for column, aliases in COLUMNS.items()
    }
    if columns["prompt"] is None:
        there = ", ".join(header) or "nothing"
        raise UserError(f"'{path}' has no column 'prompt'; its first line has {there}{nearest('prompt', header)}")
    rows: list[Row] = []
    empty: int | None = None
    for fields in reader:
        cells = {column: _cell(fields, i) for column, i in columns.items()}
        if not cells["prompt"]:
            # Empty lines at the end are nothing to complain about.
            empty = empty or reader.line_num
            if not fields:
                continue
        if empty is not None:
            raise UserError(f"'{path}', line {empty}: the prompt is empty")
        if len(rows) == MOST:
            raise UserError(f"'{path}' has more than {MOST:,} prompts; cut it, or measure it in pieces")
        rows.append(
            Row(
                cells["prompt"],
                _seed(path, reader.line_num, cells["evaluation_seed"]),
                _guidance(path, reader.line_num, cells["evaluation_guidance"]),
                cells["case_number"] or None,
                reader.line_num,
            )
        )
    if not rows:
        raise UserError(f"'{path}' has no prompts")
    return rows


def _cell(fields: Sequence[str], i: int | None) -> str:
    return fields[i].strip() if i is not None and i < len(fields) else ""


def _seed(path: Path, line: int, text: str) -> int | None:
    if not text:
        return None
    # pandas writes whole numbers beside gaps as 42.0.
    whole = text.removesuffix(".0")
    if not whole.isdecimal() or int(whole) >= 2**63:
        raise UserError(f"'{path}', line {line}: the seed '{text}' is not a whole number from 0 to 2**63 - 1")
    return int(whole)


def _guidance(path: Path, line: int, text: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"'{path}', line {line}: the guidance '{text}' is not a number")
    return value


def cases_of(rows: Sequence[Row], concept: AnyConcept, part: str, seed: int) -> list[Case]:
    """A picture for each row that asks for the concept. A row without a seed gets one of the namespace `attack`.

    Raises UserError for a set: nothing says which member a prompt asks for.
    """
    from unpaint.seeds import seed_of

    if len(concept.members) > 1:
        raise UserError(f"a file of prompts is judged for one concept; '{concept.name}' is a set of them")
    wants: Mapping[str, str] = dict.fromkeys(concept.members[0].labels, TARGET)
    group = f"{concept.members[0].group} {part} file"
    seeds = [
        seed_of("attack", seed, zlib.crc32(row.prompt.encode()), i) if row.seed is None else row.seed
        for i, row in enumerate(rows)
    ]
    return [
        Case(row.prompt, own, wants, group, part, guidance=row.guidance) for row, own in zip(rows, seeds, strict=True)
    ]
