"""What a method is: hyper-parameters, the weights it may change, the data of each step, and one step.

A method is a plain class; nothing is inherited. `Method` below is the interface that `unpaint.training` drives, so
that a trained method, a closed form and a statistical one are resumed, logged and distributed by the same code.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from unpaint.cases import Erasing
from unpaint.concepts import AnyConcept, Concept
from unpaint.edit import Edit
from unpaint.errors import UserError, nearest
from unpaint.model import TextToImage

MODES = ("joint", "sequential", "composed")


def checked_mode(name: str, mode: str, can: Sequence[str] = MODES) -> str:
    """`mode`, how a method erases a concept set: `joint`, all members at once; `sequential`, one after the other;
    `composed`, an edit a member, and their sum. Raises UserError for one that the method cannot do."""
    if mode not in can:
        other = f", {mode} is not" if mode in MODES else f", not '{mode}'{nearest(mode, can)}"
        raise UserError(f"method={name}: method.mode is {' or '.join(can)}{other}")
    return mode


def erasing_prompts(concept: AnyConcept, asked: str) -> list[Erasing]:
    """What a method erases with. `all`: every erasing prompt; `concept`: the bare words, in a set each member's."""
    return [entry for entry in concept.erasing(further=True) if asked == "all" or entry.prompt == entry.bare]


@dataclass(frozen=True)
class Job:
    """What a method gets to work with.

    `beside`: the other members of a concept set when each member gets an edit of its own, in the same run.
    `weights`: the parameters of the method's group, trainable, in float32; `base`: their tensors before the first step,
    for `model.predict(..., weights=base)`: the frozen teacher, without a second network. `config` is for the edit's
    header. `cache` is a folder that runs share; what a method keeps there is keyed by all it depends on. `mine` is this
    rank's share of a global batch of rows.

    `update(loss, i=0, adjust=None)` clears the gradients of optimiser i, back-propagates `loss`, averages the gradients
    over ranks, calls `adjust()`, which may change them (a mask, say), and steps. `step(i=0)` steps optimiser i with the
    gradients that the method itself has put into its parameters' `.grad`; what `torch.autograd.grad` returns is this
    rank's alone, so reduce it first. `total(tensor)` is the sum of the ranks' tensors, the same on all of them.

    `progress(text, total)` opens a bar, returns its advance function. `account(seconds)` adds what another run spent on
    something reused here, so that costs compare.
    """

    model: TextToImage
    concept: AnyConcept
    beside: tuple[Concept, ...]
    seed: int
    weights: dict[str, nn.Parameter]
    base: dict[str, Tensor]
    config: dict[str, Any]
    cache: Path
    mine: slice
    update: Callable[..., None]
    step: Callable[..., None]
    total: Callable[[Tensor], Tensor]
    progress: Callable[[str, int], Callable[[int], None]]
    account: Callable[[float], None]


class Method(Protocol):
    """The interface. `group` names the weights it may change, see `TextToImage.group`. Steps run from 0 to `steps` - 1;
    `batches(start)` yields the data of steps start, start + 1, ... as a pure function of seed and step, so that a
    resumed run sees what an uninterrupted one does. `own` holds what the method keeps from step to step beside the
    weights, as parameters (a discriminator) and buffers (running sums): it is made in `begin`, saved with the state,
    and must be the same on all ranks after every step; None if there is no such thing. `mode` says how a concept set is
    erased, one of `MODES`; see `checked_mode`."""

    name: str
    mode: str
    group: str
    steps: int
    own: nn.Module | None

    def check(self, concept: AnyConcept) -> None:
        """Raises UserError for a concept that the method cannot handle, before anything is loaded: that of the run, or
        each member of a set that is erased in parts."""

    def begin(self, job: Job) -> None:
        """Remembers the job and makes or loads what all steps share. Rank 0 goes first, the others find its cache."""

    def optimizers(self) -> list[Optimizer]:
        """Optimisers over `job.weights` (and a method's own networks); none for a method without gradients."""

    def batches(self, start: int) -> Iterator[Any]:
        """The data of each step from `start` on."""

    def step(self, batch: Any) -> dict[str, Tensor]:
        """One step; returns what is worth logging, as scalars."""

    def finish(self) -> Edit:
        """The edit, after the last step."""
