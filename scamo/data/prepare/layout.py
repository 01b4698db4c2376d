"""What folders of motions and captions have in common: split lists, caption files, arrays, skeletons.

What is wrong with one clip is a Refusal, which the caller counts; what is wrong with the whole a ScaMoError.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scamo.data.dataset import SPLITS, Caption, Clips
from scamo.data.split import VARIANT, family
from scamo.errors import ScaMoError
from scamo.motion import features272
from scamo.motion.features import Variant, joints_to_features
from scamo.motion.hierarchy import Animation, Hierarchy
from scamo.motion.joint_maps import JointMap
from scamo.motion.representation import HUMANML3D, SMPL_272, Representation
from scamo.motion.retarget import Retargeted, retarget
from scamo.motion.skeleton import JOINT_NAMES, N_JOINTS, forward_kinematics, mirror_joints, swap_sides

# What names end in that come from one recording: variants of a clip, and Motion-X's clips of a video and the
# people of an EgoBody recording.
OF_A_SOURCE = re.compile(rf"{VARIANT}|[_-]clip[_-]?\d+|/body_idx_\d+/\d+", re.IGNORECASE)
# Nobody moves so fast, metres a second: the capture lost the body.
FASTEST = 20.0
Rotations = Literal["own", "fitted"]
COLUMNS = ("name", "caption", "label", "start", "end", "split", "fps")

# Rotations that put a bone farther off contradict its position: an export by them would visibly differ.
AGREE_M = 0.01
_PROBED_FRAMES = 32
_HEAD = JOINT_NAMES.index("head")
_ANKLES = [JOINT_NAMES.index("left_ankle"), JOINT_NAMES.index("right_ankle")]


class Refusal(Exception):
    """Why a clip is left out."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def read_text(path: Path) -> str:
    """A UTF-8 file; ScaMoError that names the byte which is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ScaMoError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}") from None


def load_array(path: Path) -> NDArray:
    """A .npy; Refusal where it is missing or unreadable."""
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise Refusal("motion file missing", path.name) from None
    except Exception as error:  # damaged bytes make NumPy raise nearly anything, tokenize.TokenError too
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        detail = f"{path.parent.name}/{path.name}: {reason}"
        raise Refusal("motion file unreadable", detail) from None


def read_offsets(path: Path) -> NDArray[np.float64]:
    """A skeleton (22, 3) in metres; ScaMoError for any other file."""
    try:
        offsets = np.load(path, allow_pickle=False)
    except Exception as error:  # as above
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ScaMoError(f"{path}: cannot be read: {reason}") from None
    array = isinstance(offsets, np.ndarray)  # a .npz is none
    if (
        not array
        or offsets.shape != (N_JOINTS, 3)
        or offsets.dtype.kind != "f"
        or not np.isfinite(offsets).all()
    ):
        found = f"{offsets.dtype} {list(offsets.shape)}" if array else "several arrays"
        raise ScaMoError(f"{path}: {found}, expected ({N_JOINTS}, 3) finite metres")
    return offsets.astype(np.float64)


def uniform_features(
    joints: NDArray,
    offsets: NDArray[np.float64] | None,
    fps: float = HUMANML3D.fps,
    variant: Variant = "original",
) -> NDArray[np.float32]:
    """The 263 features of joints, with the bones of `offsets` where given; Refusal if there are none."""
    try:
        return joints_to_features(joints, target_offsets=offsets, fps=fps, variant=variant)
    except ScaMoError as error:
        raise Refusal("features cannot be computed", str(error)) from None


def read_captions(source: Path, name: str, split: str, writer: Clips, folder: str = "texts") -> list[Caption]:
    """Those of FOLDER/NAME.txt, bad lines refused one by one; Refusal where none is left.

    A mirrored copy without a file of its own has its original's, with left and right exchanged.
    """
    plain = unmirrored(name)
    for file, swap in ((name, False), (plain, True)):
        path = source / folder / f"{file}.txt"
        if file and path.is_file():
            captions = caption_file(path, f"{folder}/{file}.txt", name, split, writer)
            return swapped(captions) if swap else captions
    raise Refusal("caption file missing", f"{folder}/{name}.txt")


def unmirrored(name: str) -> str:
    """The original of a mirrored copy by its name, "a/000001" of "a/M000001"; "" of what cannot be one."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last[1:]}" if last.startswith("M") and len(last) > 1 else ""


