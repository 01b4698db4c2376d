"""Which clips hold the same motion: identical, mirrored, nearly so, or cut out of one another.

`scamo.data.inspect.copies` compares whole clips by a few instants; this also finds parts. Windows of half a
second are described by distances between joints, which do not change with place, heading or floor. Where the
quantised descriptions of many windows of two clips agree at one shift in time, the clips are laid over each
other at it and the distance of their joints decides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scamo.data.inspect import MARKS
from scamo.motion.representation import KIT_ML, SNAPMOGEN, Representation

Kind = Literal["identical", "near", "part", "overlap", "mirrored"]

IDENTICAL_MM = 1.0
# 996 pairs of clips cut from one CMU recording: 99% are within 8.4 mm, and 10.0 with 1 cm of noise added. The
# nearest of 726 pairs of alike walks by one actor, other takes: 11.2.
NEAR_MM = 10.0
LENGTHS = 0.02  # by which the lengths of two copies of a whole clip may differ

_REACH_S = 0.3  # a window looks this far to both sides
_CELL_M = 0.1
_GRIDS = 4  # of cells, each a quarter of a cell aside: what a border of one parts, another keeps together
_STEP = 4  # every so many frames of a clip are indexed, and all are looked up
_MOVES_M = 0.03  # windows that move less look like any other that stands
_FEW = 12
_CROWDED = 64  # windows in one cell: what so many share tells nothing
_VOTES = 2
# Of the windows that two clips share. 1,238 matches of CMU and Bandai-Namco clips, and 574 of clips with 1 cm
# of noise: 99% have above 0.17.
_SHARE = 0.1
_CANDIDATES = 12  # clips that are laid over one,
_SHIFTS = 3  # each at so many shifts: the second squat looks like the first
_PULL = 2.0  # the motion must be this many times larger than the distance
_SMOOTH_S = 0.45
# Feet may have been corrected: then all joints but the legs' must be nearer.
_STRICT = 0.65
_HOPELESS = 4.0  # so many times too far apart at the voted shift, unsmoothed: not looked at any closer
_LEGS = (1, 2, 4, 5, 7, 8, 10, 11)
_OTHER_LEGS = {KIT_ML.feature_dim: tuple(range(11, 21)), SNAPMOGEN.feature_dim: tuple(range(16, 24))}


@dataclass(frozen=True)
class Match:
    """Two clips that share motion.

    clip, of: ids, of < clip. kind: of two whole clips "identical" or "near"; "part": all of `clip` or all of
    `of` lies in the other; "overlap": their ends do; "mirrored": any of these in a mirror. shift: the frame
    of `of` that the first one of `clip` lies on. frames: how many lie on each other. distance_mm: of all
    joints, root mean square of `joint_distances`, smoothed. covers: share of `clip` that lies on `of`.
    """

    clip: int
    of: int
    kind: Kind
    shift: int
    frames: int
    distance_mm: float
    covers: float


def still_share(features: NDArray, representation: Representation, fps: float, mm_s: float) -> float:
    """Share of a clip's frames (T, feature_dim) whose fastest joint is slower than mm_s, millimetres/s."""
    steps = features[:, representation.velocities].astype(np.float64).reshape(len(features), -1, 3)
    fastest = np.sqrt(np.square(steps).sum(-1).max(-1)) * representation.unit * fps * 1000
    return float((fastest < mm_s).mean())


class _Overlap(NamedTuple):
    distance: float  # mm
    shift: int
    start: int
    end: int
    joints: NDArray[np.float64]


