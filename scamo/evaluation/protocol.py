"""`scamo evaluate`: a model's row beside the real data and the tokenizer's reconstruction.

humanml3d   the protocol of Guo et al. 2022, with its randomness: shuffled pools of 32, random captions and
            crops, 20 repeats, mean +- 1.96 sigma / sqrt(repeats).
strict      the same questions without it: every clip whole, R-precision as its expectation over all pools,
            distances over all pairs, one motion per caption with a fixed seed, and 95% intervals by a
            bootstrap over source clips (a clip, its parts and its mirrored copy are drawn together).

Nothing is chosen here: no best-of-n, no retries, and the length of a generated motion is the model's EOS.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import scamo
from scamo.data.dataset import SPLITS, MotionDataset
from scamo.device import resolve_device
from scamo.errors import ScaMoError
from scamo.evaluation import metrics
from scamo.evaluation.evaluator import Evaluator, check_statistics, held, load_evaluator
from scamo.evaluation.items import (
    UNIT,
    Draw,
    draw_humanml3d,
    draw_strict,
    item_frames,
    source_clips,
    strict_turns,
)
from scamo.evaluation.ranks import Ranks
from scamo.evaluation.report import FORMAT, summary, write_report
from scamo.generation.api import ScaMo
from scamo.generation.export import identify
from scamo.motion import measures
from scamo.motion.representation import Representation
from scamo.tokenizers.encode import decode_tokens, encode_motions

PROTOCOLS = ("humanml3d", "strict")
TOP_K = 3
Motions = list[NDArray[np.float32]]


@dataclass(frozen=True)
class Settings:
    """What an evaluation is a function of, besides data and weights.

    items: how many of the split, drawn once for every model; 0 for all. pool, cosine_pool: motions that a
    sentence's own is looked for among, by distance and by cosine. pairs: of the diversity. mm_*: texts,
    generations of each and pairs of the multimodality; 0 texts leave it out.
    """

    protocol: str = "humanml3d"
    split: str = "test"
    repeats: int = 20
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    items: int = 0
    pool: int = 32
    cosine_pool: int = 100
    pairs: int = 300
    mm_texts: int = 100
    mm_generations: int = 30
    mm_pairs: int = 10
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ScaMoError(f"protocol {self.protocol!r}: expected {' or '.join(PROTOCOLS)}")
        if self.split not in SPLITS:
            raise ScaMoError(f"split {self.split!r}: expected one of {', '.join(SPLITS)}")
        for name in ("repeats", "pool", "cosine_pool", "pairs", "mm_pairs", "batch_size"):
            if getattr(self, name) < 1:
                raise ScaMoError(f"{name} = {getattr(self, name)}: expected 1 or more")
        if self.items < 0 or 0 < self.items < self.pool:
            raise ScaMoError(f"items = {self.items}: expected 0 for all, or at least a pool of {self.pool}")
        if self.pool < TOP_K:
            raise ScaMoError(f"pool = {self.pool}: expected at least {TOP_K}")
        if self.mm_texts < 0 or (self.mm_texts and self.mm_generations <= self.mm_pairs):
            raise ScaMoError(
                f"mm_texts = {self.mm_texts}, mm_generations = {self.mm_generations}: expected 0 texts, or "
                f"more generations than the {self.mm_pairs} pairs"
            )

    def sampling(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("temperature", "top_k", "top_p", "greedy")}


@dataclass
class _Row:
    """One row of the table while it is measured: a list of values per metric, one for each repeat or turn."""

    name: str
    repeats: dict[str, list[float]] = field(default_factory=dict)
    # strict: values of every item, averaged over turns.
    items: dict[str, list[NDArray]] = field(default_factory=dict)

    def add(self, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.repeats.setdefault(key, []).append(float(value))

    def add_items(self, values: dict[str, NDArray]) -> None:
        for key, value in values.items():
            self.items.setdefault(key, []).append(np.asarray(value, dtype=np.float64))


def evaluate_run(
    run: str | Path | None,
    evaluator: str | Path,
    *,
    dataset: str | Path | None = None,
    settings: Settings | None = None,
    out: str | Path | None = None,
    again: bool = False,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a run on a split of a dataset and write OUT.json and OUT.md.

    The first two rows are always the real data and what the run's tokenizer makes of them; the third is the
    model. With `run` None only the real data are measured (what an evaluator is worth).

    Args:
        run: a training run or an exported model.
        evaluator: an evaluator folder.
        dataset: the dataset folder; the one the run was trained on without it.
        settings: protocol, split, repeats, sampling, ...
        out: where to write, without a suffix; RUN/evaluation/PROTOCOL-SPLIT-DATASET without it.
        again: measure on the test split although this run has been measured there by this protocol.
        device: auto, cpu or cuda; under torchrun every process generates its part, on its own GPU.
        progress: show bars and print the table.

    Returns:
        The report (see `scamo.evaluation.report`); an empty dict on every rank but the first.

    Raises:
        ScaMoError: a folder does not open; evaluator, tokenizer and dataset do not go together; fewer items
            than a pool; the test split was met before; an embedding is not finite. No number is printed.
    """
    settings = settings or Settings()
    ranks = Ranks.join()
    try:
        if run is not None:
            _check_run_folder(Path(run))
        folder = _dataset_of(run, dataset)
        data = MotionDataset.open(folder)
        judge = load_evaluator(evaluator, resolve_device(ranks.device(device)))
        judge.check_dataset(data)
        model = None if run is None else ScaMo.load(run, device=ranks.device(device))
        if model is not None:
            _check_model(model, data, str(run))
        work = _Evaluation(data, judge, model, settings, ranks, progress and ranks.main)
        ledger = None
        if run is not None and settings.split == "test":
            ledger = _Ledger(Path(run), data, settings)
            ledger.check(again)
        report = work.measure()
        if not ranks.main:
            return {}
        if ledger is not None:
            report["test_split_met"] = ledger.record()
        report["run"] = None if run is None else Path(run).resolve().name
        report["model_sha256"] = None if run is None else identify(run)["sha256"]
        report["date"] = datetime.date.today().isoformat()
        report["version"] = scamo.__version__
        target = _out(run, out, settings, data)
        if target is not None:
            report["files"] = [str(path) for path in write_report(report, target)]
        if progress:
            print(summary(report))
        return report
    finally:
        ranks.leave()


