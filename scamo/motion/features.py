"""Joints ↔ the 263 features per frame of HumanML3D (Guo et al. 2022), to the letter.

| slice     | feature                                                                                     |
|-----------|---------------------------------------------------------------------------------------------|
| `0`       | root yaw velocity: the *half* angle a frame, radians                                        |
| `1:3`     | root X and Z velocity in the heading frame, metres a frame                                  |
| `3`       | root height, metres                                                                         |
| `4:67`    | 21 x 3 joint positions: X and Z from the root, heading removed, Y above the floor           |
| `67:193`  | 21 x 6 rotations: the first two columns of each bone's rotation relative to the previous one |
| `193:259` | 22 x 3 joint velocities in the heading frame, metres a frame                                |
| `259:263` | contacts of left ankle, left foot, right ankle, right foot: 0 or 1                          |

The oddities of the original are part of the format and kept: the heading's hip and shoulder vectors are
subtracted from one another, it is smoothed over a second, the first frame's is called zero whatever the
filter says, a yaw step across ±180° changes its sign, and the arm chains start from the root's rotation.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from scamo.errors import ScaMoError
from scamo.motion.skeleton import (
    CHAINS,
    FACING,
    JOINT_NAMES,
    LEFT_FOOT,
    N_JOINTS,
    PARENTS,
    RAW_OFFSETS,
    RIGHT_FOOT,
)

FEATURE_DIM = 263
ROOT = slice(0, 4)
POSITIONS = slice(4, 67)
ROTATIONS = slice(67, 193)
VELOCITIES = slice(193, 259)
CONTACTS = slice(259, 263)

# The groups inside which HumanML3D averages the standard deviation.
FEATURE_GROUPS: dict[str, slice] = {
    "yaw_velocity": slice(0, 1),
    "root_velocity": slice(1, 3),
    "root_height": slice(3, 4),
    "positions": POSITIONS,
    "rotations": ROTATIONS,
    "velocities": VELOCITIES,
    "contacts": CONTACTS,
}

FORMAT_FPS = 20.0
_CONTACT_THRESHOLD = 0.002  # squared metres a frame at 20 fps
_HEADING_SIGMA = 20.0  # frames at 20 fps
_LEG = (5, 8)  # right knee and ankle: their bones are the leg length that scales the root's path

_BONES = np.arange(1, N_JOINTS)
_BONE_PARENTS = np.array(PARENTS[1:])
_REST = RAW_OFFSETS[1:].astype(np.float64)
# The bone whose rotation comes before each one's; 0 is the root's, also for the first bones of the arms.
_BEFORE = np.zeros(N_JOINTS, dtype=np.int64)
for _chain in CHAINS:
    for _previous, _joint in pairwise(_chain[1:]):
        _BEFORE[_joint] = _previous
_BEFORE_BONES = _BEFORE[1:]
_FEET = (*LEFT_FOOT, *RIGHT_FOOT)


def offsets_from_joints(joints_frame: np.ndarray) -> np.ndarray:
    """The skeleton of one pose, (22, 3) metres -> (22, 3) float32: its bone lengths along RAW_OFFSETS.

    HumanML3D's uniform skeleton is this function of the first frame of clip 000021. Raises ScaMoError for
    another shape or a value that is not finite.
    """
    frame = np.asarray(joints_frame, dtype=np.float64)
    if frame.shape != (N_JOINTS, 3):
        raise ScaMoError(f"joints of one frame: expected shape ({N_JOINTS}, 3), got {frame.shape}")
    _refuse_not_finite(frame[None], "joints")
    lengths = np.linalg.norm(frame[_BONES] - frame[_BONE_PARENTS], axis=-1)
    offsets = np.zeros((N_JOINTS, 3), dtype=np.float32)
    offsets[1:] = lengths[:, None] * _REST
    return offsets


def joints_to_features(
    joints: np.ndarray, *, target_offsets: np.ndarray | None = None, fps: float = 20
) -> np.ndarray:
    """The 263 features of a clip.

    joints: (T, 22, 3) metres, Y up, T >= 2. The result does not depend on where the body stands or faces: the
    lowest joint is put on the floor, the first frame's root at the origin facing +Z.
    target_offsets: (22, 3) metres, the uniform skeleton: every bone takes the length it has there (directions
    are ignored) and the root's path is scaled by the ratio of the leg lengths. None keeps the bones.
    fps: frames a second of `joints`. The format is made for 20. Velocities are displacements a frame at any
    rate; at another one the contact threshold and the width of the heading filter are scaled so that they
    stay the same speed (0.89 m/s) and the same time (1 s).
    Returns (T - 1, 263) float32: the last frame only closes the velocities.
    Raises ScaMoError naming frame and joint for NaN or infinity, a bone of no length, a pose without a
    heading, and for a wrong shape, fewer than two frames or a frame rate that is not positive.
    """
    if not np.isfinite(fps) or fps <= 0:
        raise ScaMoError(f"fps: expected a positive number, got {fps}")
    places = np.array(joints, dtype=np.float64)
    if places.ndim != 3 or places.shape[1:] != (N_JOINTS, 3):
        raise ScaMoError(f"joints: expected shape (frames, {N_JOINTS}, 3), got {places.shape}")
    if len(places) < 2:
        raise ScaMoError(f"joints: at least 2 frames make features, got {len(places)}")
    _refuse_not_finite(places, "joints")
    directions, lengths = _bones(places)
    if target_offsets is not None:
        places = _retarget(places, directions, lengths, np.asarray(target_offsets, dtype=np.float64))

    places[..., 1] -= places[..., 1].min()
    places[..., [0, 2]] -= places[0, 0, [0, 2]]
    # Turning the body turns the bones' directions alike: no need to measure them again.
    turn_cos, turn_sin = _first_heading(places[0])
    places = _turn(places, turn_cos, turn_sin)
    directions = _turn(directions, turn_cos, turn_sin)

    steps = places[1:] - places[:-1]
    threshold = _CONTACT_THRESHOLD * (FORMAT_FPS / fps) ** 2
    contacts = np.square(steps[:, _FEET]).sum(-1) < threshold

    half_cos, half_sin = _half_headings(places, _HEADING_SIGMA * fps / FORMAT_FPS)
    yaw_step = half_sin[1:] * half_cos[:-1] - half_cos[1:] * half_sin[:-1]
    cos = half_cos**2 - half_sin**2
    sin = 2 * half_cos * half_sin

    frames = len(places) - 1
    features = np.empty((frames, FEATURE_DIM), dtype=np.float32)
    features[:, 0] = np.arcsin(np.clip(yaw_step, -1, 1))
    # The root's step is seen from the heading it arrives in, the joints' steps from the one they leave.
    features[:, 1:3] = _turn(steps[:, 0], cos[1:], sin[1:])[:, [0, 2]]
    features[:, 3] = places[:-1, 0, 1]
    local = places[:-1, 1:].copy()
    local[..., [0, 2]] -= places[:-1, :1, [0, 2]]
    headings = cos[:-1, None], sin[:-1, None]
    features[:, POSITIONS] = _turn(local, *headings).reshape(frames, -1)
    features[:, ROTATIONS] = _rotations(directions[:-1], cos[:-1], sin[:-1])
    features[:, VELOCITIES] = _turn(steps, *headings).reshape(frames, -1)
    features[:, CONTACTS] = contacts
    return features


def features_to_joints(features: Any) -> Any:
    """Joint positions from the root channels and the local positions, `0:67`.

    features: (..., T, 263) numpy array or torch tensor (leading dimensions are batches).
    Returns (..., T, 22, 3) metres of the same kind. numpy: summed in float64, returned as float32 (float64
    for float64). torch: differentiable, on the tensor's device, in its dtype or, below 32 bits, in float32.
    The first frame's root stands at X = Z = 0 and faces +Z.
    Raises ScaMoError for another shape.
    """
    if features.ndim < 2 or features.shape[-1] != FEATURE_DIM:
        raise ScaMoError(
            f"features: expected shape (..., frames, {FEATURE_DIM}), got {tuple(features.shape)}"
        )
    xp: Any
    if isinstance(features, np.ndarray):
        xp = np
        data = features[..., :67].astype(np.float64)
    else:
        import torch

        xp = torch
        data = features[..., :67]
        data = data.float() if data.dtype.itemsize < 4 else data

    before = xp.concatenate([xp.zeros_like(data[..., :1, :3]), data[..., :-1, :3]], -2)
    # Channel 0 holds half angles; going back to the world turns the other way.
    yaw = before[..., 0].cumsum(-1) * -2
    cos, sin = xp.cos(yaw), xp.sin(yaw)
    step_x, step_z = before[..., 1], before[..., 2]
    root_x = (step_x * cos + step_z * sin).cumsum(-1)
    root_z = (step_z * cos - step_x * sin).cumsum(-1)
    root = xp.stack([root_x, data[..., 3], root_z], -1)
    local = data[..., POSITIONS].reshape((*data.shape[:-1], N_JOINTS - 1, 3))
    x, y, z = local[..., 0], local[..., 1], local[..., 2]
    cos, sin = cos[..., None], sin[..., None]
    others = xp.stack(
        [x * cos + z * sin + root_x[..., None], y, z * cos - x * sin + root_z[..., None]],
        -1,
    )
    joints = xp.concatenate([root[..., None, :], others], -2)
    if xp is np and features.dtype != np.float64:
        joints = joints.astype(np.float32)
    return joints


def _refuse_not_finite(places: np.ndarray, name: str) -> None:
    finite = np.isfinite(places)
    if not finite.all():
        frame, joint, axis = (int(i) for i in np.argwhere(~finite)[0])
        value = places[frame, joint, axis]
        raise ScaMoError(
            f"{name}: frame {frame}, joint {joint} ({JOINT_NAMES[joint]}): {'xyz'[axis]} is {value}, "
            "expected finite metres"
        )


def _bones(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit directions (T, 21, 3) and lengths (T, 21) of the bones that end in joints 1 to 21."""
    bones = places[:, 1:] - places[:, _BONE_PARENTS]
    lengths = np.sqrt(np.einsum("tbi,tbi->tb", bones, bones))
    if not lengths.all():
        frame, bone = (int(i) for i in np.argwhere(lengths == 0)[0])
        joint = bone + 1
        raise ScaMoError(
            f"joints: frame {frame}, joint {joint} ({JOINT_NAMES[joint]}) lies on its parent "
            f"{JOINT_NAMES[PARENTS[joint]]}: a bone of no length has no rotation"
        )
    return bones / lengths[..., None], lengths