class DuplicateIndex:
    """Clips to search in; `add` every clip in order, then `matches` finds each one's earlier copies.

    Memory: 16 bytes for every frame that moves, three times that while they are sorted.

    Args:
        representation: of the features.
        fps: frames a second.
        features: gives those of a clip, (T, feature_dim); it is called once more for each clip that is
            compared.
        near_mm: joints' distance up to which two clips are the same motion, or 0.65 of it for the joints
            that are not the legs'.
        overlap_s: how much two clips must share; the shorter one as a whole if it is shorter.
    """

    def __init__(
        self,
        representation: Representation,
        fps: float,
        features: Callable[[int], NDArray],
        *,
        near_mm: float = NEAR_MM,
        overlap_s: float = 1.5,
    ) -> None:
        self.representation, self.fps, self._features = representation, fps, features
        self.near_mm, self.overlap = near_mm, max(1, round(overlap_s * fps))
        self._reach, self._smooth = max(1, round(_REACH_S * fps)), max(1, round(_SMOOTH_S * fps))
        self._legs = _OTHER_LEGS.get(representation.feature_dim, _LEGS)
        self._keys: list[NDArray[np.uint64]] = []
        self._places: list[NDArray[np.uint64]] = []
        self._first: dict[bytes, int] = {}
        self._same: dict[int, int] = {}
        self._frames: list[int] = []
        self._sorted: tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int64]] | None = None

    def add(self, features: NDArray) -> None:
        """Take in the next clip."""
        clip = len(self._frames)
        self._frames.append(len(features))
        digest = hashlib.blake2b(np.ascontiguousarray(features).tobytes(), digest_size=16).digest()
        first = self._first.setdefault(digest, clip)
        if first != clip:
            self._same[clip] = first
        windows, frames = self._windows(features)
        keep = frames % _STEP == 0
        self._keys.append(_quantised(windows[keep]))
        self._places.append(np.tile(frames[keep].astype(np.uint64) | np.uint64(clip << 32), _GRIDS))

    def matches(self, clips: Iterable[int]) -> Iterator[Match]:
        """What each of the clips shares with earlier ones, in whatever order they are asked for."""
        for clip in clips:
            same = self._same.get(clip)
            features = self._features(clip)
            if same is not None:
                yield Match(clip, same, "identical", 0, len(features), 0.0, 1.0)
            windows, frames = self._windows(features)
            for mirrored in (False, True):
                body = None
                turned = windows[:, _MIRRORED] if mirrored else windows
                for other, shifts in self._candidates(clip, len(features), turned, frames).items():
                    if other == same and not mirrored:
                        continue
                    if body is None:
                        seen = self.representation.mirrored(features) if mirrored else features
                        body = _body(seen, self.representation)
                    theirs = _body(self._features(other), self.representation)
                    found = (self._compare(clip, body, other, theirs, shift, mirrored) for shift in shifts)
                    match = next((match for match in found if match is not None), None)
                    if match is not None:
                        yield match

    def _windows(self, features: NDArray) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Descriptions (n, 12) of the windows that move, metres, and their middle frames."""
        lengths = _lengths(_body(features, self.representation, MARKS[self.representation.feature_dim]))
        reach, n = self._reach, len(lengths)
        if n <= 2 * reach:
            return np.empty((0, len(_MIRRORED)), np.float32), np.empty(0, np.int64)
        smooth = _averaged(lengths, 2)
        before, after = smooth[: n - 2 * reach], smooth[2 * reach :]
        frames = np.flatnonzero(np.abs(after - before).max(1) > _MOVES_M)
        if len(frames) < _FEW:  # of a clip that hardly moves, all
            frames = np.arange(n - 2 * reach)
        return np.concatenate([before, after], 1)[frames].astype(np.float32), frames + reach

    def _candidates(
        self, clip: int, n: int, windows: NDArray[np.float32], middle: NDArray[np.int64]
    ) -> dict[int, list[int]]:
        """Earlier clips and shifts, those that most windows of the clip, n frames long, speak for."""
        keys, places, lengths_of = self._index()
        wanted = _quantised(windows)
        low, high = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
        counts = high - low
        total = int(counts.sum())
        frames = np.tile(middle, _GRIDS)
        starts = np.repeat(low - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
        found = places[starts + np.arange(total)]
        others = (found >> np.uint64(32)).astype(np.int64)
        shifts = (found & np.uint64(0xFFFFFFFF)).astype(np.int64) - np.repeat(frames, counts)
        earlier = others < clip
        pairs, votes = np.unique((others[earlier] << 32) + shifts[earlier] + (1 << 31), return_counts=True)
        enough = votes >= _VOTES
        pairs, votes = pairs[enough], votes[enough]
        # Of two that are the same, many of the windows that they share must say so.
        shift, lengths = (pairs & 0xFFFFFFFF) - (1 << 31), lengths_of[pairs >> 32]
        start, end = np.maximum(0, -shift), np.minimum(n, lengths - shift)
        shared = np.searchsorted(middle, end - self._reach) - np.searchsorted(middle, start + self._reach)
        enough = votes >= _SHARE * np.maximum(shared, 0)
        enough &= end - start >= np.minimum(self.overlap, np.minimum(n, lengths))
        pairs, votes = pairs[enough], votes[enough]
        order = np.argsort(-votes, kind="stable")
        best: dict[int, list[int]] = {}
        for pair in pairs[order].tolist():
            other, shift = pair >> 32, (pair & 0xFFFFFFFF) - (1 << 31)
            if other not in best and len(best) == _CANDIDATES:
                continue
            known = best.setdefault(other, [])
            if len(known) < _SHIFTS and all(abs(shift - one) > _STEP for one in known):
                known.append(shift)
        return best

    def _index(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int64]]:
        """Cells in order, where each is, and the clips' lengths."""
        if self._sorted is None:
            keys = np.concatenate([*self._keys, np.empty(0, np.uint64)])
            places = np.concatenate([*self._places, np.empty(0, np.uint64)])
            self._keys, self._places = [], []
            order = np.argsort(keys, kind="stable")
            keys, places = keys[order], places[order]
            counts = np.unique(keys, return_counts=True)[1]
            rare = np.repeat(counts <= _CROWDED, counts)
            self._sorted = keys[rare], places[rare], np.array(self._frames, dtype=np.int64)
        return self._sorted

    def _compare(
        self, clip: int, body: NDArray, other: int, theirs: NDArray, shift: int, mirrored: bool
    ) -> Match | None:
        n, m = len(body), len(theirs)
        hopeless = self._over(body[::_STEP], theirs[shift % _STEP :: _STEP], shift // _STEP, coarse=True)
        if hopeless is not None and hopeless.distance > _HOPELESS * self.near_mm:
            return None
        best = self._over(body, theirs, shift)
        if best is None or best.distance > _HOPELESS * self.near_mm:
            return None
        for step in (-1, 1):
            while (closer := self._over(body, theirs, best.shift + step)) and closer.distance < best.distance:
                best = closer
        distance, shift, start, end, joints = best
        spread = np.sqrt(body[start:end].var(0).sum(-1))
        upper = [joint for joint in range(len(joints)) if joint not in self._legs]
        if not any(
            _rms(joints[some]) <= within * self.near_mm / 1000
            and _rms(joints[some]) * _PULL <= _rms(spread[some])
            for some, within in ((slice(None), 1.0), (upper, _STRICT))
        ):
            return None
        frames = end - start
        kind: Kind
        if mirrored:
            kind = "mirrored"
        elif frames >= (1 - LENGTHS) * max(n, m):
            kind = "identical" if distance <= IDENTICAL_MM and n == m == frames else "near"
        else:
            kind = "part" if frames >= (1 - LENGTHS) * min(n, m) else "overlap"
        return Match(clip, other, kind, shift, frames, round(distance, 3), frames / n)

    def _over(self, body: NDArray, theirs: NDArray, shift: int, coarse: bool = False) -> _Overlap | None:
        """The two laid over each other, None if they share too little. coarse: of some frames, unsmoothed."""
        start, end = max(0, -shift), min(len(body), len(theirs) - shift)
        if end - start < (1 if coarse else min(self.overlap, len(body), len(theirs))):
            return None
        smooth = 1 if coarse else self._smooth
        joints = joint_distances(body[start:end], theirs[start + shift : end + shift], smooth)
        return _Overlap(1000 * _rms(joints), shift, start, end, joints)


def joint_distances(a: NDArray[np.float64], b: NDArray[np.float64], smooth: int = 1) -> NDArray[np.float64]:
    """Root mean square distance of each joint of two motions (T, J, 3), (J,) in their unit.

    Every pose is turned about the vertical through its root for the best fit, and b is lifted as a whole:
    headings that are filtered and floors that are found clip by clip do not count. smooth: the differences
    are averaged over so many frames before they are squared, so that noise of single frames counts less than
    another course of the motion.
    """
    x, y = _flat(a), _flat(b)
    turn = (x * y.conj()).sum(1, keepdims=True)
    apart = x - y * turn / np.maximum(np.abs(turn), 1e-12)
    rise = a[..., 1] - b[..., 1]
    differences = np.stack([apart.real, apart.imag, rise - rise.mean()], -1)
    return np.sqrt(np.square(_averaged(differences, smooth // 2)).sum(-1).mean(0))


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.square(values).mean()))


def _averaged(values: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """The mean over `reach` frames to both sides (T, ...), over fewer at the ends."""
    sums = np.concatenate([np.zeros((1, *values.shape[1:])), np.cumsum(values, axis=0)])
    frames = np.arange(len(values))
    low, high = np.maximum(frames - reach, 0), np.minimum(frames + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low).reshape(-1, *[1] * (values.ndim - 1))


def _flat(body: NDArray[np.float64]) -> NDArray[np.complex128]:
    return body[..., 0] + 1j * body[..., 2]


def _body(
    features: NDArray, representation: Representation, joints: tuple[int, ...] | None = None
) -> NDArray[np.float64]:
    """Joints (T, n, 3), metres, all or some, as the body sees them: X and Z from the root, Y absolute."""
    local = features[:, representation.positions].astype(np.float64).reshape(len(features), -1, 3)
    if representation.first_position:
        root = np.zeros((len(features), 1, 3))
        root[:, 0, 1] = features[:, representation.root.stop - 1]
        local = np.concatenate([root, local], axis=1)
    return (local if joints is None else local[:, list(joints)]) * representation.unit


def _lengths(marks: NDArray[np.float64]) -> NDArray[np.float64]:
    """(T, 6): of each wrist its height over the pelvis and its distance from the head, the wrists' distance,
    the ankles'. No foot alone: those are what a correction moves."""
    pelvis, head, left, right, left_ankle, right_ankle = marks.transpose(1, 0, 2)

    def between(a: NDArray, b: NDArray) -> NDArray:
        return np.linalg.norm(a - b, axis=-1)

    return np.stack(
        [
            left[:, 1] - pelvis[:, 1],
            right[:, 1] - pelvis[:, 1],
            between(left, head),
            between(right, head),
            between(left, right),
            between(left_ankle, right_ankle),
        ],
        axis=1,
    )


# Which value of a window (before and after its middle) takes the place of each in a mirror.
_MIRRORED = np.array([1, 0, 3, 2, 4, 5, 7, 6, 9, 8, 10, 11])
_PRIMES = np.random.default_rng(0).integers(1 << 62, size=len(_MIRRORED), dtype=np.uint64) * np.uint64(
    2
) + np.uint64(1)


def _quantised(windows: NDArray[np.float32]) -> NDArray[np.uint64]:
    """The windows' cells (grids * n,) in every grid."""
    keys = []
    for grid in range(_GRIDS):
        cells = np.floor(windows / _CELL_M + grid / _GRIDS).astype(np.int64).astype(np.uint64)
        keys.append((cells * _PRIMES).sum(1, dtype=np.uint64) + np.uint64(grid))
    return np.concatenate(keys)
