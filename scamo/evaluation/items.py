"""Which motions and sentences an evaluation compares: the draws of both protocols."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scamo.data.dataset import MotionDataset
from scamo.motion.representation import HUMANML3D, Representation

UNIT = 4  # frames: the evaluators' step, to which lengths are floored
MOST_TURNS = 3  # captions of an item that the strict protocol asks for; HumanML3D has three of most

# HumanML3D's numbers, and "M" before them for the mirrored copy.
_MIRRORED = re.compile(r"^M(?=\d)")


class Draw(NamedTuple):
    """Rows of an evaluation, int64 (N,) each: item, one of its captions, and its frames [start, end)."""

    items: NDArray[np.int64]
    captions: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def features(self, dataset: MotionDataset) -> list[NDArray[np.float32]]:
        """Raw features (T, C) of every row."""
        return [
            dataset.item_features(int(item))[start:end]
            for item, start, end in zip(self.items, self.starts, self.ends, strict=True)
        ]

    def texts(self, dataset: MotionDataset) -> list[str]:
        return [dataset.caption(int(caption)) for caption in self.captions]


def item_frames(dataset: MotionDataset) -> tuple[int, int]:
    """The shortest and one more than the longest item of Guo et al.'s protocol, at the dataset's frame rate.

    They are the representation's; those of HumanML3D where the features are of none that is known.
    """
    representation = Representation.find(dataset.feature_dim) or HUMANML3D
    factor = dataset.fps / representation.fps
    shortest, longest = (round(frames * factor) for frames in representation.item_frames)
    return shortest, longest


def source_clips(dataset: MotionDataset, items: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 (items,): equal numbers for items of one recorded clip: its parts and its mirrored copy.

    They are no independent samples, so a bootstrap draws them together, and none is a distractor of another.
    """
    names = (_MIRRORED.sub("", dataset.clip_names[dataset.item_clip(int(item))]) for item in items)
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


def draw_humanml3d(
    dataset: MotionDataset, items: NDArray[np.int64], key: tuple[int, ...], *, pool: int = 32
) -> Draw:
    """One repeat of Guo et al.'s protocol, a function of `key`: whole pools of shuffled items.

    Per item a random caption, the length floored to 4 frames, with probability 1/3 four less, and a random
    place. Items that do not fill a last pool are left out. Which items there are (parts by their time tags)
    is what `scamo prepare humanml3d` wrote.
    """
    rng = np.random.default_rng(key)
    chosen = rng.permutation(items)[: len(items) // pool * pool]
    captions = np.array([rng.choice(dataset.captions_of(int(item))) for item in chosen], dtype=np.int64)
    frames = dataset.item_lengths[chosen]
    lengths = frames // UNIT * UNIT - UNIT * (rng.random(len(chosen)) < 1 / 3)
    lengths = np.maximum(lengths, UNIT)
    starts = rng.integers(0, frames - lengths + 1)
    return Draw(chosen, captions, starts, starts + lengths)


def strict_turns(dataset: MotionDataset, items: NDArray[np.int64]) -> int:
    """How many turns `draw_strict` has: captions of the item with the most, at most MOST_TURNS."""
    return min(MOST_TURNS, max(len(dataset.captions_of(int(item))) for item in items))


def draw_strict(dataset: MotionDataset, items: NDArray[np.int64], turn: int) -> Draw:
    """All items, whole but for the frames past a multiple of 4, each with its caption number `turn`.

    An item with fewer captions begins again with its first.
    """
    captions = [dataset.captions_of(int(item)) for item in items]
    chosen = np.array([ids[turn % len(ids)] for ids in captions], dtype=np.int64)
    lengths = dataset.item_lengths[items] // UNIT * UNIT
    return Draw(items, chosen, np.zeros_like(lengths), lengths)
