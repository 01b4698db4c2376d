"""Any folder of HumanML3D's shape as a dataset.

texts/NAME.txt            one caption a line: caption#word/POS word/POS ...#from_s#to_s (or the caption alone)
train.txt val.txt test.txt  names, one a line; "M" + NAME is the mirrored copy of NAME
new_joint_vecs/NAME.npy   (T, 263) features; where absent they are computed from
joints/ or new_joints/    NAME.npy (T + 1, 22, 3) metres, Y up, 20 fps (of 52 joints the first 22 are used)
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scamo.data.dataset import SPLITS, Caption, DatasetWriter, MotionDataset
from scamo.errors import ScaMoError
from scamo.motion.features import (
    FEATURE_DIM,
    features_to_joints,
    joints_to_features,
    offsets_from_joints,
)
from scamo.motion.skeleton import N_JOINTS, mirror_joints, swap_sides

VECTORS = "new_joint_vecs"
JOINTS = ("joints", "new_joints")
# Bones that differ by less are the same: HumanML3D's own round trip is exact to a micrometre.
SAME_BONE_M = 1e-4
PROBED_CLIPS = 8


class Refusal(Exception):
    """Why a clip is left out."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def prepare_humanml3d(
    source: str | Path,
    out: str | Path,
    *,
    target_offsets: str | Path | None = None,
    mirror: bool = True,
    min_frames: int = 40,
    max_frames: int = 200,
    license: str = "",
    overwrite: bool = False,
    progress: bool = True,
) -> MotionDataset:
    """Read a HumanML3D-shaped folder and write it as a dataset.

    The items follow the evaluation protocol of Guo et al.: clips, and then parts that a caption's time tags
    cut out, of min_frames <= frames < max_frames; all else is refused, counted and listed in the manifest.

    Args:
        source: the folder.
        out: the dataset folder.
        target_offsets: (22, 3) .npy of the uniform skeleton for clips that come as joints. Without it the
            bones are kept, unless the folder also has vectors and these share a skeleton: then that is used.
        mirror: make the mirrored copies that the split lists name and the folder lacks, from the joints;
            their captions are texts/MNAME.txt, or else NAME's with left and right exchanged. Stored copies
            are always used.
        min_frames: shorter clips and parts are refused.
        max_frames: clips and parts of this many frames or more are refused.
        license: of the motions and captions, in words; it stands in the manifest and on model cards.
        overwrite: replace an existing dataset.
        progress: show a progress bar and print the report.

    Raises:
        ScaMoError: the folder lacks texts/, train.txt or every motion folder; a split list or target_offsets
            cannot be read; nothing was kept.
    """
    from tqdm import tqdm

    source = Path(source)
    names = _names(source)
    offsets, skeleton = None, "kept"
    if target_offsets is not None:
        offsets, skeleton = read_offsets(Path(target_offsets)), "given"
    elif _has_joints(source):
        offsets = _common_skeleton(source, names)
        skeleton = skeleton if offsets is None else "that of the stored vectors"
    provenance = {
        "source": "humanml3d",
        **({"license": license} if license else {}),
        "folder": source.resolve().name,
        "skeleton": skeleton,
        "mirror": mirror,
        "min_frames": min_frames,
        "max_frames": max_frames,
    }
    with DatasetWriter(
        out, provenance=provenance, overwrite=overwrite, min_frames=min_frames, max_frames=max_frames
    ) as writer:
        for split, name in tqdm(names, desc="prepare humanml3d", unit="clip", disable=not progress):
            try:
                captions = read_captions(source, name, split, writer)
                features, origin = _features(source, name, offsets, mirror)
            except Refusal as refusal:
                writer.refuse(name, refusal.reason, split=split, detail=refusal.detail)
            else:
                writer.add_clip(name, features, split, captions, {"from": origin})
    dataset = MotionDataset.open(out)
    if progress:
        print(dataset.summary())
    return dataset


def _names(source: Path) -> list[tuple[str, str]]:
    """(split, name) of every line of the split lists."""
    if not source.is_dir():
        raise ScaMoError(f"{source}: no such folder")
    if not (source / "texts").is_dir():
        raise ScaMoError(f"{source / 'texts'}: no such folder; expected captions as texts/NAME.txt")
    if not (source / VECTORS).is_dir() and not _has_joints(source):
        raise ScaMoError(f"{source}: has none of {VECTORS}/, {'/, '.join(JOINTS)}/")
    names = []
    for split in SPLITS:
        path = source / f"{split}.txt"
        if not path.is_file():
            if split == "train":
                raise ScaMoError(
                    f"{path}: no such file; expected the names of the training clips, one a line"
                )
            continue
        names += [(split, line.strip()) for line in read_text(path).splitlines() if line.strip()]
    for split, name in names:
        if "/" in name or "\\" in name or name.startswith("."):
            raise ScaMoError(f"{source / split}.txt: {name!r} is not a plain name")
    if not names:
        raise ScaMoError(f"{source}: the split lists name no clip")
    return names


def _has_joints(source: Path) -> bool:
    return any((source / folder).is_dir() for folder in JOINTS)


