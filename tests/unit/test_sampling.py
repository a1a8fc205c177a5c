"""Painting, partial denoising and the bank, on tiny pipelines: same as diffusers, and the same bits every time."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from unpaint.errors import UserError
from unpaint.latents import Bank, Paintings, Underway
from unpaint.model import TextToImage, load_model
from unpaint.sampling import Sampler, denoise_on, denoise_to, noise, paint
from unpaint.seeds import NAMESPACES, seed_of

PROMPTS = ["a cat", "a dog at night", "two birds", "a house", "a cat", "a boat on a beach"]
SEEDS = [3, 1, 4, 15, 92, 65]
SAMPLER = Sampler(steps=4, guidance=3.0)


@pytest.fixture(scope="module")
def eps_model(tiny_pipeline_folder: Path) -> TextToImage:
    return load_model({"name": "tiny", "path": str(tiny_pipeline_folder), "device": "cpu"})


@pytest.fixture(scope="module")
def v_model(tiny_v_pipeline_folder: Path) -> TextToImage:
    return load_model({"name": "tiny-v", "path": str(tiny_v_pipeline_folder), "device": "cpu"})


def painted(model: TextToImage, prompts: list[str], seeds: list[int], batch_size: int = 4) -> torch.Tensor:
    return torch.cat(list(paint(model, prompts, seeds, SAMPLER, batch_size)))


def test_seeds_are_stable_and_namespaces_never_meet() -> None:
    assert seed_of("score", 0, 7) == 670850851  # written down once: a change would repaint everybody's pictures
    drawn = {space: {seed_of(space, s, i) for s in range(3) for i in range(500)} for space in NAMESPACES}
    assert all(len(seeds) == 1500 and max(seeds) < 2**32 for seeds in drawn.values())
    assert len(set.union(*drawn.values())) == 1500 * len(drawn)
    assert {seed % 8 for seed in drawn["bank"]} == {0}
    assert seed_of("tune", 1, 23) != seed_of("tune", 12, 3)
    with pytest.raises(ValueError, match="did you mean score"):
        seed_of("scores", 0)


def test_noise_of_a_picture_is_its_own() -> None:
    together = noise([1, 2, 3], (4, 8, 8))
    assert torch.equal(noise([3], (4, 8, 8))[0], together[2])
    theirs = torch.randn(1, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(2))
    assert torch.equal(together[1:2], theirs)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("kind", ["eps_model", "v_model"])
def test_paints_what_diffusers_paints(kind: str, guidance: float, eta: float, request: pytest.FixtureRequest) -> None:
    from diffusers import DDIMScheduler

    model: TextToImage = request.getfixturevalue(kind)
    sampler = Sampler(steps=5, guidance=guidance, eta=eta)
    ours = torch.cat(list(paint(model, PROMPTS[:3], SEEDS[:3], sampler, batch_size=2)))
    pipe = model.pipe
    theirs = []
    before = pipe.scheduler
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    try:
        for prompt, seed in zip(PROMPTS[:3], SEEDS[:3], strict=True):
            picture = pipe(
                prompt,
                generator=torch.Generator("cpu").manual_seed(seed),
                num_inference_steps=5,
                guidance_scale=guidance,
                eta=eta,
            ).images[0]
            theirs.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    finally:
        pipe.scheduler = before
    difference = (ours.int() - torch.stack(theirs).int()).abs()
    assert ours.dtype == torch.uint8
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3
    assert ours.float().std() > 1  # not a uniform picture that anything would match


def test_bits_do_not_depend_on_how_many_are_painted(eps_model: TextToImage) -> None:
    everything = painted(eps_model, PROMPTS, SEEDS)
    assert len(everything) == len(PROMPTS)
    assert torch.equal(painted(eps_model, PROMPTS[:5], SEEDS[:5]), everything[:5])
    assert torch.equal(painted(eps_model, PROMPTS[4:], SEEDS[4:]), everything[4:])
    for first in (0, 4):
        part = painted(eps_model, PROMPTS[first : first + 1], SEEDS[first : first + 1])
        assert torch.equal(part, everything[first : first + 1])


def test_bits_do_not_depend_on_the_neighbours(eps_model: TextToImage) -> None:
    one = painted(eps_model, ["a cat", "a dog", "a tree"], [1, 2, 3])
    two = painted(eps_model, ["a cat", "a fish", "a house", "a boat"], [1, 12, 13, 14])
    assert torch.equal(one[0], two[0])
    assert not torch.equal(one[1], two[1])


def test_batches_are_yielded_as_they_come(eps_model: TextToImage) -> None:
    done: list[int] = []
    batches = paint(eps_model, PROMPTS, SEEDS, SAMPLER, 4, progress=done.append)
    first = next(batches)
    assert first.shape[0] == 4
    assert not torch.is_inference_mode_enabled()
    assert not first.is_inference()
    assert [len(batch) for batch in batches] == [2]
    assert done == [4, 2]
    assert list(paint(eps_model, [], [], SAMPLER)) == []


def test_negative_prompt_and_weights_reach_the_network(eps_model: TextToImage) -> None:
    plain = painted(eps_model, PROMPTS[:1], SEEDS[:1])
    negative = next(paint(eps_model, PROMPTS[:1], SEEDS[:1], SAMPLER, 4, negative="a dog"))
    assert not torch.equal(plain, negative)
    doubled = {key: 2 * value for key, value in eps_model.base_weights("not_cross_attention").items()}
    assert not torch.equal(plain, next(paint(eps_model, PROMPTS[:1], SEEDS[:1], SAMPLER, 4, weights=doubled)))
    base = eps_model.base_weights("all")
    assert torch.equal(plain, next(paint(eps_model, PROMPTS[:1], SEEDS[:1], SAMPLER, 4, weights=base)))


def test_bad_arguments(eps_model: TextToImage) -> None:
    with pytest.raises(ValueError, match="2 prompts, 1 seeds"):
        paint(eps_model, ["a", "b"], [1], SAMPLER)
    with pytest.raises(UserError, match="at least 1 step"):
        Sampler(steps=0)
    with pytest.raises(UserError, match="guidance"):
        Sampler(guidance=0.5)
    with pytest.raises(UserError, match="noise levels"):
        paint(eps_model, ["a"], [1], Sampler(steps=1001))
    with pytest.raises(ValueError, match="k is between 0 and 3"):
        denoise_to(eps_model, eps_model.encode(["a"]), eps_model.encode([""]), [1], 4, SAMPLER)


def test_no_step_is_the_noise_at_the_first_level(eps_model: TextToImage) -> None:
    text, empty = eps_model.encode(PROMPTS[:2]), eps_model.encode([""])
    latents, t = denoise_to(eps_model, text, empty, SEEDS[:2], 0, SAMPLER)
    assert torch.equal(latents, noise(SEEDS[:2], eps_model.latent_shape))
    assert t.tolist() == [SAMPLER.timesteps(eps_model)[0].item()] * 2


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["eps_model", "v_model"])
def test_partial_denoising_is_a_full_run_stopped_at_k(kind: str, eta: float, request: pytest.FixtureRequest) -> None:
    from diffusers import DDIMScheduler

    model: TextToImage = request.getfixturevalue(kind)
    sampler = dataclasses.replace(SAMPLER, eta=eta)
    states: dict[int, torch.Tensor] = {}

    def keep(pipe: object, step: int, t: torch.Tensor, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        states[step + 1] = values["latents"].clone()
        return {}

    pipe = model.pipe
    before = pipe.scheduler
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    try:
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS[:4]]
        pipe(
            PROMPTS[:4],
            generator=generators,
            num_inference_steps=4,
            guidance_scale=3.0,
            eta=eta,
            callback_on_step_end=keep,
            output_type="latent",
        )
    finally:
        pipe.scheduler = before
    states[0] = noise(SEEDS[:4], model.latent_shape)
    k = torch.tensor([2, 0, 3, 1])
    latents, t = denoise_to(model, model.encode(PROMPTS[:4]), model.encode([""]), SEEDS[:4], k, sampler)
    assert t.tolist() == sampler.timesteps(model)[k].tolist()
    for row, steps in enumerate(k.tolist()):
        torch.testing.assert_close(latents[row], states[steps][row], rtol=1e-4, atol=1e-4)
    again, _ = denoise_to(model, model.encode(PROMPTS[:4]), model.encode([""]), SEEDS[:4], k, sampler)
    assert torch.equal(latents, again)


def test_partially_denoised_latents_can_be_trained_on(tiny_pipeline_folder: Path) -> None:
    model = load_model({"name": "tiny", "path": str(tiny_pipeline_folder), "device": "cpu"})
    base = model.base_weights("all")
    text, empty = model.encode(PROMPTS[:2]), model.encode([""])
    expected, _ = denoise_to(model, text, empty, SEEDS[:2], 2, SAMPLER)
    for parameter in model.group("all").values():
        parameter.requires_grad_(True)
        parameter.data.mul_(1.2)
    latents, t = denoise_to(model, text, empty, SEEDS[:2], 2, SAMPLER, weights=base)
    assert torch.equal(latents, expected)
    model.predict(latents, t, text).square().mean().backward()
    assert all(p.grad is not None for p in model.group("cross_attention").values())


@pytest.mark.parametrize("k", [0, 3])
def test_the_rest_of_the_way_ends_in_the_painting_and_has_its_gradient(eps_model: TextToImage, k: int) -> None:
    text, empty = eps_model.encode(PROMPTS[:2]), eps_model.encode([""])
    weights = {key: value.requires_grad_(True) for key, value in eps_model.base_weights("cross_attention.kv").items()}
    part, _ = denoise_to(eps_model, text, empty, SEEDS[:2], k, SAMPLER)
    latents = denoise_on(eps_model, part, k, text, empty, SAMPLER, weights)
    painted = next(paint(eps_model, PROMPTS[:2], SEEDS[:2], SAMPLER, batch_size=2))
    assert ((eps_model.decode(latents.detach()) * 255).round() - painted.float()).abs().max() <= 1
    gradient = torch.autograd.grad(latents.square().mean(), list(weights.values()))
    assert all(g.isfinite().all() and g.any() for g in gradient)


def test_bank_holds_the_trajectories_of_the_prompts(eps_model: TextToImage) -> None:
    bank = Bank.build(eps_model, PROMPTS[:2], 5, SAMPLER, seed=1, batch_size=4)
    assert bank.latents.shape == (5, 4, *eps_model.latent_shape)
    text = eps_model.encode([PROMPTS[i % 2] for i in range(5)])
    seeds = [seed_of("bank", 1, i) for i in range(5)]
    for k in range(4):
        latents, t = denoise_to(eps_model, text, eps_model.encode([""]), seeds, k, SAMPLER)
        torch.testing.assert_close(bank.latents[:, k].float(), latents, rtol=2e-3, atol=2e-3)
        assert bank.timesteps[k] == t[0]


def test_draw_is_a_function_of_seed_and_step(eps_model: TextToImage) -> None:
    bank = Bank.build(eps_model, PROMPTS[:3], 5, SAMPLER, seed=1, batch_size=4)
    latents, t, prompt = bank.draw(0, 17, 64)
    again = bank.draw(0, 17, 64)
    assert all(torch.equal(a, b) for a, b in zip((latents, t, prompt), again, strict=True))
    assert not torch.equal(latents, bank.draw(0, 18, 64)[0])
    assert not torch.equal(latents, bank.draw(1, 17, 64)[0])
    assert set(t.tolist()) == set(bank.timesteps.tolist())
    assert set(prompt.tolist()) == {0, 1, 2}
    assert latents.dtype == torch.float32
    for row in range(64):
        k = bank.timesteps.tolist().index(t[row])
        own = bank.latents[prompt[row] :: 3, k].float()  # the trajectories of this prompt at this level
        assert any(torch.equal(latents[row], state) for state in own)


@pytest.mark.parametrize("name", ["eps_model", "v_model"])
def test_trajectories_under_way_follow_the_sampler(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    under_way = Underway(model, PROMPTS[:2], 8, SAMPLER, seed=1, batch_size=4)
    text, empty = model.encode([PROMPTS[i % 2] for i in range(8)]), model.encode([""])
    seeds = [seed_of("fresh", 1, i) for i in range(8)]
    assert under_way.k.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    rows = under_way.drawn(0, 8)
    assert sorted(rows.tolist()) == list(range(8)) and rows.equal(under_way.drawn(0, 8))
    latents, t, which = under_way.at(rows)
    assert which.equal(rows % 2)
    with torch.no_grad():
        asked, nothing = (model.predict(latents, t, part) for part in (text[rows % 2], empty.expand(8, -1, -1)))
    under_way.move(0, rows, under_way.moved(rows, asked, nothing))
    assert under_way.k.tolist() == [1, 1, 2, 2, 3, 3, 0, 0]
    expected, t = denoise_to(model, text[:6], empty, seeds[:6], under_way.k[:6], SAMPLER)
    torch.testing.assert_close(under_way.latents[:6], expected, rtol=1e-3, atol=1e-3)
    assert under_way.at(torch.arange(6))[1].equal(t)
    fresh = [seed_of("fresh", 1, 0, row) for row in (6, 7)]
    assert under_way.latents[6:].equal(noise(fresh, model.latent_shape))


def test_bank_is_kept_reused_and_rebuilt_when_damaged(
    eps_model: TextToImage, v_model: TextToImage, tmp_path: Path
) -> None:
    done: list[int] = []
    folder = tmp_path / "cache" / "banks"

    def build(model: TextToImage = eps_model, seed: int = 1) -> Bank:
        return Bank.build(model, PROMPTS[:2], 5, SAMPLER, seed, folder, done.append, batch_size=4)

    bank = build()
    (file,) = folder.iterdir()
    assert done == [4, 1]
    whole = file.read_bytes()
    assert torch.equal(build().latents, bank.latents)
    assert done == [4, 1, 5]
    flipped = bytearray(whole)
    flipped[-20] ^= 1
    for damage in (whole[:-100], bytes(flipped), b""):
        file.write_bytes(damage)
        done.clear()
        assert torch.equal(build().latents, bank.latents)
        assert done == [4, 1]
        assert load_file(file)["tensor"].equal(bank.latents)
    build(seed=2)
    build(v_model)
    assert len(list(folder.iterdir())) == 3


def test_paintings_are_what_the_model_paints_noised_by_the_formula(eps_model: TextToImage, tmp_path: Path) -> None:
    paintings = Paintings.build(eps_model, PROMPTS[:2], 5, SAMPLER, seed=1, folder=tmp_path, batch_size=4)
    seeds = [seed_of("bank", 1, i) for i in range(5)]
    painted = list(paint(eps_model, [PROMPTS[i % 2] for i in range(5)], seeds, SAMPLER, 4))
    decoded = (eps_model.decode(paintings.latents.float()) * 255).round()
    assert (decoded - torch.cat(painted).float()).abs().max() <= 2
    drawn = paintings.draw(0, 17, 64)
    again = paintings.draw(0, 17, 64)
    assert drawn.latents.equal(again.latents) and drawn.t.equal(again.t)
    assert not drawn.latents.equal(paintings.draw(0, 17, 64, stream=1).latents)
    assert not drawn.latents.equal(paintings.draw(0, 18, 64).latents)
    assert set(drawn.which.tolist()) == {0, 1}
    for row in range(64):
        abar = float(eps_model.alphas_cumprod[drawn.t[row]])
        clean = (drawn.latents[row] - (1 - abar) ** 0.5 * drawn.noise[row]) / abar**0.5
        own = paintings.latents[int(drawn.which[row]) :: 2].float()
        assert min(float((clean - one).abs().max()) for one in own) < 1e-3 / abar**0.5
    stored = Paintings.build(eps_model, PROMPTS[:2], 5, SAMPLER, seed=1, folder=tmp_path, batch_size=4)
    assert stored.latents.equal(paintings.latents) and stored.saved_seconds > 0 == paintings.saved_seconds
