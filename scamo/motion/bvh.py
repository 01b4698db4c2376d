"""BVH files: written from joints with rotations, read with any skeleton.

The rest pose is a T-pose that faces +Z with Y up and the pelvis at the origin, in metres: Blender's importer
with its defaults shows it upright and in life size. MotionBuilder, Maya and Unreal count in centimetres:
scale=100. Angles are degrees in the channel order Z, X, Y, the usual one where Y is up, and pass 180° without
a jump. Rotations are fitted (`ik`) but for a motion whose features hold true ones; the format has no room
for such a remark (a .glb says it).
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scamo.errors import ScaMoError
from scamo.motion.body import Body, known_bodies
from scamo.motion.files import replacing
from scamo.motion.hierarchy import (
    AXES,
    LARGEST,
    Animation,
    Hierarchy,
    about_axes,
    finite,
    multiply,
    rate_of,
    read_text,
    whole,
)
from scamo.motion.ik import Fit, fit_rotations, given_rotations
from scamo.motion.motion import Motion
from scamo.motion.skeleton import N_JOINTS, quaternions_to_matrices

# Constant bones that miss a joint by more than this, metres, are not taken for the motion.
TOLERANCE = 5e-4

_POSITIONS = ("Xposition", "Yposition", "Zposition")
_ROTATIONS = ("Zrotation", "Xrotation", "Yrotation")


def rig(motion: Motion) -> Fit:
    """A skeleton and its rotations: those that the features hold, else fitted to the joints.

    Raises ScaMoError for what `fit_rotations` refuses.
    """
    own = None if motion.features is None else given_rotations(motion.joints, motion.features)
    return fit_rotations(motion.joints, fps=motion.fps) if own is None else own


def save_bvh(motion: Motion, path: str | Path, *, scale: float = 1.0, stretch: bool | None = None) -> None:
    """Write a motion as BVH.

    scale: units a metre; 100 writes centimetres.
    stretch: False gives constant bones and rotations only, which is what retargeting wants; joints that are
    not those of a skeleton are then missed by `rig(motion).error`. True gives every joint position
    channels, whose values replace its OFFSET (as Blender and MotionBuilder read them; three.js adds the two),
    so that every joint is where the motion has it. None stretches only where constant bones would miss a
    joint by more than half a millimetre.
    Raises ScaMoError for a scale that is not positive and what `fit_rotations` refuses.
    """
    if not np.isfinite(scale) or scale <= 0:
        raise ScaMoError(f"scale: expected a positive number of units a metre, got {scale}")
    fit = rig(motion)
    if stretch is None:
        stretch = bool(fit.error.max() > TOLERANCE)

    lines = ["HIERARCHY"]
    order = _write_joint(lines, motion.body, 0, "", fit.offsets * scale, scale, stretch)
    angles = _euler_zxy(quaternions_to_matrices(fit.rotations))
    values = np.concatenate([fit.local * scale, angles], axis=-1)
    placed = order if stretch else order[:1]
    columns = [values[:, j] if j in placed else angles[:, j] for j in order]
    lines += ["MOTION", f"Frames: {len(motion)}", f"Frame Time: {1 / motion.fps:.9g}"]
    with replacing(path) as partial, partial.open("w", encoding="ascii", newline="\n") as stream:
        stream.write("\n".join(lines) + "\n")
        np.savetxt(stream, np.concatenate(columns, axis=1), fmt="%.6f")


def _write_joint(
    lines: list[str], body: Body, joint: int, indent: str, offsets: np.ndarray, scale: float, stretch: bool
) -> list[int]:
    """Append a joint and those below it; returns them in the order of their channels."""
    inner = indent + "  "
    channels = (*_POSITIONS, *_ROTATIONS) if stretch or not joint else _ROTATIONS
    lines += [
        f"{indent}{'JOINT' if joint else 'ROOT'} {body.names[joint]}",
        f"{indent}{{",
        f"{inner}OFFSET {_numbers(offsets[joint])}",
        f"{inner}CHANNELS {len(channels)} {' '.join(channels)}",
    ]
    order = [joint]
    for child in body.children[joint]:
        order += _write_joint(lines, body, child, inner, offsets, scale, stretch)
    if joint in body.ends:
        end = _numbers(np.array(body.ends[joint]) * scale)
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
    """Read a BVH file that `save_bvh` wrote, or another one that has a body's joints under these names.

    scale: units a metre, as for `save_bvh`. Nothing is turned, moved or resampled: `retarget` does that, for
    any skeleton. Raises ScaMoError naming the file and what is wrong.
    """
    path = Path(path)
    if not np.isfinite(scale) or scale <= 0:
        raise ScaMoError(f"scale: expected a positive number of units a metre, got {scale}")
    animation = read_bvh(path)
    names = animation.hierarchy.names
    body = next((body for body in known_bodies() if set(body.names) <= set(names)), Body.of(N_JOINTS))
    missing = [name for name in body.names if name not in names]
    if missing:
        raise ScaMoError(f"{path}: {len(missing)} of the {N_JOINTS} joints are missing, first {missing[0]!r}")
    wanted = [names.index(name) for name in body.names]
    joints = animation.forward_kinematics(wanted)[0][:, wanted] / scale
    try:
        return Motion(joints, fps=animation.fps)
    except ScaMoError as error:
        raise ScaMoError(f"{path}: {error}") from error


def read_bvh(path: str | Path) -> Animation:
    """Read any BVH file with one skeleton.

    Every joint may have its own channels in its own order; position channels replace the axis of the OFFSET
    that they name. A frame is a line. End sites are joints called `NAME.end`.
    Raises ScaMoError naming the file, the line and what was expected there.
    """
    path = Path(path)
    text = read_text(path, "BVH")
    try:
        return _parse(text)
    except ScaMoError as error:
        raise ScaMoError(f"{path}: {error}") from None


@dataclass
class _Tree:
    """What the HIERARCHY says so far. columns: (joint, is it a rotation, axis) of every number of a frame."""

    names: list[str] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    offsets: list[list[float] | None] = field(default_factory=list)
    columns: list[tuple[int, bool, int]] = field(default_factory=list)
    ends: set[int] = field(default_factory=set)

    def add(self, name: str, parent: int, line: int) -> int:
        if name in self.names:
            raise ScaMoError(f"line {line}: joint name {name!r} is used twice")
        self.names.append(name)
        self.parents.append(parent)
        self.offsets.append(None)
        return len(self.names) - 1

    def end_name(self, joint: int) -> str:
        """What an end site of a joint is called; a joint may have several."""
        name, count = f"{self.names[joint]}.end", 1
        while name in self.names:
            count += 1
            name = f"{self.names[joint]}.end{count}"
        return name


def _parse(text: str) -> Animation:
    lines = text.splitlines()
    tree, at = _read_hierarchy(lines)
    frames, at = _after(lines, at, r"frames\s*:\s*(\S+)", "'Frames: N'")
    rest, at = _after(lines, at, r"frame\s+time\s*:\s*(\S+)", "'Frame Time: SECONDS'")
    count = whole(frames)
    if not count:
        raise ScaMoError(f"Frames: {frames[:40]}, expected a positive whole number")
    try:
        fps = rate_of(rest)
    except ValueError:
        raise ScaMoError(f"Frame Time: {rest[:40]}, expected a positive number of seconds") from None
    values = _read_table(lines, at, count, len(tree.columns))

    offsets = np.array(tree.offsets, dtype=np.float64)
    translations = np.tile(offsets, (len(values), 1, 1))
    rotations = np.zeros((len(values), len(offsets), 4))
    rotations[..., 0] = 1
    # First every joint's first rotation, then every joint's second, ...
    turns: list[list[tuple[int, int, int]]] = []
    placed = [0] * len(offsets)
    for column, (joint, is_rotation, axis) in enumerate(tree.columns):
        if not is_rotation:
            translations[:, joint, axis] = values[:, column]
            continue
        if placed[joint] == len(turns):
            turns.append([])
        turns[placed[joint]].append((joint, axis, column))
        placed[joint] += 1
    for turn in turns:
        joints, axes, columns = np.array(turn).T
        now = about_axes(axes, np.radians(values[:, columns]))
        rotations[:, joints] = multiply(rotations[:, joints], now)
    return Animation(Hierarchy(tuple(tree.names), tuple(tree.parents), offsets), rotations, translations, fps)


def _read_hierarchy(lines: list[str]) -> tuple[_Tree, int]:
    """The skeleton, and the line after MOTION."""
    tree = _Tree()
    above: list[int] = []  # the joints whose braces are open
    opening: int | None = None  # a joint that waits for its brace
    started = False
    with_channels: set[int] = set()

    def fail(number: int, message: str) -> ScaMoError:
        return ScaMoError(f"line {number}: {message}")

    for number, line in enumerate(lines, 1):
        words = line.replace("{", " { ").replace("}", " } ").split()
        while words:
            word, key = words[0], words[0].upper()
            if not started:
                if key != "HIERARCHY":
                    raise fail(number, f"{word[:40]!r}, the file does not begin with HIERARCHY")
                started, words = True, words[1:]
            elif opening is not None:
                if word != "{":
                    raise fail(number, f"{word[:40]!r}, expected '{{' after {tree.names[opening]!r}")
                above.append(opening)
                opening, words = None, words[1:]
            elif key in ("ROOT", "JOINT", "END"):
                end = words.index("{") if "{" in words else len(words)
                name = " ".join(words[1:end])
                if key == "ROOT" and tree.names:
                    raise fail(number, f"a second ROOT, {name!r}; expected one skeleton a file")
                if (key == "ROOT") == bool(above):
                    raise fail(number, f"{word} is not inside a joint, expected ROOT first, and once")
                if above and above[-1] in tree.ends:
                    raise fail(number, f"{word} inside an end site")
                if key == "END":
                    name = tree.end_name(above[-1])
                elif not name:
                    raise fail(number, f"{word} without a name")
                opening = tree.add(name, above[-1] if above else -1, number)
                if key == "END":
                    tree.ends.add(opening)
                words = words[end:]
            elif key == "OFFSET" and above:
                if tree.offsets[above[-1]] is not None:
                    raise fail(number, f"a second OFFSET of {tree.names[above[-1]]!r}")
                tree.offsets[above[-1]] = [_number(w, number) for w in words[1:4]]
                if len(words) < 4:
                    raise fail(number, f"OFFSET with {len(words) - 1} numbers, expected 3")
                words = words[4:]
            elif key == "CHANNELS" and above and above[-1] not in with_channels:
                with_channels.add(above[-1])
                words = _read_channels(tree, above[-1], words, number)
            elif word == "}" and above:
                joint = above.pop()
                name = tree.names[joint]
                if tree.offsets[joint] is None:
                    raise fail(number, f"{name!r} ends without an OFFSET")
                if joint not in with_channels and joint not in tree.ends:
                    raise fail(number, f"{name!r} ends without CHANNELS")
                words = words[1:]
            elif key == "MOTION" and tree.names and not above and len(words) == 1:
                moves = Counter(joint for joint, is_rotation, _ in tree.columns if not is_rotation)
                if 3 not in moves.values():
                    raise fail(number, "no joint has three position channels, expected at least the root's")
                return tree, number
            else:
                inside = f"inside {tree.names[above[-1]]!r}" if above else "outside every joint"
                raise fail(number, f"{word[:40]!r} is not expected {inside}")
    raise ScaMoError("the file ends inside the HIERARCHY, expected MOTION")


def _read_channels(tree: _Tree, joint: int, words: list[str], line: int) -> list[str]:
    """Take CHANNELS and its names from the front of `words`; returns what is left."""
    name = tree.names[joint]
    count = whole(words[1]) if len(words) > 1 else None
    if count is None:
        raise ScaMoError(f"line {line}: expected CHANNELS and how many {name!r} has")
    channels, rest = words[2 : 2 + count], words[2 + count :]
    if joint in tree.ends:
        raise ScaMoError(f"line {line}: CHANNELS inside an end site")
    if len(channels) != count:
        raise ScaMoError(f"line {line}: {name!r} has {len(channels)} channels, CHANNELS says {count}")
    for channel in channels:
        axis, kind = AXES.get(channel[:1].upper(), -1), channel[1:].lower()
        if axis < 0 or kind not in ("position", "rotation"):
            raise ScaMoError(
                f"line {line}: unknown channel {channel[:40]!r} of {name!r}, expected Zrotation or the like"
            )
        column = (joint, kind == "rotation", axis)
        if column in tree.columns:
            raise ScaMoError(f"line {line}: channel {channel!r} of {name!r} comes twice")
        tree.columns.append(column)
    if rest and AXES.get(rest[0][:1].upper(), -1) >= 0 and rest[0][1:].lower() in ("position", "rotation"):
        raise ScaMoError(f"line {line}: {name!r} has more channels than the {count} of CHANNELS")
    return rest


def _after(lines: list[str], at: int, pattern: str, expected: str) -> tuple[str, int]:
    """The group of a pattern that the next line with anything on it must match, and the line after it."""
    while at < len(lines) and not lines[at].strip():
        at += 1
    if at == len(lines):
        raise ScaMoError(f"the file ends, expected {expected}")
    match = re.fullmatch(pattern, lines[at].strip(), re.IGNORECASE)
    if match is None:
        raise ScaMoError(f"line {at + 1}: {lines[at].strip()[:40]!r}, expected {expected}")
    return match[1], at + 1


def _number(word: str, line: int) -> float:
    try:
        return finite(word)
    except ValueError:
        raise ScaMoError(f"line {line}: {word[:40]!r}, expected a finite number") from None


def _read_table(lines: list[str], at: int, frames: int, columns: int) -> NDArray[np.float64]:
    """Numbers (frames, columns) of the lines from `at` on, a frame each."""
    rows = [(number, line) for number, line in enumerate(lines[at:], at + 1) if line.strip()]
    for number, line in rows:
        found = len(line.split())
        if found != columns:
            raise ScaMoError(f"line {number}: {found} numbers, expected the {columns} of a frame")
    if len(rows) != frames:
        raise ScaMoError(f"{len(rows)} lines of numbers, 'Frames: {frames}' says {frames}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)
            values = np.fromstring("\n".join(line for _, line in rows), sep=" ")
        good = values.size == frames * columns and bool((np.abs(values) < LARGEST).all())
    except (DeprecationWarning, ValueError):
        good = False
    if not good:
        # Once more and slowly, for the place of what is wrong.
        values = np.array([_number(word, number) for number, line in rows for word in line.split()])
    return values.reshape(frames, columns)
