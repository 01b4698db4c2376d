"""`scamo study data`: what more training data is worth against better data.

{share of the clips} x {clean, and ways to be worse} x seeds. All cells have one tokenizer, of the clean data,
the same number of steps and the same validation set, and L_u is the cross-entropy there less that of one
unigram, of all the clean training tokens: what a cell's own training tokens are like does not enter it.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from scamo.config import DataConfig, ModelConfig, RunConfig, TrainingConfig, load_config, to_dict
from scamo.data.batches import BatchPlan, validation_batches
from scamo.data.dataset import MotionDataset, TextStore, TokenStore, write_text_states, write_tokens
from scamo.data.inspect import clip_items
from scamo.data.prepare.degrade import degrade
from scamo.device import resolve_device
from scamo.errors import ScaMoError
from scamo.evaluation.protocol import Settings
from scamo.models.losses import unigram_cross_entropy
from scamo.motion.files import replacing
from scamo.scaling.points import OVERFITTED, read_run
from scamo.studies.cells import Cell, Study, train, trained
from scamo.studies.metrics import METRICS as EVALUATED
from scamo.studies.metrics import check_evaluation, measure, stated
from scamo.studies.plots import as_html, colours, figure, write_page, write_pictures
from scamo.tokenizers import load_tokenizer
from scamo.tokenizers.encode import encode_dataset, encode_motions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Metric -> its name in tables, digits, and whether more is better.
METRICS: dict[str, tuple[str, int, bool]] = {
    "l_u": ("lowest L_u", 3, False),
    "l_u_last": ("L_u at the end", 3, False),
    **{name: EVALUATED[name] for name in ("text_following", "fid", "r_precision_3")},
}
# Items whose features are in memory at a time.
CHUNK = 512


@dataclass(frozen=True)
class Quality:
    """A way of training data to be worse, as `degrade` makes it: [[qualities]]. Without any noise: clean."""

    name: str
    jitter: float = 0.0
    foot_skate: float = 0.0
    caption_noise: float = 0.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+", self.name):
            raise ScaMoError(f"name = {self.name!r}: expected letters, digits and _")

    @property
    def clean(self) -> bool:
        return not (self.jitter or self.foot_skate or self.caption_noise)


@dataclass(frozen=True)
class DataStudyConfig:
    """What `scamo study data` reads.

    dataset: the clean data, with text states. tokenizer: its folder; tokens that the dataset lacks are made
    first. quantities: shares of the train clips. qualities: one of them clean. seeds: each chooses other
    clips, noise, weights and order. evaluator: its folder; "" measures nothing but losses. text: name of the
    text states. protocol, split, pool, temperature: of the evaluation. text_following: measure it too.
    keep_work: keep each cell's dataset. ranks: processes, started by deepspeed if more than one. training:
    of all cells; seed and run are set by them.
    """

    dataset: str
    tokenizer: str
    qualities: tuple[Quality, ...]
    out: str = "runs/study_data"
    quantities: tuple[float, ...] = (1.0, 0.25, 0.0625)
    seeds: tuple[int, ...] = (0, 1, 2)
    evaluator: str = ""
    text: str = ""
    protocol: str = "strict"
    split: str = "test"
    pool: int = 32
    temperature: float = 1.0
    text_following: bool = True
    keep_work: bool = False
    ranks: int = 1
    ds_config: str = "configs/ds_zero3.json"
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        names = [quality.name for quality in self.qualities]
        for key, values in (("quantities", self.quantities), ("qualities", names), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ScaMoError(f"{key} = {list(values)}: expected at least one, each once")
        if sum(quality.clean for quality in self.qualities) != 1:
            raise ScaMoError(f"qualities = {names}: expected one, and only one, without any noise")
        for quantity in self.quantities:
            if not 0 < quantity <= 1:
                raise ScaMoError(f"quantities: {quantity} is no share above 0 and up to 1")
        if self.ranks < 1:
            raise ScaMoError(f"ranks = {self.ranks}: expected 1 or more")
        self.evaluation()

    def evaluation(self) -> Settings:
        return Settings(
            protocol=self.protocol,
            split=self.split,
            pool=self.pool,
            temperature=self.temperature,
            mm_texts=0,
        )


class _Base:
    """The clean data, its stores, and the cross-entropy of the one unigram on its validation set."""

    def __init__(self, config: DataStudyConfig, progress: bool) -> None:
        self.data = MotionDataset.open(config.dataset)
        self.text = self.data.text_states(config.text)
        name = Path(config.tokenizer).name
        if not (self.data.folder / "tokens" / name).exists():
            encode_dataset(config.tokenizer, self.data.folder, progress=progress)
        self.tokens = self.data.tokens(name)
        self.plan = BatchPlan.of(
            self.data, "train", self.tokens, self.text, config.model, config.training
        )  # fmt: skip
        counts = torch.from_numpy(self.tokens.unigram("train"))
        batches = list(validation_batches(self.data, "val", self.plan))
        if not batches:
            raise ScaMoError(f"{self.data.folder}: no item of the val split can be validated on")
        targets = torch.cat([batch.targets for batch in batches])
        self.unigram = float(unigram_cross_entropy(counts, targets).mean())


def run_data_study(
    path: str | Path,
    *,
    overrides: tuple[str, ...] = (),
    dry_run: bool = False,
    device: str = "auto",
    progress: bool = True,
) -> list[str]:
    """Degrade, train and measure every cell; OUT/results.jsonl, table.md, quantity.png and report.html.

    The same call goes on where it was stopped; quantities, qualities and seeds may be added.

    Args:
        path: TOML of a `DataStudyConfig`.
        overrides: "key=value" of it.
        dry_run: only print what would be run.
        device: of the tokenizer and the evaluation: auto, cpu or cuda.
        progress: print the plan, each cell and the table.

    Returns:
        The names of the cells that failed.

    Raises:
        ScaMoError: the config, or what it names, cannot be used; OUT holds another study.
    """
    config = load_config(DataStudyConfig, Path(path), overrides)
    settings = config.evaluation()
    hashes = {"dataset_sha256": MotionDataset.open(config.dataset).manifest_sha256}
    if config.evaluator:
        hashes = check_evaluation(
            config.evaluator, config.dataset, settings, text_following=config.text_following
        )
    base = _Base(config, progress)
    cells = [
        _cell(config, base, settings, quantity, quality, seed, device, progress)
        for quantity in config.quantities
        for quality in config.qualities
        for seed in config.seeds
    ]
    if progress or dry_run:
        print(_plan_table(config, base))
    if dry_run:
        return []
    out = Path(config.out)
    free = ("quantities", "qualities", "seeds", "out", "keep_work", "ranks")
    shared = {key: value for key, value in to_dict(config).items() if key not in free}
    study = Study(out, shared | hashes, cells)
    failed = study.run(progress)
    results = study.results()
    if results:
        text = report(config, results, failed)
        with replacing(out / "table.md") as partial:
            partial.write_text(text + "\n", encoding="utf-8")
        pictures = {"quantity": ("Every seed of every cell, and their means", _picture(config, results))}
        _, shown = write_pictures(out, pictures)
        title = "Data: quantity and quality"
        write_page(out / "report.html", title, f"<h1>{title}</h1>\n{as_html(text)}\n{shown}")
        if progress:
            print(text)
    return failed


def _plan_table(config: DataStudyConfig, base: _Base) -> str:
    clips, epochs = base.data.clip_splits.count("train"), base.plan.epochs(config.training.steps - 1)
    lines = ["| quantity | train clips | epochs, about | qualities | seeds |", "|---|---|---|---|---|"]
    names = ", ".join(quality.name for quality in config.qualities)
    for quantity in config.quantities:
        lines.append(
            f"| {quantity:g} | {max(1, round(quantity * clips)):,d} | {epochs / quantity:.1f} | {names} "
            f"| {', '.join(map(str, config.seeds))} |"
        )
    return "\n".join(lines)


def _cell(
    config: DataStudyConfig,
    base: _Base,
    settings: Settings,
    quantity: float,
    quality: Quality,
    seed: int,
    device: str,
    progress: bool,
) -> Cell:
    noise = {key: value for key, value in to_dict(quality).items() if key != "name"}

    def make(work: Path) -> dict[str, Any]:
        folder = work / "data"
        if not folder.exists():
            degrade(base.data.folder, folder, keep=quantity, seed=seed, progress=False, **noise)
        data = MotionDataset.open(folder)
        copy_text(base.data, base.text, data)
        copy_tokens(base.data, base.tokens, data, config.tokenizer, device)
        run = RunConfig(
            DataConfig(
                dataset=str(folder),
                tokens=base.tokens.name,
                text=base.text.name,
                tokenizer=config.tokenizer,
            ),
            config.model,
            replace(config.training, seed=seed, run=str(work / "run")),
        )
        if not trained(work / "run"):
            status, output = train(run, ds_config=config.ds_config, ranks=config.ranks)
            if status:
                raise ScaMoError(f"{output}\ntrain.py ended with status {status}")
        measured: dict[str, Any] = {}
        if config.evaluator:
            measured = measure(
                work / "run",
                config.evaluator,
                settings,
                work,
                text_following=config.text_following,
                device=device,
                progress=progress,
            )
        found = read_run(work / "run")
        best = int(found.loss.argmin())
        made = data.manifest["provenance"]["degraded"]
        if not config.keep_work:
            shutil.rmtree(folder)
        return measured | {
            "l_u": float(found.loss[best]) - base.unigram,
            "l_u_last": float(found.loss[-1]) - base.unigram,
            "best_step": int(found.steps[best]),
            "loss": float(found.loss[-1]),
            "unigram": base.unigram,
            "overfitted": bool(found.loss[-1] > found.loss[best] + OVERFITTED),
            "counts": made["counts"],
            "physics": made["physics"],
        }

    about = {"quantity": quantity, "quality": quality.name, **noise, "seed": seed}
    return Cell(f"{quantity:g}-{quality.name}-s{seed}", about, make)


def copy_text(base: MotionDataset, text: TextStore, data: MotionDataset) -> None:
    """Give a degraded dataset the text states of its captions, all of which are some of the base's."""
    if text.name in data.text_names():
        return
    states = {base.caption(caption): caption for caption in range(base.n_captions)}
    texts = list(dict.fromkeys(data.caption(caption) for caption in range(data.n_captions)))
    place = {one: at for at, one in enumerate(texts)}
    index = np.array([place[data.caption(caption)] for caption in range(data.n_captions)])
    write_text_states(
        data.folder,
        text.name,
        (text[states[one]] for one in texts),
        encoder=text.encoder,
        index=index,
        details=text.manifest["details"],
    )


