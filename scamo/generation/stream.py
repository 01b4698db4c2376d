"""Frames as tokens arrive: the tokenizer's decoder on windows, and a path that goes on where it stopped."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from scamo.config import TokenizerConfig
from scamo.motion import features272, features296
from scamo.motion.ik import turn_and_place
from scamo.motion.representation import Representation
from scamo.tokenizers.autoencoder import MotionAutoencoder


def context_tokens(config: TokenizerConfig) -> tuple[int, int]:
    """How many tokens before and after a token its frames depend on: the decoder's receptive field.

    Layer by layer from the frames back: a convolution of 3 reaches its dilation further on both sides, an
    upsampling halves. (22, 22) at the default depth and dilations.
    """
    first, last = 0, config.downsampling - 1  # frames of token 0
    first, last = first - 2, last + 2  # the two convolutions at the end
    stack = sum(config.dilation_base**i for i in range(config.depth))
    for _ in range(config.downsample_stages):
        first, last = (first - 1) // 2 - stack, (last + 1) // 2 + stack
    return 1 - first, last + 1


class FeatureStream:
    """Decodes tokens as they arrive; what it gives, laid end to end, is `tokenizer.decode` of them all.

    To float32 rounding: a frame is given when all the tokens that it depends on are there, `context_tokens`
    after its own, or when the motion ends.

    chunk: tokens that are decoded at a time at least. Each time their context is decoded again.
    """

    def __init__(self, tokenizer: MotionAutoencoder, chunk: int) -> None:
        self.tokenizer, self.chunk = tokenizer, chunk
        self.before, self.after = context_tokens(tokenizer.config)
        self.tokens: list[int] = []
        self.given = 0

    @torch.no_grad()
    def push(self, tokens: Iterable[int], *, end: bool = False) -> NDArray[np.float32] | None:
        """The next tokens -> the features (frames, C) that are certain now, None if there are too few.

        end: these were the last.
        """
        self.tokens += (int(token) for token in tokens)
        ready = len(self.tokens) if end else len(self.tokens) - self.after
        if ready - self.given < (1 if end else self.chunk):
            return None
        start = max(0, self.given - self.before)
        window = torch.tensor(self.tokens[start:], device=self.tokenizer.mean.device)
        unit = self.tokenizer.downsampling
        features = self.tokenizer.decode(window[None])[
            0, (self.given - start) * unit : (ready - start) * unit
        ]
        self.given = ready
        return features.cpu().numpy()


class JointStream:
    """`Representation.to_joints` in pieces: the heading and the place of the last frame are kept."""

    def __init__(self) -> None:
        self.yaw = 0.0
        self.place = np.zeros(3)
        self.last: NDArray[np.float64] | None = None

    @classmethod
    def after(cls, joints: NDArray[np.float32], features: NDArray[np.float32]) -> JointStream:
        """Goes on where a body stands: joints (J, 3) and features (C,) of one frame.

        Its heading and place are those that bring the features' pose nearest to the joints.
        """
        stream = cls()
        stream.last = features[None].astype(np.float64)
        local = _joints(stream.last)[0]
        stream.yaw, stream.place = turn_and_place(local, joints.astype(np.float64))
        return stream

    @property
    def here(self) -> NDArray[np.float64]:
        """Joints (J, 3) of the last frame, as its features say."""
        assert self.last is not None
        return self._placed(_joints(self.last)[0])

    def _placed(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Points (..., 3) relative to the last frame's root and heading, in the world."""
        cos, sin = np.cos(self.yaw), np.sin(self.yaw)
        x, y, z = points[..., 0], points[..., 1], points[..., 2]
        return np.stack((x * cos + z * sin, y, z * cos - x * sin), -1) + self.place

    def push(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """The next features (T, C), T >= 1 -> their joints (T, J, 3)."""
        own = features.astype(np.float64)
        chain = own if self.last is None else np.concatenate((self.last, own))
        # Relative to the frame before, which stands at the origin there and faces +Z.
        joints = self._placed(_joints(chain)[len(chain) - len(own) :])
        self.last = own[-1:]
        self.yaw, self.place = turn_and_place(_joints(self.last)[0], joints[-1])
        return joints.astype(np.float32)


def _joints(features: NDArray[np.float64]) -> NDArray[np.float64]:
    return Representation.of(features.shape[1]).to_joints(features)


def lead(
    start: JointStream, end: JointStream, features: NDArray[np.float64], share: NDArray[np.float64]
) -> tuple[float, float]:
    """Turn and move features (T, C) between two frames, in place, so that they lead from one to the other.

    What heading and place lack when the frame where `end` stands follows is spread over them: share (T,) has
    the sum 1. Returns how much that was: radians and metres.
    """
    assert end.last is not None
    representation = Representation.of(features.shape[1])
    yaws, _ = _way(start, np.concatenate((features, end.last)))
    turned = (end.yaw - yaws[-1] + math.pi) % (2 * math.pi) - math.pi
    turns = turned * share
    if features.shape[1] == features272.FEATURE_DIM:
        columns = features[:, features272.TURN]
        angles = np.arctan2(columns[:, 2], columns[:, 0]) - turns
        columns[:, 0], columns[:, 2] = np.cos(angles), np.sin(angles)
        steps, seen = features[:, features272.ROOT_VELOCITY], 0  # from the frame before, as that one sees it
    elif features.shape[1] == features296.FEATURE_DIM:
        features[:, 0] -= turns
        steps, seen = features[:, 1:3], 1  # to the next frame, as this one sees it
    else:
        features[:, 0] -= turns / 2
        steps, seen = features[:, 1:3], 2  # to the next frame, as that one sees it
    yaws, place = _way(start, np.concatenate((features, end.last)))
    x, _, z = end.place - place
    yaw = np.concatenate(([start.yaw], yaws))[seen : seen + len(features)]
    steps[:, 0] += share * (x * np.cos(yaw) - z * np.sin(yaw)) / representation.unit
    steps[:, 1] += share * (x * np.sin(yaw) + z * np.cos(yaw)) / representation.unit
    return abs(turned), math.hypot(x, z)


def _way(
    start: JointStream, features: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The headings (T,) at features (T, C) that follow where a body stands, and the place of the last."""
    path, yaws = copy.copy(start), []
    for frame in features:
        path.push(frame[None])
        yaws.append(path.yaw)
    return np.array(yaws), path.place


def set_velocities(features: NDArray[np.float32], start: int, end: int) -> None:
    """Make the joints' velocities of frames start to end those of the features' own way, in place.

    Of a last frame, where they are the steps to the next one, they stay.
    """
    representation = Representation.of(features.shape[1])
    columns = representation.velocities
    if representation.first_position:  # seen from this frame, of joints that also travel
        end = min(end, len(features) - 1)
        pairs = np.stack((features[start:end], features[start + 1 : end + 1]), 1).astype(np.float64)
        joints = representation.to_joints(pairs) / representation.unit
        features[start:end, columns] = (joints[:, 1] - joints[:, 0]).reshape(end - start, -1)
        return
    places = features[:, representation.positions]
    if features.shape[1] == features296.FEATURE_DIM:
        end = min(end, len(features) - 1)
        features[start:end, columns] = places[start + 1 : end + 1] - places[start:end]
    else:
        features[start:end, columns] = places[start:end] - places[start - 1 : end - 1]
