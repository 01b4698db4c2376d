"""`scamo study metrics`: what every run of a scaling grid scores, beside its L_u (as the paper's Tab. 6).

Do better losses make better motions? All runs are measured on the same captions with the same seeds, and each
metric is ranked against L_u: +1 where the two order the runs alike, -1 where they contradict each other.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scamo.data.dataset import MotionDataset
from scamo.device import resolve_device
from scamo.errors import ScaMoError
from scamo.evaluation.evaluator import load_evaluator
from scamo.evaluation.protocol import Settings, evaluate_run
from scamo.evaluation.run_text_following import run_text_following
from scamo.motion.files import replacing
from scamo.scaling.flops import block_parameters
from scamo.scaling.points import Run, find_runs, read_run, read_runs
from scamo.studies.cells import Cell, Study, read_json
from scamo.studies.plots import as_html, colours, figure, write_page, write_pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Metric -> its name in tables, digits, and whether more is better.
METRICS: dict[str, tuple[str, int, bool]] = {
    "fid": ("FID", 3, False),
    "r_precision_1": ("R@1", 3, True),
    "r_precision_2": ("R@2", 3, True),
    "r_precision_3": ("R@3", 3, True),
    "matching": ("Matching", 3, False),
    "diversity": ("Diversity", 3, True),
    "text_following": ("Text-following", 3, True),
}
# Fewer runs have no interval: resamples would mostly repeat one of them.
LEAST = 4
DRAWS = 2000


def measure(
    run: Path,
    evaluator: str | Path,
    settings: Settings,
    work: Path,
    *,
    text_following: bool = True,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """What a finished run scores, by the METRICS that could be measured, with L_u and what was spent.

    The reports stay in WORK/evaluation.json and text_following.json; one that is there is not made again.

    Returns:
        The metrics; "real": those of the real data; "l_u", "l_u_last": the lowest and that of the weights
        that were measured; loss, motion_tokens, flops, overfitted, n_nv, n_v.

    Raises:
        ScaMoError: as `evaluate_run`, `run_text_following` and `read_run`.
    """
    found = read_run(run)
    path = work / "evaluation.json"
    if not path.exists():
        # again: a study that was stopped may have met the test split before it could write what it saw.
        evaluate_run(run, evaluator, settings=settings, out=path, again=True, device=device, progress=False)
    rows = {row["name"]: row["metrics"] for row in read_json(path)["rows"]}
    made = {name: rows["generated"][name]["value"] for name in METRICS if name in rows["generated"]}
    if text_following:
        path = work / "text_following.json"
        if not path.exists():
            with redirect_stdout(io.StringIO()):
                run_text_following(
                    run,
                    seed=settings.seed,
                    temperature=settings.temperature,
                    greedy=settings.greedy,
                    out=path,
                    device=device,
                )
        following = read_json(path)
        made["text_following"] = following["exact"]
        made |= {f"text_following_{name}": part["exact"] for name, part in following["groups"].items()}
    return {
        **made,
        "real": {name: rows["real"][name]["value"] for name in METRICS if name in rows["real"]},
        "l_u": float(found.l_u.min()),
        "l_u_last": float(found.l_u[-1]),
        "loss": float(found.loss[-1]),
        "overfitted": found.overfitted,
        "motion_tokens": float(found.tokens[-1]),
        "flops": float(found.flops[-1]),
        "n_nv": block_parameters(found.model),
        "n_v": found.model.codes * found.model.width,
    }


def check_evaluation(
    evaluator: str | Path, dataset: str | Path, settings: Settings, *, text_following: bool
) -> dict[str, str]:
    """Hashes of evaluator and dataset, once it is known that runs of the one can be measured with the other.

    Raises ScaMoError otherwise: better now than after the trainings.
    """
    data = MotionDataset.open(dataset)
    judge = load_evaluator(evaluator, resolve_device("cpu"))
    judge.check_dataset(data)
    items = len(data.items(settings.split))
    if items < settings.pool:
        raise ScaMoError(
            f"{data.folder}: {items} items in the {settings.split} split, a pool needs {settings.pool}"
        )
    if text_following and (data.feature_dim != 263 or data.fps != 20):
        raise ScaMoError(
            f"{data.folder}: {data.feature_dim} features at {data.fps:g} fps: text-following is measured on "
            "263 at 20 fps only, leave it out"
        )
    return {"evaluator_sha256": judge.sha256, "dataset_sha256": data.manifest_sha256}


def stated(settings: Settings) -> str:
    """How motions were made and measured, for a report."""
    sampling = "greedy" if settings.greedy else f"temperature {settings.temperature:g}, seed {settings.seed}"
    return f"Protocol {settings.protocol}, {settings.split} split, {sampling}"


def run_metrics_study(
    grid: str | Path,
    evaluator: str | Path,
    *,
    out: str | Path | None = None,
    protocol: str = "strict",
    split: str = "test",
    temperature: float = 1.0,
    seed: int = 0,
    items: int = 0,
    pool: int = 32,
    text_following: bool = True,
    draws: int = DRAWS,
    device: str = "auto",
    dry_run: bool = False,
    progress: bool = True,
) -> list[str]:
    """Measure every finished run of a grid, and rank the metrics against L_u.

    Writes OUT/results.jsonl, table.md, metrics.png and report.html. The same call goes on where it was
    stopped, and measures the runs that came to the grid since.

    Args:
        grid: what `scamo scaling run` wrote, or another folder of runs.
        evaluator: an evaluator folder.
        out: the folder to write; GRID/metrics without it.
        protocol: of the evaluation, humanml3d or strict.
        split: of the dataset, whose captions are the prompts.
        temperature, seed: of the sampling.
        items: of the split, drawn once; 0 for all.
        pool: motions that a sentence's own is looked for among.
        text_following: also measure whether motions do what the checked-in prompts say.
        draws: resamples for the 95% intervals.
        device: auto, cpu or cuda.
        dry_run: only print which runs would be measured.
        progress: print each run, and the table.

    Returns:
        The names of the runs that failed.

    Raises:
        ScaMoError: no run is finished, two have one name, they are of different datasets, they cannot be
            measured with this evaluator, or OUT holds a study of other settings.
    """
    settings = Settings(
        protocol=protocol,
        split=split,
        temperature=temperature,
        seed=seed,
        items=items,
        pool=pool,
        mm_texts=0,
    )
    runs, folders, warnings = _finished(Path(grid))
    config = read_json(folders[0] / "config.json")
    hashes = check_evaluation(evaluator, config["data"]["dataset"], settings, text_following=text_following)
    if progress or dry_run:
        for warning in warnings:
            print(warning)
    if dry_run:
        print("\n".join(f"{run.name}: L_u {run.l_u[-1]:+.3f}" for run in runs))
        return []
    out = Path(grid) / "metrics" if out is None else Path(out)

    def cell(run: Run, folder: Path) -> Cell:
        def make(work: Path) -> dict[str, Any]:
            return measure(
                folder, evaluator, settings, work,
                text_following=text_following, device=device, progress=progress,
            )  # fmt: skip

        about = {"size": run.size, "codes": run.model.codes, "seed": run.seed, "steps": int(run.steps[-1])}
        return Cell(run.name, about, make)

    shared = {
        "evaluator": str(evaluator),
        **hashes,
        "evaluation": asdict(settings),
        "text_following": text_following,
    }
    study = Study(out, shared, [cell(run, folder) for run, folder in zip(runs, folders, strict=True)])
    failed = study.run(progress)
    warnings += [f"{name}: could not be measured" for name in failed]
    results = study.results()
    if results:
        text = _write_report(out, results, settings, warnings, draws)
        if progress:
            print(text)
    return failed


def _finished(grid: Path) -> tuple[list[Run], list[Path], list[str]]:
    """The finished runs with their folders, and what is left out and why."""
    folders = find_runs([grid / "runs" if (grid / "runs").is_dir() else grid])
    runs, warnings = read_runs(folders)
    paths = {folder.name: folder for folder in folders}
    if len(paths) < len(folders):
        raise ScaMoError(f"{grid}: two runs of one name: give them other folders")
    runs = [run for run in runs if run.finished]
    if not runs:
        raise ScaMoError(f"{grid}: no run is finished")
    return runs, [paths[run.name] for run in runs], warnings


# -- ranks ---------------------------------------------------------------------------------------------------


def worse(results: Sequence[dict[str, Any]], metric: str) -> NDArray[np.float64]:
    """A metric turned so that less is better, as of L_u; diversity: how far it is from the real data's."""
    values = np.array([result.get(metric, math.nan) for result in results], dtype=np.float64)
    if metric == "diversity":
        return np.abs(values - np.array([result["real"].get(metric, math.nan) for result in results]))
    return -values if METRICS[metric][2] else values