def copy_tokens(
    base: MotionDataset, tokens: TokenStore, data: MotionDataset, tokenizer: str | Path, device: str = "auto"
) -> None:
    """Give a degraded dataset its tokens: the base's own, and of motions that changed those of `tokenizer`.

    So the validation set is the same to the token, however batches are put together.
    """
    if tokens.name in data.token_names():
        return
    places = dict(zip(base.clip_names, clip_items(base), strict=True))
    own = list(clip_items(data))
    made = data.manifest["provenance"]["degraded"]
    noisy = made["jitter"] or made["foot_skate"]
    autoencoder = load_tokenizer(tokenizer, resolve_device(device)) if noisy else None
    result: list[NDArray[np.int32]] = [np.empty(0, dtype=np.int32)] * data.n_items
    changed: list[int] = []
    for clip, name in enumerate(data.clip_names):
        if noisy and data.clip_splits[clip] == "train":
            changed += own[clip]
            continue
        for item, before in zip(own[clip], places[name], strict=True):
            result[item] = tokens[before]
    for first in range(0, len(changed), CHUNK):
        part = changed[first : first + CHUNK]
        assert autoencoder is not None
        encoded = encode_motions(autoencoder, [data.item_features(item) for item in part])
        for item, values in zip(part, encoded, strict=True):
            result[item] = values
    write_tokens(
        data.folder,
        tokens.name,
        result,
        codes=tokens.codes,
        downsampling=tokens.downsampling,
        tokenizer=tokens.tokenizer,
    )


