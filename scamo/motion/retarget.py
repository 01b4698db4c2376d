"""From any animated skeleton to the 22 joints: metres, Y up, facing +Z at the start, at a chosen frame rate.

What a file does not say is found by rules, each of which an argument overrides:

- units: the leg, hip to knee to ankle, is nearest to 0.82 m (of ratio) in one of metres, centimetres,
  millimetres, inches and CMU's 1/0.45 inches; outside 0.55 to 1.22 m in all of them the file is refused.
- up: the axis from ankles to head at rest, if the rest pose stands, and on the average of the motion, if it
  is upright; where the two differ the file is refused.
- left and right: toes point forward on average, else the file is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from scamo.errors import ScaMoError
from scamo.motion.hierarchy import Animation
from scamo.motion.ik import CHILDREN, shortest_rotations
from scamo.motion.joint_maps import UNITS, JointMap, check_up, detect, unit_of
from scamo.motion.skeleton import (
    DEFAULT_OFFSETS,
    FACING,
    JOINT_NAMES,
    N_JOINTS,
    PARENTS,
    forward_kinematics,
)

LEG_M = 0.82
LEG_RANGE_M = (0.55, 1.22)
_LEGS = ((1, 4, 7), (2, 5, 8))
_ANKLES, _FEET, _PELVIS, _HEAD = [7, 8], [10, 11], 0, 15
_UPRIGHT = 0.8  # cosine
_SLOWEST = 8  # frames to make of one
# The turn that makes an axis Y.
_TO_Y: dict[str, tuple[tuple[int, int, int], ...]] = {
    "y": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "z": ((1, 0, 0), (0, 0, 1), (0, -1, 0)),
    "x": ((0, -1, 0), (1, 0, 0), (0, 0, 1)),
    "-y": ((-1, 0, 0), (0, -1, 0), (0, 0, 1)),
    "-z": ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
    "-x": ((0, 1, 0), (-1, 0, 0), (0, 0, 1)),
}


@dataclass(frozen=True)
class Retargeted:
    """joints: (T, 22, 3) float32 metres. rotations: (T, 22, 4) float64 quaternions w, x, y, z relative to the
    parent joint and the T-pose `offsets` (22, 3), as `forward_kinematics` takes them; they are the source's
    own, so forward kinematics misses `joints` where the source's joints are not rigid to one another.
    fps, metres_a_unit, up, joint_map: what was found or given. notes: what was repaired.
    """

    joints: NDArray[np.float32]
    rotations: NDArray[np.float64]
    offsets: NDArray[np.float64]
    fps: float
    metres_a_unit: float
    up: str
    joint_map: str
    notes: tuple[str, ...] = ()


def retarget(
    animation: Animation,
    joint_map: JointMap | None = None,
    *,
    fps: float = 20.0,
    units: str | float | None = None,
    up: str | None = None,
    target_offsets: NDArray[np.floating] | None = None,
    skip_frames: int | None = None,
    ground: bool = True,
    face_forward: bool = True,
) -> Retargeted:
    """The 22 joints of an animation.

    joint_map: None finds it by the names of the joints. fps: frames are left out where the rates divide, else
    interpolated. units: metres a unit or one of m, cm, mm, inch, cmu; up: x, y, z, -x, -y or -z; skip_frames:
    calibration at the start; None: as the map says or the rules above find.
    target_offsets: (22, 3) metres, a T-pose: every bone turns as the source's does from its rest pose, and
    the root's path is scaled by the ratio of the legs. None keeps the source's joints where they are.
    ground: put the lowest joint of the clip at Y = 0. face_forward: turn and move the clip so that it starts
    at X = Z = 0 facing +Z.
    Raises ScaMoError saying what cannot be found or is wrong.
    """
    if not np.isfinite(fps) or fps <= 0:
        raise ScaMoError(f"fps: expected a positive number, got {fps}")
    if animation.fps < fps / _SLOWEST:
        raise ScaMoError(f"{animation.fps:g} frames a second are too few to make {fps:g} of them")
    chosen = detect(animation.hierarchy) if joint_map is None else joint_map
    chosen.check(animation.hierarchy)
    skip = chosen.skip_frames if skip_frames is None else skip_frames
    if len(animation) <= skip:
        raise ScaMoError(f"{len(animation)} frames, of which the first {skip} are calibration")
    animation, notes = _without_lost_frames(chosen.repaired(animation).frames(slice(skip, None)))
    animation = animation.resampled(fps)

    weights = chosen.weights(animation.hierarchy)
    used = np.flatnonzero(weights.any(0))
    places, turned = animation.forward_kinematics(used)
    points = weights[:, used] @ places[:, used]
    rest = weights @ animation.hierarchy.rest_places()

    leg = _leg(points)
    given = units if units is not None else chosen.units
    scale = unit_of(given) if given is not None else _unit(leg, animation.metres_a_unit)
    found_up = check_up(up) if up is not None else chosen.up or _up_axis(rest, points)
    to_y = np.array(_TO_Y[found_up], dtype=np.float64)
    points = points @ to_y.T * scale
    _refuse_swapped_sides(points)

    target = None if target_offsets is None else _checked(target_offsets)
    alignment, offsets = _rest_alignment(rest * scale, DEFAULT_OFFSETS if target is None else target)
    drivers = chosen.drivers(animation.hierarchy)
    world = to_y @ turned[:, drivers] @ np.swapaxes(alignment, -1, -2)
    root = points[:, _PELVIS]
    if target is not None:
        offsets = target
        ratio = _leg(forward_kinematics(np.tile([1.0, 0, 0, 0], (1, N_JOINTS, 1)), target)) / (leg * scale)
        root = root * ratio
    local = world.copy()
    local[:, 1:] = np.swapaxes(world[:, list(PARENTS[1:])], -1, -2) @ world[:, 1:]
    joints = points if target is None else forward_kinematics(local, offsets, root)

    if face_forward:
        x, _, z = _forward(joints[0], np.array([0.0, 1, 0]))
        if np.hypot(x, z) < 1e-8:
            raise ScaMoError("frame 0 faces nowhere: hips and shoulders have no horizontal extent")
        turn = Rotation.from_euler("Y", -np.arctan2(x, z)).as_matrix()
        start = joints[0, _PELVIS] * [1, 0, 1]
        joints = (joints - start) @ turn.T
        local[:, 0] = turn @ local[:, 0]
    if ground:
        joints = joints - [0, joints[..., 1].min(), 0]
    quaternions = Rotation.from_matrix(local.reshape(-1, 3, 3)).as_quat()[:, [3, 0, 1, 2]]
    return Retargeted(
        joints.astype(np.float32),
        quaternions.reshape(len(joints), N_JOINTS, 4),
        offsets,
        float(fps),
        scale,
        found_up,
        chosen.name,
        notes,
    )


def _without_lost_frames(animation: Animation) -> tuple[Animation, tuple[str, ...]]:
    """Frames that recording lost hold zeros; the nearest frame takes their place."""
    at_zero = ~animation.translations[:, 0].any(-1)
    lost = at_zero & (np.abs(animation.rotations[:, 0, 0]) > 1 - 1e-12)
    if not lost.any() or 2 * lost.sum() > len(lost):
        return animation, ()
    good = np.flatnonzero(~lost)
    frames = np.arange(len(lost))
    after = good[np.minimum(np.searchsorted(good, frames), len(good) - 1)]
    before = good[np.maximum(np.searchsorted(good, frames, side="right") - 1, 0)]
    nearest = np.where(np.abs(frames - before) <= np.abs(after - frames), before, after)
    return animation.frames(nearest), (f"{int(lost.sum())} empty frames filled from their neighbours",)


def _leg(points: NDArray[np.float64]) -> float:
    """Hip to knee to ankle, the mean of both legs and of all frames."""
    lengths = [
        np.linalg.norm(points[:, a] - points[:, b], axis=-1).mean() for leg in _LEGS for a, b in pairwise(leg)
    ]
    return float(sum(lengths) / 2)


def _unit(leg: float, said: float | None) -> float:
    low, high = LEG_RANGE_M
    if said is not None and low <= leg * said <= high:
        return said
    name = min(UNITS, key=lambda unit: abs(np.log(max(leg, 1e-12) * UNITS[unit] / LEG_M)))
    if not low <= leg * UNITS[name] <= high:
        raise ScaMoError(
            f"units: legs of {leg:g} units are {low} to {high} m in none of {', '.join(UNITS)}; give the unit"
        )
    return UNITS[name]


def _axis(direction: NDArray[np.float64]) -> str | None:
    """The axis that a vector lies along, if its length is at most 1 and it does."""
    k = int(np.abs(direction).argmax())
    if abs(direction[k]) < _UPRIGHT:
        return None
    return ("" if direction[k] > 0 else "-") + "xyz"[k]


def _up_axis(rest: NDArray[np.float64], points: NDArray[np.float64]) -> str:
    def unit(v: NDArray[np.float64]) -> NDArray[np.float64]:
        return v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-12)

    above, below = rest[_HEAD] - rest[_PELVIS], rest[_ANKLES].mean(0) - rest[_PELVIS]
    stands = float(unit(above) @ unit(below)) < -_UPRIGHT
    at_rest = _axis(unit(above - below)) if stands else None
    moving = _axis(unit(points[:, _HEAD] - points[:, _ANKLES].mean(1)).mean(0))
    if at_rest is None and moving is None:
        raise ScaMoError("up: neither the rest pose nor the motion stands along an axis; give the up axis")
    if None not in (at_rest, moving) and at_rest != moving:
        raise ScaMoError(
            f"up: the rest pose stands along {at_rest}, the motion along {moving}; give the up axis"
        )
    return at_rest or moving or ""


def _forward(points: NDArray[np.float64], above: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where poses (..., 22, 3) face, of any length, square to the direction `above` (..., 3)."""
    right_hip, left_hip, right_shoulder, left_shoulder = FACING
    across = points[..., right_hip, :] - points[..., left_hip, :]
    across = across + points[..., right_shoulder, :] - points[..., left_shoulder, :]
    return np.cross(above, across)


