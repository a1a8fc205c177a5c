"""Restoration: how easily what was erased comes back. By fine-tuning (relearning), and by leaving out edits (subsets).

Both leave the model as it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unpaint.cases import TARGET, Case
from unpaint.concepts import AnyConcept
from unpaint.edit import Edit
from unpaint.errors import UserError
from unpaint.evaluation.detectors import shows
from unpaint.evaluation.stats import mean_summary, wilson

if TYPE_CHECKING:
    from unpaint.evaluation.suite import Evaluator
    from unpaint.model import TextToImage
    from unpaint.sampling import Sampler

# --- relearning -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Relearning:
    """How the edited model is fine-tuned: Adam on the denoising loss, all weights of the UNet, in float32.

    pictures: how many pictures of the concept there are to learn from, painted by the unedited model; batch_size of
    them a step. every: the concept is looked for after each so many steps, on `judged` pictures. Raises UserError on
    numbers that make no sense.
    """

    pictures: int = 8
    lr: float = 1e-4
    steps: int = 200
    every: int = 10
    batch_size: int = 4
    judged: int = 32

    def __post_init__(self) -> None:
        for name in ("pictures", "steps", "every", "batch_size", "judged"):
            if getattr(self, name) < 1:
                raise UserError(f"relearning.{name} is at least 1, not {getattr(self, name)}")
        if self.lr <= 0:
            raise UserError(f"relearning.lr is above 0, not {self.lr}")


def relearn(
    model: TextToImage,
    edit: Edit,
    concept: AnyConcept,
    evaluator: Evaluator,
    seed: int,
    options: Relearning,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Steps of fine-tuning until the edited model shows the concept at least half as often as the unedited one.

    `model` is unedited when it comes in and goes out. Pictures, noise and judged pictures all have seeds of the
    namespace `attack`: none that trained or scored anything. `progress(1)` is called after each step. Raises UserError
    on a model that is not in float32.

    Returns what the record holds under `restoration/relearning`: value (steps; `options.steps` if it did not come back
    within them: more would have been needed), relearned (whether it did), shown (the unedited model's share of pictures
    that show the concept), curve ([steps, share, low, high] with Wilson's interval, from 0 on), n (pictures a point),
    base (None), higher_is_better, unit, title, detector, and the options. A concept that the unedited model does not
    paint cannot come back: nothing is trained, and value and relearned are None.
    """
    from unpaint.seeds import seed_of

    if model.dtype != torch.float32:
        raise UserError(f"relearning trains all weights in float32; the model is loaded in {model.dtype}")
    prompts = concept.prompts(further=True)
    cases = _questions(concept, seed, options.judged)[0]
    seeds = [seed_of("attack", seed, 2, i) for i in range(options.judged)]
    base = _share(_shown(model, cases, seeds, evaluator))[0]
    value: int | None = None
    relearned: bool | None = None
    curve: list[tuple[int, float, float, float]] = []
    if base > 0:
        latents = _lessons(model, prompts, seed, evaluator.sampler, options)
        with _applied(model, [edit]), _trainable(model) as parameters:
            optimizer = torch.optim.Adam(parameters, lr=options.lr)
            curve = [(0, *_share(_shown(model, cases, seeds, evaluator)))]
            for step in range(options.steps):
                if curve[-1][1] >= base / 2:
                    break
                optimizer.zero_grad()
                _loss(model, latents, prompts, seed, step, options.batch_size).backward()
                optimizer.step()
                done = step + 1
                if done % options.every == 0 or done == options.steps:
                    curve.append((done, *_share(_shown(model, cases, seeds, evaluator))))
                if progress:
                    progress(1)
        value, relearned = curve[-1][0], curve[-1][1] >= base / 2
    return {
        "value": value,
        "relearned": relearned,
        "shown": base,
        "base": None,
        "curve": [list(point) for point in curve],
        "n": options.judged,
        "higher_is_better": True,
        "unit": "steps",
        "title": "steps of fine-tuning until “{target}” is back",
        "detector": evaluator.detector.identity,
        "options": asdict(options),
    }


@torch.no_grad()
def _lessons(model: TextToImage, prompts: Sequence[str], seed: int, sampler: Sampler, options: Relearning) -> Tensor:
    """Latents (pictures, C, h, w) of the unedited model's pictures of the concept, as the autoencoder encodes them."""
    from unpaint.sampling import paint
    from unpaint.seeds import seed_of

    asked = [prompts[i % len(prompts)] for i in range(options.pictures)]
    seeds = [seed_of("attack", seed, 0, i) for i in range(options.pictures)]
    painted = paint(model, asked, seeds, sampler, options.batch_size)
    return torch.cat([model.latents_of(pictures) for pictures in painted])


def _loss(model: TextToImage, latents: Tensor, prompts: Sequence[str], seed: int, step: int, batch_size: int) -> Tensor:
    """Mean squared error of the predicted noise, t uniform over all noise levels (Ho et al. 2020, eq. 14)."""
    from unpaint.seeds import seed_of

    rng = torch.Generator().manual_seed(seed_of("attack", seed, 1, step))
    which = torch.randint(len(latents), (batch_size,), generator=rng)
    t = torch.randint(len(model.alphas_cumprod), (batch_size,), generator=rng).to(model.device)
    noise = torch.randn((batch_size, *latents.shape[1:]), generator=rng).to(model.device)
    abar = model.alphas_cumprod[t].view(-1, 1, 1, 1)
    noised = abar.sqrt() * latents[which.to(model.device)] + (1 - abar).sqrt() * noise
    text = model.encode([prompts[i % len(prompts)] for i in which.tolist()])
    return nn.functional.mse_loss(model.predict(noised, t, text), noise)


