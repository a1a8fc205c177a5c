"""Networks of transformers for judging, from a folder or from the hub; and CLIP, which several judges look through."""

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from unpaint.errors import UserError
from unpaint.evaluation.pictures import folder_identity, quiet

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError)


class Source:
    """Where a network comes from: the folder of a transformers model, or a hub id (`owner/name`) at a revision.

    Nothing is loaded or fetched before `load`. Raises UserError if `path` is neither.
    """

    def __init__(self, path: str | Path, revision: str | None = None) -> None:
        self.folder: Path | None = Path(path).expanduser()
        self.hub = ""
        if not (self.folder / "config.json").is_file():
            if self.folder.exists() or not _HUB_ID.fullmatch(str(path)):
                raise UserError(
                    f"'{path}' is not a transformers model: no folder with a config.json, no hub id like owner/name"
                )
            self.folder, self.hub = None, str(path)
        self.revision = revision or "main"

    @cached_property
    def identity(self) -> str:
        """A folder by its contents, a hub model by id and revision (pin a commit: `main` may move)."""
        if self.folder is not None:
            return folder_identity(self.folder)
        return f"{self.hub.replace('/', '--')}@{self.revision}"

    def config(self) -> dict[str, Any] | None:
        """The folder's config.json; None for a hub model. Raises UserError if it is damaged."""
        if self.folder is None:
            return None
        try:
            found = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"'{self.folder}/config.json' is damaged: {error}") from error
        return dict(found)

    def load(self, make: Callable[..., Any], **options: Any) -> Any:
        """`make` is a class's from_pretrained. A hub model comes from the local cache, else from the network.

        Raises UserError, in one line, when it does not load.
        """
        from huggingface_hub import constants

        try:
            with quiet():
                if self.folder is not None:
                    return make(self.folder, local_files_only=True, **options)
                return self._from_hub(make, **options)
        except _LOAD_ERRORS as error:
            what = f"the model in '{self.folder}'" if self.folder else f"'{self.hub}' from {constants.ENDPOINT}"
            hint = "" if self.folder else f"; where there is a network: hf download {self.hub}, or give a folder"
            raise UserError(f"{what} does not load: {str(error).strip().splitlines()[0]}{hint}") from error

    def _from_hub(self, make: Callable[..., Any], **options: Any) -> Any:
        from huggingface_hub import constants

        from unpaint.model import reachable

        try:
            return make(self.hub, revision=self.revision, local_files_only=True, **options)
        except _LOAD_ERRORS:
            if not reachable(constants.ENDPOINT, constants.HF_HUB_OFFLINE):
                raise
        return make(self.hub, revision=self.revision, **options)


def to_arrays(pictures: Tensor) -> list[Any]:
    """Pictures uint8 (n, 3, H, W) -> n arrays (H, W, 3), as image processors take them."""
    return [picture.permute(1, 2, 0).cpu().numpy() for picture in pictures]


class Clip:
    """A transformers CLIPModel with its tokenizer and processor; loaded, in float32, when first used."""

    def __init__(self, source: Source) -> None:
        self.source = source

    @cached_property
    def parts(self) -> tuple[Any, Any, Any]:
        """CLIPModel, tokenizer, image processor."""
        import transformers

        load = self.source.load
        model = load(transformers.CLIPModel.from_pretrained, dtype=torch.float32)
        tokenizer = load(transformers.CLIPTokenizer.from_pretrained)
        # transformers 5 without torchvision has the Pil processor only.
        processor = load(transformers.CLIPImageProcessorPil.from_pretrained)
        return model.eval().requires_grad_(False), tokenizer, processor

    @torch.inference_mode()
    def see(self, pictures: Tensor) -> Tensor:
        """Embeddings (n, d), float32, unit length, of pictures uint8 (n, 3, H, W), on the pictures' device."""
        model, _, processor = self.parts
        model.to(pictures.device)
        pixels = processor(images=to_arrays(pictures), return_tensors="pt", input_data_format="channels_last")
        seen = model.get_image_features(pixel_values=pixels.pixel_values.to(pictures.device))
        return nn.functional.normalize(_features(seen).float(), dim=-1)

    @torch.inference_mode()
    def read(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Embeddings (n, d), float32, unit length, of n texts, on the device; a long text loses its end."""
        model, tokenizer, _ = self.parts
        model.to(device)
        tokens = tokenizer(
            list(texts),
            padding="max_length",
            max_length=model.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        ).to(device)
        meant = model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return nn.functional.normalize(_features(meant).float(), dim=-1)

    @property
    def scale(self) -> float:
        """What cosines are multiplied by before a softmax."""
        return float(self.parts[0].logit_scale.exp())


def _features(output: Any) -> Tensor:
    """transformers 5 returns an object that holds the projected embedding as pooler_output."""
    return output if isinstance(output, Tensor) else output.pooler_output