def rank_correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Spearman's; nan where one of the two is constant or not finite, or of fewer than 3 values."""
    from scipy.stats import rankdata

    if len(x) < 3 or not (np.isfinite(x).all() and np.isfinite(y).all()) or not (np.ptp(x) and np.ptp(y)):
        return math.nan
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def correlation(
    results: Sequence[dict[str, Any]], metric: str, l_u: str = "l_u_last", *, draws: int = DRAWS
) -> dict[str, Any]:
    """Rank correlation of a metric with an L_u, and its 95% interval by a bootstrap over configurations.

    The seeds of a configuration are drawn together. Returns n (runs), configurations, value, and low and
    high, None for fewer than LEAST configurations. A resample in which one of the two is constant says
    nothing, and is left out.
    """
    x, y = worse(results, metric), np.array([result[l_u] for result in results])
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, result in enumerate(results):
        groups.setdefault((result["size"], result["codes"], result["steps"]), []).append(index)
    members = list(groups.values())
    found = {"n": len(results), "configurations": len(members), "value": rank_correlation(x, y)}
    low = high = None
    if len(members) >= LEAST and not math.isnan(found["value"]):
        rng = np.random.default_rng(0)
        values = []
        for _ in range(draws):
            drawn = [i for k in rng.integers(len(members), size=len(members)) for i in members[k]]
            values.append(rank_correlation(x[drawn], y[drawn]))
        low, high = (float(value) for value in np.nanpercentile(values, [2.5, 97.5]))
    return found | {"low": low, "high": high}


