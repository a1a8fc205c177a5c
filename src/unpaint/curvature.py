"""Gradients of a scalar with respect to weights, and how they bend: Hessian-vector products, exact or by differences.

A penalty phi(g) on the gradient g of a scalar s has the gradient H phi'(g), where H is the Hessian of s: one
Hessian-vector product, whatever phi is.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Tensors = dict[str, Tensor]
Scalar = Callable[[Mapping[str, Tensor]], Tensor]


def gradient(scalar: Scalar, at: Mapping[str, Tensor]) -> tuple[Tensor, Tensors]:
    """s and ds/dw, detached, for a function of named weights at the values `at`."""
    leaves = _leaves(at)
    value = scalar(leaves)
    found = torch.autograd.grad(value, list(leaves.values()))
    return value.detach(), dict(zip(leaves, found, strict=True))


def gradient_and_curvature(
    scalar: Scalar, at: Mapping[str, Tensor], second_order: str, difference: float
) -> tuple[Tensor, Tensors, Callable[[Mapping[str, Tensor]], Tensors]]:
    """s, ds/dw and a function v -> H v, to be called once; all detached.

    second_order `exact` differentiates the gradient (Pearlmutter 1994), and keeps its graph until H v is asked for;
    attention then runs through its plain kernel, as fused ones have no second derivative. `finite_difference` takes
    (g(w + h v) - g(w - h v)) / 2h with h = difference * (1 + |w|) / |v|: two more first-order passes in float32
    through any kernel, with no graph kept.
    """
    if second_order == "finite_difference":
        value, found = gradient(scalar, at)
        return value, found, lambda v: _by_difference(scalar, at, v, difference)
    leaves = _leaves(at)
    with sdpa_kernel(SDPBackend.MATH):
        value = scalar(leaves)
        bent = torch.autograd.grad(value, list(leaves.values()), create_graph=True)

    def product(v: Mapping[str, Tensor]) -> Tensors:
        along = torch.stack([(g * v[key]).sum() for key, g in zip(leaves, bent, strict=True)]).sum()
        # Zeros where the scalar is linear in a weight.
        found = torch.autograd.grad(along, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    return value.detach(), {key: g.detach() for key, g in zip(leaves, bent, strict=True)}, product


def _by_difference(scalar: Scalar, at: Mapping[str, Tensor], v: Mapping[str, Tensor], difference: float) -> Tensors:
    length = _norm(v)
    if length == 0:
        return {key: torch.zeros_like(w) for key, w in at.items()}
    h = difference * (1 + _norm(at)) / length
    device = next(iter(at.values())).device
    with torch.autocast(device.type, enabled=False):
        _, ahead = gradient(scalar, {key: w.detach() + h * v[key] for key, w in at.items()})
        _, behind = gradient(scalar, {key: w.detach() - h * v[key] for key, w in at.items()})
    return {key: (ahead[key] - behind[key]) / (2 * h) for key in at}


def _leaves(at: Mapping[str, Tensor]) -> Tensors:
    return {key: w.detach().requires_grad_(True) for key, w in at.items()}


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return float(torch.stack([t.detach().double().square().sum() for t in tensors.values()]).sum().sqrt())
