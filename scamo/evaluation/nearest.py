"""How far a generated motion is from what the model was trained on: the nearest training window."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from scamo.errors import ScaMoError
from scamo.motion.representation import Representation


@dataclass(frozen=True)
class Nearest:
    """The nearest window: clip name, its first frame, and the root-mean-square joint distance in mm."""

    name: str
    start: int
    distance_mm: float


def nearest_windows(queries: Sequence[np.ndarray], clips: Iterable[tuple[str, np.ndarray]]) -> list[Nearest]:
    """Find, for each query, the window of equal length in any of `clips` whose poses are nearest to its own.

    The distance is the root mean square, over frames and joints, of the distance between corresponding joints
    after heading and horizontal position are removed: every frame's pose by itself. A clip shorter than the
    query is compared at its own length with the best part of the query, so that a short copy is found too.

    Args:
        queries: (T, C) float each, raw (not normalised) features of one representation.
        clips: (name, (T_i, C)) pairs, read once.

    Returns:
        The nearest window of each query; 0 mm for a copy of a training clip.

    Raises:
        ScaMoError: a query is not (T, C) with T >= 1, queries or clips differ in C, or there are no clips.
    """
    if not queries:
        return []
    representation = Representation.of(queries[0].shape[-1])
    poses = [_poses(query, representation, "features") for query in queries]
    # Centred on a common pose, in float64: |a - b|^2 = |a|^2 + |b|^2 - 2 <a, b> would cancel badly otherwise.
    centre = np.concatenate(poses).mean(0)
    wanted = [torch.from_numpy(pose - centre) for pose in poses]
    norms = [_prefix_sums(pose) for pose in wanted]
    best: list[Nearest | None] = [None] * len(queries)
    for name, features in clips:
        if not len(features):
            continue
        clip = torch.from_numpy(_poses(features, representation, f"clip {name}") - centre)
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
            distance = 1000 * float(value / (n * representation.n_joints)) ** 0.5
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


def _poses(features: np.ndarray, representation: Representation, what: str) -> np.ndarray:
    """Joints (T, 3 J) of every frame as if it were the only one: its root at X = Z = 0, facing +Z."""
    if features.ndim != 2 or features.shape[1] != representation.feature_dim or not len(features):
        expected = f"(T, {representation.feature_dim}) with at least one frame"
        raise ScaMoError(f"{what} of shape {features.shape}: expected {expected}")
    joints = representation.to_joints(features[:, None].astype(np.float64))
    return joints.reshape(len(features), -1)
