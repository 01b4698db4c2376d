"""What the motions of a dataset measure, clip by clip, and which of them are the same motion.

`scamo.data.checks` looks for faults, `scamo.data.report` describes and draws; both read clips through this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scamo.data.dataset import Caption, MotionDataset
from scamo.errors import ScaMoError
from scamo.motion import measures
from scamo.motion.representation import HUMANML3D, KIT_ML, SMPL_272, SNAPMOGEN, Representation
from scamo.motion.skeleton import CHAINS, FACING, LEFT_FOOT, N_JOINTS, PARENTS, RIGHT_FOOT

STILL_SPEED = 0.1  # m/s: a body whose fastest joint is slower does not move
STATIC_SHARE = 0.95  # of a clip's steps that are still: the clip is static

# What `measure` returns, with its unit.
MEASURES = {
    "speed": "m/s",  # of the root over the floor, mean
    "peak_speed": "m/s",  # of the fastest joint in the fastest step
    "jerk": "m/s^3",
    "foot_skate": "share",
    "bone_drift": "share",
    "penetration_mm": "mm",
    "root_height": "m",  # mean
    "lowest": "m",  # joint of all frames
    "highest": "m",
    "contact": "share",  # of feet and frames
    "still": "share",  # of steps
}

# What motion of people can be: a clip beyond them is named by `implausible`.
STEP_ERROR_M = 1e-4  # between the velocities and the steps of the recovered joints, metres a frame
BONE_DRIFT = 0.01
FLOOR_M = (-0.02, 0.15)  # the lowest foot of a clip
ROOT_HEIGHT_M = (0.0, 2.5)
BODY_M = (0.5, 2.5)  # ball of the foot to head along the bones; outside, the unit is not the metre
HEAD_ABOVE_M = 0.1  # the pelvis, on average
TURN_RAD_S = 25.0
SPEED_M_S = 20.0
FACING_DEG = 5.0
SMOOTHED_DEG = 60.0  # of a body that begins to turn at once
# The bones from a foot over the spine to the head.
_UPRIGHT = np.array([*CHAINS[1][1:], *CHAINS[2][1:]]) - 1

# Pelvis, head, left and right wrist, left and right ankle by number of features: what a fingerprint looks at.
# Mirrored, the sides change places.
MARKS = {
    HUMANML3D.feature_dim: (0, 15, 20, 21, 7, 8),
    SMPL_272.feature_dim: (0, 15, 20, 21, 7, 8),
    KIT_ML.feature_dim: (0, 4, 10, 7, 18, 13),
    SNAPMOGEN.feature_dim: (0, 6, 10, 14, 18, 22),
}
_SWAPPED = (0, 1, 3, 2, 5, 4)
_INSTANTS = 8
_POINTS = _INSTANTS * len(_SWAPPED)
FINGERPRINT = _POINTS * 3

SAME_M = 0.001  # root mean square distance of fingerprints: the same motion, rounded otherwise
NEAR_M = 0.03  # a variant: cleaned, corrected, retargeted a little, or mirrored on unequal sides
NEAR_FRAMES = 0.02  # by which the lengths of variants may differ
_AXES = 12  # of the fingerprints' space that the search tree has
_NEIGHBOURS = 8


def recovered(features: NDArray, representation: Representation) -> NDArray[np.float64]:
    """Joints (T, n_joints, 3) of a clip (T, feature_dim), summed and returned in float64."""
    return representation.to_joints(np.asarray(features, dtype=np.float64))


def measure(features: NDArray, joints: NDArray, representation: Representation, fps: float) -> list[float]:
    """The values of MEASURES for one finite clip; NaN where its body or its features have no such thing."""
    values = dict.fromkeys(MEASURES, float("nan"))
    if representation.n_joints == N_JOINTS:
        physics = measures.physics(joints, fps)
        values["penetration_mm"] = physics.pop("foot_penetration_mm")
        values |= physics
    else:
        values["jerk"] = measures.jerk(joints, fps)
    values["root_height"] = float(joints[:, 0, 1].mean())
    values["lowest"], values["highest"] = float(joints[..., 1].min()), float(joints[..., 1].max())
    if representation.contacts is not None:
        values["contact"] = float(features[:, representation.contacts].mean(dtype=np.float64))
    if len(joints) > 1:
        steps = np.linalg.norm(np.diff(joints[:, 0, [0, 2]], axis=0), axis=-1)
        fastest = measures.peaks(joints, fps, 1)
        values["speed"] = float(steps.mean() * fps)
        values["peak_speed"] = float(fastest.max())
        values["still"] = float((fastest < STILL_SPEED).mean())
    return list(values.values())


def head_above(joints: NDArray, representation: Representation) -> float:
    """How far the head is above the pelvis, metres, on average."""
    pelvis, head = MARKS[representation.feature_dim][:2]
    return float((joints[:, head, 1] - joints[:, pelvis, 1]).mean())


def step_errors(features: NDArray, representation: Representation) -> tuple[NDArray, NDArray]:
    """How far the joints' steps are from the velocity channels, metres (T - 1,), as seen by the body.

    Also a mask of the steps at which the 263 and 251 features turn across ±180°: there the original changes
    the sign of the yaw step. That is a known oddity and no fault, so their error is that of the other sign.
    """
    places = features[:, representation.positions].reshape(len(features), -1, 3).astype(np.float64)
    said = features[:, representation.velocities].reshape(len(features), -1, 3)
    said = said[:, said.shape[1] - places.shape[1] :]
    if representation in (SMPL_272, SNAPMOGEN):
        said = said[1:] if representation is SMPL_272 else said[:-1]
        off = abs(np.diff(places, axis=0) - said).max((1, 2)) * representation.unit
        return off, np.zeros(len(off), dtype=bool)
    before, after = places[:-1], places[1:].copy()
    after[..., [0, 2]] += features[:-1, None, 1:3]
    turn = 2 * features[:-1, :1].astype(np.float64)

    def steps(sign: int) -> NDArray:
        cos, sin = np.cos(turn), sign * np.sin(turn)
        moved = after.copy()
        moved[..., 0] = after[..., 0] * cos - after[..., 2] * sin
        moved[..., 2] = after[..., 2] * cos + after[..., 0] * sin
        return abs(moved - before - said[:-1]).max((1, 2)) * representation.unit

    off = steps(1)
    crossing = np.zeros(len(off), dtype=bool)
    if (off > STEP_ERROR_M).any():
        other = steps(-1)
        crossing = (off > STEP_ERROR_M) & (other <= STEP_ERROR_M)
        off = np.where(crossing, other, off)
    return off, crossing


def implausible(
    features: NDArray,
    joints: NDArray,
    errors: NDArray,
    representation: Representation,
    fps: float,
    variant: str = "original",
) -> Iterator[tuple[Literal["error", "warning"], str, str, str]]:
    """What of a finite clip people do not do: severity, kind, what was found and what was expected.

    features (T, feature_dim), their joints (T, n_joints, 3) and step errors (T - 1,). An error is what the
    format itself excludes. The "fixed" variant's floor is not the lowest point of a clip, and its heading is
    smoothed from the first frame on.
    """
    fixed = variant == "fixed"
    if representation.contacts is not None:
        contacts = features[:, representation.contacts]
        odd = (contacts != 0) & (contacts != 1)
        if odd.any():
            frame = int(odd.any(1).argmax())
            found = f"{contacts[frame][odd[frame]][0]:g} in frame {frame}, {int(odd.sum())} values in all"
            yield "error", "contacts", found, "0 or 1"

    if representation is SMPL_272:
        turns = np.arctan2(features[:, 4], features[:, 2])
    elif representation is SNAPMOGEN:
        turns = np.remainder(features[:, 0] + np.pi, 2 * np.pi) - np.pi  # the script's are within two turns
    else:
        turns = 2 * features[:, 0]
    frame = int(abs(turns).argmax())
    if abs(turns[frame]) > np.pi * (1 + 1e-6):
        found = f"half a yaw step of {features[frame, 0]:.3g} rad in frame {frame}"
        yield "error", "yaw", found, "within ±π/2: an arcsine"
    elif abs(turns[frame]) * fps > TURN_RAD_S:
        found = f"turns by {abs(turns[frame]) * fps:.1f} rad/s in frame {frame}"
        yield "warning", "yaw", found, f"at most {TURN_RAD_S:g} rad/s: a jump, or a heading hard to tell?"

    if len(joints) > 1:
        frame, count = int(errors.argmax()), int((errors > STEP_ERROR_M).sum())
        if count:
            found = f"joints move {errors[frame] * 1000:.1f} mm otherwise after frame {frame}, {count} in all"
            expected = f"steps as the velocity channels say, within {STEP_ERROR_M * 1000:g} mm"
            yield "warning", "velocities", found, expected
        speeds = np.linalg.norm(np.diff(joints, axis=0), axis=-1).max(1) * fps
        frame = int(speeds.argmax())
        if speeds[frame] > SPEED_M_S:
            found = f"a joint at {speeds[frame]:.1f} m/s after frame {frame}"
            yield "warning", "speed", found, f"at most {SPEED_M_S:g} m/s: a jump?"

    above = head_above(joints, representation)
    if above < HEAD_ABOVE_M:
        expected = f"{HEAD_ABOVE_M:g} m or more: not lying or upside down throughout"
        yield "warning", "up axis", f"the head is {above:.2f} m above the pelvis on average", expected
    height = joints[:, 0, 1]
    if height.min() < ROOT_HEIGHT_M[0] or height.max() > ROOT_HEIGHT_M[1]:
        found = f"root height {height.min():.2f} to {height.max():.2f} m"
        yield "warning", "root height", found, f"{ROOT_HEIGHT_M[0]:g} to {ROOT_HEIGHT_M[1]:g} m"
    if representation.n_joints != N_JOINTS:
        return
    feet = joints[:, [*LEFT_FOOT, *RIGHT_FOOT], 1].min(1)
    lowest = float(np.quantile(feet, 0.1) if fixed else feet.min())
    if not FLOOR_M[0] <= lowest <= FLOOR_M[1]:
        expected = f"{FLOOR_M[0]:g} to {FLOOR_M[1]:g} m: feet on the floor"
        yield "warning", "floor", f"the lowest foot is at {lowest:.3f} m", expected
    bones = np.linalg.norm(joints[:, 1:] - joints[:, list(PARENTS[1:])], axis=-1)
    # The range bounds the drift and is cheap.
    if (np.ptp(bones, axis=0) > BONE_DRIFT * bones.min(0)).any():
        drift = measures.bone_drift(joints)
        if drift > BONE_DRIFT:
            expected = f"constant lengths, within {BONE_DRIFT:.0%}"
            yield "warning", "bones", f"bones change by {drift:.1%} on average", expected
    body = float(bones[0, _UPRIGHT].sum())
    if not BODY_M[0] <= body <= BODY_M[1]:
        found = f"a body of {body:.3g} m along its bones"
        yield "warning", "unit", found, f"{BODY_M[0]:g} to {BODY_M[1]:g} m"
    if representation is HUMANML3D:  # the 272 features face where the pelvis points
        right_hip, left_hip, right_shoulder, left_shoulder = joints[0, list(FACING)]
        across = right_hip - left_hip + right_shoulder - left_shoulder
        angle = float(np.degrees(np.arctan2(across[2], -across[0])))
        limit = SMOOTHED_DEG if fixed else FACING_DEG
        if np.hypot(across[0], across[2]) > 0.05 and abs(angle) > limit:
            yield "warning", "facing", f"faces {angle:.0f}° from +Z in frame 0", f"+Z, within {limit:g}°"


def fingerprint(features: NDArray, joints: NDArray, representation: Representation) -> NDArray[np.float32]:
    """(FINGERPRINT,) metres: what six joints do at eight instants spread over a clip.

    Head, wrists and ankles as the body sees them; of the pelvis its height, and how far it is from where it
    began: a path that bends a little otherwise is the same motion.
    """
    instants = np.round(np.linspace(0, len(joints) - 1, _INSTANTS)).astype(int)
    marks = MARKS[representation.feature_dim]
    local = features[instants][:, representation.positions].reshape(_INSTANTS, -1, 3)
    points = np.empty((_INSTANTS, len(marks), 3), dtype=np.float32)
    points[:, 1:] = local[:, np.array(marks[1:]) - representation.first_position] * representation.unit
    pelvis = joints[instants, marks[0]]
    points[:, 0, 0], points[:, 0, 1] = 0, pelvis[:, 1]
    points[:, 0, 2] = np.hypot(*(pelvis[:, [0, 2]] - pelvis[0, [0, 2]]).T)
    return points.ravel()


def mirrored_fingerprints(prints: NDArray) -> NDArray[np.float32]:
    """Those of the same clips in a mirror."""
    points = prints.reshape(len(prints), _INSTANTS, len(_SWAPPED), 3)[:, :, list(_SWAPPED)]
    return (points * np.array([-1, 1, 1], dtype=prints.dtype)).reshape(len(prints), -1)


def measured(
    dataset: MotionDataset, clips: Iterable[int] | None = None, *, progress: bool = True
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Measures (clips, len(MEASURES)) and fingerprints (clips, FINGERPRINT) of some clips or of all.

    Both are NaN for a clip that is not finite. Clips are read one at a time.
    Raises ScaMoError if the features are of no known representation.
    """
    from tqdm import tqdm

    representation = Representation.of(dataset.feature_dim)
    chosen = list(range(dataset.n_clips) if clips is None else clips)
    table = np.full((len(chosen), len(MEASURES)), np.nan)
    prints = np.full((len(chosen), FINGERPRINT), np.nan, dtype=np.float32)
    frames = int(np.diff(dataset.clip_offsets)[chosen].sum())
    with tqdm(total=frames, desc="measure", unit="frame", unit_scale=True, disable=not progress) as bar:
        for row, clip in enumerate(chosen):
            features = dataset.clip_features(clip)
            if np.isfinite(features).all():
                joints = recovered(features, representation)
                table[row] = measure(features, joints, representation, dataset.fps)
                prints[row] = fingerprint(features, joints, representation)
            bar.update(len(features))
    return table, prints


