"""A mixture of prepared datasets, MotionUnion (paper section 3.4 and Tab. 7), as one dataset.

Copies of one motion are found across all sources and stay in one split, or go. A first pass reads every clip
once for its fingerprints, the second writes: of the features one clip is in memory at a time.
"""

from __future__ import annotations

import csv
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scamo.config import load_config, to_dict
from scamo.data.dataset import SPLITS, Caption, DatasetWriter, MotionDataset
from scamo.data.duplicates import LENGTHS, NEAR_MM, DuplicateIndex, Match, still_share
from scamo.data.inspect import STATIC_SHARE, STILL_SPEED, captions_of_items, clip_items
from scamo.data.split import VARIANT, Groups, Straddle, decide_splits, family, place, recording_of, spread
from scamo.errors import ScaMoError
from scamo.motion.files import replacing
from scamo.motion.representation import Representation

KINDS = ("identical", "near", "part", "mirrored", "overlap")
DROPPABLE = ("identical", "near", "part", "mirrored")
NAME_COLUMNS = ("new_name", "name", "clip")
RECORDING_COLUMNS = ("source_path", "recording")


@dataclass(frozen=True)
class SourceConfig:
    """A prepared dataset that goes into a union: [[sources]].

    name: what its clips are said to come from; a prefix for names that an earlier source has too.
    dataset: its folder, as another `scamo prepare` wrote it.
    license: kept with every clip; "" takes what the dataset says of itself.
    split: "official" keeps the split that the dataset has; "assign" shares its source clips out.
    take: the splits of it that are used. Clips of the others are only kept out of the wrong splits.
    weight: share of its training source clips that is taken, above 0 and up to 1; limit: how many of its
        training clips at most, 0 for all. Clips of val and test are always taken.
    exclude: a regular expression; clips whose name it matches somewhere are left out.
    variant_of: the name of an earlier source whose clip names this one shares: its clips are variants.
    variants: a regular expression of what the names of a clip's variants and pieces end in.
    recordings: a CSV file that says which recording a clip was cut from: new_name and source_path (as in
        HumanML3D's index.csv), or name and recording. "" for none.
    """

    name: str
    dataset: str
    license: str = ""
    split: str = "assign"
    take: tuple[str, ...] = SPLITS
    weight: float = 1.0
    limit: int = 0
    exclude: str = ""
    variant_of: str = ""
    variants: str = VARIANT
    recordings: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.+-]+", self.name):
            raise ScaMoError(f"name = {self.name!r}: expected letters, digits and _ . + -")
        if not self.dataset:
            raise ScaMoError("dataset is empty")
        if self.split not in ("official", "assign"):
            raise ScaMoError(f"split = {self.split!r}: expected official or assign")
        if not self.take or set(self.take) - set(SPLITS) or len(set(self.take)) < len(self.take):
            raise ScaMoError(f"take = {list(self.take)}: expected some of {', '.join(SPLITS)}")
        if not 0 < self.weight <= 1:
            raise ScaMoError(f"weight = {self.weight}: expected a share above 0 and up to 1")
        if self.limit < 0:
            raise ScaMoError(f"limit = {self.limit}: expected 0 or more")
        for key in ("exclude", "variants"):
            try:
                re.compile(getattr(self, key))
            except re.error as error:
                raise ScaMoError(
                    f"{key} = {getattr(self, key)!r}: not a regular expression: {error}"
                ) from None


