"""AMASS and HumanML3D's index.csv as a dataset, cut and mirrored as HumanML3D does it.

AMASS/CMU/60/60_01_poses.npz   poses (T, 156), trans (T, 3), betas, gender, mocap_framerate
AMASS/humanact12/NAME.npy      HumanAct12's joints (T, 22 or more, 3), 20 fps, as HumanML3D ships them
index.csv                      source_path,start_frame,end_frame,new_name
TEXTS/texts/NAME.txt, TEXTS/train.txt, val.txt, test.txt

Every clip is every int(fps / 20)-th frame of its source, the first seconds of some sets trimmed, and rows
start_frame to end_frame of that. At rates that 20 does not divide it is thus not quite 20 fps: the 263
features keep this, as HumanML3D's do, and the manifest notes it. The 272 features take the same piece of the
source at its true times, 30 times a second, with SMPL's own rotations.
"""

from __future__ import annotations

import csv
import hashlib
import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from scamo.data.dataset import Caption, Clips, DatasetWriter, MotionDataset
from scamo.data.prepare.layout import (
    Refusal,
    check_texts,
    load_array,
    read_captions,
    read_offsets,
    read_text,
    split_lists,
    uniform_features,
)
from scamo.data.prepare.work import write_dataset
from scamo.errors import ScaMoError
from scamo.motion import features272
from scamo.motion.features import offsets_from_joints
from scamo.motion.representation import HUMANML3D, SMPL_272, Representation
from scamo.motion.skeleton import N_JOINTS, mirror_joints
from scamo.motion.smpl import SmplBody, read_arrays

INDEX_FPS = 20
HIGHEST_FPS = 2000
INDEX_FIELDS = ("source_path", "start_frame", "end_frame", "new_name")
# Seconds at the beginning in which the people of these sets stand in T-pose.
TRIMMED = {
    "Eyes_Japan_Dataset": 3.0,
    "MPI_HDM05": 3.0,
    "TotalCapture": 1.0,
    "MPI_Limits": 1.0,
    "Transitions_mocap": 0.5,
}
# The names in index.csv, and those under which AMASS hands the sets out by now.
RENAMED = {
    "BioMotionLab_NTroje": "BMLrub",
    "DFaust_67": "DFaust",
    "MPI_HDM05": "HDM05",
    "MPI_Limits": "PosePrior",
    "MPI_mosh": "Mosh",
    "SSM_synced": "SSM",
    "TCD_handMocap": "TCDHands",
    "Transitions_mocap": "Transitions",
}
HUMANACT12 = "humanact12"
BETAS = 10
UNIFORM = "000021"  # the clip whose first frame is HumanML3D's skeleton
# AMASS has Z up. HumanML3D swaps Y and Z and negates X: together a rotation.
TO_Y_UP = np.array([[-1.0, 0, 0], [0, 0, 1], [0, 1, 0]])


@dataclass(frozen=True)
class _Row:
    line: int
    source: str  # below pose_data/, without suffix
    start: int
    end: int
    name: str

    @property
    def joints_only(self) -> bool:
        return HUMANACT12 in self.source


@dataclass(frozen=True)
class _Piece:
    """The rows of one source, and the split of every name that the split lists have of them."""

    name: str
    rows: tuple[_Row, ...]
    splits: dict[str, str]


@dataclass(frozen=True)
class _Source:
    """A file of AMASS."""

    poses: NDArray[np.float64]
    trans: NDArray[np.float64]
    betas: NDArray[np.float64]
    male: bool
    fps: float
    file: str

    @property
    def stride(self) -> int:
        return int(self.fps / INDEX_FPS)

    @property
    def slowness(self) -> float:
        """True seconds to a second of the index."""
        return round(INDEX_FPS * self.stride / self.fps, 6)