# -- report --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its 95% t-interval; low and high are NaN for fewer than two seeds."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Estimate:
        from scipy.stats import t

        n = len(values)
        half = math.nan
        if n > 1:
            half = float(t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n))
        mean = float(values.mean())
        return cls(mean, mean - half, mean + half, n)

    @property
    def sure(self) -> bool:
        """The interval does not hold 0."""
        return self.low > 0 or self.high < 0

    def text(self, digits: int) -> str:
        if math.isnan(self.low):
            return f"{self.mean:+.{digits}f}"
        return f"{self.mean:+.{digits}f} ({self.low:+.{digits}f} to {self.high:+.{digits}f})"


class Table:
    """A metric of the cells, values (quantities, qualities, seeds), of the seeds that all cells have.

    quantities: descending; qualities: the clean one first.
    """

    def __init__(self, config: DataStudyConfig, results: Sequence[dict[str, Any]], metric: str) -> None:
        self.quantities = sorted(config.quantities, reverse=True)
        ordered = sorted(config.qualities, key=lambda quality: not quality.clean)
        self.qualities = [quality.name for quality in ordered]
        found = {(r["quantity"], r["quality"], r["seed"]): r[metric] for r in results if metric in r}
        grid = [(quantity, name) for quantity in self.quantities for name in self.qualities]
        self.seeds = [seed for seed in config.seeds if all((*cell, seed) in found for cell in grid)]
        values = [[found[(*cell, seed)] for seed in self.seeds] for cell in grid]
        shape = len(self.quantities), len(self.qualities), len(self.seeds)
        self.values = np.array(values, dtype=np.float64).reshape(shape)

    def variance(self) -> list[tuple[str, float, float]]:
        """Of quantity, quality, their interaction and seeds: (name, share of the variance, p of an F-test).

        p is NaN where it cannot be told: of the seeds, and with one seed.
        """
        from scipy.stats import f

        y = self.values
        a, b, n = y.shape
        mean = y.mean()
        rows, columns, cells = y.mean((1, 2)), y.mean((0, 2)), y.mean(2)
        sums = {
            "quantity": (b * n * ((rows - mean) ** 2).sum(), a - 1),
            "quality": (a * n * ((columns - mean) ** 2).sum(), b - 1),
            "interaction": (n * ((cells - rows[:, None] - columns + mean) ** 2).sum(), (a - 1) * (b - 1)),
            "seeds": (((y - cells[..., None]) ** 2).sum(), a * b * (n - 1)),
        }
        total = ((y - mean) ** 2).sum()
        rest, free = sums["seeds"]
        found = []
        for name, (part, degrees) in sums.items():
            p = math.nan
            if name != "seeds" and degrees and free and rest:
                p = float(f.sf((part / degrees) / (rest / free), degrees, free))
            found.append((name, float(part / total) if total else math.nan, p))
        return found

    def effects(self) -> Iterator[tuple[str, Estimate]]:
        """Main effects, against all of the data and clean data, and what is beyond their sum in each cell."""
        y = self.values
        for at, quantity in enumerate(self.quantities[1:], 1):
            yield f"quantity {quantity:g} against {self.quantities[0]:g}", Estimate.of((y[at] - y[0]).mean(0))
        for at, quality in enumerate(self.qualities[1:], 1):
            difference = (y[:, at] - y[:, 0]).mean(0)
            yield f"{quality} against {self.qualities[0]}", Estimate.of(difference)
        for row, quantity in enumerate(self.quantities[1:], 1):
            for column, quality in enumerate(self.qualities[1:], 1):
                more = (y[row, column] - y[row, 0]) - (y[0, column] - y[0, 0])
                yield (
                    f"interaction: {quality} at {quantity:g}, beyond at {self.quantities[0]:g}",
                    Estimate.of(more),
                )

    def trades(self) -> Iterator[tuple[str, Estimate, Estimate, Estimate]]:
        """Of each worse cell: (which, gain by more of such data, gain by clean data, their difference)."""
        y = self.values
        for row in range(len(self.quantities) - 1, 0, -1):
            small, large = self.quantities[row], self.quantities[row - 1]
            for column, quality in enumerate(self.qualities[1:], 1):
                more = y[row - 1, column] - y[row, column]
                clean = y[row, 0] - y[row, column]
                name = f"{quality}, {small:g}: {large / small:g}x the data, or clean"
                yield name, Estimate.of(more), Estimate.of(clean), Estimate.of(more - clean)