@dataclass(frozen=True)
class UnionConfig:
    """What `scamo prepare union` reads.

    sources: in the order in which they win: of copies the first one stays, and its official split decides.
    out: the dataset folder; OUT.md gets the table of the sources.
    split: parts of train, val and test of the source clips that are shared out (the paper's 80 : 15 : 5 is
        train : test : val).
    min_frames: shorter clips and parts are refused; max_frames: clips of this many frames or more, 0: none.
    still_mm_s, static_share: a clip is static, and refused, if in this share of its frames no joint is as
        fast as still_mm_s. static_share = 0 keeps all; an official val or test split loses none.
    near_mm, overlap_s: see `scamo.data.duplicates`.
    drop: kinds of copies that are left out if they are in the split of what they copy. The captions of
        an "identical" or "near" one go to the clip that stays.
    """

    sources: tuple[SourceConfig, ...]
    out: str = "runs/motionunion/dataset"
    seed: int = 0
    split: tuple[float, ...] = (0.8, 0.05, 0.15)
    min_frames: int = 40
    max_frames: int = 0
    still_mm_s: float = 1000 * STILL_SPEED
    static_share: float = STATIC_SHARE
    near_mm: float = NEAR_MM
    overlap_s: float = 1.5
    drop: tuple[str, ...] = ("identical",)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ScaMoError("sources is empty")
        for at, source in enumerate(self.sources):
            earlier = [one.name for one in self.sources[:at]]
            if source.name in earlier:
                raise ScaMoError(f"sources[{at}].name = {source.name!r} is used twice")
            if source.variant_of and source.variant_of not in earlier:
                raise ScaMoError(
                    f"sources[{at}].variant_of = {source.variant_of!r}: expected an earlier source's name"
                )
        good = len(self.split) == 3 and all(0 <= part <= 1 for part in self.split)
        if not good or abs(sum(self.split) - 1) > 1e-6 or self.split[0] == 0:
            raise ScaMoError(
                f"split = {list(self.split)}: expected parts of train, val and test that sum to 1"
            )
        if self.min_frames < 1 or (self.max_frames and self.max_frames <= self.min_frames):
            raise ScaMoError(
                f"min_frames = {self.min_frames}, max_frames = {self.max_frames}: expected 0 < min < max"
            )
        for key in ("still_mm_s", "near_mm", "overlap_s"):
            if not 0 < getattr(self, key) < math.inf:
                raise ScaMoError(f"{key} = {getattr(self, key)}: expected a positive number")
        if not 0 <= self.static_share <= 1:
            raise ScaMoError(f"static_share = {self.static_share}: expected a share in [0, 1]")
        unknown = [kind for kind in self.drop if kind not in DROPPABLE]
        if unknown:
            raise ScaMoError(f"drop: {unknown[0]!r} is none of {', '.join(DROPPABLE)}")


@dataclass
class _Clip:
    """A clip of a source, and what becomes of it."""

    source: int
    index: int
    name: str  # in its source
    key: str
    frames: int
    split: str | None  # its source's own, then that of the union
    still: float = 0.0
    refusal: tuple[str, str] | None = None
    copies: list[Match] = field(default_factory=list)
    merged: list[int] = field(default_factory=list)  # dropped ones whose captions it takes


def prepare_union(
    config: UnionConfig | str | Path,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    progress: bool = True,
) -> MotionDataset:
    """Build a union of prepared datasets; the same sources and config give the same bytes.

    What is left out is in the manifest with its reason; what a clip comes from, its licence and its copies
    are in its meta; the table of the sources is in provenance["sources"] and, as Markdown, in OUT.md.

    Args:
        config: or the TOML file that holds it.
        out: the dataset folder, instead of the config's.
        overrides: "key=value" settings that go before those of the file.
        overwrite: replace an existing dataset.
        progress: show progress bars and print the report.

    Raises:
        ScaMoError: the config is wrong, a source is missing, broken or of another width or frame rate than
            the first, a CSV of recordings cannot be read, or nothing is kept. File and key are named.
    """
    where = "config"
    if not isinstance(config, UnionConfig):
        where = str(config)
        config = load_config(UnionConfig, config, overrides)
    elif overrides:
        raise ValueError("overrides: only go with a configuration file")
    folder = Path(out if out is not None else config.out)
    datasets = _open(config, where)
    tables = [
        _recordings(source.recordings, f"{where}: sources[{at}].recordings")
        for at, source in enumerate(config.sources)
    ]
    writer = DatasetWriter(
        folder,
        feature_dim=datasets[0].feature_dim,
        fps=datasets[0].fps,
        provenance={
            "source": "union",
            "config": _described(config, folder),
            **({"variant": datasets[0].variant} if datasets[0].variant != "original" else {}),
        },
        overwrite=overwrite,
        min_frames=config.min_frames,
        max_frames=config.max_frames or None,
    )
    with writer:
        clips = _clips(config, datasets)
        _find_copies(config, datasets, clips, progress)
        families = _families(config, datasets, clips)
        groups = _groups(config, datasets, clips, families, tables)
        _refuse(config, clips)
        straddles = _split(config, clips, groups, writer)
        _sample(config, clips, groups)
        _drop(config, clips)
        apart = {straddle.group for straddle in straddles}
        source_clips = [
            families[at] if group in apart else clips[group].key for at, group in enumerate(groups)
        ]
        captions = _write(config, datasets, clips, source_clips, writer, progress)
        writer.provenance |= _report(config, datasets, clips, groups, straddles, captions)
    dataset = MotionDataset.open(folder)
    with replacing(f"{folder}.md") as partial:
        partial.write_text(union_table(dataset) + "\n", encoding="utf-8")
    if progress:
        print(dataset.summary())
        print(union_table(dataset))
    return dataset


