"""The 296 features per frame of SnapMoGen, 30 fps, read as joints and true rotations of its 24-joint body.

| slice     | feature                                                                                       |
|-----------|-----------------------------------------------------------------------------------------------|
| `0`       | the turn that removes the heading: how much larger it is in the next frame, radians           |
| `1:3`     | the root's step in X and Z to the next frame, seen from this frame's heading                  |
| `3`       | the root's height                                                                             |
| `4:148`   | 24 x 6 rotations in the world, heading removed                                                |
| `148:220` | 24 x 3 joint positions: X and Z from the root, heading removed, Y above the floor             |
| `220:292` | 24 x 3 steps of these positions to the next frame                                             |
| `292:296` | contacts of left ankle and ball, right ankle and ball                                         |

As the public script of the format's authors makes them (snap-research/SnapMoGen, motion_process_bvh.py):

- 6-d is the first two *columns* of the matrix, column after column (the 272 features hold rows), and turns
  the body's T-pose, not the parent joint.
- The joints are in the order of the BVH files. The root's rotation and place are a node's of its own; the
  pelvis lies on it and carries the legs.
- Lengths are those of the BVH files, which name no unit. The script's thresholds for feet are centimetres
  there, and so they are read here: the body is a cartoon's, its head joint less than a metre above the floor.

Ours: the script writes the root's step as frame t sees it, but its recovery turns it back by the heading of
frame t + 1; here it is turned back by that of frame t.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from scamo.errors import ScaMoError
from scamo.motion.features272 import from_rows

JOINT_NAMES: tuple[str, ...] = (
    "root",
    "spine1",
    "spine2",
    "spine3",
    "neck1",
    "neck2",
    "head",
    "left_collar",
    "left_shoulder",
    "left_elbow",
    "left_wrist",
    "right_collar",
    "right_shoulder",
    "right_elbow",
    "right_wrist",
    "pelvis",
    "left_hip",
    "left_knee",
    "left_ankle",
    "left_foot",
    "right_hip",
    "right_knee",
    "right_ankle",
    "right_foot",
)
N_JOINTS = len(JOINT_NAMES)
PARENTS: tuple[int, ...] = (
    *(-1, 0, 1, 2, 3, 4, 5),
    *(3, 7, 8, 9, 3, 11, 12, 13),
    *(0, 15, 16, 17, 18, 15, 20, 21, 22),
)
MIRROR_PAIRS = ((7, 11), (8, 12), (9, 13), (10, 14), (16, 20), (17, 21), (18, 22), (19, 23))

FEATURE_DIM = 296
ROOT = slice(0, 4)
ROTATIONS = slice(4, 148)
POSITIONS = slice(148, 220)
VELOCITIES = slice(220, 292)
CONTACTS = slice(292, 296)

FORMAT_FPS = 30.0
UNIT_M = 0.01


def to_joints(features: Any) -> Any:
    """Joint positions from the root's steps and turns and the positions.

    features: (..., T, 296) numpy array or torch tensor (leading dimensions are batches).
    Returns (..., T, 24, 3) metres of the same kind. numpy: summed in float64, returned as float32 (float64
    for float64). torch: differentiable, on the tensor's device, in its dtype or, below 32 bits, in float32.
    The first frame's root stands at X = Z = 0 and faces +Z. Raises ScaMoError for another shape.
    """
    data, xp = _read(features)
    cos, sin, root_x, root_z = _way(data, xp)
    places = data[..., POSITIONS].reshape((*data.shape[:-1], N_JOINTS, 3))
    x, z = _back(places[..., 0], places[..., 2], cos[..., None], sin[..., None])
    joints = UNIT_M * xp.stack([x + root_x[..., None], places[..., 1], z + root_z[..., None]], -1)
    return joints.astype(np.float32) if xp is np and features.dtype != np.float64 else joints


def to_rotations(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotations and the way of the root.

    features: (..., T, 296). Returns rotations (..., T, 24, 3, 3) relative to the parent joint, the root's in
    the world, orthonormal whatever the features hold, and root (..., T, 3) metres, both float64; frames as
    `to_joints` places them. Raises ScaMoError for another shape.
    """
    data, _ = _read(np.asarray(features))
    cos, sin, root_x, root_z = _way(data, np)
    # The transpose of the matrix with these two columns has them as rows.
    columns = data[..., ROTATIONS].reshape((*data.shape[:-1], N_JOINTS, 2, 3))
    absolute = from_rows(columns).swapaxes(-1, -2)
    local = absolute.copy()
    parents = list(PARENTS[1:])
    local[..., 1:, :, :] = absolute[..., parents, :, :].swapaxes(-1, -2) @ absolute[..., 1:, :, :]
    x, z = _back(absolute[..., 0, 0, :], absolute[..., 0, 2, :], cos[..., None], sin[..., None])
    local[..., 0, 0, :], local[..., 0, 2, :] = x, z
    return local, UNIT_M * np.stack([root_x, data[..., 3], root_z], -1)


def _back(x: Any, z: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
    """X and Z turned about Y against the angle with this cosine and sine."""
    return x * cos - z * sin, z * cos + x * sin


def _read(features: Any) -> tuple[Any, Any]:
    """The features in the dtype to compute in, and numpy or torch."""
    if features.ndim < 2 or features.shape[-1] != FEATURE_DIM or not features.shape[-2]:
        raise ScaMoError(
            f"features: expected shape (..., frames, {FEATURE_DIM}), got {tuple(features.shape)}"
        )
    if isinstance(features, np.ndarray):
        return features.astype(np.float64), np
    import torch

    return (features.float() if features.dtype.itemsize < 4 else features), torch


def _way(data: Any, xp: Any) -> tuple[Any, Any, Any, Any]:
    """Cosine and sine of the turn that removes each frame's heading; the root's X and Z. Each (..., T)."""
    still = xp.zeros_like(data[..., :1, 0])
    turn = xp.concatenate([still, data[..., :-1, 0]], -1).cumsum(-1)
    cos, sin = xp.cos(turn), xp.sin(turn)
    step = _back(data[..., :-1, 1], data[..., :-1, 2], cos[..., :-1], sin[..., :-1])
    x, z = (xp.concatenate([still, part], -1).cumsum(-1) for part in step)
    return cos, sin, x, z