def movement(prints: NDArray) -> NDArray[np.float32]:
    """(clips,) metres: how far a fingerprint's points stray from their mean, root mean square. All that stand
    still look alike."""
    points = prints.reshape(len(prints), _INSTANTS, -1)
    return np.sqrt(np.square(points - points.mean(1, keepdims=True)).sum((1, 2)) / _POINTS)


def copies(
    prints: NDArray[np.float32],
    frames: NDArray[np.int64],
    *,
    within: float = SAME_M,
    slack: float = 0.0,
    mirrored: bool = False,
) -> list[list[int]]:
    """Groups of two or more clips that are the same motion by their fingerprints, each ascending.

    within: root mean square distance, metres: SAME_M or NEAR_M. slack: by which share the lengths may differ.
    mirrored: also those that are the same in a mirror. A part of another clip is not found. prints that hold
    NaN are left out. Time grows as n log n: of many copies each is only compared with the nearest eight.
    """
    from scipy.spatial import cKDTree

    radius = within * _POINTS**0.5
    good = np.flatnonzero(np.isfinite(prints).all(1))
    if len(good) < 2:
        return []
    prints, frames = prints[good], frames[good]
    # A projection brings points together, never apart: what lies near in full is found in fewer dimensions.
    centre = prints.mean(0, dtype=np.float64)
    sample = prints[:: max(1, len(prints) // 5000)] - centre
    axes = np.linalg.eigh(sample.T @ sample)[1][:, -_AXES:]
    flat = (prints - centre) @ axes
    tree = cKDTree(flat)
    parent = list(range(len(good)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for turned in (False, True) if mirrored else (False,):
        for start in range(0, len(good), 4096):
            rows = np.arange(start, min(start + 4096, len(good)))
            seen = mirrored_fingerprints(prints[rows]) if turned else prints[rows]
            _, found = tree.query((seen - centre) @ axes, k=_NEIGHBOURS, distance_upper_bound=radius * 1.001)
            left, column = np.nonzero(found < len(good))
            right = found[left, column]
            keep = (rows[left] != right) & (
                abs(frames[rows[left]] - frames[right]) <= slack * frames[rows[left]]
            )
            left, right = left[keep], right[keep]
            near_enough = np.linalg.norm(seen[left] - prints[right], axis=1) <= radius
            for a, b in zip(rows[left[near_enough]].tolist(), right[near_enough].tolist(), strict=True):
                parent[root(a)] = root(b)
    groups: dict[int, list[int]] = {}
    for i in range(len(good)):
        groups.setdefault(root(i), []).append(int(good[i]))
    return [group for group in groups.values() if len(group) > 1]


def source_clip(name: str, meta: dict[str, Any], names: set[str] | dict[str, Any]) -> str:
    """The clip that a clip is a variant or a part of, or its own name.

    That is meta["source_clip"] where the source says so. Otherwise the name without the M of a mirrored copy
    ("M" + name), if there is such a clip, the rest is a number or the meta says "mirrored"; and without the
    frames of a part ("walk@40-120").
    """
    said = meta.get("source_clip")
    if isinstance(said, str) and said:
        return said
    head, slash, tail = name.rpartition("/")
    plain = f"{head}{slash}{tail[1:]}"
    if tail.startswith("M") and (plain in names or tail[1:].isdigit() or meta.get("mirrored") is True):
        name = plain
    return re.sub(r"@\d+-\d+$", "", name)


def recording(meta: dict[str, Any]) -> str | None:
    """The file that a clip was cut from, where the source says so."""
    file = meta.get("from", meta.get("file"))
    return file if isinstance(file, str) and re.search(r"\.(npz|npy|bvh|amc|csv)$", file, re.I) else None


def words(caption: str) -> list[str]:
    """Its words in lower case."""
    return re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", caption.lower())


def choose_clips(dataset: MotionDataset, *, names: Sequence[str] = (), split: str = "") -> list[int]:
    """Clip ids by name, or of a split, or all. Raises ScaMoError for a name or split that is not there."""
    if names:
        index = {name: clip for clip, name in enumerate(dataset.clip_names)}
        unknown = [name for name in names if name not in index]
        if unknown:
            raise ScaMoError(f"{dataset.folder}: has no clip {unknown[0]!r}")
        return [index[name] for name in names]
    if not split:
        return list(range(dataset.n_clips))
    dataset.items(split)  # refuses an unknown split
    return [clip for clip, its in enumerate(dataset.clip_splits) if its == split]


def clip_items(dataset: MotionDataset) -> Iterator[list[int]]:
    """The item ids of every clip, in the order of the clips."""
    order = np.argsort(dataset.item_table[:, 0], kind="stable")
    bounds = np.searchsorted(dataset.item_table[order, 0], np.arange(dataset.n_clips + 1))
    for clip in range(dataset.n_clips):
        yield order[bounds[clip] : bounds[clip + 1]].tolist()


def captions_of_items(dataset: MotionDataset, items: Sequence[int], frames: int) -> Iterator[list[Caption]]:
    """Of each item of a clip of `frames`, its captions as `DatasetWriter.add_clip` takes them.

    Those of the whole clip have the tags 0, 0.
    """
    for at, item in enumerate(items):
        start, end = dataset.item_table[item, 1:].tolist()
        tags = 0.0, 0.0
        if at or (start, end) != (0, frames):
            # Half a frame, that none is lost by rounding.
            tags = (start + 0.5) / dataset.fps, (end + 0.5) / dataset.fps
        yield [
            Caption(dataset.caption(caption), *tags, dataset.caption_meta(caption))
            for caption in dataset.captions_of(item).tolist()
        ]
