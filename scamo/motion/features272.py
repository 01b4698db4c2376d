"""Joints and true rotations ↔ the 272 features per frame of MotionStreamer and MotionMillion, 30 fps.

| slice     | feature                                                                                       |
|-----------|-----------------------------------------------------------------------------------------------|
| `0:2`     | the root's step in X and Z from the frame before, seen from that frame's heading, metres      |
| `2:8`     | the turn of the heading from the frame before, 6-d                                            |
| `8:74`    | 22 x 3 joint positions: X and Z from the root, heading removed, Y above the floor             |
| `74:140`  | 22 x 3 steps of these positions from the frame before, metres                                 |
| `140:272` | 22 x 6 rotations relative to the parent joint; the pelvis's relative to the heading           |

Conventions that the description leaves open, as in the public scripts of the format's authors
(Li-xingXiao/272-dim-Motion-Representation, representation_272.py):

- T frames of joints make T frames of features. The first one's step, turn and velocities are zero (the turn:
  the identity), so a motion begins at X = Z = 0 and faces +Z.
- The heading is where the pelvis's own Z axis points over the floor, a single frame's, not smoothed. The
  features hold the turn that *removes* it: a body that turns left, counterclockwise from above, has a
  negative sine in channel 4.
- 6-d is the first two *rows* of the matrix, row after row (the 263 features hold columns). The turn's is
  (cos, 0, sin, 0, 1, 0).
- The velocities are differences of positions that are each in its own frame's heading and root: a body that
  walks or turns at one pose has none.
- The floor is the clip's lowest joint, and the velocities are metres a frame at any frame rate.
- Rotations are SMPL's: relative to its T-pose. The features do not hold the bones' lengths, but positions and
  rotations together do (`rest_offsets`).

Ours, and the same numbers for a motion as the scripts make it: where the pelvis's Z axis is vertical the
heading of the frame before is kept (the scripts take what the rounding says); recovery reads of a turn only
its angle about Y (the scripts multiply the matrices, and a generated turn's tilt adds up), and leaves out the
first frame's step and turn, so that any part of a motion is a motion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from scamo.errors import ScaMoError
from scamo.motion.skeleton import (
    JOINT_NAMES,
    N_JOINTS,
    PARENTS,
    forward_kinematics,
    quaternions_to_matrices,
)

FEATURE_DIM = 272
ROOT_VELOCITY = slice(0, 2)
TURN = slice(2, 8)
POSITIONS = slice(8, 74)
VELOCITIES = slice(74, 140)
ROTATIONS = slice(140, 272)

# The groups inside which the format's authors average the standard deviation.
FEATURE_GROUPS: dict[str, slice] = {
    "root_velocity": ROOT_VELOCITY,
    "turn": TURN,
    "positions": POSITIONS,
    "velocities": VELOCITIES,
    "rotations": ROTATIONS,
}

FORMAT_FPS = 30.0
_COS, _SIN = 2, 4  # of the turn
_UPRIGHT = 1e-6  # horizontal length of the pelvis's unit Z axis below which it points nowhere
_OFF = 1e-3  # how far a rotation may be from one
_BONE_PARENTS = list(PARENTS[1:])


@dataclass(frozen=True)
class Encoded:
    """features: (T, 272). rotations: "true", or "fitted" to joints that came without: one of many answers, in
    which feet, head and wrists have no turn of their own (`scamo.motion.ik`)."""

    features: np.ndarray
    rotations: Literal["true", "fitted"]


def encode(
    joints: np.ndarray,
    rotations: np.ndarray | None = None,
    *,
    fps: float = FORMAT_FPS,
    dtype: Any = np.float32,
) -> Encoded:
    """The 272 features of a clip, wherever it stands and faces.

    joints: (T, 22, 3) metres, Y up, T >= 1. rotations: (T, 22, 3, 3) matrices or (T, 22, 4) quaternions
    (w, x, y, z) relative to the parent joint, the pelvis's in the world of `joints`; None: fitted to the
    joints. fps: frames a second, only used by the fit: resampling is the caller's.
    Returns features of `dtype`. Raises ScaMoError naming frame and joint for NaN or infinity, a matrix or
    quaternion that is no rotation, or a bone of no length where rotations are fitted; and for another shape.
    """
    joints = np.asarray(joints)
    if joints.ndim != 3 or joints.shape[1:] != (N_JOINTS, 3) or not len(joints):
        raise ScaMoError(f"joints: expected shape (frames, {N_JOINTS}, 3), got {joints.shape}")
    places = joints.astype(np.float64)
    _refuse_not_finite(places, "joints")
    kind: Literal["true", "fitted"] = "true"
    if rotations is None:
        from scamo.motion.ik import fit_rotations

        kind, rotations = "fitted", fit_rotations(places, fps=fps).rotations
    turns = _matrices(rotations, len(places))

    root = places[:, 0].copy()
    places[..., 1] -= places[..., 1].min()
    places[..., 0] -= root[:, :1]
    places[..., 2] -= root[:, 2:]
    cos, sin = _headings(turns[:, 0])

    frames = len(places)
    features = np.zeros((frames, FEATURE_DIM), dtype=dtype)
    step = root[1:] - root[:-1]
    features[1:, 0], features[1:, 1] = _turned(step[:, 0], step[:, 2], cos[:-1], sin[:-1])
    features[:, _COS], features[:, 6] = 1, 1
    features[1:, _COS] = cos[1:] * cos[:-1] + sin[1:] * sin[:-1]
    features[1:, _SIN] = sin[1:] * cos[:-1] - cos[1:] * sin[:-1]
    x, z = _turned(places[..., 0], places[..., 2], cos[:, None], sin[:, None])
    places[..., 0], places[..., 2] = x, z
    flat = places.reshape(frames, -1)
    features[:, POSITIONS] = flat
    features[1:, VELOCITIES] = flat[1:] - flat[:-1]
    six = features[:, ROTATIONS].reshape(frames, N_JOINTS, 2, 3)  # a view
    six[:] = turns[..., :2, :]
    six[:, 0, 0] = cos[:, None] * turns[:, 0, 0] + sin[:, None] * turns[:, 0, 2]
    return Encoded(features, kind)


def to_joints(features: Any) -> Any:
    """Joint positions from the root's steps and turns and the positions, `0:74`.

    features: (..., T, 272) numpy array or torch tensor (leading dimensions are batches).
    Returns (..., T, 22, 3) metres of the same kind. numpy: summed in float64, returned as float32 (float64
    for float64). torch: differentiable, on the tensor's device, in its dtype or, below 32 bits, in float32.
    The first frame's root stands at X = Z = 0 and faces +Z. Raises ScaMoError for another shape.
    """
    data, xp = _read(features, POSITIONS.stop)
    cos, sin, root_x, root_z = _way(data, xp)
    places = data[..., POSITIONS].reshape((*data.shape[:-1], N_JOINTS, 3))
    x, z = _turned(places[..., 0], places[..., 2], cos[..., None], -sin[..., None])
    joints = xp.stack([x + root_x[..., None], places[..., 1], z + root_z[..., None]], -1)
    return joints.astype(np.float32) if xp is np and features.dtype != np.float64 else joints


def to_rotations(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotations and the way of the root, as `forward_kinematics` takes them.

    features: (..., T, 272). Returns rotations (..., T, 22, 3, 3) relative to the parent joint, orthonormal
    whatever the features hold, and root (..., T, 3) metres, both float64; frames as `to_joints` places them.
    Raises ScaMoError for another shape.
    """
    data, _ = _read(np.asarray(features), FEATURE_DIM)
    cos, sin, root_x, root_z = _way(data, np)
    rotations = from_rows(data[..., ROTATIONS].reshape((*data.shape[:-1], N_JOINTS, 2, 3)))
    pelvis = rotations[..., 0, :, :]
    x, z = _turned(pelvis[..., 0, :], pelvis[..., 2, :], cos[..., None], -sin[..., None])
    pelvis[..., 0, :], pelvis[..., 2, :] = x, z
    return rotations, np.stack([root_x, data[..., POSITIONS.start + 1], root_z], -1)


