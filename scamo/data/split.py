"""Source clips, and the split of each: nothing that comes from one recording is in two splits."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scamo.data.dataset import SPLITS
from scamo.data.inspect import recording, source_clip

# What names of variants end in: a piece of a clip, its mirrored copy, a corrected or a resampled one.
VARIANT = (
    r"@\d+-\d+|[_.-](?:mirror(?:ed)?|flip(?:ped)?|phys(?:ics)?|corrected|aug\d*|"
    r"speed[_-]?\d+(?:\.\d+)?|x\d+(?:\.\d+)?)"
)


class Groups:
    """Clips 0 to n - 1 that are joined step by step; a group is known by its smallest clip."""

    def __init__(self, n: int) -> None:
        self._parent = list(range(n))

    def root(self, clip: int) -> int:
        parent = self._parent
        while parent[clip] != clip:
            parent[clip] = parent[parent[clip]]
            clip = parent[clip]
        return clip

    def join(self, a: int, b: int) -> None:
        a, b = self.root(a), self.root(b)
        self._parent[max(a, b)] = min(a, b)

    def roots(self) -> list[int]:
        return [self.root(clip) for clip in range(len(self._parent))]


def family(
    name: str, meta: dict[str, Any], names: set[str] | dict[str, Any], variant: re.Pattern[str]
) -> str:
    """The clip that a clip is a piece, mirrored copy or variant of by its name or meta, or its own name.

    names: all of its source. variant: what a name may end in, once or several times.
    """
    while True:
        base = source_clip(name, meta, names)
        ending = re.search(rf"(?:{variant.pattern})$", base, variant.flags)
        shorter = base[: ending.start()] if ending else base
        # A name is never cut down to nothing.
        if not shorter or shorter == name:
            return base or name
        name, meta = shorter, {}


def recording_of(meta: dict[str, Any]) -> str | None:
    """The file that a clip was cut from, if its meta says so: "recording", "file", or "from"."""
    for key in ("recording", "file"):
        if isinstance(meta.get(key), str) and meta[key]:
            return meta[key]
    return recording(meta)


@dataclass(frozen=True)
class Straddle:
    """A source clip whose clips lie in several splits of the source's own: that is kept.

    splits: the names of its clips by split.
    """

    source: int
    group: int
    splits: dict[str, list[int]]


def decide_splits(
    groups: Sequence[int],
    sources: Sequence[int],
    official: Sequence[str | None],
    usable: Sequence[bool],
    keys: Sequence[str],
    ratios: Sequence[float],
    seed: int,
) -> tuple[list[str | None], list[Straddle]]:
    """The split of every clip, and the source clips that straddle in their source's own split.

    Of a group with official clips, those of the first source that has any decide; if they straddle they stay
    so, and no clip of another source can be used (None). Groups without any are shared out, those that begin
    in one source by themselves, in an order that only `seed` and `keys` determine.

    Args:
        groups: of every clip, the smallest clip of its source clip.
        sources: of every clip, the index of its source, ascending.
        official: of every clip its split in a source whose split is kept, else None.
        usable: whether a clip will be used; those that are not count where they are official, and otherwise
            have no share.
        keys: of every clip a name that is its own.
        ratios: of train, val and test, summing up to 1. Every share is rounded; one source clip is in train.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for clip, group in enumerate(groups):
        members[group].append(clip)
    splits: list[str | None] = [None] * len(groups)
    straddles: list[Straddle] = []
    free: dict[int, list[int]] = defaultdict(list)
    for group, clips in members.items():
        first = next((sources[clip] for clip in clips if official[clip] is not None), None)
        if first is None and not any(usable[clip] for clip in clips):
            continue
        if first is None:
            free[sources[group]].append(group)
            continue
        its = [clip for clip in clips if sources[clip] == first]
        places: dict[str, list[int]] = {
            split: found for split in SPLITS if (found := [clip for clip in its if official[clip] == split])
        }
        if len(places) > 1:
            straddles.append(Straddle(first, group, places))
            for clip in its:
                splits[clip] = official[clip]
        else:
            for clip in clips:
                splits[clip] = next(iter(places))
    for roots in free.values():
        roots.sort(key=lambda group: (place(seed, keys[group]), keys[group]))
        ends = np.rint(np.cumsum(ratios) * len(roots)).astype(int)
        ends = np.maximum(ends, 1)
        for at, group in enumerate(roots):
            split = SPLITS[int(np.searchsorted(ends, at, side="right"))]
            for clip in members[group]:
                splits[clip] = split
    return splits, straddles


def place(seed: int, key: str) -> int:
    """Where a key stands in the order of a seed."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest(), "big")


def spread(names: Sequence[str], places: dict[str, list[int]]) -> str:
    """`places` in words: "2 in train (a, b), 1 in test (c)"."""
    return ", ".join(
        f"{len(clips)} in {split} ({', '.join(names[clip] for clip in clips)})"
        for split, clips in places.items()
    )
