"""Joint rotations for the files that want them (BVH, glTF): fitted to joint positions, or the features' own.

Positions say of the rotations where every bone points, and nothing of its twist. What comes out of a fit puts
the joints where they were, and is one of many that do. Some features hold true rotations.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.spatial.transform import Rotation

from scamo.errors import ScaMoError
from scamo.motion.body import Body, known_counts
from scamo.motion.hierarchy import Animation, Hierarchy
from scamo.motion.representation import Representation
from scamo.motion.skeleton import N_JOINTS, quaternions_to_matrices

CHILDREN: tuple[tuple[int, ...], ...] = Body.of(N_JOINTS).children
# The shortest rotation from rest knows its twist up to this angle; beyond, it turns ever faster around the
# opposite of the rest direction, where it is not defined.
_SURE, _UNSURE = np.radians(120), np.radians(170)
_TWIST_SPEED = np.radians(400)  # a second, for going back to the shortest rotation
_UP = np.array([0.0, 1.0, 0.0])
_SAME = 5e-3  # metres within which joints are those of their features


@dataclass(frozen=True)
class Fit:
    """A skeleton with constant bones and the rotations that bring it near to given joints.

    rotations: (T, J, 4) float64 quaternions w, x, y, z relative to the parent joint, as
    `forward_kinematics` takes them; a joint's follow one another without a change of sign. offsets: (J, 3)
    metres, the T-pose: every joint's place relative to its parent. local: (T, J, 3) metres, where the given
    joints are in the turned frame of their parent (the pelvis: in the world); `offsets` where no bone changes
    its length.
    error: (T, J) metres between the joints of the skeleton and the given ones. true: whether the rotations
    are the motion's own (`given_rotations`), else they are fitted.
    """

    rotations: np.ndarray
    offsets: np.ndarray
    local: np.ndarray
    error: np.ndarray
    true: bool = False

    @property
    def joints(self) -> np.ndarray:
        """(T, J, 3) float64: the joints of the skeleton with constant bones."""
        body = Body.of(len(self.offsets))
        places = np.tile(self.offsets, (len(self.local), 1, 1))
        places[:, 0] = self.local[:, 0]
        hierarchy = Hierarchy(body.names, body.parents, self.offsets)
        return Animation(hierarchy, self.rotations, places, body.fps).forward_kinematics()[0]


def fit_rotations(joints: np.ndarray, *, fps: float = 20.0) -> Fit:
    """Constant bones and rotations for joints (T, J, 3), metres, of any known body.

    The bones are as long as on average. A joint with several children takes the rotation that fits them best
    (least squares), one with a single child aims its bone at it, from where the chain has come to, with the
    twist of the shortest rotation from rest relative to the parent; near the opposite of the rest direction,
    where that one spins, the twist is carried along and led back at `_TWIST_SPEED`. The spine's joints
    share the twist between hips and shoulders. Feet, head and wrists keep the rotation of their parents.

    Raises ScaMoError for another shape, a value that is not finite or a joint that lies on its parent.
    """
    joints = np.asarray(joints, dtype=np.float64)
    if joints.ndim != 3 or joints.shape[2] != 3 or not len(joints):
        raise ScaMoError(f"joints: expected shape (frames, {known_counts()}, 3), got {joints.shape}")
    body = Body.of(joints.shape[1])
    bones = joints[:, 1:] - joints[:, list(body.parents[1:])]
    lengths = np.linalg.norm(bones, axis=-1)
    bad = np.argwhere(~(np.isfinite(lengths) & (lengths > 1e-9)))
    if len(bad):
        frame, joint = int(bad[0, 0]), int(bad[0, 1]) + 1
        raise ScaMoError(
            f"joints: frame {frame}, joint {joint} ({body.names[joint]}): a bone of length "
            f"{lengths[frame, joint - 1]:g} m from {body.names[body.parents[joint]]} has no rotation"
        )
    offsets = _rest(body, bones, lengths)

    turned = np.empty((*joints.shape[:2], 3, 3))  # global
    places = np.empty_like(joints)
    places[:, 0] = joints[:, 0]
    for joint, children in enumerate(body.children):
        before = turned[:, body.parents[joint]] if joint else np.broadcast_to(np.eye(3), turned[:, 0].shape)
        aims = joints[:, children] - places[:, joint, None]
        if not children:
            turned[:, joint] = before
        elif len(children) == 1:
            seen = (_transposed(before) @ aims[:, 0, :, None])[..., 0]
            turned[:, joint] = before @ _aimed(offsets[children[0]], seen, fps)
        else:
            turned[:, joint] = _best_rotations(offsets[list(children)], aims)
        places[:, children] = places[:, joint, None] + offsets[list(children)] @ _transposed(turned[:, joint])
    _share_twist(turned, offsets, body.spine)
    return _fit(body, joints, turned, offsets, places, true=False)


def given_rotations(joints: np.ndarray, features: np.ndarray) -> Fit | None:
    """The rotations that features hold themselves, for joints (T, J, 3) made of them, wherever these stand.

    The bones are those of the features, turned back by the rotations, on average. None for features without
    true rotations, and for joints that are not those of the features to half a centimetre.
    """
    representation = Representation.of(features.shape[-1])
    if not representation.true_rotations:
        return None
    features, joints = np.asarray(features, dtype=np.float64), np.asarray(joints, dtype=np.float64)
    own = representation.to_joints(features)
    yaw, place = turn_and_place(own, joints)
    turn = _about(_UP, np.array([yaw]))[0]
    if np.linalg.norm(own @ turn.T + place - joints, axis=-1).max() > _SAME:
        return None
    body = Body.of(joints.shape[1])
    turned = representation.to_rotations(features)[0]
    turned[:, 0] = turn @ turned[:, 0]
    for joint, parent in enumerate(body.parents[1:], 1):
        turned[:, joint] = turned[:, parent] @ turned[:, joint]
    parents = list(body.parents[1:])
    bones = joints[:, 1:] - joints[:, parents]
    offsets = np.zeros(joints.shape[1:])
    offsets[1:] = (_transposed(turned[:, parents]) @ bones[..., None])[..., 0].mean(0)
    places = joints.copy()
    for joint, parent in enumerate(parents, 1):
        places[:, joint] = places[:, parent] + turned[:, parent] @ offsets[joint]
    return _fit(body, joints, turned, offsets, places, true=True)


def turn_and_place(own: np.ndarray, other: np.ndarray) -> tuple[float, np.ndarray]:
    """The turn about Y, radians, and the way (3,) that bring points (..., 3) nearest to others (..., 3)."""
    own, other = own.reshape(-1, 3), other.reshape(-1, 3)
    (x, _, z), (to_x, _, to_z) = (own - own.mean(0)).T, (other - other.mean(0)).T
    yaw = float(np.arctan2((z * to_x - x * to_z).sum(), (x * to_x + z * to_z).sum()))
    turn = _about(_UP, np.array([yaw]))[0]
    return yaw, other.mean(0) - turn @ own.mean(0)


def _fit(
    body: Body, joints: np.ndarray, turned: np.ndarray, offsets: np.ndarray, places: np.ndarray, *, true: bool
) -> Fit:
    """Of rotations in the world (T, J, 3, 3) and the places that they give."""
    above = list(body.parents[1:])
    parents = turned[:, above]
    local = turned.copy()
    local[:, 1:] = _transposed(parents) @ turned[:, 1:]
    rotations = Rotation.from_matrix(local.reshape(-1, 3, 3)).as_quat().reshape(*joints.shape[:2], 4)
    # q and -q are one rotation; files interpolate between the numbers.
    rotations[0] *= np.where(rotations[0, :, 3:] < 0, -1, 1)
    turns = np.sign((rotations[1:] * rotations[:-1]).sum(-1, keepdims=True))
    rotations[1:] *= np.cumprod(np.where(turns == 0, 1, turns), axis=0)
    inner = joints.copy()
    inner[:, 1:] = (_transposed(parents) @ (joints[:, 1:] - joints[:, above])[..., None])[..., 0]
    error = np.linalg.norm(places - joints, axis=-1)
    return Fit(np.ascontiguousarray(rotations[..., [3, 0, 1, 2]]), offsets, inner, error, true)


def _transposed(matrices: np.ndarray) -> np.ndarray:
    return np.swapaxes(matrices, -1, -2)


def _rest(body: Body, bones: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """T-pose offsets (J, 3): average lengths along the body's; where bones leave a joint together, their
    average shape, turned to stand as there."""
    default = body.rest.astype(np.float64)
    offsets = np.zeros_like(default)
    offsets[1:] = default[1:] * (lengths.mean(0) / np.linalg.norm(default[1:], axis=-1))[:, None]
    for children in body.children:
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


def _share_twist(turned: np.ndarray, offsets: np.ndarray, spine: tuple[int, ...]) -> None:
    """Give the lower joints of a spine their parts of the twist that the topmost has (in place).

    A joint turned about the bone that leaves it moves nothing.
    """
    if len(spine) < 2:
        return
    axis = offsets[spine[-1]] / np.linalg.norm(offsets[spine[-1]])
    x, y, z, w = Rotation.from_matrix(_transposed(turned[:, spine[-2]]) @ turned[:, spine[-1]]).as_quat().T
    twist = np.unwrap(2 * np.arctan2(np.stack([x, y, z], -1) @ axis, w))
    for place, (joint, following) in enumerate(pairwise(spine), 1):
        axis = offsets[following] / np.linalg.norm(offsets[following])
        turned[:, joint] = turned[:, joint] @ _about(axis, twist * place / len(spine))