def prepare_amass(
    amass_folder: str | Path,
    index_csv: str | Path,
    texts_folder: str | Path,
    out: str | Path,
    *,
    model: str | Path,
    feature_dim: int = 263,
    target_offsets: str | Path | None = None,
    fit_joints: bool = False,
    mirror: bool = True,
    min_frames: int | None = None,
    max_frames: int | None = None,
    strict: bool = False,
    license: str = "",
    overwrite: bool = False,
    workers: int = 1,
    progress: bool = True,
) -> MotionDataset:
    """Make a dataset of AMASS's SMPL+H files. What is left out is counted and listed in the manifest.

    Args:
        amass_folder: the unpacked sets, under the names of index.csv or AMASS's own; HumanAct12's arrays in
            humanact12/ or humanact12/humanact12/.
        index_csv: HumanML3D's.
        texts_folder: HumanML3D's folder, with texts/ and the split lists.
        out: the dataset folder.
        model: the folder with male/model.npz and female/model.npz of SMPL+H, or one .npz for everybody.
        feature_dim: 263 at 20 fps, or 272 at 30 fps with true rotations.
        target_offsets: for 263 features, (22, 3) .npy of the uniform skeleton. None: that of clip 000021, as
            in HumanML3D, or where the index or AMASS lacks it, everybody's own bones.
        fit_joints: for 272 features, take HumanAct12 too, whose rotations are then fitted to its joints.
        mirror: add the mirrored copies that the split lists name.
        min_frames: shorter clips and parts are refused. None: 2 s, as in the evaluation protocol.
        max_frames: clips and parts of this many frames or more are refused. None: 10 s.
        strict: stop at the first thing that is refused.
        license: of the motions and captions, in words; it stands in the manifest and on model cards.
        overwrite: replace an existing dataset, or an unfinished one of other settings.
        workers: processes, as for `write_pieces`.
        progress: show a progress bar and print the report.

    Raises:
        ScaMoError: the model, the index, a split list or target_offsets cannot be read, or nothing was kept.
    """
    representation = Representation.of(feature_dim)
    if representation not in (HUMANML3D, SMPL_272):
        raise ScaMoError(f"feature_dim = {feature_dim}: expected 263 or 272")
    if representation is SMPL_272 and target_offsets is not None:
        raise ScaMoError("target_offsets: 272 features keep everybody's own bones")
    amass_folder, texts = Path(amass_folder), Path(texts_folder)
    if not amass_folder.is_dir():
        raise ScaMoError(f"{amass_folder}: no such folder")
    bodies = _load_bodies(Path(model))
    maker = _Maker(amass_folder, texts, bodies, representation, fit_joints, mirror)
    rows, bad_rows = _read_index(Path(index_csv))
    splits, twice = _read_splits(texts)

    skeleton = "kept"
    if target_offsets is not None:
        maker.offsets, skeleton = read_offsets(Path(target_offsets)), "given"
    elif representation is HUMANML3D and (offsets := maker.uniform(rows)) is not None:
        maker.offsets, skeleton = offsets, f"that of clip {UNIFORM}"
    shortest, longest = representation.item_frames
    limits = {
        "min_frames": shortest if min_frames is None else min_frames,
        "max_frames": longest if max_frames is None else max_frames,
    }
    provenance = {
        "source": "amass",
        **({"license": license} if license else {}),
        "folder": amass_folder.resolve().name,
        "skeleton": skeleton,
        "mirror": mirror,
        "fit_joints": fit_joints,
        **limits,
    }

    def left_out(writer: DatasetWriter) -> None:
        for name, detail in bad_rows:
            writer.refuse(name, "bad index row", detail=detail)
        for name, detail in twice:
            writer.refuse(name, "in the split lists twice", detail=detail)
        indexed = {row.name for row in rows}
        for name, split in splits.items():
            if not {name, name.removeprefix("M")} & indexed:
                writer.refuse(name, "not in the index", split=split)

    writer = DatasetWriter(
        out,
        feature_dim=representation.feature_dim,
        fps=representation.fps,
        provenance=provenance,
        overwrite=overwrite,
        min_frames=limits["min_frames"],
        max_frames=limits["max_frames"],
        strict=strict,
        resume={
            "model": hashlib.sha256(pickle.dumps(bodies)).hexdigest(),
            "target_offsets": None if maker.offsets is None else maker.offsets.tolist(),
        },
    )
    return write_dataset(
        writer,
        _by_source(rows, splits),
        maker.make,
        maker.files,
        unit="source",
        workers=workers,
        progress=progress,
        first=left_out,
    )