def report(config: DataStudyConfig, results: Sequence[dict[str, Any]], failed: Sequence[str]) -> str:
    """Cells, effects, and what a gain of data is worth: Markdown."""
    metrics = [name for name in METRICS if any(name in result for result in results)]
    heads = "".join(f" {METRICS[name][0]} |" for name in metrics)
    lines = [f"| quantity | quality | train clips | seeds |{heads} best step | overfitted |"]
    lines.append("|---" * (len(metrics) + 6) + "|")
    for quantity in sorted(config.quantities, reverse=True):
        for quality in config.qualities:
            part = [r for r in results if (r["quantity"], r["quality"]) == (quantity, quality.name)]
            if not part:
                continue
            cells = [_mean([r[name] for r in part if name in r], METRICS[name][1]) for name in metrics]
            cells += [", ".join(f"{r['best_step']:,d}" for r in part)]
            cells += [f"{sum(r['overfitted'] for r in part)} of {len(part)}"]
            clips = _mean([r["counts"]["kept_clips"] for r in part], 0)
            row = [f"{quantity:g}", quality.name, clips, str(len(part)), *cells]
            lines.append(f"| {' | '.join(row)} |")
    lines += [
        "",
        "Mean ± standard deviation over seeds. Overfitted: the L_u at the end is more than "
        f"{OVERFITTED:g} nats above the lowest.",
    ]
    for name in metrics:
        table = Table(config, results, name)
        if table.seeds and min(table.values.shape[:2]) > 1:
            lines += ["", f"## {METRICS[name][0]}", "", *_analysis(table, METRICS[name])]
    unigrams = sorted({f"{result['unigram']:.4f}" for result in results})
    lines += [
        "",
        f"L_u: cross-entropy on the clean validation set less {', '.join(unigrams)} nats, of the unigram of "
        "all the clean training tokens there. One tokenizer, of the clean data, makes all tokens; all "
        f"cells have {config.training.steps:,d} steps of the same size, so fewer clips are seen more often. "
        "Text-following, FID and R@3 are those of the weights at the end.",
    ]
    lines += [_noise(config, results)]
    if config.evaluator:
        lines += ["", f"{stated(config.evaluation())}: the same captions for all cells."]
    lines += [f"\n{name}: failed, and is not in the tables." for name in failed]
    return "\n".join(lines)


