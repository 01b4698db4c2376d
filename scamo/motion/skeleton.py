"""The 22-joint body: names, tree, rest poses, mirroring and forward kinematics; and KIT-ML's 21 joints.

Metres, Y up. A body at rest stands at the origin, faces +Z and has its left on +X. The joints are the first
22 of SMPL, in its order; quaternions are (w, x, y, z).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from scamo.errors import ScaMoError

JOINT_NAMES: tuple[str, ...] = (
    "pelvis",
    "left_hip",
    "right_hip",
    "spine1",
    "left_knee",
    "right_knee",
    "spine2",
    "left_ankle",
    "right_ankle",
    "spine3",
    "left_foot",
    "right_foot",
    "neck",
    "left_collar",
    "right_collar",
    "head",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
)
N_JOINTS = len(JOINT_NAMES)

PARENTS: tuple[int, ...] = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19)

# Right leg, left leg, spine, right arm, left arm; the arms leave the spine at joint 9.
CHAINS: tuple[tuple[int, ...], ...] = (
    (0, 2, 5, 8, 11),
    (0, 1, 4, 7, 10),
    (0, 3, 6, 9, 12, 15),
    (9, 14, 17, 19, 21),
    (9, 13, 16, 18, 20),
)

MIRROR_PAIRS: tuple[tuple[int, int], ...] = (
    (1, 2),
    (4, 5),
    (7, 8),
    (10, 11),
    (13, 14),
    (16, 17),
    (18, 19),
    (20, 21),
)

# Right hip, left hip, right shoulder, left shoulder: the joints that say where a body faces.
FACING: tuple[int, int, int, int] = (2, 1, 17, 16)
LEFT_FOOT: tuple[int, int] = (7, 10)  # ankle, ball of the foot
RIGHT_FOOT: tuple[int, int] = (8, 11)


def _left_and_right(
    centre: dict[int, tuple[float, float, float]], left: dict[int, tuple[float, float, float]]
) -> np.ndarray:
    offsets = np.zeros((N_JOINTS, 3), dtype=np.float32)
    partner = dict(MIRROR_PAIRS)
    for joint, offset in centre.items():
        offsets[joint] = offset
    for joint, (x, y, z) in left.items():
        offsets[joint] = (x, y, z)
        offsets[partner[joint]] = (-x, y, z)
    offsets.setflags(write=False)
    return offsets


# A neutral adult in T-pose: round figures of our own. Hip to ankle 0.85 m, shoulders 0.36 m apart,
# head joint 1.58 m above the balls of the feet.
DEFAULT_OFFSETS: np.ndarray = _left_and_right(
    centre={
        3: (0.0, 0.12, -0.01),
        6: (0.0, 0.13, 0.0),
        9: (0.0, 0.06, 0.01),
        12: (0.0, 0.21, -0.02),
        15: (0.0, 0.10, 0.04),
    },
    left={
        1: (0.09, -0.06, 0.0),
        4: (0.0, -0.43, 0.0),
        7: (0.0, -0.42, 0.0),
        10: (0.02, -0.05, 0.13),
        13: (0.07, 0.12, -0.01),
        16: (0.11, 0.03, 0.0),
        18: (0.26, 0.0, 0.0),
        20: (0.25, 0.0, 0.0),
    },
)


def _directions(joints_of: dict[tuple[int, int, int], tuple[int, ...]], n_joints: int) -> np.ndarray:
    offsets = np.zeros((n_joints, 3), dtype=np.float32)
    for direction, joints in joints_of.items():
        offsets[list(joints)] = direction
    offsets.setflags(write=False)
    return offsets


# Unit directions of the bones where the inverse kinematics of the 263 features calls a rotation identity.
# They define the format (Guo et al. 2022): arms hang from the collars, the head points forward.
RAW_OFFSETS: np.ndarray = _directions(
    {
        (1, 0, 0): (1, 13),
        (-1, 0, 0): (2, 14),
        (0, 1, 0): (3, 6, 9, 12),
        (0, 0, 1): (10, 11, 15),
        (0, -1, 0): (4, 5, 7, 8, 16, 17, 18, 19, 20, 21),
    },
    N_JOINTS,
)


@dataclass(frozen=True, eq=False)
class Skeleton:
    """What the features of Guo et al. take a body to be.

    names: of the joints. chains: of joints from the root or a branching outwards; together they are the tree.
    mirror_pairs: joints that a mirror exchanges. raw_offsets: float32 (J, 3), unit directions of the bones at
    rest. facing: right hip, left hip, right shoulder, left shoulder. feet: the joints that touch the floor,
    two of the left foot, then of the right. leg: knee and ankle whose bones are the length of a leg.
    """

    names: tuple[str, ...]
    chains: tuple[tuple[int, ...], ...]
    mirror_pairs: tuple[tuple[int, int], ...]
    raw_offsets: np.ndarray
    facing: tuple[int, int, int, int]
    feet: tuple[int, int, int, int]
    leg: tuple[int, int]

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """Of every joint; the root's is -1."""
        above = {joint: parent for chain in self.chains for parent, joint in pairwise(chain)}
        return tuple(above.get(joint, -1) for joint in range(len(self)))


