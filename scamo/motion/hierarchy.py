"""A skeleton with any joints and an animation on it, as motion-capture files hold them.

Lengths are in the file's own units and the axes are the file's own: `scamo.motion.retarget` makes metres, Y
up and the 22 joints of it. Quaternions are (w, x, y, z).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from scamo.errors import ScaMoError

AXES = {"X": 0, "Y": 1, "Z": 2}
LARGEST = 1e9  # no length or angle of a body is larger, in any unit
_SHORTEST_FRAME = 1e-5  # seconds


@dataclass(frozen=True)
class Hierarchy:
    """Joints in an order where parents come first.

    names: all different. parents: -1 for the root, which is joint 0 and the only one. offsets: (J, 3)
    float64, every joint's place relative to its parent at rest, when no joint is turned. The ends of the last
    bones are joints too, called `NAME.end`. Raises ScaMoError for what is no tree.
    """

    names: tuple[str, ...]
    parents: tuple[int, ...]
    offsets: NDArray[np.float64]

    def __post_init__(self) -> None:
        count = len(self.names)
        if not count or len(self.parents) != count or self.offsets.shape != (count, 3):
            raise ScaMoError(
                f"hierarchy: {count} names, {len(self.parents)} parents and offsets {self.offsets.shape}, "
                "expected as many of each"
            )
        if len(set(self.names)) != count:
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ScaMoError(f"hierarchy: joint name {twice!r} is used twice")
        if self.parents[0] != -1 or any(not 0 <= p < j for j, p in enumerate(self.parents) if j):
            raise ScaMoError("hierarchy: expected one root, first, and every parent before its children")

    def __len__(self) -> int:
        return len(self.names)

    def ancestors(self, joints: Iterable[int]) -> list[int]:
        """These joints and all above them, ascending."""
        found: set[int] = set()
        for joint in joints:
            while joint >= 0 and joint not in found:
                found.add(joint)
                joint = self.parents[joint]
        return sorted(found)

    def rest_places(self) -> NDArray[np.float64]:
        """(J, 3): where the joints are when none is turned and the root is at the origin."""
        places = self.offsets.copy()
        places[0] = 0
        for joint in range(1, len(self)):
            places[joint] += places[self.parents[joint]]
        return places


@dataclass(frozen=True)
class Animation:
    """rotations: (T, J, 4) float64 unit quaternions relative to the parent joint; each turns the bones that
    leave its joint. translations: (T, J, 3) float64, every joint's place relative to its parent: its offset
    where the file does not move it. fps: frames a second. metres_a_unit: where the file says it, else None.
    """

    hierarchy: Hierarchy
    rotations: NDArray[np.float64]
    translations: NDArray[np.float64]
    fps: float
    metres_a_unit: float | None = None

    def __len__(self) -> int:
        return len(self.rotations)

    def frames(self, which: slice | NDArray[np.intp]) -> Animation:
        """Some of the frames, at the same rate."""
        return replace(self, rotations=self.rotations[which], translations=self.translations[which])

    def forward_kinematics(
        self, joints: Iterable[int] | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Places (T, J, 3) and rotations (T, J, 3, 3) in the world.

        joints: only these and those above them are worked out; the others are NaN.
        """
        hierarchy = self.hierarchy
        needed = list(range(len(hierarchy))) if joints is None else hierarchy.ancestors(joints)
        frames = len(self)
        # Joints first: every step then works on contiguous blocks.
        places = np.full((len(hierarchy), frames, 3), np.nan)
        turned = np.full((len(hierarchy), frames, 3, 3), np.nan)
        for joint in needed:
            place = self.translations[:, joint]
            turn = _matrices(self.rotations[:, joint])
            parent = hierarchy.parents[joint]
            if parent >= 0:
                place = places[parent] + (turned[parent] @ place[..., None])[..., 0]
                turn = turned[parent] @ turn
            places[joint], turned[joint] = place, turn
        return np.moveaxis(places, 0, 1), np.moveaxis(turned, 0, 1)

    def resampled(self, fps: float) -> Animation:
        """The animation at another frame rate.

        Where the rates divide, frames are left out, from the first on, as HumanML3D does; else rotations are
        interpolated along the shortest arc and places linearly.
        """
        ratio = self.fps / fps
        if abs(ratio - round(ratio)) < 1e-6 * ratio and round(ratio) >= 1:
            return replace(self.frames(slice(None, None, round(ratio))), fps=fps)
        count = int((len(self) - 1) / ratio + 1e-9) + 1
        times = np.minimum(np.arange(count) * ratio, len(self) - 1)
        before = np.minimum(times.astype(np.intp), max(len(self) - 2, 0))
        after = np.minimum(before + 1, len(self) - 1)
        part = (times - before)[:, None, None]
        moved = (1 - part) * self.translations[before] + part * self.translations[after]
        turned = slerp(self.rotations[before], self.rotations[after], part)
        return replace(self, rotations=turned, translations=moved, fps=fps)


