"""The cases of test_ranks.py, a few steps each on a tiny pipeline, one after the other; alone or by torchrun.

On two ranks also: a share of one batch for both, and what becomes of the others when one fails.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from unpaint.config import compose, identity, instantiate
from unpaint.errors import UserError
from unpaint.files import WEIGHTS
from unpaint.methods.base import Job
from unpaint.methods.none import NoErasing
from unpaint.model import load_model
from unpaint.run import paint_part
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
PICTURES = [
    f"evaluator.detector.path={WEIGHTS / 'detector'}",
    "~metric@evaluator.metrics.clip_score",
    "concept.evaluation.target_pictures=16",
    "concept.evaluation.per_label=2",
    "evaluator.sampler.steps=2",
    "part=1/99",
]


class Failing(NoErasing):
    def begin(self, job: Job) -> None:
        if job.mine.start == 0:
            raise UserError("rank 0 cannot begin")


def main() -> None:
    torch.set_num_threads(1)
    folder, pipeline, world, cases = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
    for name, chosen in cases.items():
        keys = compose(chosen[:1]).method
        options = [*chosen, *(f"method.{key}={value}" for key, value in FEW.items() if key in keys)]
        place = folder / name
        cfg = compose([*options, f"outputs={place}", *shared(pipeline, world)])
        place.mkdir(parents=True, exist_ok=True)
        arguments = (load_model(cfg.model), instantiate(cfg.concept), 0, identity(cfg), place / ".cache")
        module = Erasing(instantiate(cfg.method), *arguments)
        trainer = new_trainer(cfg, place, [])
        trainer.fit(module)
        assert trainer.world_size == world
        module.finish().save(place / f"edit-{trainer.global_rank}.safetensors")
    if world == 2:
        together(folder, pipeline, trainer.global_rank)


def shared(pipeline: str, world: int) -> list[str]:
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={world}"] if world > 1 else ["trainer=cpu"]
    return ["model=sd15", f"model.path={pipeline}", *ranks]


def together(folder: Path, pipeline: str, rank: int) -> None:
    edit = folder / "esd" / f"edit-{rank}.safetensors"
    paint_part(compose([f"outputs={folder / 'part'}", f"edit={edit}", *shared(pipeline, 2), *PICTURES]))
    cfg = compose([f"outputs={folder}", *shared(pipeline, 2)])
    method: Any = Failing("none", "joint")
    module = Erasing(method, load_model(cfg.model), instantiate(cfg.concept), 0, identity(cfg), folder / ".cache")
    group = torch.distributed.distributed_c10d._get_default_group()
    found: dict[str, Any] = {"hours": group._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 3600}
    try:
        new_trainer(cfg, folder, []).fit(module)
    except UserError as error:
        found["error"] = str(error)
    (folder / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
