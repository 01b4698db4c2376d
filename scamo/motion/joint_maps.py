"""Which joints of a source are the 22 of this project: a TOML file a source, in `joint_maps/`.

    name = "what it is"
    units = "cm"            # optional: m, cm, mm, inch, cmu or metres a unit; else from the legs' length
    up = "y"                # optional: x, y, z, -x, -y, -z; else from the rest pose and the motion
    skip_frames = 1         # optional: frames of calibration at the start of every file

    [joints]                # every one of the 22, as a joint of the source or a weighted mean of some
    pelvis = "Hips"
    spine3 = { Spine1 = 0.5, Neck = 0.5 }
    head = { Head = 0.5, "Head.end" = 0.5 }     # the end site of Head

    [missing_bones]         # optional: a joint whose OFFSET is 0 0 0 by mistake, and one with a like OFFSET
    Neck = "Spine1"

A prefix up to a colon (`mixamorig:Hips`) is not part of a name.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scamo.errors import ScaMoError
from scamo.motion.hierarchy import Animation, Hierarchy
from scamo.motion.skeleton import JOINT_NAMES, N_JOINTS

# Metres a unit. CMU's files count 1/0.45 inches.
UNITS: dict[str, float] = {"m": 1.0, "cm": 0.01, "mm": 0.001, "inch": 0.0254, "cmu": 0.0254 / 0.45}
UPS = ("x", "y", "z", "-x", "-y", "-z")
FOLDER = Path(__file__).with_suffix("")
_KEYS = {"name", "units", "up", "skip_frames", "joints", "missing_bones"}


def unit_of(units: str | float, where: str = "units") -> float:
    """Metres a unit. Raises ScaMoError for an unknown name or what is not positive."""
    if isinstance(units, str):
        try:
            return UNITS[units] if units in UNITS else unit_of(float(units), where)
        except ValueError:
            known = ", ".join(UNITS)
            raise ScaMoError(f"{where}: {units!r}, expected one of {known} or metres a unit") from None
    if isinstance(units, bool) or not 0 < units < np.inf:
        raise ScaMoError(f"{where}: {units}, expected a positive number of metres a unit")
    return float(units)


def check_up(up: str, where: str = "up") -> str:
    """`up` in lower case. Raises ScaMoError if it is no axis."""
    if not isinstance(up, str) or up.lower() not in UPS:
        raise ScaMoError(f"{where}: {up!r}, expected one of {', '.join(UPS)}")
    return up.lower()


def short(name: str) -> str:
    """A joint's name without its prefix."""
    return name.rpartition(":")[2]


