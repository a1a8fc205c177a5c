"""LPIPS, the learned perceptual distance of two pictures. Needs torchvision, which unpaint does not."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unpaint.errors import UserError, nearest


class Lpips:
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924) by torchmetrics; needs torchvision and its backbone in torch's cache.

    net: alex, vgg or squeeze. Raises UserError when either is not there: nothing is fetched.
    """

    BACKBONES: Mapping[str, str] = {
        "alex": "alexnet-owt-7be5be79.pth",
        "vgg": "vgg16-397923af.pth",
        "squeeze": "squeezenet1_1-b8a52dc0.pth",
    }

    def __init__(self, net: str = "alex") -> None:
        if net not in self.BACKBONES:
            raise UserError(f"LPIPS: net is {', '.join(self.BACKBONES)}, not '{net}'{nearest(net, self.BACKBONES)}")
        if find_spec("torchvision") is None:
            raise UserError("fidelity/lpips needs torchvision, which is not installed (pip install torchvision)")
        file = Path(torch.hub.get_dir()) / "checkpoints" / self.BACKBONES[net]
        if not file.is_file():
            raise UserError(f"fidelity/lpips needs torchvision's backbone at '{file}', which is not there")
        self.net = net
        self.identity = f"lpips-{net}"
        self._network: Any = None

    def compare(self, pictures: Tensor, unedited: Tensor) -> Tensor:
        """(n,), float32, of pictures uint8 (n, 3, H, W) each, not resized."""
        if self._network is None:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            # Each rank asks for its own pictures.
            self._network = LearnedPerceptualImagePatchSimilarity(
                self.net, reduction="none", normalize=True, sync_on_compute=False
            )
        network = self._network.to(pictures.device)
        network.reset()
        with torch.inference_mode():
            network.update(pictures.float() / 255, unedited.float() / 255)
            return network.compute().flatten()
