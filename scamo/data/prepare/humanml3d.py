"""Any folder of HumanML3D's shape as a dataset, whichever features it has.

new_joint_vecs/NAME.npy   (T, F) features: 263, KIT-ML's 251, or any other number that `Representation` knows.
                          In Motion-X the folder is vector_263/, with the 272 features it is motion_data/. Of
                          HumanTOMATO's 623 features of a whole body the body's 263 are read. Where absent
                          they are computed from
joints/ or new_joints/    NAME.npy (T + 1, 22, 3), of more joints the first 22, or KIT-ML's 21; Y up
texts/NAME.txt            one caption a line: caption#word/POS word/POS ...#from_s#to_s, or the caption alone;
                          Motion-X: texts/semantic_labels/
train.txt val.txt test.txt  names, one a line, here or in split/; without any, every file is a clip

A NAME may have folders before it. "M" before its last part is the mirrored copy.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scamo.data.dataset import Clips, DatasetWriter, MotionDataset
from scamo.data.prepare.layout import (
    Refusal,
    check_texts,
    checked_split,
    clips_of,
    load_array,
    read_captions,
    read_offsets,
    resampled_joints,
    uniform_features,
    unmirrored,
)
from scamo.data.prepare.work import write_dataset
from scamo.errors import ScaMoError
from scamo.motion.features import VARIANTS, Variant, features_to_joints, offsets_from_joints
from scamo.motion.joint_maps import UNITS, unit_of
from scamo.motion.representation import HUMANML3D, KIT_ML, Representation
from scamo.motion.skeleton import mirror_joints

VECTORS = ("new_joint_vecs", "vector_263", "motion_data/vector_263", "motion_data")
JOINTS = ("joints", "new_joints")
TEXTS = ("texts/semantic_labels", "texts")
# What joints alone can be turned into, by their number.
OF_JOINTS = {22: HUMANML3D, 21: KIT_ML}
MORE_JOINTS = (24, 52, 55)  # SMPL, SMPL+H and SMPL-X: the first 22 are the same
# HumanTOMATO's features are those of HumanML3D for 52 joints, of which the body is the first 22.
WHOLE_BODY_JOINTS, WHOLE_BODY_DIM = 52, 623
# Bones that differ by less are the same: HumanML3D's own round trip is exact to a micrometre.
SAME_BONE_M = 1e-4
PROBED_CLIPS = 8
# Hip to knee to ankle; children and KIT-ML's body, which is scaled to about a metre, are inside.
LEG_M = (0.3, 1.3)


@dataclass(frozen=True)
class Folder:
    """What the features of a clip are made from; it can be pickled.

    vectors, joints: the folders that there are. feature_dim: of the dataset. source_fps and fps: of the files
    and of the dataset. metres_a_unit: of joints/. offsets: the skeleton that joints take. texts: the folder
    of the captions. variant: of the features.
    """

    source: Path
    vectors: str | None
    joints: tuple[str, ...]
    feature_dim: int
    source_fps: float
    fps: float
    metres_a_unit: float
    offsets: NDArray[np.float64] | None
    mirror: bool
    texts: str
    variant: Variant


@dataclass(frozen=True)
class Listed:
    """A clip that is asked for."""

    name: str
    split: str


def prepare_humanml3d(
    source: str | Path,
    out: str | Path,
    *,
    fps: float | None = None,
    source_fps: float | None = None,
    units: str | float | None = None,
    target_offsets: str | Path | None = None,
    mirror: bool = True,
    split: Sequence[float] = (0.8, 0.05, 0.15),
    variant: Variant = "original",
    min_frames: int | None = None,
    max_frames: int | None = None,
    workers: int = 1,
    strict: bool = False,
    license: str = "",
    overwrite: bool = False,
    progress: bool = True,
) -> MotionDataset:
    """Read a HumanML3D-shaped folder and write it as a dataset.

    The items follow the evaluation protocol of Guo et al.: clips, and then parts that a caption's time tags
    cut out, of min_frames <= frames < max_frames; all else is refused, counted and listed in the manifest.
    A run that was stopped is gone on with by the same call.

    Args:
        source: the folder.
        out: the dataset folder.
        fps: frames a second of the dataset. None: those that the features are made for, 20 of 263.
        source_fps: of the files. None: as `fps`. At another rate clips go through their joints, which are
            taken straight between the frames; this is for 263 and 251 features.
        units: of the files in joints/: m, cm, mm, ... or metres a unit. None: by the length of the legs.
        target_offsets: (22, 3) .npy of the uniform skeleton for clips that come as joints. Without it the
            bones are kept, unless the folder also has 263 features and these share a skeleton: then that is
            used.
        mirror: make the mirrored copies that the split lists name and the folder lacks, from the joints or
            else from the features; their captions are texts/MNAME.txt, or else NAME's with left and right
            exchanged. Stored copies are always used.
        split: parts of train, val and test where the folder has no split lists. What comes from one recording
            by its name stays together, and where it goes is a function of that name alone.
        variant: of the 263 features, see `scamo.motion.features.FIXED`: "fixed" makes them from joints/, or
            where there are stored vectors alone from the joints that these give.
        min_frames: shorter clips and parts are refused. None: as in the evaluation protocol of the features,
            2 s of 263 features.
        max_frames: clips and parts of this many frames or more are refused. None: likewise, 10 s.
        workers: processes; 0 takes one for each core.
        strict: stop at the first refusal.
        license: of the motions and captions, in words; it stands in the manifest and on model cards.
        overwrite: replace an existing dataset.
        progress: show a progress bar and print the report.

    Raises:
        ScaMoError: the folder lacks texts/, train.txt (but has val.txt or test.txt) or every motion folder;
            its features are of no known width; a split list or target_offsets cannot be read; an argument is
            wrong; nothing was kept; with `strict` also for what is refused otherwise.
    """
    source = Path(source)
    texts = _texts(source)
    vectors, joints = _folders(source)
    names = clips_of(source, vectors or joints[0], checked_split(split))
    found, metres_a_unit = _kind(source, vectors, joints, names, units)
    if found not in OF_JOINTS.values():
        joints = ()
    rate, source_rate = _rates(found, vectors, fps, source_fps)
    if variant != "original":
        if variant not in VARIANTS:
            raise ScaMoError(f"variant = {variant!r}: expected one of {', '.join(VARIANTS)}")
        if found is not HUMANML3D:
            raise ScaMoError(f"variant: {found.feature_dim} features have no {variant!r} one, only 263 have")
    offsets, skeleton = None, "kept"
    if target_offsets is not None:
        if found is not HUMANML3D:
            raise ScaMoError(f"target_offsets: {found.feature_dim} features keep everybody's own bones")
        offsets, skeleton = read_offsets(Path(target_offsets)), "given"
    elif found is HUMANML3D and vectors is not None:
        offsets = _common_skeleton(source, vectors, names)
        skeleton = skeleton if offsets is None else "that of the stored vectors"
    folder = Folder(
        source=source,
        vectors=vectors,
        joints=joints,
        feature_dim=found.feature_dim,
        source_fps=source_rate,
        fps=rate,
        metres_a_unit=metres_a_unit,
        offsets=offsets,
        mirror=mirror,
        texts=texts,
        variant=variant,
    )
    limits = [round(frames * rate / found.fps) for frames in found.item_frames]
    limits = [
        limit if given is None else given
        for limit, given in zip(limits, (min_frames, max_frames), strict=True)
    ]
    provenance = {
        "source": "humanml3d",
        **({"license": license} if license else {}),
        "folder": source.resolve().name,
        "features": found.name,
        **({"variant": variant} if variant != "original" else {}),
        "skeleton": skeleton,
        "source_fps": source_rate,
        "metres_a_unit": metres_a_unit,
        "mirror": mirror,
        "min_frames": limits[0],
        "max_frames": limits[1],
    }
    writer = DatasetWriter(
        out,
        feature_dim=found.feature_dim,
        fps=rate,
        provenance=provenance,
        overwrite=overwrite,
        min_frames=limits[0],
        max_frames=limits[1],
        strict=strict,
        resume={
            "source": str(source.resolve()),
            "offsets": None if offsets is None else offsets.tolist(),
            "texts": texts,
        },
    )
    return write_dataset(
        writer,
        [Listed(name, part) for part, name in names],
        partial(make, folder),
        partial(_files, folder),
        workers=workers,
        progress=progress,
    )


def make(folder: Folder, piece: Listed, clips: Clips) -> None:
    """Put a clip into `clips`, or why there is none."""
    try:
        captions = read_captions(folder.source, piece.name, piece.split, clips, folder.texts)
        features, origin = convert(folder, piece.name)
    except Refusal as refusal:
        clips.refuse(piece.name, refusal.reason, split=piece.split, detail=refusal.detail)
    else:
        clips.add_clip(piece.name, features, piece.split, captions, {"from": origin})


def _files(folder: Folder, piece: Listed) -> Iterator[Path]:
    """All that might be read for a clip."""
    for name in filter(None, (piece.name, unmirrored(piece.name))):
        if "\0" in name:
            continue
        yield folder.source / folder.texts / f"{name}.txt"
        for part in filter(None, (folder.vectors, *folder.joints)):
            yield folder.source / part / f"{name}.npy"


def convert(folder: Folder, name: str) -> tuple[NDArray, str]:
    """The features of a clip, and which folder they come from. Refusal where there are none."""
    # Another variant than that of the stored vectors is better made from the joints themselves.
    stored, joints = (folder.vectors,), folder.joints
    parts = stored + joints if folder.variant == "original" else joints + stored
    for part in filter(None, parts):
        if (folder.source / part / f"{name}.npy").is_file():
            return _convert_file(folder, part, name, False), part
    plain = unmirrored(name)
    if plain:
        for part in filter(None, (*folder.joints, folder.vectors)):
            if not (folder.source / part / f"{plain}.npy").is_file():
                continue
            if not folder.mirror:
                raise Refusal("mirrored copies are turned off", f"{part}/{plain}.npy")
            return _convert_file(folder, part, plain, True), f"{part}, mirrored"
    looked = ", ".join(filter(None, (folder.vectors, *folder.joints)))
    raise Refusal("motion file missing", f"{name}.npy in {looked}")


def _convert_file(folder: Folder, part: str, name: str, mirrored: bool) -> NDArray:
    path = folder.source / part / f"{name}.npy"
    kind = Representation.of(folder.feature_dim)
    if part == folder.vectors:
        features = _load_features(path, kind)
        features = kind.mirrored(features) if mirrored else features
        if folder.source_fps == folder.fps and folder.variant == "original":
            return features
        return _encoded(folder, kind, kind.to_joints(features.astype(np.float64)))
    joints = _load_joints(path, kind) * folder.metres_a_unit
    if kind is HUMANML3D:
        return _encoded(folder, kind, mirror_joints(joints) if mirrored else joints)
    features = _encoded(folder, kind, joints)
    return kind.mirrored(features) if mirrored else features


def _encoded(folder: Folder, kind: Representation, joints: NDArray) -> NDArray:
    if folder.source_fps != folder.fps:
        joints = resampled_joints(joints, folder.source_fps, folder.fps, kind)
    if kind is HUMANML3D:
        return uniform_features(joints, folder.offsets, folder.fps, folder.variant)
    try:
        return kind.from_joints(joints, folder.fps)
    except ScaMoError as error:
        raise Refusal("features cannot be computed", str(error)) from None


def _load_features(path: Path, kind: Representation) -> NDArray:
    features = load_array(path)
    if kind is HUMANML3D and features.ndim == 2 and features.shape[1] == WHOLE_BODY_DIM:
        features = _of_body(features)
    if features.ndim != 2 or features.shape[1] != kind.feature_dim or features.dtype.kind != "f":
        found = f"{path.parent.name}/{path.name}: {features.dtype} {list(features.shape)}"
        raise Refusal("wrong shape", f"{found}, expected float [frames, {kind.feature_dim}]")
    bad = ~np.isfinite(features)
    if bad.any():
        frame, column = np.argwhere(bad)[0]
        detail = f"frame {frame}, feature {column}, {int(bad.sum())} values in all"
        raise Refusal("NaN or infinite features", detail)
    if not len(features):
        raise Refusal("too short", "no frames")
    return features


def _of_body(features: NDArray) -> NDArray:
    """Of the features of a whole body those of its first 22 joints."""
    bones = WHOLE_BODY_JOINTS - 1
    first = np.cumsum([HUMANML3D.root.stop, 3 * bones, 6 * bones]).tolist()
    parts = (HUMANML3D.positions, HUMANML3D.rotations, HUMANML3D.velocities)
    kept = [features[:, at : at + part.stop - part.start] for at, part in zip(first, parts, strict=True)]
    return np.concatenate([features[:, HUMANML3D.root], *kept, features[:, -4:]], axis=1)


def _load_joints(path: Path, kind: Representation) -> NDArray:
    joints = load_array(path)
    counts = (kind.n_joints, *(MORE_JOINTS if kind is HUMANML3D else ()))
    if joints.ndim != 3 or joints.shape[1] not in counts or joints.shape[2] != 3 or joints.dtype.kind != "f":
        found = f"{path.parent.name}/{path.name}: {joints.dtype} {list(joints.shape)}"
        raise Refusal("wrong shape", f"{found}, expected float [frames, {kind.n_joints}, 3]")
    if joints.shape[0] < 2:
        raise Refusal("too short", f"{joints.shape[0]} frames of joints, expected at least 2")
    joints = joints[:, : kind.n_joints]
    if not np.isfinite(joints).all():
        frame, joint = np.argwhere(~np.isfinite(joints))[0][:2]
        raise Refusal("NaN or infinite joints", f"frame {frame}, joint {joint}")
    return joints


def _texts(source: Path) -> str:
    """The folder of the captions."""
    if not source.is_dir():
        raise ScaMoError(f"{source}: no such folder")
    check_texts(source)
    return next(folder for folder in TEXTS if (source / folder).is_dir())


def _folders(source: Path) -> tuple[str | None, tuple[str, ...]]:
    """The folders of features and of joints."""
    if (source / "motion_data/smplx_322").is_dir() and not (source / "motion_data/vector_263").is_dir():
        raise ScaMoError(f"{source}: motion_data/smplx_322 holds SMPL-X poses: use `scamo prepare motionx`")
    vectors = next((folder for folder in VECTORS if (source / folder).is_dir()), None)
    joints = tuple(folder for folder in JOINTS if (source / folder).is_dir())
    if vectors is None and not joints:
        raise ScaMoError(f"{source}: has none of {', '.join(f'{name}/' for name in (*VECTORS, *JOINTS))}")
    return vectors, joints


def _spread(names: list[tuple[str, str]]) -> Iterator[str]:
    """All names, from all over the list."""
    step = max(1, len(names) // PROBED_CLIPS)
    for start in range(step):
        yield from (name for _, name in names[start::step])


def _probed(source: Path, folder: str, names: list[tuple[str, str]], ndim: int) -> list[NDArray]:
    """Some of the arrays of a folder."""
    found: list[NDArray] = []
    for name in _spread(names):
        if (source / folder / f"{name}.npy").is_file():
            try:
                array = load_array(source / folder / f"{name}.npy")
            except Refusal:
                continue
            if array.ndim == ndim and array.size:
                found.append(array)
            if len(found) == PROBED_CLIPS:
                break
    return found


def _kind(
    source: Path,
    vectors: str | None,
    joints: tuple[str, ...],
    names: list[tuple[str, str]],
    units: str | float | None,
) -> tuple[Representation, float]:
    """What most of the stored features are, or else what can be made of most joints; and metres a unit."""
    found = None
    if vectors is not None:
        widths = Counter(array.shape[1] for array in _probed(source, vectors, names, 2))
        if widths:
            width = widths.most_common(1)[0][0]
            try:
                found = HUMANML3D if width == WHOLE_BODY_DIM else Representation.of(width)
            except ScaMoError as error:
                raise ScaMoError(f"{source / vectors}: {error}") from None
    bodies = [array for folder in joints for array in _probed(source, folder, names, 3)]
    if found is None:
        counts = Counter(22 if array.shape[1] in MORE_JOINTS else array.shape[1] for array in bodies)
        known = [count for count, _ in counts.most_common() if count in OF_JOINTS]
        if counts and not known:
            has = ", ".join(map(str, sorted(counts)))
            raise ScaMoError(f"{source / joints[0]}: arrays of {has} joints, expected 22 or KIT-ML's 21")
        found = OF_JOINTS[known[0]] if known else HUMANML3D
    if units is not None:
        return found, unit_of(units)
    return found, _metres_a_unit(source, found, bodies)


def _metres_a_unit(source: Path, kind: Representation, bodies: list[NDArray]) -> float:
    legs = []
    for array in bodies:
        for side in ("left", "right"):
            chain = [kind.joint_names.index(f"{side}_{joint}") for joint in ("hip", "knee", "ankle")]
            if array.shape[1] >= kind.n_joints:
                legs.append(np.linalg.norm(np.diff(array[0, chain], axis=0), axis=-1).sum())
    legs = [leg for leg in legs if math.isfinite(leg) and leg > 0]
    if not legs:
        return 1.0
    leg = float(np.median(legs))
    for name in ("m", "cm", "mm"):
        if LEG_M[0] <= leg * UNITS[name] <= LEG_M[1]:
            return UNITS[name]
    raise ScaMoError(
        f"{source}: legs of {leg:g} units are {LEG_M[0]} to {LEG_M[1]} m in none of m, cm, mm; give the unit"
    )


def _rates(
    kind: Representation, vectors: str | None, fps: float | None, source_fps: float | None
) -> tuple[float, float]:
    """Frames a second of the dataset and of the files."""
    for name, value in (("fps", fps), ("source_fps", source_fps)):
        if value is not None and not 0 < value < math.inf:
            raise ScaMoError(f"{name} = {value}: expected a positive number")
    if vectors is not None and vectors.endswith("vector_263") and fps is None and source_fps is None:
        raise ScaMoError(
            f"source_fps: Motion-X's files in {vectors}/ have 30 frames a second, unless resampled; "
            "say which they have"
        )
    rate = kind.fps if fps is None else fps
    source_rate = rate if source_fps is None else source_fps
    if rate != source_rate and kind not in OF_JOINTS.values():
        raise ScaMoError(
            f"source_fps = {source_rate:g}: {kind.feature_dim} features cannot be resampled, only 263 and 251"
        )
    return rate, source_rate


def _common_skeleton(source: Path, vectors: str, names: list[tuple[str, str]]) -> NDArray[np.float64] | None:
    """The skeleton that the stored features share, or None: clips made from joints must look alike."""
    found = []
    for array in _probed(source, vectors, names, 2):
        first = _of_body(array[:1]) if array.shape[1] == WHOLE_BODY_DIM else array[:1]
        if first.shape[1] == HUMANML3D.feature_dim and np.isfinite(first).all():
            offsets = np.asarray(offsets_from_joints(features_to_joints(first)[0]), dtype=np.float64)
            found.append(offsets)
    if not found:
        return None
    lengths = np.linalg.norm(np.stack(found), axis=-1)
    return found[0] if np.ptp(lengths, axis=0).max() < SAME_BONE_M else None
