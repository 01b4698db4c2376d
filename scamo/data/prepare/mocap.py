"""Folders of motion capture, .bvh or .asf and .amc, as a dataset.

Captions are those of NAME.txt beside NAME.bvh (a caption a line, or HumanML3D's lines with time tags), of a
table (CSV or JSON lines), or a template for sets that only have labels.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scamo.data.dataset import SPLITS, Caption, DatasetWriter, MotionDataset
from scamo.data.prepare.layout import Refusal, caption_file, read_offsets
from scamo.errors import ScaMoError
from scamo.motion.asf import DEFAULT_FPS, Skeleton, find_asf, read_amc, read_asf
from scamo.motion.bvh import read_bvh
from scamo.motion.features import joints_to_features
from scamo.motion.hierarchy import Animation
from scamo.motion.joint_maps import JointMap, check_up, unit_of
from scamo.motion.retarget import Retargeted, retarget
from scamo.motion.skeleton import mirror_joints, swap_sides

SUFFIXES = (".bvh", ".amc")
COLUMNS = ("name", "caption", "label", "start", "end", "split", "fps")
# Nobody moves so fast, metres a second: the capture lost the body.
FASTEST = 20.0


@dataclass
class _Entry:
    """What a table says about a motion."""

    captions: list[Caption] = field(default_factory=list)
    label: str | None = None
    split: str | None = None
    fps: float | None = None
    line: int = 0
    used: bool = False


def prepare_mocap(
    source: str | Path,
    out: str | Path,
    *,
    joint_map: JointMap | str | Path | None = None,
    captions: str | Path | None = None,
    template: str | None = None,
    fps: float = 20.0,
    source_fps: float | None = None,
    units: str | float | None = None,
    up: str | None = None,
    mirror: bool = False,
    split: Sequence[float] = (0.8, 0.05, 0.15),
    split_by: Literal["clip", "subject"] = "clip",
    target_offsets: str | Path | None = None,
    rest_pose: str | Path | None = None,
    min_frames: int = 40,
    max_frames: int = 200,
    long: Literal["cut", "refuse"] = "cut",
    strict: bool = False,
    license: str = "",
    overwrite: bool = False,
    progress: bool = True,
) -> MotionDataset:
    """Read every .bvh and .amc of a folder and those below, and write them as a dataset of 263 features.

    A clip of max_frames or more is cut, as joints, before the features are made: a caption with time tags
    describes what its tags cut out, one without describes each of equal pieces that are short enough. Every
    piece is a clip of its own, NAME@FROM-TO, in the split of its file.

    Args:
        source: the folder.
        out: the dataset folder.
        joint_map: a TOML file or the name of a known map; None finds one for every file by its joints' names.
        captions: a CSV with a header or JSON lines: name, caption or label[, start, end (seconds), split,
            fps]; a name is that of the file with or without folder and suffix, and may come many times.
            None: NAME.txt beside every file.
        template: makes a caption of a label, "a person {label}"; the label is the table's or the file's name
            with spaces and without numbers at its end. {0}, {1}, ... are the name's parts between
            underscores.
        fps: frames a second of the dataset.
        source_fps: of the files, instead of what a .bvh says and the 120 of an .amc; a table's fps goes
            first.
        units, up: as for `retarget`.
        mirror: add a mirrored copy, "M" + name, of every clip.
        split: parts of train, val and test. Which file goes where is a function of its name alone, and the
            table's split goes first.
        split_by: "subject" keeps all files together whose names agree up to the last underscore.
        target_offsets: (22, 3) .npy of the uniform skeleton, whose bone lengths all clips take.
        rest_pose: (22, 3) .npy of a T-pose, metres, onto which all clips are retargeted by their rotations.
        min_frames: shorter clips and parts are refused.
        max_frames: clips of this many frames or more are cut or refused.
        long: "cut" or "refuse".
        strict: stop at the first refusal.
        license: of the motions and captions, in words; it stands in the manifest and on model cards.
        overwrite: replace an existing dataset.
        progress: show a progress bar and print the report.

    Raises:
        ScaMoError: an argument is wrong, the folder holds no motion, the table or another file of the
            arguments cannot be read, or nothing was kept; with `strict` also for what is refused otherwise.
    """
    from tqdm import tqdm

    source = Path(source)
    files = _files(source)
    parts = _checked_split(split)
    if split_by not in ("clip", "subject"):
        raise ScaMoError(f"split_by = {split_by!r}, expected clip or subject")
    if long not in ("cut", "refuse"):
        raise ScaMoError(f"long = {long!r}, expected cut or refuse")
    if not 0 < min_frames < max_frames:
        raise ScaMoError(f"min_frames = {min_frames}, max_frames = {max_frames}: expected 0 < min < max")
    for name, value in (("fps", fps), ("source_fps", source_fps)):
        if value is not None and not 0 < value < math.inf:
            raise ScaMoError(f"{name} = {value}: expected a positive number")
    settings: dict[str, Any] = {
        "fps": fps,
        "units": None if units is None else unit_of(units),
        "up": None if up is None else check_up(up),
        "target_offsets": None if rest_pose is None else read_offsets(Path(rest_pose)),
    }
    if joint_map is not None and not isinstance(joint_map, JointMap):
        joint_map = JointMap.load(joint_map)
    offsets = None if target_offsets is None else read_offsets(Path(target_offsets))
    names = _names(source, files)
    table = None if captions is None else _Table(Path(captions), source, files)
    splits = _splits([_subject(n) if split_by == "subject" else n for n in names], parts)
    provenance = {
        "source": "mocap",
        **({"license": license} if license else {}),
        "folder": source.resolve().name,
        "joint_map": joint_map.name if joint_map else "by joint names",
        "captions": Path(captions).name if captions is not None else "beside the files",
        "template": template,
        "skeleton": "kept" if offsets is None and rest_pose is None else "given",
        "source_fps": source_fps,
        "units": settings["units"],
        "up": settings["up"],
        "mirror": mirror,
        "split": list(parts),
        "split_by": split_by,
        "min_frames": min_frames,
        "max_frames": max_frames,
        "long": long,
    }
    skeletons: dict[Path, Skeleton] = {}
    with DatasetWriter(
        out, fps=fps, provenance=provenance, overwrite=overwrite, min_frames=min_frames, max_frames=max_frames
    ) as writer:
        for number, line, reason in table.faults if table else []:
            writer.refuse(f"line {number}", reason, kind="caption", detail=line)
            _stop_if(strict, writer, 0)
        bar = tqdm(
            zip(files, names, strict=True), desc="prepare mocap", total=len(files), disable=not progress
        )
        for path, name in bar:
            before = len(writer.refused)
            entry = table.of(path) if table else _Entry()
            where = splits[_subject(name) if split_by == "subject" else name]
            try:
                if entry.split is not None:
                    if entry.split not in SPLITS:
                        raise Refusal("unknown split", f"{entry.split!r}, expected {', '.join(SPLITS)}")
                    where = entry.split
                described = _captions(path, entry, table is not None, template, name, where, writer)
                animation = _read(path, entry.fps or source_fps, skeletons)
                body = _body(animation, joint_map, settings)
                for note in body.notes:
                    writer.note(name, note, split=where)
                meta = {
                    "file": _as_text(path.relative_to(source).as_posix()),
                    "joint_map": body.joint_map,
                    "source_fps": animation.fps,
                    "metres_a_unit": body.metres_a_unit,
                    "up": body.up,
                }
                frames = len(body.joints) - 1
                pieces, cut = [(0, frames, described)], long == "cut" and frames >= max_frames
                if cut:
                    pieces, wrong = _pieces(frames, described, fps, max_frames)
                    for detail in wrong:
                        writer.refuse(name, "bad time tags", split=where, kind="caption", detail=detail)
                    if not pieces:
                        raise Refusal("no usable caption", f"{len(described)} captions in all")
                for piece in pieces:
                    _add(writer, name, where, body, piece, cut, offsets, mirror, meta)
            except Refusal as refusal:
                writer.refuse(name, refusal.reason, split=where, detail=refusal.detail)
            _stop_if(strict, writer, before)
        for entry_name, entry in table.unused() if table else []:
            writer.refuse(
                entry_name, "captions without a motion", kind="caption", detail=f"line {entry.line}"
            )
            _stop_if(strict, writer, len(writer.refused) - 1)
    dataset = MotionDataset.open(out)
    if progress:
        print(dataset.summary())
    return dataset


def _stop_if(strict: bool, writer: DatasetWriter, before: int) -> None:
    if strict and len(writer.refused) > before:
        first = writer.refused[before]
        raise ScaMoError(f"{first['name']}: {first['reason']}: {first['detail']}")


def _files(source: Path) -> list[Path]:
    if not source.is_dir():
        raise ScaMoError(f"{source}: no such folder")
    files = [p for p in sorted(source.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()]
    if not files:
        raise ScaMoError(f"{source}: holds no file with one of the suffixes {', '.join(SUFFIXES)}")
    return files


def _names(source: Path, files: list[Path]) -> list[str]:
    """The files' stems; with their folders where stems are not unique."""
    counts = Counter(path.stem for path in files)
    return [
        _as_text(
            path.stem if counts[path.stem] == 1 else "_".join(path.relative_to(source).with_suffix("").parts)
        )
        for path in files
    ]


