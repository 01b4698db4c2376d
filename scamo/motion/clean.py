"""Cleaning a motion: constant bones, smoothing, and feet that stay where they stand."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import solveh_banded
from scipy.signal import butter, sosfiltfilt

from scamo.errors import ScaMoError
from scamo.motion.ik import fit_rotations, shortest_rotations
from scamo.motion.measures import FOOT_HEIGHT, FOOT_SPEED, foot_skate
from scamo.motion.motion import Motion
from scamo.motion.skeleton import N_JOINTS, PARENTS

_LEGS = ((1, 4, 7, 10), (2, 5, 8, 11))  # hip, knee, ankle, ball of the foot
# A standing foot is low, as for `foot_skate`, and slower than this: one that slides is to be caught.
_SPEED = 2 * FOOT_SPEED
_SHORTEST = 0.15  # seconds of the shortest stand
_STRAY = 0.2  # metres that a foot may stray during a stand; more is a step or a slide on purpose
# Least squares: what a step of a foot that stands, is low, or is in the air resists being changed by, and
# what a place does.
_STANDS, _LOW, _AIR, _PLACE = 1e6, 10.0, 1.0, 0.3
_STRAIGHT = 0.995  # of a leg's length: how far it is stretched to hold a foot


def clean(
    motion: Motion, *, foot_lock: bool = True, smooth: float | None = None, constant_bones: bool = False
) -> Motion:
    """A new motion of the same text and frame rate, and what was done to it in `meta["clean"]`.

    foot_lock: hold the ball of a foot at one place while it stands, by bending the leg at hip, knee and
    ankle; the bones keep their lengths, and nothing but the legs moves. A foot that the leg cannot reach with
    the hip where it is stays short of it.
    smooth: the cutoff in Hz of a low-pass filter (Butterworth of second order, forth and back, so nothing
    comes late); 4 to 6 keep what people do. The bones keep their lengths, standing feet their places.
    constant_bones: give every bone its average length; joints then are those of one skeleton, and BVH and
    glTF need rotations only.

    `meta["clean"]` holds these settings, `foot_skate_before` and `foot_skate_after` (`measures.foot_skate`),
    `moved_mm` (mean over joints and frames) and `held` (share of frames in which a foot is held, mean of the
    two). Features are left out: they would not fit the new joints.
    Raises ScaMoError for a cutoff that is not between 0 and half the frame rate, and for another body than
    the 22 joints, whose legs it bends.
    """
    if len(motion.body) != N_JOINTS:
        raise ScaMoError(f"clean: made for the body of {N_JOINTS} joints, the motion has {len(motion.body)}")
    if smooth is not None and not 0 < smooth < motion.fps / 2:
        raise ScaMoError(
            f"smooth: expected a cutoff above 0 and below half the frame rate, {motion.fps / 2:g} Hz, "
            f"got {smooth}"
        )
    before = motion.joints.astype(np.float64)
    joints = before
    if smooth is not None and len(motion) > 1:
        joints = _smoothed(joints, smooth, motion.fps)
    if constant_bones:
        joints = fit_rotations(joints, fps=motion.fps).joints
    held = 0.0
    if foot_lock or joints is not before:
        joints = joints.copy()
        low = _low(before)
        for side, leg in enumerate(_LEGS):
            path = before[:, leg[-1]]
            stands = _stands(path, low[:, side], motion.fps)
            held += sum(end - start for start, end in stands) / len(motion) / len(_LEGS)
            _hold(joints, path, leg, stands, low[:, side], foot_lock)
    done: dict[str, Any] = {
        "foot_lock": foot_lock,
        "smooth_hz": smooth,
        "constant_bones": constant_bones,
        "foot_skate_before": foot_skate(motion.joints, motion.fps),
        "foot_skate_after": foot_skate(joints.astype(np.float32), motion.fps),
        "moved_mm": round(1000 * float(np.linalg.norm(joints - before, axis=-1).mean()), 3),
        "held": round(held, 4),
    }
    return Motion(
        joints, fps=motion.fps, text=motion.text, tokens=motion.tokens, meta={**motion.meta, "clean": done}
    )


def _smoothed(joints: np.ndarray, cutoff: float, fps: float) -> np.ndarray:
    """Low-passed positions, each bone as long in each frame as it was."""
    sections = butter(2, cutoff, fs=fps, output="sos")
    padding = min(len(joints) - 1, max(9, round(2 * fps / cutoff)))
    passed = sosfiltfilt(sections, joints, axis=0, padlen=padding)
    out = passed.copy()
    for joint in range(1, N_JOINTS):
        parent = PARENTS[joint]
        length = np.linalg.norm(joints[:, joint] - joints[:, parent], axis=-1, keepdims=True)
        out[:, joint] = out[:, parent] + length * _unit(passed[:, joint] - passed[:, parent])
    return out


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _low(joints: np.ndarray) -> np.ndarray:
    """(T, 2): whether the ball of each foot is as low as `foot_skate` has it for a standing one."""
    heights = joints[:, [leg[-1] for leg in _LEGS], 1]
    return heights - np.percentile(heights, 5) < FOOT_HEIGHT


def _stands(path: np.ndarray, low: np.ndarray, fps: float) -> list[tuple[int, int]]:
    """Frames [start, end) in which a foot stands, in order."""
    places = path[:, [0, 2]]
    speeds = np.linalg.norm(np.diff(places, axis=0), axis=-1) * fps
    still = low[1:] & low[:-1] & (speeds < _SPEED)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], still, [False]]).astype(int)))
    found: list[tuple[int, int]] = []
    for start, end in edges.reshape(-1, 2):
        # n steps are n + 1 frames.
        found += _within_reach(places, int(start), int(end) + 1, fps)
    return found


def _within_reach(places: np.ndarray, start: int, end: int, fps: float) -> list[tuple[int, int]]:
    """The stands of [start, end) in which the foot strays little, a moment apart for it to come along."""
    moment = max(3, round(_SHORTEST * fps))
    found: list[tuple[int, int]] = []
    while end - start >= moment:
        low = high = places[start]
        last = start
        while last < end:
            low, high = np.minimum(low, places[last]), np.maximum(high, places[last])
            if np.linalg.norm(high - low) > _STRAY:
                break
            last += 1
        if last - start >= moment:
            found.append((start, last))
        start = last + moment
    return found


def _hold(
    joints: np.ndarray,
    path: np.ndarray,
    leg: tuple[int, int, int, int],
    stands: list[tuple[int, int]],
    low: np.ndarray,
    lock: bool,
) -> None:
    """Bring a foot, in place, to where it was (`path`) in its stands, or with `lock` to one place in each.

    The rest of its way changes as little as possible: the steps in the air most, a low foot's hardly.
    """
    if not stands:
        return
    ball = joints[:, leg[3]]
    steps = np.where(low[1:] | low[:-1], _LOW, _AIR)
    places = np.full(len(ball), _PLACE)
    own = np.zeros_like(ball)
    for start, end in stands:
        places[start:end] = _STANDS
        own[start:end] = path[start:end] - ball[start:end]
    shift = _least_change(places, own, steps, np.zeros_like(ball[1:]))
    if lock:
        # Where a foot stands is left open, only that it does not move; its height stays.
        changes = np.zeros_like(ball[1:])
        for start, end in stands:
            steps[start : end - 1] = _STANDS
            changes[start : end - 1] = ball[start : end - 1] - ball[start + 1 : end]
        places[:] = _PLACE
        across = [0, 2]
        shift[:, across] = _least_change(places, (path - ball)[:, across], steps, changes[:, across])
    joints[:, leg] = _bend(joints[:, leg], shift)


def _least_change(
    place_weights: np.ndarray, places: np.ndarray, step_weights: np.ndarray, steps: np.ndarray
) -> np.ndarray:
    """x (T, n) whose rows differ least from places and its steps from steps, in weighted squares."""
    bands = np.zeros((2, len(places)))
    bands[1] = place_weights
    bands[1, 1:] += step_weights
    bands[1, :-1] += step_weights
    bands[0, 1:] = -step_weights
    right = place_weights[:, None] * places
    right[1:] += step_weights[:, None] * steps
    right[:-1] -= step_weights[:, None] * steps
    return solveh_banded(bands, right)


def _bend(leg: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Legs (T, 4, 3) whose ankles and balls moved by shifts (T, 3), hips and lengths of bones unchanged.

    The knee stays in the plane in which it is bent. Out of reach, the foot stops short and points there.
    """
    hip, knee, ankle, ball = np.moveaxis(leg, 1, 0)
    thigh = np.linalg.norm(knee - hip, axis=-1, keepdims=True)
    shank = np.linalg.norm(ankle - knee, axis=-1, keepdims=True)
    foot = np.linalg.norm(ball - ankle, axis=-1, keepdims=True)
    line = ankle - hip
    wanted = line + shift
    # A leg that was straighter already may stay so.
    furthest = np.maximum(_STRAIGHT * (thigh + shank), np.linalg.norm(line, axis=-1, keepdims=True))
    nearest = np.abs(thigh - shank) + 1e-6
    reach = np.clip(np.linalg.norm(wanted, axis=-1, keepdims=True), nearest, furthest)
    way = _unit(wanted)

    turned = (shortest_rotations(_unit(line), way) @ (knee - hip)[..., None])[..., 0]
    out_of_line = turned - (turned * way).sum(-1, keepdims=True) * way
    # The knee of a straight leg bends towards the toes.
    toes = ball - ankle
    toes = toes - (toes * way).sum(-1, keepdims=True) * way
    straight = np.linalg.norm(out_of_line, axis=-1, keepdims=True) < 1e-6 * thigh
    bend = _unit(np.where(straight, toes, out_of_line))
    along = (thigh**2 + reach**2 - shank**2) / (2 * thigh * reach)
    across = np.sqrt(np.maximum(1 - along**2, 0))
    new_knee = hip + thigh * (along * way + across * bend)
    new_ankle = hip + reach * way
    new_ball = new_ankle + foot * _unit(ball + shift - new_ankle)
    return np.stack([hip, new_knee, new_ankle, new_ball], axis=1)
