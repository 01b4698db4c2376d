"""Scaling laws and how they are fitted: power laws, the law of L_u, and a surface L_u(N_nv, N_v, D).

Symbols are the paper's (section 3.4): C compute in FLOPs, N_nv non-vocabulary parameters, N_v vocabulary
parameters, D motion tokens, L_u normalised loss in nats. What is counted as each is the business of
`scamo.scaling.points`; nothing here depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares, minimize_scalar, nnls

from scamo.errors import ScaMoError

Array = NDArray[np.float64]
# Nats from which on a residual counts linearly: about what another seed moves L_u by.
HUBER_DELTA = 0.02
# Exponents of a surface's terms, and those that its fits start from.
EXPONENTS = 0.01, 3.0
STARTS = 0.1, 0.35, 0.9
# Of all combinations, the fits begin from this many: those that are best with their coefficients solved for.
FOLLOWED = 12


@dataclass(frozen=True)
class PowerLaw:
    """y = 10**intercept * x**exponent; r2 is that of log10 y, points how many it was fitted to."""

    exponent: float
    intercept: float
    r2: float
    points: int

    def __call__(self, x: ArrayLike) -> Any:
        return 10 ** (self.intercept + self.exponent * np.log10(x))


@dataclass(frozen=True)
class LogLaw:
    """y = intercept + slope * log10 x (paper Eq. 14); r2 is that of y."""

    slope: float
    intercept: float
    r2: float
    points: int

    def __call__(self, x: ArrayLike) -> Any:
        return self.intercept + self.slope * np.log10(x)


def fit_power_law(x: ArrayLike, y: ArrayLike) -> PowerLaw:
    """Least squares in log10.

    Raises ScaMoError naming the point where a value is not finite or not positive, and when there are fewer
    than two different x.
    """
    log_x = _logs("x", x)
    return PowerLaw(*_line(log_x, _logs("y", y)), len(log_x))


def fit_log_law(x: ArrayLike, y: ArrayLike) -> LogLaw:
    """Least squares of y on log10 x; errors as `fit_power_law`, y may be negative."""
    log_x = _logs("x", x)
    return LogLaw(*_line(log_x, _finite("y", y)), len(log_x))


def fit_constrained(compute: ArrayLike, n_nv: ArrayLike, tokens: ArrayLike) -> tuple[PowerLaw, PowerLaw]:
    """N_nv ~ C^b and D ~ C^c under b + c = 1, as C ~ N_nv D asks for: the first of the paper's two steps.

    The sum of both laws' squared errors in log10 is least. Returns the two; errors as `fit_power_law`.
    """
    c, n, d = _logs("compute", compute), _logs("n_nv", n_nv), _logs("tokens", tokens)
    _line(c, n), _line(c, d)  # their checks
    x = c - c.mean()
    b = float((x @ n + x @ (x - d)) / (2 * x @ x))
    laws = []
    for exponent, y in ((b, n), (1 - b, d)):
        intercept = float(y.mean() - exponent * c.mean())
        laws.append(PowerLaw(exponent, intercept, _r2(y, intercept + exponent * c), len(c)))
    return laws[0], laws[1]


def _finite(name: str, values: ArrayLike) -> Array:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1:
        raise ScaMoError(f"{name}: expected one number a point, got shape {column.shape}")
    bad = np.flatnonzero(~np.isfinite(column))
    if len(bad):
        raise ScaMoError(f"{name}[{bad[0]}] = {column[bad[0]]} is not finite")
    return column


def _logs(name: str, values: ArrayLike) -> Array:
    column = _finite(name, values)
    bad = np.flatnonzero(column <= 0)
    if len(bad):
        raise ScaMoError(f"{name}[{bad[0]}] = {column[bad[0]]:g}: a power law needs positive values")
    return np.log10(column)


def _line(x: Array, y: Array) -> tuple[float, float, float]:
    """Least squares: slope, intercept, R^2."""
    if len(x) != len(y):
        raise ScaMoError(f"{len(x)} values of x and {len(y)} of y")
    different = len(np.unique(x))
    if different < 2:
        raise ScaMoError(f"too few points: a law needs two different values of x, got {different}")
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    intercept = float(y.mean() - slope * x.mean())
    return slope, intercept, _r2(y, slope * x + intercept)


def _r2(y: Array, fitted: Array) -> float:
    """NaN where all of y are equal but for rounding."""
    if np.ptp(y) <= 1e-9 * np.abs(y).max():
        return float("nan")
    return 1 - float(((y - fitted) ** 2).sum() / ((y - y.mean()) ** 2).sum())


# -- a surface -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Surface:
    """L_u(N_nv, N_v, D) = e^a N_nv^-alpha + e^v N_v^-beta + e^d D^-delta [+ e^m (N_v / D)^mu] - limit.

    Hoffmann et al. (2022, approach 3) with a term for the vocabulary, as Tao et al. (2024) have it: what a
    finite model, a finite vocabulary and finite data cost, and what is left without them. The last term is
    ours (`coupled`): codes too many for the tokens that are to teach them, which no sum of functions of one
    variable can say. L_u is negative, so that there is no logarithm of it to fit as Hoffmann et al. do: the
    Huber loss is of L_u itself, in nats, and the costs are exponentials of sums of logarithms.

    terms: (log coefficient, exponent), the variables divided by `unit` (geometric means of the fitted N_nv,
    N_v, D) first. loss: mean Huber loss of the fit.
    """

    limit: float
    terms: tuple[tuple[float, float], ...]
    unit: tuple[float, float, float]
    loss: float
    points: int

    @property
    def coupled(self) -> bool:
        return len(self.terms) == 4

    def __call__(self, n_nv: ArrayLike, n_v: ArrayLike, tokens: ArrayLike) -> Any:
        """L_u in nats."""
        logs = _variables(n_nv, n_v, tokens, self.unit, coupled=self.coupled)
        return sum(np.exp(a - e * x) for (a, e), x in zip(self.terms, logs, strict=True)) - self.limit

    def best(
        self,
        compute: float,
        cost: Callable[[float, float], float] = lambda n_nv, n_v: 6 * (n_nv + n_v),
        n_v: float | None = None,
    ) -> tuple[float, float, float, float]:
        """(N_nv, N_v, D, L_u) of the least L_u for a compute, in FLOPs.

        cost: FLOPs per motion token. n_v: the vocabulary's parameters where they are given. The search ends
        three decades from the middle of the fitted points.
        """

        def at(log_n: float, log_v: float) -> tuple[float, float, float, float]:
            n, v = float(np.exp(log_n)), float(np.exp(log_v))
            tokens = compute / cost(n, v)
            return n, v, tokens, float(self(n, v, tokens))

        def inner(log_v: float) -> float:
            return _minimum(lambda log_n: at(log_n, log_v)[3], float(np.log(self.unit[0])))

        log_v = (
            float(np.log(n_v))
            if n_v is not None
            else _minimum(lambda v: at(inner(v), v)[3], float(np.log(self.unit[1])))
        )
        return at(inner(log_v), log_v)


def _minimum(function: Callable[[float], float], middle: float) -> float:
    """Where a function of a logarithm is least; a grid first, as it may have two valleys."""
    grid = middle + np.log(10) * np.linspace(-3, 3, 61)
    lowest = int(np.argmin([function(float(g)) for g in grid]))
    bounds = grid[max(lowest - 1, 0)], grid[min(lowest + 1, len(grid) - 1)]
    return float(minimize_scalar(function, bounds=bounds, method="bounded", options={"xatol": 1e-5}).x)


def _variables(
    n_nv: ArrayLike, n_v: ArrayLike, tokens: ArrayLike, unit: tuple[float, float, float], *, coupled: bool
) -> list[Any]:
    """Logarithms in which every term falls."""
    n, v, d = (np.log(np.asarray(x, float) / u) for x, u in zip((n_nv, n_v, tokens), unit, strict=True))
    return [n, v, d, d - v] if coupled else [n, v, d]


def fit_surface(
    n_nv: ArrayLike,
    n_v: ArrayLike,
    tokens: ArrayLike,
    l_u: ArrayLike,
    *,
    coupled: bool = False,
    delta: float = HUBER_DELTA,
    near: Surface | None = None,
) -> Surface:
    """The `Surface` of least Huber loss, from many starts: the best combinations of STARTS as exponents.

    Args:
        n_nv, n_v, tokens, l_u: a value a run.
        coupled: with the term in N_v / D.
        delta: nats from which on a residual counts linearly.
        near: start from this surface alone (for a bootstrap).

    Raises:
        ScaMoError: fewer points than numbers to fit plus one, only one value of a variable, bad values.
    """
    names = ("n_nv", "n_v", "tokens")
    values = [10 ** _logs(name, x) for name, x in zip(names, (n_nv, n_v, tokens), strict=True)]
    measured = _finite("l_u", l_u)
    numbers = 9 if coupled else 7
    if len(measured) <= numbers:
        raise ScaMoError(f"too few points: a surface of {numbers} numbers needs more than {len(measured)}")
    for name, column in zip(names, values, strict=True):
        if len(column) != len(measured):
            raise ScaMoError(f"{len(column)} values of {name} and {len(measured)} of l_u")
        if len(np.unique(column)) < 2:
            raise ScaMoError(f"{name} = {column[0]:g} at every point: its term cannot be fitted")
    means = [float(np.exp(np.log(column).mean())) for column in values]
    unit = means[0], means[1], means[2]
    logs = np.stack(_variables(values[0], values[1], values[2], unit, coupled=coupled))
    k = len(logs)

    def terms(theta: Array) -> Array:
        return np.exp(np.clip(theta[1 : k + 1, None] - theta[k + 1 :, None] * logs, -700, 50))

    def residuals(theta: Array) -> Array:
        return terms(theta).sum(0) - theta[0] - measured

    def jacobian(theta: Array) -> Array:
        each = terms(theta)
        return np.concatenate([np.full((1, len(measured)), -1.0), each, -logs * each]).T

    low = np.array([-np.inf] + [-50.0] * k + [EXPONENTS[0]] * k)
    high = np.array([np.inf] + [50.0] * k + [EXPONENTS[1]] * k)
    best = None
    for start in _starts(logs, measured, near, unit):
        found = least_squares(
            residuals,
            np.clip(start, low, high),
            jacobian,
            bounds=(low, high),
            loss="huber",
            f_scale=delta,
            x_scale="jac",
            max_nfev=400,
        )
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    pairs = tuple((float(a), float(e)) for a, e in zip(best.x[1 : k + 1], best.x[k + 1 :], strict=True))
    return Surface(float(best.x[0]), pairs, unit, float(best.cost) / len(measured), len(measured))


def _starts(logs: Array, measured: Array, near: Surface | None, unit: Sequence[float]) -> list[Array]:
    k = len(logs)
    if near is not None:
        # Its units are other ones: e^a (x / u)^-e = e^(a + e log(u / u')) (x / u')^-e.
        moved = np.log(np.asarray(unit) / np.asarray(near.unit))
        moved = np.append(moved, moved[2] - moved[1])[:k]
        pairs = np.array(near.terms)
        return [np.concatenate([[near.limit], pairs[:, 0] - pairs[:, 1] * moved, pairs[:, 1]])]
    found = []
    for exponents in product(STARTS, repeat=k):
        # Given the exponents the rest is linear; -limit may have either sign, which nnls has not.
        basis = np.exp(-np.array(exponents)[:, None] * logs)
        columns = np.concatenate([basis, np.ones((1, len(measured))), -np.ones((1, len(measured)))]).T
        solution, residual = nnls(columns, measured)
        coefficients = np.log(np.maximum(solution[:k], 1e-3 * max(np.ptp(measured), 1e-6)))
        limit = solution[k + 1] - solution[k]
        found.append((residual, np.concatenate([[limit], coefficients, exponents])))
    return [start for _, start in sorted(found, key=lambda pair: pair[0])[:FOLLOWED]]


# -- how sure ------------------------------------------------------------------------------------------------


def bootstrap(
    fit: Callable[[NDArray[np.int64]], Any], points: int, *, draws: int = 1000, seed: int = 0
) -> tuple[list[Any], int]:
    """Fits of `draws` resamples (with replacement) of `points` points; `fit` is given their indices.

    Returns the fits and how many resamples could not be fitted (ScaMoError: all points alike, mostly).
    """
    rng = np.random.default_rng(seed)
    fits, failed = [], 0
    for _ in range(draws):
        try:
            fits.append(fit(rng.integers(points, size=points)))
        except ScaMoError:
            failed += 1
    return fits, failed


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrapped values; (nan, nan) where there are none."""
    if not len(values):
        return float("nan"), float("nan")
    tail = 50 * (1 - level)
    low, high = np.percentile(np.asarray(values, dtype=np.float64), [tail, 100 - tail])
    return float(low), float(high)
