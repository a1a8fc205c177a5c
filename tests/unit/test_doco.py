"""DoCo's parts against cases worked out by hand, and its steps on the tiny pipeline."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F

from unpaint.config import compose, instantiate
from unpaint.edit import Edit
from unpaint.errors import UserError
from unpaint.methods.base import Job
from unpaint.methods.doco import Batch, DoCo, clean_latents, first_token_detached, operate, patch_discriminator
from unpaint.model import load_model
from unpaint.run import erase

Begun = Callable[..., tuple[DoCo, list[Tensor]]]
Started = Callable[..., DoCo]
FEW = ["method=doco", "method.anchor_pictures=4", "method.prior_pictures=4", "method.batch_size=2"]


def vector(x: float, y: float) -> Tensor:
    return torch.tensor([float(x), float(y)])


# --- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("surgery", "strength", "expected"),
    [
        # adversarial (-3, 4), prior (2, 0): product -6, cosine -6 / (5 * 2) = -0.6
        ("projection", 1.0, (0.0, 4.0)),
        ("projection", 0.5, (-1.5, 4.0)),
        ("cosine", 1.0, (-2.4, 4.0)),
        ("cosine", 0.5, (-2.7, 4.0)),
    ],
)
def test_surgery_where_gradients_conflict(surgery: str, strength: float, expected: tuple[float, float]) -> None:
    torch.testing.assert_close(operate(vector(-3, 4), vector(2, 0), surgery, strength), vector(*expected))


def test_only_the_projection_keeps_its_measure_when_the_gradient_is_small() -> None:
    small, prior = 1e-3 * vector(-3, 4), vector(2, 0)
    torch.testing.assert_close(operate(small, prior, "projection"), 1e-3 * vector(0, 4))
    # The cosine's correction does not shrink with the gradient and drowns it: -0.003 + 0.6.
    torch.testing.assert_close(operate(small, prior, "cosine"), vector(0.597, 0.004))


@pytest.mark.parametrize("surgery", ["projection", "cosine"])
@pytest.mark.parametrize("prior", [(2.0, 0.0), (0.0, 0.0), (4.0, -3.0)], ids=["agree", "no prior", "orthogonal"])
def test_surgery_leaves_the_rest_alone(surgery: str, prior: tuple[float, float]) -> None:
    assert operate(vector(3, 4), vector(*prior), surgery).equal(vector(3, 4))


def test_clean_latents() -> None:
    noised, noise = torch.tensor([5.0, -2.0]).view(2, 1, 1, 1), torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    # (5 - sqrt(1 - 0.64) * 1) / sqrt(0.64) = 5.5; (-2 - sqrt(1 - 0.04) * 3) / sqrt(0.04), far out and not clipped
    expected = torch.tensor([5.5, (-2 - 3 * math.sqrt(0.96)) / 0.2]).view(2, 1, 1, 1)
    torch.testing.assert_close(clean_latents(noised, noise, torch.tensor([0.64, 0.04])), expected)


@pytest.mark.parametrize(
    ("shape", "logits", "channels"),
    [
        ((4, 64, 64), (3, 3), [64, 128, 256, 512, 1]),
        ((8, 16, 16), (3, 3), [64, 128, 1]),
        ((4, 8, 8), (3, 3), [64, 1]),
        ((4, 4, 4), (3, 3), [1]),
        ((4, 96, 96), (5, 5), [64, 128, 256, 512, 1]),
        ((4, 16, 24), (3, 5), [64, 128, 1]),
    ],
)
def test_the_discriminator_follows_the_latents(
    shape: tuple[int, int, int], logits: tuple[int, int], channels: list[int]
) -> None:
    network = patch_discriminator(shape, width=64, seed=0)
    assert network(torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))).shape == (2, 1, *logits)
    assert [layer.out_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)] == channels


def test_the_discriminator_judges_each_picture_alone_and_is_a_function_of_its_seed() -> None:
    before = torch.get_rng_state()
    one, same, other = (patch_discriminator((8, 16, 16), 16, seed).state_dict() for seed in (1, 1, 2))
    assert torch.get_rng_state().equal(before)
    assert all(one[key].equal(same[key]) for key in one)
    assert not one["0.weight"].equal(other["0.weight"])
    network = patch_discriminator((8, 16, 16), 16, 1)
    latents = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(latents)[:1], network(latents[:1]))
    with pytest.raises(UserError, match="at least 4 x 4"):
        patch_discriminator((4, 2, 8), 16, 1)


def test_the_first_token_is_detached_and_nothing_stays_hooked(tiny_pipe: Any) -> None:
    unet = tiny_pipe.unet
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_v
    latents, text = torch.zeros(1, 4, 8, 8), torch.ones(1, 1, 32)

    def reached() -> bool:
        """Whether any gradient of a text of nothing but the first token reaches the weights."""
        output = unet(latents, 10, encoder_hidden_states=text).sample.square().sum()
        return bool(torch.autograd.grad(output, layer.weight)[0].any())

    assert reached()
    with first_token_detached(unet):
        assert not reached()
    assert reached()


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(tiny_pipeline_folder: Path, tmp_path: Path) -> Started:
    """`started("method.warm_up=0", ...)`: the method on the tiny pipeline with a job that really trains, as
    `training.erasing` does it."""

    def start(*options: str) -> DoCo:
        cfg = compose(["model=sd15", f"model.path={tiny_pipeline_folder}", *FEW, "method.sampling_steps=2", *options])
        method: DoCo = instantiate(cfg.method)
        model = load_model(cfg.model)
        weights = model.group(method.group)
        for weight in weights.values():
            weight.requires_grad_(True)
        optimizers: list[torch.optim.Optimizer] = []

        def update(loss: Tensor, i: int = 0) -> None:
            optimizers[i].zero_grad()
            loss.backward()
            optimizers[i].step()

        method.begin(
            Job(
                model=model,
                concept=instantiate(cfg.concept),
                beside=(),
                seed=0,
                weights=weights,
                base=model.base_weights(method.group),
                config={},
                cache=tmp_path,
                mine=slice(None),
                update=update,
                step=lambda i=0: optimizers[i].step(),
                total=lambda tensor: tensor,
                progress=lambda text, total: lambda n: None,
                account=lambda seconds: None,
            )
        )
        optimizers += method.optimizers()
        return method

    return start


def state(method: DoCo) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    weights = {key: weight.detach().clone() for key, weight in method.job.weights.items()}
    return weights, {key: value.clone() for key, value in method.own.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(one[key].equal(other[key]) for key in one)


def prompts_of(batch: Batch, prompts: list[str]) -> list[str]:
    return [prompts[i] for i in batch.anchor.which.tolist()]


def test_targets_say_what_anchors_say(started: Started) -> None:
    method = started()
    said = dict(zip(method.targets, method.anchors, strict=True))
    assert said["a picture of a cat"] == "a picture of a dog"
    assert said["a kitten in mosaic style"] == "a dog in mosaic style"
    assert all("cat" not in prompt for prompt in method.retained)
    assert "a dog in mosaic style" in method.retained
    plain = started("method.erase_phrases=false", "method.prior_prompts=anchor")
    assert "a kitten in mosaic style" not in plain.targets
    assert plain.retained is plain.anchors and plain.prior_bank is plain.anchor_bank


def test_warm_up_trains_the_discriminator_alone(started: Started) -> None:
    method = started("method.steps=4", "method.warm_up=0.5")
    for batch in method.batches(0):
        weights, own = state(method)
        logs = method.step(batch)
        after = state(method)
        assert same(weights, after[0]) == (batch.step < 2) == ("generator" not in logs)
        assert not same(own, after[1])


def test_the_discriminators_loss_is_on_the_clean_latents_of_both_domains(started: Started) -> None:
    method = started("method.warm_up=0")
    seen: list[Tensor] = []
    object.__setattr__(method.job, "update", lambda loss, i: seen.append(loss))
    batch = next(method.batches(0))
    model, noised = method.job.model, batch.anchor
    with torch.no_grad():

        def judged(prompts: list[str]) -> Tensor:
            noise = model.pipe.unet(noised.latents, noised.t, model.encode(prompts_of(batch, prompts))).sample
            abar = model.alphas_cumprod[noised.t].view(-1, 1, 1, 1)
            return method.own((noised.latents - (1 - abar).sqrt() * noise) / abar.sqrt())

        # Real is 0 and fake is 1: -log(1 - sigmoid(r)) = softplus(r), -log sigmoid(f) = softplus(-f).
        real, fake = judged(method.anchors), judged(method.targets)
    logs = method.step(batch)
    torch.testing.assert_close(seen[0], F.softplus(real).mean() + F.softplus(-fake).mean())
    torch.testing.assert_close(logs["generator"], F.softplus(fake).mean())


def test_a_step_of_one_network_does_not_move_the_other(started: Started) -> None:
    method = started("method.warm_up=0")
    batch = next(method.batches(0))
    job = method.job
    before = state(method)
    train_discriminator = job.update
    object.__setattr__(job, "update", lambda loss, i: None)
    method.step(batch)
    moved = state(method)
    assert not same(before[0], moved[0]) and same(before[1], moved[1])
    assert all(parameter.grad is None for parameter in method.own.parameters())
    object.__setattr__(job, "update", train_discriminator)
    object.__setattr__(job, "step", lambda i: None)
    method.step(batch)
    again = state(method)
    assert same(moved[0], again[0]) and not same(moved[1], again[1])


def test_accumulated_adds_the_adversarial_gradient_to_the_discriminators(started: Started) -> None:
    """As if no one cleared the discriminator's gradients after the model's loss was back-propagated."""

    def gradients(option: str) -> tuple[list[Tensor], list[Tensor]]:
        method = started("method.warm_up=0", f"method.discriminator_gradients={option}")
        batch = next(method.batches(0))
        found: list[Tensor] = []
        parameters = list(method.own.parameters())
        object.__setattr__(method.job, "update", lambda loss, i: found.extend(torch.autograd.grad(loss, parameters)))
        with torch.no_grad():
            fake = method._clean(batch.anchor, method.targets)
        deceit = torch.autograd.grad(F.softplus(method.own(fake)).mean(), parameters)
        method.step(batch)
        return found, list(deceit)

    clean, deceit = gradients("clean")
    accumulated, _ = gradients("accumulated")
    for one, other, extra in zip(clean, accumulated, deceit, strict=True):
        torch.testing.assert_close(other, one + extra, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("surgery", ["projection", "cosine", "none"])
def test_the_models_gradient(surgery: str, started: Started) -> None:
    """Against a slow one: two backward passes, torch's own clipping over all tensors, the surgery written out."""
    options = ["method.max_grad_norm=1e-3", "method.surgery_strength=0.7", "method.prior_weight=2.0"]
    method = started("method.warm_up=0", f"method.surgery={surgery}", *options)
    model, weights = method.job.model, list(method.job.weights.values())
    batch = next(method.batches(0))

    def predicted(which: str, prompts: list[str]) -> Tensor:
        noised = getattr(batch, which)
        return model.predict(noised.latents, noised.t, model.encode([prompts[i] for i in noised.which.tolist()]))

    def clipped(loss: Tensor) -> list[Tensor]:
        for weight in weights:
            weight.grad = None
        loss.backward()
        assert nn.utils.clip_grad_norm_(weights, 1e-3) > 1e-3
        return [weight.grad.clone() for weight in weights if weight.grad is not None]

    fake = clean_latents(
        batch.anchor.latents, predicted("anchor", method.targets), model.alphas_cumprod[batch.anchor.t]
    )
    deceit = F.softplus(method.own(fake)).mean()
    kept = (predicted("prior", method.retained) - batch.prior.noise).square().mean()
    if surgery == "none":
        expected = clipped(deceit + 2.0 * kept)
    else:
        expected, conflicts = [], 0
        for a, p in zip(clipped(deceit), clipped(kept), strict=True):
            product = float(a.flatten() @ p.flatten())
            conflicts += product < 0
            length = product / p.norm() if surgery == "projection" else product / p.norm() / a.norm()
            expected.append(a - 0.7 * length * p / p.norm() if product < 0 else a)
        assert 0 < conflicts < len(weights), "the case would test only half of it"
    found: list[Tensor] = []
    object.__setattr__(method.job, "step", lambda i: found.extend(w.grad for w in weights if w.grad is not None))
    method.step(batch)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-8)


