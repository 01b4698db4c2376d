"""The corpus: clip i is a function of (seed, i) alone, so any number of workers makes the same clips."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from scamo.errors import ScaMoError
from scamo.motion.synthetic import actions, rig
from scamo.motion.synthetic.captions import CaptionSpec, caption
from scamo.motion.synthetic.spec import (
    ACTIONS,
    COMBINATIONS,
    FIRST,
    HELD_OUT,
    HELD_OUT_PAIRS,
    NOT_PAIRED,
    SECOND,
    Spec,
)

FPS = actions.FPS
MIN_FRAMES, MAX_FRAMES = 40, 196
SPLITS = ("train", "val", "test")
CAPTIONS = 3

_TRAINED = {
    action: tuple(spec for spec in specs if spec not in HELD_OUT) for action, specs in COMBINATIONS.items()
}


def trained(action: str) -> tuple[Spec, ...]:
    """The combinations of an action that training shows."""
    return _TRAINED[action]


def _shares(names: tuple[str, ...]) -> np.ndarray:
    """Cumulative share of each action: all are frequent, those with more to tell apart somewhat more."""
    weights = np.array([2.0 + len(_TRAINED[name]) ** 0.7 for name in names])
    return np.cumsum(weights / weights.sum())


_ALL_SHARES, _FIRST_SHARES, _SECOND_SHARES = _shares(ACTIONS), _shares(FIRST), _shares(SECOND)


@dataclass(frozen=True)
class SyntheticClip:
    """One motion of the corpus. joints (T, 22, 3) float32 metres, Y up, 20 fps, 40 <= T <= 196.

    captions say some of `spec`, which is what the motion does in full; split is train, val or test.
    """

    name: str
    joints: np.ndarray
    captions: tuple[CaptionSpec, ...]
    spec: Spec
    split: str

    @property
    def texts(self) -> list[str]:
        """The captions' sentences."""
        return [caption.text for caption in self.captions]


def split_of(index: int) -> str:
    """Split of clip `index`: of every 20 clips one is val, one test, the rest train."""
    return {9: "val", 19: "test"}.get(index % 20, "train")


def draw_spec(rng: np.random.Generator, sequences: float) -> Spec:
    """A full spec for training: never one of the held-out combinations or pairs of actions."""
    if rng.random() >= sequences:
        options = _TRAINED[ACTIONS[int(np.searchsorted(_ALL_SHARES, rng.random()))]]
        return options[int(rng.random() * len(options))]
    while True:
        first = FIRST[int(np.searchsorted(_FIRST_SHARES, rng.random()))]
        second = SECOND[int(np.searchsorted(_SECOND_SHARES, rng.random()))]
        if first != second and (first, second) not in HELD_OUT_PAIRS | NOT_PAIRED:
            break
    one, two = (draw_part(_TRAINED[name], rng) for name in (first, second))
    return replace(one, then=two)


def draw_part(options: tuple[Spec, ...], rng: np.random.Generator) -> Spec:
    """One of `options` for half of a sequence: three repetitions would not leave time for the other."""
    fitting = [spec for spec in options if spec.count != "3" and spec.angle != "360"]
    return fitting[int(rng.random() * len(fitting))]


def _join(style: actions.Style, segments: list[actions.Segment], rng: np.random.Generator) -> tuple:
    """Put the segments one after the other, each where the last one ended, and cut what may be cut."""
    bodies, feet = [], []
    x = z = yaw = 0.0
    for k, segment in enumerate(segments):
        body, foot = segment.body.copy(), segment.feet.copy()
        c, s = np.cos(yaw), np.sin(yaw)
        for array, ix, iz in ((body, rig.X, rig.Z), (foot, rig.FOOT_X, rig.FOOT_Z)):
            ax, az = array[..., ix].copy(), array[..., iz].copy()
            array[..., ix] = x + c * ax + s * az
            array[..., iz] = z - s * ax + c * az
        body[:, rig.YAW] += yaw
        foot[..., rig.FOOT_YAW] += yaw
        x, z, yaw = body[-1, rig.X], body[-1, rig.Z], body[-1, rig.YAW]
        first = segment.first if k == 0 and rng.random() < 0.5 else 0
        last = segment.last if k == len(segments) - 1 and rng.random() < 0.6 else len(body)
        if last - first < MIN_FRAMES // len(segments):
            first, last = 0, len(body)
        if k:
            first += 1  # the last frame of the one is the first of the other
        bodies.append(body[first:last])
        feet.append(foot[first:last])
    body, foot = np.concatenate(bodies), np.concatenate(feet)
    if len(body) < MIN_FRAMES:  # only actions that end at rest are this short
        wait = MIN_FRAMES - len(body)
        body, foot = (np.concatenate((a, np.repeat(a[-1:], wait, axis=0))) for a in (body, foot))
    return body[:MAX_FRAMES], foot[:MAX_FRAMES]


def generate_clip(spec: Spec, rng: np.random.Generator) -> np.ndarray:
    """A motion that does what a full spec says: joints (T, 22, 3) float32 metres, 20 fps, 40 <= T <= 196.

    The body, its style and everything that the spec leaves open are drawn from `rng`; it starts at a random
    place and heading. Raises ScaMoError for a spec whose parts are not combinations of `spec.COMBINATIONS`.
    """
    parts = spec.parts()
    for part in parts:
        if part not in COMBINATIONS[part.action]:
            raise ScaMoError(f"spec {part.to_list()[0]}: the corpus has no such combination of slots")
    style = actions.make_style(rng)
    segments = [actions.build(style, part, rng, short=len(parts) > 1) for part in parts]
    body, feet = _join(style, segments, rng)
    actions.sway(style, body)
    joints = rig.pose(style.body, body, feet)
    # Anywhere, facing anywhere.
    turn = rng.uniform(0, 2 * np.pi)
    c, s = np.cos(turn), np.sin(turn)
    x, z = joints[..., 0].copy(), joints[..., 2].copy()
    joints[..., 0] = c * x + s * z + rng.uniform(-2, 2)
    joints[..., 2] = c * z - s * x + rng.uniform(-2, 2)
    return joints.astype(np.float32)


def corpus_clip(
    index: int, seed: int = 0, *, sequences: float = 0.15, captions: int = CAPTIONS
) -> SyntheticClip:
    """Clip `index` of the corpus of `seed`; `sequences` is the share of clips that do two things."""
    rng = np.random.default_rng((seed, index))
    spec = draw_spec(rng, sequences)
    joints = generate_clip(spec, rng)
    texts = tuple(caption(spec, rng)[0] for _ in range(captions))
    return SyntheticClip(f"synthetic{seed}_{index:06d}", joints, texts, spec, split_of(index))


def generate_corpus(
    n_clips: int,
    seed: int = 0,
    *,
    split: str | None = None,
    start: int = 0,
    sequences: float = 0.15,
) -> Iterator[SyntheticClip]:
    """Clips start ... n_clips - 1 of the corpus of `seed`, or those of one split among them.

    Raises ScaMoError for an unknown split, a negative count or a share outside [0, 1].
    """
    if split is not None and split not in SPLITS:
        raise ScaMoError(f"split = {split!r}: expected one of {', '.join(SPLITS)}")
    if n_clips < 0 or start < 0 or seed < 0:
        raise ScaMoError(f"n_clips = {n_clips}, start = {start}, seed = {seed}: expected 0 or more")
    if not 0 <= sequences <= 1:
        raise ScaMoError(f"sequences = {sequences}: expected a share in [0, 1]")
    return (
        corpus_clip(index, seed, sequences=sequences)
        for index in range(start, n_clips)
        if split is None or split_of(index) == split
    )
