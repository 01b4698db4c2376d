"""Any folder of HumanML3D's shape as a dataset.

texts/NAME.txt            one caption a line: caption#word/POS word/POS ...#from_s#to_s (or the caption alone)
train.txt val.txt test.txt  names, one a line; "M" + NAME is the mirrored copy of NAME
new_joint_vecs/NAME.npy   (T, 263) features; where absent they are computed from
joints/ or new_joints/    NAME.npy (T + 1, 22, 3) metres, Y up, 20 fps (of 52 joints the first 22 are used)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scamo.data.dataset import DatasetWriter, MotionDataset
from scamo.data.prepare.layout import (
    Refusal,
    check_texts,
    load_array,
    read_captions,
    read_offsets,
    split_lists,
    uniform_features,
)
from scamo.errors import ScaMoError
from scamo.motion.features import (
    FEATURE_DIM,
    features_to_joints,
    offsets_from_joints,
)
from scamo.motion.skeleton import N_JOINTS, mirror_joints

VECTORS = "new_joint_vecs"
JOINTS = ("joints", "new_joints")
# Bones that differ by less are the same: HumanML3D's own round trip is exact to a micrometre.
SAME_BONE_M = 1e-4
PROBED_CLIPS = 8


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
    check_texts(source)
    if not (source / VECTORS).is_dir() and not _has_joints(source):
        raise ScaMoError(f"{source}: has none of {VECTORS}/, {'/, '.join(JOINTS)}/")
    names = [(split, name) for split, name, _ in split_lists(source)]
    for split, name in names:
        if "/" in name or "\\" in name or name.startswith("."):
            raise ScaMoError(f"{source / split}.txt: {name!r} is not a plain name")
    if not names:
        raise ScaMoError(f"{source}: the split lists name no clip")
    return names


def _has_joints(source: Path) -> bool:
    return any((source / folder).is_dir() for folder in JOINTS)


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