SMPL_SKELETON = Skeleton(
    names=JOINT_NAMES,
    chains=CHAINS,
    mirror_pairs=MIRROR_PAIRS,
    raw_offsets=RAW_OFFSETS,
    facing=FACING,
    feet=(*LEFT_FOOT, *RIGHT_FOOT),
    leg=(5, 8),
)

# The sides are those that the published features take: the MMM model's own names call joints 5 to 7 and 11 to
# 15 left. At rest hips and shoulders point to the other side; that, too, is published.
KIT_SKELETON = Skeleton(
    names=(
        "root",
        "pelvis",
        "thorax",
        "lower_neck",
        "upper_neck",
        "right_shoulder",
        "right_elbow",
        "right_wrist",
        "left_shoulder",
        "left_elbow",
        "left_wrist",
        "right_hip",
        "right_knee",
        "right_ankle",
        "right_midfoot",
        "right_foot",
        "left_hip",
        "left_knee",
        "left_ankle",
        "left_midfoot",
        "left_foot",
    ),
    chains=((0, 11, 12, 13, 14, 15), (0, 16, 17, 18, 19, 20), (0, 1, 2, 3, 4), (3, 5, 6, 7), (3, 8, 9, 10)),
    mirror_pairs=((5, 8), (6, 9), (7, 10), (11, 16), (12, 17), (13, 18), (14, 19), (15, 20)),
    raw_offsets=_directions(
        {
            (0, 1, 0): (1, 2, 3, 4),
            (1, 0, 0): (5, 11),
            (-1, 0, 0): (8, 16),
            (0, 0, 1): (14, 15, 19, 20),
            (0, -1, 0): (6, 7, 9, 10, 12, 13, 17, 18),
        },
        21,
    ),
    facing=(11, 16, 5, 8),
    feet=(19, 20, 14, 15),
    leg=(17, 18),
)

_MIRRORED = np.arange(N_JOINTS)
for _left, _right in MIRROR_PAIRS:
    _MIRRORED[[_left, _right]] = _right, _left


def mirror_joints(joints: Any) -> Any:
    """The same motion in a mirror: X negated and the left joints swapped with the right ones.

    joints: (..., 22, 3) numpy array or torch tensor, metres; returns the same kind, shape and dtype.
    Raises ScaMoError for another shape.
    """
    if tuple(joints.shape[-2:]) != (N_JOINTS, 3):
        raise ScaMoError(f"joints: expected shape (..., {N_JOINTS}, 3), got {tuple(joints.shape)}")
    swapped = joints[..., _MIRRORED, :]
    if isinstance(joints, np.ndarray):
        return swapped * np.array([-1, 1, 1], dtype=joints.dtype)
    return swapped * swapped.new_tensor([-1, 1, 1])