def test_ranks_share_the_batch_and_add_up_to_one(started: Started) -> None:
    """Two ranks, one after the other: what both hand to `total` adds up to what one process computes alone."""

    def handed_over(*mine: int | None) -> list[Tensor]:
        method = started("method.warm_up=0", "method.batch_size=4")
        found: list[Tensor] = []

        def total(tensor: Tensor) -> Tensor:
            found.append(tensor.clone())
            return tensor

        object.__setattr__(method.job, "mine", slice(*mine))
        object.__setattr__(method.job, "total", total)
        batch = next(method.batches(0))
        assert len(batch.anchor.t) == len(batch.prior.t) == (4 if mine == (None,) else 2)
        method.step(batch)
        return found

    alone = handed_over(None)
    assert len(alone) == 2
    for whole, first, second in zip(alone, handed_over(0, None, 2), handed_over(1, None, 2), strict=True):
        torch.testing.assert_close((first + second) / 2, whole, rtol=1e-3, atol=1e-6)


def test_batches_are_a_function_of_seed_and_step(begun: Begun) -> None:
    def rows(start: int) -> list[Batch]:
        return list(begun(*FEW, "method.steps=4")[0].batches(start))

    whole, tail = rows(0), rows(2)
    assert [batch.step for batch in tail] == [2, 3]
    for one, other in zip(whole[2:], tail, strict=True):
        for a, b in ((one.anchor, other.anchor), (one.prior, other.prior)):
            assert a.latents.equal(b.latents) and a.t.equal(b.t) and a.noise.equal(b.noise) and a.which.equal(b.which)
    assert not whole[0].anchor.noise.equal(whole[0].prior.noise)