class _Maker:
    """Makes features of index rows. The last source and motion stay, for the next row and mirrored copy."""

    def __init__(
        self,
        folder: Path,
        texts: Path,
        bodies: dict[bool, SmplBody],
        representation: Representation,
        fit_joints: bool,
        mirror: bool,
    ) -> None:
        self._folder, self._texts, self._bodies = folder, texts, bodies
        self._feature_dim, self._fit_joints, self._mirror = representation.feature_dim, fit_joints, mirror
        self.offsets: NDArray[np.float64] | None = None
        self._last: tuple[str, _Source | Refusal] | None = None
        self._motion: tuple[_Row, NDArray, dict[str, Any]] | None = None

    @property
    def _representation(self) -> Representation:
        return Representation.of(self._feature_dim)  # it cannot be pickled itself

    def uniform(self, rows: list[_Row]) -> NDArray[np.float64] | None:
        """The bones of the first frame of clip UNIFORM, if it is there."""
        for row in rows:
            if row.name == UNIFORM:
                try:
                    joints, _ = self._joints(row)
                except Refusal:
                    return None
                return np.asarray(offsets_from_joints(joints[0]), dtype=np.float64)
        return None

    def files(self, piece: _Piece) -> Iterator[Path]:
        """Those of the motion and the captions, wherever they may be."""
        yield from (self._folder / place for place in _places(piece.rows[0]))
        for row in piece.rows:
            for name in (row.name, f"M{row.name}"):
                if name in piece.splits:
                    yield self._texts / "texts" / f"{name}.txt"
                    yield self._texts / "texts" / f"{row.name}.txt"

    def make(self, piece: _Piece, out: Clips) -> None:
        """All clips of a source."""
        for row in piece.rows:
            names = [name for name in (row.name, f"M{row.name}") if name in piece.splits]
            if not names:
                out.refuse(row.name, "in no split list", detail=f"index line {row.line}")
            for name in names:
                split = piece.splits[name]
                if name != row.name and not self._mirror:
                    out.refuse(name, "mirrored copies are turned off", split=split)
                else:
                    self._add(out, row, name, split)

    def _add(self, out: Clips, row: _Row, name: str, split: str) -> None:
        mirrored = name != row.name
        try:
            captions = read_captions(self._texts, name, split, out)
            source = None if row.joints_only else self._source(row)
            notes = [] if source is None else _oddities(row, source)
            if self._motion is None or self._motion[0] != row:
                made = self._joints(row) if self._representation is HUMANML3D else self._turned(row)
                self._motion = row, *made
            _, motion, meta = self._motion
            if self._representation is HUMANML3D:
                features = uniform_features(mirror_joints(motion) if mirrored else motion, self.offsets)
            else:
                features = self._representation.mirrored(motion) if mirrored else motion
                if source is not None:
                    captions = [_stretched(caption, source) for caption in captions]
        except Refusal as refusal:
            detail = f"index line {row.line}: {refusal.detail}"
            out.refuse(name, refusal.reason, split=split, detail=detail)
            return
        out.add_clip(name, features, split, captions, meta | {"mirrored": mirrored}, notes)

    def _joints(self, row: _Row) -> tuple[NDArray, dict[str, Any]]:
        """Joints as HumanML3D has them before the features, at 20 fps or about that."""
        if row.joints_only:
            return self._humanact12(row)
        source = self._source(row)
        frames = self._frames(row, source)
        posed = self._bodies[source.male].pose(source.poses[frames], source.betas, source.trans[frames])
        return posed.joints @ TO_Y_UP.T, _meta(source)

    def _turned(self, row: _Row) -> tuple[NDArray, dict[str, Any]]:
        """272 features at 30 fps."""
        rate = self._representation.fps
        if row.joints_only:
            if not self._fit_joints:
                raise Refusal("joints without rotations", f"{row.source}: HumanAct12 has no SMPL poses")
            joints, meta = self._humanact12(row)
            times = _times(len(joints) - 1, INDEX_FPS, rate)
            encoded = self._encode(_between(joints.astype(np.float64), times), None)
            return encoded.features, meta | {"rotations": encoded.rotations}
        source = self._source(row)
        frames = self._frames(row, source)
        times = frames[0] + _times(frames[-1] - frames[0], source.fps, rate)
        first, last = int(times[0]), int(np.ceil(times[-1])) + 1
        rotvecs = source.poses[first:last].reshape(-1, N_JOINTS, 3)
        turns = _slerp(rotvecs, times - first)
        trans = _between(source.trans[first:last], times - first)
        posed = self._bodies[source.male].pose(turns, source.betas, trans)
        rotations = posed.rotations
        rotations[:, 0] = TO_Y_UP @ rotations[:, 0]
        encoded = self._encode(posed.joints @ TO_Y_UP.T, rotations)
        return encoded.features, _meta(source) | {"rotations": encoded.rotations}

    def _encode(self, joints: NDArray, rotations: NDArray | None) -> features272.Encoded:
        try:
            return features272.encode(joints, rotations, fps=self._representation.fps)
        except ScaMoError as error:
            raise Refusal("features cannot be computed", str(error)) from None

    @staticmethod
    def _frames(row: _Row, source: _Source) -> NDArray[np.int64]:
        """Which frames of the source the row takes, at least two."""
        strided = _strided(row, source)
        frames = strided[row.start : row.end]
        if len(frames) < 2:
            what = f"rows {row.start} to {row.end} of {len(strided)} frames at {INDEX_FPS} fps"
            raise Refusal("too short", f"{source.file}: {what}, expected at least 2")
        used = slice(frames[0], frames[-1] + 1)
        bad = ~np.isfinite(np.hstack([source.poses[used], source.trans[used]])).all(axis=1)
        if bad.any():
            raise Refusal("NaN or infinite poses", f"{source.file}: frame {int(frames[0] + bad.argmax())}")
        return frames

    def _source(self, row: _Row) -> _Source:
        if self._last is None or self._last[0] != row.source:
            try:
                self._last = row.source, self._read(row)
            except Refusal as refusal:
                self._last = row.source, refusal
        source = self._last[1]
        if isinstance(source, Refusal):
            raise source
        return source

    def _read(self, row: _Row) -> _Source:
        path = self._find(row)
        file = _relative(path, self._folder)
        wanted = ("poses", "trans", "betas", "gender", "mocap_framerate")
        try:
            arrays = read_arrays(path, wanted)
        except ScaMoError as error:
            raise Refusal("AMASS file unreadable", str(error).replace(str(path), file)) from None
        missing = [name for name in wanted if name not in arrays]
        if missing:
            raise Refusal("fields missing", f"{file}: lacks {', '.join(missing)}")
        poses, trans, betas, gender, fps = (arrays[name] for name in wanted)
        shapes = f"poses {list(poses.shape)}, trans {list(trans.shape)}, betas {list(betas.shape)}"
        numbers = all(a.dtype.kind in "fiu" for a in (poses, trans, betas, fps))
        good = numbers and poses.ndim == 2 and poses.shape[1] >= 3 * N_JOINTS and poses.shape[1] % 3 == 0
        if not good or trans.shape != (len(poses), 3) or betas.ndim != 1 or fps.size != 1:
            raise Refusal("wrong shape", f"{file}: {shapes}, expected (T, 156), (T, 3), (16,) numbers")
        rate = float(fps.reshape(()))
        if not INDEX_FPS <= rate <= HIGHEST_FPS:
            detail = f"{file}: mocap_framerate is {rate:g}, expected {INDEX_FPS} to {HIGHEST_FPS}"
            raise Refusal("wrong fps", detail)
        betas = betas[:BETAS].astype(np.float64)
        if not np.isfinite(betas).all():
            raise Refusal("NaN or infinite betas", file)
        label = gender.reshape(-1)[0] if gender.size else ""
        label = label.decode("latin1") if isinstance(label, bytes) else str(label)
        body = poses[:, : 3 * N_JOINTS].astype(np.float64)
        return _Source(body, trans.astype(np.float64), betas, label == "male", rate, file)

    def _humanact12(self, row: _Row) -> tuple[NDArray, dict[str, Any]]:
        path = self._find(row)
        file, joints = _relative(path, self._folder), load_array(path)
        good = joints.ndim == 3 and joints.shape[1] >= N_JOINTS and joints.shape[2] == 3 and len(joints) > 1
        if not good or joints.dtype.kind != "f":
            found = f"{file}: {joints.dtype} {list(joints.shape)}"
            raise Refusal("wrong shape", f"{found}, expected float [2 frames or more, 22 or more, 3]")
        return joints[:, :N_JOINTS], {"from": file}

    def _find(self, row: _Row) -> Path:
        places = _places(row)
        for place in places:
            if (self._folder / place).is_file():
                return self._folder / place
        raise Refusal("motion file missing", f"none of {', '.join(places)}")