def union_table(dataset: MotionDataset) -> str:
    """The sources of a union as a Markdown table, like the paper's Tab. 7, and what happened to their clips.

    Raises ScaMoError if the dataset is none.
    """
    provenance = dataset.manifest["provenance"]
    if provenance.get("source") != "union":
        raise ScaMoError(f"{dataset.folder}: is not a union")
    sources = provenance["sources"]
    lines = [
        "| source | licence | split | clips | source clips | hours | captions | mean s | "
        + " | ".join(SPLITS)
        + " |",
        "|---" * 11 + "|",
    ]
    clips = sum(source["clips"] for source in sources)
    frames = sum(source["frames"] for source in sources)
    total = {
        "name": "all",
        "license": "",
        "split": "",
        "clips": clips,
        "source_clips": provenance["source_clips"],
        "hours": frames / dataset.fps / 3600,
        "captions": sum(source["captions"] for source in sources),
        "mean_seconds": frames / dataset.fps / clips,
        "splits": {split: sum(source["splits"][split] for source in sources) for split in SPLITS},
    }
    for row in [*sources, total]:
        places = " | ".join(f"{row['splits'][split]:,d}" for split in SPLITS)
        lines.append(
            f"| {row['name']} | {row['license']} | {row['split']} | {row['clips']:,d} "
            f"| {row['source_clips']:,d} | {row['hours']:,.2f} | {row['captions']:,d} "
            f"| {row['mean_seconds']:.2f} | {places} |"
        )
    for title, key in (("kept copies", "copies"), ("left out", "refused")):
        lines += ["", f"| source | {title} | clips |", "|---|---|---|"]
        lines += [
            f"| {source['name']} | {what} | {count:,d} |"
            for source in sources
            for what, count in source[key].items()
        ]
    lines += [""] if provenance["straddling"] else []
    for straddle in provenance["straddling"]:
        places = ", ".join(f"{len(names)} in {split}" for split, names in straddle["splits"].items())
        lines.append(f"- {straddle['source']}'s own split parts {straddle['recording']}: {places}.")
    return "\n".join(lines)


def _license(source: SourceConfig, data: MotionDataset) -> str:
    return source.license.strip() or str(data.manifest["provenance"].get("license", "")).strip()


def _described(config: UnionConfig, folder: Path) -> dict[str, Any]:
    """The config without the paths of this machine."""
    values = to_dict(config) | {"out": folder.name}
    for source in values["sources"]:
        source |= {key: Path(source[key]).name for key in ("dataset", "recordings")}
    return values


def _open(config: UnionConfig, where: str) -> list[MotionDataset]:
    datasets: list[MotionDataset] = []
    folders: dict[Path, int] = {}
    for at, source in enumerate(config.sources):
        key = f"{where}: sources[{at}].dataset"
        try:
            data = MotionDataset.open(source.dataset)
        except ScaMoError as error:
            raise ScaMoError(f"{key}: {error}") from None
        if Representation.find(data.feature_dim) is None:
            raise ScaMoError(f"{key}: {data.folder} has {data.feature_dim} features, which none is known of")
        if not _license(source, data):
            raise ScaMoError(
                f"{where}: sources[{at}].license: {data.folder} states none, so it must be given here"
            )
        again = folders.setdefault(data.folder.resolve(), at)
        if again != at:
            raise ScaMoError(f"{key} = {source.dataset!r}: is sources[{again}].dataset too")
        first = datasets[0] if datasets else data
        for what, its, expected in (
            ("features", data.feature_dim, first.feature_dim),
            ("fps", data.fps, first.fps),
        ):
            if its != expected:
                raise ScaMoError(
                    f"{key}: {data.folder} has {its:g} {what}, {first.folder} has {expected:g}: "
                    "prepare them alike"
                )
        if data.variant != first.variant:
            raise ScaMoError(
                f"{key}: {data.folder} has {data.variant} features, {first.folder} {first.variant} ones: "
                "prepare them alike"
            )
        datasets.append(data)
    return datasets


