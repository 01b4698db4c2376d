"""Frames as tokens arrive: the tokenizer's decoder on windows, and a path that goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from scamo.config import TokenizerConfig
from scamo.motion.features import ROOT, features_to_joints
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
        """The next tokens -> the features (frames, 263) that are certain now, None if there are too few.

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
    """`features_to_joints` in pieces: the heading and the place of the last frame are kept."""

    def __init__(self) -> None:
        self.yaw = 0.0
        self.place = np.zeros(3)
        self.last: NDArray[np.float64] | None = None

    @classmethod
    def after(cls, joints: NDArray[np.float32], features: NDArray[np.float32]) -> JointStream:
        """Goes on where a body stands: joints (22, 3) and features (263,) of one frame.

        Its heading and place are those that bring the features' pose nearest to the joints.
        """
        local = features_to_joints(features[None].astype(np.float64))[0]
        centre, middle = joints.mean(0, dtype=np.float64), local.mean(0)
        (x, _, z), (to_x, _, to_z) = (local - middle).T, (joints - centre).T
        stream = cls()
        stream.yaw = float(np.arctan2((z * to_x - x * to_z).sum(), (x * to_x + z * to_z).sum()))
        stream.place = centre - stream._placed(middle)
        stream.last = features[None].astype(np.float64)
        return stream

    @property
    def here(self) -> NDArray[np.float64]:
        """Joints (22, 3) of the last frame, as its features say."""
        assert self.last is not None
        return self._placed(features_to_joints(self.last)[0])

    def _placed(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Points (..., 3) relative to the last frame's root and heading, in the world."""
        cos, sin = np.cos(self.yaw), np.sin(self.yaw)
        x, y, z = points[..., 0], points[..., 1], points[..., 2]
        return np.stack((x * cos + z * sin, y, z * cos - x * sin), -1) + self.place

    def push(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """The next features (T, 263), T >= 1 -> their joints (T, 22, 3)."""
        own = features.astype(np.float64)
        chain = own if self.last is None else np.concatenate((self.last, own))
        # Relative to the frame before, which stands at the origin there and faces +Z.
        joints = self._placed(features_to_joints(chain)[len(chain) - len(own) :])
        self.yaw -= 2 * chain[:-1, ROOT.start].sum()
        self.place = np.array([joints[-1, 0, 0], self.place[1], joints[-1, 0, 2]])
        self.last = own[-1:]
        return joints.astype(np.float32)
