"""Joints ↔ the 263 features per frame of HumanML3D (Guo et al. 2022), to the letter; KIT-ML's 251 alike.

| slice     | feature                                                                                     |
|-----------|---------------------------------------------------------------------------------------------|
| `0`       | root yaw velocity: the *half* angle a frame, radians                                        |
| `1:3`     | root X and Z velocity in the heading frame, metres a frame                                  |
| `3`       | root height, metres                                                                         |
| `4:67`    | 21 x 3 joint positions: X and Z from the root, heading removed, Y above the floor           |
| `67:193`  | 21 x 6 rotations: the first two columns of each bone's rotation relative to the previous one |
| `193:259` | 22 x 3 joint velocities in the heading frame, metres a frame                                |
| `259:263` | contacts of left ankle, left foot, right ankle, right foot: 0 or 1                          |

KIT-ML's are the same of 21 joints, in millimetres, for 12.5 frames a second; its contacts are those of
midfoot and foot.

The oddities of the original are part of the format and kept. The variant "fixed" has the same columns of the
same meaning, from which the same `features_to_joints` recovers the joints, and mends what FIXED lists; KEPT
lists what it cannot mend. A model or an evaluator of one variant takes no features of the other.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import numpy as np

from scamo.errors import ScaMoError
from scamo.motion.skeleton import KIT_SKELETON, SMPL_SKELETON, Skeleton

Variant = Literal["original", "fixed"]
VARIANTS: tuple[Variant, ...] = ("original", "fixed")

# What the variant "fixed" mends: what the original does, and what "fixed" does instead.
FIXED: dict[str, str] = {
    "heading": "the hips' vector was subtracted from the shoulders' instead of added",
    "first heading": "the first frame's heading was called zero whatever the filter says, so that the first "
    "yaw step jumps; the clip is turned until the filtered one is zero",
    "half turn": "a yaw step across ±180° had the wrong sign, so that recovered joints turn off their path",
    "rotations": "bones were turned from rest in the clip's frame and those that leave the root then seen "
    "from the wrong side, so that rotations held the heading; they are turned in the heading frame",
    "arms": "the arms' first bones were relative to the root instead of to the spine's bone they leave",
    "contacts": "a slow foot touched the floor at any height; an ankle is now below 0.15 m, the ball of a "
    "foot below 0.10 m (so a step on stairs is none)",
    "floor": "it was the lowest point of the clip, one bad frame's too; it is the lowest height that the "
    "lowest joint keeps for three of five frames (at 20 fps)",
    "leg": "the root's path was scaled by the right leg of the first frame; it is by the median of both legs "
    "over the clip",
}
# What no variant with these columns can mend.
KEPT: dict[str, str] = {
    "half angle": "channel 0 is half the yaw step: recovery doubles it",
    "last frame": "T frames make T - 1: the last one only closes the velocities",
    "filter": "the heading is smoothed over a second and lags behind a body that spins, and the features of "
    "a frame depend on four seconds around it",
    "root velocity": "the root's step is seen from the heading it arrives in, those of the joints from "
    "the one they leave",
    "twist": "rotations are shortest turns of bones: no twist, of the bone that ends in a joint and not of "
    "the joint; they are no SMPL rotations",
    "stature": "the path is scaled by the legs alone, so other lengths than the legs' ratio make feet slide",
}

_HEADING_SIGMA = 20.0  # frames at the format's rate


class Layout:
    """The recipe for one body: what it needs to know, and where its columns are.

    fps: frames a second that the format is made for. unit: numbers a metre. contact: squared numbers a frame
    at that rate, below which a foot is called in contact. standing: heights in metres of each pair of
    `skeleton.feet` below which variant "fixed" calls them so, None where there is no such variant.
    groups: the columns of each kind, inside which HumanML3D averages the standard deviation.
    """

    def __init__(
        self,
        name: str,
        skeleton: Skeleton,
        *,
        fps: float,
        unit: float,
        contact: float,
        standing: tuple[float, float] | None,
    ) -> None:
        self.name, self.skeleton = name, skeleton
        self.fps, self.unit, self.contact = fps, unit, contact
        self.standing = None if standing is None else np.tile(standing, 2) * unit
        n_joints = len(skeleton)
        self.groups: dict[str, slice] = {}
        start = 0
        for group, size in {
            "yaw_velocity": 1,
            "root_velocity": 2,
            "root_height": 1,
            "positions": 3 * (n_joints - 1),
            "rotations": 6 * (n_joints - 1),
            "velocities": 3 * n_joints,
            "contacts": 4,
        }.items():
            self.groups[group] = slice(start, start + size)
            start += size
        self.feature_dim = start
        self.positions, self.rotations = self.groups["positions"], self.groups["rotations"]
        self.velocities, self.contacts = self.groups["velocities"], self.groups["contacts"]

        self.feet = list(skeleton.feet)
        self.leg = np.array(skeleton.leg)
        partner = dict(skeleton.mirror_pairs) | {right: left for left, right in skeleton.mirror_pairs}
        self.legs = np.array([*skeleton.leg, *(partner[joint] for joint in skeleton.leg)])
        self.parents = np.array(skeleton.parents[1:])
        self.rest = skeleton.raw_offsets[1:].astype(np.float64)
        # The bone whose rotation comes before each one's; 0 is the root's. The original calls it so, too, for
        # the first bones of the arms.
        self.before = np.zeros(n_joints - 1, dtype=np.int64)
        self.before_fixed = self.before.copy()
        for chain in skeleton.chains:
            self.before_fixed[chain[1] - 1] = chain[0]
            for previous, joint in pairwise(chain[1:]):
                self.before[joint - 1] = self.before_fixed[joint - 1] = previous


HUMANML3D_LAYOUT = Layout(
    "HumanML3D", SMPL_SKELETON, fps=20.0, unit=1.0, contact=0.002, standing=(0.15, 0.10)
)
KIT_LAYOUT = Layout("KIT-ML", KIT_SKELETON, fps=12.5, unit=1000.0, contact=0.05, standing=None)

FEATURE_DIM = HUMANML3D_LAYOUT.feature_dim
ROOT = slice(0, 4)
POSITIONS, ROTATIONS = HUMANML3D_LAYOUT.positions, HUMANML3D_LAYOUT.rotations
VELOCITIES, CONTACTS = HUMANML3D_LAYOUT.velocities, HUMANML3D_LAYOUT.contacts
FEATURE_GROUPS = HUMANML3D_LAYOUT.groups
FORMAT_FPS = HUMANML3D_LAYOUT.fps


def offsets_from_joints(joints_frame: np.ndarray, layout: Layout = HUMANML3D_LAYOUT) -> np.ndarray:
    """The skeleton of one pose, (J, 3) metres -> (J, 3) float32: its bone lengths along the rest directions.

    HumanML3D's uniform skeleton is this function of the first frame of clip 000021. Raises ScaMoError for
    another shape or a value that is not finite.
    """
    frame, n_joints = np.asarray(joints_frame, dtype=np.float64), len(layout.skeleton)
    if frame.shape != (n_joints, 3):
        raise ScaMoError(f"joints of one frame: expected shape ({n_joints}, 3), got {frame.shape}")
    _refuse_not_finite(frame[None], "joints", layout)
    lengths = np.linalg.norm(frame[1:] - frame[layout.parents], axis=-1)
    offsets = np.zeros((n_joints, 3), dtype=np.float32)
    offsets[1:] = lengths[:, None] * layout.rest
    return offsets


def joints_to_features(
    joints: np.ndarray,
    *,
    target_offsets: np.ndarray | None = None,
    fps: float | None = None,
    variant: Variant = "original",
    layout: Layout = HUMANML3D_LAYOUT,
) -> np.ndarray:
    """The features of a clip: 263 of 22 joints, 251 of KIT-ML's 21 by `layout=KIT_LAYOUT`.

    joints: (T, J, 3) metres, Y up, T >= 2. The result does not depend on where the body stands or faces: the
    lowest joint is put on the floor, the first frame's root at the origin facing +Z.
    target_offsets: (J, 3) metres, the uniform skeleton: every bone takes the length it has there (directions
    are ignored) and the root's path is scaled by the ratio of the leg lengths. None keeps the bones.
    fps: frames a second of `joints`, None: those of the format (20, KIT-ML 12.5). Velocities are
    displacements a frame at any rate; at another one the contact threshold and the width of the heading
    filter are scaled so that they stay the same speed and the same time (HumanML3D: 0.89 m/s and 1 s).
    variant: "fixed" (of the 263 only) adds hips and shoulders for the heading, lets the filtered heading of
    the first frame be zero, keeps the sign of yaw steps across ±180°, frees the rotations of the heading,
    takes the arms' first relative to the spine, wants low feet for contacts, finds the floor without
    single bad frames and measures both legs over the clip. FIXED says it in full.
    Returns (T - 1, 263 or 251) float32: the last frame only closes the velocities.
    Raises ScaMoError naming frame and joint for NaN or infinity, a bone of no length, a pose without a
    heading, and for a wrong shape, fewer than two frames, a frame rate that is not positive or a variant that
    is not known.
    """
    skeleton = layout.skeleton
    n_joints = len(skeleton)
    if variant not in VARIANTS:
        raise ScaMoError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    fixed = variant == "fixed"
    if fixed and layout.standing is None:
        raise ScaMoError(f"variant: {layout.name} has no {variant!r} one")
    rate = 1.0 if fps is None else float(fps) / layout.fps
    if not np.isfinite(rate) or rate <= 0:
        raise ScaMoError(f"fps: expected a positive number, got {fps}")
    places = np.array(joints, dtype=np.float64)
    if places.ndim != 3 or places.shape[1:] != (n_joints, 3):
        raise ScaMoError(f"joints: expected shape (frames, {n_joints}, 3), got {places.shape}")
    if len(places) < 2:
        raise ScaMoError(f"joints: at least 2 frames make features, got {len(places)}")
    _refuse_not_finite(places, "joints", layout)
    if layout.unit != 1:
        places *= layout.unit
    directions, lengths = _bones(places, layout)
    if target_offsets is not None:
        offsets = np.asarray(target_offsets, dtype=np.float64) * layout.unit
        places = _retarget(places, directions, lengths, offsets, layout, fixed)

    places[..., 1] -= _floor(places, rate) if fixed else places[..., 1].min()
    places[..., [0, 2]] -= places[0, 0, [0, 2]]
    # Turning the body turns the bones' directions alike: no need to measure them again.
    headings = _headings(places, _HEADING_SIGMA * rate, layout, fixed)
    turn = headings[0] if fixed else _first_heading(places[0], layout)
    places = _turn(places, *turn)
    directions = _turn(directions, *turn)
    half_cos, half_sin = _half_turns(headings, turn)

    steps = places[1:] - places[:-1]
    contacts = np.square(steps[:, layout.feet]).sum(-1) < layout.contact / rate**2
    yaw_step = half_sin[1:] * half_cos[:-1] - half_cos[1:] * half_sin[:-1]
    if fixed:
        assert layout.standing is not None
        contacts &= places[:-1, layout.feet, 1] < layout.standing
        yaw_step *= np.where(half_cos[1:] * half_cos[:-1] + half_sin[1:] * half_sin[:-1] < 0, -1, 1)
    cos = half_cos**2 - half_sin**2
    sin = 2 * half_cos * half_sin

    frames = len(places) - 1
    features = np.empty((frames, layout.feature_dim), dtype=np.float32)
    features[:, 0] = np.arcsin(np.clip(yaw_step, -1, 1))
    # The root's step is seen from the heading it arrives in, the joints' steps from the one they leave.
    features[:, 1:3] = _turn(steps[:, 0], cos[1:], sin[1:])[:, [0, 2]]
    features[:, 3] = places[:-1, 0, 1]
    local = places[:-1, 1:].copy()
    local[..., [0, 2]] -= places[:-1, :1, [0, 2]]
    facing = cos[:-1, None], sin[:-1, None]
    features[:, layout.positions] = _turn(local, *facing).reshape(frames, -1)
    directions = directions[:-1]
    if fixed:
        rotations = _rotations(_turn(directions, *facing), None, layout.rest, layout.before_fixed)
    else:
        rotations = _rotations(directions, (cos[:-1], sin[:-1]), layout.rest, layout.before)
    features[:, layout.rotations] = rotations
    features[:, layout.velocities] = _turn(steps, *facing).reshape(frames, -1)
    features[:, layout.contacts] = contacts
    return features


def features_to_joints(features: Any, layout: Layout = HUMANML3D_LAYOUT) -> Any:
    """Joint positions from the root channels and the local positions, `0:67` (KIT-ML `0:64`).

    features: (..., T, 263) numpy array or torch tensor (leading dimensions are batches), of any variant.
    Returns (..., T, J, 3) metres of the same kind. numpy: summed in float64, returned as float32 (float64
    for float64). torch: differentiable, on the tensor's device, in its dtype or, below 32 bits, in float32.
    The first frame's root stands at X = Z = 0 and faces +Z.
    Raises ScaMoError for another shape.
    """
    if features.ndim < 2 or features.shape[-1] != layout.feature_dim:
        raise ScaMoError(
            f"features: expected shape (..., frames, {layout.feature_dim}), got {tuple(features.shape)}"
        )
    used = layout.positions.stop
    xp: Any
    if isinstance(features, np.ndarray):
        xp = np
        data = features[..., :used].astype(np.float64)
    else:
        import torch

        xp = torch
        data = features[..., :used]
        data = data.float() if data.dtype.itemsize < 4 else data

    before = xp.concatenate([xp.zeros_like(data[..., :1, :3]), data[..., :-1, :3]], -2)
    # Channel 0 holds half angles; going back to the world turns the other way.
    yaw = before[..., 0].cumsum(-1) * -2
    cos, sin = xp.cos(yaw), xp.sin(yaw)
    step_x, step_z = before[..., 1], before[..., 2]
    root_x = (step_x * cos + step_z * sin).cumsum(-1)
    root_z = (step_z * cos - step_x * sin).cumsum(-1)
    root = xp.stack([root_x, data[..., 3], root_z], -1)
    local = data[..., layout.positions].reshape((*data.shape[:-1], len(layout.skeleton) - 1, 3))
    x, y, z = local[..., 0], local[..., 1], local[..., 2]
    cos, sin = cos[..., None], sin[..., None]
    others = xp.stack(
        [x * cos + z * sin + root_x[..., None], y, z * cos - x * sin + root_z[..., None]],
        -1,
    )
    joints = xp.concatenate([root[..., None, :], others], -2)
    if layout.unit != 1:
        joints = joints / layout.unit
    if xp is np and features.dtype != np.float64:
        joints = joints.astype(np.float32)
    return joints


def _refuse_not_finite(places: np.ndarray, name: str, layout: Layout) -> None:
    finite = np.isfinite(places)
    if not finite.all():
        frame, joint, axis = (int(i) for i in np.argwhere(~finite)[0])
        value = places[frame, joint, axis]
        raise ScaMoError(
            f"{name}: frame {frame}, joint {joint} ({layout.skeleton.names[joint]}): {'xyz'[axis]} is "
            f"{value}, expected finite metres"
        )


def _bones(places: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Unit directions (T, J - 1, 3) and lengths (T, J - 1) of the bones that end in joints 1 to J - 1."""
    bones = places[:, 1:] - places[:, layout.parents]
    lengths = np.sqrt(np.einsum("tbi,tbi->tb", bones, bones))
    if not lengths.all():
        frame, bone = (int(i) for i in np.argwhere(lengths == 0)[0])
        names = layout.skeleton.names
        raise ScaMoError(
            f"joints: frame {frame}, joint {bone + 1} ({names[bone + 1]}) lies on its parent "
            f"{names[layout.parents[bone]]}: a bone of no length has no rotation"
        )
    return bones / lengths[..., None], lengths