def _strided(row: _Row, source: _Source) -> NDArray[np.int64]:
    """The frames of the source that the index counts."""
    trim = sum(int(seconds * INDEX_FPS) for name, seconds in TRIMMED.items() if name in row.source)
    return np.arange(0, len(source.poses), source.stride)[trim:]


def _oddities(row: _Row, source: _Source) -> list[tuple[str, str]]:
    """What to note about a clip that HumanML3D takes without a word."""
    notes = []
    if source.slowness != 1:
        reason = f"counted as {INDEX_FPS} fps in the index, which it is not"
        notes.append((reason, f"every {source.stride}th frame of {source.fps:g} fps"))
    available = len(_strided(row, source))
    if row.end > available:
        notes.append(("the index goes on after the motion", f"to frame {row.end} of {available}"))
    return notes


def _meta(source: _Source) -> dict[str, Any]:
    return {"from": source.file, "source_fps": source.fps}


def _places(row: _Row) -> list[str]:
    """Where a row's file may be: as index.csv names it, and as newer editions of AMASS do."""
    if row.joints_only:
        below = row.source.split(f"{HUMANACT12}/")[-1]
        return [f"{HUMANACT12}/{below}.npy", f"{HUMANACT12}/{HUMANACT12}/{below}.npy"]
    found = [row.source]
    collection, _, rest = row.source.partition("/")
    if collection in RENAMED:
        found.append(f"{RENAMED[collection]}/{rest}")
    return [f"{name}.npz" for name in found + [name.replace(" ", "_") for name in found if " " in name]]


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _times(span: float, fps: float, rate: float) -> NDArray:
    """Where in `span` frames at fps there is a frame at `rate`, in frames."""
    return np.arange(int(np.floor(span / fps * rate + 1e-6)) + 1) * (fps / rate)


