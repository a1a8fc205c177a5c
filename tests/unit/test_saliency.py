"""Masks by hand, and Hessian-vector products against the whole Hessian."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from unpaint.curvature import gradient, gradient_and_curvature
from unpaint.saliency import ConceptNeurons, jaccard

ONE, TWO = "unet.down.attn2.to_q.weight", "unet.up.attn2.to_q.weight"
KEYS = "unet.down.attn2.to_k.weight"


def neurons(units: dict[str, int], xi: float = 1.0, by_layer: bool = False) -> ConceptNeurons:
    return ConceptNeurons({key: torch.zeros(2, 2) for key in units}, units, xi, by_layer)


def test_zscores_over_a_projection_by_hand() -> None:
    found = neurons({ONE: 4, TWO: 4, KEYS: 4})
    gradient = {
        ONE: torch.tensor([[1.0, -1.0], [1.0, 1.0]]),
        TWO: torch.tensor([[1.0, 1.0], [1.0, -9.0]]),
        KEYS: torch.tensor([[1.0, 2.0], [3.0, 1000.0]]),
    }
    found.add(gradient, share=1.0, keep=0.0)
    # Queries: mean 2, variance (7 * 1 + 49) / 8 = 7; the keys, far larger, do not count here.
    scores = found.zscores(found.measure(gradient))
    torch.testing.assert_close(scores["q"], torch.tensor([-1.0] * 7 + [7.0]) / 7**0.5)
    found.choose(first=True)
    mask = found.mask()
    assert mask[ONE].sum() == 0
    assert mask[TWO].tolist() == [[False, False], [False, True]]
    assert mask[KEYS].tolist() == [[False, False], [False, True]]
    drift = found.drift()
    assert drift["mask/kept"] == pytest.approx(2 / 12)
    assert drift["mask/kept/down"] == pytest.approx(1 / 8) and drift["mask/kept/up"] == pytest.approx(1 / 4)


def test_zscores_within_each_layer() -> None:
    found = neurons({ONE: 4, TWO: 4}, by_layer=True)
    gradient = {ONE: torch.tensor([[1.0, 1.0], [1.0, 5.0]]), TWO: torch.full((2, 2), 100.0)}
    found.add(gradient, share=1.0, keep=0.0)
    found.choose(first=True)
    # Mean 2, variance 3; a layer without any difference has no neurons.
    torch.testing.assert_close(
        found.zscores(found.measure(gradient))["q"][:4], torch.tensor([-1.0, -1, -1, 3]) / 3**0.5
    )
    assert found.mask()[ONE].tolist() == [[False, False], [False, True]]
    assert not found.mask()[TWO].any()


def test_heads_are_blocks_of_rows() -> None:
    found = neurons({ONE: 2, TWO: 2})
    gradient = {ONE: torch.tensor([[1.0, -3.0], [0.0, 0.0]]), TWO: torch.tensor([[0.0, 0.0], [-8.0, 12.0]])}
    assert found.measure(gradient)["q"].tolist() == [2.0, 0.0, 0.0, 10.0]
    found.add(gradient, share=1.0, keep=0.0)
    found.choose(first=True)
    assert found.mask()[TWO].tolist() == [[False, False], [True, True]]
    assert not found.mask()[ONE].any()


def test_averaging_and_drift() -> None:
    found = neurons({ONE: 4})
    first, second = torch.tensor([[9.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 9.0]])
    found.add({ONE: first}, share=1.0, keep=1.0)
    assert found.choose(first=True)["mask/jaccard_previous"] == 1
    found.add({ONE: second}, share=0.75, keep=0.25)
    assert found.get_buffer("saliency_q").tolist() == [2.25, 0.0, 0.0, 6.75]
    # One in each of the masks, nothing in common; both have been in a mask.
    assert found.choose(first=False)["mask/jaccard_previous"] == 0
    drift = found.drift()
    assert drift["mask/jaccard_first"] == 0 and drift["mask/kept"] == 0.25 and drift["mask/ever"] == 0.5
    kept = neurons({ONE: 4})
    kept.load_state_dict(found.state_dict())
    assert kept.mask()[ONE].equal(found.mask()[ONE]) and kept.drift() == drift


def test_saliencies_that_vanish_when_squared() -> None:
    found = neurons({ONE: 4})
    found.add({ONE: torch.tensor([[1.0, 1.0], [1.0, 9.0]]) * 1e-30}, share=1.0, keep=0.0)
    found.choose(first=True)
    assert found.mask()[ONE].tolist() == [[False, False], [False, True]]


def test_jaccard() -> None:
    one, other = torch.tensor([1, 1, 1, 0]), torch.tensor([0, 1, 1, 1])
    assert jaccard(one, other) == 0.5
    assert jaccard(one * 0, one * 0) == 1 and jaccard(one, one * 0) == 0


def attention(weights: Mapping[str, Tensor]) -> Tensor:
    x = torch.randn(1, 2, 5, 3, generator=torch.Generator().manual_seed(1), dtype=weights["q"].dtype)
    query, key, value = (x @ weights[name] for name in ("q", "k", "v"))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value).square().mean()


@pytest.mark.parametrize(("second_order", "tolerance"), [("exact", 1e-10), ("finite_difference", 1e-4)])
def test_hessian_vector_products_are_the_hessians(second_order: str, tolerance: float) -> None:
    draw = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(3, 3, generator=draw, dtype=torch.float64) for name in ("q", "k", "v")}
    v = {name: torch.randn(3, 3, generator=draw, dtype=torch.float64) for name in ("q", "k", "v")}

    def flat(whole: Tensor) -> Tensor:
        q, k, values = whole.view(3, 3, 3)
        x = torch.randn(1, 2, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        scores = (x @ q) @ (x @ k).transpose(-1, -2) / 3**0.5
        return (scores.softmax(dim=-1) @ (x @ values)).square().mean()

    whole = torch.stack(list(weights.values())).flatten()
    hessian = torch.autograd.functional.hessian(flat, whole)
    value, slope, curvature = gradient_and_curvature(attention, weights, second_order, 1e-3)
    expected = (hessian @ torch.stack(list(v.values())).flatten()).view(3, 3, 3)
    torch.testing.assert_close(torch.stack(list(curvature(v).values())), expected, rtol=tolerance, atol=tolerance)
    plain_value, plain_slope = gradient(attention, weights)
    torch.testing.assert_close(value, plain_value)
    assert all(not g.requires_grad for g in slope.values())
    torch.testing.assert_close(slope, plain_slope)


@pytest.mark.parametrize("second_order", ["exact", "finite_difference"])
def test_no_direction_no_curvature(second_order: str) -> None:
    weights = {name: torch.eye(3) for name in ("q", "k", "v")}
    _, _, curvature = gradient_and_curvature(attention, weights, second_order, 1e-3)
    assert all(not product.any() for product in curvature({name: torch.zeros(3, 3) for name in weights}).values())