def mirrored_name(name: str) -> str:
    """That of a clip's mirrored copy: `unmirrored` the other way round."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}M{last}"


def swapped(captions: list[Caption]) -> list[Caption]:
    """Those of the mirrored motion."""
    return [
        replace(
            caption,
            text=swap_sides(caption.text),
            meta={key: swap_sides(value) for key, value in caption.meta.items()},
        )
        for caption in captions
    ]


def caption_file(path: Path, label: str, name: str, split: str, writer: Clips) -> list[Caption]:
    """A caption a line, as `parse_caption` has it; bad lines of clip `name` are refused one by one.

    label: what reports call the file. Refusal where it cannot be read or no line is left.
    """
    try:
        text = read_text(path)
    except (OSError, ScaMoError) as error:
        raise Refusal("caption file unreadable", str(error)) from None
    captions = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{label} line {number}"
        try:
            caption, nan = parse_caption(line)
        except ScaMoError as error:
            detail = f"{where}: {error}"
            writer.refuse(name, "malformed caption line", split=split, kind="caption", detail=detail)
            continue
        if nan:
            writer.note(name, "nan time tags read as 0", split=split, detail=where)
        captions.append(caption)
    if not captions:
        raise Refusal("caption file without captions", label)
    return captions


def check_texts(folder: Path) -> None:
    """ScaMoError where a folder has no texts/."""
    if not (folder / "texts").is_dir():
        raise ScaMoError(f"{folder / 'texts'}: no such folder; expected captions as texts/NAME.txt")


def split_lists(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(split, name, file and line) of train.txt, val.txt, test.txt; ScaMoError where train.txt is missing."""
    for split in SPLITS:
        path = folder / f"{split}.txt"
        if not path.is_file():
            if split == "train":
                raise ScaMoError(
                    f"{path}: no such file; expected the names of the training clips, one a line"
                )
            continue
        for number, line in enumerate(read_text(path).splitlines(), 1):
            if line.strip():
                yield split, line.strip(), f"{path.name} line {number}"


def parse_caption(line: str) -> tuple[Caption, bool]:
    """A line of a caption file, `caption#word/POS ...#from#to` in seconds, or a caption alone.

    Returns the caption, its tagged words in meta["tokens"], and whether a tag was nan (which counts as 0).
    Raises ScaMoError saying what is wrong with the line.
    """
    if "#" not in line:
        return Caption(line.strip()), False
    parts = line.strip().split("#")
    if len(parts) != 4:
        raise ScaMoError(f"{len(parts)} parts between #, expected 4")
    text, tokens, *tags = parts
    try:
        start, end = (float(tag) for tag in tags)
    except ValueError:
        raise ScaMoError(f"time tags {tags[0]!r} and {tags[1]!r} are not numbers") from None
    nan = math.isnan(start) or math.isnan(end)
    start, end = (0.0 if math.isnan(tag) else tag for tag in (start, end))
    return Caption(text.strip(), start, end, {"tokens": tokens.strip()}), nan


@dataclass
class Entry:
    """What a table says about a motion."""

    captions: list[Caption] = field(default_factory=list)
    label: str | None = None
    split: str | None = None
    fps: float | None = None
    line: int = 0
    used: bool = False

    def checked_split(self, default: str) -> str:
        """Its split, or the default; Refusal where that is none."""
        if self.split is not None and self.split not in SPLITS:
            raise Refusal("unknown split", f"{self.split!r}, expected {', '.join(SPLITS)}")
        return self.split or default


