"""The paper's own points (Figs. 7 and 8, digitised) and laws, and what fitting those points again gives.

Units are those of its plots: N_nv and N_v are forward FLOPs per token, about twice the parameters, and C is
3 (N_nv + N_v) D. V is the nominal size of the codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scamo.config import MODEL_SIZES
from scamo.scaling.flops import forward_flops
from scamo.scaling.laws import LogLaw, PowerLaw, fit_constrained, fit_log_law, fit_power_law

# size, log10 C, V, D: the 19 points of Fig. 7.
POINTS = (
    ("44M", 14.382, 256, 1.536e6),
    ("44M", 14.418, 512, 1.664e6),
    ("44M", 14.539, 1024, 2.176e6),
    ("111M", 15.130, 256, 2.583e6),
    ("111M", 15.131, 512, 2.583e6),
    ("111M", 15.133, 1024, 2.583e6),
    ("111M", 15.234, 2048, 3.229e6),
    ("111M", 15.241, 4096, 3.229e6),
    ("343M", 16.110, 512, 6.985e6),
    ("343M", 16.111, 1024, 6.985e6),
    ("343M", 16.170, 2048, 7.983e6),
    ("343M", 16.270, 4096, 9.978e6),
    ("343M", 16.367, 16384, 1.197e7),
    ("775M", 16.835, 4096, 1.578e7),
    ("775M", 16.999, 16384, 2.255e7),
    ("1.4B", 17.233, 16384, 2.036e7),
    ("1.4B", 17.411, 65536, 2.909e7),
    ("3B", 17.898, 16384, 4.364e7),
    ("3B", 18.221, 65536, 8.727e7),
)
CODES = (256, 512, 1024, 2048, 4096, 16384, 65536)
# Fig. 8: the best L_u of every size, for CODES.
BEST = {
    "44M": (-1.617, -1.693, -1.805, -1.802, -1.492, -0.705, -0.185),
    "111M": (-1.904, -2.069, -2.334, -2.411, -2.417, -2.026, -1.348),
    "343M": (-2.263, -2.545, -2.952, -3.140, -3.529, -3.658, -3.239),
    "775M": (-2.495, -2.854, -3.324, -3.628, -4.125, -4.467, -4.388),
    "1.4B": (-2.509, -2.917, -3.437, -3.811, -4.351, -4.709, -4.758),
    "3B": (-2.567, -3.002, -3.587, -3.973, -4.585, -5.128, -5.545),
}
# One vocabulary a size: the points from which Eq. 10 comes.
EQ_10 = (
    ("44M", 256),
    ("111M", 4096),
    ("343M", 16384),
    ("775M", 16384),
    ("1.4B", 65536),
    ("3B", 65536),
)
# The sizes as the paper's names have them, in millions, and the tokens between two of its points at 44.
NOMINAL = {"44M": 44, "111M": 111, "343M": 343, "775M": 775, "1.4B": 1000, "3B": 3000}
TOKENS_A_POINT = 128_000
# (exponent or slope, intercept) as printed.
PRINTED = {
    "N_v ~ C^a": (0.75, -5.29),
    "N_nv ~ C^b": (0.57, -0.52),
    "D ~ C^c": (0.43, -0.05),
    "N_v ~ N_nv^g": (1.467, -5.604),
    "L_u ~ log C": (-1.062, 13.839),
}


def _forward(size: str) -> float:
    layers, _, width = MODEL_SIZES[size]
    return forward_flops(layers, width)


def _vocabulary(size: str, codes: int) -> float:
    return float(2 * codes * MODEL_SIZES[size][2])


@dataclass(frozen=True)
class Row:
    """A law three times: refitted by least squares, refitted under b + c = 1 (None where that is no part of
    it), and printed; each (exponent or slope, intercept). r2 and points are of the first."""

    law: str
    refit: tuple[float, float]
    r2: float
    points: int
    constrained: tuple[float, float] | None
    printed: tuple[float, float]

    @property
    def difference(self) -> tuple[float, float]:
        """The refit less what is printed."""
        return self.refit[0] - self.printed[0], self.refit[1] - self.printed[1]


def refit() -> list[Row]:
    """The paper's laws from the paper's points."""
    compute = [10**log_c for _, log_c, _, _ in POINTS]
    tokens = [d for *_, d in POINTS]
    n_nv = [_forward(size) for size, *_ in POINTS]
    n_v = [_vocabulary(size, codes) for size, _, codes, _ in POINTS]
    l_u = [BEST[size][CODES.index(codes)] for size, _, codes, _ in POINTS]
    with_b, with_c = fit_constrained(compute, n_nv, tokens)
    eq_10 = fit_power_law(
        [_forward(size) for size, _ in EQ_10], [_vocabulary(size, codes) for size, codes in EQ_10]
    )
    laws: list[tuple[PowerLaw | LogLaw, PowerLaw | None]] = [
        (fit_power_law(compute, n_v), None),
        (fit_power_law(compute, n_nv), with_b),
        (fit_power_law(compute, tokens), with_c),
        (eq_10, None),
        (fit_log_law(compute, l_u), None),
    ]
    return [
        Row(name, _pair(law), law.r2, law.points, _pair(other) if other else None, PRINTED[name])
        for name, (law, other) in zip(PRINTED, laws, strict=True)
    ]


def _pair(law: PowerLaw | LogLaw) -> tuple[float, float]:
    return (law.exponent if isinstance(law, PowerLaw) else law.slope), law.intercept


def eq_10_from_all_points() -> PowerLaw:
    """What Eq. 10 would be from the 19 points of Fig. 7."""
    return fit_power_law(
        [_forward(size) for size, *_ in POINTS],
        [_vocabulary(size, codes) for size, _, codes, _ in POINTS],
    )


@dataclass(frozen=True)
class Construction:
    """How far the paper's D was set by its size.

    multiples: D of every point in units of 128,000 nominal size / 44M. exponent: of D ~ C^c if every size
    had been stopped after the same number of units. explained: the share of the variance of log D that the
    unit alone explains.
    """

    multiples: tuple[float, ...]
    exponent: float
    explained: float


def construction() -> Construction:
    units = [TOKENS_A_POINT * NOMINAL[size] / NOMINAL["44M"] for size, *_ in POINTS]
    tokens = [d for *_, d in POINTS]
    return Construction(
        tuple(d / unit for d, unit in zip(tokens, units, strict=True)),
        fit_power_law([10**log_c for _, log_c, _, _ in POINTS], units).exponent,
        fit_power_law(units, tokens).r2,
    )


def table(rows: Sequence[Row] | None = None) -> str:
    """Markdown: refit, fit under b + c = 1, printed, difference; then what to know about the points."""

    def cell(pair: tuple[float, float] | None) -> str:
        return "" if pair is None else f"{pair[0]:.3f}, {pair[1]:.3f}"

    lines = [
        "| law: exponent, intercept | least squares | R² | points | under b + c = 1 | printed | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows if rows is not None else refit():
        gaps = f"{row.difference[0]:+.3f}, {row.difference[1]:+.3f}"
        lines.append(
            f"| {row.law} | {cell(row.refit)} | {row.r2:.3f} | {row.points} | {cell(row.constrained)} "
            f"| {cell(row.printed)} | {gaps} |"
        )
    every, made = eq_10_from_all_points(), construction()
    multiples = np.round(made.multiples).astype(int)
    lines += [
        "",
        f"N_v ~ N_nv^g is from six points, one vocabulary a size; all {every.points} give "
        f"{every.exponent:.3f}, {every.intercept:.3f} (R² {every.r2:.3f}).",
        f"Every D is a whole multiple ({multiples.min()} to {multiples.max()}) of 128,000 tokens x size / "
        f"44M. That unit alone explains {made.explained:.1%} of the variance of log D, and had every size "
        f"been stopped after as many units, c would be {made.exponent:.3f}. So far D's growth with C was set "
        "and not found.",
    ]
    return "\n".join(lines)