@contextmanager
def _trainable(model: TextToImage) -> Iterator[list[nn.Parameter]]:
    """The UNet's parameters over copies of their tensors; the tensors themselves are back afterwards, untouched."""
    parameters = list(model.pipe.unet.parameters())
    kept = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)
        yield parameters
    finally:
        for parameter, data in zip(parameters, kept, strict=True):
            parameter.data = data
            parameter.requires_grad_(False)
            parameter.grad = None


# --- subsets --------------------------------------------------------------------------------------------------------


def subsets(
    model: TextToImage,
    edits: Mapping[str, Edit],
    concepts: Mapping[str, AnyConcept],
    evaluator: Evaluator,
    seed: int,
    pictures: int = 32,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """SepME's subset matrix (Zhao et al. 2024, arXiv 2402.05947): with which edits applied is which member shown?

    edits, concepts: a member's edit and its concept, by the member's name. `model` is unedited when it comes in and
    goes out. Subsets: none, each alone, all but one each, all. Each member is judged on its first `pictures` prompts
    and their own seeds, so the subset "none" is the unedited model on the pictures that UA counts. `progress` is called
    with the pictures painted since.

    Returns rows (applied: names; shown: member -> [share, low, high], Wilson), value and base (mean over members of the
    share when all edits but the member's are applied, and when none is: what is restored), erased (the mean when all
    are applied), n (pictures a member and subset), higher_is_better, unit, title, detector. Pooled, as
    `stats.mean_summary`, beside the unedited model's answers to the same prompts and seeds: `gone` (not shown, of what
    is erased) and `kept` (shown, of what is not, the unedited model left out). Their n is members times pictures, each
    the mean over the subsets in question: answers to one prompt from one seed are no independent trials.
    Raises UserError if there are less than two members, or edits and concepts have other names.
    """
    names = sorted(edits)
    if names != sorted(concepts) or len(names) < 2:
        raise UserError(f"subsets need an edit and a concept for each of two or more members, not {names}")
    whole = frozenset(names)
    # Each once: with two members, one alone is all but the other.
    each, but = [frozenset([name]) for name in names], [whole - {name} for name in names]
    chosen = dict.fromkeys([frozenset[str](), *each, *but, whole])
    shown: dict[frozenset[str], dict[str, NDArray[np.bool_]]] = {}
    for subset in chosen:
        with _applied(model, [edits[name] for name in sorted(subset)]):
            shown[subset] = {}
            for name in names:
                shown[subset][name] = _shown(model, *_questions(concepts[name], seed, pictures), evaluator)
                if progress:
                    progress(pictures)

    def mean(of: Callable[[str], frozenset[str]]) -> float:
        return float(np.mean([shown[of(name)][name].mean() for name in names]))

    def pooled(answers: Callable[[NDArray[np.bool_]], NDArray[np.bool_]], applied: bool) -> dict[str, float | int]:
        of = {name: [subset for subset in chosen if subset and (name in subset) == applied] for name in names}
        ours = [np.mean([answers(shown[subset][name]) for subset in of[name]], axis=0) for name in names]
        base = [answers(shown[frozenset[str]()][name]).astype(np.float64) for name in names]
        return mean_summary(np.concatenate(ours), np.concatenate(base))

    return {
        "value": mean(lambda name: whole - {name}),
        "base": mean(lambda name: frozenset()),
        "erased": mean(lambda name: whole),
        "rows": [
            {"applied": sorted(subset), "shown": {name: list(_share(answers)) for name, answers in row.items()}}
            for subset, row in shown.items()
        ],
        "gone": pooled(np.logical_not, True),
        "kept": pooled(np.asarray, False),
        "n": pictures,
        "higher_is_better": True,
        "unit": "rate",
        "title": "taken out of the set of edits: it is there again",
        "detector": evaluator.detector.identity,
    }


@contextmanager
def _applied(model: TextToImage, edits: Sequence[Edit]) -> Iterator[None]:
    with ExitStack() as stack:
        for edit in edits:
            edit.apply(model.pipe)
            stack.callback(edit.remove, model.pipe)
        yield


# --- both -----------------------------------------------------------------------------------------------------------


def _questions(concept: AnyConcept, seed: int, pictures: int) -> tuple[list[Case], list[int]]:
    """The first cases that ask for the concept, from the start again if there are too few, and their seeds."""
    from unpaint.seeds import seed_of

    asked = [case for case in concept.cases(seed) if TARGET in case.wants.values()][:pictures]
    cases = [asked[i % len(asked)] for i in range(pictures)]
    return cases, [case.seed if i < len(asked) else seed_of("score", seed, i) for i, case in enumerate(cases)]


def _shown(model: TextToImage, cases: Sequence[Case], seeds: Sequence[int], evaluator: Evaluator) -> NDArray[np.bool_]:
    """Whether each picture (n,) of the model as it is shows all target labels of its case."""
    from unpaint.sampling import paint

    detector, answers = evaluator.detector, list[bool]()
    for some in paint(model, [case.prompt for case in cases], seeds, evaluator.sampler, evaluator.batch_size):
        probabilities = detector(some.to(model.device).float() / 255).cpu().numpy()
        for i, case in enumerate(cases[len(answers) : len(answers) + len(some)]):
            targets = [label for label, role in case.wants.items() if role == TARGET]
            answers.append(all(bool(shows(detector, probabilities[i : i + 1], label)[0]) for label in targets))
    return np.array(answers)


def _share(answers: NDArray[np.bool_]) -> tuple[float, float, float]:
    """The share of what is shown, with Wilson's interval."""
    return float(answers.mean()), *wilson(int(answers.sum()), len(answers))