def rest_offsets(features: np.ndarray) -> np.ndarray:
    """The rest pose (22, 3) float64, metres from the parent joint, of features (T, 272).

    It is the mean over the frames of the bones turned back by the rotations. Raises ScaMoError for another
    shape.
    """
    data, _ = _read(np.asarray(features), FEATURE_DIM)
    local = from_rows(data[..., ROTATIONS].reshape(-1, N_JOINTS, 2, 3))
    places = data[..., POSITIONS].reshape(-1, N_JOINTS, 3)
    absolute = np.empty_like(local)
    absolute[:, 0] = local[:, 0]
    for joint in range(1, N_JOINTS):
        absolute[:, joint] = absolute[:, PARENTS[joint]] @ local[:, joint]
    bones = places[:, 1:] - places[:, _BONE_PARENTS]
    offsets = np.zeros((N_JOINTS, 3))
    offsets[1:] = np.einsum("tbji,tbj->bi", absolute[:, _BONE_PARENTS], bones) / len(places)
    return offsets


def to_joints_by_rotations(features: np.ndarray, offsets: np.ndarray | None = None) -> np.ndarray:
    """Joint positions (T, 22, 3) float64 from the rotations by forward kinematics: bones of constant length.

    features: (T, 272). offsets: (22, 3) metres, the rest pose of this or another body; None: `rest_offsets`.
    Raises ScaMoError for another shape.
    """
    rotations, root = to_rotations(features)
    offsets = rest_offsets(features) if offsets is None else np.asarray(offsets, dtype=np.float64)
    return forward_kinematics(rotations, offsets, root)


