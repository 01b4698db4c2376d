"""Joint rotations fitted to joint positions, for the files that want rotations (BVH, glTF).

The motions here are positions: of the rotations they say where every bone points, and nothing of its twist.
What comes out is therefore *fitted*: it puts the joints where they were, and is one of many that do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from scamo.errors import ScaMoError
from scamo.motion.skeleton import (
    DEFAULT_OFFSETS,
    JOINT_NAMES,
    N_JOINTS,
    PARENTS,
    forward_kinematics,
    quaternions_to_matrices,
)

CHILDREN: tuple[tuple[int, ...], ...] = tuple(
    tuple(j for j, parent in enumerate(PARENTS) if parent == joint) for joint in range(N_JOINTS)
)
_SPINE = (3, 6, 9)
# The shortest rotation from rest knows its twist up to this angle; beyond, it turns ever faster around the
# opposite of the rest direction, where it is not defined.
_SURE, _UNSURE = np.radians(120), np.radians(170)
_TWIST_SPEED = np.radians(400)  # a second, for going back to the shortest rotation


@dataclass(frozen=True)
class Fit:
    """A skeleton with constant bones and the rotations that bring it near to given joints.

    rotations: (T, 22, 4) float64 quaternions w, x, y, z relative to the parent joint, as
    `forward_kinematics` takes them; a joint's follow one another without a change of sign. offsets: (22, 3)
    metres, the T-pose: every joint's place relative to its parent. local: (T, 22, 3) metres, where the given
    joints are in the turned frame of their parent (the pelvis: in the world); `offsets` where no bone changes
    its length.
    error: (T, 22) metres between the joints of the skeleton and the given ones.
    """

    rotations: np.ndarray
    offsets: np.ndarray
    local: np.ndarray
    error: np.ndarray

    @property
    def joints(self) -> np.ndarray:
        """(T, 22, 3) float64: the joints of the skeleton with constant bones."""
        return forward_kinematics(self.rotations, self.offsets, self.local[:, 0])


def fit_rotations(joints: np.ndarray, *, fps: float = 20.0) -> Fit:
    """Constant bones and rotations for joints (T, 22, 3), metres.

    The bones are as long as on average. A joint with several children takes the rotation that fits them best
    (least squares), one with a single child aims its bone at it, from where the chain has come to, with the
    twist of the shortest rotation from rest relative to the parent; near the opposite of the rest direction,
    where that one spins, the twist is carried along and led back at `_TWIST_SPEED`. The spine's three joints
    share the twist between hips and shoulders. Feet, head and wrists keep the rotation of their parents.

    Raises ScaMoError for another shape, a value that is not finite or a joint that lies on its parent.
    """
    joints = np.asarray(joints, dtype=np.float64)
    if joints.ndim != 3 or joints.shape[1:] != (N_JOINTS, 3) or not len(joints):
        raise ScaMoError(f"joints: expected shape (frames, {N_JOINTS}, 3), got {joints.shape}")
    bones = joints[:, 1:] - joints[:, list(PARENTS[1:])]
    lengths = np.linalg.norm(bones, axis=-1)
    bad = np.argwhere(~(np.isfinite(lengths) & (lengths > 1e-9)))
    if len(bad):
        frame, joint = int(bad[0, 0]), int(bad[0, 1]) + 1
        raise ScaMoError(
            f"joints: frame {frame}, joint {joint} ({JOINT_NAMES[joint]}): a bone of length "
            f"{lengths[frame, joint - 1]:g} m from {JOINT_NAMES[PARENTS[joint]]} has no rotation"
        )
    offsets = _rest(bones, lengths)

    turned = np.empty((len(joints), N_JOINTS, 3, 3))  # global
    places = np.empty_like(joints)
    places[:, 0] = joints[:, 0]
    for joint, children in enumerate(CHILDREN):
        before = turned[:, PARENTS[joint]] if joint else np.broadcast_to(np.eye(3), turned[:, 0].shape)
        aims = joints[:, children] - places[:, joint, None]
        if not children:
            turned[:, joint] = before
        elif len(children) == 1:
            seen = (_transposed(before) @ aims[:, 0, :, None])[..., 0]
            turned[:, joint] = before @ _aimed(offsets[children[0]], seen, fps)
        else:
            turned[:, joint] = _best_rotations(offsets[list(children)], aims)
        places[:, children] = places[:, joint, None] + offsets[list(children)] @ _transposed(turned[:, joint])
    _share_twist(turned, offsets)

    parents = turned[:, list(PARENTS[1:])]
    local = turned.copy()
    local[:, 1:] = _transposed(parents) @ turned[:, 1:]
    rotations = Rotation.from_matrix(local.reshape(-1, 3, 3)).as_quat().reshape(len(joints), N_JOINTS, 4)
    # q and -q are one rotation; files interpolate between the numbers.
    rotations[0] *= np.where(rotations[0, :, 3:] < 0, -1, 1)
    turns = np.sign((rotations[1:] * rotations[:-1]).sum(-1, keepdims=True))
    rotations[1:] *= np.cumprod(np.where(turns == 0, 1, turns), axis=0)
    inner = joints.copy()
    inner[:, 1:] = (_transposed(parents) @ bones[..., None])[..., 0]
    error = np.linalg.norm(places - joints, axis=-1)
    return Fit(np.ascontiguousarray(rotations[..., [3, 0, 1, 2]]), offsets, inner, error)


def _transposed(matrices: np.ndarray) -> np.ndarray:
    return np.swapaxes(matrices, -1, -2)


def _rest(bones: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """T-pose offsets (22, 3): average lengths along DEFAULT_OFFSETS; where bones leave a joint together,
    their average shape, turned to stand as there."""
    default = DEFAULT_OFFSETS.astype(np.float64)
    offsets = np.zeros((N_JOINTS, 3))
    offsets[1:] = default[1:] * (lengths.mean(0) / np.linalg.norm(default[1:], axis=-1))[:, None]
    for children in CHILDREN:
        if len(children) > 1:
            ends = list(children)
            seen = bones[:, [j - 1 for j in ends]]
            shape = offsets[ends]
            # One round suffices if the shape is rigid, a few if it is not quite.
            for _ in range(5):
                shape = (seen @ _best_rotations(shape, seen)).mean(0)
            offsets[ends] = shape @ _best_rotations(default[ends], shape)
    return offsets


def _best_rotations(rest: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Rotations (..., 3, 3) that take vectors (n, 3) to (..., n, 3) with the least squared error (Kabsch)."""
    u, _, vt = np.linalg.svd(_transposed(seen) @ rest)
    u[..., -1] *= np.sign(np.linalg.det(u @ vt))[..., None]
    return u @ vt


