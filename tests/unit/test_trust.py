"""TRUST on the tiny pipeline: its gradients against finite differences, and which weights move."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unpaint.config import compose, instantiate
from unpaint.edit import Edit
from unpaint.errors import UserError
from unpaint.methods.trust import TRUST
from unpaint.run import erase

Tensors = dict[str, Tensor]
Make = Callable[..., TRUST]


@pytest.fixture
def make(begun: Callable[..., tuple[TRUST, list[Tensor]]], tiny_clip_folder: Path) -> Make:
    """A TRUST that has begun, and whose `job.update` is a real step of its own Adam; losses are in `.losses`."""

    def make(*options: str) -> TRUST:
        method, _ = begun(
            "method=trust",
            f"method.aligner.path={tiny_clip_folder}",
            "method.zscore_within=projection",
            "method.xi=2.0",
            "method.latents=bank",
            "method.sampling_steps=50",
            "method.bank_size=4",
            "method.retain_size=4",
            "method.batch_size=2",
            "method.first_estimates=1",
            *options,
        )
        optimizers = method.optimizers()
        losses: list[Tensor] = []

        def update(loss: Tensor, i: int = 0, adjust: Any = None) -> None:
            losses.append(loss.detach())
            optimizers[i].zero_grad()
            loss.backward()
            adjust()
            optimizers[i].step()

        for parameter in method.job.weights.values():
            parameter.requires_grad_(True)
        object.__setattr__(method.job, "update", update)
        object.__setattr__(method, "losses", losses)
        return method

    return make


def along(gradient: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> float:
    return float(torch.stack([(g.double() * direction[key].double()).sum() for key, g in gradient.items()]).sum())


def unit(tensors: Mapping[str, Tensor]) -> Tensors:
    length = along(tensors, tensors) ** 0.5
    return {key: tensor / length for key, tensor in tensors.items()}


def moved(method: TRUST, direction: Mapping[str, Tensor], h: float) -> Tensors:
    return {key: (p.detach() + h * direction[key]).requires_grad_(True) for key, p in method.job.weights.items()}


@pytest.mark.parametrize(
    "options",
    [
        ["method.image=one_step"],
        ["method.image=one_step", "method.image_guidance=3.0", "method.align_to=prompt"],
        ["method.image=trajectory", "method.gradient_steps=1"],
        ["method.image=trajectory", "method.gradient_steps=4", "method.image_guidance=3.0"],
    ],
)
def test_the_saliencys_gradient_goes_through_autoencoder_and_sampler(options: list[str], make: Make) -> None:
    method = make(*options)
    score = method._alignment(method._pictures(0))
    weights = moved(method, method.job.base, 0.0)
    found = torch.autograd.grad(score(weights), list(weights.values()))
    gradient = dict(zip(weights, found, strict=True))
    assert all(g.any() for g in gradient.values())
    uphill, h = unit(gradient), 0.1
    with torch.no_grad():
        ahead, behind = (float(score(moved(method, uphill, sign * h))) for sign in (1, -1))
    assert (ahead - behind) / (2 * h) == pytest.approx(along(gradient, uphill), rel=0.03)


@pytest.mark.parametrize("second_order", ["exact", "finite_difference"])
@pytest.mark.parametrize("choice", ["csr projection", "csr energy", "cip sigmoid", "cip hinge", "cip heads"])
def test_the_penaltys_gradient_is_that_of_its_value(choice: str, second_order: str, make: Make) -> None:
    objective, kind = choice.split()
    options = [f"method.objective={objective}", f"method.second_order={second_order}", "method.previous=none"]
    options += {
        "projection": ["method.sensitivity=projection"],
        "energy": ["method.sensitivity=energy"],
        "sigmoid": ["method.surrogate=sigmoid"],
        "hinge": ["method.surrogate=hinge"],
        "heads": ["method.granularity=head", "method.xi=0.5"],
    }[kind]
    method = make(*options, "method.beta=3.0", "method.mask_every=0")
    batch = method._batch(0)
    gradients: Tensors = {}

    def update(loss: Tensor, i: int = 0, adjust: Any = None) -> None:
        found = torch.autograd.grad(loss, list(method.job.weights.values()))
        gradients.update(zip(method.job.weights, found, strict=True))

    object.__setattr__(method.job, "update", update)
    logs = method.step(0)

    def penalty(weights: Tensors) -> Tensor:
        """The slow way: the first gradient, then what the docs say of it; mask and threshold stay."""
        if objective == "csr":
            model = method.job.model
            noise = model.predict(
                batch.latents, batch.t, model.encode([method.prompts[i] for i in batch.which]), weights
            )
            scalar = noise.square().mean()
            if kind == "projection":
                scalar = (noise * batch.directions).sum() / noise.numel() ** 0.5
            found = torch.autograd.grad(scalar, list(weights.values()))
            mask = method.neurons.mask()
            chosen = torch.cat([g[mask[key]] for key, g in zip(weights, found, strict=True)])
            return chosen.double().square().mean()
        found = torch.autograd.grad(method._alignment(batch.pictures[-1])(weights), list(weights.values()))
        influence: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
        for key, g in zip(weights, found, strict=True):
            whole = g.abs().double()
            own = whole.reshape(4, -1).mean(1) if kind == "heads" else whole.flatten()
            influence[key.split(".to_")[1][0]].append(own)
        excess = []
        for projection, parts in influence.items():
            first = method.neurons.get_buffer(f"saliency_{projection}").double()
            excess.append((torch.cat(parts) - first.mean()) / first.std(correction=0) - method.xi)
        if kind == "hinge":
            return torch.cat(excess).clamp(min=0).mean()
        return (1 / (1 + torch.exp(-torch.cat(excess) / method.temperature))).mean()

    here = moved(method, method.job.base, 0.0)
    name = "sensitivity_of_noise" if objective == "csr" else "influential"
    assert float(logs[name]) == pytest.approx(float(penalty(here)), rel=1e-3)
    downhill, h = unit(gradients), 0.02
    ahead, behind = (float(penalty(moved(method, downhill, sign * h))) for sign in (1, -1))
    assert (ahead - behind) / (2 * h) == pytest.approx(along(gradients, downhill) / 3.0, rel=0.05)


def test_the_previous_loss_by_hand(make: Make) -> None:
    method = make("method.beta=0", "method.retain=0.5", "method.retain_goal=noise")
    with torch.no_grad():
        for parameter in method.job.weights.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batch, model = method._batch(0), method.job.model
    assert batch.retain is not None and method.paintings is not None
    with torch.no_grad():
        student = model.predict(batch.latents, batch.t, model.encode([method.prompts[i] for i in batch.which]))
        kept = model.encode([method.paintings.prompts[i] for i in batch.retain.which])
        noise = model.predict(batch.retain.latents, batch.retain.t, kept)
        unedited = {key: value.clone() for key, value in method.job.base.items()}
        anchors = model.encode([method.anchors[i] for i in batch.which])
        goal = model.predict(batch.latents, batch.t, anchors, unedited)
    expected = (student - goal).square().mean() + 0.5 * (noise - batch.retain.noise).square().mean()
    method.step(0)
    torch.testing.assert_close(method.losses[0], expected, rtol=1e-4, atol=1e-6)  # type: ignore[attr-defined]
    prompts = dict(zip(method.prompts, method.anchors, strict=True))
    assert prompts["a cat in mosaic style"] == "a dog in mosaic style"


def test_weights_move_only_while_they_are_masked(make: Make) -> None:
    method = make("method.mask_ema=0.0", "method.mask_every=1", "method.steps=6")
    start = {key: p.detach().clone() for key, p in method.job.weights.items()}
    ever = {key: torch.zeros_like(p, dtype=torch.bool) for key, p in start.items()}
    returned = False
    for step in method.batches(0):
        before = {key: p.detach().clone() for key, p in method.job.weights.items()}
        method.step(step)
        mask = method.neurons.mask()
        for key, p in method.job.weights.items():
            assert p[~mask[key]].equal(before[key][~mask[key]])
            # Such a weight has momentum: without care Adam would move it on.
            returned |= bool((ever[key] & ~mask[key]).any())
            ever[key] |= mask[key]
    assert returned
    for key, p in method.job.weights.items():
        assert p[~ever[key]].equal(start[key][~ever[key]])
    changed = sum(int((p != start[key]).sum()) for key, p in method.job.weights.items())
    share = sum(int(m.sum()) for m in ever.values()) / sum(m.numel() for m in ever.values())
    assert 0 < changed <= sum(int(m.sum()) for m in ever.values())
    assert method.neurons.drift()["mask/ever"] == pytest.approx(share)


def test_the_saliency_is_averaged_in_own(make: Make) -> None:
    options = ["method.first_estimates=2", "method.mask_every=2", "method.steps=4"]
    method = make("method.mask_ema=0.75", *options)
    batches = [method._batch(step) for step in method.batches(0)]
    assert [len(batch.pictures) for batch in batches] == [2, 0, 1, 0]

    assert method.own is not None

    def seen(batch: Any, i: int) -> Tensor:
        weights = moved(method, unit(method.job.base), 0.0)
        found = torch.autograd.grad(method._alignment(batch.pictures[i])(weights), list(weights.values()))
        return torch.cat([g.abs().flatten() for key, g in zip(weights, found, strict=True) if ".to_k." in key])

    expected = (seen(batches[0], 0) + seen(batches[0], 1)) / 2
    method.step(0)
    torch.testing.assert_close(method.own.state_dict()["neurons.saliency_k"], expected, rtol=1e-4, atol=1e-9)
    method.step(1)
    expected = 0.75 * expected + 0.25 * seen(batches[2], 0)
    logs = method.step(2)
    torch.testing.assert_close(method.own.state_dict()["neurons.saliency_k"], expected, rtol=1e-4, atol=1e-9)
    assert {"mask/kept", "mask/ever", "mask/jaccard_first", "mask/jaccard_previous"} <= logs.keys()
    assert 0 < logs["mask/jaccard_previous"] <= 1


def test_a_static_mask_is_found_once(make: Make) -> None:
    method = make("method.mask_every=0", "method.steps=3")
    assert [len(method._batch(step).pictures) for step in method.batches(0)] == [1, 0, 0]
    method.step(0)
    mask = method.neurons.mask()
    for step in (1, 2):
        logs = method.step(step)
        assert logs["mask/jaccard_first"] == 1 and logs["mask/jaccard_previous"] == 1
        assert all(m.equal(mask[key]) for key, m in method.neurons.mask().items())


def test_zeroing_sets_the_concept_neurons_to_zero(make: Make) -> None:
    method = make("method.objective=zero", "method.first_estimates=3")
    assert method.optimizers() == [] and method.steps == 1
    assert list(method.batches(0)) == [0] and len(method._batch(0).pictures) == 3
    method.step(0)
    edit, mask = method.finish(), method.neurons.mask()
    assert not edit.delta and sum(int(m.sum()) for m in edit.zero.values()) > 0
    assert all(edit.zero[key].equal(mask[key]) for key in edit.zero)


def test_zeroing_needs_no_optimizer(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    options = ["model=sd15", f"model.path={tiny_pipeline_folder}", "trainer=cpu", "logger=none", "probes=0"]
    options += ["method=trust", "method.objective=zero", "method.sampling_steps=4", "method.first_estimates=1"]
    edit = Edit.load(erase(compose([*options, f"outputs={tmp_path}"])))
    assert edit.zero and not edit.delta


def test_a_mask_that_is_empty_is_refused(make: Make) -> None:
    method = make("method.xi=1e6", "method.mask_every=0")
    with pytest.raises(UserError, match=r"method.xi=1e\+06 leaves no concept neurons: of the weights the largest"):
        method.step(0)


def test_a_saliency_of_no_numbers_is_refused(make: Make) -> None:
    method = make()
    for weight in method.job.weights.values():
        weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="leaves no concept neurons"):
        method.step(0)


def test_a_model_with_a_level_of_noise_alone_has_no_clean_latents(make: Make) -> None:
    job = make().job
    job.model.alphas_cumprod[-1] = 0
    for options in (["method=trust"], ["method=doco"]):
        with pytest.raises(UserError, match="noise alone"):
            instantiate(compose(options).method).begin(job)


@pytest.mark.parametrize(
    "options",
    [
        ["method.objective=csr", "method.previous=none"],
        ["method.objective=csr", "method.previous=none", "method.second_order=finite_difference"],
        ["method.objective=cip", "method.previous=none"],
        ["method.objective=csr", "method.beta=0"],
    ],
)
def test_ranks_share_the_batch_and_add_up_to_one(options: list[str], make: Make) -> None:
    """Two ranks, one after the other: the mean of their gradients is what one process computes alone."""

    def handed_over(mine: slice, known: Sequence[Tensor]) -> tuple[list[Tensor], Tensors]:
        """What a rank hands to `total` while it gets `known` from there, and its gradients."""
        method = make(*options, "method.batch_size=4", "method.xi=1.5")
        handed: list[Tensor] = []

        def total(tensor: Tensor) -> Tensor:
            handed.append(tensor.clone())
            return known[len(handed) - 1].clone() if len(handed) <= len(known) else tensor

        object.__setattr__(method.job, "mine", mine)
        object.__setattr__(method.job, "total", total)
        object.__setattr__(method.job, "update", lambda loss, i=0, adjust=None: loss.backward())
        method.world = mine.step or 1
        method.step(0)
        return handed, {key: p.grad for key, p in method.job.weights.items() if p.grad is not None}

    alone, whole = handed_over(slice(None), [])
    known: list[Tensor] = []
    # What is handed over depends on what came back before: with each round one more total is right.
    for _ in range(len(alone) + 1):
        (first, one), (second, other) = (handed_over(slice(rank, None, 2), known) for rank in (0, 1))
        known = [a + b for a, b in zip(first, second, strict=True)][: len(known) + 1]
    assert len(known) == len(alone) > 0
    for key, expected in whole.items():
        mean = (one[key] + other[key]) / 2
        torch.testing.assert_close(mean, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_a_beta_of_the_other_objective_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="experiment=trust/cip"):
        instantiate(compose(["method=trust", "method.objective=cip"]).method)


def test_a_concept_with_nothing_to_retain_is_refused_at_once() -> None:
    concept = instantiate(compose(["concept=cat"]).concept)
    only = replace(concept.evaluation, in_domain={"object/cat": "a cat"})
    lonely = replace(concept, neighbours=(), evaluation=only)
    assert not lonely.retain_prompts()
    with pytest.raises(UserError, match=r"names nothing that must; without: method\.retain=0"):
        instantiate(compose(["method=trust"]).method).check(lonely)
    instantiate(compose(["method=trust", "method.retain=0"]).method).check(lonely)


@pytest.mark.parametrize("image", ["one_step", "trajectory"])
@pytest.mark.parametrize("latents", ["bank", "student"])
def test_a_batch_is_a_function_of_seed_and_step(image: str, latents: str, make: Make) -> None:
    method, again = (make(f"method.image={image}", f"method.latents={latents}", "method.steps=3") for _ in range(2))
    for step in (2, 0):
        one, other = method._batch(step), again._batch(step)
        assert one.latents.equal(other.latents) and one.directions.equal(other.directions)
        assert one.retain is not None and other.retain is not None and one.retain.latents.equal(other.retain.latents)
        for mine, theirs in zip(one.pictures, other.pictures, strict=True):
            assert mine.seeds == theirs.seeds and mine.prompts == theirs.prompts
            if image == "one_step":
                assert mine.latents is not None and theirs.latents is not None and mine.latents.equal(theirs.latents)


def test_trajectories_under_way_go_on_as_the_model_under_training_paints(make: Make) -> None:
    options = ["method.latents=student", "method.sampling_steps=4", "method.sampling_guidance=2.0", "method.steps=3"]
    method = make(*options)
    with torch.no_grad():
        for parameter in method.job.weights.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    own, model = method.underway, method.job.model
    drawn = own.drawn(0, 2)
    latents, t, which = own.at(drawn)
    text, empty = model.encode([method.prompts[i] for i in which]), model.encode([""])
    expected = []
    with torch.no_grad():
        for i, row in enumerate(drawn.tolist()):
            if own.k[row] + 1 < 4:
                without, asked = (model.predict(latents[i : i + 1], t[i : i + 1], e[:1]) for e in (empty, text[i:]))
                eps = without + 2.0 * (asked - without)
                later = own.scheduler.timesteps[own.k[row] + 1]
                here, there = model.alphas_cumprod[t[i]], model.alphas_cumprod[later]
                clean = (latents[i : i + 1] - (1 - here).sqrt() * eps) / here.sqrt()
                expected.append((row, there.sqrt() * clean + (1 - there).sqrt() * eps))
    method.step(0)
    assert expected
    for row, latent in expected:
        torch.testing.assert_close(own.latents[row : row + 1], latent, rtol=1e-4, atol=1e-5)


def test_the_aligner_is_one_override_away() -> None:
    cfg = compose(["method=trust", "concept=mosaic", "aligner@method.aligner=detector"])
    assert cfg.method.aligner.labels == ["style/mosaic"]
    method = instantiate(cfg.method)
    assert type(method.aligner).__name__ == "DetectorAligner"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("objective=cap", "did you mean cip"),
        ("surrogate=count", "method.surrogate"),
        ("latents=studnt", "did you mean student"),
        ("steps=0", "method.steps"),
        ("lr=0", "lr"),
        ("beta=-1", "beta"),
        ("mask_ema=1.0", "mask_ema"),
        ("mask_every=-1", "mask_every"),
    ],
)
def test_bad_options_are_refused(option: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        instantiate(compose(["method=trust", f"method.{option}"]).method)


def test_options_that_do_not_go_together_are_refused() -> None:
    for options, said in [
        (["method.previous=none", "method.beta=0"], "nothing to learn"),
        (["method.image=trajectory", "method.gradient_steps=51"], "gradient_steps"),
    ]:
        with pytest.raises(UserError, match=said):
            instantiate(compose(["method=trust", *options]).method)
