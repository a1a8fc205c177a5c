"""The loop that trains each of Picturebook's parts: resumable after a kill, the data a pure function of the step."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from unpaint.files import replacing


def fit(
    module: nn.Module,
    loss_of: Callable[[int], dict[str, Tensor]],
    *,
    file: Path,
    steps: int,
    lr: float,
    weight_decay: float = 0.01,
    warmup: int = 200,
    cooldown: float = 0.25,
    average: float = 0.0,
    save_every: float = 60.0,
) -> None:
    """Trains `module` in place and leaves its weights (their running average, if `average` > 0) in it.

    `loss_of(step)` returns named scalar losses; their sum is minimised with AdamW. The learning rate rises for
    `warmup` steps, stays, and falls to zero over the last `cooldown` share of `steps`. `file` holds the state
    (weights, optimiser, average, step); the same call continues from it.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    averaged = [p.detach().clone() for p in parameters] if average else []
    start = 0
    if file.exists():
        state = torch.load(file, map_location="cpu", weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        for mean, stored in zip(averaged, state["average"], strict=True):
            mean.copy_(stored)
        start = state["step"]

    def save(step: int) -> None:
        state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "average": averaged, "step": step}
        with replacing(file) as beside:
            torch.save(state, beside)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    saved, shown = time.monotonic(), time.monotonic()
    module.train()
    with Progress(*columns, TextColumn("{task.fields[losses]}")) as progress:
        task = progress.add_task(file.stem, total=steps, completed=start, losses="")
        for step in range(start, steps):
            rate = lr * min(1.0, (step + 1) / warmup, (steps - step) / max(1.0, cooldown * steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            losses = loss_of(step)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            if not math.isfinite(norm):
                raise FloatingPointError(f"{file.stem}: gradient is not finite at step {step}")
            optimizer.step()
            if averaged:
                keep = min(average, (step + 1) / (step + 10))
                torch._foreach_lerp_(averaged, [p.detach() for p in parameters], 1 - keep)
            progress.update(task, completed=step + 1)
            now = time.monotonic()
            if now - shown > 30 or step + 1 == steps:
                shown = now
                text = " ".join(f"{name} {value.item():.4f}" for name, value in losses.items())
                progress.update(task, losses=text)
                with open(file.with_suffix(".log"), "a") as log:
                    log.write(f"{time.time():.0f} {step + 1} {text}\n")
            if now - saved > save_every:
                saved = now
                save(step + 1)
    if start < steps:
        save(steps)
    with torch.no_grad():
        for p, mean in zip(parameters, averaged, strict=False):
            p.copy_(mean)
    module.eval()