def _split(times: NDArray[np.float64], frames: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The frame before each time, and the part of the way to the next."""
    before = np.minimum(np.floor(times + 1e-9).astype(np.int64), frames - 1)
    part = times - before
    return before, np.where(part < 1e-9, 0.0, part)


def _between(values: NDArray, times: NDArray[np.float64]) -> NDArray:
    """Values (T, ...) at times in frames, straight between the frames."""
    before, part = _split(times, len(values))
    after = np.minimum(before + 1, len(values) - 1)
    part = part.reshape(-1, *(1,) * (values.ndim - 1))
    return values[before] + part * (values[after] - values[before])


def _slerp(rotvecs: NDArray, times: NDArray[np.float64]) -> NDArray:
    """Axis-angle (T, J, 3) at times in frames, along the shortest turn between the frames."""
    before, part = _split(times, len(rotvecs))
    out = rotvecs[before]
    inner = part > 0  # where rates divide, no frame is
    if inner.any():
        start = Rotation.from_rotvec(out[inner].reshape(-1, 3))
        end = Rotation.from_rotvec(rotvecs[before[inner] + 1].reshape(-1, 3))
        parts = np.repeat(part[inner], rotvecs.shape[1])[:, None]
        turns = start * Rotation.from_rotvec(parts * (start.inv() * end).as_rotvec())
        out[inner] = turns.as_rotvec().reshape(-1, *rotvecs.shape[1:])
    return out


def _stretched(caption: Caption, source: _Source) -> Caption:
    """With time tags in true seconds."""
    start, end = caption.start_s * source.slowness, caption.end_s * source.slowness
    return replace(caption, start_s=start, end_s=end)


def _load_bodies(model: Path) -> dict[bool, SmplBody]:
    """By whether a person is male: HumanML3D takes the female body for all others."""
    if not model.is_dir():
        body = SmplBody.load(model)
        return {True: body, False: body}
    return {
        male: SmplBody.load(model / name / "model.npz") for male, name in ((True, "male"), (False, "female"))
    }


def _read_index(path: Path) -> tuple[list[_Row], list[tuple[str, str]]]:
    """Rows, and the name and fault of those that are none."""
    if not path.is_file():
        raise ScaMoError(f"{path}: no such file; expected HumanML3D's index.csv")
    reader = csv.reader(io.StringIO(read_text(path)))
    header = [field.strip() for field in next(reader, [])]
    if set(INDEX_FIELDS) - set(header):
        raise ScaMoError(f"{path}: line 1 is {','.join(header)!r}, expected {','.join(INDEX_FIELDS)}")
    rows, bad = [], []
    seen: dict[str, int] = {}
    try:
        table = [(reader.line_num, fields) for fields in reader if any(fields)]
    except csv.Error as error:
        raise ScaMoError(f"{path}: line {reader.line_num}: {error}") from None
    for line, fields in table:
        try:
            row = _row(line, dict(zip(header, fields, strict=True)))
            if row.name in seen:
                raise ValueError(f"{row.name} is in line {seen[row.name]} too")
        except ValueError as error:
            bad.append((fields[-1], f"{path.name} line {line}: {error}"))
        else:
            seen[row.name] = line
            rows.append(row)
    return rows, bad


def _row(line: int, fields: dict[str, str]) -> _Row:
    source = PurePosixPath(fields["source_path"].strip().replace("\\", "/"))
    parts = [part for part in source.with_suffix("").parts if part != "pose_data"]
    if not parts or source.is_absolute() or ".." in parts:
        raise ValueError(f"source_path is {str(source)!r}, expected ./pose_data/SET/.../NAME.npy")
    name = fields["new_name"].strip().removesuffix(".npy")
    if not name or "/" in name or "\\" in name or name.startswith("."):
        raise ValueError(f"new_name is {fields['new_name']!r}, expected NAME.npy")
    start, end = int(fields["start_frame"]), int(fields["end_frame"])
    # HumanAct12's clips are whole, whatever their rows say (-1).
    if HUMANACT12 not in parts and not 0 <= start < end:
        raise ValueError(f"frames {start} to {end}: expected 0 <= start < end")
    return _Row(line, "/".join(parts), start, end, name)


def _by_source(rows: list[_Row], splits: dict[str, str]) -> list[_Piece]:
    """The rows of every file, files in the order of their first rows."""
    order: dict[str, list[_Row]] = {}
    for row in rows:
        order.setdefault(row.source, []).append(row)
    pieces = []
    for source, of_source in order.items():
        names = [name for row in of_source for name in (row.name, f"M{row.name}")]
        own = {name: splits[name] for name in names if name in splits}
        pieces.append(_Piece(source, tuple(of_source), own))
    return pieces


def _read_splits(texts: Path) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """The split of every name, and the names that come again, which stay where they were first."""
    check_texts(texts)
    names: dict[str, str] = {}
    twice = []
    for split, name, where in split_lists(texts):
        if name in names:
            twice.append((name, f"{texts / where}: it is in {names[name]} already"))
        else:
            names[name] = split
    return names, twice
