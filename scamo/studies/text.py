"""`scamo study text`: what word states and a bidirectional prefix are worth (the paper's Tab. 2), over seeds.

{sentence embedding, word states} x {causal, bidirectional prefix} have three different cells: a sentence is a
prefix of one position, whose attention is the same function, bit for bit, in both columns. It is made once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scamo.config import DataConfig, ModelConfig, RunConfig, TrainingConfig, load_config, to_dict
from scamo.data.batches import BatchPlan
from scamo.data.dataset import MotionDataset
from scamo.errors import ScaMoError
from scamo.evaluation.protocol import Settings
from scamo.motion.files import replacing
from scamo.studies.cells import Cell, Study, train, trained
from scamo.studies.metrics import METRICS as EVALUATED
from scamo.studies.metrics import check_evaluation, measure, stated
from scamo.studies.plots import as_html, figure, write_page, write_pictures
from scamo.tokenizers.encode import encode_dataset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Cell -> ModelConfig.text and prefix.
KINDS = {
    "words-bidirectional": ("words", "bidirectional"),
    "words-causal": ("words", "causal"),
    "sentence": ("sentence", "causal"),
}
# What a difference of two cells is the effect of.
EFFECTS = (
    ("bidirectional prefix, of word states", "words-bidirectional", "words-causal"),
    ("word states, causal prefix", "words-causal", "sentence"),
    ("word states, bidirectional prefix", "words-bidirectional", "sentence"),
)
# Metric -> its name in tables, digits.
METRICS: dict[str, tuple[str, int]] = {
    "l_u": ("lowest L_u", 3),
    "l_u_last": ("L_u at the end", 3),
    **{name: (title, digits) for name, (title, digits, _) in EVALUATED.items()},
    "text_following_wording": ("... of held-out wordings", 3),
    "text_following_combination": ("... of held-out combinations", 3),
}
# Steps from which the positions a motion token are counted.
PROBED_STEPS = 8
SAME = (
    "A sentence embedding is one position: with a causal and with a bidirectional prefix it is the same "
    "function, bit for bit. The cell is made once and stands for both."
)


@dataclass(frozen=True)
class TextConfig:
    """What `scamo study text` reads.

    dataset: with text states. tokenizer: its folder; tokens that the dataset lacks are encoded first.
    evaluator: its folder. text: name of the text states. protocol, split, pool, temperature: of the
    evaluation. text_following: measure it too (263 features at 20 fps only). ranks: processes, started by
    deepspeed if more than one. model: text and prefix are set by the cells. training: seed and run are; for
    sentences micro_batch_tokens too, so that a step has as many motion tokens in all cells.
    """

    dataset: str
    tokenizer: str
    evaluator: str
    out: str = "runs/study_text"
    text: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    protocol: str = "strict"
    split: str = "test"
    pool: int = 32
    temperature: float = 1.0
    text_following: bool = True
    ranks: int = 1
    ds_config: str = "configs/ds_zero3.json"
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ScaMoError(f"seeds = {list(self.seeds)}: expected at least one, each once")
        if self.ranks < 1:
            raise ScaMoError(f"ranks = {self.ranks}: expected 1 or more")
        # Motion sees the keys and values of the text, which in the first layer are those of each state alone.
        if self.model.layers < 2:
            raise ScaMoError(
                "model.layers = 1: a prefix acts through the layers after the first, use 2 or more"
            )
        self.evaluation()

    def evaluation(self) -> Settings:
        return Settings(
            protocol=self.protocol,
            split=self.split,
            pool=self.pool,
            temperature=self.temperature,
            mm_texts=0,
        )


@dataclass(frozen=True)
class Planned:
    """A cell's run; motion_tokens, positions and epochs of all its steps."""

    name: str
    kind: str
    config: RunConfig
    motion_tokens: int
    positions: int
    epochs: float