def _as_text(name: str) -> str:
    """A file's name as UTF-8 can hold it."""
    return name.encode("utf-8", "replace").decode()


def _subject(name: str) -> str:
    return name.rpartition("_")[0] or name


def _checked_split(split: Sequence[float]) -> tuple[float, ...]:
    good = len(split) == len(SPLITS) and all(part >= 0 for part in split) and abs(sum(split) - 1) < 1e-6
    if not good or split[0] <= 0:
        raise ScaMoError(f"split = {tuple(split)}: expected parts of train, val and test that sum to 1")
    return tuple(float(part) for part in split)


def _splits(keys: list[str], parts: tuple[float, ...]) -> dict[str, str]:
    """The split of every key, from its name alone; but something is always in train."""
    places = {
        key: int(hashlib.sha256(key.encode()).hexdigest()[:12], 16) / 16**12 for key in sorted(set(keys))
    }
    ends = np.cumsum(parts)[:-1]
    found = {key: SPLITS[int(np.searchsorted(ends, place, side="right"))] for key, place in places.items()}
    if "train" not in found.values():
        found[min(places, key=lambda key: places[key])] = "train"
    return found


def _read(path: Path, fps: float | None, skeletons: dict[Path, Skeleton]) -> Animation:
    try:
        if path.suffix.lower() == ".bvh":
            animation = read_bvh(path)
            return animation if fps is None else replace(animation, fps=fps)
        asf = find_asf(path)
        if asf not in skeletons:
            skeletons[asf] = read_asf(asf)
        return read_amc(path, skeletons[asf], fps=fps or DEFAULT_FPS)
    except ScaMoError as error:
        raise Refusal("motion file unreadable", str(error)) from None


