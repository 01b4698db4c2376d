"""What a dataset's features are, by their number: the one place that knows 263, 251, 272 and 296.

| features | of                            | joints | frames a second |
|----------|-------------------------------|--------|-----------------|
| 263      | HumanML3D                     | 22     | 20              |
| 251      | KIT-ML                        | 21     | 12.5            |
| 272      | MotionStreamer, MotionMillion | 22     | 30              |
| 296      | SnapMoGen                     | 24     | 30              |

KIT-ML's channels are HumanML3D's with a joint less, in its own joint order; its lengths are millimetres of a
body scaled to about one metre, which `to_joints` turns into metres of that body.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from scamo.errors import ScaMoError
from scamo.motion import features as humanml3d
from scamo.motion import features272, features296
from scamo.motion.skeleton import JOINT_NAMES, KIT_SKELETON, MIRROR_PAIRS, N_JOINTS, PARENTS


@dataclass(frozen=True)
class Representation:
    """Features of one kind. Get one by `Representation.of(feature_dim)`.

    joint_names and parents: of the joints that `to_joints` gives; a parent comes before its children, the
    root's is -1. unit: metres in one of the features' lengths. groups: every column belongs to one; the
    standard deviation is averaged inside each. positions, velocities and rotations: their columns, 3, 3 and 6
    a joint; positions begin with joint `first_position`. root: the columns that say how the root moves and
    turns. contacts: None where there are none. fps: the rate that the format is made for. extra_joint_frames:
    frames of joints beyond those of the features. item_frames: the shortest and one more than the longest
    item of the evaluation protocol.
    """

    name: str
    feature_dim: int
    n_joints: int
    joint_names: tuple[str, ...]
    parents: tuple[int, ...]
    unit: float
    fps: float
    groups: Mapping[str, slice]
    root: slice
    positions: slice
    velocities: slice
    rotations: slice
    contacts: slice | None
    first_position: int
    extra_joint_frames: int
    item_frames: tuple[int, int]
    _to_joints: Callable[[Any], Any]
    _from_joints: Callable[[np.ndarray, float], np.ndarray] | None
    _to_rotations: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None
    _mirror: tuple[np.ndarray, np.ndarray]

    @classmethod
    def find(cls, feature_dim: int) -> Representation | None:
        """The one of this many features, None if there is none."""
        return _BY_WIDTH.get(int(feature_dim))

    @classmethod
    def of(cls, feature_dim: int) -> Representation:
        """The one of this many features. Raises ScaMoError naming the known ones."""
        found = cls.find(feature_dim)
        if found is None:
            known = ", ".join(f"{r.feature_dim} ({r.name})" for r in _BY_WIDTH.values())
            raise ScaMoError(f"feature_dim = {feature_dim}: expected one of {known}")
        return found

    def to_joints(self, features: Any) -> Any:
        """Joints (..., T, n_joints, 3), metres, of features (..., T, feature_dim), numpy or torch.

        The first frame's root stands at X = Z = 0 and faces +Z. Raises ScaMoError for another shape.
        """
        if features.ndim < 2 or features.shape[-1] != self.feature_dim:
            raise ScaMoError(
                f"features: expected shape (..., frames, {self.feature_dim}), got {tuple(features.shape)}"
            )
        return self._to_joints(features)

    def from_joints(self, joints: np.ndarray, fps: float | None = None) -> np.ndarray:
        """Features (T - extra_joint_frames, feature_dim) float32 of joints (T, n_joints, 3), metres.

        fps: frames a second of the joints, None for the format's. Rotations that the 272 features want are
        fitted (`features272.encode` takes true ones). Raises ScaMoError for joints that cannot be converted,
        and for SnapMoGen, whose features are only read.
        """
        if self._from_joints is None:
            raise ScaMoError(f"{self.name}: features cannot be made from joints, only read")
        return self._from_joints(joints, self.fps if fps is None else fps)

    @property
    def true_rotations(self) -> bool:
        """Forward kinematics of the rotations gives the positions, so that an export need not fit any."""
        return self._to_rotations is not None

    def to_rotations(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rotations (..., T, n_joints, 3, 3) relative to the parent joint, and the root's way (..., T, 3).

        Both float64, metres, and as `to_joints` places the frames of features (..., T, feature_dim). Raises
        ScaMoError for another shape, and for a format without true rotations.
        """
        if self._to_rotations is None:
            raise ScaMoError(f"{self.name}: features have no true rotations")
        return self._to_rotations(features)

    def rotations_off(self, features: np.ndarray) -> float:
        """By how many metres features (T, feature_dim), T >= 1, contradict themselves.

        That is how far a bone, turned back by the rotations, is from where it is on average: the most of all
        frames and bones. Raises ScaMoError as `to_rotations` does.
        """
        rotations, _ = self.to_rotations(features)
        joints = self.to_joints(np.asarray(features, dtype=np.float64))
        absolute = rotations.copy()
        for joint, parent in enumerate(self.parents[1:], 1):
            absolute[:, joint] = absolute[:, parent] @ rotations[:, joint]
        parents = list(self.parents[1:])
        bones = joints[:, 1:] - joints[:, parents]
        back = np.einsum("tbji,tbj->tbi", absolute[:, parents], bones)
        return float(np.linalg.norm(back - back.mean(0), axis=-1).max())

    def mirrored(self, features: Any) -> Any:
        """The features of the motion in a mirror, numpy or torch (..., feature_dim).

        Columns change places and signs, so twice is exactly the original. Another width raises ScaMoError.
        """
        if features.shape[-1] != self.feature_dim:
            raise ScaMoError(f"features: expected width {self.feature_dim}, got {features.shape[-1]}")
        source, sign = self._mirror
        swapped = features[..., source]
        if isinstance(features, np.ndarray):
            return swapped * sign.astype(features.dtype)
        return swapped * swapped.new_tensor(sign.tolist())

    def grouped_std(self, std: np.ndarray) -> np.ndarray:
        """Standard deviations (feature_dim,), each the mean of its group: one that hardly moves thus cannot
        explode when it is normalised."""
        grouped = np.empty_like(std)
        for group in self.groups.values():
            grouped[group] = std[group].mean()
        return grouped