def _clips(config: UnionConfig, datasets: list[MotionDataset]) -> list[_Clip]:
    return [
        _Clip(at, index, name, f"{source.name}/{name}", frames, data.clip_splits[index])
        for at, (source, data) in enumerate(zip(config.sources, datasets, strict=True))
        for index, (name, frames) in enumerate(
            zip(data.clip_names, np.diff(data.clip_offsets).tolist(), strict=True)
        )
    ]


def _find_copies(
    config: UnionConfig, datasets: list[MotionDataset], clips: list[_Clip], progress: bool
) -> None:
    from tqdm import tqdm

    fps = datasets[0].fps
    representation = Representation.of(datasets[0].feature_dim)

    def features(at: int) -> Any:
        return datasets[clips[at].source].clip_features(clips[at].index)

    index = DuplicateIndex(representation, fps, features, near_mm=config.near_mm, overlap_s=config.overlap_s)
    for at in tqdm(range(len(clips)), desc="read", unit="clip", disable=not progress):
        values = features(at)
        if not np.isfinite(values).all():
            raise ScaMoError(f"{datasets[clips[at].source].folder}: clip {clips[at].name} is not finite")
        clips[at].still = still_share(values, representation, fps, config.still_mm_s)
        index.add(values)
    for match in index.matches(
        tqdm(range(len(clips)), desc="find copies", unit="clip", disable=not progress)
    ):
        clips[match.clip].copies.append(match)
    for clip in clips:
        clip.copies.sort(key=lambda match: (KINDS.index(match.kind), match.distance_mm, match.of))


def _families(config: UnionConfig, datasets: list[MotionDataset], clips: list[_Clip]) -> list[str]:
    """What every clip is a variant of by its name and meta, with its source."""
    spaces: dict[str, str] = {}
    for source in config.sources:
        spaces[source.name] = spaces.get(source.variant_of, source.name)
    known: dict[str, set[str]] = defaultdict(set)
    for clip in clips:
        known[spaces[config.sources[clip.source].name]].add(clip.name)
    endings = [re.compile(source.variants, re.IGNORECASE) for source in config.sources]
    families = []
    for clip in clips:
        space = spaces[config.sources[clip.source].name]
        meta = datasets[clip.source].clip_meta(clip.index)
        families.append(f"{space}/{family(clip.name, meta, known[space], endings[clip.source])}")
    return families


def _groups(
    config: UnionConfig,
    datasets: list[MotionDataset],
    clips: list[_Clip],
    families: list[str],
    tables: list[dict[str, str]],
) -> list[int]:
    """Of every clip the first one of its source clip: one family, one recording, or the same motion."""
    groups = Groups(len(clips))
    first: dict[tuple[str, str], int] = {}
    for at, clip in enumerate(clips):
        said = recording_of(datasets[clip.source].clip_meta(clip.index))
        table = tables[clip.source]
        listed = table.get(clip.name) or table.get(families[at].partition("/")[2])
        for kind, value in (
            ("family", families[at]),
            ("recording", f"{config.sources[clip.source].name}/{said}" if said else None),
            ("listed", listed),
        ):
            if value is not None:
                groups.join(first.setdefault((kind, value), at), at)
        for match in clip.copies:
            groups.join(match.of, at)
    return groups.roots()


