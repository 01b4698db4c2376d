"""ASF/AMC files (Acclaim): a skeleton and a motion of it, as CMU's library has them.

An ASF bone is a joint here, at the place where the bone begins, and turns it: `lfemur` is the left hip. The
last bones' far ends are joints called `NAME.end`. The files tell no frame rate; most of CMU's are 120 a
second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scamo.errors import ScaMoError
from scamo.motion.hierarchy import (
    AXES,
    Animation,
    Hierarchy,
    about_axes,
    finite,
    multiply,
    read_text,
    whole,
)

DEFAULT_FPS = 120.0
INCH = 0.0254
_DOFS = ("rx", "ry", "rz", "tx", "ty", "tz")
ROOT = "root"


@dataclass
class _Bone:
    name: str
    direction: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    length: float | None = None
    axis: NDArray[np.float64] = field(default_factory=lambda: np.array([1.0, 0, 0, 0]))
    dof: tuple[str, ...] = ()

    @property
    def tip(self) -> NDArray[np.float64]:
        return self.direction * (self.length or 0.0)


@dataclass(frozen=True)
class Skeleton:
    """What an ASF file holds.

    hierarchy: in the file's unit. axes: (J, 4) the frame that a joint's angles turn about. dofs: a joint's
    numbers in an AMC line, "rx", "tz", ...; metres_a_unit: from the file's `length`, which counts inches.
    degrees: the unit of an AMC's angles, if it does not say.
    """

    hierarchy: Hierarchy
    axes: NDArray[np.float64]
    dofs: tuple[tuple[str, ...], ...]
    metres_a_unit: float
    degrees: bool


def read_amc(
    path: str | Path, skeleton: Skeleton | str | Path | None = None, *, fps: float = DEFAULT_FPS
) -> Animation:
    """Read a motion.

    skeleton: its ASF, read or not; None: the one beside it, see `find_asf`. fps: frames a second.
    Raises ScaMoError naming the file, the line and what was expected there.
    """
    path = Path(path)
    if not np.isfinite(fps) or fps <= 0:
        raise ScaMoError(f"fps: expected a positive number, got {fps}")
    if skeleton is None:
        skeleton = find_asf(path)
    if not isinstance(skeleton, Skeleton):
        skeleton = read_asf(skeleton)
    lines = read_text(path, "AMC").splitlines()
    try:
        values, degrees = _read_frames(lines, skeleton)
    except ScaMoError as error:
        raise ScaMoError(f"{path}: {error}") from None

    hierarchy = skeleton.hierarchy
    frames = len(next(iter(values.values())))
    translations = np.tile(hierarchy.offsets, (frames, 1, 1))
    rotations = np.zeros((frames, len(hierarchy), 4))
    rotations[..., 0] = 1
    for joint, numbers in values.items():
        turn = np.tile([1.0, 0, 0, 0], (frames, 1))
        for dof, column in zip(skeleton.dofs[joint], numbers.T, strict=True):
            axis = AXES[dof[1].upper()]
            if dof[0] == "t":
                translations[:, joint, axis] += column
                continue
            angles = np.radians(column) if degrees else column
            # The first is turned first, about axes that stay.
            turn = multiply(about_axes(np.array([axis]), angles[:, None])[:, 0], turn)
        axes = skeleton.axes[joint]
        rotations[:, joint] = multiply(multiply(axes, turn), axes * [1, -1, -1, -1])
    return Animation(hierarchy, rotations, translations, float(fps), skeleton.metres_a_unit)


def find_asf(amc: Path) -> Path:
    """The skeleton of a motion: SUBJECT.asf for SUBJECT_TRIAL.amc, or the only .asf of the folder.

    Raises ScaMoError listing what was looked for.
    """
    stem = amc.stem
    wanted = [stem, *(stem[:i] for i in range(len(stem) - 1, 0, -1) if stem[i] == "_")]
    beside = {p.stem: p for p in sorted(amc.parent.glob("*")) if p.suffix.lower() == ".asf"}
    for name in wanted:
        if name in beside:
            return beside[name]
    if len(beside) == 1:
        return next(iter(beside.values()))
    looked = ", ".join(f"{name}.asf" for name in wanted)
    raise ScaMoError(f"{amc}: no skeleton; looked for {looked} among {len(beside)} .asf files beside it")


def read_asf(path: str | Path) -> Skeleton:
    """Read a skeleton; limits and masses are ignored. Raises ScaMoError naming file and line."""
    path = Path(path)
    lines = read_text(path, "ASF").splitlines()
    try:
        return _Reader(lines).skeleton()
    except ScaMoError as error:
        raise ScaMoError(f"{path}: {error}") from None


class _Reader:
    def __init__(self, lines: list[str]) -> None:
        # section -> (line number, words) of its lines
        self.sections: dict[str, list[tuple[int, list[str]]]] = {}
        current: list[tuple[int, list[str]]] | None = None
        for number, line in enumerate(lines, 1):
            line = line.partition("#")[0].strip()
            if line.startswith(":"):
                name, *rest = line[1:].split() or [""]
                if name.lower() in self.sections:
                    raise ScaMoError(f"line {number}: a second section :{name[:40]}")
                current = self.sections.setdefault(name.lower(), [])
                if rest:
                    current.append((number, rest))
            elif line:
                if current is None:
                    raise ScaMoError(f"line {number}: {line[:40]!r} before any section, expected ':version'")
                current.append((number, line.split()))
        for name in (ROOT, "bonedata", "hierarchy"):
            if name not in self.sections:
                raise ScaMoError(f"section :{name} is missing")

    def skeleton(self) -> Skeleton:
        unit, degrees = self._units()
        root_dof, root_place = self._root()
        bones = self._bones(degrees)
        parents = self._parents(bones)
        names, above, offsets = [ROOT], [-1], [root_place]
        axes, dofs = [np.array([1.0, 0, 0, 0])], [root_dof]
        todo = [(name, 0) for name in reversed(parents.get(ROOT, []))]
        while todo:
            name, parent = todo.pop()
            joint = len(names)
            names.append(name)
            above.append(parent)
            offsets.append(bones[names[parent]].tip if parent else np.zeros(3))
            axes.append(bones[name].axis)
            dofs.append(bones[name].dof)
            children = parents.get(name, [])
            todo += [(child, joint) for child in reversed(children)]
            if not children:
                names.append(f"{name}.end")
                above.append(joint)
                offsets.append(bones[name].tip)
                axes.append(axes[0])
                dofs.append(())
        loose = sorted(set(bones) - set(names))
        if loose:
            raise ScaMoError(f"bone {loose[0]!r} hangs on nothing in :hierarchy")
        hierarchy = Hierarchy(tuple(names), tuple(above), np.array(offsets))
        return Skeleton(hierarchy, np.array(axes), tuple(dofs), INCH / unit, degrees)

    def _units(self) -> tuple[float, bool]:
        unit, degrees = 1.0, True
        for number, (key, *words) in self.sections.get("units", []):
            if key.lower() == "length":
                (unit,) = _numbers(words, 1, number)
                if not unit > 1 / 1e6:
                    raise ScaMoError(f"line {number}: length {unit}, expected a positive number")
            elif key.lower() == "angle":
                degrees = _is_degrees(" ".join(words), number)
        return unit, degrees

    def _root(self) -> tuple[tuple[str, ...], NDArray[np.float64]]:
        dof: tuple[str, ...] = ()
        axis, place = "XYZ", np.zeros(3)
        number = 0
        for number, (key, *words) in self.sections[ROOT]:
            key = key.lower()
            if key == "order":
                dof = _dof(words, number)
            elif key == "axis":
                axis = _order(" ".join(words), number)
            elif key == "position":
                place = np.array(_numbers(words, 3, number))
            elif key == "orientation" and any(_numbers(words, 3, number)):
                raise ScaMoError(f"line {number}: the root's orientation is {words}, only 0 0 0 can be read")
        missing = {"tx", "ty", "tz", "rx", "ry", "rz"} - set(dof)
        if missing:
            raise ScaMoError(f"section :root has no {min(missing).upper()} in its order")
        turned = "".join(d[1] for d in dof if d[0] == "r").upper()
        if turned != axis:
            raise ScaMoError(f"line {number}: the root's axis {axis} differs from its order {turned}")
        return dof, place

    def _bones(self, degrees: bool) -> dict[str, _Bone]:
        bones: dict[str, _Bone] = {}
        bone: _Bone | None = None
        for number, (key, *words) in self.sections["bonedata"]:
            key = key.lower()
            if key == "begin":
                if bone is not None:
                    raise ScaMoError(f"line {number}: 'begin' inside a bone, expected 'end'")
                bone = _Bone("")
            elif bone is None:
                raise ScaMoError(f"line {number}: {key[:40]!r}, expected 'begin'")
            elif key == "end":
                if not bone.name or bone.length is None or not bone.direction.any():
                    raise ScaMoError(f"line {number}: a bone without name, direction or length ({bone.name})")
                if bone.name in bones or bone.name == ROOT:
                    raise ScaMoError(f"line {number}: bone name {bone.name!r} is used twice")
                bones[bone.name] = bone
                bone = None
            elif key == "name":
                bone.name = " ".join(words)
            elif key == "direction":
                bone.direction = np.array(_numbers(words, 3, number))
                size = float(np.linalg.norm(bone.direction))
                if size < 1e-6:
                    raise ScaMoError(f"line {number}: a direction of no length")
                bone.direction /= size
            elif key == "length":
                (bone.length,) = _numbers(words, 1, number)
            elif key == "axis":
                angles = np.array(_numbers(words[:3], 3, number))
                order = _order(" ".join(words[3:]) or "XYZ", number)
                for letter in order:
                    angle = angles["XYZ".index(letter)]
                    turn = about_axes(
                        np.array([AXES[letter]]), np.array([np.radians(angle) if degrees else angle])
                    )
                    bone.axis = multiply(turn[0], bone.axis)
            elif key == "dof":
                bone.dof = _dof(words, number)
            elif key not in ("id", "limits", "bodymass", "cofmass") and not key.startswith("("):
                raise ScaMoError(f"line {number}: {key[:40]!r} is not expected in a bone")
        if bone is not None:
            raise ScaMoError(f"bone {bone.name!r}: the file ends before its 'end'")
        return bones

    def _parents(self, bones: dict[str, _Bone]) -> dict[str, list[str]]:
        """Children of every bone that has any."""
        children: dict[str, list[str]] = {}
        placed: set[str] = set()
        for number, (parent, *below) in self.sections["hierarchy"]:
            if parent.lower() in ("begin", "end") and not below:
                continue
            for name in (parent, *below):
                if name not in bones and name != ROOT:
                    raise ScaMoError(f"line {number}: there is no bone {name[:40]!r}")
            for name in below:
                if name in placed or name == ROOT:
                    raise ScaMoError(f"line {number}: {name!r} hangs on two bones")
                placed.add(name)
            children.setdefault(parent, []).extend(below)
        if not children.get(ROOT):
            raise ScaMoError("nothing hangs on the root in :hierarchy")
        return children


def _read_frames(lines: list[str], skeleton: Skeleton) -> tuple[dict[int, NDArray[np.float64]], bool]:
    """joint -> (T, dofs), and whether angles are degrees."""
    degrees = skeleton.degrees
    joints = {name: joint for joint, name in enumerate(skeleton.hierarchy.names) if skeleton.dofs[joint]}
    counts = {name: len(skeleton.dofs[joint]) for name, joint in joints.items()}
    rows: dict[str, list[str]] = {name: [] for name in joints}
    where: list[int] = []  # the line of every frame
    seen: set[str] = set(joints)
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0][0] == "#":
            continue
        if words[0][0] == ":":
            if words[0][1:].lower() in ("degrees", "radians"):
                degrees = words[0].lower() == ":degrees"
        elif len(words) == 1 and (frame := whole(words[0])) is not None:
            _refuse_missing(joints, seen, where)
            if frame != len(where) + 1 and where:
                raise ScaMoError(f"line {number}: frame {frame}, expected frame {len(where) + 1}")
            where.append(number)
            seen = set()
        else:
            name = words[0]
            if not where:
                raise ScaMoError(f"line {number}: {name[:40]!r} before the first frame number")
            if name not in joints:
                raise ScaMoError(f"line {number}: {name[:40]!r} is no moving bone of the skeleton")
            if name in seen:
                raise ScaMoError(f"line {number}: {name!r} comes twice in frame {len(where)}")
            if len(words) - 1 != counts[name]:
                dofs = " ".join(skeleton.dofs[joints[name]])
                raise ScaMoError(f"line {number}: {len(words) - 1} numbers of {name!r}, expected {dofs}")
            seen.add(name)
            rows[name].extend(words[1:])
    if not where:
        raise ScaMoError("holds no frame")
    _refuse_missing(joints, seen, where)
    return {joint: _table(rows[name], name, counts[name], where) for name, joint in joints.items()}, degrees


def _refuse_missing(joints: dict[str, int], seen: set[str], where: list[int]) -> None:
    missing = [name for name in joints if name not in seen]
    if missing:
        raise ScaMoError(f"frame {len(where)} (line {where[-1]}) lacks {', '.join(missing[:3])}")


def _table(words: list[str], name: str, columns: int, where: list[int]) -> NDArray[np.float64]:
    values = np.empty(len(words))
    for i, word in enumerate(words):
        try:
            values[i] = finite(word)
        except ValueError:
            frame = i // columns
            raise ScaMoError(
                f"frame {frame + 1} (line {where[frame]}): {word[:40]!r} of {name!r}, expected a number"
            ) from None
    return values.reshape(-1, columns)


def _numbers(words: list[str], count: int, line: int) -> list[float]:
    if len(words) != count:
        raise ScaMoError(f"line {line}: {len(words)} numbers, expected {count}")
    values = []
    for word in words:
        try:
            values.append(finite(word))
        except ValueError:
            raise ScaMoError(f"line {line}: {word[:40]!r}, expected a finite number") from None
    return values


def _is_degrees(word: str, line: int) -> bool:
    if word.lower() not in ("deg", "degrees", "rad", "radians"):
        raise ScaMoError(f"line {line}: angle {word[:40]!r}, expected deg or rad")
    return word.lower().startswith("deg")


def _order(word: str, line: int) -> str:
    if sorted(word.upper()) != ["X", "Y", "Z"]:
        raise ScaMoError(f"line {line}: axis order {word[:40]!r}, expected XYZ in some order")
    return word.upper()


def _dof(words: list[str], line: int) -> tuple[str, ...]:
    dof = tuple(word.lower() for word in words)
    unknown = [d for d in dof if d not in _DOFS]
    if unknown or len(set(dof)) != len(dof):
        raise ScaMoError(
            f"line {line}: {' '.join(words)[:60]!r}, expected some of {' '.join(_DOFS)}, once each"
        )
    return dof
