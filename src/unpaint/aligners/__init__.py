"""Aligners: how well pictures show what a text asks for, as something to follow uphill. One file an aligner.

A detector or a metric judges; an aligner has a gradient, so it is never the only judge of what was made with it.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Aligner(Protocol):
    """Any callable of this shape is one; its network is loaded at the first call. If it has `only_for`, that is the one
    model whose pictures it knows, None for any."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (n,), float32, higher is better, of images (n, 3, H, W) between 0 and 1 for n prompts, on the
        images' device; differentiable in the images."""
        ...
