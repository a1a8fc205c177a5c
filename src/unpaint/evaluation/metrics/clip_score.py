"""CLIP score: how well a picture fits its prompt (Hessel et al. 2021, arXiv 2104.08718), as the raw cosine."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unpaint.concepts import IN_DOMAIN, NEIGHBOUR, RETAIN, Case
from unpaint.errors import UserError
from unpaint.evaluation.detectors import Detector
from unpaint.evaluation.metrics import asked
from unpaint.evaluation.pictures import folder_identity, quiet
from unpaint.evaluation.stats import mean_summary
from unpaint.files import WEIGHTS

BUILT_IN = WEIGHTS / "clip"


class ClipCosine:
    """Cosine of picture and prompt in the space of a transformers CLIPModel folder (weights, tokenizer, processor).

    Loaded at the first `read`. Raises UserError when the folder does not hold one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: tuple[Any, Any, Any] | None = None

    @cached_property
    def identity(self) -> str:
        if not (self.folder / "config.json").is_file():
            raise UserError(f"'{self.folder}' is not a CLIP folder (no config.json)")
        return f"clip-{folder_identity(self.folder)}"

    def read(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines (n,), float32, of pictures uint8 (n, 3, H, W) and n prompts; computed on the pictures' device."""
        if self._parts is None:
            self._parts = self._load()
        model, tokenizer, processor = self._parts
        model.to(pictures.device)
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=model.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        ).to(pictures.device)
        images = [picture.permute(1, 2, 0).cpu().numpy() for picture in pictures]
        pixels = processor(images=images, return_tensors="pt", input_data_format="channels_last").pixel_values
        with torch.inference_mode():
            seen = _features(model.get_image_features(pixel_values=pixels.to(pictures.device)))
            meant = _features(model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask))
            return nn.functional.cosine_similarity(seen.float(), meant.float(), dim=-1)

    def _load(self) -> tuple[Any, Any, Any]:
        import transformers

        # transformers 5 without torchvision has only the Pil processor, transformers 4 only the other.
        processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        try:
            with quiet():
                model = transformers.CLIPModel.from_pretrained(self.folder, local_files_only=True, dtype=torch.float32)
                tokenizer = transformers.CLIPTokenizer.from_pretrained(self.folder, local_files_only=True)
                pictures = processor.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"the CLIP in '{self.folder}' does not load: {str(error).splitlines()[0]}") from error
        return model.eval().requires_grad_(False), tokenizer, pictures


def _features(output: Any) -> Tensor:
    """transformers 4 returns the projected embedding, transformers 5 an object that holds it as pooler_output."""
    return output if isinstance(output, Tensor) else output.pooler_output


class ClipScore:
    """Mean cosine over the pictures whose prompts do not name the target; bootstrap over pictures.

    path: a CLIPModel folder, None for Picturebook's.
    """

    name = "fidelity/clip_score"
    unit = "cosine"
    higher_is_better = True
    parts = (RETAIN,)
    roles = (IN_DOMAIN, NEIGHBOUR)

    def __init__(self, title: str, cost: str, path: str | None = None) -> None:
        self.title = title
        self.cost = cost
        self.reader = ClipCosine(Path(path) if path else BUILT_IN)

    def part(self, cases: Sequence[Case], reading: NDArray[Any], detector: Detector) -> NDArray[np.float64]:
        """The cosines of the pictures that count, of cosines (n,)."""
        return reading[[row for row, _ in asked(cases, self)]].astype(np.float64)

    def finish(
        self, edited: Sequence[NDArray[np.float64]], base: Sequence[NDArray[np.float64]]
    ) -> Mapping[str, float | int]:
        return mean_summary(np.concatenate(edited), np.concatenate(base))