def _check_run_folder(run: Path) -> None:
    if not run.is_dir():
        raise ScaMoError(f"{run}: no such run or exported model")


def _dataset_of(run: str | Path | None, dataset: str | Path | None) -> Path:
    if dataset is not None:
        return Path(dataset)
    config = Path(run) / "config.json" if run is not None else None
    if config is not None and config.is_file():
        found = json.loads(config.read_text(encoding="utf-8")).get("data", {}).get("dataset")
        if found:
            return Path(found)
    raise ScaMoError(f"{run}: does not say which dataset it was trained on: name one with --dataset")


def _check_model(model: ScaMo, data: MotionDataset, run: str) -> None:
    tokenizer = model.tokenizer
    if tokenizer.config.feature_dim != data.feature_dim:
        raise ScaMoError(
            f"{run}: its tokenizer has {tokenizer.config.feature_dim} features a frame, {data.folder} has "
            f"{data.feature_dim}"
        )
    if tokenizer.config.variant != data.variant:
        raise ScaMoError(
            f"{run}: its tokenizer has {tokenizer.config.variant} features, {data.folder} {data.variant} ones"
        )
    if abs(model.fps - data.fps) > 1e-6:
        raise ScaMoError(f"{run}: makes motions at {model.fps:g} fps, {data.folder} has {data.fps:g}")
    own = tokenizer.mean.cpu().numpy(), tokenizer.std.cpu().numpy()
    check_statistics(f"{run}: its tokenizer", own, (data.mean, data.std), f"dataset {data.folder}")


