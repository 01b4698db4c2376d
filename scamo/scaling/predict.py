"""`scamo scaling predict`: model size, vocabulary and tokens for a compute, from fitted or printed laws."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scamo.config import FSQ_LEVELS, MODEL_SIZES, ModelConfig
from scamo.errors import ScaMoError
from scamo.scaling.fit import FORMAT
from scamo.scaling.flops import block_parameters
from scamo.scaling.laws import LogLaw, PowerLaw, Surface, interval
from scamo.scaling.paper import PRINTED, forward_flops

if TYPE_CHECKING:
    from scamo.scaling.grid import Planned

# Beyond a decade from the points that a law was fitted to, its words are worth little.
DECADE = 10.0


@dataclass(frozen=True)
class Estimate:
    """low and high are the 95% bootstrap interval, NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        text = f"{self.value:.3g}"
        return text if math.isnan(self.low) else f"{text} ({self.low:.3g} to {self.high:.3g})"

    def scaled(self, factor: float) -> Estimate:
        return Estimate(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Prediction:
    """What a law asks for at a compute.

    n_nv and n_v in parameters; paper_n_nv, paper_n_v in the paper's units (forward FLOPs per token). size:
    the nearest model, its width the one by which n_v becomes codes; codebook: the nearest FSQ codebook.
    """

    law: str
    compute: float
    n_nv: Estimate
    n_v: Estimate
    paper_n_nv: Estimate
    paper_n_v: Estimate
    tokens: Estimate
    l_u: Estimate
    size: str
    codes: float
    codebook: int


def read_fit(path: str | Path) -> dict[str, Any]:
    """A fit.json of `scamo scaling fit`. ScaMoError naming the file for any other."""
    path = Path(path)
    try:
        fit = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ScaMoError(f"{path}: no such file; `scamo scaling fit RUNS -o FOLDER` writes it") from None
    except (OSError, ValueError) as error:
        raise ScaMoError(f"{path}: cannot be read: {error}") from None
    if not isinstance(fit, dict) or fit.get("format") != FORMAT:
        raise ScaMoError(f"{path}: expected format {FORMAT}, as `scamo scaling fit` writes it")
    return fit


def predict(fit: dict[str, Any], compute: float) -> tuple[list[Prediction], list[str]]:
    """What each law of a fit says about `compute` FLOPs (in the fit's convention), and warnings.

    Raises ScaMoError for a compute that is not positive and finite.
    """
    _check(compute)
    warnings = []
    span = [run["compute"] for run in fit["runs"]]
    if not min(span) / DECADE <= compute <= max(span) * DECADE:
        warnings.append(
            f"{compute:.3g} FLOPs is more than a decade from the runs ({min(span):.3g} to {max(span):.3g}): "
            "an extrapolation, not a forecast"
        )
    sizes = {name: _parameters(name) for name in MODEL_SIZES} | {
        run["size"]: (run["layers"], run["width"], run["parameters"]) for run in fit["runs"]
    }
    # The fit's units -> parameters: paper fits count forward FLOPs.
    paper = fit["convention"] == "paper"
    found = []
    for name, selection in fit["selections"].items():
        draws = selection["draws"]
        values = {
            key: Estimate(
                _at(key, list(selection["laws"][key].values())[:2], compute),
                *interval([_at(key, draw[key], compute) for draw in draws if key in draw]),
            )
            for key in ("n_nv", "n_v", "tokens", "l_u")
        }
        found.append(_prediction(name, compute, values, sizes, paper=paper))
    a, b = fit["cost"]
    for name, stored in fit["surfaces"].items():
        best = np.array([_surface(stored).best(compute, lambda n, v: a * n + b * v)])
        # A draw in ten is enough for an interval of what takes a search each.
        drawn = [_surface(draw).best(compute, lambda n, v: a * n + b * v) for draw in stored["draws"][:40]]
        values = {
            key: Estimate(float(best[0, k]), *interval([draw[k] for draw in drawn]))
            for k, key in enumerate(("n_nv", "n_v", "tokens", "l_u"))
        }
        found.append(_prediction(f"{name} surface", compute, values, sizes, paper=paper))
    return found, warnings


def predict_runs(fit: dict[str, Any], planned: Sequence[Planned]) -> list[tuple[str, dict[str, Estimate]]]:
    """L_u of each run of a grid by each surface of a fit, before it is made: (name, {surface: nats}).

    planned: of `scamo.scaling.grid.plan_grid`; runs that are left out are not foretold. Raises ScaMoError for
    a fit in the paper's units, which the plan is not in.
    """
    if fit["convention"] != "counted":
        raise ScaMoError("a grid is planned in FLOPs as counted here: fit with --convention counted")
    found = []
    for run in planned:
        if run.why:
            continue
        model = run.config.model
        at = float(block_parameters(model)), float(run.codes * model.width), run.tokens
        values = {
            name: Estimate(
                float(_surface(stored)(*at)),
                *interval([float(_surface(draw)(*at)) for draw in stored["draws"]]),
            )
            for name, stored in fit["surfaces"].items()
        }
        found.append((run.name, values))
    return found


def runs_table(predictions: list[tuple[str, dict[str, Estimate]]]) -> str:
    """Markdown, a row a run."""
    names = list(predictions[0][1]) if predictions else []
    lines = ["| run | " + " | ".join(f"L_u, {name} surface" for name in names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    lines += [f"| {run} | " + " | ".join(str(values[n]) for n in names) + " |" for run, values in predictions]
    return "\n".join(lines)


def predict_printed(compute: float) -> Prediction:
    """What the paper's printed Eqs. 11-14 say, in its units and in parameters."""
    _check(compute)
    keys = {"n_v": "N_v ~ C^a", "n_nv": "N_nv ~ C^b", "tokens": "D ~ C^c", "l_u": "L_u ~ log C"}
    values = {key: Estimate(_at(key, list(PRINTED[law]), compute)) for key, law in keys.items()}
    return _prediction(
        "printed", compute, values, {name: _parameters(name) for name in MODEL_SIZES}, paper=True
    )


def _check(compute: float) -> None:
    if not (math.isfinite(compute) and compute > 0):
        raise ScaMoError(f"flops = {compute}: expected a positive number, for example 1e18")


def _at(key: str, numbers: list[float], compute: float) -> float:
    first, second = numbers
    law = LogLaw(first, second, 0, 0) if key == "l_u" else PowerLaw(first, second, 0, 0)
    return float(law(compute))


def _surface(stored: dict[str, Any]) -> Surface:
    return Surface(
        stored["limit"],
        tuple((a, e) for a, e in stored["terms"]),
        tuple(stored["unit"]),
        stored["loss"],
        stored["points"],
    )


def _parameters(size: str) -> tuple[int, int, int]:
    layers, _, width = MODEL_SIZES[size]
    return layers, width, block_parameters(ModelConfig(size=size))


def _prediction(
    law: str,
    compute: float,
    values: dict[str, Estimate],
    sizes: dict[str, tuple[int, int, int]],
    *,
    paper: bool,
) -> Prediction:
    def units(size: str) -> tuple[float, float]:
        """N_nv in parameters and in the paper's units."""
        layers, width, parameters = sizes[size]
        return float(parameters), forward_flops(layers, width)

    wanted = values["n_nv"].value
    size = min(sizes, key=lambda name: abs(math.log(units(name)[paper] / wanted)))
    parameters, forward = units(size)
    factor = forward / parameters
    n_nv = values["n_nv"].scaled(1 / factor) if paper else values["n_nv"]
    n_v = values["n_v"].scaled(0.5) if paper else values["n_v"]
    codes = n_v.value / sizes[size][1]
    return Prediction(
        law=law,
        compute=compute,
        n_nv=n_nv,
        n_v=n_v,
        paper_n_nv=values["n_nv"] if paper else n_nv.scaled(factor),
        paper_n_v=values["n_v"] if paper else n_v.scaled(2),
        tokens=values["tokens"],
        l_u=values["l_u"],
        size=size,
        codes=codes,
        codebook=min(FSQ_LEVELS, key=lambda name: abs(math.log(name / codes))),
    )


def table(predictions: list[Prediction]) -> str:
    """Markdown, a row a law."""
    lines = [
        "| law | N_nv, parameters | N_v, parameters | D, motion tokens | L_u | nearest size | codes "
        "| codebook | N_nv, paper's units | N_v, paper's units |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for p in predictions:
        lines.append(
            f"| {p.law} | {p.n_nv} | {p.n_v} | {p.tokens} | {p.l_u} | {p.size} | {p.codes:,.0f} "
            f"| {p.codebook} | {p.paper_n_nv} | {p.paper_n_v} |"
        )
    return "\n".join(lines)