def _retarget(
    places: np.ndarray, directions: np.ndarray, lengths: np.ndarray, offsets: np.ndarray
) -> np.ndarray:
    """Give every bone the length it has in `offsets`.

    The original turns joints into rotations and back. Its rotations take a rest bone exactly to the direction
    of the bone in motion, so what comes out is that direction with another length.
    """
    if offsets.shape != (N_JOINTS, 3):
        raise ScaMoError(f"target_offsets: expected shape ({N_JOINTS}, 3), got {offsets.shape}")
    wanted = np.linalg.norm(offsets, axis=-1)
    bad = ~(np.isfinite(wanted[1:]) & (wanted[1:] > 0))
    if bad.any():
        joint = int(np.argmax(bad)) + 1
        raise ScaMoError(
            f"target_offsets: joint {joint} ({JOINT_NAMES[joint]}): expected a bone of positive length, "
            f"got {wanted[joint]}"
        )
    leg = np.array(_LEG)
    out = np.empty_like(places)
    out[:, 0] = places[:, 0] * (wanted[leg].sum() / lengths[0, leg - 1].sum())
    bones = directions * wanted[1:, None]
    for joint in range(1, N_JOINTS):
        out[:, joint] = out[:, PARENTS[joint]] + bones[:, joint - 1]
    return out


