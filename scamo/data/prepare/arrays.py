"""Arrays of joints as a dataset: .npy and .npz, in a folder or one file.

NAME.npy                (T, 22, 3) joints, a clip
NAME.npz                joints (T, 22, 3)[, fps]: a clip
                        joints (F, 22, 3), offsets (N + 1,)[, names (N,), fps]: clip i is rows offsets[i] to
                        offsets[i + 1]
                        else every array (T, 22, 3) is a clip[, fps]

The joints are those of `scamo.motion.skeleton`, in its order. Captions are those of NAME.txt beside a clip's
file (for a clip of many in FILE.npz in the folder FILE beside it), of a table, or a template, as for
`prepare_mocap`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scamo.data.dataset import Clips, DatasetWriter, MotionDataset
from scamo.data.prepare.layout import (
    CaptionTable,
    Entry,
    Refusal,
    Rotations,
    add_body,
    animation_of,
    as_text,
    body_of,
    checked_limits,
    checked_split,
    common_up,
    described_by,
    feature_kind,
    load_array,
    names_of,
    read_offsets,
    splits_by_source,
)
from scamo.data.prepare.work import write_dataset
from scamo.errors import ScaMoError
from scamo.motion.hierarchy import LARGEST
from scamo.motion.joint_maps import JointMap, check_up, unit_of
from scamo.motion.representation import SMPL_272
from scamo.motion.retarget import Retargeted
from scamo.motion.skeleton import N_JOINTS
from scamo.motion.smpl import read_arrays

SUFFIXES = (".npy", ".npz")
KEYS = ("joints", "positions", "pos")
PROBED_CLIPS = 16
LONGEST_NAME = 200  # bytes; what a file may be called, with room for a suffix


@dataclass(frozen=True)
class _Found:
    """A clip in a file of the source folder.

    motion: where it is, as captions have it. array: its key in a .npz. index: of many clips in one array.
    fault: (reason, detail) why it cannot be read.
    """

    file: str
    motion: PurePosixPath
    array: str = ""
    index: int | None = None
    fault: tuple[str, str] | None = None

    @property
    def label(self) -> str:
        at = "" if self.index is None else f" clip {self.index}"
        return as_text(f"{self.file}{f'[{self.array}]' if self.array else ''}{at}")


@dataclass(frozen=True)
class _Clip:
    """What is made of a clip depends on this."""

    found: _Found
    name: str
    split: str
    entry: Entry


def prepare_arrays(
    source: str | Path,
    out: str | Path,
    *,
    captions: str | Path | None = None,
    template: str | None = None,
    key: str | None = None,
    feature_dim: int = 263,
    fps: float | None = None,
    source_fps: float | None = None,
    units: str | float | None = None,
    up: str | None = None,
    mirror: bool = False,
    split: Sequence[float] = (0.8, 0.05, 0.15),
    target_offsets: str | Path | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    long: Literal["cut", "refuse"] = "cut",
    strict: bool = False,
    license: str = "",
    overwrite: bool = False,
    workers: int = 1,
    progress: bool = True,
) -> MotionDataset:
    """Read every .npy and .npz of a folder and those below, or one such file, as a dataset.

    An array with `offsets` is held in memory whole, by every worker; of all others one clip is.

    Args:
        source: the folder or file.
        out: the dataset folder.
        captions: a CSV with a header or JSON lines, as for `prepare_mocap`; a name is that of the file
            or of the array in it. None: NAME.txt beside every clip.
        template: makes a caption of a label or name, as for `prepare_mocap`.
        key: the array with the joints in every .npz. None: one called joints, positions or pos, if any.
        feature_dim: 263, or 272 with rotations that are fitted to the joints; every clip's meta says so.
        fps: frames a second of the dataset. None: 20 of 263, 30 of 272 features.
        source_fps: of the arrays, instead of what a .npz says under fps; a table's goes first. Clips of
            which none says it are refused.
        units: m, cm, mm, ... or metres a unit. None: by the length of every clip's legs.
        up: x, y, z, -x, -y or -z. None: the axis along which most of some clips' bodies stand.
        mirror: add a mirrored copy, "M" + name, of every clip.
        split: parts of train, val and test. What comes from one recording by its name stays together, and
            where it goes is a function of that name alone; a table's split goes first.
        target_offsets: (22, 3) .npy of the uniform skeleton, whose bone lengths all clips take.
        min_frames: shorter clips and parts are refused. None: 2 s.
        max_frames: clips of this many frames or more are cut or refused. None: 10 s.
        long: "cut" as `prepare_mocap` does it, or "refuse".
        strict: stop at the first refusal.
        license: of the motions and captions, in words; it stands in the manifest and on model cards.
        overwrite: replace an existing dataset, or an unfinished one of other settings.
        workers: processes, as for `write_pieces`.
        progress: show a progress bar and print the report.

    Raises:
        ScaMoError: an argument is wrong, there is no array, the table or target_offsets cannot be read, or
            nothing was kept; with `strict` also for what is refused otherwise.
    """
    source = Path(source)
    folder, files = _files(source)
    parts = checked_split(split)
    if long not in ("cut", "refuse"):
        raise ScaMoError(f"long = {long!r}, expected cut or refuse")
    for option, value in (("fps", fps), ("source_fps", source_fps)):
        if value is not None and not 0 < value < math.inf:
            raise ScaMoError(f"{option} = {value}: expected a positive number")
    kind = feature_kind(feature_dim, target_offsets)
    rate = kind.fps if fps is None else fps
    min_frames, max_frames = checked_limits(kind, rate, min_frames, max_frames)
    settings: dict[str, Any] = {
        "fps": rate,
        "units": None if units is None else unit_of(units),
        "up": None if up is None else check_up(up),
    }
    offsets = None if target_offsets is None else read_offsets(Path(target_offsets))
    found = [clip for file in files for clip in _clips_of(folder, file, key)]
    motions = [clip.motion for clip in found]
    names = names_of(motions)
    table = None if captions is None else CaptionTable(Path(captions), motions)
    pieces = [
        _Clip(clip, name, where, table.of(clip.motion) if table else Entry())
        for clip, name, where in zip(found, names, splits_by_source(names, parts), strict=True)
    ]
    maker = _Maker(
        folder,
        table is None,
        template,
        source_fps,
        settings,
        offsets,
        mirror,
        long == "cut",
        max_frames,
        "fitted" if kind is SMPL_272 else None,
    )
    if up is None:
        settings["up"] = common_up(maker.probed(found))
    provenance = {
        "source": "arrays",
        **({"license": license} if license else {}),
        "folder": source.resolve().name,
        "captions": Path(captions).name if captions is not None else "beside the files",
        "template": template,
        "features": kind.name,
        "skeleton": "kept" if offsets is None else "given",
        "source_fps": source_fps,
        "units": settings["units"],
        "up": settings["up"],
        "mirror": mirror,
        "split": list(parts),
        "min_frames": min_frames,
        "max_frames": max_frames,
        "long": long,
    }
    writer = DatasetWriter(
        out,
        feature_dim=feature_dim,
        fps=rate,
        provenance=provenance,
        overwrite=overwrite,
        min_frames=min_frames,
        max_frames=max_frames,
        strict=strict,
        resume={
            "source": str(source.resolve()),
            "target_offsets": None if offsets is None else offsets.tolist(),
        },
    )
    return write_dataset(
        writer,
        pieces,
        maker.make,
        maker.files,
        workers=workers,
        progress=progress,
        first=None if table is None else table.refuse_rest,
    )


@dataclass
class _Maker:
    """What a clip's features depend on beside the clip. The last array of many clips stays."""

    folder: Path
    captions_beside: bool
    template: str | None
    source_fps: float | None
    settings: dict[str, Any]
    offsets: NDArray[np.float64] | None
    mirror: bool
    cut: bool
    max_frames: int
    rotations: Rotations | None
    last: tuple[str, str, dict[str, NDArray]] | None = None

    def files(self, clip: _Clip) -> Iterator[Path]:
        yield self.folder / clip.found.file
        if self.captions_beside:
            yield self.folder / clip.found.motion.with_suffix(".txt")

    def probed(self, found: Sequence[_Found]) -> Iterator[NDArray]:
        """Joints of some clips from all over the source."""
        for clip in found[:: max(1, len(found) // PROBED_CLIPS)]:
            if clip.fault is None:
                with contextlib.suppress(Refusal):
                    yield self._joints(clip)[0]

    def make(self, clip: _Clip, out: Clips) -> None:
        found, name, split = clip.found, clip.name, clip.split
        try:
            if found.fault is not None:
                raise Refusal(*found.fault)
            split = clip.entry.checked_split(split)
            beside = self.folder / found.motion.with_suffix(".txt") if self.captions_beside else None
            described = described_by(clip.entry, beside, self.template, found.motion.stem, name, split, out)
            joints, fps = self._read(found, clip.entry.fps or self.source_fps)
            body = joints_body(joints, fps, self.settings)
            meta = {"file": found.label, "source_fps": fps}
            add_body(
                out,
                name,
                split,
                body,
                described,
                meta,
                self.max_frames,
                self.cut,
                self.offsets,
                self.mirror,
                self.rotations,
            )
        except Refusal as refusal:
            detail = refusal.detail if found.file in refusal.detail else f"{found.label}: {refusal.detail}"
            out.refuse(name, refusal.reason, split=split, detail=as_text(detail))

    def _read(self, found: _Found, fps: float | None) -> tuple[NDArray, float]:
        """A clip's joints and frame rate; fps: what goes before the file's own."""
        joints, arrays = self._joints(found)
        if fps is not None:
            return joints, fps
        said = arrays.get("fps")
        if said is None:
            raise Refusal("no frame rate", "the file does not say it: give source_fps")
        if said.size != 1 or said.dtype.kind not in "fiu" or not 0 < said.item() < math.inf:
            raise Refusal("wrong fps", f"fps is {said.dtype} {list(said.shape)}, expected a positive number")
        return joints, float(said.item())

    def _joints(self, found: _Found) -> tuple[NDArray, dict[str, NDArray]]:
        """A clip's joints, and all arrays of its file that matter."""
        arrays = self._arrays(found)
        joints = arrays[found.array]
        if found.index is not None:
            first, last = arrays["offsets"][found.index : found.index + 2].tolist()
            if joints.ndim == 0 or last > len(joints):
                rows = len(joints) if joints.ndim else 0
                raise Refusal("wrong offsets", f"rows {first} to {last} of {rows}")
            joints = joints[first:last]
        check_joints(joints)
        return joints, arrays

    def _arrays(self, found: _Found) -> dict[str, NDArray]:
        if self.last is not None and self.last[:2] == (found.file, found.array):
            return self.last[2]
        path = self.folder / found.file
        if not found.array:
            array = load_array(path)
            if not isinstance(array, np.ndarray):
                raise Refusal("motion file unreadable", f"{found.file}: a .npz that is called .npy")
            return {"": array}
        try:
            arrays = read_arrays(path, (found.array, "offsets", "fps"))
        except FileNotFoundError:
            raise Refusal("motion file missing", found.file) from None
        except ScaMoError as error:
            raise Refusal("motion file unreadable", str(error).replace(str(path), found.file)) from None
        if found.array not in arrays:
            raise Refusal("no joints", f"{found.file}: holds no {found.array} any more")
        if found.index is not None:
            self.last = found.file, found.array, arrays
        return arrays


def check_joints(joints: NDArray) -> None:
    """Refusal unless joints are (T, 22, 3) finite numbers, T >= 2."""
    if joints.ndim != 3 or joints.shape[1:] != (N_JOINTS, 3) or joints.dtype.kind not in "fiu":
        found = f"{joints.dtype} {list(joints.shape)}"
        raise Refusal("wrong shape", f"{found}, expected numbers [frames, {N_JOINTS}, 3]")
    if len(joints) < 2:
        raise Refusal("too short", f"{len(joints)} frames, expected at least 2")
    bad = ~(np.abs(joints) < LARGEST)  # a comparison with NaN is false
    if bad.any():
        frame, joint = np.argwhere(bad)[0][:2]
        raise Refusal("NaN or infinite joints", f"frame {frame}, joint {joint}")


def joints_body(joints: NDArray, fps: float, settings: dict[str, Any]) -> Retargeted:
    """`body_of` joints (T, 22, 3) in any unit and axes. A frame that is all zeros counts as lost."""
    places = np.asarray(joints, dtype=np.float64)
    empty = ~places.any((1, 2), keepdims=True)
    if (~places[:, :1].any(-1, keepdims=True) & ~empty).any():
        # A root at the origin is none that the recording lost, which `retarget` would take it for.
        places = np.where(empty, 0.0, places + 1 + 2 * np.abs(places[:, 0]).max())
    return body_of(animation_of(places, fps), JointMap.load("smpl"), settings)


def _files(source: Path) -> tuple[Path, list[Path]]:
    """A folder and the files in it that may hold clips."""
    if source.is_dir():
        files = [p for p in sorted(source.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()]
        if not files:
            raise ScaMoError(f"{source}: holds no file with one of the suffixes {', '.join(SUFFIXES)}")
        return source, files
    if not source.is_file():
        raise ScaMoError(f"{source}: no such file or folder")
    if source.suffix.lower() not in SUFFIXES:
        raise ScaMoError(f"{source}: unknown suffix, expected {' or '.join(SUFFIXES)}")
    return source.parent, [source]


def _clips_of(folder: Path, path: Path, key: str | None) -> Iterator[_Found]:
    """The clips of a file; one with a fault where it is no file of clips."""
    within = PurePosixPath(path.relative_to(folder).as_posix())
    file = str(within)
    if path.suffix.lower() == ".npy":
        yield _Found(file, within)
        return
    try:
        with np.load(path, allow_pickle=False) as stored:
            keys = list(stored.files)
            array = key or next((name for name in KEYS if name in keys), None)
            many = array in keys and "offsets" in keys
            offsets = stored["offsets"] if many else None
            names = stored["names"] if many and "names" in keys else None
    except Exception as error:  # damaged bytes make NumPy and zipfile raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        yield _Found(file, within, fault=("motion file unreadable", f"{file}: {reason}"))
        return
    has = ", ".join(keys[:8]) or "nothing"
    if offsets is not None and array is not None:
        yield from _of_one_array(file, within, array, offsets, names)
    elif array in keys and array is not None:
        yield _Found(file, within, array)
    elif key is not None or "offsets" in keys or not keys:
        expected = key or " or ".join(KEYS)
        yield _Found(file, within, fault=("no joints", f"{file}: holds {has}, expected {expected}"))
    else:
        for name in keys:
            if name != "fps":
                yield _named(file, within, name, name)


def _of_one_array(
    file: str, within: PurePosixPath, array: str, offsets: NDArray, names: NDArray | None
) -> Iterator[_Found]:
    good = offsets.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets) > 1
    if not good or offsets[0] < 0 or (np.diff(offsets.astype(np.int64)) < 0).any():
        found = f"{offsets.dtype} {list(offsets.shape)}"
        detail = f"{file}: offsets are {found}, expected ascending whole numbers [clips + 1]"
        yield _Found(file, within, fault=("wrong offsets", detail))
        return
    count = len(offsets) - 1
    if names is not None and (names.shape != (count,) or names.dtype.kind != "U"):
        detail = f"{file}: names are {names.dtype} {list(names.shape)}, expected text [{count}]"
        yield _Found(file, within, fault=("wrong names", detail))
        return
    for index in range(count):
        name = f"{within.stem}_{index:0{len(str(count - 1))}d}" if names is None else str(names[index])
        yield _named(file, within, name, array, index)


def _named(file: str, within: PurePosixPath, name: str, array: str, index: int | None = None) -> _Found:
    """A clip of several in a file. Its name must not lead out of the folder."""
    plain = as_text(name.translate({ord(char): "_" for char in "/\\\0"}))
    fault = None
    if len(plain.encode()) > LONGEST_NAME:
        plain, fault = plain[:20], ("name too long", f"{file}: {plain[:20]}..., {len(plain)} characters")
    return _Found(file, within.with_suffix("") / f"{plain}.npy", array, index, fault)
