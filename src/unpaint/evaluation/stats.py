"""Intervals: Wilson for rates, Agresti and Min for paired differences of rates, the bootstrap for means."""

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
DRAWS_AT_ONCE = 1 << 20


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate (1927; Brown, Cai and DasGupta 2001, section 3.1.1, equation 4).

    Assumes independent trials. Raises ValueError unless 0 <= successes <= n and n > 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"need 0 <= successes <= n and n > 0, got {successes} of {n}")
    z2 = _z(confidence) ** 2
    rate = successes / n
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # Rounding must not keep a rate of 0 or 1 out of its own interval.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def paired_rates(edited: Floats, base: Floats, confidence: float = 0.95) -> tuple[float, float, float]:
    """Difference (edited - base) of two rates over the same trials, and its interval (low, high).

    `edited` and `base` hold 0 or 1 each, shape (n,). The interval is Wald's on the discordant pairs, after adding 0.5
    to each of the four cells of the table (Agresti and Min 2005, Statistics in Medicine 24, section 2.3).
    """
    _check_pair(edited, base)
    gained = float(np.sum((edited == 1) & (base == 0)))
    lost = float(np.sum((edited == 0) & (base == 1)))
    n = len(edited) + 2
    centre = (gained - lost) / n
    spread = (gained + 0.5) + (lost + 0.5) - (gained - lost) ** 2 / n
    half = _z(confidence) * math.sqrt(spread) / n
    return (gained - lost) / len(edited), max(-1.0, centre - half), min(1.0, centre + half)


def bootstrap_mean(
    values: Floats, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of values (n,) (Efron and Tibshirani 1993, chapter 13).

    A pure function of its arguments; memory does not grow with n x resamples. Raises ValueError on no values.
    """
    if len(values) == 0:
        raise ValueError("no values")
    means = np.concatenate(list(_resampled_means(values, resamples, np.random.default_rng(seed))))
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _resampled_means(values: Floats, resamples: int, rng: np.random.Generator) -> Iterator[Floats]:
    step = max(1, DRAWS_AT_ONCE // len(values))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        yield values[rng.integers(0, len(values), size=(rows, len(values)))].mean(axis=1)


def paired_means(edited: Floats, base: Floats, confidence: float = 0.95) -> tuple[float, float, float]:
    """Difference (edited - base) of the means of values (n,) over the same pictures, and its bootstrap interval."""
    _check_pair(edited, base)
    difference = edited - base
    return float(difference.mean()), *bootstrap_mean(difference, confidence)


def _check_pair(edited: Floats, base: Floats) -> None:
    if edited.shape != base.shape or edited.ndim != 1 or len(edited) == 0:
        raise ValueError(f"need two equally long lists of values, got shapes {edited.shape} and {base.shape}")


def rate_summary(edited: Floats, base: Floats) -> dict[str, float | int]:
    """value, low, high, n, base, base_low, base_high, delta, delta_low, delta_high of 0/1 values (n,) each."""
    n = len(edited)
    low, high = wilson(int(edited.sum()), n)
    base_low, base_high = wilson(int(base.sum()), n)
    return _summary(float(edited.mean()), low, high, n, float(base.mean()), base_low, base_high) | _delta(
        paired_rates(edited, base)
    )


def mean_summary(edited: Floats, base: Floats) -> dict[str, float | int]:
    """The same keys as `rate_summary`, for values (n,) of any size, with bootstrap intervals over pictures."""
    low, high = bootstrap_mean(edited)
    base_low, base_high = bootstrap_mean(base)
    return _summary(float(edited.mean()), low, high, len(edited), float(base.mean()), base_low, base_high) | _delta(
        paired_means(edited, base)
    )


def _summary(
    value: float, low: float, high: float, n: int, base: float, base_low: float, base_high: float
) -> dict[str, float | int]:
    return {
        "value": value,
        "low": low,
        "high": high,
        "n": n,
        "base": base,
        "base_low": base_low,
        "base_high": base_high,
    }


def _delta(difference: tuple[float, float, float]) -> dict[str, float | int]:
    return dict(zip(("delta", "delta_low", "delta_high"), difference, strict=True))
