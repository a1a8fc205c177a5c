"""`unpaint generate`: a grid of pictures, the unedited model's beside the edited one's, from the same seeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from unpaint.config import compose, model_folder
from unpaint.edit_header import base_mismatch, read_header
from unpaint.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

MARGIN, GAP, HEAD, LINE = 16, 4, 24, 16
SMALLEST_CELL, BATCH = 160, 4


def model_config(model: str) -> DictConfig:
    """The config of a model given by its name in `conf/model`, or as a diffusers folder."""
    folder = Path(model).expanduser()
    if (folder / "model_index.json").is_file():
        return OmegaConf.create({"name": folder.name, "path": str(folder), "device": "auto", "dtype": "float32"})
    try:
        return compose([f"model={model}"]).model
    except UserError as error:
        raise UserError(f"--model {model}: neither a name from `unpaint ls models` nor a diffusers folder") from error


def generate(
    edits: Sequence[tuple[Path, float]],
    prompts: Sequence[str],
    out: Path,
    seed: int = 0,
    steps: int = 25,
    guidance: float = 4.0,
    model: DictConfig | None = None,
) -> Path:
    """Paint each prompt without and with the edits (file, scale), which add up, and write the grid to `out` (PNG).

    Row i is prompt i, painted from `seed + i` on both sides, as `pipe(prompt, generator=...)` paints it with DDIM. With
    no edits there is one column. Returns `out`. Raises UserError, before the model is loaded, for an edit file that is
    damaged or of another base.
    """
    cfg = model if model is not None else model_config("picturebook")
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: expected a name that ends in .png")
    folder = model_folder(cfg)
    for file, _ in edits:
        header = read_header(file)
        if folder is not None and (mismatch := base_mismatch(header, folder)) is not None:
            raise UserError(f"--edit {file}: {mismatch}")

    from unpaint.edit import Edit
    from unpaint.model import load_model
    from unpaint.sampling import Sampler, paint

    sampler = Sampler(steps=steps, guidance=guidance)
    loaded = load_model(cfg)
    seeds = [seed + row for row in range(len(prompts))]

    def painted() -> "list[Tensor]":
        batches = paint(loaded, prompts, seeds, sampler, batch_size=min(BATCH, len(prompts)))
        return [picture for batch in batches for picture in batch]

    columns = {"unedited": painted()}
    if edits:
        for file, scale in edits:
            Edit.load(file).apply(loaded.pipe, scale)
        columns["edited"] = painted()
    out.parent.mkdir(parents=True, exist_ok=True)
    _sheet(columns, prompts).save(out)
    return out


def _sheet(columns: "dict[str, list[Tensor]]", prompts: Sequence[str]) -> "Image":
    """Columns of uint8 pictures (3, H, W), each with its name above it, and each row with its prompt below it."""
    import textwrap

    from PIL import Image, ImageDraw, ImageFont

    height, width = next(iter(columns.values()))[0].shape[1:]
    # Small pictures are shown larger, in whole multiples, so that no pixel is invented.
    zoom = max(1, -(-SMALLEST_CELL // width))
    cell_width, cell_height = zoom * width, zoom * height
    sheet_width = 2 * MARGIN + len(columns) * (cell_width + GAP) - GAP
    font = ImageFont.load_default(13)
    letters = max(10, int((sheet_width - 2 * MARGIN) / font.getlength("n")))
    captions = [textwrap.wrap(prompt, letters) or [""] for prompt in prompts]
    sheet_height = 2 * MARGIN + HEAD + sum(cell_height + LINE * len(caption) + 2 * GAP for caption in captions)
    sheet = Image.new("RGB", (sheet_width, sheet_height), "white")
    draw = ImageDraw.Draw(sheet)
    lefts = [MARGIN + i * (cell_width + GAP) for i in range(len(columns))]
    for left, name in zip(lefts, columns, strict=True):
        draw.text((left + cell_width / 2, MARGIN), name, "black", font, anchor="ma")
    top = MARGIN + HEAD
    for row, caption in enumerate(captions):
        for left, pictures in zip(lefts, columns.values(), strict=True):
            picture = Image.fromarray(pictures[row].permute(1, 2, 0).contiguous().numpy())
            sheet.paste(picture.resize((cell_width, cell_height), Image.Resampling.NEAREST), (left, top))
        top += cell_height + GAP
        for line in caption:
            draw.text((MARGIN, top), line, "black", font)
            top += LINE
        top += GAP
    return sheet
