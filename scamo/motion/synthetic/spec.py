"""What a synthetic motion does: an action and its slots, or two of them one after the other."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, fields, replace
from typing import Any

from scamo.errors import ScaMoError

ACTIONS = (
    "stand", "walk", "run", "jump", "squat", "sit", "bow", "wave", "raise", "punch", "kick", "turn", "circle",
)  # fmt: skip
SLOTS = ("direction", "side", "speed", "turn", "angle", "count")


@dataclass(frozen=True)
class Spec:
    """One action with its slots; `None` is "not said" in a caption and "has none" in a motion's full spec.

    direction: forward, back, left, right (walk, run, jump; a jump on the spot has none).
    side: left, right, both (wave, raise; punch and kick: left, right).
    speed: slow, normal, fast (walk, run, circle). turn: left, right (walk, run, turn, circle).
    angle: 90, 180, 360 (turn). count: 1, 2, 3 (jump, squat, bow, punch, kick).
    then: what follows, for a sequence of two.
    """

    action: str
    direction: str | None = None
    side: str | None = None
    speed: str | None = None
    turn: str | None = None
    angle: str | None = None
    count: str | None = None
    then: Spec | None = None

    def slots(self) -> dict[str, str]:
        """The slots that are set, by name; the action and `then` left out."""
        return {name: value for name in SLOTS if (value := getattr(self, name)) is not None}

    def parts(self) -> tuple[Spec, ...]:
        """One spec, or the two of a sequence, each without `then`."""
        first = replace(self, then=None)
        return (first,) if self.then is None else (first, *self.then.parts())

    def to_list(self) -> list[dict[str, str]]:
        """Plain form for JSON: one dict per part with the action and the set slots."""
        return [{"action": part.action, **part.slots()} for part in self.parts()]

    @classmethod
    def from_list(cls, parts: list[dict[str, Any]]) -> Spec:
        """The inverse of `to_list`. Raises ScaMoError for an unknown action, slot or number of parts."""
        if not 1 <= len(parts) <= 2:
            raise ScaMoError(f"spec: expected one or two parts, got {len(parts)}")
        known = {field.name for field in fields(cls)} - {"then"}
        for part in parts:
            if part.get("action") not in ACTIONS or not set(part) <= known:
                raise ScaMoError(f"spec: {part!r} has an unknown action or slot")
        specs = [cls(**part) for part in parts]
        return specs[0] if len(specs) == 1 else replace(specs[0], then=specs[1])


def _product(action: str, **values: tuple[str | None, ...]) -> list[Spec]:
    return [
        Spec.from_list([{"action": action, **{k: v for k, v in zip(values, chosen, strict=True) if v}}])
        for chosen in itertools.product(*values.values())
    ]


_SPEEDS = ("slow", "normal", "fast")
_COUNTS = ("1", "2", "3")
_BOTH = ("left", "right", "both")

# Every combination that the corpus can make. Nobody sidesteps fast or sprints backwards here.
COMBINATIONS: dict[str, tuple[Spec, ...]] = {
    "stand": (Spec("stand"),),
    "walk": (
        *_product("walk", direction=("forward", "back"), speed=_SPEEDS),
        *_product("walk", direction=("left", "right"), speed=("slow", "normal")),
        *_product("walk", direction=("forward",), speed=_SPEEDS, turn=("left", "right")),
    ),
    "run": (
        *_product("run", direction=("forward",), speed=_SPEEDS, turn=(None, "left", "right")),
        Spec("run", direction="back", speed="slow"),
    ),
    "jump": tuple(_product("jump", direction=(None, "forward", "back", "left", "right"), count=_COUNTS)),
    "squat": tuple(_product("squat", count=_COUNTS)),
    "sit": (Spec("sit"),),
    "bow": tuple(_product("bow", count=_COUNTS)),
    "wave": tuple(_product("wave", side=_BOTH)),
    "raise": tuple(_product("raise", side=_BOTH)),
    "punch": tuple(_product("punch", side=("left", "right"), count=_COUNTS)),
    "kick": tuple(_product("kick", side=("left", "right"), count=_COUNTS)),
    "turn": tuple(_product("turn", turn=("left", "right"), angle=("90", "180", "360"))),
    "circle": tuple(_product("circle", turn=("left", "right"), speed=_SPEEDS)),
}

# A tenth of the combinations, never in the training captions or motions. Each value of theirs, and the
# mirror image of each, is trained in other combinations, so that composing is what is asked.
HELD_OUT: frozenset[Spec] = frozenset(
    {
        Spec("walk", direction="left", speed="slow"),
        Spec("walk", direction="back", speed="fast"),
        Spec("run", direction="forward", speed="fast", turn="right"),
        Spec("jump", direction="right", count="2"),
        Spec("jump", direction="back", count="3"),
        Spec("punch", side="left", count="2"),
        Spec("kick", side="right", count="3"),
        Spec("turn", turn="right", angle="180"),
        Spec("circle", turn="left", speed="fast"),
    }
)

# What a sequence may begin and end with: a seat is not left again, a circle is too long for a half.
FIRST = ("walk", "run", "jump", "squat", "bow", "wave", "raise", "punch", "kick", "turn")
SECOND = (*FIRST, "sit")
# Beside each other these two cannot be told apart: a wave begins as a raise.
NOT_PAIRED = frozenset({("wave", "raise"), ("raise", "wave")})


def _is_held_out_pair(first: str, second: str) -> bool:
    digest = hashlib.sha256(f"{first} then {second}".encode()).digest()
    return digest[0] < 26  # one in ten


# Ordered pairs of actions that no training sequence joins.
HELD_OUT_PAIRS: frozenset[tuple[str, str]] = frozenset(
    (a, b) for a in FIRST for b in SECOND if a != b and (a, b) not in NOT_PAIRED and _is_held_out_pair(a, b)
)


def is_held_out(spec: Spec) -> bool:
    """Whether a full spec has a part, or is a pair of actions, that training never shows."""
    parts = spec.parts()
    if any(part in HELD_OUT for part in parts):
        return True
    return len(parts) == 2 and (parts[0].action, parts[1].action) in HELD_OUT_PAIRS


def completions(spec: Spec) -> tuple[Spec, ...]:
    """The combinations that agree with the set slots of a spec of one part (those that a caption means).

    A turn that is not said, in walking and running, means straight on; other unsaid slots are free.
    """
    said = spec.slots()
    return tuple(
        full
        for full in COMBINATIONS[spec.action]
        if all(getattr(full, name) == value for name, value in said.items())
        and (spec.turn is not None or full.turn is None or spec.action not in ("walk", "run"))
    )
