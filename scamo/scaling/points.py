"""From training runs to the points of a scaling law: what each run spent, what it reached, which were best.

Two conventions. `counted`: C is what the trainer counted (`training_flops`), N_nv the blocks' parameters, N_v
= V d (paper Eq. 6). `paper`: its plots' units, forward FLOPs per token and C = 3 (N_nv + N_v) D. D is the
motion tokens with a loss (one EOS a clip included) in both; `positions` counts text as well and is neither's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scamo.config import ModelConfig, from_dict
from scamo.errors import ScaMoError
from scamo.scaling.flops import block_parameters, forward_flops, paper_flops
from scamo.training.logging import read_log

Array = NDArray[np.float64]
Convention = Literal["counted", "paper"]
# A run ends at a budget when its C is at most this share below it; ends this close are one budget.
NEAR = 0.03
# A run whose L_u ends this much above its lowest, nats, has overfitted.
OVERFITTED = 0.02


@dataclass(frozen=True)
class Run:
    """A training run and its validations.

    steps, tokens, positions, flops, l_u, loss: a value a validation, the counts cumulative. finished: the
    run came to its planned last step, so that its learning rate has come down.
    """

    name: str
    model: ModelConfig
    seed: int
    dataset: str
    token_store: str
    finished: bool
    steps: Array
    tokens: Array
    positions: Array
    flops: Array
    l_u: Array
    loss: Array

    @property
    def size(self) -> str:
        """Its name in the paper's table, or layers x width."""
        return self.model.size or f"{self.model.layers}x{self.model.width}"

    @property
    def overfitted(self) -> bool:
        return bool(self.l_u[-1] > self.l_u.min() + OVERFITTED)

    def n_nv(self, convention: Convention) -> float:
        if convention == "counted":
            return float(block_parameters(self.model))
        return forward_flops(self.model.layers, self.model.width)

    def n_v(self, convention: Convention) -> float:
        return float(self.model.codes * self.model.width) * (1 if convention == "counted" else 2)

    def compute(self, convention: Convention) -> Array:
        """C at every validation."""
        return self.flops if convention == "counted" else paper_flops(self.model, 1) * self.tokens


@dataclass(frozen=True)
class Point:
    """A run at a compute. last: its own last validation, of a finished schedule."""

    run: str
    size: str
    codes: int
    seed: int
    compute: float
    n_nv: float
    n_v: float
    tokens: float
    l_u: float
    last: bool