_SIDES = re.compile(
    r"\b(?:(?P<counter>(?:counter|anti)[-\s]?clock[-\s]?wise)"
    r"|(?P<clockwise>clock[-\s]?wise)"
    r"|(?P<side>left|right)(?=(?:s|wards?|most|hand|handed|side)?\b))",
    re.IGNORECASE,
)


def _like(word: str, model: str) -> str:
    if model.isupper():
        return word.upper()
    return word.capitalize() if model[0].isupper() else word


def _swap_side(match: re.Match[str]) -> str:
    found = match.group(0)
    if match["counter"]:
        return _like("clockwise", found)
    if match["clockwise"]:
        return _like("counterclockwise", found)
    return _like("right" if found.lower() == "left" else "left", found)


def swap_sides(text: str) -> str:
    """The caption of the mirrored motion: left and right exchanged, clockwise and counterclockwise too.

    Whole words only ("upright" and "bright" stay; "leftwards", "right-handed" turn), capitals are kept. Every
    spelling of counterclockwise ("anti-clockwise", "counter clockwise") becomes "clockwise".
    """
    return _SIDES.sub(_swap_side, text)


def quaternions_to_matrices(quaternions: np.ndarray) -> np.ndarray:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4) in w, x, y, z order, of any length but zero."""
    q = np.asarray(quaternions)
    w, x, y, z = np.moveaxis(q / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def forward_kinematics(
    rotations: np.ndarray, offsets: np.ndarray | None = None, root: np.ndarray | None = None
) -> np.ndarray:
    """Joint positions of a posed skeleton.

    rotations: (..., 22, 4) quaternions w, x, y, z or (..., 22, 3, 3) matrices, each relative to the parent
    joint: it turns the bones that leave its joint (as in SMPL and BVH), the pelvis's turns the whole body.
    offsets: (..., 22, 3) metres, every joint's place relative to its parent at rest; None: DEFAULT_OFFSETS.
    root: (..., 3) metres, the place of the pelvis; None: the origin.
    Returns (..., 22, 3), float64 if the rotations are, else float32. Raises ScaMoError for another shape.
    """
    rotations = np.asarray(rotations)
    if rotations.shape[-2:] == (N_JOINTS, 4):
        local = quaternions_to_matrices(rotations)
    elif rotations.shape[-3:] == (N_JOINTS, 3, 3):
        local = rotations
    else:
        raise ScaMoError(
            f"rotations: expected shape (..., {N_JOINTS}, 4) or (..., {N_JOINTS}, 3, 3), "
            f"got {rotations.shape}"
        )
    offsets = DEFAULT_OFFSETS if offsets is None else np.asarray(offsets)
    if offsets.shape[-2:] != (N_JOINTS, 3):
        raise ScaMoError(f"offsets: expected shape (..., {N_JOINTS}, 3), got {offsets.shape}")
    dtype = np.float64 if local.dtype == np.float64 else np.float32
    # Joints first: every step below then works on contiguous blocks.
    local = np.ascontiguousarray(np.moveaxis(local, -3, 0), dtype=dtype)
    bones = np.moveaxis(offsets, -2, 0).astype(dtype)
    root = np.zeros(3, dtype) if root is None else np.asarray(root, dtype=dtype)

    lead = np.broadcast_shapes(local.shape[1:-2], bones.shape[1:-1], root.shape[:-1])
    absolute = np.empty_like(local)
    places = np.empty((N_JOINTS, *lead, 3), dtype=dtype)
    absolute[0] = local[0]
    places[0] = root
    for joint in range(1, N_JOINTS):
        parent = PARENTS[joint]
        absolute[joint] = absolute[parent] @ local[joint]
        places[joint] = places[parent] + (absolute[parent] @ bones[joint][..., None])[..., 0]
    return np.ascontiguousarray(np.moveaxis(places, 0, -2))