# -- report --------------------------------------------------------------------------------------------------


def _write_report(
    out: Path, results: list[dict[str, Any]], settings: Settings, warnings: list[str], draws: int
) -> str:
    metrics = [name for name in METRICS if any(name in result for result in results)]
    text = "\n\n".join(
        [
            _table(results, metrics),
            _correlations(results, metrics, draws),
            f"{stated(settings)}: the same captions for all runs, and the weights of the end of each run.",
            *warnings,
        ]
    )
    with replacing(out / "table.md") as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    _, shown = write_pictures(out, {"metrics": ("Every metric over L_u", _picture(results, metrics))})
    write_page(out / "report.html", "Metrics and L_u", f"<h1>Metrics and L_u</h1>\n{as_html(text)}\n{shown}")
    return text


def _table(results: Sequence[dict[str, Any]], metrics: Sequence[str]) -> str:
    """A row a run: vocabulary, size, L_u and metrics; the real data last."""
    heads = ["run", "codes", "size", "seed", "L_u at the end", "lowest L_u", "overfitted"]
    heads += [METRICS[name][0] for name in metrics]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for result in sorted(results, key=lambda r: (r["codes"], r["n_nv"], r["flops"], r["seed"])):
        cells = [result["cell"], f"{result['codes']:,d}", result["size"], str(result["seed"])]
        cells += [f"{result['l_u_last']:.3f}", f"{result['l_u']:.3f}", "yes" if result["overfitted"] else ""]
        cells += [_number(result, name) for name in metrics]
        lines.append("| " + " | ".join(cells) + " |")
    cells = ["real data", *[""] * 6, *(_number(results[0]["real"], name) for name in metrics)]
    return "\n".join([*lines, "| " + " | ".join(cells) + " |"])


def _number(values: dict[str, Any], metric: str) -> str:
    return f"{values[metric]:.{METRICS[metric][1]}f}" if metric in values else "–"


def selections(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """All runs and those of each vocabulary, with and without the overfitted."""
    found = {"all": list(results)}
    for codes in sorted({result["codes"] for result in results}):
        found[f"{codes:,d} codes"] = [result for result in results if result["codes"] == codes]
    if len(found) == 2:
        found = {"all": found["all"]}
    if any(result["overfitted"] for result in results):
        without = {
            f"{name}, none overfitted": [result for result in part if not result["overfitted"]]
            for name, part in found.items()
        }
        found |= without
    return found


def _correlations(results: Sequence[dict[str, Any]], metrics: Sequence[str], draws: int) -> str:
    lines = [
        "Spearman's rank correlation with L_u; +1: the metric orders the runs as L_u does. Diversity: its "
        "distance from the real data's. 95% bootstrap over configurations (size, codes and steps).",
        "",
        "| runs | n | configurations | metric | with L_u at the end | with the lowest L_u |",
        "|---|---|---|---|---|---|",
    ]
    for name, part in selections(results).items():
        for metric in metrics:
            values = [correlation(part, metric, l_u, draws=draws) for l_u in ("l_u_last", "l_u")]
            n, configurations = values[0]["n"], values[0]["configurations"]
            cells = [name, str(n), str(configurations), METRICS[metric][0], *map(_interval, values)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _interval(found: dict[str, Any]) -> str:
    if math.isnan(found["value"]):
        return "–"
    if found["low"] is None:
        return f"{found['value']:+.2f}"
    return f"{found['value']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f})"


def _picture(results: Sequence[dict[str, Any]], metrics: Sequence[str]) -> Figure:
    """A panel a metric; overfitted runs are hollow, the line is the real data."""
    columns = min(4, len(metrics))
    drawn = figure(3.2 * columns, 2.8 * math.ceil(len(metrics) / columns))
    shades = colours(result["codes"] for result in results)
    for k, metric in enumerate(metrics):
        axes = drawn.add_subplot(math.ceil(len(metrics) / columns), columns, k + 1)
        for codes, shade in shades.items():
            for overfitted in (False, True):
                part = [
                    r for r in results
                    if (r["codes"], r["overfitted"]) == (codes, overfitted) and metric in r
                ]  # fmt: skip
                label = f"{codes:,d} codes{', overfitted' if overfitted else ''}"
                axes.plot(
                    [r["l_u_last"] for r in part],
                    [r[metric] for r in part],
                    "o",
                    color=shade,
                    fillstyle="none" if overfitted else "full",
                    label=label if part else None,
                )
        if metric in results[0]["real"]:
            axes.axhline(results[0]["real"][metric], color="black", linewidth=0.8, linestyle=":")
        axes.set(xlabel="L_u at the end, nats", title=METRICS[metric][0])
        axes.grid(alpha=0.3)
        if k == 0:
            axes.legend(fontsize=6)
    return drawn