def read_run(folder: Path) -> Run:
    """A run folder of `train.py`.

    Raises ScaMoError naming the file and what is missing, or why the run is no point: it diverged, or it was
    never validated.
    """
    config = _json(folder / "config.json")
    try:
        model = from_dict(ModelConfig, config["model"], where=f"{folder / 'config.json'}: model")
        planned, seed = int(config["training"]["steps"]), int(config["training"]["seed"])
        fingerprint = config["fingerprint"]
        dataset, token_store = str(fingerprint["dataset"]), str(fingerprint["tokens"])
    except KeyError as error:
        raise ScaMoError(f"{folder / 'config.json'}: the field {error} is missing") from None
    path = folder / "log.jsonl"
    if not path.is_file():
        raise ScaMoError(f"{path}: no such file: is this a run of train.py?")
    try:
        records = read_log(path)
        kinds = [record["kind"] for record in records]
    except (ValueError, KeyError, TypeError) as error:
        raise ScaMoError(f"{path}: not a log of train.py: {error!r}") from None
    if "nan" in kinds:
        raise ScaMoError(f"{folder}: the run diverged: a loss or gradient was not finite")
    trained, validated = (
        [record for record, kind in zip(records, kinds, strict=True) if kind == wanted]
        for wanted in ("train", "val")
    )
    if not trained or not validated:
        raise ScaMoError(f"{path}: no {'validation' if trained else 'training step'} was logged")
    counts = _column(path, trained, "step", "motion_tokens", "positions", "flops", "loss")
    values = _column(path, validated, "step", "l_u", "loss")
    if counts["loss"][-1] > math.log(model.codes + 1):
        raise ScaMoError(
            f"{folder}: the run diverged: its last training loss {counts['loss'][-1]:.2f} is above that of "
            f"guessing, {math.log(model.codes + 1):.2f}"
        )
    if values["step"][-1] > counts["step"][-1]:
        raise ScaMoError(f"{path}: a validation at step {values['step'][-1]:g}, but no training step so late")

    def until(name: str) -> Array:
        """Cumulative counts at the validations; a log line covers the steps since the line before it."""
        steps = np.concatenate([[0.0], counts["step"]])
        return np.interp(values["step"], steps, np.concatenate([[0.0], counts[name].cumsum()]))

    return Run(
        name=folder.name,
        model=model,
        seed=seed,
        dataset=dataset,
        token_store=token_store,
        finished=bool(values["step"][-1] >= planned),
        steps=values["step"],
        tokens=until("motion_tokens"),
        positions=until("positions"),
        flops=until("flops"),
        l_u=values["l_u"],
        loss=values["loss"],
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ScaMoError(f"{path}: no such file: is this a run of train.py?") from None
    except (OSError, ValueError) as error:
        raise ScaMoError(f"{path}: cannot be read: {error}") from None


def _column(path: Path, records: list[dict[str, Any]], *names: str) -> dict[str, Array]:
    columns = {}
    for name in names:
        for record in records:
            value = record.get(name)
            if value is None:
                hint = "; runs before it was logged cannot be counted" if name == "flops" else ""
                raise ScaMoError(
                    f"{path}: the field {name!r} is missing at step {record.get('step')} "
                    f"({record['kind']}){hint}"
                )
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ScaMoError(f"{path}: {name} = {value!r} at step {record.get('step')}")
        columns[name] = np.array([record[name] for record in records], dtype=np.float64)
    return columns


def find_runs(folders: Iterable[str | Path]) -> list[Path]:
    """Run folders: those named, and in place of a folder that is none the runs below it, by name."""
    found: list[Path] = []
    for folder in map(Path, folders):
        if (folder / "config.json").is_file() and (folder / "log.jsonl").is_file():
            found.append(folder)
        elif folder.is_dir():
            logs = folder.rglob("log.jsonl")
            below = sorted(log.parent for log in logs if log.with_name("config.json").is_file())
            if not below:
                raise ScaMoError(f"{folder}: no run of train.py (config.json and log.jsonl) in it or below")
            found.extend(below)
        else:
            raise ScaMoError(f"{folder}: no such folder")
    return list(dict.fromkeys(found))


def read_runs(folders: Iterable[str | Path]) -> tuple[list[Run], list[str]]:
    """All runs that can be points, and a warning for each that is left out, naming it and the reason.

    Raises ScaMoError when they are of several datasets, or a vocabulary is of several tokenizers: their L_u
    cannot be compared, and which of them to leave out is not for us to say.
    """
    runs, warnings = [], []
    for folder in find_runs(folders):
        try:
            run = read_run(folder)
        except ScaMoError as error:
            warnings.append(f"left out: {error}")
            continue
        if not run.finished:
            at = f"stopped at step {run.steps[-1]:.0f}"
            warnings.append(f"{folder}: {at}: it has points of the curves, and is no end of a budget")
        runs.append(run)
    if not runs:
        raise ScaMoError("no run can be used:\n" + "\n".join(warnings))
    _one_of_each(runs)
    return runs, warnings


def _one_of_each(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs:
        if run.dataset != first.dataset:
            raise ScaMoError(f"{first.name} and {run.name} are of different datasets: fit them apart")
    stores: dict[int, Run] = {}
    for run in runs:
        other = stores.setdefault(run.model.codes, run)
        if run.token_store != other.token_store:
            raise ScaMoError(
                f"{other.name} and {run.name} have {run.model.codes} codes of different tokenizers: "
                "fit them apart"
            )


# -- which points --------------------------------------------------------------------------------------------


def curve(run: Run, convention: Convention) -> list[Point]:
    """Every validation as a point."""
    compute = run.compute(convention)
    return [
        Point(
            run.name,
            run.size,
            run.model.codes,
            run.seed,
            float(compute[i]),
            run.n_nv(convention),
            run.n_v(convention),
            float(run.tokens[i]),
            float(run.l_u[i]),
            run.finished and i == len(compute) - 1,
        )
        for i in range(len(compute))
    ]


def last_points(runs: Sequence[Run], convention: Convention) -> list[Point]:
    """The end of every finished run: the points with a finished schedule."""
    return [curve(run, convention)[-1] for run in runs if run.finished]


def budgets_of(points: Sequence[Point]) -> list[float]:
    """The budgets of IsoFLOP runs: their ends in C, those within NEAR of the one before together."""
    groups: list[list[float]] = []
    for compute in sorted(point.compute for point in points):
        if groups and compute <= groups[-1][-1] * (1 + NEAR):
            groups[-1].append(compute)
        else:
            groups.append([compute])
    return [float(np.exp(np.mean(np.log(group)))) for group in groups]


def isoflop(points: Sequence[Point], budgets: Sequence[float]) -> dict[float, list[Point]]:
    """Ends of finished runs by budget, those within NEAR of it."""
    found: dict[float, list[Point]] = {}
    for budget in budgets:
        near = [p for p in points if p.last and abs(math.log(p.compute / budget)) <= 2 * NEAR]
        if near:
            found[budget] = near
    return found


def lowest_by_budget(points: Sequence[Point], budgets: Sequence[float]) -> list[Point]:
    """The paper's selection: for each predefined budget the run with the lowest L_u."""
    return [min(near, key=lambda p: p.l_u) for near in isoflop(points, budgets).values()]


def envelope(points: Sequence[Point], *, per_decade: int = 10) -> list[Point]:
    """The lower envelope of all curves: points below everything that costs as much or less.

    At most per_decade points a decade of C, the lowest of each, or long runs would outweigh all others.
    """
    kept: dict[int, Point] = {}
    lowest = math.inf
    for point in sorted(points, key=lambda p: (p.compute, p.l_u)):
        if point.l_u < lowest:
            lowest = point.l_u
            kept[math.floor(per_decade * math.log10(point.compute))] = point
    return list(kept.values())
