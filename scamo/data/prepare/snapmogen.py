"""SnapMoGen as published as a dataset.

renamed_feats/RECORDING.npy                             (T, 296) features, 30 fps
all_caption_clean.json                                  {CLIP: {"manual": [caption, ...], "gpt": [...]}, ...}
data_split_info/train_ids.txt val_ids.txt test_ids.txt  CLIP, one a line

CLIP is RECORDING#start#end, frames of the recording. "m_" + RECORDING is its mirrored copy, with its own file
and captions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from scamo.data.dataset import SPLITS, Caption, Clips, DatasetWriter, MotionDataset
from scamo.data.prepare.layout import Refusal, as_text, contradictions, read_text
from scamo.data.prepare.motionmillion import Listed, check_name, load_features
from scamo.data.prepare.work import write_dataset
from scamo.errors import ScaMoError
from scamo.motion.representation import SNAPMOGEN

MOTIONS = "renamed_feats"
CAPTIONS = "all_caption_clean.json"
LISTS = "data_split_info"
BY = ("manual", "gpt")

_CLIP = re.compile(r"[^#]+#(\d{1,9})#(\d{1,9})", re.ASCII)
# Of a recording the features lack two frames: its rest pose, and the last, to which the velocities lead.
_LOST_FRAMES = 2


class Recording(NamedTuple):
    """Lines of a split list, one after the other, that are clips of one recording, and what the caption file
    says of each."""

    name: str
    clips: list[tuple[Listed, Any]]


def prepare_snapmogen(
    source: str | Path,
    out: str | Path,
    *,
    min_frames: int | None = None,
    max_frames: int | None = None,
    license: str = "",
    workers: int = 1,
    strict: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> MotionDataset:
    """Read SnapMoGen's folder and write it as a dataset of 296 features at 30 fps.

    Each caption keeps who wrote it, "manual" or "gpt", in meta["by"]. Clips whose rotations contradict their
    positions are kept and noted in the manifest. A run that was stopped is gone on with by the same call.

    Args:
        source: the folder, its zip files unpacked.
        out: the dataset folder.
        min_frames: shorter clips are refused; 128 without it, as in the authors' training.
        max_frames: clips of this many frames or more are refused; 361 without it: 12 s are the longest that
            are published.
        license: of the motions and captions, in words; it stands in the manifest and on model cards.
        workers: processes; 0 takes one for each core.
        strict: stop at the first refusal.
        overwrite: replace an existing dataset.
        progress: show a progress bar and print the report.

    Raises:
        ScaMoError: the folder lacks its motions, captions or train_ids.txt; captions or a split list cannot
            be read; nothing was kept; strict and something was refused.
    """
    source = Path(source)
    if not (source / MOTIONS).is_dir():
        raise ScaMoError(f"{source / MOTIONS}: no such folder; expected motions as {MOTIONS}/RECORDING.npy")
    pieces = _recordings(source / LISTS, _read_captions(source / CAPTIONS))
    shortest, longest = SNAPMOGEN.item_frames
    limits = {
        "min_frames": shortest if min_frames is None else min_frames,
        "max_frames": longest if max_frames is None else max_frames,
    }
    provenance = {
        "source": "snapmogen",
        **({"license": license} if license else {}),
        "folder": source.resolve().name,
        **limits,
    }
    writer = DatasetWriter(
        out,
        feature_dim=SNAPMOGEN.feature_dim,
        fps=SNAPMOGEN.fps,
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
        partial(make, source),
        partial(_files, source),
        unit="recording",
        workers=workers,
        progress=progress,
    )


def make(source: Path, piece: Recording, clips: Clips) -> None:
    """Put the clips of a recording into `clips`, or why there are none."""
    motion: NDArray | Refusal
    try:
        check_name(piece.name, piece.clips[0][0].where)
        motion = load_features(source / MOTIONS / f"{piece.name}.npy", SNAPMOGEN)
    except Refusal as refusal:
        motion = refusal
    for (name, split, where), entry in piece.clips:
        try:
            start, end = _range(name, where)
            if isinstance(motion, Refusal):
                raise motion
            if start >= len(motion):
                raise Refusal("begins after its motion", f"frame {start} of {len(motion)}")
            captions = _captions(entry, name, split, clips)
        except Refusal as refusal:
            clips.refuse(name, refusal.reason, split=split, detail=refusal.detail)
            continue
        features = motion[start:end]
        meta = {
            "from": f"{MOTIONS}/{piece.name}.npy",
            "frames": [start, start + len(features)],
            "source_clip": name.removeprefix("m_"),
        }
        notes = contradictions(features, SNAPMOGEN)
        if end - len(motion) > _LOST_FRAMES:
            notes.append(("ends after its motion", f"frame {end} of {len(motion)}"))
        clips.add_clip(name, features, split, captions, meta, notes)


def _recordings(folder: Path, captions: dict[str, Any]) -> list[Recording]:
    found = []
    for name, lines in groupby(_split_lists(folder), key=lambda line: (line.split, line.name.split("#")[0])):
        found.append(Recording(name[1], [(line, captions.get(line.name)) for line in lines]))
    return found


def _split_lists(folder: Path) -> Iterator[Listed]:
    for split in SPLITS:
        path = folder / f"{split}_ids.txt"
        if not path.is_file():
            if split == "train":
                raise ScaMoError(f"{path}: no such file; expected RECORDING#start#end, one a line")
            continue
        for number, line in enumerate(read_text(path).splitlines(), 1):
            if line.strip():
                yield Listed(line.strip(), split, f"{path.name} line {number}")


def _range(name: str, where: str) -> tuple[int, int]:
    """The frames of a clip; Refusal for another name."""
    match = _CLIP.fullmatch(name)
    if match is None or int(match[1]) >= int(match[2]):
        raise Refusal("malformed name", f"{where}: expected RECORDING#start#end")
    return int(match[1]), int(match[2])


def _read_captions(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path)
    except OSError as error:
        raise ScaMoError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        captions = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ScaMoError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(captions, dict):
        raise ScaMoError(f"{path}: expected an object, got {type(captions).__name__}")
    return captions


def _files(source: Path, piece: Recording) -> Iterator[Path]:
    if "\0" not in piece.name:
        yield source / MOTIONS / f"{piece.name}.npy"


def _captions(entry: Any, name: str, split: str, clips: Clips) -> list[Caption]:
    """Those of a clip's entry in the caption file; others than strings are refused one by one."""
    if entry is None:
        raise Refusal("no caption", f"{CAPTIONS} does not name it")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(by, []), list) for by in BY):
        raise Refusal("malformed captions", f"expected lists of {' and '.join(BY)}")
    found = []
    for by in BY:
        for index, text in enumerate(entry.get(by, [])):
            if isinstance(text, str) and as_text(text) == text:
                found.append(Caption(text.strip(), meta={"by": by}))
            else:
                detail = f"{by} caption {index}: not valid text"
                clips.refuse(name, "malformed caption", split=split, kind="caption", detail=detail)
    return found