def read_text(path: Path) -> str:
    """A UTF-8 file; ScaMoError that names the byte which is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ScaMoError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}") from None


def read_offsets(path: Path) -> NDArray[np.float64]:
    """A skeleton (22, 3) in metres; ScaMoError for any other file."""
    try:
        offsets = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ScaMoError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    good = offsets.shape == (N_JOINTS, 3) and offsets.dtype.kind == "f" and np.isfinite(offsets).all()
    if not good:
        found = f"{offsets.dtype} {list(offsets.shape)}"
        raise ScaMoError(f"{path}: {found}, expected ({N_JOINTS}, 3) finite metres")
    return offsets.astype(np.float64)


def _common_skeleton(source: Path, names: list[tuple[str, str]]) -> NDArray[np.float64] | None:
    """The skeleton that the stored vectors share, or None: clips made from joints must look alike."""
    found: list[NDArray[np.float64]] = []
    for _, name in names:
        path = source / VECTORS / f"{name}.npy"
        try:
            vectors = load_array(path)
        except Refusal:
            continue
        if vectors.ndim == 2 and vectors.shape[0] and vectors.shape[1] == FEATURE_DIM:
            offsets = np.asarray(offsets_from_joints(features_to_joints(vectors[:1])[0]), dtype=np.float64)
            if np.isfinite(offsets).all():
                found.append(offsets)
        if len(found) == PROBED_CLIPS:
            break
    if not found:
        return None
    lengths = np.linalg.norm(np.stack(found), axis=-1)
    return found[0] if np.ptp(lengths, axis=0).max() < SAME_BONE_M else None


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


def _features(
    source: Path, name: str, offsets: NDArray[np.float64] | None, mirror: bool
) -> tuple[NDArray, str]:
    """The features of a clip, and which folder they come from."""
    if (source / VECTORS / f"{name}.npy").is_file():
        return load_array(source / VECTORS / f"{name}.npy"), VECTORS
    for folder in JOINTS:
        if (source / folder / f"{name}.npy").is_file():
            return uniform_features(_load_joints(source / folder / f"{name}.npy"), offsets), folder
    looked = [folder for folder in (VECTORS, *JOINTS) if (source / folder).is_dir()]
    if name.startswith("M"):
        for folder in JOINTS:
            path = source / folder / f"{name[1:]}.npy"
            if path.is_file():
                if not mirror:
                    raise Refusal("mirrored copies are turned off", f"{folder}/{path.name}")
                return uniform_features(mirror_joints(_load_joints(path)), offsets), f"{folder}, mirrored"
    raise Refusal("motion file missing", f"{name}.npy in {', '.join(looked)}")


def _load_joints(path: Path) -> NDArray:
    joints = load_array(path)
    if joints.ndim != 3 or joints.shape[1] not in (N_JOINTS, 52) or joints.shape[2] != 3:
        detail = f"{path.parent.name}/{path.name}: {list(joints.shape)}, expected [frames, {N_JOINTS}, 3]"
        raise Refusal("wrong shape", detail)
    if joints.shape[0] < 2:
        raise Refusal("too short", f"{joints.shape[0]} frames of joints, expected at least 2")
    if not np.isfinite(joints).all():
        frame, joint = np.argwhere(~np.isfinite(joints))[0][:2]
        raise Refusal("NaN or infinite joints", f"frame {frame}, joint {joint}")
    return joints[:, :N_JOINTS]


def uniform_features(joints: NDArray, offsets: NDArray[np.float64] | None) -> NDArray[np.float32]:
    """The 263 features of joints, with the bones of `offsets` where given; Refusal if there are none."""
    try:
        return joints_to_features(joints, target_offsets=offsets)
    except ScaMoError as error:
        raise Refusal("features cannot be computed", str(error)) from None


def read_captions(source: Path, name: str, split: str, writer: DatasetWriter) -> list[Caption]:
    """Those of texts/NAME.txt, bad lines refused one by one; Refusal where none is left."""
    path = source / "texts" / f"{name}.txt"
    swap = False
    if not path.is_file() and name.startswith("M"):
        swap, path = True, source / "texts" / f"{name[1:]}.txt"
    if not path.is_file():
        raise Refusal("caption file missing", f"texts/{name}.txt")
    try:
        text = read_text(path)
    except ScaMoError as error:
        raise Refusal("caption file unreadable", str(error)) from None
    captions = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            caption, nan = parse_caption(line)
        except ScaMoError as error:
            detail = f"texts/{path.name} line {number}: {error}"
            writer.refuse(name, "malformed caption line", split=split, kind="caption", detail=detail)
            continue
        if nan:
            writer.note(
                name, "nan time tags read as 0", split=split, detail=f"texts/{path.name} line {number}"
            )
        if swap:
            meta = {key: swap_sides(value) for key, value in caption.meta.items()}
            caption = replace(caption, text=swap_sides(caption.text), meta=meta)
        captions.append(caption)
    if not captions:
        raise Refusal("caption file without captions", f"texts/{path.name}")
    return captions


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