def _mirror(
    pairs: tuple[tuple[int, int], ...], n_joints: int, parts: list[tuple[slice, list[int], int | None]]
) -> tuple[np.ndarray, np.ndarray]:
    """Which column each column of the mirrored motion is, and its sign.

    parts: columns, the signs of a joint's (or of all, where the joint that they begin with is None).
    """
    order = np.arange(n_joints)
    for left, right in pairs:
        order[[left, right]] = right, left
    source, sign = [], []
    for part, signs, first in parts:
        columns = np.arange(part.start, part.stop).reshape(-1, len(signs))
        source.append((columns if first is None else columns[order[first:] - first]).ravel())
        sign.append(np.tile(signs, len(columns)))
    return np.concatenate(source), np.concatenate(sign)


_POINT = [-1, 1, 1]
_SIX = [
    1,
    -1,
    -1,
    -1,
    1,
    1,
]  # M R M with M = diag(-1, 1, 1), of the first two columns and of the first two rows


def _of_guo(name: str, joint_names: tuple[str, ...], **fields: Any) -> Representation:
    """The layout of Guo et al. for a body of these joints."""
    root, n_joints = humanml3d.ROOT, len(joint_names)
    ends = np.cumsum([root.stop, 3 * (n_joints - 1), 6 * (n_joints - 1), 3 * n_joints, 4]).tolist()
    positions, rotations, velocities, contacts = (slice(*ends[i : i + 2]) for i in range(4))
    pairs = fields.pop("pairs")
    source, sign = _mirror(
        pairs,
        n_joints,
        [
            (root, [-1, -1, 1, 1], None),
            (positions, _POINT, 1),
            (rotations, _SIX, 1),
            (velocities, _POINT, 0),
            (contacts, [1, 1, 1, 1], None),
        ],
    )
    source[contacts] = np.roll(source[contacts], 2)  # left ankle and ball, right ankle and ball
    groups = {
        "yaw_velocity": slice(0, 1),
        "root_velocity": slice(1, 3),
        "root_height": slice(3, 4),
        "positions": positions,
        "rotations": rotations,
        "velocities": velocities,
        "contacts": contacts,
    }
    return Representation(
        name=name,
        feature_dim=contacts.stop,
        n_joints=n_joints,
        joint_names=joint_names,
        groups=groups,
        root=root,
        positions=positions,
        velocities=velocities,
        rotations=rotations,
        contacts=contacts,
        first_position=1,
        extra_joint_frames=1,
        _to_rotations=None,
        _mirror=(source, sign),
        **fields,
    )