class CaptionTable:
    """A CSV or JSON-lines file of captions. faults: (line, detail, reason) of rows that are left out."""

    def __init__(self, path: Path, motions: Sequence[PurePath]) -> None:
        """motions: where they are in the source folder. Raises ScaMoError for a table that cannot be read."""
        self.faults: list[tuple[int, str, str]] = []
        self._entries: dict[str, Entry] = {}
        stems = Counter(motion.stem for motion in motions)
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
        if any(as_text(value) != value for value in text.values()):
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
        entry = self._entries.setdefault(name, Entry(line=number))
        for key, value in (("split", text.get("split")), ("fps", times["fps"]), ("label", text.get("label"))):
            if not value:
                continue
            if getattr(entry, key) not in (None, value):
                return fault(f"another {key} than the rows before say", f"{name}: {value}")
            setattr(entry, key, value)
        if "caption" in text:
            entry.captions.append(Caption(text["caption"], times["start"] or 0.0, times["end"] or 0.0))
        return None

    def of(self, motion: PurePath) -> Entry:
        """What the table says about a motion, by its path or its name; nothing, if nothing."""
        keys = [motion.as_posix(), motion.with_suffix("").as_posix()]
        keys += [motion.name, motion.stem] if motion.stem in self._unique else []
        for key in keys:
            if key in self._entries:
                self._entries[key].used = True
                return self._entries[key]
        return Entry()

    def refuse_rest(self, writer: Clips) -> None:
        """Put the faults, and the names that are no motion's once all were asked for, into the report."""
        for number, line, reason in self.faults:
            writer.refuse(f"line {number}", reason, kind="caption", detail=line)
        for name, entry in self._entries.items():
            if not entry.used:
                detail = f"line {entry.line}"
                writer.refuse(name, "captions without a motion", kind="caption", detail=detail)


def described_by(
    entry: Entry,
    beside: Path | None,
    template: str | None,
    stem: str,
    name: str,
    split: str,
    writer: Clips,
) -> list[Caption]:
    """The captions of a motion: its table's, those of the file `beside` it (without a table), the template's.

    stem: its file's name, which the template takes apart. Refusal where there are none.
    """
    if entry.captions:
        return entry.captions
    if beside is not None:
        if beside.is_file():
            return caption_file(beside, beside.name, name, split, writer)
        if template is None:
            raise Refusal("caption file missing", beside.name)
    if template is None:
        raise Refusal("no caption", "the table has none for it")
    if beside is None and entry.label is None and not entry.used:
        raise Refusal("no label", "the table does not name it")
    stem = as_text(stem)
    label = entry.label if entry.label is not None else label_of(stem)
    try:
        return [Caption(template.format(*stem.split("_"), label=label, name=stem), meta={"label": label})]
    except (IndexError, KeyError, ValueError, AttributeError) as error:
        raise Refusal("the template does not fit", f"{template!r} on {stem!r}: {error}") from None


def label_of(stem: str) -> str:
    """A file's name as words: "jump_high-02" is "jump high"."""
    words = re.sub(r"[_\-.\s]+", " ", stem).strip()
    return re.sub(r"[\s\d]+$", "", words) or words


def as_text(name: str) -> str:
    """A file's name as UTF-8 can hold it."""
    return name.encode("utf-8", "replace").decode()


def checked_split(split: Sequence[float]) -> tuple[float, ...]:
    """Parts of train, val and test; ScaMoError unless they are that."""
    good = len(split) == len(SPLITS) and all(part >= 0 for part in split) and abs(sum(split) - 1) < 1e-6
    if not good or split[0] <= 0:
        raise ScaMoError(f"split = {tuple(split)}: expected parts of train, val and test that sum to 1")
    return tuple(float(part) for part in split)


def feature_kind(feature_dim: int, target_offsets: str | Path | None) -> Representation:
    """263 or 272 features, of which only the first take a skeleton; else ScaMoError."""
    if feature_dim not in (HUMANML3D.feature_dim, SMPL_272.feature_dim):
        raise ScaMoError(f"feature_dim = {feature_dim}: expected 263 or 272")
    if feature_dim == SMPL_272.feature_dim and target_offsets is not None:
        raise ScaMoError("target_offsets: 272 features keep everybody's own bones")
    return Representation.of(feature_dim)


def checked_limits(
    kind: Representation, fps: float, min_frames: int | None, max_frames: int | None
) -> tuple[int, int]:
    """Frames of the shortest clip and of the shortest that is too long; None: as the features' protocol has
    them, at this rate. ScaMoError unless 0 < min < max."""
    given = (min_frames, max_frames)
    shortest, longest = (
        round(frames * fps / kind.fps) if limit is None else limit
        for frames, limit in zip(kind.item_frames, given, strict=True)
    )
    if not 0 < shortest < longest:
        raise ScaMoError(f"min_frames = {shortest}, max_frames = {longest}: expected 0 < min < max")
    return shortest, longest


