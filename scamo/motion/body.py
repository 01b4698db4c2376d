"""The bodies that motions have: what files, pictures and measures need to know of a skeleton.

Everything follows from the joints' names and parents, which `Representation` has: `left_` and `right_` are
sides, a leg ends in a foot, an arm in a wrist or hand, and the joint in the middle that nothing follows is
the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from scamo.errors import ScaMoError
from scamo.motion.representation import REPRESENTATIONS
from scamo.motion.skeleton import DEFAULT_OFFSETS, JOINT_NAMES

# By the name of a joint without its side and number: the bone that leads there in a T-pose, metres, +X on the
# left, and its width in pictures.
_BONES: dict[str, tuple[tuple[float, float, float], float]] = {
    "hip": ((0.09, -0.06, 0.0), 0.12),
    "knee": ((0.0, -0.43, 0.0), 0.105),
    "ankle": ((0.0, -0.42, 0.0), 0.085),
    "midfoot": ((0.01, -0.03, 0.07), 0.07),
    "foot": ((0.02, -0.05, 0.13), 0.07),
    "toe": ((0.0, 0.0, 0.06), 0.07),
    "collar": ((0.07, 0.12, -0.01), 0.085),
    "shoulder": ((0.11, 0.03, 0.0), 0.08),
    "elbow": ((0.26, 0.0, 0.0), 0.07),
    "wrist": ((0.25, 0.0, 0.0), 0.06),
    "hand": ((0.09, 0.0, 0.0), 0.06),
    "neck": ((0.0, 0.1, 0.0), 0.075),
    "head": ((0.0, 0.1, 0.04), 0.075),
}
_SPINE = ((0.0, 0.12, 0.0), 0.12)  # any other joint in the middle
# Where the bones without a next joint end, metres: toes, crown, fingertips of the left.
_TOES, _CROWN, _FINGERS = (0.0, 0.0, 0.07), (0.0, 0.14, 0.0), (0.16, 0.0, 0.0)


@dataclass(frozen=True)
class Body:
    """A skeleton. Get one by `Body.of(number of joints)`.

    names and parents: of the joints; a parent comes before its children, the root's is -1. fps: the frame
    rate of the features that are made for it.
    """

    names: tuple[str, ...]
    parents: tuple[int, ...]
    fps: float

    @staticmethod
    def of(n_joints: int) -> Body:
        """The body of so many joints. Raises ScaMoError naming the known ones."""
        found = _bodies().get(n_joints)
        if found is None:
            raise ScaMoError(f"joints: expected {known_counts()} of them, got {n_joints}")
        return found

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Of every joint."""
        return tuple(
            tuple(j for j, parent in enumerate(self.parents) if parent == joint) for joint in range(len(self))
        )

    @cached_property
    def sides(self) -> tuple[str, ...]:
        """left, right or middle, of every joint."""
        sides = (name.split("_")[0] for name in self.names)
        return tuple(side if side in ("left", "right") else "middle" for side in sides)

    @cached_property
    def bones(self) -> list[int]:
        """The joints that lie apart from their parent: SnapMoGen's pelvis lies on the root."""
        return [joint for joint in range(1, len(self)) if self.rest[joint].any()]

    @cached_property
    def rest(self) -> np.ndarray:
        """(J, 3) metres: a T-pose of round figures, every joint's place relative to its parent."""
        if self.names == JOINT_NAMES:
            return DEFAULT_OFFSETS
        offsets = np.array([self._bone(joint)[0] for joint in range(len(self))])
        offsets[:, 0] *= [-1 if side == "right" else 1 for side in self.sides]
        offsets[0] = 0
        for joint, below in enumerate(self.children):
            if any(self.names[child].endswith("hip") for child in below):
                offsets[joint] = 0
        return offsets

    @cached_property
    def widths(self) -> np.ndarray:
        """(J,) metres: of the bone that leads to each joint, in pictures."""
        widths = np.array([self._bone(joint)[1] for joint in range(len(self))])
        widths[0] = 0.075
        return widths

    @cached_property
    def head(self) -> int:
        """The joint in the middle that nothing follows; the neck is its parent."""
        return next(j for j, below in enumerate(self.children) if not below and self.sides[j] == "middle")

    @cached_property
    def feet(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Ankle and ball of the left foot, and of the right one; the ball is the last joint of a leg."""
        left, right = (self._chain(side, "hip") for side in ("left", "right"))
        return (self._named(left, "ankle"), left[-1]), (self._named(right, "ankle"), right[-1])

    @cached_property
    def wrists(self) -> tuple[int, int]:
        """The last joint of the left arm, and of the right one."""
        return self._chain("left", "shoulder")[-1], self._chain("right", "shoulder")[-1]

    @cached_property
    def spine(self) -> tuple[int, ...]:
        """The joints between the root and where neck and arms part, that one included."""
        joint = self.wrists[0]
        while self.sides[joint] != "middle":
            joint = self.parents[joint]
        path = [joint]
        while self.parents[path[-1]] > 0:
            path.append(self.parents[path[-1]])
        return tuple(path[::-1])

    @cached_property
    def ends(self) -> dict[int, tuple[float, float, float]]:
        """Of every joint that nothing follows: where its bone ends, metres from it in the T-pose."""
        balls = {ball for _, ball in self.feet}
        ends = {}
        for joint, below in enumerate(self.children):
            if not below:
                x, y, z = _CROWN if joint == self.head else _TOES if joint in balls else _FINGERS
                ends[joint] = (-x if x and self.sides[joint] == "right" else x, y, z)
        return ends

    def _bone(self, joint: int) -> tuple[tuple[float, float, float], float]:
        name = self.names[joint].split("_")[-1].rstrip("0123456789")
        return _BONES.get(name, _SPINE)

    def _chain(self, side: str, first: str) -> list[int]:
        """From a joint of a side to the one that nothing follows."""
        chain = [self.names.index(f"{side}_{first}")]
        while self.children[chain[-1]]:
            chain.append(self.children[chain[-1]][0])
        return chain

    def _named(self, chain: list[int], name: str) -> int:
        return next(joint for joint in chain if self.names[joint].endswith(name))


@cache
def _bodies() -> dict[int, Body]:
    bodies: dict[int, Body] = {}
    for one in REPRESENTATIONS:
        bodies.setdefault(one.n_joints, Body(one.joint_names, one.parents, one.fps))
    return bodies


def known_bodies() -> list[Body]:
    """All of them, those of the most joints first."""
    return [body for _, body in sorted(_bodies().items(), reverse=True)]


def known_counts() -> str:
    """The numbers of joints that bodies have, in words."""
    *others, last = sorted(_bodies())
    return f"{', '.join(map(str, others))} or {last}"
