"""BVH files: written from joints with fitted rotations, read back by forward kinematics.

The rest pose is a T-pose that faces +Z with Y up and the pelvis at the origin, in metres: Blender's importer
with its defaults shows it upright and in life size. MotionBuilder, Maya and Unreal count in centimetres:
scale=100. Angles are degrees in the channel order Z, X, Y, the usual one where Y is up, and pass 180° without
a jump. The format has no room for remarks; rotations in a file written here are always fitted (`ik`).
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

from scamo.errors import ScaMoError
from scamo.motion.files import replacing
from scamo.motion.ik import CHILDREN, fit_rotations
from scamo.motion.motion import Motion
from scamo.motion.skeleton import JOINT_NAMES, N_JOINTS, quaternions_to_matrices

# Where the bones without a next joint end, metres: toes, crown, fingertips.
END_SITES: dict[int, tuple[float, float, float]] = {
    10: (0.0, 0.0, 0.07),
    11: (0.0, 0.0, 0.07),
    15: (0.0, 0.14, 0.0),
    20: (0.16, 0.0, 0.0),
    21: (-0.16, 0.0, 0.0),
}
# Constant bones that miss a joint by more than this, metres, are not taken for the motion.
TOLERANCE = 5e-4

_POSITIONS = ("Xposition", "Yposition", "Zposition")
_ROTATIONS = ("Zrotation", "Xrotation", "Yrotation")
_AXES = {"X": 0, "Y": 1, "Z": 2}


def save_bvh(motion: Motion, path: str | Path, *, scale: float = 1.0, stretch: bool | None = None) -> None:
    """Write a motion as BVH.

    scale: units a metre; 100 writes centimetres.
    stretch: False gives constant bones and rotations only, which is what retargeting wants; joints that are
    not those of a skeleton are then missed by `fit_rotations(...).error`. True gives every joint position
    channels, whose values replace its OFFSET (as Blender and MotionBuilder read them; three.js adds the two),
    so that every joint is where the motion has it. None stretches only where constant bones would miss a
    joint by more than half a millimetre.
    Raises ScaMoError for a scale that is not positive and what `fit_rotations` refuses.
    """
    if not np.isfinite(scale) or scale <= 0:
        raise ScaMoError(f"scale: expected a positive number of units a metre, got {scale}")
    fit = fit_rotations(motion.joints, fps=motion.fps)
    if stretch is None:
        stretch = bool(fit.error.max() > TOLERANCE)

    lines = ["HIERARCHY"]
    order = _write_joint(lines, 0, "", fit.offsets * scale, scale, stretch)
    angles = _euler_zxy(quaternions_to_matrices(fit.rotations))
    values = np.concatenate([fit.local * scale, angles], axis=-1)
    placed = order if stretch else order[:1]
    columns = [values[:, j] if j in placed else angles[:, j] for j in order]
    lines += ["MOTION", f"Frames: {len(motion)}", f"Frame Time: {1 / motion.fps:.9g}"]
    with replacing(path) as partial, partial.open("w", encoding="ascii", newline="\n") as stream:
        stream.write("\n".join(lines) + "\n")
        np.savetxt(stream, np.concatenate(columns, axis=1), fmt="%.6f")


def _write_joint(
    lines: list[str], joint: int, indent: str, offsets: np.ndarray, scale: float, stretch: bool
) -> list[int]:
    """Append a joint and those below it; returns them in the order of their channels."""
    inner = indent + "  "
    channels = (*_POSITIONS, *_ROTATIONS) if stretch or not joint else _ROTATIONS
    lines += [
        f"{indent}{'JOINT' if joint else 'ROOT'} {JOINT_NAMES[joint]}",
        f"{indent}{{",
        f"{inner}OFFSET {_numbers(offsets[joint])}",
        f"{inner}CHANNELS {len(channels)} {' '.join(channels)}",
    ]
    order = [joint]
    for child in CHILDREN[joint]:
        order += _write_joint(lines, child, inner, offsets, scale, stretch)
    if joint in END_SITES:
        end = _numbers(np.array(END_SITES[joint]) * scale)
        lines += [f"{inner}End Site", f"{inner}{{", f"{inner}  OFFSET {end}", f"{inner}}}"]
    lines.append(f"{indent}}}")
    return order


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{value:.6f}" for value in values)


def _euler_zxy(matrices: np.ndarray) -> np.ndarray:
    """Degrees (T, J, 3) about Z, X, Y, whose product in that order is (T, J, 3, 3), near to those before."""
    sin_x = np.clip(matrices[..., 2, 1], -1, 1)
    cos_x = np.hypot(matrices[..., 0, 1], matrices[..., 1, 1])
    first = np.stack(
        [
            np.arctan2(-matrices[..., 0, 1], matrices[..., 1, 1]),
            np.arctan2(sin_x, cos_x),
            np.arctan2(-matrices[..., 2, 0], matrices[..., 2, 2]),
        ],
        axis=-1,
    )
    # With X at a right angle only the sum of the other two counts, or their difference.
    locked = cos_x < 1e-7
    both = np.arctan2(matrices[..., 1, 0], matrices[..., 0, 0])
    before = np.zeros(first.shape[1:])
    out = np.empty_like(first)
    for t in range(len(first)):
        now = first[t]
        held = np.stack([both[t] - np.sign(sin_x[t]) * before[:, 2], now[:, 1], before[:, 2]], axis=-1)
        now = np.where(locked[t, :, None], held, now)
        other = np.stack([now[:, 0] + np.pi, np.pi - now[:, 1], now[:, 2] + np.pi], axis=-1)
        steps = [np.remainder(way - before + np.pi, 2 * np.pi) - np.pi for way in (now, other)]
        # The first frame takes the plain angles; they start within half a turn.
        nearer = t > 0 and np.abs(steps[1]).max(-1) < np.abs(steps[0]).max(-1)
        before = out[t] = before + np.where(np.asarray(nearer)[..., None], steps[1], steps[0])
    return np.degrees(out)


def load_bvh(path: str | Path, *, scale: float = 1.0) -> Motion:
    """Read a BVH file that `save_bvh` wrote, or another one that has the 22 joints under these names.

    scale: units a metre, as for `save_bvh`. Raises ScaMoError naming the file and what is wrong.
    """
    path = Path(path)
    if not np.isfinite(scale) or scale <= 0:
        raise ScaMoError(f"scale: expected a positive number of units a metre, got {scale}")
    try:
        words = path.read_text(encoding="utf-8-sig").split()
    except FileNotFoundError as error:
        raise ScaMoError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ScaMoError(f"{path}: not a readable BVH file: {error}") from error
    try:
        places, fps = _read(words)
    except (ValueError, IndexError) as error:
        raise ScaMoError(f"{path}: not a readable BVH file: {error}") from error
    missing = [name for name in JOINT_NAMES if name not in places]
    if missing:
        raise ScaMoError(f"{path}: {len(missing)} of the {N_JOINTS} joints are missing, first {missing[0]!r}")
    joints = np.stack([places[name] for name in JOINT_NAMES], axis=1) / scale
    try:
        return Motion(joints, fps=fps)
    except ScaMoError as error:
        raise ScaMoError(f"{path}: {error}") from error


def _read(words: list[str]) -> tuple[dict[str, np.ndarray], float]:
    """Places (T, 3) of the joints of a file, by name, and the frame rate."""
    names: list[str] = []
    parents: list[int] = []
    offsets: list[list[float]] = []
    channels: list[list[str]] = []
    if words[:1] != ["HIERARCHY"]:
        raise ValueError("it does not begin with HIERARCHY")
    at, open_joints = 1, [-1]
    while words[at] != "MOTION":
        word = words[at]
        if word in ("ROOT", "JOINT") and words[at + 2] == "{":
            parents.append(open_joints[-1])
            open_joints.append(len(names))
            names.append(words[at + 1])
            offsets.append([0.0, 0.0, 0.0])
            channels.append([])
            at += 3
        elif word == "End" and words[at + 2 : at + 4] == ["{", "OFFSET"] and words[at + 7] == "}":
            at += 8
        elif word == "OFFSET":
            offsets[open_joints[-1]] = [float(number) for number in words[at + 1 : at + 4]]
            at += 4
        elif word == "CHANNELS":
            count = int(words[at + 1])
            channels[open_joints[-1]] = words[at + 2 : at + 2 + count]
            at += 2 + count
        elif word == "}" and len(open_joints) > 1:
            open_joints.pop()
            at += 1
        else:
            raise ValueError(f"word {at + 1}, {word!r}, is not expected there")
    if words[at + 1] != "Frames:" or words[at + 3 : at + 5] != ["Frame", "Time:"]:
        raise ValueError("MOTION is not followed by 'Frames:' and 'Frame Time:'")
    frames, seconds = int(words[at + 2]), float(words[at + 5])
    if frames < 1 or not 0 < seconds < np.inf:
        raise ValueError(f"{frames} frames of {seconds} s")
    ends = np.cumsum([0, *(len(own) for own in channels)])
    values = np.array(words[at + 6 :], dtype=np.float64)
    if len(values) != frames * ends[-1]:
        raise ValueError(f"{len(values)} numbers for {frames} frames of {ends[-1]} channels")
    values = values.reshape(frames, -1)

    places: list[np.ndarray] = []
    turned: list[np.ndarray] = []
    for joint, (start, end) in enumerate(pairwise(ends)):
        place = np.tile(offsets[joint], (frames, 1))
        turn = np.broadcast_to(np.eye(3), (frames, 3, 3))
        for channel, numbers in zip(channels[joint], values[:, start:end].T, strict=True):
            axis, kind = _AXES.get(channel[:1].upper(), -1), channel[1:].lower()
            if axis < 0 or kind not in ("position", "rotation"):
                raise ValueError(f"unknown channel {channel!r} of {names[joint]!r}")
            if kind == "position":
                place[:, axis] = numbers
            else:
                turn = turn @ _turns(axis, np.radians(numbers))
        if parents[joint] >= 0:
            above = turned[parents[joint]]
            place = places[parents[joint]] + (above @ place[..., None])[..., 0]
            turn = above @ turn
        places.append(place)
        turned.append(turn)
    # A frame time is rounded, a frame rate is not.
    return dict(zip(names, places, strict=True)), round(1 / seconds, 4)


def _turns(axis: int, angles: np.ndarray) -> np.ndarray:
    """Rotation matrices (T, 3, 3) about a coordinate axis."""
    halves = np.zeros((len(angles), 4))
    halves[:, 0] = np.cos(angles / 2)
    halves[:, 1 + axis] = np.sin(angles / 2)
    return quaternions_to_matrices(halves)
