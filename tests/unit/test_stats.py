"""Intervals against published or hand-worked values."""

import numpy as np
import pytest

from unpaint.evaluation.stats import bootstrap_mean, paired_means, paired_rates, rate_summary, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
        (95, 100, 0.8882, 0.9785),
    ],
)
def test_wilson_against_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_what_is_no_rate(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, n)


def cells(both: int, gained: int, lost: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    edited = np.repeat([1.0, 1.0, 0.0, 0.0], [both, gained, lost, neither])
    base = np.repeat([1.0, 0.0, 1.0, 0.0], [both, gained, lost, neither])
    return edited, base


def test_paired_rates_against_a_worked_example() -> None:
    # Agresti and Min 2005, prime minister approval (Agresti 1990, table 10.1): 794, 150, 86, 570; by hand
    # n* = 1602, (86.5 - 150.5) / 1602 = -.039950, se = sqrt(237 - 64^2 / 1602) / 1602 = .0095578
    delta, low, high = paired_rates(*cells(both=794, gained=86, lost=150, neither=570))
    assert delta == pytest.approx(-64 / 1600)
    assert (low, high) == pytest.approx((-0.0586828, -0.0212171), abs=1e-6)


def test_paired_rates_know_that_pairs_are_not_independent() -> None:
    edited, base = cells(both=50, gained=0, lost=0, neither=50)
    delta, low, high = paired_rates(edited, base)
    assert delta == 0
    assert low == pytest.approx(-high)
    assert high < 0.025  # two independent samples of 100 would give .14
    with pytest.raises(ValueError, match="equally long"):
        paired_rates(edited[:50], base)


def test_bootstrap_agrees_with_theory_and_is_reproducible() -> None:
    values = np.random.default_rng(3).normal(5.0, 2.0, size=400)
    low, high = bootstrap_mean(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert bootstrap_mean(values) == (low, high)
    assert bootstrap_mean(np.full(7, 0.25)) == (0.25, 0.25)


def test_bootstrap_against_every_resample_of_two_values() -> None:
    # The mean of two draws from {0, 1} is 0, .5, 1 with probability 1/4, 1/2, 1/4.
    assert bootstrap_mean(np.array([0.0, 1.0]), confidence=0.4) == (0.5, 0.5)
    assert bootstrap_mean(np.array([0.0, 1.0]), confidence=0.6) == (0.0, 1.0)


def test_bootstrap_does_not_depend_on_how_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(50)
    whole = bootstrap_mean(values, resamples=200)
    monkeypatch.setattr("unpaint.evaluation.stats.DRAWS_AT_ONCE", 700)
    assert bootstrap_mean(values, resamples=200) == whole


def test_paired_means_cancel_what_both_models_share() -> None:
    base = np.random.default_rng(1).normal(0, 10, size=100)
    delta, low, high = paired_means(base - 0.5, base)
    assert (delta, low, high) == pytest.approx((-0.5, -0.5, -0.5))


def test_summary_of_a_rate() -> None:
    edited, base = cells(both=1, gained=7, lost=0, neither=2)
    summary = rate_summary(edited, base)
    assert summary["value"] == 0.8
    assert summary["n"] == 10
    assert summary["base"] == 0.1
    assert summary["delta"] == pytest.approx(0.7)
    assert summary["low"] < 0.8 < summary["high"]
    assert summary["base_low"] < 0.1 < summary["base_high"]
