"""Any image classifier of transformers, from a folder or the hub, read through a map from our labels to its classes."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unpaint.errors import UserError, nearest
from unpaint.evaluation.detectors.clip_zero_shot import by_axis, checked_thresholds, digest, with_none
from unpaint.evaluation.pretrained import Source, to_arrays


class HuggingFaceClassifier:
    """A label's probability is that of the most probable of its classes.

    path: an AutoModelForImageClassification folder or a hub id, at `revision`. labels: `axis/word` -> the classifier's
    class names that mean it. Each axis also has `axis/none`: the most probable class that no label of the axis has. So
    a label is shown if one of its classes is the classifier's first choice, unless `thresholds` has the label. A class
    name is matched without regard to case, whole or as one of the synonyms between commas ("tench, Tinca tinca").
    The network is loaded at the first call. Raises UserError when there is no such model, or no such class.
    """

    only_for = None

    def __init__(
        self,
        path: str,
        labels: Mapping[str, Sequence[str]],
        thresholds: Mapping[str, float] | None = None,
        revision: str | None = None,
    ) -> None:
        self.classes = {label: [names] if isinstance(names, str) else list(names) for label, names in labels.items()}
        self.labels = list(with_none(dict.fromkeys(self.classes, ""), ""))
        for label, names in self.classes.items():
            if not names or label.endswith("/none"):
                raise UserError(
                    f"labels: {label} must have at least one class of the classifier, and not be called none"
                )
        self.thresholds = checked_thresholds(thresholds or {}, self.labels)
        self.source = Source(path, revision)
        if (config := self.source.config()) is not None:
            self._places(config.get("id2label") or {})

    @property
    def identity(self) -> str:
        return f"hugging-face-{self.source.identity}-{digest(self.classes, self.thresholds)}"

    def __call__(self, images: Tensor) -> Tensor:
        """Probabilities (N, labels), float32, of images (N, 3, H, W) between 0 and 1."""
        model, processor, places = self._loaded
        model.to(images.device)
        arrays = to_arrays((images * 255).round().to(torch.uint8))
        pixels = processor(images=arrays, return_tensors="pt", input_data_format="channels_last").pixel_values
        with torch.inference_mode():
            logits = model(pixel_values=pixels.to(images.device)).logits.float()
        several = model.config.problem_type == "multi_label_classification"
        probabilities = logits.sigmoid() if several else logits.softmax(dim=1)
        return torch.stack([probabilities[:, places[label]].amax(dim=1) for label in self.labels], dim=1)

    @cached_property
    def _loaded(self) -> tuple[Any, Any, dict[str, list[int]]]:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        model = self.source.load(AutoModelForImageClassification.from_pretrained, dtype=torch.float32)
        # The Pil processors need no torchvision.
        processor = self.source.load(AutoImageProcessor.from_pretrained, backend="pil")
        return model.eval().requires_grad_(False), processor, self._places(model.config.id2label)

    def _places(self, id2label: Mapping[Any, str]) -> dict[str, list[int]]:
        """Our label -> the numbers of its classes."""
        numbers: dict[str, int] = {}
        for i, name in id2label.items():
            for word in (name, *name.split(",")):
                numbers.setdefault(word.strip().lower(), int(i))
        places: dict[str, list[int]] = {}
        for label, names in self.classes.items():
            for name in names:
                if name.lower() not in numbers:
                    raise UserError(f"labels: {label}: the classifier has no class '{name}'{nearest(name, numbers)}")
            places[label] = [numbers[name.lower()] for name in names]
        for own in by_axis(self.labels):
            axis = self.labels[own[0]].split("/")[0]
            taken = {place for i in own for place in places.get(self.labels[i], [])}
            rest = [int(i) for i in id2label if int(i) not in taken]
            if not rest:
                raise UserError(f"labels: the labels of '{axis}' take all classes of the classifier, none is left over")
            places[f"{axis}/none"] = rest
        return places
