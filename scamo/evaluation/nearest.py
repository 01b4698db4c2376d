"""How far a generated motion is from what the model was trained on: the nearest training window."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from scamo.errors import ScaMoError

# Root height and the 21 local positions: the pose without heading and without travelled distance.
_HEIGHT, _POSITIONS = slice(3, 4), slice(4, 67)
_JOINTS = 22


@dataclass(frozen=True)
class Nearest:
    """The nearest window: clip name, its first frame, and the root-mean-square joint distance in mm."""

    name: str
    start: int
    distance_mm: float


def nearest_window(features: np.ndarray, clips: Iterable[tuple[str, np.ndarray]]) -> Nearest:
    """Find the window of equal length, in any of `clips`, whose poses are nearest to those of `features`.

    The distance is the root mean square, over frames and the 22 joints, of the distance between
    corresponding joints after heading and horizontal position are removed: the local positions of the
    263 features and the root height. A clip shorter than the query is compared at its own length with the
    best part of the query, so that a short copy is found too.

    Args:
        features: (T, 263) float, raw (not normalised).
        clips: (name, (T_i, 263)) pairs.

    Returns:
        The nearest window; equal to 0 mm for a copy of a training clip.

    Raises:
        ScaMoError: `features` is not (T, 263) with T >= 1, or there are no clips.
    """
    if features.ndim != 2 or features.shape[1] != 263 or not len(features):
        raise ScaMoError(f"features of shape {features.shape}: expected (T, 263) with at least one frame")
    query = _poses(features)
    best: Nearest | None = None
    for name, clip in clips:
        if not len(clip):
            continue
        poses = _poses(clip)
        short, long = (query, poses) if len(query) <= len(poses) else (poses, query)
        # |a - b|^2 summed over a window = |a|^2 + |b|^2 - 2 <a, b>; the inner products are a correlation.
        # Centred on the query's mean pose in float64: the squares would cancel badly otherwise.
        centre = short.mean(0)
        a = torch.from_numpy(short - centre)
        b = torch.from_numpy(long - centre)
        inner = torch.nn.functional.conv1d(b.T[None], a.T[None])[0, 0]
        squares = torch.cat([b.new_zeros(1), b.square().sum(1).cumsum(0)])
        window = squares[len(a) :] - squares[: -len(a)]
        total = (a.square().sum() + window - 2 * inner).clamp_min(0)
        at = int(total.argmin())
        distance = 1000 * float((total[at] / (len(a) * _JOINTS)).sqrt())
        if best is None or distance < best.distance_mm:
            best = Nearest(name, at if len(query) <= len(poses) else 0, distance)
    if best is None:
        raise ScaMoError("no clips to search for the nearest window")
    return best


def _poses(features: np.ndarray) -> np.ndarray:
    return np.concatenate([features[:, _HEIGHT], features[:, _POSITIONS]], axis=1).astype(np.float64)
