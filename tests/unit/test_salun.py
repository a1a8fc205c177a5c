"""SalUn's mask and loss against plain loops on the tiny pipeline, and that nothing outside the mask moves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unpaint.config import compose, instantiate
from unpaint.edit import Edit
from unpaint.errors import UserError
from unpaint.methods.salun import MASK, SalUn, largest
from unpaint.run import erase

Begun = Callable[..., tuple[SalUn, list[Tensor]]]
SMALL = ("method=salun", "method.forget_size=4", "method.retain_size=4", "method.mask_batches=3")


def test_the_largest_entries() -> None:
    assert largest(torch.tensor([3.0, 1.0, 4.0, 2.0]), 0.5).tolist() == [True, False, True, False]
    assert largest(torch.tensor([3.0, 1.0, 4.0, 2.0]), 1.0).all()
    assert largest(torch.tensor([0.0, 0.0, 0.0, 2.0]), 0.5).tolist() == [False, False, False, True]


@pytest.mark.parametrize("guidance", [0.0, 7.5])
def test_saliency_is_the_gradient_of_the_summed_loss(guidance: float, begun: Begun) -> None:
    method, _ = begun(*SMALL, f"method.mask_guidance={guidance}", "method.group=cross_attention", "method.batch_size=2")
    unet, encode = method.job.model.pipe.unet, method.job.model.encode
    weights = list(method.job.weights.values())
    for weight in weights:
        weight.requires_grad_(True)
    for batch in range(3):
        rows = method.forget.draw(0, batch, 2, MASK)
        for row in range(2):
            x, t = rows.latents[row : row + 1], rows.t[row]
            prompt = method.forget.prompts[int(rows.which[row])]
            asked, nothing = (unet(x, t, encode([text])).sample for text in (prompt, ""))
            predicted = (1 + guidance) * asked - guidance * nothing
            ((predicted - rows.noise[row : row + 1]).square().mean() / 2).backward()  # .grad adds up, signs and all
    expected = torch.cat([w.grad.flatten() for w in weights if w.grad is not None]).abs()
    saliency = method._saliency()
    torch.testing.assert_close(saliency, expected, rtol=1e-3, atol=1e-6)
    mask = method.own.get_buffer("mask") if method.own else None
    assert mask is not None and mask.dtype == torch.bool and mask.equal(largest(saliency, 0.5))
    assert int(mask.sum()) == round(0.5 * len(mask))
    assert float(expected[mask].min()) >= 0.999 * float(expected[~mask].max())


@pytest.mark.parametrize("target", ["frozen", "current"])
def test_the_loss_by_hand(target: str, begun: Begun) -> None:
    options = ("method.alpha=0.3", "method.batch_size=2", f"method.target={target}", "method.group=cross_attention")
    method, losses = begun(*SMALL, *options)
    batch = next(method.batches(0))
    assert len(batch.prompts) == len(batch.retained) == 2
    unet, encode = method.job.model.pipe.unet, method.job.model.encode
    with torch.no_grad():

        def predicted(row: int, prompts: list[str], of: Any) -> Tensor:
            return unet(of.latents[row : row + 1], of.t[row], encode([prompts[row]])).sample[0]

        before = [predicted(row, batch.anchors, batch.forget) for row in (0, 1)]
        for parameter in method.job.weights.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        after = [predicted(row, batch.anchors, batch.forget) for row in (0, 1)]
        goals = before if target == "frozen" else after
        assert not before[0].allclose(after[0], atol=1e-4)
        redirection, retention = torch.zeros(()), torch.zeros(())
        for row in (0, 1):
            redirection += (predicted(row, batch.prompts, batch.forget) - goals[row]).square().mean() / 2
            of_retained = predicted(row, batch.retained, batch.retain)
            retention += (of_retained - batch.retain.noise[row]).square().mean() / 2
    logs = method.step(batch)
    torch.testing.assert_close(losses[0], redirection + 0.3 * retention, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logs["retention"], retention, rtol=1e-4, atol=1e-6)


def test_prompts_and_anchors_stay_side_by_side(begun: Begun) -> None:
    method, _ = begun(*SMALL)
    concept = method.job.concept
    pairs = dict(zip(concept.prompts(further=True), concept.anchor_prompts(further=True), strict=True))
    (batch, *_) = method.batches(0)
    assert all(pairs[prompt] == anchor for prompt, anchor in zip(batch.prompts, batch.anchors, strict=True))
    assert set(batch.retained) <= set(concept.retain_prompts())
    method, _ = begun(*SMALL, "method.prompts=concept")
    assert method.prompts == ["a cat"] and method.anchors == ["a dog"]


def test_batches_are_a_function_of_seed_and_step_and_ranks_share_them(begun: Begun) -> None:
    method, _ = begun(*SMALL, "method.steps=3")
    whole, tail = list(method.batches(0)), list(method.batches(1))
    assert len(whole) == 3 and len(tail) == 2
    for one, other in zip(whole[1:], tail, strict=True):
        assert one.forget.latents.equal(other.forget.latents) and one.retain.noise.equal(other.retain.noise)
        assert one.prompts == other.prompts and one.retained == other.retained
    assert not whole[0].forget.noise.equal(whole[0].retain.noise)
    for rank in (0, 1):
        object.__setattr__(method.job, "mine", slice(rank, None, 2))
        part = next(method.batches(0))
        assert part.forget.latents.equal(whole[0].forget.latents[rank::2])
        assert part.prompts == whole[0].prompts[rank::2] and part.retained == whole[0].retained[rank::2]


def test_weights_outside_the_mask_keep_their_bits(begun: Begun, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    small = [*SMALL, "method.steps=3", "method.share=0.3", "method.group=not_cross_attention"]
    common = ["model=sd15", f"model.path={tiny_pipeline_folder}", "method.sampling_steps=4", "trainer=cpu"]
    edit = Edit.load(erase(compose([*small, *common, "logger=none", "probes=0", f"outputs={tmp_path / 'out'}"])))
    method, _ = begun(*small)
    assert method.own is not None
    mask = method.own.get_buffer("mask")
    weights = method.job.base
    delta = torch.cat([edit.delta.get(key, torch.zeros_like(weight)).flatten() for key, weight in weights.items()])
    assert not bool(delta[~mask].any())
    assert float((delta[mask] != 0).float().mean()) > 0.95


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("group=al", "method.group .* did you mean all"),
        ("prompts=bare", "method.prompts"),
        ("target=frosen", "method.target .* did you mean frozen"),
        ("share=0", "method.share"),
        ("steps=0", "method.steps"),
        ("lr=0", "method.lr"),
        ("sampling_guidance=0", "guidance"),
    ],
)
def test_bad_options_are_refused(option: str, said: str) -> None:
    arguments: Any = compose(["method=salun", f"method.{option}"]).method
    with pytest.raises(UserError, match=said):
        instantiate(arguments)
