"""`scamo scaling fit`: laws from runs, with intervals, and how well they foretell the largest budget."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from scamo.errors import ScaMoError
from scamo.motion.files import replacing
from scamo.scaling import points as pts
from scamo.scaling.laws import (
    LogLaw,
    PowerLaw,
    Surface,
    bootstrap,
    fit_constrained,
    fit_log_law,
    fit_power_law,
    fit_surface,
    interval,
)
from scamo.scaling.points import Convention, Point, Run

FORMAT = "scamo-scaling-fit-1"
SELECTIONS = ("lowest", "envelope")


@dataclass(frozen=True)
class Laws:
    """The paper's laws on one selection of points: Eqs. 9-14 and Eq. 10.

    constrained: N_nv and D once more under b + c = 1, the paper's first step; its second, N_v, is n_v.
    n_v_of_n_nv is None where all points have one size.
    """

    n_v: PowerLaw
    n_nv: PowerLaw
    tokens: PowerLaw
    l_u: LogLaw
    constrained: tuple[PowerLaw, PowerLaw]
    n_v_of_n_nv: PowerLaw | None


def fit_laws(selected: Sequence[Point]) -> Laws:
    """All laws of a selection. Raises ScaMoError for fewer than three points or two different C."""
    if len(selected) < 3:
        raise ScaMoError(
            f"too few runs to fit: {len(selected)} selected points, expected 3 or more at different budgets"
        )
    c, n, v, d, loss = (
        [getattr(p, name) for p in selected] for name in ("compute", "n_nv", "n_v", "tokens", "l_u")
    )
    return Laws(
        n_v=fit_power_law(c, v),
        n_nv=fit_power_law(c, n),
        tokens=fit_power_law(c, d),
        l_u=fit_log_law(c, loss),
        constrained=fit_constrained(c, n, d),
        n_v_of_n_nv=fit_power_law(n, v) if len(set(n)) > 1 else None,
    )


def select(
    runs: Sequence[Run], selection: str, convention: Convention, budgets: Sequence[float]
) -> list[Point]:
    """`lowest`: the run of lowest L_u at each budget, as the paper does; `envelope`: of all validations."""
    if selection == "lowest":
        return pts.lowest_by_budget(pts.last_points(runs, convention), budgets)
    return pts.envelope([point for run in runs for point in pts.curve(run, convention)])


def _laws_of(runs: Sequence[Run], selection: str, convention: Convention, budgets: Sequence[float]) -> Laws:
    return fit_laws(select(runs, selection, convention, budgets))


def surface_of(
    runs: Sequence[Run], convention: Convention, *, coupled: bool, near: Surface | None = None
) -> Surface:
    """The surface through the ends of all finished runs that did not overfit."""
    ends = pts.last_points([run for run in runs if not run.overfitted], convention)
    columns = [[getattr(p, name) for p in ends] for name in ("n_nv", "n_v", "tokens", "l_u")]
    return fit_surface(*columns, coupled=coupled, near=near)


def cost_of(runs: Sequence[Run], convention: Convention) -> tuple[float, float]:
    """(a, b) of C = (a N_nv + b N_v) D.

    The paper's are 3 and 3. Ours are 6 for the vocabulary, and for the blocks 6 times the positions that a
    motion token brings along, attention included: the median of the runs.
    """
    if convention == "paper":
        return 3.0, 3.0
    blocks = [
        (run.flops[-1] / run.tokens[-1] - 6 * run.n_v(convention)) / run.n_nv(convention) for run in runs
    ]
    return float(np.median(blocks)), 6.0


@dataclass
class Fit:
    """What `fit_runs` found; `as_dict` is what fit.json holds."""

    convention: Convention
    runs: list[Run]
    warnings: list[str]
    budgets: list[float]
    selected: dict[str, list[Point]]
    laws: dict[str, Laws]
    # Of the runs resampled.
    draws: dict[str, list[Laws]]
    surfaces: dict[str, Surface]
    surface_draws: dict[str, list[Surface]]
    cost: tuple[float, float]
    held_out: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        plain = dataclasses.asdict
        return {
            "format": FORMAT,
            "convention": self.convention,
            "warnings": self.warnings,
            "budgets": self.budgets,
            "cost": self.cost,
            "selections": {
                name: {
                    "points": [plain(p) for p in self.selected[name]],
                    "laws": plain(self.laws[name]),
                    "draws": [_numbers(draw) for draw in self.draws[name]],
                }
                for name in self.laws
            },
            "surfaces": {
                name: {**plain(surface), "draws": [plain(draw) for draw in self.surface_draws[name]]}
                for name, surface in self.surfaces.items()
            },
            "held_out": self.held_out,
            "runs": [_summary(run, self.convention) for run in self.runs],
        }


def _numbers(laws: Laws) -> dict[str, list[float]]:
    """The two numbers of every law."""
    found = {}
    for field in ("n_v", "n_nv", "tokens", "l_u", "n_v_of_n_nv"):
        law = getattr(laws, field)
        if law is not None:
            found[field] = list(dataclasses.astuple(law)[:2])
    found["constrained"] = [laws.constrained[0].exponent, laws.constrained[1].exponent]
    return found


def _summary(run: Run, convention: Convention) -> dict[str, Any]:
    return {
        "run": run.name,
        "size": run.size,
        "layers": run.model.layers,
        "width": run.model.width,
        "parameters": run.n_nv("counted"),
        "codes": run.model.codes,
        "seed": run.seed,
        "n_nv": run.n_nv(convention),
        "n_v": run.n_v(convention),
        "motion_tokens": float(run.tokens[-1]),
        "positions": float(run.positions[-1]),
        "flops": float(run.flops[-1]),
        "compute": float(run.compute(convention)[-1]),
        "l_u": float(run.l_u[-1]),
        "lowest_l_u": float(run.l_u.min()),
        "loss": float(run.loss[-1]),
        "finished": run.finished,
        "overfitted": run.overfitted,
    }


def fit_runs(
    folders: Sequence[str | Path],
    *,
    convention: Convention = "counted",
    draws: int = 300,
    seed: int = 0,
) -> Fit:
    """Fit every law to the runs below some folders.

    Args:
        folders: runs of `train.py`, or folders of them.
        convention: how C, N_nv and N_v are counted, see `scamo.scaling.points`.
        draws: resamples of the runs, for intervals; 0 leaves them out.
        seed: of the resamples.

    Returns:
        A `Fit`. A law that the runs are too few for is missing from it, with a warning.

    Raises:
        ScaMoError: no usable run, runs of different datasets or tokenizers, too few for any law.
    """
    runs, warnings = pts.read_runs(folders)
    overfitted = [run.name for run in runs if run.overfitted]
    if overfitted:
        warnings.append(f"overfitted, no part of the surfaces: {', '.join(overfitted)}")
    budgets = pts.budgets_of(pts.last_points(runs, convention))
    fit = Fit(convention, runs, warnings, budgets, {}, {}, {}, {}, {}, cost_of(runs, convention), None)
    for selection in SELECTIONS:
        try:
            chosen = select(runs, selection, convention, budgets)
            fit.laws[selection] = fit_laws(chosen)
        except ScaMoError as error:
            warnings.append(f"no laws from the {selection} points: {error}")
            continue
        fit.selected[selection] = chosen
        again = partial(_laws_of, selection=selection, convention=convention, budgets=budgets)
        fit.draws[selection] = _resampled(runs, again, draws, seed)
    if not fit.laws:
        raise ScaMoError("\n".join(warnings))
    for name in ("additive", "coupled"):
        coupled = name == "coupled"
        try:
            surface = surface_of(runs, convention, coupled=coupled)
        except ScaMoError as error:
            warnings.append(f"no {name} surface: {error}")
            continue
        fit.surfaces[name] = surface
        surface_again = partial(surface_of, convention=convention, coupled=coupled, near=surface)
        fit.surface_draws[name] = _resampled(runs, surface_again, draws, seed)
    fit.held_out = leave_largest_out(runs, convention)
    if fit.held_out is None:
        warnings.append("nothing was held out: that takes runs at four budgets or more")
    return fit


def _resampled(runs: Sequence[Run], fit: Callable[[list[Run]], Any], draws: int, seed: int) -> list[Any]:
    fits, _ = bootstrap(lambda index: fit([runs[i] for i in index]), len(runs), draws=draws, seed=seed)
    return fits


def leave_largest_out(runs: Sequence[Run], convention: Convention) -> dict[str, Any] | None:
    """Predict the largest budget from the smaller ones and compare; None for fewer than four budgets.

    Returns for each selection and surface the predicted L_u, its error in nats and as a share of the
    measured one, and N_nv, N_v, D; `measured` is the run of lowest L_u at that budget.
    """
    ends = pts.last_points(runs, convention)
    budgets = pts.budgets_of(ends)
    if len(budgets) < 4:
        return None
    largest = budgets[-1]
    (best,) = pts.lowest_by_budget(ends, [largest])
    limit = budgets[-2] * (1 + pts.NEAR)
    known = [run for run in runs if run.compute(convention)[-1] <= limit]
    found: dict[str, Any] = {
        "budget": largest,
        "runs": len(known),
        "measured": dataclasses.asdict(best),
        "predicted": {},
    }

    def add(name: str, n_nv: float, n_v: float, tokens: float, l_u: float, **more: float) -> None:
        error = l_u - best.l_u
        found["predicted"][name] = {
            "n_nv": n_nv,
            "n_v": n_v,
            "tokens": tokens,
            "l_u": l_u,
            "error": error,
            "relative_error": error / abs(best.l_u),
            **more,
        }

    for selection in SELECTIONS:
        try:
            laws = fit_laws(select(known, selection, convention, budgets[:-1]))
        except ScaMoError:
            continue
        add(selection, laws.n_nv(largest), laws.n_v(largest), laws.tokens(largest), laws.l_u(largest))
    cost = cost_of(known, convention)
    there = [p for p in ends if p.compute > limit]
    for name in ("additive", "coupled"):
        try:
            surface = surface_of(known, convention, coupled=name == "coupled")
        except ScaMoError:
            continue
        # At the measured runs themselves: no choice of size or vocabulary is part of this error.
        gaps = [float(surface(p.n_nv, p.n_v, p.tokens)) - p.l_u for p in there]
        optimum = surface.best(largest, lambda n, v: cost[0] * n + cost[1] * v)
        at_best = float(surface(best.n_nv, best.n_v, best.tokens))
        add(
            name,
            *optimum[:3],
            at_best,
            optimum_l_u=optimum[3],
            mean_absolute_error=float(np.mean(np.abs(gaps))),
        )
    return found


def intervals(fit: Fit, selection: str) -> dict[str, tuple[float, float]]:
    """95% of the exponents (and the slope of L_u) of a selection."""
    rows = [_numbers(draw) for draw in fit.draws[selection]]
    fields = ("n_v", "n_nv", "tokens", "l_u", "n_v_of_n_nv")
    found = {name: interval([row[name][0] for row in rows if name in row]) for name in fields}
    for k, name in enumerate(("constrained n_nv", "constrained tokens")):
        found[name] = interval([row["constrained"][k] for row in rows])
    return found


def write_fit(fit: Fit, folder: Path) -> None:
    """fit.json and table.md into a folder, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"fit.json": json.dumps(_plain(fit.as_dict()), indent=1), "table.md": table(fit)}
    for name, text in texts.items():
        with replacing(folder / name) as partial:
            partial.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """JSON has no NaN (the R² of a law whose y is all alike): null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(fit: Fit) -> str:
    """The laws, the surfaces and what was held out, as Markdown."""
    span = f", {fit.budgets[0]:.2e} to {fit.budgets[-1]:.2e} FLOPs" if fit.budgets else ""
    lines = [
        f"{len(fit.runs)} runs at {len(fit.budgets)} budgets{span}.",
        "",
        "| points | law | exponent | 95% | intercept | R² | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for selection, laws in fit.laws.items():
        bounds = intervals(fit, selection)
        rows: list[tuple[str, str, PowerLaw | LogLaw | None]] = [
            ("N_v ~ C^a", "n_v", laws.n_v),
            ("N_nv ~ C^b", "n_nv", laws.n_nv),
            ("D ~ C^c", "tokens", laws.tokens),
            ("N_nv ~ C^b, b + c = 1", "constrained n_nv", laws.constrained[0]),
            ("D ~ C^c, b + c = 1", "constrained tokens", laws.constrained[1]),
            ("N_v ~ N_nv^g", "n_v_of_n_nv", laws.n_v_of_n_nv),
            ("L_u ~ log C", "l_u", laws.l_u),
        ]
        for label, name, law in rows:
            if law is None:
                continue
            first = law.slope if isinstance(law, LogLaw) else law.exponent
            low, high = bounds[name]
            inside = "" if math.isnan(low) else f"{low:.3f} to {high:.3f}"
            lines.append(
                f"| {selection} | {label} | {first:.3f} | {inside} | {law.intercept:.3f} | {law.r2:.3f} "
                f"| {law.points} |"
            )
    for name, surface in fit.surfaces.items():
        names = ("N_nv", "N_v", "D", "D / N_v")
        parts = " + ".join(
            f"{math.exp(a):.3g} ({x}{f' / {u:.2e}' if u else ''})^-{e:.3f}"
            for (a, e), x, u in zip(surface.terms, names, (*surface.unit, 0), strict=False)
        )
        lines += ["", f"{name} surface ({surface.points} runs): L_u = {parts} - {surface.limit:.3f}"]
    if fit.held_out:
        measured = fit.held_out["measured"]
        lines += [
            "",
            f"Budget {fit.held_out['budget']:.2e} left out: measured {measured['l_u']:.3f} "
            f"({measured['size']}, {measured['codes']} codes).",
            "",
            "| from | predicted L_u | error | N_nv | N_v | D |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in fit.held_out["predicted"].items():
            lines.append(
                f"| {name} | {row['l_u']:.3f} | {row['error']:+.3f} ({row['relative_error']:+.1%}) "
                f"| {row['n_nv']:.3g} | {row['n_v']:.3g} | {row['tokens']:.3g} |"
            )
    return "\n".join(lines)
