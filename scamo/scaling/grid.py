"""`scamo scaling run`: a grid of model sizes, vocabularies and compute budgets as IsoFLOP runs of train.py.

Every run has a schedule of its own that ends at its budget, so its last validation is a fair point; the
number of steps is found from the batches themselves, whose FLOPs are known before they are computed.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from scamo.config import DataConfig, ModelConfig, RunConfig, TrainingConfig, load_config, to_dict
from scamo.data.batches import BatchPlan
from scamo.data.dataset import MotionDataset
from scamo.errors import ScaMoError
from scamo.scaling.flops import attended_pairs, block_parameters, training_flops
from scamo.studies.cells import keep_settings, tail, train, trained
from scamo.tokenizers.encode import encode_dataset

# Steps from which the attended pairs of a position are averaged.
PROBED_STEPS = 8
# Keys of a grid to whose values more may come.
ADDED = ("tokenizers", "models", "budgets", "seeds", "min_steps", "max_steps")


@dataclass(frozen=True)
class GridModel:
    """A size of the paper's table, or layers, heads and width."""

    size: str = ""
    layers: int = 0
    heads: int = 0
    width: int = 0


@dataclass(frozen=True)
class Rule:
    """The learning rate of a run: learning_rate * (width of the model / width) ** -exponent.

    One rule for all runs, stated before they are made; what it costs to tune each run is not spent. The
    batch is the same for all, [training] says it.
    """

    learning_rate: float
    width: int
    exponent: float = 1.0

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0 and self.width > 0):
            raise ScaMoError(f"learning_rate = {self.learning_rate}, width = {self.width}: expected above 0")

    def of(self, model: ModelConfig) -> float:
        return float(self.learning_rate * (model.width / self.width) ** -self.exponent)


@dataclass(frozen=True)
class GridConfig:
    """What `scamo scaling run` reads.

    dataset: with text states. tokenizers: folders, one a vocabulary; tokens that the dataset lacks are
    encoded first. budgets: FLOPs of forward and backward as `training_flops` counts them. validations: of a
    run. min_steps, max_steps: runs of fewer or more are left out. ranks: processes, started by deepspeed if
    more than one. training: of all runs; steps, rate, run, seed and when to save and validate are set here.
    """

    dataset: str
    tokenizers: tuple[str, ...]
    models: tuple[GridModel, ...]
    budgets: tuple[float, ...]
    rule: Rule
    out: str = "runs/grid"
    text: str = ""
    seeds: tuple[int, ...] = (0,)
    validations: int = 5
    min_steps: int = 50
    max_steps: int = 100_000
    ranks: int = 1
    ds_config: str = "configs/ds_zero3.json"
    max_text: int = 150
    max_motion: int = 50
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        for name in ("tokenizers", "models", "budgets", "seeds"):
            if not getattr(self, name):
                raise ScaMoError(f"{name} is empty")
        for budget in self.budgets:
            if not 0 < budget < float("inf"):
                raise ScaMoError(f"budgets: {budget} is no number of FLOPs above 0")
        if not 0 < self.min_steps <= self.max_steps or self.validations < 1 or self.ranks < 1:
            raise ScaMoError(
                f"min_steps = {self.min_steps}, max_steps = {self.max_steps}, validations = "
                f"{self.validations}, ranks = {self.ranks}: expected 0 < min <= max, and 1 or more"
            )


@dataclass(frozen=True)
class Planned:
    """A run of the grid. codes: its vocabulary. why: it is left out, or "". flops, tokens, epochs: in all."""

    name: str
    config: RunConfig
    codes: int
    budget: float
    flops: float
    tokens: float
    epochs: float
    why: str = ""


