"""Every method, a few steps on a tiny pipeline, one after the other. Run by test_ranks.py, alone or by torchrun."""

import sys
from pathlib import Path

import torch

from unpaint.config import compose, conf_dir, identity, instantiate
from unpaint.model import load_model
from unpaint.training.erasing import Erasing
from unpaint.training.launch import new_trainer

FEW = {
    "steps": 3,
    "sampling_steps": 4,
    "bank_size": 8,
    "batch_size": 4,
    "retain_size": 4,
    "forget_size": 4,
    "pictures": 4,
    "anchor_pictures": 4,
    "prior_pictures": 4,
}


def main() -> None:
    torch.set_num_threads(1)
    folder, pipeline, world = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    for file in sorted((conf_dir() / "method").glob("*.yaml")):
        method = compose([f"method={file.stem}"]).method
        options = [f"method.{key}={value}" for key, value in FEW.items() if key in method]
        options += ["model=sd15", f"model.path={pipeline}", f"outputs={folder / file.stem}", f"method={file.stem}"]
        options += ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={world}"] if world > 1 else []
        cfg = compose([*options, *(["trainer=cpu"] if world == 1 else [])])
        place = folder / file.stem
        place.mkdir(parents=True, exist_ok=True)
        arguments = (load_model(cfg.model), instantiate(cfg.concept), 0, identity(cfg), place / ".cache")
        module = Erasing(instantiate(cfg.method), *arguments)
        trainer = new_trainer(cfg, place, [])
        trainer.fit(module)
        assert trainer.world_size == world
        module.finish().save(place / f"edit-{trainer.global_rank}.safetensors")


if __name__ == "__main__":
    main()