def _analysis(table: Table, metric: tuple[str, int, bool]) -> list[str]:
    _, digits, rising = metric
    lines = ["| part of the variance | share | p |", "|---|---|---|"]
    for name, share, p in table.variance():
        lines.append(f"| {name} | {share:.1%} | {'' if math.isnan(p) else f'{p:.2g}'} |")
    lines += ["", "| effect | difference |", "|---|---|"]
    lines += [f"| {name} | {effect.text(digits)} |" for name, effect in table.effects()]
    lines += ["", "| worse data | by more data | by clean data | more less clean | worth more |"]
    lines.append("|---|---|---|---|---|")
    for name, more, clean, difference in table.trades():
        winner = "not told apart"
        if difference.sure:
            winner = "more data" if (difference.mean > 0) == rising else "clean data"
        cells = " | ".join(one.text(digits) for one in (more, clean, difference))
        lines.append(f"| {name} | {cells} | {winner} |")
    seeds = ", ".join(map(str, table.seeds))
    lines += [
        "",
        f"{'More' if rising else 'Less'} is better. Differences within seeds {seeds}; 95% t-intervals, not "
        "corrected for their number.",
    ]
    return lines


def _noise(config: DataStudyConfig, results: Sequence[dict[str, Any]]) -> str:
    """What the noise did, of one cell a quality."""
    lines = []
    for quality in config.qualities:
        part = [r for r in results if r["quality"] == quality.name]
        if quality.clean or not part:
            continue
        made, counts = part[0]["physics"], part[0]["counts"]
        said = [f"{counts['swapped_captions']:,d} of {counts['train_captions']:,d} captions swapped"]
        if made:
            before, after = made["before"], made["after"]
            said.append(
                f"foot skate {before['foot_skate']:.1%} -> {after['foot_skate']:.1%}, "
                f"jerk {before['jerk']:.0f} -> {after['jerk']:.0f} m/s^3"
            )
        noise = ", ".join(
            f"{key} {value:g}" for key, value in to_dict(quality).items() if key != "name" and value
        )
        lines.append(f"- {quality.name}: {noise}; in {part[0]['cell']}: {', '.join(said)}.")
    return "\n".join(["", *lines]) if lines else ""


def _mean(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(set(values)) > 1 else ""
    return f"{np.mean(values):,.{digits}f}{spread}"


def _picture(config: DataStudyConfig, results: Sequence[dict[str, Any]]) -> Figure:
    """A panel a metric, a line a quality."""
    metrics = [name for name in METRICS if any(name in result for result in results)]
    names = [quality.name for quality in config.qualities]
    shades = colours(range(len(names)))
    columns = min(3, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    drawn = figure(4 * columns, 3.2 * rows)
    for k, metric in enumerate(metrics):
        axes = drawn.add_subplot(rows, columns, k + 1)
        for at, name in enumerate(names):
            part = [r for r in results if r["quality"] == name and metric in r]
            means: dict[float, list[float]] = {}
            for result in part:
                means.setdefault(result["quantity"], []).append(result[metric])
            x = sorted(means)
            axes.plot(x, [np.mean(means[q]) for q in x], "-", color=shades[at], label=name)
            axes.plot(
                [r["quantity"] for r in part], [r[metric] for r in part], "o", color=shades[at], markersize=3
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(config.quantities), [f"{q:g}" for q in sorted(config.quantities)])
        axes.set(xlabel="share of the train clips", ylabel=METRICS[metric][0])
        axes.grid(alpha=0.3)
        if k == 0:
            axes.legend(fontsize=8)
    return drawn
