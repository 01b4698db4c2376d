"""Folders of motion capture, .bvh or .asf and .amc, as a dataset.

Captions are those of NAME.txt beside NAME.bvh (a caption a line, or HumanML3D's lines with time tags), of a
table (CSV or JSON lines), or a template for sets that only have labels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from scamo.data.dataset import Clips, DatasetWriter, MotionDataset
from scamo.data.prepare.layout import (
    CaptionTable,
    Entry,
    Refusal,
    Rotations,
    add_body,
    as_text,
    body_of,
    checked_limits,
    checked_split,
    described_by,
    feature_kind,
    names_of,
    read_offsets,
    splits_by_name,
)
from scamo.data.prepare.work import write_dataset
from scamo.errors import ScaMoError
from scamo.motion.asf import DEFAULT_FPS, Skeleton, find_asf, read_amc, read_asf
from scamo.motion.bvh import read_bvh
from scamo.motion.hierarchy import Animation
from scamo.motion.joint_maps import JointMap, check_up, unit_of
from scamo.motion.representation import SMPL_272

SUFFIXES = (".bvh", ".amc")


@dataclass(frozen=True)
class _File:
    """A file below the source folder."""

    path: str
    name: str
    split: str
    entry: Entry


def prepare_mocap(
    source: str | Path,
    out: str | Path,
    *,
    joint_map: JointMap | str | Path | None = None,
    captions: str | Path | None = None,
    template: str | None = None,
    feature_dim: int = 263,
    fps: float | None = None,
    source_fps: float | None = None,
    units: str | float | None = None,
    up: str | None = None,
    mirror: bool = False,
    split: Sequence[float] = (0.8, 0.05, 0.15),
    split_by: Literal["clip", "subject"] = "clip",
    target_offsets: str | Path | None = None,
    rest_pose: str | Path | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    long: Literal["cut", "refuse"] = "cut",
    strict: bool = False,
    license: str = "",
    overwrite: bool = False,
    workers: int = 1,
    progress: bool = True,
) -> MotionDataset:
    """Read every .bvh and .amc of a folder and those below, and write them as a dataset.

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
        feature_dim: 263, or 272 with the files' own rotations, seen from the T-pose of SMPL's joints.
        fps: frames a second of the dataset. None: 20 of 263, 30 of 272 features.
        source_fps: of the files, instead of what a .bvh says and the 120 of an .amc; a table's fps goes
            first.
        units, up: as for `retarget`.
        mirror: add a mirrored copy, "M" + name, of every clip.
        split: parts of train, val and test. Which file goes where is a function of its name alone, and the
            table's split goes first.
        split_by: "subject" keeps all files together whose names agree up to the last underscore.
        target_offsets: (22, 3) .npy of the uniform skeleton, whose bone lengths all clips take.
        rest_pose: (22, 3) .npy of a T-pose, metres, onto which all clips are retargeted by their rotations.
        min_frames: shorter clips and parts are refused. None: 2 s.
        max_frames: clips of this many frames or more are cut or refused. None: 10 s.
        long: "cut" or "refuse".
        strict: stop at the first refusal.
        license: of the motions and captions, in words; it stands in the manifest and on model cards.
        overwrite: replace an existing dataset, or an unfinished one of other settings.
        workers: processes, as for `write_pieces`.
        progress: show a progress bar and print the report.

    Raises:
        ScaMoError: an argument is wrong, the folder holds no motion, the table or another file of the
            arguments cannot be read, or nothing was kept; with `strict` also for what is refused otherwise.
    """
    kind = feature_kind(feature_dim, target_offsets)
    fps = kind.fps if fps is None else fps
    source = Path(source)
    files = _files(source)
    parts = checked_split(split)
    if split_by not in ("clip", "subject"):
        raise ScaMoError(f"split_by = {split_by!r}, expected clip or subject")
    if long not in ("cut", "refuse"):
        raise ScaMoError(f"long = {long!r}, expected cut or refuse")
    for name, value in (("fps", fps), ("source_fps", source_fps)):
        if value is not None and not 0 < value < math.inf:
            raise ScaMoError(f"{name} = {value}: expected a positive number")
    min_frames, max_frames = checked_limits(kind, fps, min_frames, max_frames)
    settings: dict[str, Any] = {
        "fps": fps,
        "units": None if units is None else unit_of(units),
        "up": None if up is None else check_up(up),
        "target_offsets": None if rest_pose is None else read_offsets(Path(rest_pose)),
    }
    if joint_map is not None and not isinstance(joint_map, JointMap):
        joint_map = JointMap.load(joint_map)
    offsets = None if target_offsets is None else read_offsets(Path(target_offsets))
    places = [path.relative_to(source) for path in files]
    names = names_of(places)
    table = None if captions is None else CaptionTable(Path(captions), places)
    splits = splits_by_name([_subject(n) if split_by == "subject" else n for n in names], parts)
    provenance = {
        "source": "mocap",
        **({"license": license} if license else {}),
        "folder": source.resolve().name,
        "joint_map": joint_map.name if joint_map else "by joint names",
        "captions": Path(captions).name if captions is not None else "beside the files",
        "template": template,
        "features": kind.name,
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
    pieces = []
    for within, name in zip(places, names, strict=True):
        where = splits[_subject(name) if split_by == "subject" else name]
        pieces.append(_File(str(within), name, where, table.of(within) if table else Entry()))
    maker = _Maker(
        source,
        joint_map,
        table is None,
        template,
        source_fps,
        settings,
        offsets,
        mirror,
        long,
        max_frames,
        "own" if kind is SMPL_272 else None,
    )
    writer = DatasetWriter(
        out,
        feature_dim=feature_dim,
        fps=fps,
        provenance=provenance,
        overwrite=overwrite,
        min_frames=min_frames,
        max_frames=max_frames,
        strict=strict,
        resume={
            "joint map": repr(joint_map),
            "rest_pose": None if rest_pose is None else settings["target_offsets"].tolist(),
            "target_offsets": None if offsets is None else offsets.tolist(),
        },
    )
    return write_dataset(
        writer,
        pieces,
        maker.make,
        maker.files,
        unit="file",
        workers=workers,
        progress=progress,
        first=None if table is None else table.refuse_rest,
    )


@dataclass
class _Maker:
    """What a file's clips depend on beside the file."""

    source: Path
    joint_map: JointMap | None
    captions_beside: bool
    template: str | None
    source_fps: float | None
    settings: dict[str, Any]
    offsets: NDArray | None
    mirror: bool
    long: str
    max_frames: int
    rotations: Rotations | None
    skeletons: dict[Path, Skeleton] = field(default_factory=dict)

    def files(self, file: _File) -> Iterator[Path]:
        path = self.source / file.path
        yield path
        if self.captions_beside:
            yield path.with_suffix(".txt")
        if path.suffix.lower() == ".amc":
            with contextlib.suppress(ScaMoError):
                yield find_asf(path)

    def make(self, file: _File, out: Clips) -> None:
        path, name, split = self.source / file.path, file.name, file.split
        try:
            split = file.entry.checked_split(split)
            beside = path.with_suffix(".txt") if self.captions_beside else None
            described = described_by(file.entry, beside, self.template, path.stem, name, split, out)
            animation = _read(path, file.entry.fps or self.source_fps, self.skeletons)
            body = body_of(animation, self.joint_map, self.settings)
            meta = {
                "file": as_text(Path(file.path).as_posix()),
                "joint_map": body.joint_map,
                "source_fps": animation.fps,
            }
            add_body(
                out,
                name,
                split,
                body,
                described,
                meta,
                self.max_frames,
                self.long == "cut",
                self.offsets,
                self.mirror,
                self.rotations,
            )
        except Refusal as refusal:
            out.refuse(name, refusal.reason, split=split, detail=refusal.detail)


def _files(source: Path) -> list[Path]:
    if not source.is_dir():
        raise ScaMoError(f"{source}: no such folder")
    files = [p for p in sorted(source.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()]
    if not files:
        raise ScaMoError(f"{source}: holds no file with one of the suffixes {', '.join(SUFFIXES)}")
    return files


def _subject(name: str) -> str:
    return name.rpartition("_")[0] or name


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
