"""Folders of 272-feature files as a dataset: MotionMillion, and the HumanML3D and BABEL of MotionStreamer.

MotionMillion, where NAME has folders, as in MotionGV/folder0/000001:
    motion_data/vector_272/NAME.npy                       (T, 272) features, 30 fps
    texts/NAME.txt                                        one caption a line
    split/version1/t2m_60_300/train.txt val.txt test.txt  names, one a line
MotionStreamer, where "M" + NAME is the mirrored copy of NAME, with its own files:
    motion_data/NAME.npy                                  (T, 272) features, 30 fps
    texts/NAME.txt                                        caption#word/POS ...#from_s#to_s, one a line
    split/train.txt val.txt test.txt                      names, one a line
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scamo.data.dataset import Caption, Clips, DatasetWriter, MotionDataset
from scamo.data.prepare.layout import (
    Refusal,
    caption_file,
    check_texts,
    contradictions,
    load_array,
    parse_caption,
    read_text,
    split_lists,
)
from scamo.data.prepare.work import write_dataset
from scamo.errors import ScaMoError
from scamo.motion.representation import SMPL_272, Representation


@dataclass(frozen=True)
class Layout:
    """Where a published folder has its files. tagged: its captions end in words and time tags."""

    name: str
    motions: str
    splits: str
    tagged: bool
    item_frames: tuple[int, int]


# MotionMillion's list says 60 to 300; whether 300 belongs to it is not said.
LAYOUTS = (
    Layout("motionmillion", "motion_data/vector_272", "split/version1/t2m_60_300", False, (60, 301)),
    Layout("humanml3d_272", "motion_data", "split", True, SMPL_272.item_frames),
)


class Listed(NamedTuple):
    """A line of a split list; where: its file and number."""

    name: str
    split: str
    where: str


def prepare_motionmillion(
    source: str | Path,
    out: str | Path,
    *,
    splits: str | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    license: str = "",
    workers: int = 1,
    strict: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> MotionDataset:
    """Read a folder of either layout and write it as a dataset of 272 features at 30 fps.

    Clips whose rotations contradict their positions are kept and noted in the manifest. A run that was
    stopped is gone on with by the same call.

    Args:
        source: the folder.
        out: the dataset folder.
        splits: the folder of the split lists below source; without it the layout's.
        min_frames: shorter clips and parts are refused; 60 without it.
        max_frames: clips and parts of this many frames or more are refused; 301 without it (MotionMillion),
            or 300.
        license: of the motions and captions, in words; it stands in the manifest and on model cards.
        workers: processes; 0 takes one for each core.
        strict: stop at the first refusal.
        overwrite: replace an existing dataset.
        progress: show a progress bar and print the report.

    Raises:
        ScaMoError: the folder has neither layout, lacks texts/ or train.txt; a split list cannot be read;
            nothing was kept; strict and something was refused.
    """
    source = Path(source)
    layout = _layout(source)
    check_texts(source)
    lists = layout.splits if splits is None else splits
    pieces = [Listed(name, split, where) for split, name, where in split_lists(source / lists)]
    shortest, longest = layout.item_frames
    limits = {
        "min_frames": shortest if min_frames is None else min_frames,
        "max_frames": longest if max_frames is None else max_frames,
    }
    provenance = {
        "source": layout.name,
        **({"license": license} if license else {}),
        "folder": source.resolve().name,
        "splits": lists,
        **limits,
    }
    writer = DatasetWriter(
        out,
        feature_dim=SMPL_272.feature_dim,
        fps=SMPL_272.fps,
        provenance=provenance,
        overwrite=overwrite,
        strict=strict,
        resume={"source": str(source.resolve())},
        min_frames=limits["min_frames"],
        max_frames=limits["max_frames"],
    )
    return write_dataset(
        writer,
        pieces,
        partial(make, source, layout),
        partial(_files, source, layout),
        workers=workers,
        progress=progress,
    )


def make(source: Path, layout: Layout, piece: Listed, clips: Clips) -> None:
    """Put the clip of a line into `clips`, or why there is none."""
    name, split, where = piece
    try:
        check_name(name, where)
        captions = _captions(source, layout, name, split, clips)
        features = load_features(source / layout.motions / f"{name}.npy", SMPL_272)
    except Refusal as refusal:
        clips.refuse(name, refusal.reason, split=split, detail=refusal.detail)
        return
    meta = {"from": f"{layout.motions}/{name}.npy"}
    if "/" in name:
        meta["subset"] = name.split("/")[0]
    clips.add_clip(name, features, split, captions, meta, contradictions(features, SMPL_272))


def check_name(name: str, where: str) -> None:
    """Refusal for a name that would lead out of the folder. where: the list and line that has it."""
    parts = PurePosixPath(name).parts
    if "\\" in name or "\0" in name or ".." in parts or name != "/".join(parts) or name.startswith("/"):
        raise Refusal("not a plain name", where)


def load_features(path: Path, representation: Representation) -> NDArray:
    """A .npy of features (T, feature_dim), T >= 1, any float, finite or not; Refusal for anything else."""
    features = load_array(path)
    label = f"{path.parent.name}/{path.name}"
    if not isinstance(features, np.ndarray):  # a .npz
        raise Refusal("wrong shape", f"{label}: several arrays, expected one")
    if (
        features.ndim != 2
        or not len(features)
        or features.shape[1] != representation.feature_dim
        or features.dtype.kind != "f"
    ):
        found = f"{features.dtype} {list(features.shape)}"
        expected = f"expected float [frames, {representation.feature_dim}]"
        raise Refusal("wrong shape", f"{label}: {found}, {expected}")
    return features


def _layout(source: Path) -> Layout:
    if not source.is_dir():
        raise ScaMoError(f"{source}: no such folder")
    for layout in LAYOUTS:
        if (source / layout.motions).is_dir():
            return layout
    expected = " or ".join(f"{layout.motions}/ ({layout.name})" for layout in LAYOUTS)
    raise ScaMoError(f"{source}: expected the motions in {expected}")


def _files(source: Path, layout: Layout, piece: Listed) -> Iterator[Path]:
    try:
        check_name(piece.name, piece.where)
    except Refusal:
        return
    yield source / layout.motions / f"{piece.name}.npy"
    yield source / "texts" / f"{piece.name}.txt"


def _captions(source: Path, layout: Layout, name: str, split: str, clips: Clips) -> list[Caption]:
    path, label = source / "texts" / f"{name}.txt", f"texts/{name}.txt"
    if not path.is_file():
        raise Refusal("caption file missing", label)
    if layout.tagged:
        return caption_file(path, label, name, split, clips)
    try:
        lines = read_text(path).splitlines()
    except (OSError, ScaMoError) as error:
        raise Refusal("caption file unreadable", str(error)) from None
    captions = [_plain_caption(line.strip()) for line in lines if line.strip()]
    if not captions:
        raise Refusal("caption file without captions", label)
    return captions


def _plain_caption(line: str) -> Caption:
    """All of the line, as MotionMillion's own code reads it, unless it ends in words and time tags."""
    try:
        return parse_caption(line)[0]
    except ScaMoError:
        return Caption(line)