def _body(animation: Animation, joint_map: JointMap | None, settings: dict[str, Any]) -> Retargeted:
    try:
        body = retarget(animation, joint_map, **settings)
    except ScaMoError as error:
        raise Refusal("cannot be retargeted", str(error)) from None
    if len(body.joints) < 2:
        raise Refusal("too short", f"{len(body.joints)} frames at {body.fps:g} fps, expected at least 2")
    speeds = np.linalg.norm(np.diff(body.joints[:, 0], axis=0), axis=-1) * body.fps
    if not speeds.max() < FASTEST:
        frame = int(speeds.argmax()) + 1
        raise Refusal("the root jumps", f"{speeds.max():.0f} m/s at frame {frame} of {body.fps:g} fps")
    return body


def _pieces(
    frames: int, captions: list[Caption], fps: float, max_frames: int
) -> tuple[list[tuple[int, int, list[Caption]]], list[str]]:
    """Ranges of a clip that is too long with the captions of each, without their time tags; and what is wrong
    with the tags of the others."""
    by_range: dict[tuple[int, int], list[Caption]] = {}
    wrong = []
    for index, caption in enumerate(captions):
        start, end = 0.0, float(frames)
        if caption.start_s != 0 or caption.end_s != 0:
            start, end = caption.start_s * fps, min(caption.end_s * fps, float(frames))
        # A comparison with NaN is false.
        if not 0 <= start < frames or not int(start) < end or not int(start) < int(end):
            tags = f"{caption.start_s:g} to {caption.end_s:g} s of {frames / fps:g} s"
            wrong.append(f"caption {index}: {tags}")
            continue
        plain = replace(caption, start_s=0.0, end_s=0.0)
        by_range.setdefault((int(start), int(end)), []).append(plain)
    pieces = []
    for (first, last), described in by_range.items():
        count = math.ceil((last - first) / (max_frames - 1))
        edges = np.linspace(first, last, count + 1).round().astype(int).tolist()
        pieces += [(a, b, described) for a, b in pairwise(edges)]
    return pieces, wrong


def _add(
    writer: DatasetWriter,
    name: str,
    split: str,
    body: Retargeted,
    piece: tuple[int, int, list[Caption]],
    cut: bool,
    offsets: NDArray[np.float64] | None,
    mirror: bool,
    meta: dict[str, Any],
) -> None:
    start, end, captions = piece
    if cut:
        name, meta = f"{name}@{start}-{end}", meta | {"frames": [start, end]}
    joints = body.joints[start : end + 1]
    for mirrored in (False, True) if mirror else (False,):
        if mirrored:
            name, joints = f"M{name}", mirror_joints(joints)
            captions = [
                replace(c, text=swap_sides(c.text), meta={k: swap_sides(v) for k, v in c.meta.items()})
                for c in captions
            ]
        try:
            features = joints_to_features(joints, target_offsets=offsets, fps=body.fps)
        except ScaMoError as error:
            writer.refuse(name, "features cannot be computed", split=split, detail=str(error))
            continue
        writer.add_clip(name, features, split, captions, meta | ({"mirrored": True} if mirrored else {}))