def plan_cells(config: TextConfig, *, progress: bool = True) -> list[Planned]:
    """The runs of all cells. Encodes tokens that the dataset lacks.

    Raises ScaMoError for a dataset, tokenizer or model that cannot be used, naming it.
    """
    dataset = MotionDataset.open(config.dataset)
    text = dataset.text_states(config.text)
    name = Path(config.tokenizer).name
    if not (dataset.folder / "tokens" / name).exists():
        encode_dataset(config.tokenizer, dataset.folder, progress=progress)
    tokens = dataset.tokens(name)

    def batches(model: ModelConfig, training: TrainingConfig) -> BatchPlan:
        return BatchPlan.of(dataset, "train", tokens, text, model, training)

    def positions_a_token(model: ModelConfig) -> float:
        plan = batches(model, config.training)
        steps = range(PROBED_STEPS)
        return sum(map(plan.positions, steps)) / sum(map(plan.scored, steps))

    words, sentence = (replace(config.model, text=way) for way in ("words", "sentence"))
    share = positions_a_token(sentence) / positions_a_token(words)
    fewer = round(config.training.micro_batch_tokens * share)
    planned = []
    for seed in config.seeds:
        for kind, (way, prefix) in KINDS.items():
            model = replace(config.model, text=way, prefix=prefix)
            cell = f"{kind}-s{seed}"
            training = replace(
                config.training,
                seed=seed,
                run=str(Path(config.out) / "work" / cell / "run"),
                micro_batch_tokens=fewer if way == "sentence" else config.training.micro_batch_tokens,
            )
            plan = batches(model, training)
            steps = range(training.steps)
            data = DataConfig(
                dataset=str(dataset.folder), tokens=name, text=config.text, tokenizer=config.tokenizer
            )
            planned.append(
                Planned(
                    cell,
                    kind,
                    RunConfig(data, model, training),
                    sum(map(plan.scored, steps)),
                    sum(map(plan.positions, steps)),
                    plan.epochs(training.steps - 1),
                )
            )
    return planned


def plan_table(planned: Sequence[Planned]) -> str:
    """What will be run: Markdown."""
    lines = ["| cell | steps | positions | motion tokens | epochs |", "|---|---|---|---|---|"]
    lines += [
        f"| {run.name} | {run.config.training.steps:,d} | {run.positions:,d} | {run.motion_tokens:,d} "
        f"| {run.epochs:.2f} |"
        for run in planned
    ]
    return "\n".join(lines)


def run_text_study(
    path: str | Path,
    *,
    overrides: tuple[str, ...] = (),
    dry_run: bool = False,
    device: str = "auto",
    progress: bool = True,
) -> list[str]:
    """Train and measure every cell and seed; OUT/results.jsonl, table.md, cells.png and report.html.

    The same call goes on where it was stopped, and seeds may be added.

    Args:
        path: TOML of a `TextConfig`.
        overrides: "key=value" of it.
        dry_run: only print what would be run.
        device: of the evaluation: auto, cpu or cuda.
        progress: print the plan, each cell and the table.

    Returns:
        The names of the cells that failed.

    Raises:
        ScaMoError: the config, or what it names, cannot be used; OUT holds another study.
    """
    config = load_config(TextConfig, Path(path), overrides)
    settings = config.evaluation()
    hashes = check_evaluation(
        config.evaluator, config.dataset, settings, text_following=config.text_following
    )
    planned = plan_cells(config, progress=progress)
    if progress or dry_run:
        print(plan_table(planned))
    if dry_run:
        return []

    def cell(run: Planned) -> Cell:
        def make(work: Path) -> dict[str, Any]:
            if not trained(work / "run"):
                status, output = train(run.config, ds_config=config.ds_config, ranks=config.ranks)
                if status:
                    raise ScaMoError(f"{output}\ntrain.py ended with status {status}")
            return measure(
                work / "run",
                config.evaluator,
                settings,
                work,
                text_following=config.text_following,
                device=device,
                progress=progress,
            )

        model = run.config.model
        about = {"kind": run.kind, "text": model.text, "prefix": model.prefix}
        return Cell(run.name, about | {"seed": run.config.training.seed}, make)

    out = Path(config.out)
    shared = {key: value for key, value in to_dict(config).items() if key not in ("seeds", "out")}
    study = Study(out, shared | hashes, [cell(run) for run in planned])
    failed = study.run(progress)
    results = study.results()
    if results:
        text = report(results, settings, planned, failed)
        with replacing(out / "table.md") as partial:
            partial.write_text(text + "\n", encoding="utf-8")
        _, shown = write_pictures(out, {"cells": ("Every seed of every cell", _picture(results))})
        title = "Text: word states and a bidirectional prefix"
        write_page(out / "report.html", title, f"<h1>{title}</h1>\n{as_html(text)}\n{shown}")
        if progress:
            print(text)
    return failed


# -- report --------------------------------------------------------------------------------------------------