@dataclass(frozen=True)
class JointMap:
    """joints: for every one of the 22, (source joint, weight) pairs whose weights sum to one; the first is
    the one whose rotation counts. The other fields are those of the file; units: metres a unit."""

    name: str
    joints: tuple[tuple[tuple[str, float], ...], ...]
    units: float | None = None
    up: str | None = None
    skip_frames: int = 0
    missing_bones: tuple[tuple[str, str], ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> JointMap:
        """Read a TOML file, or one of `joint_maps/` by its name ("cmu_mb").

        Raises ScaMoError naming the file and the key that is wrong, unknown or missing.
        """
        if isinstance(path, str) and path in built_in():
            return built_in()[path]
        path = Path(path)
        try:
            with path.open("rb") as stream:
                table = tomllib.load(stream)
        except FileNotFoundError:
            known = ", ".join(built_in())
            raise ScaMoError(f"{path}: no such file, and no joint map of that name ({known})") from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
            raise ScaMoError(f"{path}: not a readable TOML file: {error}") from None
        try:
            return _from_table(table, path.stem)
        except ScaMoError as error:
            raise ScaMoError(f"{path}: {error}") from None

    def sources(self) -> set[str]:
        """The source joints that it needs."""
        return {name for pairs in self.joints for name, _ in pairs}.union(*self.missing_bones)

    def missing_from(self, hierarchy: Hierarchy) -> list[str]:
        """The source joints that a skeleton lacks."""
        return sorted(self.sources() - {short(name) for name in hierarchy.names})

    def check(self, hierarchy: Hierarchy) -> None:
        """Raises ScaMoError listing what the skeleton lacks and what it has."""
        missing = self.missing_from(hierarchy)
        if missing:
            has = ", ".join(hierarchy.names)
            raise ScaMoError(
                f"joint map {self.name!r} wants {', '.join(missing)}, which the file lacks; it has {has}"
            )

    def weights(self, hierarchy: Hierarchy) -> NDArray[np.float64]:
        """(22, J): the 22 joints are this times those of the skeleton."""
        index = _index(hierarchy)
        out = np.zeros((N_JOINTS, len(hierarchy)))
        for joint, pairs in enumerate(self.joints):
            for name, weight in pairs:
                out[joint, index[name]] = weight
        return out

    def drivers(self, hierarchy: Hierarchy) -> list[int]:
        """For every one of the 22, the joint whose rotation turns it."""
        index = _index(hierarchy)
        return [index[pairs[0][0]] for pairs in self.joints]

    def repaired(self, animation: Animation) -> Animation:
        """The animation with its missing bones."""
        if not self.missing_bones:
            return animation
        index = _index(animation.hierarchy)
        offsets = animation.hierarchy.offsets.copy()
        translations = animation.translations.copy()
        for name, like in self.missing_bones:
            if not np.abs(offsets[index[name]]).max() > 0:
                offsets[index[name]] = offsets[index[like]]
                translations[:, index[name]] += offsets[index[like]]
        hierarchy = replace(animation.hierarchy, offsets=offsets)
        return replace(animation, hierarchy=hierarchy, translations=translations)


def _index(hierarchy: Hierarchy) -> dict[str, int]:
    return {short(name): joint for joint, name in enumerate(hierarchy.names)}


def _from_table(table: dict[str, Any], stem: str) -> JointMap:
    unknown = sorted(set(table) - _KEYS)
    if unknown:
        raise ScaMoError(f"unknown key {unknown[0]!r}, expected some of {', '.join(sorted(_KEYS))}")
    joints = table.get("joints")
    if not isinstance(joints, dict):
        raise ScaMoError("expected a table [joints] with the 22 joints")
    extra = sorted(set(joints) - set(JOINT_NAMES))
    missing = [name for name in JOINT_NAMES if name not in joints]
    if extra or missing:
        faults = [f"lacks {', '.join(missing)}"] if missing else []
        faults += [f"{extra[0]!r} is none of {', '.join(JOINT_NAMES)}"] if extra else []
        raise ScaMoError(f"[joints] {'; '.join(faults)}")
    skip = table.get("skip_frames", 0)
    if isinstance(skip, bool) or not isinstance(skip, int) or skip < 0:
        raise ScaMoError(f"skip_frames = {skip!r}, expected 0 or more")
    name = table.get("name", stem)
    bones = table.get("missing_bones", {})
    if not isinstance(name, str):
        raise ScaMoError(f"name = {name!r}, expected text")
    if not isinstance(bones, dict) or not all(isinstance(like, str) for like in bones.values()):
        raise ScaMoError('missing_bones: expected joint = "another joint"')
    units = table.get("units")
    if units is not None and not isinstance(units, (str, int, float)):
        raise ScaMoError(f"units = {units!r}, expected one of {', '.join(UNITS)} or metres a unit")
    return JointMap(
        name=name,
        joints=tuple(_pairs(joint, joints[joint]) for joint in JOINT_NAMES),
        units=None if units is None else unit_of(units),
        up=None if "up" not in table else check_up(table["up"]),
        skip_frames=skip,
        missing_bones=tuple(bones.items()),
    )


def _pairs(joint: str, value: Any) -> tuple[tuple[str, float], ...]:
    if isinstance(value, str):
        return ((value, 1.0),)
    good = isinstance(value, dict) and all(
        isinstance(weight, (int, float)) and not isinstance(weight, bool) for weight in value.values()
    )
    if not good:
        raise ScaMoError(f"joints.{joint}: expected a joint's name or a table of weights, got {value!r}")
    if not abs(sum(value.values()) - 1) < 1e-3:
        raise ScaMoError(f"joints.{joint}: the weights sum to {sum(value.values()):g}, expected 1")
    return tuple((name, float(weight)) for name, weight in value.items())


@cache
def built_in() -> dict[str, JointMap]:
    """The maps that come with the package, by the names of their files."""
    maps = {}
    for path in sorted(FOLDER.glob("*.toml")):
        maps[path.stem] = _from_table(tomllib.loads(path.read_text(encoding="utf-8")), path.stem)
    return maps


def detect(hierarchy: Hierarchy) -> JointMap:
    """The map whose joints a skeleton has; of several, the one that uses most of them.

    Raises ScaMoError that lists the file's joints and what the nearest map misses.
    """
    fitting = [m for m in built_in().values() if not m.missing_from(hierarchy)]
    if fitting:
        return max(fitting, key=lambda m: len(m.sources()))
    nearest = min(built_in().values(), key=lambda m: len(m.missing_from(hierarchy)) / len(m.sources()))
    missing = nearest.missing_from(hierarchy)
    raise ScaMoError(
        f"no joint map fits; the nearest, {nearest.name!r}, wants {', '.join(missing)} as well. "
        f"The file has {', '.join(hierarchy.names)}: write a joint map for it"
    )
