"""Random pruning: how many weights, which ones, and that the edit is made of the unedited model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from unpaint.config import compose, instantiate
from unpaint.errors import UserError
from unpaint.methods.random_prune import RandomPrune, random_mask

Begun = Callable[..., tuple[RandomPrune, list[torch.Tensor]]]


def test_the_share_and_the_positions() -> None:
    shape = torch.Size((40, 50))
    mask = random_mask(shape, 0.01, 0, "a")
    assert mask.shape == shape and int(mask.sum()) == 20
    assert mask.equal(random_mask(shape, 0.01, 0, "a"))
    assert not mask.equal(random_mask(shape, 0.01, 1, "a")) and not mask.equal(random_mask(shape, 0.01, 0, "b"))
    assert bool(random_mask(shape, 1.0, 0, "a").all())
    # Anywhere: with half of them gone no row and no column stands out.
    half = random_mask(shape, 0.5, 0, "a").double()
    assert float((half.mean(0) - 0.5).abs().max()) < 0.35 and float((half.mean(1) - 0.5).abs().max()) < 0.35
    assert int(random_mask(torch.Size((2, 3)), 0.01, 0, "a").sum()) == 1


def test_weights_are_zero_during_the_run_and_the_edit_says_where(begun: Begun) -> None:
    method, _ = begun("method=random_prune", "method.share=0.1")
    (masks,) = method.batches(0)
    method.step(masks)
    matrices = {key: weight for key, weight in method.job.weights.items() if weight.dim() == 2}
    assert masks.keys() == matrices.keys() and any(".attn2." in key for key in masks)
    for key, weight in matrices.items():
        assert int(masks[key].sum()) == round(0.1 * weight.numel())
        assert weight.detach().equal(method.job.base[key].masked_fill(masks[key], 0))
    edit = method.finish()
    assert not edit.delta and all(edit.zero[key].equal(mask) for key, mask in masks.items())
    assert edit.changed_parameters == sum(int(mask.sum()) for mask in masks.values())
    edit.apply(method.job.model.pipe)  # refuses any base but the one that it was made of
    assert all(not bool(weight[masks[key]].any()) for key, weight in matrices.items())


def test_an_unknown_group_is_refused() -> None:
    with pytest.raises(UserError, match=r"method\.layers .*did you mean feed_forward.out"):
        instantiate(compose(["method=random_prune", "method.layers=cross_attention+feed_forward.outt"]).method)


@pytest.mark.parametrize("share", ["0", "1.5"])
def test_a_bad_share_is_refused(share: str) -> None:
    arguments: Any = compose(["method=random_prune", f"method.share={share}"]).method
    with pytest.raises(UserError, match=r"method\.share"):
        instantiate(arguments)