def paired(results: Sequence[dict[str, Any]], metric: str, kind: str, other: str) -> dict[str, Any]:
    """Mean over seeds of a metric of `kind` less that of `other`, with a 95% t-interval.

    Seeds that both cells have; low and high are None for fewer than two, the difference for none.
    """
    from scipy.stats import t

    values = {
        name: {r["seed"]: r[metric] for r in results if r["kind"] == name and metric in r}
        for name in (kind, other)
    }
    seeds = sorted(values[kind].keys() & values[other].keys())
    differences = np.array([values[kind][seed] - values[other][seed] for seed in seeds], dtype=np.float64)
    n = len(seeds)
    found: dict[str, Any] = {"n": n, "difference": None, "low": None, "high": None}
    if n:
        found["difference"] = float(differences.mean())
    if n > 1:
        half = float(t.ppf(0.975, n - 1) * differences.std(ddof=1) / math.sqrt(n))
        found |= {"low": found["difference"] - half, "high": found["difference"] + half}
    return found


def report(
    results: Sequence[dict[str, Any]], settings: Settings, planned: Sequence[Planned], failed: Sequence[str]
) -> str:
    """Cells, effects, and what is to be known of them: Markdown."""
    metrics = [name for name in METRICS if any(name in result for result in results)]
    heads = "".join(f" {METRICS[name][0]} |" for name in metrics)
    lines = [f"| cell | seeds |{heads}", "|---" * (len(metrics) + 2) + "|"]
    for kind in KINDS:
        part = [result for result in results if result["kind"] == kind]
        cells = [_mean([r[name] for r in part if name in r], METRICS[name][1]) for name in metrics]
        lines.append(f"| {kind} | {len(part)} | {' | '.join(cells)} |")
    real = results[0]["real"]
    cells = [f"{real[name]:.{METRICS[name][1]}f}" if name in real else "–" for name in metrics]
    lines.append(f"| real data | | {' | '.join(cells)} |")
    lines += ["", "Mean ± standard deviation over seeds.", ""]
    lines += [f"| effect | seeds |{heads}", "|---" * (len(metrics) + 2) + "|"]
    for name, kind, other in EFFECTS:
        found = [paired(results, metric, kind, other) for metric in metrics]
        cells = [_difference(f, METRICS[metric][1]) for f, metric in zip(found, metrics, strict=True)]
        lines.append(f"| {name} | {max(f['n'] for f in found)} | {' | '.join(cells)} |")
    tokens = {run.kind: run.motion_tokens for run in planned}
    positions = {run.kind: run.positions for run in planned}
    lines += [
        "",
        f"Differences of cells with the same seed, 95% t-intervals; {len(EFFECTS) * len(metrics)} of them, "
        "not corrected for their number.",
        "",
        SAME,
        "",
        f"Steps, schedule and order of the motions are those of all cells. The sentence has "
        f"{positions['sentence'] / positions['words-causal']:.2f} times the positions of the word states and "
        f"{tokens['sentence'] / tokens['words-causal']:.3f} times the motion tokens: its text takes one "
        "position, so it also computes less.",
        "",
        f"{stated(settings)}: the same captions for all cells, and the weights of the end of each run.",
        *[f"\n{name}: failed, and is not in the tables." for name in failed],
    ]
    return "\n".join(lines)


def _mean(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def _difference(found: dict[str, Any], digits: int) -> str:
    if found["difference"] is None:
        return "–"
    text = f"{found['difference']:+.{digits}f}"
    if found["low"] is None:
        return text
    return f"{text} ({found['low']:+.{digits}f} to {found['high']:+.{digits}f})"


def _picture(results: Sequence[dict[str, Any]]) -> Figure:
    """A panel a metric, a line a seed, the black bars are means."""
    metrics = [name for name in METRICS if any(name in result for result in results)]
    columns = min(4, len(metrics))
    drawn = figure(3.2 * columns, 2.8 * math.ceil(len(metrics) / columns))
    kinds = list(KINDS)
    for k, metric in enumerate(metrics):
        axes = drawn.add_subplot(math.ceil(len(metrics) / columns), columns, k + 1)
        for seed in sorted({result["seed"] for result in results}):
            part = {r["kind"]: r[metric] for r in results if r["seed"] == seed and metric in r}
            x = [index for index, kind in enumerate(kinds) if kind in part]
            axes.plot(x, [part[kinds[index]] for index in x], "o-", alpha=0.6, markersize=4, linewidth=0.8)
        for index, kind in enumerate(kinds):
            values = [r[metric] for r in results if r["kind"] == kind and metric in r]
            if values:
                axes.plot([index - 0.2, index + 0.2], [np.mean(values)] * 2, color="black", linewidth=2)
        axes.set_xticks(range(len(kinds)), [kind.replace("-", "\n") for kind in kinds], fontsize=7)
        axes.set(title=METRICS[metric][0], xlim=(-0.5, len(kinds) - 0.5))
        axes.grid(alpha=0.3)
    return drawn
