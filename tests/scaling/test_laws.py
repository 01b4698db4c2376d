"""Known laws are found again from points with noise, and what cannot be fitted is refused."""

import numpy as np
import pytest

from scamo.errors import ScaMoError
from scamo.scaling.laws import (
    Surface,
    bootstrap,
    fit_constrained,
    fit_log_law,
    fit_power_law,
    fit_surface,
    interval,
)

UNIT = (5e6, 3e5, 1e7)
ADDITIVE = Surface(5.5, ((0.3, 0.35), (0.2, 0.3), (0.4, 0.28)), UNIT, 0, 0)
COUPLED = Surface(5.5, ((0.3, 0.35), (0.2, 0.3), (0.4, 0.28), (-1.0, 0.7)), UNIT, 0, 0)


def grid():
    """N_nv, N_v, D of 90 IsoFLOP runs."""
    n, v, c = (
        x.ravel()
        for x in np.meshgrid(1e6 * 2.0 ** np.arange(6), [3e4, 1e5, 3e5, 1e6, 3e6], [1e13, 1e14, 1e15])
    )
    return n, v, c / 6 / (n + v)


def test_a_power_law_without_noise_is_exact():
    x = np.geomspace(1e12, 1e18, 7)
    law = fit_power_law(x, 10**-0.52 * x**0.57)
    assert (law.exponent, law.intercept, law.r2) == pytest.approx((0.57, -0.52, 1.0), abs=1e-12)
    assert np.isnan(fit_power_law([1e12, 3e12, 9e12], [28768.0] * 3).r2)
    assert law(1e20) == pytest.approx(10 ** (-0.52 + 0.57 * 20))


def test_the_log_law_without_noise_is_exact():
    x = np.geomspace(1e12, 1e18, 7)
    law = fit_log_law(x, 13.839 - 1.062 * np.log10(x))
    assert (law.slope, law.intercept, law.r2) == pytest.approx((-1.062, 13.839, 1.0), abs=1e-10)
    assert law(1e18) == pytest.approx(-5.277, abs=1e-3)


def test_the_constraint_shares_one_exponent_between_both_laws(rng):
    c = np.geomspace(1e14, 1e18, 40)
    n = 3 * c**0.6 * np.exp(0.1 * rng.standard_normal(40))
    d = c**0.4 / 18 * np.exp(0.1 * rng.standard_normal(40))
    with_b, with_c = fit_constrained(c, n, d)
    assert with_b.exponent + with_c.exponent == pytest.approx(1, abs=1e-12)
    assert with_b.exponent == pytest.approx(0.6, abs=0.02)
    # No other exponent has a smaller sum of squares.
    x = np.log10(c) - np.log10(c).mean()

    def squares(b):
        residuals = [np.log10(y) - np.log10(y).mean() - e * x for y, e in ((n, b), (d, 1 - b))]
        return sum((r**2).sum() for r in residuals)

    assert all(squares(with_b.exponent) < squares(with_b.exponent + e) for e in (-1e-3, 1e-3))


@pytest.mark.parametrize("true", [ADDITIVE, COUPLED], ids=["additive", "coupled"])
def test_a_surface_without_noise_is_found_exactly(true):
    points = grid()
    found = fit_surface(*points, true(*points), coupled=true.coupled)
    assert found.limit == pytest.approx(true.limit, rel=1e-4)
    assert [e for _, e in found.terms] == pytest.approx([e for _, e in true.terms], rel=1e-3)
    assert found(*points) == pytest.approx(true(*points), abs=1e-6)


def test_a_surface_is_found_through_noise_and_outliers(rng):
    points = grid()
    l_u = ADDITIVE(*points) + 0.01 * rng.standard_normal(len(points[0]))
    l_u[::30] += 2.0  # three runs went wrong: a square loss would follow them
    found = fit_surface(*points, l_u)
    assert [e for _, e in found.terms] == pytest.approx([0.35, 0.3, 0.28], abs=0.05)
    assert np.median(np.abs(found(*points) - ADDITIVE(*points))) < 0.01


@pytest.mark.parametrize("surface", [ADDITIVE, COUPLED], ids=["additive", "coupled"])
def test_best_is_the_lowest_of_a_fine_grid(surface):
    compute = 1e16
    n, v = (x.ravel() for x in np.meshgrid(np.geomspace(1e5, 1e9, 300), np.geomspace(1e4, 1e8, 300)))
    lowest = surface(n, v, compute / 6 / (n + v)).min()
    n_nv, n_v, tokens, l_u = surface.best(compute)
    assert 6 * (n_nv + n_v) * tokens == pytest.approx(compute)
    assert surface(n_nv, n_v, tokens) == pytest.approx(l_u)
    assert lowest - 1e-3 < l_u <= lowest
    given = surface.best(compute, n_v=n_v)
    assert given == pytest.approx((n_nv, n_v, tokens, l_u), rel=1e-3)


def test_a_bootstrap_covers_the_truth_about_as_often_as_it_says(rng):
    """100 experiments of 30 points: the 95% interval of the exponent holds 0.5 in most of them."""
    inside = 0
    for trial in range(100):
        x = np.geomspace(1e12, 1e18, 30)
        y = x**0.5 * np.exp(0.2 * rng.standard_normal(30))
        fits, failed = bootstrap(lambda i, x=x, y=y: fit_power_law(x[i], y[i]), 30, draws=200, seed=trial)
        assert len(fits) == 200 - failed
        low, high = interval([fit.exponent for fit in fits])
        inside += low <= 0.5 <= high
    assert 85 <= inside <= 99


def test_resamples_that_cannot_be_fitted_are_counted():
    x = np.array([1.0, 10.0])
    fits, failed = bootstrap(lambda i: fit_power_law(x[i], x[i]), 2, draws=100)
    assert failed > 20
    assert len(fits) + failed == 100
    assert np.isnan(interval([])).all()


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1e12, 1e12], [1.0, 2.0], "two different values"),
        ([1e12, 1e13], [1.0, -2.0], r"y\[1\] = -2: a power law needs positive"),
        ([1e12, np.nan], [1.0, 2.0], r"x\[1\] = nan is not finite"),
        ([1e12, 1e13], [1.0], "2 values of x and 1 of y"),
        ([[1e12, 1e13]], [1.0], "one number a point"),
    ],
)
def test_bad_points_are_named(x, y, message):
    with pytest.raises(ScaMoError, match=message):
        fit_power_law(x, y)


def test_a_surface_needs_enough_points_and_a_spread_of_each_variable():
    n, v, d = grid()
    with pytest.raises(ScaMoError, match="too few points: a surface of 7 numbers"):
        fit_surface(n[:7], v[:7], d[:7], np.zeros(7))
    with pytest.raises(ScaMoError, match="n_v = 30000 at every point"):
        fit_surface(n, np.full_like(v, 3e4), d, np.zeros_like(n))