def shortest_rotations(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Shortest rotations (..., 3, 3) from unit vectors (..., 3) to others; half a turn for opposite ones."""
    start, end = np.broadcast_arrays(start, end)
    half = start + end
    size = np.linalg.norm(half, axis=-1, keepdims=True)
    # Opposite vectors: any half turn square to them does.
    square = np.cross(start, np.eye(3)[np.abs(start).argmin(-1)])
    square /= np.linalg.norm(square, axis=-1, keepdims=True)
    half = np.where(size > 1e-9, half / np.maximum(size, 1e-9), square)
    cos = (start * half).sum(-1, keepdims=True)
    return quaternions_to_matrices(np.concatenate([cos, np.cross(start, half)], axis=-1))


def _about(axis: np.ndarray, angles: np.ndarray) -> np.ndarray:
    return Rotation.from_rotvec(angles[:, None] * axis).as_matrix()


def _aimed(offset: np.ndarray, aims: np.ndarray, fps: float) -> np.ndarray:
    """Rotations (T, 3, 3) that turn a bone at `offset` (3,) towards aims (T, 3), its parent at rest."""
    rest = offset / np.linalg.norm(offset)
    sizes = np.linalg.norm(aims, axis=-1, keepdims=True)
    ways = np.where(sizes > 1e-9, aims / np.maximum(sizes, 1e-9), rest)
    swings = shortest_rotations(rest, ways)
    # Carried along from one frame to the next without twist, a frame is turned so much against the swing's.
    carried = _transposed(swings[1:]) @ shortest_rotations(ways[:-1], ways[1:]) @ swings[:-1]
    u = np.cross(rest, np.eye(3)[np.abs(rest).argmin()])
    u /= np.linalg.norm(u)
    moved = carried @ u
    drift = np.arctan2(moved @ np.cross(rest, u), moved @ u)
    angle = np.arccos(np.clip(ways @ rest, -1, 1))
    trust = np.clip((_UNSURE - angle) / (_UNSURE - _SURE), 0, 1)
    limit = _TWIST_SPEED / fps
    twist = np.zeros(len(ways))
    for t in range(1, len(ways)):
        free = np.remainder(twist[t - 1] + drift[t - 1] + np.pi, 2 * np.pi) - np.pi
        twist[t] = free - np.clip(trust[t] * free, -limit, limit)
    return swings @ _about(rest, twist)


def _share_twist(turned: np.ndarray, offsets: np.ndarray) -> None:
    """Give the lower spine joints their thirds of the twist that the topmost has (in place).

    A joint turned about the bone that leaves it moves nothing.
    """
    low, middle, top = _SPINE
    axis = offsets[top] / np.linalg.norm(offsets[top])
    x, y, z, w = Rotation.from_matrix(_transposed(turned[:, middle]) @ turned[:, top]).as_quat().T
    twist = np.unwrap(2 * np.arctan2(np.stack([x, y, z], -1) @ axis, w))
    turned[:, middle] = turned[:, middle] @ _about(axis, twist * 2 / 3)
    axis = offsets[middle] / np.linalg.norm(offsets[middle])
    turned[:, low] = turned[:, low] @ _about(axis, twist / 3)