def _captions(
    path: Path,
    entry: _Entry,
    has_table: bool,
    template: str | None,
    name: str,
    split: str,
    writer: DatasetWriter,
) -> list[Caption]:
    if entry.captions:
        return entry.captions
    if not has_table:
        beside = path.with_suffix(".txt")
        if beside.is_file():
            return caption_file(beside, beside.name, name, split, writer)
        if template is None:
            raise Refusal("caption file missing", beside.name)
    if template is None:
        raise Refusal("no caption", "the table has none for it")
    if has_table and entry.label is None and not entry.used:
        raise Refusal("no label", "the table does not name it")
    stem = _as_text(path.stem)
    label = entry.label if entry.label is not None else label_of(stem)
    try:
        return [Caption(template.format(*stem.split("_"), label=label, name=stem), meta={"label": label})]
    except (IndexError, KeyError, ValueError, AttributeError) as error:
        raise Refusal("the template does not fit", f"{template!r} on {stem!r}: {error}") from None


def label_of(stem: str) -> str:
    """A file's name as words: "jump_high-02" is "jump high"."""
    words = re.sub(r"[_\-.\s]+", " ", stem).strip()
    return re.sub(r"[\s\d]+$", "", words) or words


class _Table:
    """A CSV or JSON-lines file of captions. faults: (line, detail, reason) of rows that are left out."""

    def __init__(self, path: Path, source: Path, files: list[Path]) -> None:
        self.faults: list[tuple[int, str, str]] = []
        self._entries: dict[str, _Entry] = {}
        self._source = source
        stems = Counter(file.stem for file in files)
        self._unique = {stem for stem, count in stems.items() if count == 1}
        try:
            for number, row in self._rows(path):
                self._add(number, row)
        except FileNotFoundError:
            raise ScaMoError(f"{path}: no such file") from None
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ScaMoError(f"{path}: not a readable table: {error}") from None
        if not self._entries:
            raise ScaMoError(f"{path}: names no motion")

    def _rows(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if path.suffix.lower() == ".csv":
                reader = csv.DictReader(stream)
                columns = set(reader.fieldnames or ())
                if "name" not in columns or not columns & {"caption", "label"}:
                    raise ScaMoError(f"{path}: expected a header with name and caption or label")
                for row in reader:
                    yield reader.line_num, row
            elif path.suffix.lower() == ".jsonl":
                for number, line in enumerate(stream, 1):
                    if not line.strip():
                        continue
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError):
                        row = None
                    if isinstance(row, dict):
                        yield number, row
                    else:
                        self.faults.append((number, line.strip()[:80], "not a JSON object"))
            else:
                raise ScaMoError(f"{path}: unknown suffix, expected .csv or .jsonl")

    def _add(self, number: int, row: dict[str, Any]) -> None:
        def fault(reason: str, detail: object) -> None:
            self.faults.append((number, str(detail)[:80], reason))

        text = {key: str(row[key]).strip() for key in COLUMNS if row.get(key) is not None}
        if any(_as_text(value) != value for value in text.values()):
            return fault("not valid text", ascii(text))
        name = text.get("name", "")
        if not name:
            return fault("row without a name", text)
        times = {}
        for key in ("start", "end", "fps"):
            try:
                times[key] = float(text[key]) if text.get(key) else None
            except ValueError:
                return fault(f"{key} is not a number", text[key])
        if (times["start"] is None) != (times["end"] is None):
            return fault("start without end, or end without start", text)
        if times["fps"] is not None and not 0 < times["fps"] < math.inf:
            return fault("fps is not positive", text["fps"])
        entry = self._entries.setdefault(name, _Entry(line=number))
        for key, value in (("split", text.get("split")), ("fps", times["fps"]), ("label", text.get("label"))):
            if not value:
                continue
            if getattr(entry, key) not in (None, value):
                return fault(f"another {key} than the rows before say", f"{name}: {value}")
            setattr(entry, key, value)
        if "caption" in text:
            entry.captions.append(Caption(text["caption"], times["start"] or 0.0, times["end"] or 0.0))
        return None

    def of(self, file: Path) -> _Entry:
        """What the table says about a file; nothing, if nothing."""
        where = file.relative_to(self._source)
        keys = [where.as_posix(), where.with_suffix("").as_posix()]
        keys += [file.name, file.stem] if file.stem in self._unique else []
        for key in keys:
            if key in self._entries:
                self._entries[key].used = True
                return self._entries[key]
        return _Entry()

    def unused(self) -> list[tuple[str, _Entry]]:
        """Names that are no file's."""
        return [(name, entry) for name, entry in self._entries.items() if not entry.used]