def _turned(x: Any, z: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
    """X and Z after the turn about Y by the angle with this cosine and sine."""
    return x * cos + z * sin, z * cos - x * sin


def _headings(pelvis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine (T,) of the turns about Y that make the Z axes of matrices (T, 3, 3) face +Z."""
    x, z = pelvis[:, 0, 2], pelvis[:, 2, 2]
    length = np.hypot(x, z)
    known = length > _UPRIGHT
    if not known.all():
        # Of a frame without heading: the last one's before it; at the beginning the first there is.
        place = np.maximum.accumulate(np.where(known, np.arange(len(x)), -1))
        place = np.where(place < 0, int(known.argmax()), place)
        x, z, length = x[place], z[place], length[place]
        if not known.any():
            x, z, length = np.zeros(len(x)), np.ones(len(x)), np.ones(len(x))
    return z / length, -x / length


def _read(features: Any, columns: int) -> tuple[Any, Any]:
    """The first columns in the dtype to compute in, and numpy or torch."""
    if features.ndim < 2 or features.shape[-1] != FEATURE_DIM or not features.shape[-2]:
        raise ScaMoError(
            f"features: expected shape (..., frames, {FEATURE_DIM}), got {tuple(features.shape)}"
        )
    if isinstance(features, np.ndarray):
        return features[..., :columns].astype(np.float64), np
    import torch

    data = features[..., :columns]
    return (data.float() if data.dtype.itemsize < 4 else data), torch


def _way(data: Any, xp: Any) -> tuple[Any, Any, Any, Any]:
    """Cosine and sine of the turn that removes each frame's heading; the root's X and Z. Each (..., T)."""
    angle = xp.arctan2(data[..., _SIN], data[..., _COS])
    still = xp.zeros_like(angle[..., :1])
    heading = xp.concatenate([still, angle[..., 1:]], -1).cumsum(-1)
    cos, sin = xp.cos(heading), xp.sin(heading)
    step = _turned(data[..., 1:, 0], data[..., 1:, 1], cos[..., :-1], -sin[..., :-1])
    x, z = (xp.concatenate([still, part], -1).cumsum(-1) for part in step)
    return cos, sin, x, z


def from_rows(rows: np.ndarray) -> np.ndarray:
    """Rotation matrices (..., 3, 3) of their first two rows (..., 2, 3), by Gram-Schmidt."""
    matrices = np.empty((*rows.shape[:-2], 3, 3))
    first, second = rows[..., 0, :], rows[..., 1, :]
    first = first / np.maximum(np.linalg.norm(first, axis=-1, keepdims=True), 1e-12)
    second = second - (first * second).sum(-1, keepdims=True) * first
    second = second / np.maximum(np.linalg.norm(second, axis=-1, keepdims=True), 1e-12)
    matrices[..., 0, :], matrices[..., 1, :], matrices[..., 2, :] = first, second, np.cross(first, second)
    return matrices


def _matrices(rotations: np.ndarray, frames: int) -> np.ndarray:
    rotations = np.asarray(rotations, dtype=np.float64)
    if rotations.shape not in ((frames, N_JOINTS, 4), (frames, N_JOINTS, 3, 3)):
        raise ScaMoError(
            f"rotations: expected shape ({frames}, {N_JOINTS}, 3, 3) or ({frames}, {N_JOINTS}, 4) beside "
            f"{frames} frames of joints, got {rotations.shape}"
        )
    _refuse_not_finite(rotations, "rotations")
    if rotations.ndim == 3:
        off = np.abs(np.linalg.norm(rotations, axis=-1) - 1)
    else:
        # Rows of length 1, square to one another, and not a mirror.
        off = np.abs(np.einsum("tjik,tjik->tji", rotations, rotations) - 1).max(-1)
        third = np.cross(rotations[..., 0, :], rotations[..., 1, :])
        off = np.maximum(off, np.abs(third - rotations[..., 2, :]).max(-1))
    if off.max() > _OFF:
        frame, joint = (int(i) for i in np.argwhere(off > _OFF)[0])
        where = f"frame {frame}, joint {joint} ({JOINT_NAMES[joint]})"
        raise ScaMoError(f"rotations: {where}: off a rotation by {off[frame, joint]:.2g}")
    return quaternions_to_matrices(rotations) if rotations.ndim == 3 else rotations


def _refuse_not_finite(values: np.ndarray, name: str) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        frame, joint = (int(i) for i in bad[0][:2])
        raise ScaMoError(f"{name}: frame {frame}, joint {joint} ({JOINT_NAMES[joint]}) is not finite")
