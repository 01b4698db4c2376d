"""What is in a dataset: numbers (`stats`) and pictures (`show`)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from scamo.data import inspect
from scamo.data.dataset import SPLITS, MotionDataset
from scamo.data.inspect import MEASURES, STATIC_SHARE, STILL_SPEED
from scamo.errors import ScaMoError
from scamo.motion.files import replacing
from scamo.motion.representation import Representation

Sort = Literal[
    "random", "longest", "shortest", "jerk", "speed", "highest", "lowest", "bones", "skate", "still"
]
# What `show` sorts by, largest first: a measure and its sign.
_SORTED = {
    "jerk": ("jerk", 1),
    "speed": ("peak_speed", 1),
    "highest": ("highest", 1),
    "lowest": ("lowest", -1),
    "bones": ("bone_drift", 1),
    "skate": ("foot_skate", 1),
    "still": ("still", 1),
}
_OUTLIERS = ("jerk", "peak_speed", "highest", "bone_drift", "foot_skate")
_ON_A_PICTURE = 16


@dataclass
class Stats:
    """values: what JSON holds; `markdown` makes tables of it."""

    values: dict[str, Any]

    def json(self) -> str:
        return json.dumps(self.values, indent=1, ensure_ascii=False, allow_nan=False)

    def markdown(self) -> str:
        return _markdown(self.values)

    def save(self, stem: str | Path) -> list[Path]:
        """Write STEM.json and STEM.md."""
        written = []
        for suffix, text in ((".json", self.json()), (".md", self.markdown())):
            path = Path(f"{stem}{suffix}")
            with replacing(path) as partial:
                partial.write_text(text + "\n", encoding="utf-8")
            written.append(path)
        return written


def stats(folder: str | Path, *, top: int = 10, progress: bool = True) -> Stats:
    """Counts, lengths, movement, captions, duplicates, static clips and outliers of a dataset.

    The same row of numbers for every split, every source that clips name in their meta ("source"), and all.
    A clip is static when STATIC_SHARE of its steps are still: no joint faster than STILL_SPEED.

    Args:
        folder: the dataset.
        top: entries of every list (outliers, frequent words, groups of duplicates).
        progress: show a progress bar.

    Raises:
        ScaMoError: the dataset cannot be opened (`scamo data check` says all that is wrong with it), its
            features are of no known representation, or top is not positive.
    """
    if top < 1:
        raise ScaMoError(f"top: expected 1 or more, got {top}")
    dataset = MotionDataset.open(folder)
    table, prints = inspect.measured(dataset, progress=progress)
    frames = np.diff(dataset.clip_offsets)
    of_item = [len(dataset.captions_of(item)) for item in range(dataset.n_items)]
    lengths = np.array([len(inspect.words(dataset.caption(c))) for c in range(dataset.n_captions)])
    items = list(inspect.clip_items(dataset))
    splits = np.array(dataset.clip_splits)
    sources = np.array([str(dataset.clip_meta(clip).get("source", "")) for clip in range(dataset.n_clips)])
    named = [source for source in dict.fromkeys(sources.tolist()) if source]

    def row(clips: NDArray) -> dict[str, Any]:
        captions = [c for clip in clips for item in items[clip] for c in dataset.captions_of(item)]
        seconds = frames[clips] / dataset.fps
        still = table[clips, _column("still")]
        values: dict[str, Any] = {
            "clips": len(clips),
            "items": sum(len(items[clip]) for clip in clips),
            "captions": len(captions),
            "frames": int(frames[clips].sum()),
            "hours": float(seconds.sum() / 3600),
            "seconds": _spread(seconds),
            "captions_per_item": len(captions) / max(1, sum(len(items[clip]) for clip in clips)),
            "words_per_caption": float(lengths[captions].mean()) if captions else None,
            "static_clips": int((still >= STATIC_SHARE).sum()),
        }
        for name in MEASURES:
            column = table[clips, _column(name)]
            good = np.isfinite(column)
            weight = frames[clips][good]
            values[name] = float(np.average(column[good], weights=weight)) if good.any() else None
        return values

    every = np.arange(dataset.n_clips)
    values: dict[str, Any] = {
        "folder": str(dataset.folder),
        "fps": dataset.fps,
        "features": dataset.feature_dim,
        "units": MEASURES,
        "all": row(every),
        "splits": {split: row(every[splits == split]) for split in SPLITS if (splits == split).any()},
        "sources": {source: row(every[sources == source]) for source in named},
        "lengths": {
            "seconds": _spread(frames / dataset.fps),
            "item_frames": _spread(dataset.item_lengths),
            "captions_per_item": _spread(np.array(of_item)),
        },
        "captions": _captions(dataset, lengths, top),
        "duplicates": _duplicates(dataset, prints, frames, top),
        "static": _static(dataset, table, top),
        "outliers": {name: _top(dataset, table, name, top) for name in _OUTLIERS},
    }
    return Stats(values)


def show(
    folder: str | Path,
    out: str | Path,
    *,
    count: int = 12,
    names: Sequence[str] = (),
    split: str = "",
    seed: int = 0,
    sort: Sort = "random",
    progress: bool = True,
) -> list[Path]:
    """Draw clips with their captions: OUT/clips.png (more than one when they are many) and OUT/clips.html.

    Args:
        folder: the dataset.
        out: folder of the pictures, made if it is not there.
        count: clips; names takes precedence.
        names: the clips to draw.
        split: only of this one; "" means all.
        seed: of a random choice.
        sort: "random"; "longest" and "shortest"; or the clips with the most of something: "jerk", "speed"
            (of the fastest joint), "highest" (joint), "lowest" (joint), "bones" (drift), "skate", "still".

    Returns:
        The files written.

    Raises:
        ScaMoError: an unknown name, split or order, or a count below 1.
    """
    from scamo.motion.motion import Motion
    from scamo.motion.render import grid_png, save_html

    dataset = MotionDataset.open(folder)
    representation = Representation.of(dataset.feature_dim)
    if count < 1:
        raise ScaMoError(f"count: expected 1 or more, got {count}")
    if sort not in get_args(Sort):
        raise ScaMoError(f"sort {sort!r}: expected one of {', '.join(get_args(Sort))}")
    clips = inspect.choose_clips(dataset, names=names, split=split)
    values: dict[int, str] = {}
    if not names:
        clips, values = _ordered(dataset, clips, count, seed, sort, progress)
    motions, titles = [], []
    items = list(inspect.clip_items(dataset))
    for clip in clips:
        captions = [dataset.caption(c) for item in items[clip] for c in dataset.captions_of(item)]
        features = dataset.clip_features(clip)
        text = " / ".join(dict.fromkeys(captions))
        motions.append(Motion(inspect.recovered(features, representation), fps=dataset.fps, text=text))
        facts = ", ".join(filter(None, [dataset.clip_splits[clip], values.get(clip, "")]))
        titles.append(f"{dataset.clip_names[clip]} ({facts}): {text}")
    if not motions:
        raise ScaMoError(f"{dataset.folder}: no clip in {split or 'it'}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    pages = range(0, len(motions), _ON_A_PICTURE)
    for page, start in enumerate(pages):
        path = out / ("clips.png" if len(pages) == 1 else f"clips-{page}.png")
        rows = list(zip(titles, motions, strict=True))[start : start + _ON_A_PICTURE]
        grid_png(rows, path, columns=1 if len(rows) < 3 else 2, dpi=100)
        written.append(path)
    page_title = f"{dataset.folder.name}: {len(motions)} clips, {sort if not names else 'by name'}"
    save_html(motions, out / "clips.html", titles=titles, title=page_title)
    return [*written, out / "clips.html"]


def _ordered(
    dataset: MotionDataset, clips: list[int], count: int, seed: int, sort: Sort, progress: bool
) -> tuple[list[int], dict[int, str]]:
    """The first `count` clips in an order, and what each is there for."""
    frames = np.diff(dataset.clip_offsets)[clips]
    if sort == "random":
        return [clips[i] for i in np.random.default_rng(seed).permutation(len(clips))[:count]], {}
    if sort in ("longest", "shortest"):
        order = np.argsort(-frames if sort == "longest" else frames, kind="stable")[:count]
        return [clips[i] for i in order], {clips[i]: f"{frames[i] / dataset.fps:g} s" for i in order}
    name, sign = _SORTED[sort]
    column = inspect.measured(dataset, clips, progress=progress)[0][:, _column(name)]
    order = np.argsort(np.nan_to_num(-sign * column, nan=np.inf), kind="stable")[:count]
    return [clips[i] for i in order], {clips[i]: f"{name} {column[i]:.3g} {MEASURES[name]}" for i in order}


def _column(name: str) -> int:
    return list(MEASURES).index(name)


def _spread(values: NDArray) -> dict[str, float]:
    if not len(values):
        return {}
    ranks = np.percentile(values, [0, 5, 50, 95, 100])
    named = dict(zip(("min", "p5", "median", "p95", "max"), map(float, ranks), strict=True))
    return named | {"mean": float(values.mean())}


def _captions(dataset: MotionDataset, lengths: NDArray, top: int) -> dict[str, Any]:
    texts, vocabulary = Counter[str](), Counter[str]()
    first, verbs = Counter[str](), Counter[str]()
    for caption in range(dataset.n_captions):
        text = dataset.caption(caption)
        spoken = inspect.words(text)
        texts[text] += 1
        vocabulary.update(spoken)
        first.update(spoken[:1])
        tagged = dataset.caption_meta(caption).get("tokens")
        if isinstance(tagged, str):
            verbs.update(word[:-5] for word in tagged.split() if word.endswith("/VERB"))
    return {
        "captions": dataset.n_captions,
        "different": len(texts),
        "words": int(lengths.sum()),
        "words_per_caption": _spread(lengths),
        "vocabulary": len(vocabulary),
        "words_used_once": sum(count == 1 for count in vocabulary.values()),
        "most_frequent_words": dict(vocabulary.most_common(top)),
        "most_frequent_verbs": dict(verbs.most_common(top)),
        "most_frequent_first_words": dict(first.most_common(top)),
        "most_repeated": {text: count for text, count in texts.most_common(top) if count > 1},
    }


def _duplicates(dataset: MotionDataset, prints: NDArray, frames: NDArray, top: int) -> dict[str, Any]:
    """Groups of clips that are the same: to a millimetre, to a few centimetres, and so in a mirror too."""
    found: dict[str, Any] = {}
    near = {"within": inspect.NEAR_M, "slack": inspect.NEAR_FRAMES}
    for name, options in {"same": {}, "near": near, "near_or_mirrored": near | {"mirrored": True}}.items():
        groups = inspect.copies(prints, frames, **options)  # type: ignore[arg-type]
        groups.sort(key=lambda group: (-len(group), group))
        across = [group for group in groups if len({dataset.clip_splits[clip] for clip in group}) > 1]
        found[name] = {
            "groups": len(groups),
            "surplus_clips": sum(len(group) - 1 for group in groups),
            "groups_across_splits": len(across),
            "largest": [[dataset.clip_names[clip] for clip in group[:8]] for group in groups[:top]],
            "across_splits": [
                [f"{dataset.clip_names[clip]} ({dataset.clip_splits[clip]})" for clip in group[:8]]
                for group in across[:top]
            ],
        }
    return found


def _static(dataset: MotionDataset, table: NDArray, top: int) -> dict[str, Any]:
    still = table[:, _column("still")]
    static = np.flatnonzero(still >= STATIC_SHARE)
    steps = np.maximum(np.diff(dataset.clip_offsets) - 1, 0)
    good = np.isfinite(still)
    return {
        "still_speed": STILL_SPEED,
        "static_share": STATIC_SHARE,
        "still_steps": float((still[good] * steps[good]).sum() / max(1, steps[good].sum())),
        "clips": len(static),
        "share_of_clips": len(static) / dataset.n_clips,
        "names": [
            dataset.clip_names[clip] for clip in static[np.argsort(-still[static], kind="stable")][:top]
        ],
    }


def _top(dataset: MotionDataset, table: NDArray, name: str, top: int) -> list[dict[str, Any]]:
    column = table[:, _column(name)]
    order = np.argsort(np.nan_to_num(-column, nan=np.inf), kind="stable")[:top]
    return [
        {"name": dataset.clip_names[clip], "split": dataset.clip_splits[clip], "value": float(column[clip])}
        for clip in order
        if np.isfinite(column[clip])
    ]


def _markdown(values: dict[str, Any]) -> str:
    whole = {**values["splits"], "all": values["all"]}
    lines = [f"# {values['folder']}", "", f"{values['features']} features at {values['fps']:g} fps.", ""]
    lines += _table("split", whole)
    if values["sources"]:
        lines += ["", "## Sources", "", *_table("source", {**values["sources"], "all": values["all"]})]
    lines += [
        "",
        "## Spread",
        "",
        "| | min | 5% | median | mean | 95% | max |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    spreads = {
        "clip, s": values["lengths"]["seconds"],
        "item, frames": values["lengths"]["item_frames"],
        "captions an item": values["lengths"]["captions_per_item"],
        "words a caption": values["captions"]["words_per_caption"],
    }
    for name, spread in spreads.items():
        ranks = " | ".join(f"{spread[key]:.4g}" for key in ("min", "p5", "median", "mean", "p95", "max"))
        lines.append(f"| {name} | {ranks} |")
    said = values["captions"]
    lines += [
        "",
        "## Captions",
        "",
        f"{said['captions']:,d} captions, {said['different']:,d} of them different; {said['words']:,d} "
        f"words, {said['vocabulary']:,d} different, {said['words_used_once']:,d} of them used once.",
        "",
    ]
    for key in ("most_frequent_verbs", "most_frequent_words", "most_frequent_first_words", "most_repeated"):
        if said[key]:
            counted = ", ".join(f"{word} ({count:,d})" for word, count in said[key].items())
            lines.append(f"- {key.replace('_', ' ')}: {counted}")
    lines += [
        "",
        "## Duplicates",
        "",
        "| motions | groups | surplus clips | groups across splits | largest |",
        "|---|--:|--:|--:|---|",
    ]
    for name, found in values["duplicates"].items():
        largest = "; ".join(", ".join(group) for group in found["largest"][:2])
        lines.append(
            f"| {name.replace('_', ' ')} | {found['groups']:,d} | {found['surplus_clips']:,d} | "
            f"{found['groups_across_splits']:,d} | {largest} |"
        )
    static = values["static"]
    lines += [
        "",
        "## Static clips",
        "",
        f"{static['still_steps']:.1%} of all steps are still (no joint faster than "
        f"{static['still_speed']:g} m/s); {static['clips']:,d} clips ({static['share_of_clips']:.1%}) are "
        f"static: {static['static_share']:.0%} of their steps"
        + (f": {', '.join(static['names'])}." if static["names"] else "."),
        "",
        "## Outliers",
        "",
    ]
    for name, found in values["outliers"].items():
        listed = ", ".join(f"{one['name']} ({one['value']:.3g})" for one in found)
        lines.append(f"- {name.replace('_', ' ')}, {values['units'][name]}: {listed}")
    return "\n".join(lines)


_ROWS = {
    "clips": "clips",
    "items": "items",
    "captions": "captions",
    "frames": "frames",
    "hours": "hours",
    "words_per_caption": "words a caption",
    "speed": "root speed, m/s",
    "root_height": "root height, m",
    "contact": "foot contact",
    "foot_skate": "foot skate",
    "jerk": "jerk, m/s³",
    "still": "still steps",
    "static_clips": "static clips",
}


def _table(first: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = [f"| {first} | {' | '.join(_ROWS.values())} |", f"|---|{'--:|' * len(_ROWS)}"]
    for name, row in rows.items():
        cells = [_cell(row[key]) for key in _ROWS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(value: float | int | None) -> str:
    if value is None:
        return "–"
    return f"{value:,d}" if isinstance(value, int) else f"{value:.3g}"
