"""FID and KID between two sets of features, with what their intervals need: the same without each tenth of the rows."""

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unpaint.errors import UserError
from unpaint.evaluation.metrics import Parts

Floats = NDArray[np.float64]
GROUPS = 10
SUBSET = 1000


class _AsTheyAre(nn.Identity):
    """In the place of Inception: what torchmetrics is given are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def fid(ours: Parts, reference: Parts) -> Floats:
    """Frechet distance of the Gaussians fitted to two sets of features, parts (n, d) each (Heusel et al. 2017,
    arXiv 1706.08500, eq. 6); torchmetrics' running sums in float64, memory does not grow with n.

    Returns (1 + GROUPS,): of all rows, then without rows k, k + GROUPS, ... of both sets, for each k.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    def empty() -> FrechetInceptionDistance:
        # Every rank has all the rows: adding them up over ranks would count each one so many times.
        return FrechetInceptionDistance(feature=_AsTheyAre(_width(ours)), sync_on_compute=False)

    groups = [empty() for _ in range(GROUPS)]
    for parts, real in ((ours, False), (reference, True)):
        for k, rows in _dealt(parts, GROUPS):
            groups[k].update(rows, real=real)

    def merged(some: Sequence[FrechetInceptionDistance]) -> float:
        whole = deepcopy(some[0])
        for other in some[1:]:
            whole.merge_state(other)
        return float(whole.compute())

    return np.array([merged(groups), *(merged(groups[:k] + groups[k + 1 :]) for k in range(GROUPS))])


def kid(ours: Parts, reference: Parts) -> tuple[Floats, Floats]:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401, section 4), mean
    over disjoint subsets of at most SUBSET rows each, dealt out in turn; two equally long sets of parts (n, d).

    Returns the same (1 + GROUPS,) as `fid`, and the value of each subset.
    """
    from torchmetrics.image.kid import poly_mmd

    n = count(ours)
    if n != count(reference):
        raise UserError(f"KID compares equally many pictures, not {n} with {count(reference)}")
    subsets = math.ceil(n / SUBSET)
    found = []
    for which in range(subsets):
        x, y = (torch.cat([rows for k, rows in _dealt(parts, subsets) if k == which]) for parts in (ours, reference))
        group = torch.arange(len(x)) % GROUPS
        found.append([float(poly_mmd(y[group != k], x[group != k])) for k in range(-1, GROUPS)])
    return np.mean(found, axis=0), np.array(found)[:, 0]


def count(parts: Parts) -> int:
    return sum(len(part) for part in parts)


def _width(parts: Parts) -> int:
    return int(parts[0].shape[1])


def _dealt(parts: Parts, hands: int) -> Iterator[tuple[int, Tensor]]:
    """(hand, rows) of every part: row i of them all goes to hand i % hands."""
    first = 0
    for part in parts:
        hand = np.arange(first, first + len(part)) % hands
        first += len(part)
        for k in np.unique(hand):
            yield int(k), torch.from_numpy(part[hand == k].astype(np.float64))


def summary(edited: Floats, base: Floats, lowest: float = -math.inf) -> dict[str, float]:
    """value, low, high, base, base_low, base_high, delta, delta_low, delta_high of what `fid` and `kid` return.

    Delete-a-group jackknife (Efron and Tibshirani 1993, section 11.5) with Student's t: the groups hold the same
    prompts on both sides, so the difference is a paired one. The interval is about the pictures' chance, not about
    FID's bias. `lowest` is the least that the measure can be.
    """
    found: dict[str, float] = {}
    for prefix, values, least in (("", edited, lowest), ("base_", base, lowest), ("delta_", edited - base, -math.inf)):
        half = _t(GROUPS - 1) * math.sqrt((GROUPS - 1) / GROUPS * float(np.sum((values[1:] - values[1:].mean()) ** 2)))
        value = float(values[0])
        found |= {prefix.rstrip("_") or "value": value, f"{prefix}low": max(least, value - half)}
        found[f"{prefix}high"] = value + half
    return found


def _t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, to three digits from 8 degrees on (Abramowitz and Stegun 1964, 26.7.5)."""
    z = NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def check_enough(name: str, edited: Parts, reference: Parts) -> tuple[int, int]:
    """(n, d). Raises UserError if there are too few pictures to say anything."""
    n = min(count(edited), count(reference))
    if n < 2 * GROUPS:
        raise UserError(f"{name} needs at least {2 * GROUPS} pictures that ask for something else, there are {n}")
    return n, _width(edited)
