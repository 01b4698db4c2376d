"""Beyond one window of the model: timelines of sentences, continuation of a motion, in-betweening.

The model knows config.max_motion tokens behind a text. What is longer is made in windows: the last tokens of
what there is stand behind the text as if they were the motion's first, and the window goes on from them; a
new sentence begins without them, if not asked otherwise. All tokens are decoded in one row at the end, so
that the frames at the seams are made as all others are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scamo.data.batches import Sample, collate
from scamo.errors import ScaMoError
from scamo.generation.engine import Engine, Request
from scamo.generation.sampling import prompt_keys
from scamo.generation.stream import JointStream, lead, set_velocities
from scamo.models.prefix_lm import PrefixLM
from scamo.motion.motion import Motion
from scamo.motion.representation import Representation
from scamo.tokenizers.autoencoder import MotionAutoencoder
from scamo.tokenizers.encode import decode_tokens, encode_motions

# Tokens of the past that a new sentence sees. With one or more the model goes on with what was done, and less
# with the sentence; without, what decodes all tokens in one row joins the poses, no faster than people move.
CONTEXT = 0
# Tokens that the model sees while a sentence goes on: near its clips' length it brings motions to an end.
WINDOW = 16
# Nats a token that a candidate for a gap loses for every metre by which it ends off the place.
LACK = 4.0
# Seconds over which the difference between a given motion and its decoded tokens fades.
BLEND = 0.4


class Part(NamedTuple):
    """A sentence of a timeline and the limits of its length in tokens."""

    text: str
    least: int
    most: int


class Timeline(NamedTuple):
    """What `ScaMo.timeline` makes a motion of."""

    parts: Sequence[str | tuple[str, float | None]]
    start: Motion | str | Path | None = None
    seed: int = 0


@dataclass
class Roll:
    """A row of tokens that grows window by window; see `unroll`.

    start: codes that are there already. number: of the sample. lengths: tokens of each part so far.
    """

    parts: Sequence[Part]
    seed: int
    number: int = 0
    start: Sequence[int] = ()
    tokens: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=lambda: [0])
    windows: int = 0

    def request(self, states: Callable[[str], Tensor], context: int, window: int, max_motion: int) -> Request:
        """The next window; see `unroll`."""
        text, least, most = self.parts[len(self.lengths) - 1]
        size = window if least == most > 2 * window else max_motion
        seen = size // 2 if self.lengths[-1] else context
        row = [*self.start, *self.tokens]
        past = row[max(0, len(row) - seen) :]
        room = min(size - len(past), most - self.lengths[-1])
        # A window has noise of its own, also where a sentence comes twice. The first is that of `generate`.
        named = f"{self.windows}\n{text}" if self.windows else text
        key = int(prompt_keys([self.seed], [named], [self.number]))
        return Request(states(text), key, room, min(room, max(1, least - self.lengths[-1])), past)

    def add(self, tokens: Sequence[int], asked: int) -> bool:
        """What a window of at most `asked` tokens gave; whether there is more to come."""
        self.tokens += tokens
        self.lengths[-1] += len(tokens)
        self.windows += 1
        if len(tokens) == asked and self.lengths[-1] < self.parts[len(self.lengths) - 1].most:
            return True
        if len(self.lengths) == len(self.parts):
            return False
        self.lengths.append(0)
        return True


def unroll(
    engine: Engine,
    rolls: Iterable[Roll],
    states: Callable[[str], Tensor],
    context: int,
    window: int,
    finished: Callable[[int], object] = lambda index: None,
) -> None:
    """Fill rolls with tokens, side by side in the engine's slots.

    states: of a text. context: tokens of the past that a part begins with. A part ends at EOS, which is
    forbidden before its `least` tokens, or at `most`. One of a given length, more than twice `window`, sees
    `window` tokens at a time; where that is full, its later half is what the next one begins with. finished:
    called with the index of a roll that is full.
    """
    engine.reset()
    waiting, seated = enumerate(rolls), dict[int, tuple[int, Roll, int, list[int]]]()

    def submit(index: int, roll: Roll) -> None:
        request = roll.request(states, context, window, engine.model.config.max_motion)
        seated[engine.submit(request)] = index, roll, request.max_tokens, []

    while True:
        while len(seated) < engine.slots and (following := next(waiting, None)) is not None:
            submit(*following)
        if not seated:
            return
        for ticket, tokens, done in engine.step():
            index, roll, asked, made = seated[ticket]
            made += tokens.tolist()
            if done:
                del seated[ticket]
                if roll.add(made, asked):
                    submit(index, roll)
                else:
                    finished(index)


class Given:
    """A motion to go on from: its features float32 (T, C), joints and tokens of its whole last frames.

    Raises ScaMoError naming `name` for another frame rate, no features or those of another kind, ones that
    are not finite, or fewer frames than a token has.
    """

    def __init__(self, motion: Motion, tokenizer: MotionAutoencoder, fps: float, name: str) -> None:
        if abs(motion.fps - fps) > 1e-6:
            raise ScaMoError(f"{name}: {motion.fps:g} fps, the model makes {fps:g}")
        if motion.features is None:
            raise ScaMoError(
                f"{name}: has joints but no features, which the model reads; "
                "scamo.motion.representation.Representation.from_joints makes them"
            )
        found, made = motion.features.shape[1], tokenizer.config.feature_dim
        if found != made:
            raise ScaMoError(f"{name}: {found} features a frame, the model makes {made}")
        bad = np.argwhere(~np.isfinite(motion.features))
        if len(bad):
            raise ScaMoError(f"{name}: frame {bad[0][0]}, feature {bad[0][1]} is not finite")
        if len(motion) < tokenizer.downsampling:
            expected = f"expected one token ({tokenizer.downsampling} frames) at least"
            raise ScaMoError(f"{name}: {len(motion)} frames, {expected}")
        self.motion, self.features, self.joints = motion, motion.features, motion.joints
        self.tokenizer = tokenizer

    def tokens(self, start: int, end: int) -> NDArray[np.int32]:
        """Codes of the frames start to end, whole tokens, as if they were alone; a motion that was decoded
        from its tokens keeps those."""
        unit, own = self.tokenizer.downsampling, self.motion.tokens
        if start % unit == 0 and own is not None and len(own) * unit == len(self.features) and self._own(own):
            return own[start // unit : end // unit]
        return encode_motions(self.tokenizer, [self.features[start:end]])[0]

    def last_tokens(self) -> NDArray[np.int32]:
        """Codes of all whole tokens, counted from the end."""
        frames = len(self.features)
        return self.tokens(frames % self.tokenizer.downsampling, frames)

    def around(self, gap: tuple[int, int]) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
        """Codes before and after a gap, and the tokens that it takes; raises ScaMoError for a bad one.

        Counted from its first frame: where its frames are no whole tokens, the last one reaches beyond it.
        """
        frames, unit = len(self.features), self.tokenizer.downsampling
        pair = isinstance(gap, tuple | list) and [isinstance(frame, int | np.integer) for frame in gap]
        if pair != [True, True] or not 0 <= gap[0] < gap[1] <= frames:
            raise ScaMoError(f"gap = {gap!r}: expected two frames in order, 0 to {frames} at most")
        begin, end = gap
        count = -(-(end - begin) // unit)
        later = begin + count * unit
        if begin < unit or frames - later < unit:
            raise ScaMoError(
                f"gap = {gap}: expected {unit} frames before it, and after it {unit + later - end} "
                f"({frames} frames in all)"
            )
        after = self.tokens(later, later + (frames - later) // unit * unit)
        return self.tokens(begin % unit, begin), after, count

    def _own(self, tokens: NDArray[np.int32]) -> bool:
        """Whether the tokens are of this tokenizer: whether it decodes them to the features."""
        if not 0 <= tokens.min() <= tokens.max() < self.tokenizer.codes:
            return False
        return np.allclose(decode_tokens(self.tokenizer, [tokens])[0], self.features, atol=1e-3)


def continued(given: Given, tokens: Sequence[int], past: Sequence[int], fps: float) -> Motion:
    """The given motion, and behind it what `tokens` say; `past` are the codes of its own last frames.

    Its frames stay as they are. The new ones are decoded together with `past`; what the decoded past lacks to
    the given frames is added to them, fading out over BLEND seconds.
    """
    unit = given.tokenizer.downsampling
    decoded = decode_tokens(given.tokenizer, [np.array([*past, *tokens])])[0]
    seam = len(past) * unit
    made = decoded[seam:].copy()
    made += _fade(given.features[-2:] - decoded[seam - 2 : seam], len(made), _frames(BLEND, fps))
    _keep_contacts(made, decoded[seam:])
    features = np.concatenate((given.features, made))
    set_velocities(features, len(given.features), len(features))
    joints = _from_pose(given, len(given.features) - 1, made, _frames(BLEND, fps))
    return Motion(
        np.concatenate((given.joints, joints)),
        fps=fps,
        features=features,
        tokens=np.array([*past, *tokens], dtype=np.int32),
    )


def filled(
    given: Given, gap: tuple[int, int], before: Sequence[int], row: Sequence[int], fps: float
) -> tuple[Motion, float, float]:
    """The given motion with other frames in gap[0] <= frame < gap[1], those of the decoded `row`.

    before: the codes of `row` whose frames end where the gap begins. All other frames stay as they are; the
    difference of the decoded frames to those at both ends fades over BLEND seconds or the gap, and what the
    body's heading and place lack at the gap's end is spread over the gap. Also returns how much that was,
    in degrees and metres.
    """
    begin, end = gap
    frames, size = end - begin, min(_frames(BLEND, fps), end - begin + 1)
    decoded = decode_tokens(given.tokenizer, [np.array(row)])[0]
    at = len(before) * given.tokenizer.downsampling
    made = decoded[at : at + frames].astype(np.float64)
    made += _fade(given.features[begin - 2 : begin] - decoded[at - 2 : at], frames, size)
    later = given.features[end : end + 2] - decoded[at + frames : at + frames + 2]
    made += _fade(later[::-1], frames, size)[::-1]
    _keep_contacts(made, decoded[at : at + frames])

    first = JointStream.after(given.joints[begin - 1], given.features[begin - 1])
    last = JointStream.after(given.joints[end], given.features[end])
    share = np.sin(np.pi * (np.arange(frames) + 0.5) / frames) ** 2
    share /= share.sum()
    turned, moved = lead(first, last, made, share)

    features, joints = given.features.copy(), given.joints.copy()
    features[begin:end] = made
    set_velocities(features, begin, end)
    joints[begin:end] = _from_pose(given, begin - 1, features[begin:end], size, end)
    motion = Motion(joints, fps=fps, text=given.motion.text, features=features)
    return motion, math.degrees(turned), moved


def _from_pose(
    given: Given, frame: int, features: NDArray[np.float32], size: int, end: int | None = None
) -> NDArray[np.float32]:
    """Joints of features that follow a given frame; where its joints, or those of the given frame `end` that
    follows, are not what its features say (a motion that was cleaned), the difference fades."""
    path = JointStream.after(given.joints[frame], given.features[frame])
    lacks = given.joints[frame] - path.here
    joints = path.push(features if end is None else np.concatenate((features, given.features[end : end + 1])))
    made = joints[: len(features)] + _fade(np.stack((lacks, lacks)), len(features), size)
    if end is not None:
        lacks = given.joints[end] - joints[-1]
        made += _fade(np.stack((lacks, lacks)), len(features), size)[::-1]
    return made


def _keep_contacts(made: NDArray, decoded: NDArray) -> None:
    """A contact is one or none, and nothing to be blended."""
    contacts = Representation.of(made.shape[1]).contacts
    if contacts is not None:
        made[:, contacts] = decoded[:, contacts]


@torch.no_grad()
def likelihood(model: PrefixLM, text: Tensor, rows: Sequence[Sequence[int]], after: int) -> NDArray:
    """Mean log-probability, nats, of the last `after` codes of each row (all of one length) behind a text."""
    states, length = text.cpu().numpy(), len(rows[0])
    batch = collate([Sample(states, np.array(row)) for row in rows], model.config.codes)
    losses = model(batch.to(model.embedding.weight.device)).losses.view(len(rows), length + 1)
    return -losses[:, length - after : length].mean(1).cpu().numpy()


def _frames(seconds: float, fps: float) -> int:
    return max(1, round(seconds * fps))


def _fade(lacks: NDArray, frames: int, size: int) -> NDArray:
    """What to add to `frames` frames behind one where `lacks` (2, ...) is missing, before it and at it.

    It begins with the value and the slope of `lacks` and ends after `size` frames with 0 and slope 0: the
    cubic of "inertialization" (D. Bollo, Inertialization: High-Performance Animation Transitions in Gears of
    War, GDC 2018).
    """
    t = np.minimum(np.arange(1, frames + 1) / size, 1.0).reshape(-1, *[1] * (lacks.ndim - 1))
    value, slope = lacks[1], (lacks[1] - lacks[0]) * size
    return (value * (1 + 2 * t) * (1 - t) ** 2 + slope * t * (1 - t) ** 2).astype(np.float32)