def _recordings(path: str, key: str) -> dict[str, str]:
    """Name of a clip -> its recording, of a CSV file; nothing of none."""
    if not path:
        return {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ScaMoError(f"{key}: {path} cannot be read: {reason}") from None
    header = list(rows[0]) if rows else []
    name = next((column for column in NAME_COLUMNS if column in header), None)
    recording = next((column for column in RECORDING_COLUMNS if column in header), None)
    if name is None or recording is None:
        raise ScaMoError(
            f"{key}: {path} has the columns {header}, expected one of {', '.join(NAME_COLUMNS)} "
            f"and one of {', '.join(RECORDING_COLUMNS)}"
        )
    return {row[name].removesuffix(".npy"): row[recording] for row in rows if row[name] and row[recording]}


def _split(
    config: UnionConfig, clips: list[_Clip], groups: list[int], writer: DatasetWriter
) -> list[Straddle]:
    """Give every clip its split, and refuse those that have none."""
    official = [clip.split if config.sources[clip.source].split == "official" else None for clip in clips]
    keys = [clip.key for clip in clips]
    sources = [clip.source for clip in clips]
    usable = [clip.refusal is None for clip in clips]
    splits, straddles = decide_splits(groups, sources, official, usable, keys, config.split, config.seed)
    for clip, group, split, own in zip(clips, groups, splits, official, strict=True):
        clip.split = split
        if clip.refusal is not None:
            continue
        if split is None:
            clip.refusal = "its recording is in several official splits", f"with {keys[group]}"
        elif own is not None and own != split:
            writer.note(clip.key, "moved to the split of its recording", split=split, detail=f"from {own}")
    for straddle in straddles:
        writer.note(
            keys[straddle.group],
            "its source's own split parts it",
            detail=spread([clip.name for clip in clips], straddle.splits),
        )
    return straddles


def _refuse(config: UnionConfig, clips: list[_Clip]) -> None:
    """What can be told of a clip alone."""
    for clip in clips:
        source = config.sources[clip.source]
        if clip.split not in source.take:
            clip.refusal = "its split is not taken", str(clip.split)
        elif source.exclude and re.search(source.exclude, clip.name):
            clip.refusal = "excluded", source.exclude
        elif clip.frames < config.min_frames:
            clip.refusal = "too short", f"{clip.frames} frames, expected at least {config.min_frames}"
        elif config.max_frames and clip.frames >= config.max_frames:
            clip.refusal = "too long", f"{clip.frames} frames, expected fewer than {config.max_frames}"
        elif source.split == "official" and clip.split != "train":
            continue  # what others are measured on stays whole
        elif config.static_share and clip.still >= config.static_share:
            clip.refusal = "static", f"{clip.still:.0%} of the frames below {config.still_mm_s:g} mm/s"


def _sample(config: UnionConfig, clips: list[_Clip], groups: list[int]) -> None:
    """Keep the share and the number of training clips that each source is to give."""
    for at, source in enumerate(config.sources):
        members: dict[int, list[_Clip]] = defaultdict(list)
        for clip, group in zip(clips, groups, strict=True):
            if clip.source == at and clip.split == "train" and clip.refusal is None:
                members[group].append(clip)
        order = sorted(members, key=lambda group: (place(config.seed, f"take/{clips[group].key}"), group))
        wanted, taken = math.ceil(source.weight * len(order)), 0
        for rank, group in enumerate(order):
            fits = not source.limit or taken + len(members[group]) <= source.limit
            if rank < wanted and fits:
                taken += len(members[group])
                continue
            reason = "left out by limit" if rank < wanted else "left out by weight"
            value = source.limit if rank < wanted else source.weight
            for clip in members[group]:
                clip.refusal = reason, f"{value:g}"


def _drop(config: UnionConfig, clips: list[_Clip]) -> None:
    """Refuse copies of clips that stay in the same split. An official split loses none to itself."""
    for at, clip in enumerate(clips):
        official = config.sources[clip.source].split == "official"
        for match in clip.copies if clip.refusal is None else ():
            other = clips[match.of]
            if (
                match.kind in config.drop
                and match.covers >= 1 - LENGTHS
                and other.refusal is None
                and other.split == clip.split
                and not (official and other.source == clip.source)
            ):
                clip.refusal = f"copy: {match.kind}", f"of {other.key}, {match.distance_mm:g} mm apart"
                if match.kind in ("identical", "near"):
                    other.merged.append(at)
                break


def _write(
    config: UnionConfig,
    datasets: list[MotionDataset],
    clips: list[_Clip],
    source_clips: list[str],
    writer: DatasetWriter,
    progress: bool,
) -> dict[int, int]:
    """Captions of every clip that was written."""
    from tqdm import tqdm

    names = _names(config, clips)
    items = [list(clip_items(data)) for data in datasets]

    def captions(at: int, whole: bool = False) -> list[Caption]:
        clip = clips[at]
        own = captions_of_items(datasets[clip.source], items[clip.source][clip.index], clip.frames)
        return [c for item in own for c in item if not (whole and c.end_s)]

    written: dict[int, int] = {}
    for at, clip in enumerate(tqdm(clips, desc="write", unit="clip", disable=not progress)):
        if clip.refusal is not None:
            reason, detail = clip.refusal
            writer.refuse(clip.key, reason, split=clip.split or "", detail=detail)
            continue
        data, source = datasets[clip.source], config.sources[clip.source]
        described = captions(at)
        known = {caption.text for caption in described}
        for other in clip.merged:
            new = [caption for caption in captions(other, whole=True) if caption.text not in known]
            known |= {caption.text for caption in new}
            described += new
        meta = data.clip_meta(clip.index) | {
            "source": source.name,
            "original_name": clip.name,
            "license": _license(source, data),
            "source_clip": source_clips[at],
        }
        if clip.copies:
            best = clip.copies[0]
            meta["copy"] = {
                "kind": best.kind,
                "of": clips[best.of].key,
                "shift": best.shift,
                "frames": best.frames,
                "mm": best.distance_mm,
            }
        if clip.merged:
            meta["captions_of"] = [clips[other].key for other in clip.merged]
        split = clip.split or ""
        if names[at] != clip.name:
            writer.note(names[at], "renamed: an earlier source has the name", split=split, detail=clip.key)
        if writer.add_clip(names[at], data.clip_features(clip.index), split, described, meta):
            written[at] = len(described)
        else:
            clip.refusal = "refused by the writer", ""
    return written


def _names(config: UnionConfig, clips: list[_Clip]) -> dict[int, str]:
    """Unique names of the clips that stay: the first source keeps its own, others get theirs as a prefix."""
    own = {clip.name for clip in clips if clip.refusal is None}
    names: dict[int, str] = {}
    used: set[str] = set()
    for at, clip in enumerate(clips):
        if clip.refusal is None:
            name = clip.name
            while name in used or (name != clip.name and name in own):
                name = f"{config.sources[clip.source].name}_{name}"
            used.add(name)
            names[at] = name
    return names


def _report(
    config: UnionConfig,
    datasets: list[MotionDataset],
    clips: list[_Clip],
    groups: list[int],
    straddles: list[Straddle],
    captions: dict[int, int],
) -> dict[str, Any]:
    """What the manifest says about the sources."""
    refused = Counter((clip.source, clip.refusal[0]) for clip in clips if clip.refusal is not None)
    sources = []
    for at, (source, data) in enumerate(zip(config.sources, datasets, strict=True)):
        used = [i for i in captions if clips[i].source == at]
        frames = sum(clips[i].frames for i in used)
        kinds: Counter[str] = Counter(clips[i].copies[0].kind for i in used if clips[i].copies)
        sources.append(
            {
                "name": source.name,
                "license": _license(source, data),
                "split": source.split,
                "manifest_sha256": data.manifest_sha256,
                "provenance": data.manifest["provenance"],
                "clips": len(used),
                "source_clips": len({groups[i] for i in used}),
                "frames": frames,
                "hours": frames / data.fps / 3600,
                "captions": sum(captions[i] for i in used),
                "mean_seconds": frames / data.fps / len(used) if used else 0.0,
                "splits": {split: sum(clips[i].split == split for i in used) for split in SPLITS},
                "copies": {kind: kinds[kind] for kind in KINDS if kinds[kind]},
                "refused": {reason: count for (its, reason), count in sorted(refused.items()) if its == at},
            }
        )
    sizes = Counter(groups[i] for i in captions)
    licenses = [f"{row['name']}: {row['license']}" for row in sources if row["clips"]]
    return {
        "license": "; ".join(licenses),
        "sources": sources,
        "source_clips": len(sizes),
        "largest_source_clip": max(sizes.values(), default=0),
        "straddling": [
            {
                "source": config.sources[straddle.source].name,
                "recording": clips[straddle.group].key,
                "splits": {split: [clips[i].name for i in its] for split, its in straddle.splits.items()},
            }
            for straddle in straddles
        ],
    }