def names_of(motions: Sequence[PurePath]) -> list[str]:
    """The stems of motions in a source folder; with their folders where stems are not unique."""
    counts = Counter(motion.stem for motion in motions)
    return [
        as_text(motion.stem if counts[motion.stem] == 1 else "_".join(motion.with_suffix("").parts))
        for motion in motions
    ]


def splits_by_name(keys: list[str], parts: tuple[float, ...]) -> dict[str, str]:
    """The split of every key, from its name alone; but something is always in train."""
    places = {
        key: int(hashlib.sha256(key.encode()).hexdigest()[:12], 16) / 16**12 for key in sorted(set(keys))
    }
    ends = np.cumsum(parts)[:-1]
    found = {key: SPLITS[int(np.searchsorted(ends, place, side="right"))] for key, place in places.items()}
    if "train" not in found.values():
        found[min(places, key=lambda key: places[key])] = "train"
    return found


def splits_by_source(names: Sequence[str], parts: tuple[float, ...]) -> list[str]:
    """The split of every name: that of the recording it comes from by its name, as `splits_by_name`.

    Mirrored copies, pieces and variants go with their original, and NAME_clip_7 with all clips of NAME.
    """
    known = set(names)
    keys = [family(name, {}, known, OF_A_SOURCE) for name in names]
    splits = splits_by_name(keys, parts)
    return [splits[key] for key in keys]


def clips_of(source: Path, motions: str, parts: tuple[float, ...]) -> list[tuple[str, str]]:
    """(split, name) of every clip: of the split lists, or of every .npy in a folder, shared out.

    The lists are those of the source folder or its split/. A name may have folders. ScaMoError for one that
    leads elsewhere, and where there is no clip.
    """
    places = (source, source / "split")
    listed = [f for f in places if any((f / f"{split}.txt").is_file() for split in SPLITS)]
    if not listed:
        folder = source / motions
        files = sorted(path.relative_to(folder).with_suffix("") for path in folder.rglob("*.npy"))
        named = [as_text(path.as_posix()) for path in files]
        if not named:
            raise ScaMoError(f"{folder}: holds no .npy")
        return list(zip(splits_by_source(named, parts), named, strict=True))
    names = [(split, name) for split, name, _ in split_lists(listed[0])]
    for split, name in names:
        if "\\" in name or any(part.startswith(".") or not part for part in name.split("/")):
            raise ScaMoError(f"{listed[0] / split}.txt: {name!r} is not a plain name")
    if not names:
        raise ScaMoError(f"{listed[0]}: the split lists name no clip")
    return names


def animation_of(joints: NDArray, fps: float, body: Representation = HUMANML3D) -> Animation:
    """Joints (T, J, 3) of a representation's body as an animation in which nothing turns."""
    parents = np.array(body.parents)
    places = np.asarray(joints, dtype=np.float64)
    moved = places.copy()
    moved[:, 1:] -= places[:, parents[1:]]
    still = np.zeros((*places.shape[:-1], 4))
    still[..., 0] = 1
    hierarchy = Hierarchy(body.joint_names, body.parents, np.zeros(places.shape[1:]))
    return Animation(hierarchy, still, moved, fps)


def resampled_joints(joints: NDArray, fps: float, to: float, body: Representation) -> NDArray[np.float64]:
    """Joints (T, J, 3) at another rate, straight between the frames; Refusal for less than two."""
    places, _ = animation_of(joints, fps, body).resampled(to).forward_kinematics()
    if len(places) < 2:
        raise Refusal("too short", f"{len(places)} frames at {to:g} fps, expected at least 2")
    return places


def common_up(clips: Iterable[NDArray]) -> str:
    """The axis along which most bodies stand: of joints (T, 22, 3), some of which may lie or tumble.

    It is asked of a whole source: that of one clip might be of one who lies. ScaMoError if there is none.
    """
    above = []
    for joints in clips:
        body = np.asarray(joints, dtype=np.float64)
        up = (body[:, _HEAD] - body[:, _ANKLES].mean(1)).mean(0)
        above.append(up / max(float(np.linalg.norm(up)), 1e-12))
    mean = np.mean(above, axis=0) if above else np.zeros(3)
    axis = int(np.abs(mean).argmax())
    if not abs(mean[axis]) > 0.5:
        raise ScaMoError("up: the bodies stand along no common axis; give the up axis")
    return ("" if mean[axis] > 0 else "-") + "xyz"[axis]


