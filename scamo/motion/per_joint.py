"""The features of every joint by itself, and back: the same numbers in another order.

A joint has, as far as the representation holds them and in this order: the root's columns (joint 0 alone),
its position, rotation and velocity, and the contact of its foot. HumanML3D's joint 0 has 4 + 3 features,
the others 3 + 6 + 3, ankles and balls of the feet one more; SnapMoGen's joint 0 has 4 + 3 + 6 + 3.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scamo.errors import ScaMoError
from scamo.motion.body import Body
from scamo.motion.representation import Representation


@dataclass(frozen=True, eq=False)
class PerJoint:
    """Where each joint's features are. Get one by `PerJoint.of(feature_dim)`.

    columns: int64 (J, D), the column of each joint's features, -1 where the joint has fewer than D. places:
    int64 (C,), where in a flattened (J, D) each column is. widths: features of each joint, (J,).
    """

    columns: NDArray[np.int64]
    places: NDArray[np.int64]

    @staticmethod
    def of(feature_dim: int) -> PerJoint:
        """The one of a known representation. Raises ScaMoError naming the known ones."""
        return _of(int(feature_dim))

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple((self.columns >= 0).sum(1).tolist())

    def split(self, features: Any) -> Any:
        """Features (..., C), numpy or torch -> (..., J, D) of the same kind and dtype, 0 where none is.

        Raises ScaMoError for another width.
        """
        if features.shape[-1] != len(self.places):
            raise ScaMoError(f"features: expected width {len(self.places)}, got {features.shape[-1]}")
        columns, empty = self.columns.clip(0).ravel(), self.columns < 0
        if isinstance(features, np.ndarray):
            padded = features[..., columns].reshape(*features.shape[:-1], *self.columns.shape)
            padded[..., empty] = 0
            return padded
        import torch

        index, mask = (torch.from_numpy(array).to(features.device) for array in (columns, empty))
        padded = features.index_select(-1, index).unflatten(-1, self.columns.shape)
        return padded.masked_fill(mask, 0)

    def merge(self, padded: Any) -> Any:
        """The inverse of `split`: (..., J, D) -> (..., C); what stands where no feature is is not read.

        Raises ScaMoError for another shape.
        """
        if tuple(padded.shape[-2:]) != self.columns.shape:
            raise ScaMoError(
                f"features by joint: expected shape (..., {self.columns.shape[0]}, {self.columns.shape[1]}), "
                f"got {tuple(padded.shape)}"
            )
        flat = padded.reshape(*padded.shape[:-2], -1)
        if isinstance(padded, np.ndarray):
            return flat[..., self.places]
        import torch

        return flat.index_select(-1, torch.from_numpy(self.places).to(padded.device))


@functools.cache
def _of(feature_dim: int) -> PerJoint:
    representation = Representation.of(feature_dim)
    joints: list[list[int]] = [[] for _ in range(representation.n_joints)]
    joints[0] += _range(representation.root)
    for part, size in (
        (representation.positions, 3),
        (representation.rotations, 6),
        (representation.velocities, 3),
    ):
        columns = np.array(_range(part)).reshape(-1, size)
        # Parts that leave the root out begin with joint 1.
        for joint, own in enumerate(columns.tolist(), len(joints) - len(columns)):
            joints[joint] += own
    if representation.contacts is not None:
        feet = (joint for foot in Body.of(representation.n_joints).feet for joint in foot)
        for joint, column in zip(feet, _range(representation.contacts), strict=True):
            joints[joint].append(column)
    columns = np.full((len(joints), max(map(len, joints))), -1)
    for row, own in zip(columns, joints, strict=True):
        row[: len(own)] = own
    places = np.empty(feature_dim, dtype=np.int64)
    flat = columns.ravel()
    places[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
    return PerJoint(columns, places)


def _range(columns: slice) -> list[int]:
    return list(range(columns.start, columns.stop))
