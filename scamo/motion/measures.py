"""Measures of motion on joints (..., T, J, 3), metres, Y up: how far from the truth, and how physical.

numpy arrays and torch tensors of any device alike, computed in float64 where they lie. Leading dimensions are
a batch of motions of equal length; every measure but `peaks` returns one number, the mean over all of them.
Measures of change are 0 for motions with too few frames to change. Raises ScaMoError for another shape, no
frames, a body that is not known (`Body.of`), or a value that is not finite (the frame is named).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from scamo.errors import ScaMoError
from scamo.motion.body import Body

FOOT_HEIGHT = 0.025  # metres above the lowest twentieth: a foot that is lower stands
FOOT_SPEED = 0.5  # m/s: a standing foot that is faster slides; 2.5 cm a frame at 20 fps


def mpjpe(made: Any, true: Any) -> float:
    """Mean distance of corresponding joints, mm, after moving both pelves to the origin in each frame."""
    error = _error(made, true)
    return 1000 * _mean(_length(error - error[..., :1, :]))


def root_error(made: Any, true: Any) -> float:
    """Mean distance of the pelves, mm. It grows along a motion whose root is integrated from velocities."""
    return 1000 * _mean(_length(_error(made, true)[..., :1, :]))


def velocity_error(made: Any, true: Any, fps: float) -> float:
    """Mean distance of the joints' velocities (differences of frames), mm/s."""
    return 1000 * fps * _mean(_length(_differences(_error(made, true), 1)))


def acceleration_error(made: Any, true: Any, fps: float) -> float:
    """Mean distance of the joints' accelerations (second differences of frames), mm/s^2."""
    return 1000 * fps**2 * _mean(_length(_differences(_error(made, true), 2)))


def foot_skate(joints: Any, fps: float) -> float:
    """Share of the steps of standing feet that slide; 0 when no foot stands.

    A foot stands when its ball is, in both frames of the step, less than FOOT_HEIGHT above the 5th percentile
    of both balls' heights in the motion; it slides when it moves horizontally faster than FOOT_SPEED.
    """
    joints, body = _body(joints)
    balls = joints[..., [ball for _, ball in body.feet], :]
    height = balls[..., 1]
    flat = height.reshape(*height.shape[:-2], -1)
    low = height - _percentile(flat, 5)[..., None, None] < FOOT_HEIGHT
    stands = low[..., 1:, :] & low[..., :-1, :]
    slides = _length(_differences(balls[..., [0, 2]], 1)) > FOOT_SPEED / fps
    steps = int(stands.sum())
    return int((stands & slides).sum()) / steps if steps else 0.0


def foot_penetration(joints: Any, floor: float | None = None) -> float:
    """Mean over frames, mm, of how deep the lowest of ankles and balls of the feet is below the floor.

    floor: its height in metres; None: 0, where the features have it (the lowest point of a motion they are
    made of). It is never estimated from the motion itself: one that sinks would take its floor along.
    A frame with both feet above the floor counts as 0, so hovering is not seen; and a joint lies inside the
    foot, so the sole may be deeper.
    """
    joints, body = _body(joints)
    feet = joints[..., [joint for foot in body.feet for joint in foot], 1]
    depth = ((0.0 if floor is None else floor) - feet).clip(0)
    return 1000 * _mean(_percentile(depth, 100))


def jerk(joints: Any, fps: float) -> float:
    """Mean over joints and frames of the third derivative (third differences), m/s^3."""
    return fps**3 * _mean(_length(_differences(_checked(joints, "joints"), 3)))


def peaks(joints: Any, fps: float, order: int) -> Any:
    """How fast the fastest joint moves (order 1, m/s) or changes its velocity (2, m/s^2), frame by frame.

    Of joints (..., T, J, 3) the (..., T - order) largest lengths of their differences. A seam between motions
    shows as values that recorded motion does not have.
    """
    changes = _length(_differences(_checked(joints, "joints"), order))
    return fps**order * _percentile(changes, 100)


def bone_drift(joints: Any) -> float:
    """Mean relative deviation of the bones from their median length over the motion."""
    joints, body = _body(joints)
    bones = _length(joints[..., body.bones, :] - joints[..., [body.parents[j] for j in body.bones], :])
    usual = _percentile(bones.swapaxes(-1, -2), 50)[..., None, :]
    return _mean(abs(bones - usual) / usual.clip(1e-9))


def physics(joints: Any, fps: float = 20.0) -> dict[str, float]:
    """How physical motions (..., T, J, 3) of a known body are, by the measures of these names: foot_skate,
    bone_drift, jerk (m/s^3) and foot_penetration_mm, with the floor at 0."""
    return {
        "foot_skate": foot_skate(joints, fps),
        "bone_drift": bone_drift(joints),
        "jerk": jerk(joints, fps),
        "foot_penetration_mm": foot_penetration(joints),
    }


def _checked(joints: Any, name: str) -> Any:
    """float64, on its own device."""
    if hasattr(joints, "detach"):
        joints = joints.detach().double()
    else:
        joints = np.asarray(joints, dtype=np.float64)
    shape = tuple(joints.shape)
    if len(shape) < 3 or shape[-1] != 3 or 0 in shape:
        raise ScaMoError(f"{name}: expected shape (..., T, J, 3), none of them 0, got {shape}")
    finite = abs(joints) < np.inf
    if not bool(finite.all()):
        frame = np.argwhere(~np.asarray(finite.tolist()))[0][:-2]
        where = ", ".join(map(str, frame.tolist()))
        raise ScaMoError(f"{name}[{where}]: holds a value that is not finite")
    return joints


def _body(joints: Any) -> tuple[Any, Body]:
    joints = _checked(joints, "joints")
    return joints, Body.of(joints.shape[-2])


def _error(made: Any, true: Any) -> Any:
    made, true = _checked(made, "made"), _checked(true, "true")
    if made.shape != true.shape:
        raise ScaMoError(f"made is {tuple(made.shape)}, true {tuple(true.shape)}: expected the same shape")
    return made - true


def _length(vectors: Any) -> Any:
    return (vectors * vectors).sum(-1) ** 0.5


def _differences(values: Any, times: int) -> Any:
    """Along the frames of (..., T, J, 3)."""
    for _ in range(times):
        values = values[..., 1:, :, :] - values[..., :-1, :, :]
    return values


def _mean(values: Any) -> float:
    return float(values.mean()) if 0 not in values.shape else 0.0


def _percentile(values: Any, percent: float) -> Any:
    """Along the last dimension, linear between ranks. torch's own refuses more than 2^24 values."""
    if isinstance(values, np.ndarray):
        return np.percentile(values, percent, axis=-1)
    ranked = values.sort(dim=-1).values
    place = percent / 100 * (ranked.shape[-1] - 1)
    low = int(place)
    high = min(low + 1, ranked.shape[-1] - 1)
    return ranked[..., low].lerp(ranked[..., high], place - low)
