"""SepME: the null space, the loss by hand, and what its edits leave alone, on the tiny pipeline."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unpaint.concepts import Concept
from unpaint.config import compose, instantiate
from unpaint.edit import Edit
from unpaint.errors import UserError
from unpaint.methods.sepme import Batch, SepME, null_space, stillest
from unpaint.sampling import noise

Begun = Callable[..., tuple[SepME, list[Tensor]]]
FEW = ("method=sepme", "method.pictures=2", "method.batch_size=2", "method.protect=none", "method.stop_after=1000")


@pytest.fixture(scope="module")
def short(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny pipeline with prompts of 6 tokens: one prompt takes 6 of its 32 dimensions, another one at most 5."""
    folder = shutil.copytree(tiny_pipeline_folder, tmp_path_factory.mktemp("short") / "pipeline")
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 6}))
    return f"model.path={folder}"


def concept(name: str) -> Concept:
    return instantiate(compose([f"concept={name}"]).concept)


def again(method: SepME, **changes: Any) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Begins anew with another job, whose `update` really trains; returns the gradients before and after `adjust`."""
    seen: list[tuple[list[Tensor], list[Tensor]]] = []

    def update(loss: Tensor, i: int = 0, adjust: Callable[[], None] | None = None) -> None:
        optimizer.zero_grad()
        loss.backward()
        before = [p.grad.clone() for p in method.trained if p.grad is not None]
        if adjust is not None:
            adjust()
        seen.append((before, [p.grad.clone() for p in method.trained if p.grad is not None]))
        optimizer.step()

    with torch.no_grad():
        for key, weight in method.job.weights.items():
            weight.copy_(method.job.base[key])
            weight.requires_grad_(True)
    method.begin(replace(method.job, **{"update": update, **changes}))
    (optimizer,) = method.optimizers()
    return seen


def edit_of(method: SepME, steps: int = 3) -> Edit:
    """The edit after some steps; the pipeline is left unedited."""
    for batch in list(method.batches(method.steps - steps)):
        method.step(batch)
    edit = method.finish()
    with torch.no_grad():
        for key, weight in method.job.weights.items():
            weight.copy_(method.job.base[key])
    return edit


def keys_and_values(method: SepME, prompt: str) -> Iterator[Tensor]:
    (state,) = method.job.model.encode([prompt])
    return (state @ weight.detach().T for weight in method.job.weights.values())


# --- the null space


def test_null_space_of_a_case_worked_by_hand() -> None:
    rows = torch.tensor([[1.0, 0, 0, 0], [0, 2, 0, 0], [1, 1, 0, 0]])
    basis = null_space(rows, 1e-6)
    assert basis.shape == (2, 4)
    torch.testing.assert_close(basis @ basis.T, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(basis.T @ basis, torch.diag(torch.tensor([0.0, 0, 1, 1], dtype=torch.float64)))


def test_null_space_with_more_rows_than_columns_and_a_tolerance() -> None:
    rows = torch.tensor([[1.0, 0, 0], [0, 1e-3, 0], [1, 1e-3, 0], [2, 0, 0]])
    assert len(null_space(rows, 1e-6)) == 1
    loose = null_space(rows, 1e-2)
    assert len(loose) == 2
    assert (rows.double() @ loose.T).abs().max() < 2e-3
    assert null_space(torch.eye(3), 1e-6).shape == (0, 3)


def test_stillest_keeps_the_directions_that_others_use_least() -> None:
    basis = torch.eye(4, dtype=torch.float64)[1:]
    rows = torch.tensor([[9.0, 3, 0, 0], [9, 0, 0.1, 0], [9, 0, 0, 1]])
    kept = stillest(basis, rows, 2)
    torch.testing.assert_close(kept.T @ kept, torch.diag(torch.tensor([0.0, 0, 1, 1], dtype=torch.float64)))
    # Fewer rows than directions: those that no row touches are there, too.
    assert (stillest(basis, rows[:1], 2) @ rows[0].double()).abs().max() < 1e-12
    assert stillest(basis, rows, 0).shape == (0, 4)


def test_dimensions_left(begun: Begun, short: str) -> None:
    method, _ = begun(*FEW, short)
    assert len(method.own.basis) == 32 - 6
    again(method, beside=(concept("dog"), concept("fish")))
    assert method.fixed_prompts() == ["", "a dog", "a fish"]
    # A state depends on the words before it alone: all share the first token, and these two the article.
    assert len(method.own.basis) == 32 - 6 - 5 - 4
    torch.testing.assert_close(method.own.basis @ method.own.basis.T, torch.eye(17), atol=1e-6, rtol=0)
    method, _ = begun(*FEW, short, "method.protect=in_domain", "method.protect_share=0.25")
    assert len(method.own.basis) == 32 - 6 - 6  # a quarter of 26
    # The two members beside it have taken 9 of the 26 already, which is more than that quarter.
    again(method, beside=(concept("dog"), concept("fish")))
    assert len(method.own.basis) == 17
    method, _ = begun(*FEW, short, "method.protect=in_domain", "method.protect_share=0.5")
    again(method, beside=(concept("dog"), concept("fish")))
    assert len(method.own.basis) == 13


def test_too_few_dimensions_are_refused(begun: Begun, short: str) -> None:
    # All 32 but the one that the text encoder's last layer norm takes from every text.
    with pytest.raises(
        UserError, match=r"\d prompts .* leave 1 of 32 dimensions, and .* 'cat' lie along none of those"
    ):
        begun(*FEW, "method.neighbours=true")
    with pytest.raises(UserError, match=r"leave 1 of 32 dimensions, method.least_dimensions=2; .*method.decouple=1"):
        begun(*FEW, "method.neighbours=true", "method.least_dimensions=2")
    with pytest.raises(UserError, match=r"leave 26 of 32 dimensions, 13 of them given up.*least_dimensions=14"):
        begun(*FEW, short, "method.protect=in_domain", "method.least_dimensions=14")


def test_which_prompts_are_held(begun: Begun) -> None:
    method, _ = begun(*FEW, "method.decouple=2", "method.protect=neighbours")
    object.__setattr__(method.job, "beside", (concept("mosaic"),))
    assert method.fixed_prompts() == ["", "a mosaic picture", "a picture in mosaic style"]
    held = method.protected_prompts()
    assert "a dog" in held and "a dog in mosaic style" in held
    assert "a fish" not in held and not any("a cat" in prompt for prompt in held)
    object.__setattr__(method.job, "beside", ())
    method.neighbours = True
    assert len(method.fixed_prompts()) == 1 + 2 * len(method.job.concept.neighbours)


# --- the loss


@pytest.mark.parametrize("variant", ["separable", "direct"])
def test_the_loss_by_hand(variant: str, begun: Begun) -> None:
    method, losses = begun(*FEW, f"method.variant={variant}", "method.drift_weight=0.01", "method.basis_scale=0.5")
    job, model = method.job, method.job.model
    batch = Batch(noise([1, 2], model.latent_shape), torch.tensor([900, 100]), ["a cat", "a cat in flat style"])
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.trained:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
        if variant == "separable":
            changed = {
                key: job.base[key] + v @ (0.5 * method.own.basis)
                for key, v in zip(job.weights, method.own.coefficients, strict=True)
            }
        else:
            changed = {key: p.clone() for key, p in job.weights.items()}

        def answer(weights: dict[str, Tensor], row: int) -> Tensor:
            for key, parameter in job.weights.items():
                parameter.copy_(weights[key])
            x, t = batch.latents[row : row + 1], batch.t[row]
            asked, blank = (model.pipe.unet(x, t, model.encode([p])).sample for p in (batch.prompts[row], ""))
            return asked - blank

        products = [answer(changed, row) * answer(job.base, row) for row in (0, 1)]
        drift = sum(float((changed[key] - job.base[key]).abs().sum()) for key in changed) / len(changed)
        expected = torch.stack(products).mean() + 0.01 * drift
        for key, parameter in job.weights.items():
            parameter.copy_(changed[key])
    method.step(batch)
    torch.testing.assert_close(losses[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["separable", "direct"])
def test_steps_lower_the_correlation(variant: str, begun: Begun, short: str) -> None:
    method, _ = begun(*FEW, short, f"method.variant={variant}", "method.lr=0.01", "method.basis_scale=1")
    again(method)
    batch = next(method.batches(0))
    found = [float(method.step(batch)["correlation"]) for _ in range(4)]
    assert found[3] < found[2] < found[1] < found[0]


def test_gradients_accumulate_as_in_the_authors_code(begun: Begun, short: str) -> None:
    method, _ = begun(*FEW, short, "method.accumulate_gradients=true")
    seen = again(method)
    for batch in method.batches(method.steps - 3):
        method.step(batch)
    for i, total in enumerate(seen[2][1]):
        torch.testing.assert_close(total, sum(before[i] for before, _ in seen))
    assert not seen[2][1][0].equal(seen[2][0][0])


def test_the_change_is_in_full_precision_under_autocast(begun: Begun) -> None:
    method, _ = begun(*FEW)
    for v in method.own.coefficients:
        torch.nn.init.normal_(v, generator=torch.Generator().manual_seed(0))
    plain = method.changes()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(one.equal(other) for one, other in zip(plain, method.changes(), strict=True))


# --- the edit


@pytest.mark.parametrize("decouple", [1, 2])
def test_what_is_decoupled_does_not_move_and_edits_are_separable(decouple: int, begun: Begun, short: str) -> None:
    cat, dog, fish = concept("cat"), concept("dog"), concept("fish")
    method, _ = begun(*FEW, short, "method.lr=0.1", "method.basis_scale=1", f"method.decouple={decouple}")
    pipe, base = method.job.model.pipe, method.job.base
    of_dogs, of_fish = (other.prompts()[:decouple] for other in (dog, fish))
    assert (of_dogs[0], of_fish[0], len(of_dogs)) == ("a dog", "a fish", decouple)
    before = {prompt: list(keys_and_values(method, prompt)) for prompt in ("", "a cat", *of_dogs, *of_fish)}

    def moved(prompt: str) -> float:
        pairs = zip(keys_and_values(method, prompt), before[prompt], strict=True)
        return max(float((now - then).norm() / then.norm()) for now, then in pairs)

    again(method, beside=(dog, fish))
    of_cat = edit_of(method)
    again(method, concept=dog, beside=(cat, fish))
    of_dog = edit_of(method)

    of_cat.apply(pipe)
    assert moved("a cat") > 0.05
    assert max(moved(prompt) for prompt in ("", *of_dogs, *of_fish)) < 1e-5
    alone = {key: weight.detach().clone() for key, weight in method.job.weights.items()}
    of_dog.apply(pipe)
    assert moved("a dog") > 0.05
    assert max(moved(prompt) for prompt in ("", *of_fish)) < 1e-5
    for key, weight in method.job.weights.items():
        assert weight.equal(base[key] + (of_cat.delta[key] + of_dog.delta[key]))
    of_dog.remove(pipe)
    assert all(weight.equal(alone[key]) for key, weight in method.job.weights.items())
    of_cat.remove(pipe)
    assert all(weight.equal(base[key]) for key, weight in method.job.weights.items())


# --- stopping and going on


def test_early_stop(begun: Begun, short: str) -> None:
    method, _ = begun(*FEW, short, "method.stop_below=1e9", "method.stop_after=3")
    again(method)
    average = 0.0
    for n, batch in enumerate(method.batches(0)):
        assert (batch is None) == (n > 4)
        logs = method.step(batch)
        if n <= 4:
            found = float(logs["correlation"])
            average = 0.9 * average + 0.1 * found if n else found
            assert float(logs["average"]) == pytest.approx(average, rel=1e-4)
            assert bool(logs["stopped"]) == (n == 4)
            weights = [weight.clone() for weight in method.job.weights.values()]
        if n == 7:
            break
    assert all(one.equal(other) for one, other in zip(weights, method.job.weights.values(), strict=True))


@pytest.mark.parametrize("option", ["stop_after=100", "stop_below=-1e9"])
def test_no_early_stop(option: str, begun: Begun, short: str) -> None:
    method, _ = begun(*FEW, short, "method.stop_below=1e9", "method.stop_after=0", f"method.{option}")
    again(method)
    for batch in method.batches(method.steps - 3):
        assert batch is not None
        method.step(batch)


def test_a_resumed_run_is_the_run(begun: Begun, short: str) -> None:
    options = (*FEW, short, "method.steps=4", "method.accumulate_gradients=true")
    method, _ = begun(*options)

    def run(start: int, stop: int, state: Any = None) -> Any:
        again(method)
        (optimizer,) = optimizers = method.optimizers()
        object.__setattr__(method.job, "update", trains(optimizer))
        if state is not None:
            method.own.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        for _, batch in zip(range(start, stop), method.batches(start), strict=False):
            method.step(batch)
        return method.own.state_dict(), optimizers[0].state_dict(), method.finish()

    def trains(optimizer: torch.optim.Optimizer) -> Callable[..., None]:
        def update(loss: Tensor, i: int = 0, adjust: Callable[[], None] | None = None) -> None:
            optimizer.zero_grad()
            loss.backward()
            assert adjust is not None
            adjust()
            optimizer.step()

        return update

    whole, half = run(0, 4), run(0, 2)
    resumed = run(2, 4, half)
    assert whole[2].id == resumed[2].id != half[2].id
    assert all(value.equal(resumed[0][key]) for key, value in whole[0].items())
    assert int(whole[0]["seen"]) == 4


def test_ranks_share_a_batch_without_overlap(begun: Begun) -> None:
    method, _ = begun(*FEW, "method.batch_size=4")
    whole = next(method.batches(0))
    assert whole is not None
    for rank in (0, 1):
        object.__setattr__(method.job, "mine", slice(rank, None, 2))
        part = next(method.batches(0))
        assert part is not None
        assert part.latents.equal(whole.latents[rank::2]) and part.prompts == whole.prompts[rank::2]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("variant=joint", "method.variant"),
        ("protect=neighbors", "did you mean neighbours"),
        ("prompts=every", "method.prompts"),
        ("decouple=0", "decouple"),
        ("lr=0", "method.lr"),
        ("protect_share=1", "protect_share"),
        ("tolerance=-1", "tolerance"),
    ],
)
def test_bad_options_are_refused(option: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        instantiate(compose(["method=sepme", f"method.{option}"]).method)


def test_the_papers_settings_compose() -> None:
    cfg = compose(["experiment=paper/sepme"])
    method = instantiate(cfg.method)
    assert (cfg.model.name, method.steps, method.basis_scale, method.separable) == ("sd14", 1000, 1e-4, True)