def _retarget(
    places: np.ndarray,
    directions: np.ndarray,
    lengths: np.ndarray,
    offsets: np.ndarray,
    layout: Layout,
    fixed: bool,
) -> np.ndarray:
    """Give every bone the length it has in `offsets`.

    The original turns joints into rotations and back. Its rotations take a rest bone exactly to the direction
    of the bone in motion, so what comes out is that direction with another length.
    """
    n_joints = len(layout.skeleton)
    if offsets.shape != (n_joints, 3):
        raise ScaMoError(f"target_offsets: expected shape ({n_joints}, 3), got {offsets.shape}")
    wanted = np.linalg.norm(offsets, axis=-1)
    bad = ~(np.isfinite(wanted[1:]) & (wanted[1:] > 0))
    if bad.any():
        joint = int(np.argmax(bad)) + 1
        raise ScaMoError(
            f"target_offsets: joint {joint} ({layout.skeleton.names[joint]}): expected a bone of positive "
            f"length, got {wanted[joint] / layout.unit}"
        )
    leg = layout.legs if fixed else layout.leg
    found = np.median(lengths[:, leg - 1].sum(-1)) if fixed else lengths[0, leg - 1].sum()
    out = np.empty_like(places)
    out[:, 0] = places[:, 0] * (wanted[leg].sum() / found)
    bones = directions * wanted[1:, None]
    for joint, parent in enumerate(layout.parents, 1):
        out[:, joint] = out[:, parent] + bones[:, joint - 1]
    return out