def plan_grid(config: GridConfig, *, progress: bool = True) -> list[Planned]:
    """All runs, with the steps that bring each to its budget (within half a step).

    Encodes tokens that the dataset lacks. Raises ScaMoError for a dataset, tokenizer or model that cannot be
    used, naming it.
    """
    dataset = MotionDataset.open(config.dataset)
    text = dataset.text_states(config.text)
    planned = []
    for folder in config.tokenizers:
        name = Path(folder).name
        if not (dataset.folder / "tokens" / name).exists():
            encode_dataset(folder, dataset.folder, progress=progress)
        tokens = dataset.tokens(name)
        for shape in config.models:
            model = ModelConfig(
                size=shape.size,
                layers=shape.layers,
                heads=shape.heads,
                width=shape.width,
                codes=tokens.codes,
                text_width=text.width,
                max_text=config.max_text,
                max_motion=config.max_motion,
            )
            label = model.size or f"{model.layers}x{model.width}"
            for seed in config.seeds:
                training = replace(config.training, seed=seed, learning_rate=config.rule.of(model))
                batches = BatchPlan.of(dataset, "train", tokens, text, model, training)
                pairs = _pairs_a_position(batches, tokens.lengths, text.lengths, model)
                for budget in sorted(config.budgets):
                    steps, flops, scored = _steps_until(batches, model, budget, pairs, config.max_steps)
                    why = ""
                    if steps < config.min_steps:
                        why = f"{steps} steps are fewer than {config.min_steps}"
                    elif steps == config.max_steps:
                        why = f"more than {config.max_steps} steps"
                    every = max(1, steps // config.validations)
                    run = f"{budget:.2e}_{label}_{tokens.codes}_s{seed}"
                    planned.append(
                        Planned(
                            run,
                            RunConfig(
                                DataConfig(
                                    dataset=str(dataset.folder),
                                    tokens=name,
                                    text=config.text,
                                    tokenizer=folder,
                                ),
                                replace(model, codes=0, text_width=0),
                                replace(
                                    training,
                                    run=str(Path(config.out) / "runs" / run),
                                    steps=max(1, steps),
                                    validate_every=every,
                                    log_every=max(1, every // 4),
                                    save_every=max(1, steps),
                                    keep_checkpoints=1,
                                ),
                            ),
                            tokens.codes,
                            budget,
                            flops,
                            scored,
                            batches.epochs(max(steps - 1, 0)),
                            why,
                        )
                    )
    return planned


def _pairs_a_position(plan: BatchPlan, motion: Any, text: Any, model: ModelConfig) -> float:
    """Attended pairs a position, from the draws of the first steps."""
    draws = [draw for step in range(PROBED_STEPS) for batch in plan.step(step) for draw in batch]
    prefix = np.array([min(int(text[d.caption]), model.max_text) if d.caption >= 0 else 1 for d in draws])
    # A scored position for every motion token; EOS is only a target.
    length = prefix + np.array([int(motion[d.item]) - (d.drop > 0) for d in draws])
    return attended_pairs(length, model.both_ways(prefix)) / int(length.sum())


def _steps_until(
    plan: BatchPlan, model: ModelConfig, budget: float, pairs: float, most: int
) -> tuple[int, float, float]:
    """(steps, FLOPs, motion tokens) nearest to a budget; `most` steps where they do not reach it."""
    flops = scored = 0.0
    for step in range(most):
        positions, tokens = plan.positions(step), plan.scored(step)
        more = training_flops(model, positions=positions, scored=tokens, pairs=pairs * positions)
        if flops + more / 2 > budget:
            return step, flops, scored
        flops, scored = flops + more, scored + tokens
    return most, flops, scored


def run_grid(
    path: str | Path,
    *,
    overrides: tuple[str, ...] = (),
    dry_run: bool = False,
    progress: bool = True,
) -> list[str]:
    """Make all runs of a grid, one after another, in OUT/runs; OUT/grid.json says what was planned.

    The same call goes on where it was stopped: finished runs are skipped, an unfinished one resumes.

    Args:
        path: TOML of a `GridConfig`.
        overrides: "key=value" of it.
        dry_run: only print what would be run.
        progress: print the plan and each run.

    Returns:
        The names of the runs that failed.

    Raises:
        ScaMoError: the config, or what it names, cannot be used; OUT holds another grid.
    """
    config = load_config(GridConfig, Path(path), overrides)
    planned = plan_grid(config, progress=progress)
    if progress:
        print(table(planned))
    if dry_run:
        return []
    out = Path(config.out)
    # More sizes, budgets or seeds may come to a grid; what is common to its runs may not change.
    keep_settings(out / "grid.json", to_dict(config), free=ADDED)
    failed = []
    chosen = [run for run in planned if not run.why]
    for number, run in enumerate(chosen, 1):
        if trained(run.config.training.run):
            continue
        began = time.perf_counter()
        status, output = train(run.config, ds_config=config.ds_config, ranks=config.ranks)
        if progress:
            print(f"{number}/{len(chosen)} {run.name}: {time.perf_counter() - began:.0f} s", flush=True)
        if status:
            failed.append(run.name)
            print(f"{run.name} failed with status {status}:\n{tail(output)}", file=sys.stderr, flush=True)
    return failed


def table(planned: list[Planned]) -> str:
    """What will be run: Markdown, with the sums."""
    lines = [
        "| run | N_nv | N_v | steps | learning rate | FLOPs | motion tokens | epochs | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in planned:
        model, training = run.config.model, run.config.training
        lines.append(
            f"| {run.name} | {block_parameters(model):.3g} | {run.codes * model.width:.3g} "
            f"| {training.steps:,d} | {training.learning_rate:.2g} | {run.flops:.3g} | {run.tokens:.3g} "
            f"| {run.epochs:.2f} | {run.why and 'left out: ' + run.why} |"
        )
    chosen = [run for run in planned if not run.why]
    total = float(np.sum([run.flops for run in chosen]))
    lines += ["", f"{len(chosen)} runs of {len(planned)}, {total:.3g} FLOPs in all."]
    return "\n".join(lines)
