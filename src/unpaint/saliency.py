"""Saliency masks: which weights a gradient points at, averaged over estimates, and how the choice drifts."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]


class ConceptNeurons(nn.Module):
    """Saliency and mask over the units of some weights; all its state is in buffers.

    weights: by key, `...attn2.to_q.weight`; the projections q, k and v (of whatever layers) are judged separately.
    units: by key, in how many units a weight falls: its number of elements, or of heads (blocks of rows). A unit's
    saliency is the mean of |gradient| over its elements. Masked are units with a z-score above `xi`: (saliency - mean)
    / standard deviation (that of a whole population) over all units of the projection, or of the layer's own with
    `by_layer`.
    """

    def __init__(self, weights: Mapping[str, Tensor], units: Mapping[str, int], xi: float, by_layer: bool) -> None:
        super().__init__()
        self.xi = xi
        self.by_layer = by_layer
        self.shapes = {key: weight.shape for key, weight in weights.items()}
        self.units = dict(units)
        self.keys: dict[str, list[str]] = {}
        for key in weights:
            self.keys.setdefault(_projection(key), []).append(key)
        device = next(iter(weights.values())).device
        for projection, keys in self.keys.items():
            count = sum(self.units[key] for key in keys)
            self.register_buffer(f"saliency_{projection}", torch.zeros(count, device=device))
            # Bytes, not booleans: not every backend of torch.distributed broadcasts those.
            for name in ("mask", "first", "ever"):
                self.register_buffer(f"{name}_{projection}", torch.zeros(count, dtype=torch.uint8, device=device))

    def measure(self, gradient: Mapping[str, Tensor]) -> Tensors:
        """Saliency of a gradient: projection -> (units,), in the order of the weights; differentiable."""
        return {
            projection: torch.cat([gradient[key].abs().reshape(self.units[key], -1).mean(dim=1) for key in keys])
            for projection, keys in self.keys.items()
        }

    @torch.no_grad()
    def add(self, gradient: Mapping[str, Tensor], share: float, keep: float) -> None:
        """saliency <- keep * saliency + share * that of `gradient`."""
        for projection, new in self.measure(gradient).items():
            self.get_buffer(f"saliency_{projection}").mul_(keep).add_(new, alpha=share)

    @torch.no_grad()
    def choose(self, first: bool) -> dict[str, Tensor]:
        """Sets the mask from the saliency; returns its Jaccard index with the one before. `first`: there was none."""
        before = self._all("mask")
        for projection, scores in self.zscores(self._saliency()).items():
            mask = self.get_buffer(f"mask_{projection}")
            mask.copy_(scores > self.xi)
            self.get_buffer(f"ever_{projection}").bitwise_or_(mask)
            if first:
                self.get_buffer(f"first_{projection}").copy_(mask)
        return {"mask/jaccard_previous": jaccard(self._all("mask"), self._all("mask") if first else before)}

    def zscores(self, saliency: Mapping[str, Tensor]) -> Tensors:
        """Z-scores of a saliency against the averaged one's mean and deviation, which are constants: differentiable.
        0 where the deviation is 0."""
        found = {}
        for projection, keys in self.keys.items():
            own = self.get_buffer(f"saliency_{projection}")
            sizes = [self.units[key] for key in keys] if self.by_layer else [len(own)]
            parts = zip(saliency[projection].split(sizes), own.split(sizes), strict=True)
            found[projection] = torch.cat([_standardised(part, reference) for part, reference in parts])
        return found

    @torch.no_grad()
    def highest(self) -> float:
        """The largest z-score of all units."""
        return max(float(scores.max()) for scores in self.zscores(self._saliency()).values())

    def mask(self) -> Tensors:
        """The mask, bool, by key and of the weights' shapes."""
        return self._spread("mask")

    def drift(self) -> dict[str, Tensor]:
        """Scalars: shares of all weights in the mask and in any mask so far, the share in each layer, and the Jaccard
        index with the first mask (over units)."""
        mask, ever = self._spread("mask"), self._spread("ever")
        total = sum(shape.numel() for shape in self.shapes.values())
        shares = {
            "mask/kept": torch.stack([m.sum() for m in mask.values()]).sum() / total,
            "mask/ever": torch.stack([m.sum() for m in ever.values()]).sum() / total,
            "mask/jaccard_first": jaccard(self._all("mask"), self._all("first")),
        }
        layers: dict[str, list[Tensor]] = {}
        for key, m in mask.items():
            layers.setdefault(_layer(key), []).append(m.flatten())
        return shares | {f"mask/kept/{layer}": torch.cat(parts).float().mean() for layer, parts in layers.items()}

    def _saliency(self) -> Tensors:
        return {projection: self.get_buffer(f"saliency_{projection}") for projection in self.keys}

    def _all(self, name: str) -> Tensor:
        return torch.cat([self.get_buffer(f"{name}_{projection}") for projection in self.keys])

    def _spread(self, name: str) -> Tensors:
        found = {}
        for projection, keys in self.keys.items():
            parts = self.get_buffer(f"{name}_{projection}").bool().split([self.units[key] for key in keys])
            for key, part in zip(keys, parts, strict=True):
                shape = self.shapes[key]
                found[key] = part.view(-1, 1).expand(-1, shape.numel() // len(part)).reshape(shape)
        return {key: found[key] for key in self.shapes}


def jaccard(one: Tensor, other: Tensor) -> Tensor:
    """Common over all that is in either, of two masks; 1 for two empty ones."""
    one, other = one.bool(), other.bool()
    either = (one | other).sum()
    return torch.where(either > 0, (one & other).sum() / either.clamp(min=1), torch.ones((), device=one.device))


def _standardised(values: Tensor, reference: Tensor) -> Tensor:
    # Saliencies may be so small that their squares vanish in float32.
    wide = reference.double()
    deviation = wide.std(correction=0)
    if deviation == 0:
        return torch.zeros_like(values)
    return ((values.double() - wide.mean()) / deviation).to(values.dtype)


def _projection(key: str) -> str:
    match = re.search(r"\.to_([qkv])\.", key)
    if match is None:
        raise ValueError(f"{key} is no query, key or value projection")
    return match[1]


def _layer(key: str) -> str:
    return key.removeprefix("unet.").partition(".attn2.")[0]