def _refuse_swapped_sides(points: NDArray[np.float64]) -> None:
    toes = (points[:, _FEET] - points[:, _ANKLES]).mean(1)
    # The body's own axis: who lies has the toes up.
    forward = _forward(points, points[:, _HEAD] - points[:, _PELVIS])
    if float((toes * forward).sum(-1).mean()) < 0:
        raise ScaMoError(
            "toes point backwards: left and right are exchanged in the joint map or the file is left-handed"
        )


def _checked(offsets: NDArray[np.floating]) -> NDArray[np.float64]:
    found = np.asarray(offsets).astype(np.float64)
    if found.shape != (N_JOINTS, 3) or not np.isfinite(found).all():
        raise ScaMoError(f"target_offsets: expected ({N_JOINTS}, 3) finite metres, got shape {found.shape}")
    short = np.linalg.norm(found[1:], axis=-1) < 1e-6
    if short.any():
        joint = int(np.argmax(short)) + 1
        raise ScaMoError(f"target_offsets: joint {joint} ({JOINT_NAMES[joint]}) has a bone of no length")
    return found


def _rest_alignment(
    rest: NDArray[np.float64], wanted: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For every joint the rotation (22, 3, 3) from the source's rest pose to the T-pose, and the source's
    offsets (22, 3) in that pose.

    A joint first turns as its parent, then by the shortest way; where bones leave together, by the best fit.
    """
    turns = np.tile(np.eye(3), (N_JOINTS, 1, 1))
    offsets = np.zeros((N_JOINTS, 3))
    for joint, children in enumerate(CHILDREN):
        before = turns[PARENTS[joint]] if joint else np.eye(3)
        ends = list(children)
        bones = (rest[ends] - rest[joint]) @ before.T
        lengths = np.linalg.norm(bones, axis=-1)
        aims = np.asarray(wanted, dtype=np.float64)[ends]
        extra = np.eye(3)
        if len(ends) > 1 and lengths.min() > 0:
            extra = Rotation.align_vectors(aims, bones)[0].as_matrix()
        elif ends and lengths[0] > 0:
            extra = shortest_rotations(bones[0] / lengths[0], aims[0] / np.linalg.norm(aims[0]))
        turns[joint] = extra @ before
        offsets[ends] = bones @ extra.T
    return turns, offsets