def _turn(vectors: np.ndarray, cos: Any, sin: Any) -> np.ndarray:
    """Rotate (..., 3) about Y by the angle with this cosine and sine, each of the shape (...) or a scalar."""
    x, z = vectors[..., 0], vectors[..., 2]
    out = np.empty_like(vectors)
    out[..., 0] = x * cos + z * sin
    out[..., 1] = vectors[..., 1]
    out[..., 2] = z * cos - x * sin
    return out


def _first_heading(frame: np.ndarray) -> tuple[float, float]:
    """Cosine and sine of the turn about Y that makes a pose (22, 3) face +Z."""
    right_hip, left_hip, right_shoulder, left_shoulder = FACING
    across = (frame[right_hip] - frame[left_hip]) + (frame[right_shoulder] - frame[left_shoulder])
    # forward = Y x across
    x, z = across[2], -across[0]
    length = np.hypot(x, z)
    if length < 1e-8:
        raise ScaMoError(
            "joints: frame 0 faces nowhere: hips and shoulders have no horizontal extent, expected a pose "
            "whose left and right sides lie apart"
        )
    return float(z / length), float(-x / length)


def _half_headings(places: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine (T,) of half the turn about Y that makes each frame's smoothed heading +Z."""
    from scipy.ndimage import gaussian_filter1d

    # The original mixes up the two hips here, so that their vector is subtracted from the shoulders'.
    left_hip, right_hip, right_shoulder, left_shoulder = FACING
    across = places[:, right_hip] - places[:, left_hip] + places[:, right_shoulder] - places[:, left_shoulder]
    # A frame without a direction adds nothing to the filter.
    lengths = np.maximum(np.linalg.norm(across, axis=-1, keepdims=True), 1e-12)
    forward = np.stack([across[:, 2], -across[:, 0]], axis=-1) / lengths
    forward = gaussian_filter1d(forward, sigma, axis=0, mode="nearest")
    lengths = np.linalg.norm(forward, axis=-1)
    if lengths.min() < 1e-8:
        frame = int(lengths.argmin())
        raise ScaMoError(
            f"joints: frame {frame} faces nowhere: around it shoulders and hips are equally wide or their "
            "directions cancel, so the format has no heading for it"
        )
    x, z = (forward / lengths[:, None]).T
    # The shortest turn from (x, 0, z) to +Z as a quaternion (w, 0, y, 0): w >= 0, so y carries the sign.
    half_cos = np.sqrt(np.maximum((1 + z) / 2, 0))
    half_sin = np.copysign(np.sqrt(np.maximum((1 - z) / 2, 0)), -x)
    half_cos[0], half_sin[0] = 1.0, 0.0
    return half_cos, half_sin


def _rotations(directions: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotation features (T, 126) of bone directions (T, 21, 3) and the root's turns."""
    frames = len(directions)
    axis = np.cross(_REST, directions)
    along = np.einsum("bi,tbi->tb", _REST, directions)
    # Shortest rotation from rest to direction: along * I + [axis]x + axis axis^T / (1 + along).
    opposite = 1 + along < 1e-14
    scale = 1 / np.where(opposite, 1.0, 1 + along)
    matrices = np.empty((frames, N_JOINTS, 3, 3))
    bones = matrices[:, 1:]
    np.multiply((axis * scale[..., None])[..., :, None], axis[..., None, :], out=bones)
    x, y, z = axis[..., 0], axis[..., 1], axis[..., 2]
    for i in range(3):
        bones[..., i, i] += along
    bones[..., 0, 1] -= z
    bones[..., 0, 2] += y
    bones[..., 1, 0] += z
    bones[..., 1, 2] -= x
    bones[..., 2, 0] -= y
    bones[..., 2, 1] += x
    if opposite.any():
        # No shortest rotation: half a turn about an axis square to the bone.
        for frame, bone in np.argwhere(opposite):
            square = np.roll(_REST[bone], 1)
            bones[frame, bone] = 2 * np.outer(square, square) - np.eye(3)
    matrices[:, 0] = 0
    matrices[:, 0, 0, 0] = matrices[:, 0, 2, 2] = cos
    matrices[:, 0, 0, 2] = sin
    matrices[:, 0, 2, 0] = -sin
    matrices[:, 0, 1, 1] = 1
    # Column k of before^T @ bone, laid out column by column.
    columns = np.einsum("tbmi,tbmk->tbki", matrices[:, _BEFORE_BONES], bones[..., :2])
    return columns.reshape(frames, -1)