# --- whole runs -------------------------------------------------------------------------------------------------------


def tiny_run(folder: Path, outputs: Path, *options: str) -> DictConfig:
    own = ["logger=csv", "probes=0", "trainer=cpu", "checkpoint_seconds=0", f"outputs={outputs}"]
    short = ["method.steps=4", "method.warm_up=0.25", "method.sampling_steps=2"]
    return compose(["model=sd15", f"model.path={folder}", *own, *FEW, *short, *options])


def test_interrupted_and_resumed_equals_uninterrupted(
    tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both optimisers, the weights and the discriminator come back: the same bytes."""
    whole = erase(tiny_run(tiny_pipeline_folder, tmp_path / "whole")).read_bytes()
    steps = []
    really = DoCo.step

    def stops_once(self: DoCo, batch: Batch) -> dict[str, Tensor]:
        steps.append(batch.step)
        if steps == [0, 1, 2]:
            raise KeyboardInterrupt
        return really(self, batch)

    monkeypatch.setattr(DoCo, "step", stops_once)
    cfg = tiny_run(tiny_pipeline_folder, tmp_path / "stopped")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        erase(cfg)
    assert any((tmp_path / "stopped").rglob("last.ckpt"))
    assert erase(cfg).read_bytes() == whole
    assert steps == [0, 1, 2, 2, 3]


def test_other_weights_can_be_trained(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    options = ["method.variant=all", "method.surgery=none", "method.bos=detached"]
    edit = Edit.load(erase(tiny_run(tiny_pipeline_folder, tmp_path, *options)))
    assert any("attn2" not in key for key in edit.delta)


@pytest.mark.parametrize(
    "option",
    [
        "variant=kv",
        "surgery=project",
        "prior_prompts=retained",
        "discriminator_gradients=dirty",
        "bos=frozen",
        "warm_up=1.0",
        "steps=0",
        "lr=0",
        "prior_weight=-1",
    ],
)
def test_bad_options_are_refused(option: str) -> None:
    arguments: Any = compose(["method=doco", f"method.{option}"]).method
    with pytest.raises(UserError, match=option.split("=")[0]):
        instantiate(arguments)


def test_a_concept_without_anything_to_keep_takes_the_anchors_pictures() -> None:
    cfg = compose(["method=doco", "concept=cat"])
    alone = instantiate(cfg.concept)
    object.__setattr__(alone.evaluation, "in_domain", {})
    with pytest.raises(UserError, match="prior_prompts=anchor"):
        instantiate(cfg.method).check(alone)
    instantiate(compose(["method=doco", "method.prior_prompts=anchor"]).method).check(alone)