def _matrices(quaternions: NDArray[np.float64]) -> NDArray[np.float64]:
    return Rotation.from_quat(quaternions[..., [1, 2, 3, 0]]).as_matrix()


def multiply(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Products of quaternions (..., 4): first b turns, then a."""
    aw, ax, ay, az = np.moveaxis(a, -1, 0)
    bw, bx, by, bz = np.moveaxis(b, -1, 0)
    return np.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        axis=-1,
    )


def about_axes(axes: NDArray[np.intp], radians: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quaternions (..., n, 4) of turns about coordinate axes (n,) by angles (..., n)."""
    out = np.zeros((*radians.shape, 4))
    out[..., 0] = np.cos(radians / 2)
    out[..., np.arange(len(axes)), 1 + axes] = np.sin(radians / 2)
    return out


def slerp(a: NDArray[np.float64], b: NDArray[np.float64], part: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quaternions between a and b (..., 4), `part` (..., 1) of the way, along the shorter arc."""
    cos = (a * b).sum(-1, keepdims=True)
    b = np.where(cos < 0, -b, b)
    angle = np.arccos(np.minimum(np.abs(cos), 1))
    sin = np.sin(angle)
    # Near one another, where the sine vanishes, a straight line is the arc.
    near = sin < 1e-6
    safe = np.where(near, 1, sin)
    first = np.where(near, 1 - part, np.sin((1 - part) * angle) / safe)
    second = np.where(near, part, np.sin(part * angle) / safe)
    out = first * a + second * b
    return out / np.linalg.norm(out, axis=-1, keepdims=True)


def rate_of(seconds: str) -> float:
    """Frames a second of a frame time as it is written: ".0083333" is 120 and "0.0417083750" is 23.976.

    A whole number where it is one but for the rounding of the last digit. Raises ValueError for no number or
    one below 1e-5.
    """
    value = float(seconds)
    if not _SHORTEST_FRAME <= value < LARGEST:
        raise ValueError(f"a frame of {seconds} s")
    mantissa, _, exponent = seconds.lower().partition("e")
    step = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    near = round(1 / value)
    # Few digits say little: 0.08 is 12.5 a second, though 1 / 12 rounds to it.
    if near >= 1 and abs(1 / near - value) <= min(0.5001 * step, 0.02 * value):
        return float(near)
    return round(1 / value, 4) or 1 / value


def read_text(path: Path, kind: str) -> str:
    """The text of a file. Raises ScaMoError if there is none or it is not UTF-8; kind: "BVH"."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ScaMoError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ScaMoError(f"{path}: not a readable {kind} file: {error}") from error


def whole(word: str) -> int | None:
    """A number of digits alone, at most nine; None for anything else."""
    return int(word) if word.isascii() and word.isdecimal() and len(word) < 10 else None


def finite(word: str) -> float:
    """A number as mocap files write it. Raises ValueError for others, NaN and what is too large."""
    value = float(word)
    if not abs(value) < LARGEST or "_" in word or not word.isascii():
        raise ValueError(word)
    return value