def body_of(animation: Animation, joint_map: JointMap | None, settings: dict[str, Any]) -> Retargeted:
    """`retarget` with these settings; Refusal where it cannot be, or what moves is no body."""
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


def cut_at_captions(
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


def add_body(
    out: Clips,
    name: str,
    split: str,
    body: Retargeted,
    captions: list[Caption],
    meta: dict[str, Any],
    max_frames: int,
    cut: bool,
    offsets: NDArray[np.float64] | None,
    mirror: bool,
    rotations: Rotations | None = None,
) -> None:
    """A body's clip, and its mirrored copy, into a dataset: where it has max_frames or more and `cut`, its
    pieces by `cut_at_captions`.

    rotations: of 272 features; None makes the 263. With the body's own the joints are where these put them,
    as SMPL's are: those of the source need not be rigid to one another (a spine of other joints than ours),
    and features that contradict themselves are of no use. meta["rotations"] of a clip says true or fitted.

    Refusal where no caption fits the clip.
    """
    for note in body.notes:
        out.note(name, note, split=split)
    meta = meta | {"metres_a_unit": body.metres_a_unit, "up": body.up}
    # 263 features of T frames are T - 1.
    frames = len(body.joints) - (1 if rotations is None else 0)
    pieces, cut = [(0, frames, captions)], cut and frames >= max_frames
    if cut:
        pieces, wrong = cut_at_captions(frames, captions, body.fps, max_frames)
        for detail in wrong:
            out.refuse(name, "bad time tags", split=split, kind="caption", detail=detail)
        if not pieces:
            raise Refusal("no usable caption", f"{len(captions)} captions in all")
    joints, own = body.joints, body.rotations if rotations == "own" else None
    if own is not None:
        joints = forward_kinematics(own, body.offsets, joints[:, 0].astype(np.float64))
    for start, end, described in pieces:
        label, facts = name, meta
        if cut:
            label, facts = f"{name}@{start}-{end}", meta | {"frames": [start, end]}
        if rotations is None:
            piece = joints[start : end + 1]
            _add_263(out, label, split, piece, body.fps, described, offsets, mirror, facts)
        else:
            turned = None if own is None else own[start:end]
            _add_272(out, label, split, joints[start:end], turned, body.fps, described, mirror, facts)


def _add_263(
    out: Clips,
    name: str,
    split: str,
    joints: NDArray,
    fps: float,
    captions: list[Caption],
    offsets: NDArray[np.float64] | None,
    mirror: bool,
    meta: dict[str, Any],
) -> None:
    for mirrored in (False, True) if mirror else (False,):
        if mirrored:
            name, joints = mirrored_name(name), mirror_joints(joints)
            captions, meta = swapped(captions), meta | {"mirrored": True}
        try:
            features = joints_to_features(joints, target_offsets=offsets, fps=fps)
        except ScaMoError as error:
            out.refuse(name, "features cannot be computed", split=split, detail=str(error))
            continue
        out.add_clip(name, features, split, captions, meta)


def _add_272(
    out: Clips,
    name: str,
    split: str,
    joints: NDArray,
    rotations: NDArray[np.float64] | None,
    fps: float,
    captions: list[Caption],
    mirror: bool,
    meta: dict[str, Any],
) -> None:
    """rotations: None fits them to the joints."""
    try:
        encoded = features272.encode(joints, rotations, fps=fps)
    except ScaMoError as error:
        out.refuse(name, "features cannot be computed", split=split, detail=str(error))
        return
    features, meta = encoded.features, meta | {"rotations": encoded.rotations}
    out.add_clip(name, features, split, captions, meta)
    if mirror:
        copy, meta = SMPL_272.mirrored(features), meta | {"mirrored": True}
        out.add_clip(mirrored_name(name), copy, split, swapped(captions), meta)


def contradictions(features: NDArray, representation: Representation) -> list[tuple[str, str]]:
    """A note (reason, detail) if bones are more than AGREE_M from where the rotations put them.

    It looks at some frames, spread over the clip; of what is not finite it says nothing.
    """
    with np.errstate(all="ignore"):
        off = representation.rotations_off(features[:: max(1, len(features) // _PROBED_FRAMES)])
    if not off > AGREE_M:
        return []
    return [("rotations contradict positions", f"a bone ends {off * 1000:.0f} mm from where they put it")]