HUMANML3D = _of_guo(
    "HumanML3D",
    JOINT_NAMES,
    parents=PARENTS,
    unit=1.0,
    fps=humanml3d.FORMAT_FPS,
    item_frames=(40, 200),
    pairs=MIRROR_PAIRS,
    _to_joints=humanml3d.features_to_joints,
    _from_joints=lambda joints, fps: humanml3d.joints_to_features(joints, fps=fps),
)
KIT_ML = _of_guo(
    "KIT-ML",
    KIT_SKELETON.names,
    parents=KIT_SKELETON.parents,
    unit=0.001,
    fps=12.5,
    item_frames=(24, 200),
    pairs=KIT_SKELETON.mirror_pairs,
    _to_joints=lambda features: humanml3d.features_to_joints(features, humanml3d.KIT_LAYOUT),
    _from_joints=lambda joints, fps: humanml3d.joints_to_features(
        joints, fps=fps, layout=humanml3d.KIT_LAYOUT
    ),
)
SMPL_272 = Representation(
    name="272",
    feature_dim=features272.FEATURE_DIM,
    n_joints=N_JOINTS,
    joint_names=JOINT_NAMES,
    parents=PARENTS,
    unit=1.0,
    fps=features272.FORMAT_FPS,
    groups=features272.FEATURE_GROUPS,
    root=slice(0, 8),
    positions=features272.POSITIONS,
    velocities=features272.VELOCITIES,
    rotations=features272.ROTATIONS,
    contacts=None,
    first_position=0,
    extra_joint_frames=0,
    item_frames=(60, 300),  # HumanML3D's, at 30 fps
    _to_joints=features272.to_joints,
    _from_joints=lambda joints, fps: features272.encode(joints, fps=fps).features,
    _to_rotations=features272.to_rotations,
    _mirror=_mirror(
        MIRROR_PAIRS,
        N_JOINTS,
        [
            (features272.ROOT_VELOCITY, [-1, 1], None),
            (features272.TURN, _SIX, None),
            (features272.POSITIONS, _POINT, 0),
            (features272.VELOCITIES, _POINT, 0),
            (features272.ROTATIONS, _SIX, 0),
        ],
    ),
)
_SNAPMOGEN_MIRROR = _mirror(
    features296.MIRROR_PAIRS,
    features296.N_JOINTS,
    [
        (features296.ROOT, [-1, -1, 1, 1], None),
        (features296.ROTATIONS, _SIX, 0),
        (features296.POSITIONS, _POINT, 0),
        (features296.VELOCITIES, _POINT, 0),
        (features296.CONTACTS, [1, 1, 1, 1], None),
    ],
)
_SNAPMOGEN_MIRROR[0][features296.CONTACTS] = np.roll(_SNAPMOGEN_MIRROR[0][features296.CONTACTS], 2)
SNAPMOGEN = Representation(
    name="SnapMoGen",
    feature_dim=features296.FEATURE_DIM,
    n_joints=features296.N_JOINTS,
    joint_names=features296.JOINT_NAMES,
    parents=features296.PARENTS,
    unit=features296.UNIT_M,
    fps=features296.FORMAT_FPS,
    groups={
        "yaw_velocity": slice(0, 1),
        "root_velocity": slice(1, 3),
        "root_height": slice(3, 4),
        "rotations": features296.ROTATIONS,
        "positions": features296.POSITIONS,
        "velocities": features296.VELOCITIES,
        "contacts": features296.CONTACTS,
    },
    root=features296.ROOT,
    positions=features296.POSITIONS,
    velocities=features296.VELOCITIES,
    rotations=features296.ROTATIONS,
    contacts=features296.CONTACTS,
    first_position=0,
    extra_joint_frames=0,
    item_frames=(128, 361),  # the authors' shortest; their longest clips have 12 s
    _to_joints=features296.to_joints,
    _from_joints=None,  # joints do not say how the bones turn
    _to_rotations=features296.to_rotations,
    _mirror=_SNAPMOGEN_MIRROR,
)
REPRESENTATIONS = (HUMANML3D, KIT_ML, SMPL_272, SNAPMOGEN)
_BY_WIDTH = {one.feature_dim: one for one in REPRESENTATIONS}