def _floor(places: np.ndarray, rate: float) -> float:
    """The lowest height that the lowest joint keeps for three of five frames, or `rate` times as many."""
    side = round(2 * rate)
    lowest = np.pad(places[..., 1].min(1), side, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(lowest, 2 * side + 1)
    return float(np.median(windows, axis=-1).min())


def _turn(vectors: np.ndarray, cos: Any, sin: Any) -> np.ndarray:
    """Rotate (..., 3) about Y by the angle with this cosine and sine, each of the shape (...) or a scalar."""
    x, z = vectors[..., 0], vectors[..., 2]
    out = np.empty_like(vectors)
    out[..., 0] = x * cos + z * sin
    out[..., 1] = vectors[..., 1]
    out[..., 2] = z * cos - x * sin
    return out


def _first_heading(frame: np.ndarray, layout: Layout) -> np.ndarray:
    """Cosine and sine (2,) of the turn about Y that makes a pose (J, 3) face +Z."""
    right_hip, left_hip, right_shoulder, left_shoulder = layout.skeleton.facing
    across = (frame[right_hip] - frame[left_hip]) + (frame[right_shoulder] - frame[left_shoulder])
    # forward = Y x across
    x, z = across[2], -across[0]
    length = np.hypot(x, z)
    if length < 1e-8 * layout.unit:
        raise ScaMoError(
            "joints: frame 0 faces nowhere: hips and shoulders have no horizontal extent, expected a pose "
            "whose left and right sides lie apart"
        )
    return np.array([z, -x]) / length


def _headings(places: np.ndarray, sigma: float, layout: Layout, fixed: bool) -> np.ndarray:
    """Cosine and sine (T, 2) of the turns about Y that make each frame's smoothed heading +Z."""
    from scipy.ndimage import gaussian_filter1d

    right_hip, left_hip, right_shoulder, left_shoulder = layout.skeleton.facing
    if not fixed:
        # The original mixes up the two hips here, so that their vector is subtracted from the shoulders'.
        left_hip, right_hip = right_hip, left_hip
    across = places[:, right_hip] - places[:, left_hip] + places[:, right_shoulder] - places[:, left_shoulder]
    # A frame without a direction adds nothing to the filter.
    lengths = np.maximum(np.linalg.norm(across, axis=-1, keepdims=True), 1e-12)
    # forward = Y x across, whose Z is the cosine and -X the sine.
    headings = across[:, [0, 2]] / -lengths
    headings = gaussian_filter1d(headings, sigma, axis=0, mode="nearest")
    lengths = np.linalg.norm(headings, axis=-1)
    if lengths.min() < 1e-8:
        frame = int(lengths.argmin())
        why = "" if fixed else "shoulders and hips are equally wide or "
        raise ScaMoError(
            f"joints: frame {frame} faces nowhere: around it {why}the "
            "directions cancel, so the format has no heading for it"
        )
    return headings / lengths[:, None]


def _half_turns(headings: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine (T,) of half the turns (T, 2) that are left after a first one (2,)."""
    cos = headings @ first
    sin = headings[:, 1] * first[0] - headings[:, 0] * first[1]
    # The shortest turn as a quaternion (w, 0, y, 0): w >= 0, so y carries the sign.
    half_cos = np.sqrt(np.maximum((1 + cos) / 2, 0))
    half_sin = np.copysign(np.sqrt(np.maximum((1 - cos) / 2, 0)), sin)
    half_cos[0], half_sin[0] = 1.0, 0.0
    return half_cos, half_sin


def _rotations(
    directions: np.ndarray, root: tuple[np.ndarray, np.ndarray] | None, rest: np.ndarray, before: np.ndarray
) -> np.ndarray:
    """Rotation features (T, 6 (J - 1)) of bone directions (T, J - 1, 3) and the root's turns, if any."""
    frames, n_bones = directions.shape[:2]
    axis = np.cross(rest, directions)
    along = np.einsum("bi,tbi->tb", rest, directions)
    # Shortest rotation from rest to direction: along * I + [axis]x + axis axis^T / (1 + along).
    opposite = 1 + along < 1e-14
    scale = 1 / np.where(opposite, 1.0, 1 + along)
    matrices = np.empty((frames, n_bones + 1, 3, 3))
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
            square = np.roll(rest[bone], 1)
            bones[frame, bone] = 2 * np.outer(square, square) - np.eye(3)
    matrices[:, 0] = np.eye(3)
    if root is not None:
        cos, sin = root
        matrices[:, 0, 0, 0] = matrices[:, 0, 2, 2] = cos
        matrices[:, 0, 0, 2] = sin
        matrices[:, 0, 2, 0] = -sin
    # Column k of before^T @ bone, laid out column by column.
    columns = np.einsum("tbmi,tbmk->tbki", matrices[:, before], bones[..., :2])
    return columns.reshape(frames, -1)
