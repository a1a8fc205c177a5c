"""ESD's step against the formula, worked out by hand on the tiny pipeline."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from unpaint.config import compose, instantiate
from unpaint.methods.esd import ESD, Batch, Rows
from unpaint.sampling import noise

Begun = Callable[..., tuple[ESD, list[torch.Tensor]]]


def a_batch(method: ESD, prompts: list[str]) -> Batch:
    latents = noise(range(len(prompts)), method.job.model.latent_shape)
    return Batch(0, latents, torch.tensor([900, 100][: len(prompts)]), prompts)


def test_the_loss_is_equation_7(begun: Begun) -> None:
    method, losses = begun("method.negative_guidance=2.0")
    batch = a_batch(method, ["a cat", "a kitten in neon style"])
    unet, model = method.job.model.pipe.unet, method.job.model
    with torch.no_grad():
        for parameter in method.job.weights.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))

        def predicted(prompt: str, row: int) -> torch.Tensor:
            return unet(batch.latents[row : row + 1], batch.t[row], model.encode([prompt])).sample

        student = [predicted(prompt, row) for row, prompt in enumerate(batch.prompts)]
        trained = {key: p.clone() for key, p in method.job.weights.items()}
        for key, parameter in method.job.weights.items():
            parameter.copy_(method.job.base[key])
        errors = []
        for row, prompt in enumerate(batch.prompts):
            direction = predicted("a cat", row) - predicted("", row)
            goal = predicted(prompt, row) - 3.0 * direction
            if prompt == "a cat":  # the form in the paper
                torch.testing.assert_close(goal, predicted("", row) - 2.0 * direction)
            errors.append((student[row] - goal).square().mean())
        for key, parameter in method.job.weights.items():
            parameter.copy_(trained[key])
    method.step(batch)
    torch.testing.assert_close(losses[0], torch.stack(errors).mean(), rtol=1e-4, atol=1e-6)


def test_erase_from_starts_from_what_it_is_erased_from(begun: Begun) -> None:
    method, losses = begun("method.erase_from=a dog", "method.negative_guidance=1")
    assert method.prompts == ["a dog"]
    batch = a_batch(method, ["a dog"])
    model = method.job.model
    with torch.no_grad():
        cat, empty = (model.predict(batch.latents, batch.t, model.encode([p])) for p in ("a cat", ""))
        # Before the first step the student is the teacher, so only the direction away from the concept remains.
        expected = (2.0 * (cat - empty)).square().mean()
    method.step(batch)
    torch.testing.assert_close(losses[0], expected, rtol=1e-4, atol=1e-7)


def test_the_students_trajectories_move_on_by_what_it_predicts(begun: Begun) -> None:
    options = ["method.bank_size=9", "method.batch_size=4", "method.steps=2", "method.sampling_guidance=3.0"]
    method, _ = begun("method.latents=student", *options)
    own, model = method.own, method.job.model
    assert own is not None
    with torch.no_grad():
        for parameter in method.job.weights.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    before = own.latents.clone(), own.k.clone(), own.which.clone()
    rows = next(method.batches(0))
    assert isinstance(rows, Rows)
    method.step(rows)
    drawn = set(rows.which.tolist())
    assert len(drawn) == 4
    scheduler = model.pipe.scheduler.from_config(model.scheduler_config)
    scheduler.set_timesteps(4)
    for row in range(9):
        latents, k, which = (part[row] for part in before)
        if row not in drawn:
            assert own.latents[row].equal(latents) and own.k[row] == k and own.which[row] == which
            continue
        if k == 3:  # arrived: it starts again from noise
            assert own.k[row] == 0 and abs(own.latents[row].std() - 1) < 0.3
            continue
        assert own.k[row] == k + 1
        x, t = latents[None], scheduler.timesteps[k]
        with torch.no_grad():
            asked = model.predict(x, t, model.encode([method.prompts[which]]))
            nothing = model.predict(x, t, model.encode([""]))
        expected = scheduler.step(nothing + 3.0 * (asked - nothing), t, x, return_dict=False)[0]
        torch.testing.assert_close(own.latents[row : row + 1], expected, rtol=1e-4, atol=1e-4)


def test_the_rate_falls_in_a_straight_line_wherever_one_begins(begun: Begun) -> None:
    method, _ = begun("method.steps=4", "method.lr=1e-3", "method.latents=fresh")
    (optimizer,) = method.optimizers()
    seen = []
    for batch in method.batches(2):
        method.step(batch)
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx([0.5e-3, 0.25e-3])


@pytest.mark.parametrize("latents", ["bank", "fresh"])
def test_batches_are_a_function_of_seed_and_step(latents: str, begun: Begun) -> None:
    def rows(start: int) -> list[Batch]:
        method, _ = begun(f"method.latents={latents}", "method.steps=4")
        return [batch for batch in method.batches(start) if isinstance(batch, Batch)]

    whole, tail = rows(0), rows(2)
    assert len(whole) == 4 and len(tail) == 2
    for one, other in zip(whole[2:], tail, strict=True):
        assert one.latents.equal(other.latents) and one.t.equal(other.t) and one.prompts == other.prompts
    assert not whole[0].latents.equal(whole[1].latents)


@pytest.mark.parametrize("latents", ["student", "bank", "fresh"])
def test_ranks_share_a_batch_without_overlap(latents: str, begun: Begun) -> None:
    method, _ = begun(f"method.latents={latents}")

    def first() -> Batch:
        batch = next(method.batches(0))
        return batch if isinstance(batch, Batch) else method._under_way(batch)

    whole = first()
    parts = []
    for rank in (0, 1):
        object.__setattr__(method.job, "mine", slice(rank, None, 2))
        parts.append(first())
    assert [len(part.t) for part in parts] == [4, 4]
    for rank, part in enumerate(parts):
        torch.testing.assert_close(part.latents, whole.latents[rank::2], rtol=1e-4, atol=1e-5)
        assert part.prompts == whole.prompts[rank::2]


@pytest.mark.parametrize(
    ("option", "said"),
    [("variant=y", "method.variant"), ("latents=stale", "method.latents"), ("steps=0", "method.steps"), ("lr=0", "lr")],
)
def test_bad_options_are_refused(option: str, said: str) -> None:
    from unpaint.errors import UserError

    arguments: Any = compose([f"method.{option}"]).method
    with pytest.raises(UserError, match=said):
        instantiate(arguments)


def test_in_a_set_each_prompt_loses_its_own_member(begun: Begun) -> None:
    options = ("concept=pets", "method.latents=fresh")
    method, losses = begun(*options, "method.negative_guidance=1")
    assert method.bare["a kitten in neon style"] == "a cat"
    assert method.bare["a puppy in neon style"] == "a dog"
    batch = a_batch(method, ["a cat", "a dog"])
    model = method.job.model
    with torch.no_grad():
        bare, empty = (model.predict(batch.latents, batch.t, model.encode(p)) for p in (["a cat", "a dog"], [""] * 2))
        expected = (2.0 * (bare - empty)).square().mean()
    method.step(batch)
    torch.testing.assert_close(losses[0], expected, rtol=1e-4, atol=1e-7)
    method, _ = begun(*options, "method.prompts=concept")
    assert sorted(method.prompts) == ["a bird", "a cat", "a dog", "a fish"]


def test_erase_from_takes_one_concept() -> None:
    from unpaint.errors import UserError

    cfg = compose(["concept=pets", "method.erase_from=a cat"])
    with pytest.raises(UserError, match="'pets' is a set"):
        instantiate(cfg.method).check(instantiate(cfg.concept))