def _out(
    run: str | Path | None, out: str | Path | None, settings: Settings, data: MotionDataset
) -> Path | None:
    if out is not None:
        out = Path(out)
        return out.with_suffix("") if out.suffix in (".json", ".md") else out
    if run is None:
        return None
    name = f"{settings.protocol}-{settings.split}-{data.folder.resolve().name}"
    return Path(run) / "evaluation" / name


class _Ledger:
    """RUN/evaluation/test_split.jsonl: a line for every time the run met the test split of a dataset."""

    def __init__(self, run: Path, data: MotionDataset, settings: Settings) -> None:
        self.path = run / "evaluation" / "test_split.jsonl"
        self.dataset, self.protocol = data.folder.resolve().name, settings.protocol
        self.entry = {
            "dataset": self.dataset,
            "manifest_sha256": data.manifest_sha256,
            "settings": asdict(settings),
        }

    def _met(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines() if line]
        return [line for line in lines if line["manifest_sha256"] == self.entry["manifest_sha256"]]

    def check(self, again: bool) -> None:
        before = [line for line in self._met() if line["settings"]["protocol"] == self.protocol]
        if before and not again:
            raise ScaMoError(
                f"{self.path}: the {self.protocol} protocol met the test split of {self.dataset} on "
                f"{before[-1]['date']}; choose models on --split val, or say --again: the report counts it"
            )

    def record(self) -> int:
        """Append this evaluation; returns how many there are now, by any protocol."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = {"date": datetime.date.today().isoformat()} | self.entry
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return len(self._met())


def _items(data: MotionDataset, judge: Evaluator, settings: Settings) -> tuple[NDArray[np.int64], int]:
    """The items that are to be compared, and how many the humanml3d protocol's filter of lengths left out.

    Raises ScaMoError naming an item that is shorter than the evaluator (or a step of the protocols) needs.
    """
    items = data.items(settings.split)
    frames = data.item_lengths[items]
    kept = np.ones(len(items), dtype=bool)
    if settings.protocol == "humanml3d":
        shortest, longest = item_frames(data)
        kept = (frames >= shortest) & (frames < longest)
    least = max(judge.min_frames, UNIT)
    short = items[kept & (frames < least)]
    if len(short):
        raise ScaMoError(
            f"{data.folder}: item {data.item_name(int(short[0]))} has {data.item_lengths[short[0]]} frames, "
            f"evaluator {judge.name} needs {least}; {len(short) - 1} more of the {settings.split} split have "
            "too few"
        )
    return items[kept], int((~kept).sum())


class _Evaluation:
    def __init__(
        self,
        data: MotionDataset,
        judge: Evaluator,
        model: ScaMo | None,
        settings: Settings,
        ranks: Ranks,
        progress: bool,
    ) -> None:
        self.data, self.judge, self.model = data, judge, model
        self.settings, self.ranks, self.progress = settings, ranks, progress
        self.left_out: dict[str, str] = {}
        self.caveats: dict[str, str] = {}
        self.made = self.at_limit = self.too_short = 0
        self.items, self.filtered = _items(data, judge, settings)
        if len(self.items) < settings.pool:
            raise ScaMoError(
                f"{data.folder}: {len(self.items)} items in the {settings.split} split"
                + (
                    f" ({self.filtered} more are too short or too long for the protocol)"
                    if self.filtered
                    else ""
                )
                + f", a pool needs {settings.pool}"
            )
        if 0 < settings.items < len(self.items):
            self.caveats["items"] = f"a fixed sample of {settings.items:,d} of {len(self.items):,d}"
            drawn = np.random.default_rng(0).permutation(len(self.items))[: settings.items]
            self.items = self.items[np.sort(drawn)]
        self.clips = source_clips(data, self.items)
        self.row_clips = self.clips  # source clips of the rows whose values are kept one by one
        names = ["real"] if model is None else ["real", "reconstruction", "generated"]
        self.rows = {name: _Row(name) for name in names}

    def measure(self) -> dict[str, Any]:
        """Measure all rows; the report of plain values."""
        humanml3d = self.settings.protocol == "humanml3d"
        steps = self.settings.repeats if humanml3d else strict_turns(self.data, self.items)
        one = self._repeat if humanml3d else self._turn
        for number in tqdm(range(steps), desc=self.settings.protocol, disable=not self.progress):
            one(number)
        if not self.ranks.main:
            return {}
        first = draw_strict(self.data, self.items, 0)
        used = len(self.items) // self.settings.pool * self.settings.pool if humanml3d else len(self.items)
        interval = (
            f"mean over {steps} repeats ± 1.96 σ/√{steps}" if humanml3d else "95% bootstrap over source clips"
        )
        return {
            "format": FORMAT,
            "protocol": self.settings.protocol,
            "split": self.settings.split,
            "dataset": {
                "name": self.data.folder.resolve().name,
                "manifest_sha256": self.data.manifest_sha256,
                "items": len(self.items),
                "items_used": used,
                "items_filtered": self.filtered,
                "source_clips": int(self.clips.max()) + 1,
                "frames": int((first.ends - first.starts).sum()),
            },
            "evaluator": {
                "name": self.judge.name,
                "kind": type(self.judge).__name__,
                "sha256": self.judge.sha256,
                "width": self.judge.width,
            },
            "settings": asdict(self.settings),
            "interval": interval,
            "chance": {f"r_precision_{k}": k / self.settings.pool for k in range(1, TOP_K + 1)},
            "left_out": self.left_out,
            "caveats": self.caveats,
            "generated": {
                "motions": self.made,
                "at_the_length_limit": self.at_limit,
                "shorter_than_the_evaluator_takes": self.too_short,
            },
            "rows": [self._finish(row) for row in self.rows.values()],
        }

    def _repeat(self, repeat: int) -> None:
        """One repeat of the humanml3d protocol."""
        settings, data = self.settings, self.data
        draw = draw_humanml3d(data, self.items, (settings.seed, repeat, 0), pool=settings.pool)
        made = self._generate(draw, repeat)
        several = self._several(draw, repeat)
        if not self.ranks.main:
            return
        real = draw.features(data)
        texts = self.judge.embed_captions(data, draw.captions.tolist())
        points = self.judge.embed_motions(real)
        other = draw_humanml3d(data, self.items, (settings.seed, repeat, 1), pool=settings.pool)
        again = self.judge.embed_motions(other.features(data))
        seed = settings.seed + repeat
        self.rows["real"].add(self._pair_metrics(texts, points, again, seed))
        if repeat == 0:
            self.row_clips = self.clips[np.searchsorted(self.items, draw.items)]
            self._physics("real", real, None)
        if self.model is None:
            return
        rebuilt = self._reconstruct(real)
        rebuilt_points = self.judge.embed_motions(rebuilt)
        self.rows["reconstruction"].add(self._pair_metrics(texts, rebuilt_points, points, seed))
        made_points = self.judge.embed_motions(made)
        self.rows["generated"].add(self._pair_metrics(texts, made_points, points, seed))
        if repeat == 0:
            self._physics("reconstruction", rebuilt, real)
            self._physics("generated", made, None)
        if several:
            per_text = np.stack([self.judge.embed_motions(motions) for motions in several])
            value = metrics.multimodality(per_text, pairs=settings.mm_pairs, seed=seed)
            self.rows["generated"].add({"multimodality": value})

    def _pair_metrics(
        self, texts: NDArray, points: NDArray, reference: NDArray, seed: int
    ) -> dict[str, float]:
        settings = self.settings
        values = {"fid": metrics.frechet_distance(reference, points)}
        for k, share in enumerate(metrics.r_precision(texts, points, top_k=TOP_K, pool=settings.pool), 1):
            values[f"r_precision_{k}"] = float(share)
        values["matching"] = metrics.matching_score(texts, points, pool=settings.pool)
        values["cosine"] = metrics.clip_score(texts, points)
        if self._enough(
            "diversity",
            len(points) > settings.pairs,
            f"{settings.pairs} pairs need more motions than {len(points)}",
        ):
            values["diversity"] = metrics.diversity(points, pairs=settings.pairs, seed=seed)
        if self._enough_for_cosine(len(points)):
            unit = metrics.normalised(texts), metrics.normalised(points)
            shares = metrics.r_precision(*unit, top_k=TOP_K, pool=settings.cosine_pool)
            values |= {f"cosine_r_precision_{k}": float(share) for k, share in enumerate(shares, 1)}
        self._note_rank(len(points))
        return values

    def _turn(self, turn: int) -> None:
        """One turn of the strict protocol: every item with its caption number `turn`."""
        draw = draw_strict(self.data, self.items, turn)
        made = self._generate(draw, 0)
        several = self._several(draw, 0) if turn == 0 else []
        if not self.ranks.main:
            return
        real = draw.features(self.data)
        texts = self.judge.embed_captions(self.data, draw.captions.tolist())
        points = self.judge.embed_motions(real)
        rows: list[tuple[str, Motions, NDArray, Motions | None]] = [("real", real, points, None)]
        if self.model is not None:
            rebuilt = self._reconstruct(real)
            rows.append(("reconstruction", rebuilt, self.judge.embed_motions(rebuilt), real))
            rows.append(("generated", made, self.judge.embed_motions(made), None))
        for name, motions, found, true in rows:
            row = self.rows[name]
            row.add(
                {
                    "fid": metrics.frechet_distance(points, found),
                    "diversity": metrics.expected_diversity(found),
                }
            )
            row.add_items(self._strict_metrics(texts, found))
            if turn == 0 or name == "generated":
                self._physics(name, motions, true)
        if several:
            per_text = np.stack([self.judge.embed_motions(motions) for motions in several])
            self.rows["generated"].add({"multimodality": metrics.expected_multimodality(per_text)})
        self._note_rank(len(points))

    def _strict_metrics(self, texts: NDArray, points: NDArray) -> dict[str, NDArray]:
        """Values of every item (N,)."""
        hits = metrics.expected_r_precision(
            texts, points, groups=self.clips, top_k=TOP_K, pool=self.settings.pool
        )
        values = {f"r_precision_{k}": hits[:, k - 1] for k in range(1, TOP_K + 1)}
        difference = texts.astype(np.float64) - points
        values["matching"] = np.linalg.norm(difference, axis=1)
        unit = metrics.normalised(texts), metrics.normalised(points)
        values["cosine"] = (unit[0] * unit[1]).sum(axis=1)
        rivals = len(self.clips) - np.bincount(self.clips).max()
        if self._enough_for_cosine(int(rivals) + 1):
            hits = metrics.expected_r_precision(
                *unit, groups=self.clips, top_k=TOP_K, pool=self.settings.cosine_pool
            )
            values |= {f"cosine_r_precision_{k}": hits[:, k - 1] for k in range(1, TOP_K + 1)}
        return values

    def _enough(self, metric: str, enough: bool, why: str) -> bool:
        if not enough:
            self.left_out[metric] = why
        return enough

    def _enough_for_cosine(self, motions: int) -> bool:
        pool = self.settings.cosine_pool
        return self._enough(
            "cosine_r_precision",
            motions >= pool,
            f"a pool of {pool} needs as many motions, there are {motions}",
        )

    def _note_rank(self, motions: int) -> None:
        if motions <= self.judge.width:
            self.caveats["fid"] = (
                f"{motions} motions for {self.judge.width} dimensions bias it upwards: compare only rows of "
                "equally many"
            )

    def _reconstruct(self, real: Motions) -> Motions:
        assert self.model is not None
        tokenizer = self.model.tokenizer
        return decode_tokens(tokenizer, encode_motions(tokenizer, real))

    def _generate(self, draw: Draw, repeat: int, generations: range = range(1)) -> Motions:
        """Motions for every row of the draw, row after row, on rank 0; every rank makes its part."""
        if self.model is None:
            return []
        # A seed of its own for every caption: equal sentences of two items must not give equal motions.
        base = (self.settings.seed * 100_003 + repeat) * 1_009
        work = self.ranks.share(
            [
                (text, (base + generation) * 2**32 + int(caption))
                for text, caption in zip(draw.texts(self.data), draw.captions, strict=True)
                for generation in generations
            ]
        )
        motions = self.model.generate(
            [text for text, _ in work],
            seed=[seed for _, seed in work],
            batch_size=self.settings.batch_size,
            **self.settings.sampling(),
        )
        limit = self.model.config.max_motion
        gathered = self.ranks.gather(
            [(one.features, one.tokens is not None and len(one.tokens) == limit) for one in motions]
        )
        features = [np.asarray(one, dtype=np.float32) for one, _ in gathered]
        self.made += len(features)
        self.at_limit += sum(limited for _, limited in gathered)
        self.too_short += sum(len(motion) < self.judge.min_frames for motion in features)
        return [held(motion, self.judge.min_frames) for motion in features]

    def _several(self, draw: Draw, repeat: int) -> list[Motions]:
        """mm_generations motions for each of the first mm_texts rows: [text][generation]."""
        settings = self.settings
        if self.model is None or settings.mm_texts == 0:
            return []
        few = Draw(*(column[: settings.mm_texts] for column in draw))
        if len(few.items) < settings.mm_texts:
            self.caveats["multimodality"] = (
                f"over {len(few.items)} texts, as there are no {settings.mm_texts}"
            )
        # Generation 0 is the row's own motion of the main table.
        count = settings.mm_generations
        motions = self._generate(few, repeat, range(1, 1 + count))
        return [motions[start : start + count] for start in range(0, len(motions), count)]

    def _physics(self, name: str, motions: Motions, true: Motions | None) -> None:
        """How physical every motion is and, for a reconstruction, its errors; once (the first repeat)."""
        representation = Representation.find(self.data.feature_dim)
        if representation is None:
            self.left_out["physics"] = f"{self.data.feature_dim} features a frame are of no known body"
            return
        values: dict[str, list[float]] = {}
        joints = [representation.to_joints(motion) for motion in motions]
        truth: Sequence[Any] = [None] * len(joints)
        if true is not None:
            truth = [representation.to_joints(motion) for motion in true]
        for made, real in zip(joints, truth, strict=True):
            found = measures.physics(made, self.data.fps)
            if real is not None:
                real = real[: len(made)]
                found |= {
                    "mpjpe_mm": measures.mpjpe(made, real),
                    "velocity_error_mm_s": measures.velocity_error(made, real, self.data.fps),
                    "acceleration_error_mm_s2": measures.acceleration_error(made, real, self.data.fps),
                }
            for key, value in found.items():
                values.setdefault(key, []).append(value)
        self.rows[name].add_items({key: np.array(value) for key, value in values.items()})

    def _finish(self, row: _Row) -> dict[str, Any]:
        """Value, low and high of every metric; low and high are None where there is no interval."""
        found: dict[str, dict[str, float | None]] = {}
        for key, values in row.repeats.items():
            mean, half = metrics.mean_interval(np.array(values))
            humanml3d = self.settings.protocol == "humanml3d"
            found[key] = {
                "value": float(mean),
                "low": float(mean - half) if humanml3d else None,
                "high": float(mean + half) if humanml3d else None,
            }
        for key, turns in row.items.items():
            values = np.mean(turns, axis=0)
            low, high = metrics.bootstrap_interval(values, self.row_clips, seed=self.settings.seed)
            found[key] = {"value": float(values.mean()), "low": float(low), "high": float(high)}
        return {"name": row.name, "metrics": found}
