"""How far a generated motion is from what the model was trained on: the nearest training window."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def nearest_windows(queries: Sequence[np.ndarray], clips: Iterable[tuple[str, np.ndarray]]) -> list[Nearest]:
    """Find, for each query, the window of equal length in any of `clips` whose poses are nearest to its own.

    The distance is the root mean square, over frames and the 22 joints, of the distance between
    corresponding joints after heading and horizontal position are removed: the local positions of the
    263 features and the root height. A clip shorter than the query is compared at its own length with the
    best part of the query, so that a short copy is found too.

    Args:
        queries: (T, 263) float each, raw (not normalised).
        clips: (name, (T_i, 263)) pairs, read once.

    Returns:
        The nearest window of each query; 0 mm for a copy of a training clip.

    Raises:
        ScaMoError: a query is not (T, 263) with T >= 1, or there are no clips.
    """
    for query in queries:
        if query.ndim != 2 or query.shape[1] != 263 or not len(query):
            raise ScaMoError(f"features of shape {query.shape}: expected (T, 263) with at least one frame")
    poses = [_poses(query) for query in queries]
    # Centred on a common pose, in float64: |a - b|^2 = |a|^2 + |b|^2 - 2 <a, b> would cancel badly otherwise.
    centre = np.concatenate(poses).mean(0) if poses else np.zeros(64)
    wanted = [torch.from_numpy(pose - centre) for pose in poses]
    norms = [_prefix_sums(pose) for pose in wanted]
    best: list[Nearest | None] = [None] * len(queries)
    for name, features in clips:
        if not len(features):
            continue
        clip = torch.from_numpy(_poses(features) - centre)
        clip_norms = _prefix_sums(clip)
        for index, (target, target_norms) in enumerate(zip(wanted, norms, strict=True)):
            n, offsets = min(len(clip), len(target)), abs(len(clip) - len(target)) + 1
            inner = clip @ target.T
            # A window is a diagonal of the inner products; the shorter of the two lies wholly in it.
            down = len(clip) >= len(target)
            step = inner.stride(0) if down else 1
            along = inner.as_strided((offsets, n), (step, inner.stride(0) + 1)).sum(1)
            long, short = (clip_norms, target_norms) if down else (target_norms, clip_norms)
            total = (long[n:] - long[:-n] + short[-1] - 2 * along).clamp_min_(0)
            value, at = total.min(0)
            distance = 1000 * float(value / (n * _JOINTS)) ** 0.5
            known = best[index]
            if known is None or distance < known.distance_mm:
                best[index] = Nearest(name, int(at) if down else 0, distance)
    found = [nearest for nearest in best if nearest is not None]
    if len(found) != len(queries):
        raise ScaMoError("no clips to search for the nearest window")
    return found


def nearest_window(features: np.ndarray, clips: Iterable[tuple[str, np.ndarray]]) -> Nearest:
    """`nearest_windows` for one query."""
    return nearest_windows([features], clips)[0]


def _prefix_sums(poses: torch.Tensor) -> torch.Tensor:
    return torch.cat([poses.new_zeros(1), poses.square().sum(1).cumsum(0)])


def _poses(features: np.ndarray) -> np.ndarray:
    return np.concatenate([features[:, _HEIGHT], features[:, _POSITIONS]], axis=1).astype(np.float64)
