"""One erasing of five steps, with the first step's gradients written down. Run by test_ranks.py, once a world size."""

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from safetensors.torch import save_file

from unpaint.concepts import Concept
from unpaint.config import compose, identity, instantiate
from unpaint.model import load_model
from unpaint.training.erasing import Erasing
from unpaint.training.launch import new_trainer


class FirstGradients(Callback):
    def __init__(self, file: Path) -> None:
        self.file = file

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if pl_module.steps_done == 0 and trainer.is_global_zero:
            save_file({key: p.grad.clone() for key, p in pl_module.weights.items()}, self.file)


def main() -> None:
    torch.set_num_threads(1)
    folder, world = Path(sys.argv[1]), int(sys.argv[2])
    options = ["method.steps=5", "method.sampling_steps=8", f"outputs={folder}"]
    trainer_options = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={world}"]
    cfg = compose([*options, *(trainer_options if world > 1 else ["trainer=cpu"])])
    concept: Concept = instantiate(cfg.concept)
    module = Erasing(instantiate(cfg.method), load_model(cfg.model), concept, 0, identity(cfg), folder / ".cache")
    trainer = new_trainer(cfg, folder, [FirstGradients(folder / "gradients.safetensors")])
    trainer.fit(module)
    assert trainer.world_size == world
    module.finish().save(folder / f"edit-{trainer.global_rank}.safetensors")


if __name__ == "__main__":
    main()
