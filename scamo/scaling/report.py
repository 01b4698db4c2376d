"""Pictures of a fit, and one page with all: IsoFLOP curves, laws, what was foretold, sizes x vocabularies."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scamo.scaling import points as pts
from scamo.scaling.fit import Fit, Laws, table
from scamo.scaling.laws import interval
from scamo.studies.plots import as_html, colours, figure, write_page, write_pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Points of a drawn law.
SAMPLES = 60


def write_report(fit: Fit, folder: str | Path) -> list[Path]:
    """Draw a fit: FOLDER/isoflop.png, laws.png, curves.png, sizes.png, held_out.png and report.html with all.

    A picture for which there is nothing to draw is left out. Returns the files written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, tuple[str, Callable[[Fit], Figure | None]]] = {
        "isoflop": ("L_u over model size, a line a budget", _isoflop),
        "laws": ("The laws and their 95% bootstrap intervals", _laws),
        "curves": ("All runs, and their lower envelope", _curves),
        "sizes": ("The best L_u of every size and vocabulary", _sizes),
        "held_out": ("The largest budget, foretold from the smaller ones", _held_out),
    }
    figures = {name: (title, draw(fit)) for name, (title, draw) in pictures.items()}
    written, shown = write_pictures(folder, {n: (t, f) for n, (t, f) in figures.items() if f is not None})
    warnings = "".join(f"<li>{html.escape(warning)}</li>" for warning in fit.warnings)
    body = f"""<h1>Scaling laws</h1>
<p>C, N_nv and N_v: {html.escape(fit.convention)}. D: motion tokens with a loss. L_u: nats, lower is
better.</p>
{f"<h2>Left out, and to know</h2><ul>{warnings}</ul>" if warnings else ""}
{as_html(table(fit))}
{shown}"""
    return [*written, write_page(folder / "report.html", "Scaling laws", body)]


def _isoflop(fit: Fit) -> Figure | None:
    """A panel a vocabulary: the ends of the runs of each budget, seeds averaged."""
    groups = pts.isoflop(pts.last_points(fit.runs, fit.convention), fit.budgets)
    if not groups:
        return None
    vocabularies = sorted({point.codes for near in groups.values() for point in near})
    shades = colours(groups)
    drawn = figure(4.2 * len(vocabularies), 3.6)
    for k, codes in enumerate(vocabularies):
        axes = drawn.add_subplot(1, len(vocabularies), k + 1)
        for budget, near in groups.items():
            by_size: dict[float, list[float]] = {}
            for point in near:
                if point.codes == codes:
                    by_size.setdefault(point.n_nv, []).append(point.l_u)
            sizes = sorted(by_size)
            means = [float(np.mean(by_size[n])) for n in sizes]
            axes.plot(sizes, means, "o-", color=shades[budget], label=f"{budget:.1e}", markersize=4)
        axes.set(xscale="log", xlabel="N_nv", ylabel="L_u, nats", title=f"{codes:,d} codes")
        axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
        if k == 0:
            axes.legend(title="C, FLOPs", fontsize=7)
    return drawn


def _laws(fit: Fit) -> Figure | None:
    """N_nv, N_v, D and L_u over C; the first selection that there is."""
    if not fit.laws:
        return None
    name = next(iter(fit.laws))
    laws, draws, chosen = fit.laws[name], fit.draws[name], fit.selected[name]
    compute = [p.compute for p in chosen]
    x = np.geomspace(min(compute) / 2, max(compute) * 10, SAMPLES)
    drawn = figure(11, 7)
    fields = (("n_nv", "N_nv"), ("n_v", "N_v"), ("tokens", "D, motion tokens"), ("l_u", "L_u, nats"))
    for k, (key, label) in enumerate(fields):
        axes = drawn.add_subplot(2, 2, k + 1)
        law = getattr(laws, key)
        axes.plot(compute, [getattr(p, key) for p in chosen], "o", color="#b9305a", markersize=5)
        axes.plot(x, law(x), color="#40505f")
        _band(axes, x, draws, key)
        number = law.slope if key == "l_u" else law.exponent
        axes.set(
            xscale="log",
            xlabel="C, FLOPs",
            ylabel=label,
            title=f"{number:.3f}, R² {law.r2:.2f} ({name} points)",
        )
        if key != "l_u":
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    return drawn


def _band(axes: Axes, x: Any, draws: list[Laws], key: str) -> None:
    if len(draws) < 2:
        return
    values = np.array([getattr(draw, key)(x) for draw in draws])
    low, high = np.array([interval(column) for column in values.T]).T
    axes.fill_between(x, low, high, color="#2878b5", alpha=0.2, linewidth=0)


def _curves(fit: Fit) -> Figure:
    shades = colours(run.n_nv(fit.convention) for run in fit.runs)
    drawn = figure(9, 5)
    axes = drawn.add_subplot()
    named = set()
    for run in sorted(fit.runs, key=lambda run: run.n_nv(fit.convention)):
        label = "" if run.size in named else run.size
        named.add(run.size)
        colour = shades[run.n_nv(fit.convention)]
        axes.plot(run.compute(fit.convention), run.l_u, color=colour, alpha=0.6, label=label or None)
    lower = pts.envelope([point for run in fit.runs for point in pts.curve(run, fit.convention)])
    axes.plot([p.compute for p in lower], [p.l_u for p in lower], "k--", linewidth=1, label="envelope")
    axes.set(xscale="log", xlabel="C, FLOPs", ylabel="L_u, nats")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    return drawn


def _sizes(fit: Fit) -> Figure:
    """The paper's Fig. 8, twice: with all runs, and without those that overfitted."""
    order = {run.size: run.n_nv(fit.convention) for run in fit.runs}
    sizes = sorted(order, key=lambda size: order[size])
    vocabularies = sorted({run.model.codes for run in fit.runs})
    drawn = figure(2.5 + 1.6 * len(vocabularies), 1.2 + 0.9 * len(sizes))
    for k, overfitted in enumerate((True, False)):
        best = np.full((len(sizes), len(vocabularies)), np.nan)
        for run in fit.runs:
            if overfitted or not run.overfitted:
                at = sizes.index(run.size), vocabularies.index(run.model.codes)
                best[at] = np.nanmin([best[at], run.l_u.min()])
        axes = drawn.add_subplot(1, 2, k + 1)
        axes.imshow(best, cmap="viridis_r", aspect="auto")
        for (row, column), value in np.ndenumerate(best):
            text = "" if np.isnan(value) else f"{value:.2f}"
            axes.text(column, row, text, ha="center", va="center", color="white", fontsize=8)
        axes.set_xticks(range(len(vocabularies)), [f"{codes:,d}" for codes in vocabularies], fontsize=8)
        axes.set_yticks(range(len(sizes)), sizes, fontsize=8)
        axes.set(xlabel="codes", title="all runs" if overfitted else "without overfitted")
    return drawn


def _held_out(fit: Fit) -> Figure | None:
    if not fit.held_out:
        return None
    measured, predicted = fit.held_out["measured"]["l_u"], fit.held_out["predicted"]
    drawn = figure(6, 3.2)
    axes = drawn.add_subplot()
    names = list(predicted)
    axes.barh(names, [predicted[name]["relative_error"] * 100 for name in names], color="#2878b5")
    axes.axvline(0, color="black", linewidth=1)
    for limit in (-2, 2):
        axes.axvline(limit, color="#b9305a", linestyle=":")
    axes.set(xlabel=f"error of L_u, % of the measured {measured:.3f}")
    return drawn
