"""Measures of motion against closed forms, and numpy against torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from scamo.errors import ScaMoError
from scamo.motion.body import Body
from scamo.motion.measures import (
    acceleration_error,
    bone_drift,
    foot_penetration,
    foot_skate,
    jerk,
    mpjpe,
    peaks,
    physics,
    root_error,
    velocity_error,
)
from scamo.motion.skeleton import forward_kinematics, quaternions_to_matrices

FEET = (7, 8, 10, 11)


def standing(frames: int) -> np.ndarray:
    """(frames, 22, 3): the body at rest, the balls of its feet at height 0."""
    body = forward_kinematics(quaternions_to_matrices(np.tile([1.0, 0, 0, 0], (22, 1))))
    body[:, 1] -= body[10, 1]
    return np.tile(body, (frames, 1, 1))


def moving(frames: int, fps: float, velocity: tuple[float, float, float]) -> np.ndarray:
    return standing(frames) + (np.arange(frames) / fps)[:, None, None] * np.array(velocity)


@pytest.mark.parametrize("fps", [12.5, 20, 30])
def test_errors_of_constant_velocity_and_acceleration(fps):
    true = np.random.default_rng(0).normal(size=(40, 22, 3))
    t = (np.arange(40) / fps)[:, None, None]
    drift = true + t * np.array([0.3, 0.0, -0.4])
    assert mpjpe(drift, true) == pytest.approx(0, abs=1e-10)
    assert root_error(drift, true) == pytest.approx(500 * t.mean(), rel=1e-12)
    assert velocity_error(drift, true, fps) == pytest.approx(500, rel=1e-11)
    assert acceleration_error(drift, true, fps) == pytest.approx(0, abs=1e-8)
    fall = true + 0.5 * t**2 * np.array([0.0, -9.81, 0.0])
    assert acceleration_error(fall, true, fps) == pytest.approx(9810, rel=1e-10)
    # Velocities by differences are those at the middle of the steps.
    assert velocity_error(fall, true, fps) == pytest.approx(9810 * (t[1:] + t[:-1]).mean() / 2, rel=1e-10)


def test_errors_of_one_joint():
    true = np.random.default_rng(0).normal(size=(10, 22, 3))
    made = true.copy()
    made[:, 15] += [0.03, 0.0, 0.04]
    assert mpjpe(made, true) == pytest.approx(50 / 22, rel=1e-12)
    assert root_error(made, true) == 0
    assert velocity_error(made, true, 20) == pytest.approx(0, abs=1e-9)
    # The pelvis alone: aligned at the pelvis, all the others are off.
    made = true.copy()
    made[5:, 0] += [0.0, 0.02, 0.0]
    assert mpjpe(made, true) == pytest.approx(20 / 2 * 21 / 22, rel=1e-12)
    assert root_error(made, true) == pytest.approx(10, rel=1e-12)
    assert velocity_error(made, true, 20) == pytest.approx(20 * 20 / 9 / 22, rel=1e-10)


def test_changes_of_short_motions_are_zero():
    joints = standing(1)
    assert velocity_error(joints + 1, joints, 20) == 0
    assert acceleration_error(standing(2) + 1, standing(2), 20) == 0
    assert jerk(standing(3), 20) == 0
    assert foot_skate(joints, 20) == 0


@pytest.mark.parametrize("fps", [12.5, 20, 30, 120])
def test_feet_slide_at_half_a_metre_a_second(fps):
    assert foot_skate(moving(60, fps, (0.3, 0.0, 0.39)), fps) == 0.0
    assert foot_skate(moving(60, fps, (0.3, 0.0, 0.41)), fps) == 1.0
    assert foot_skate(standing(60), fps) == 0.0
    # Up and down is not sliding: 2 cm a frame.
    tapping = standing(60)
    tapping[::2, :, 1] += 0.02
    assert foot_skate(tapping, 120) == 0.0


def test_only_standing_feet_slide():
    joints = standing(41)
    joints[:, [8, 11]] += [0.0, 0.03, 0.0]  # the right foot is up
    joints[20:, 10, 0] += np.arange(21) * 0.04
    joints[:, 11, 2] += np.arange(41) * 0.10
    # The left ball stands for 40 steps and slides in the last 20; the right one never counts.
    assert foot_skate(joints, 20) == 20 / 40
    joints[:, [8, 11]] -= [0.0, 0.0299, 0.0]
    assert foot_skate(joints, 20) == (20 + 40) / 80
    # A foot that swings forward and lands does not slide, nor one that leaves.
    joints = standing(41)
    joints[15:20, 10:12, 1] += 0.05
    joints[20:, 10:12, 2] += 0.6
    assert foot_skate(joints, 20) == 0.0
    # Leaving the floor ends it: frames 0 to 29 are 29 steps.
    joints = standing(41)
    joints[30:, 10:12, 1] += 0.05
    joints[:, 10:12, 0] += (np.arange(41) * 0.05)[:, None]
    assert foot_skate(joints, 20) == 1.0
    joints[:20, 10:12, 0] = 0
    joints[20:, 10:12, 0] = 5 + (np.arange(21) * 0.05)[:, None]
    assert foot_skate(joints, 20) == 10 / 29


def test_penetration_is_the_depth_of_the_lowest_foot():
    joints = standing(20)
    assert foot_penetration(joints) == 0
    assert foot_penetration(joints - [0, 0.03, 0]) == pytest.approx(30, rel=1e-5)
    assert foot_penetration(joints - [0, 0.03, 0], floor=-0.03) == pytest.approx(0, abs=1e-5)
    assert foot_penetration(joints, floor=0.02) == pytest.approx(20, rel=1e-12)
    assert foot_penetration(joints + [0, 1.0, 0]) == 0
    # One joint of a foot, in a quarter of the frames; higher ones do not add, hands do not count.
    for joint in FEET:
        sunk = standing(20)
        sunk[:5, joint, 1] = -0.04
        assert foot_penetration(sunk) == pytest.approx(10, rel=1e-12)
    sunk[:5, 7, 1] = -0.02
    sunk[:, 20, 1] = -1
    assert foot_penetration(sunk) == pytest.approx(10, rel=1e-12)


@pytest.mark.parametrize("fps", [12.5, 20, 60])
def test_jerk_of_a_sine_and_a_cubic(fps):
    """Third differences of A sin(w t) are -A (2 sin(w / 2f))^3 cos(w t) in the middle of four frames."""
    amplitude, w = 0.2, 2 * math.pi * 1.5
    t = np.arange(50) / fps
    joints = standing(50)
    joints[..., 2] += (amplitude * np.sin(w * t))[:, None]
    middle = t[:-3] + 1.5 / fps
    expected = amplitude * (2 * fps * math.sin(w / (2 * fps))) ** 3 * np.abs(np.cos(w * middle)).mean()
    assert jerk(joints, fps) == pytest.approx(expected, rel=1e-6)
    if fps == 60:  # and near the derivative itself, whose mean is 2/pi of its peak A w^3
        assert jerk(joints, fps) == pytest.approx(amplitude * w**3 * 2 / math.pi, rel=0.03)
    cubic = standing(50).astype(np.float64)
    cubic[:, 3, 0] += t**3
    assert jerk(cubic, fps) == pytest.approx(6 / 22, rel=1e-6)


def test_drift_of_stretched_bones():
    rng = np.random.default_rng(0)
    joints = standing(20).astype(np.float64)
    assert bone_drift(joints) == 0
    assert bone_drift(joints + rng.normal(size=(20, 1, 3))) == pytest.approx(0, abs=1e-14)
    joints[:6] *= 1.1  # 6 of 20 frames: the median is the length of the others
    assert bone_drift(joints) == pytest.approx(0.1 * 6 / 20, rel=1e-12)
    joints = standing(20).astype(np.float64)
    joints[:4, 15] += 0.5 * (joints[:4, 15] - joints[:4, 12])  # the head alone, one of 21 bones
    assert bone_drift(joints) == pytest.approx(0.5 * 4 / 20 / 21, rel=1e-12)
    # An even number of frames: the median lies half-way.
    joints = standing(2).astype(np.float64)
    joints[1] *= 1.5
    assert bone_drift(joints) == pytest.approx(0.25 / 1.25, rel=1e-12)
    assert bone_drift(np.zeros((5, 22, 3))) == 0


MEASURES = {
    "mpjpe": lambda a, b: mpjpe(a, b),
    "root": lambda a, b: root_error(a, b),
    "velocity": lambda a, b: velocity_error(a, b, 30),
    "acceleration": lambda a, b: acceleration_error(a, b, 30),
    "skate": lambda a, _: foot_skate(a, 30),
    "penetration": lambda a, _: foot_penetration(a, 0.01),
    "jerk": lambda a, _: jerk(a, 30),
    "drift": lambda a, _: bone_drift(a),
}


def walking(shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    joints = standing(shape[-1]) + rng.normal(0, 0.01, (*shape, 22, 3))
    return (joints + np.cumsum(rng.normal(0, 0.02, (*shape, 1, 3)), axis=-3)).astype(np.float32)


@pytest.mark.parametrize("name", MEASURES)
def test_torch_is_numpy_and_a_batch_is_its_motions(name):
    made, true = walking((2, 3, 30), 0), walking((2, 3, 30), 1)
    measure = MEASURES[name]
    value = measure(made, true)
    assert value > 0
    tensors = [torch.tensor(x, requires_grad=True) for x in (made, true)]
    assert measure(*tensors) == pytest.approx(value, rel=1e-13)
    alone = [
        measure(a, b) for a, b in zip(made.reshape(6, 30, 22, 3), true.reshape(6, 30, 22, 3), strict=True)
    ]
    if name != "skate":  # whose mean is over standing feet, not motions
        assert value == pytest.approx(np.mean(alone), rel=1e-12)
    else:
        assert min(alone) < value < max(alone)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MEASURES)
def test_cuda_is_numpy(name):
    made, true = walking((4, 40), 2), walking((4, 40), 3)
    on_device = MEASURES[name](torch.tensor(made).cuda(), torch.tensor(true).cuda())
    assert on_device == pytest.approx(MEASURES[name](made, true), rel=1e-12)


def test_physics_names_its_measures():
    joints = walking((30,), 4)
    assert physics(joints, 30) == {
        "foot_skate": foot_skate(joints, 30),
        "bone_drift": bone_drift(joints),
        "jerk": jerk(joints, 30),
        "foot_penetration_mm": foot_penetration(joints),
    }
    assert physics(joints) == physics(joints, 20)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_peaks_show_where_a_joint_jumps(kind):
    joints = np.zeros((2, 9, 22, 3))
    joints[0, :, 4, 0] = 0.05 * np.arange(9)  # 1 m/s
    joints[1, 5:, 20, 2] = -0.1
    speed, change = (peaks(kind(joints), 20, order) for order in (1, 2))
    np.testing.assert_allclose(speed[0], [1] * 8)
    np.testing.assert_allclose(speed[1], [0, 0, 0, 0, 2, 0, 0, 0])
    np.testing.assert_allclose(change[0], [0] * 7, atol=1e-12)
    np.testing.assert_allclose(change[1], [0, 0, 0, 40, 40, 0, 0])
    assert peaks(kind(joints[:, :2]), 20, 2).shape == (2, 0)


@pytest.mark.parametrize("count", [21, 22, 24])
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_every_body_has_feet_and_bones_of_its_own(count, kind):
    body = Body.of(count)
    balls = [foot[1] for foot in body.feet]
    joints = np.zeros((20, count, 3))
    for joint, parent in enumerate(body.parents[1:], 1):
        joints[:, joint] = joints[:, parent] + body.rest[joint]
    joints[..., 1] -= joints[0, balls[0], 1]
    assert bone_drift(kind(joints)) == foot_penetration(kind(joints)) == 0
    slid = joints.copy()
    slid[:, balls[0], 0] += np.arange(20)  # one of two standing feet
    assert foot_skate(kind(slid), 20) == 0.5
    slid[:, balls[0], 1] += 1  # not in the air
    assert foot_skate(kind(slid), 20) == 0
    sunk = joints.copy()
    sunk[:5, body.feet[1][0], 1] = -0.04
    assert foot_penetration(kind(sunk)) == pytest.approx(10, rel=1e-12)
    wrist = body.wrists[0]
    sunk = joints.copy()
    sunk[:4, wrist] += 0.5 * (sunk[:4, wrist] - sunk[:4, body.parents[wrist]])
    assert bone_drift(kind(sunk)) == pytest.approx(0.5 * 4 / 20 / len(body.bones), rel=1e-12)


def test_a_body_that_is_not_known_has_errors_but_no_feet():
    true = np.zeros((4, 20, 3))
    made = true.copy()
    made[:, 1, 0] = 0.02
    assert mpjpe(made, true) == pytest.approx(1, rel=1e-12)
    for measure in (bone_drift, foot_penetration, lambda x: foot_skate(x, 20)):
        with pytest.raises(ScaMoError, match="joints: expected 21, 22 or 24 of them, got 20"):
            measure(true)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_bad_joints_are_named(kind):
    good = kind(np.zeros((2, 5, 22, 3)))
    for shape in ((22, 3), (5, 22, 2), (0, 22, 3)):
        with pytest.raises(ScaMoError, match="joints: expected shape"):
            jerk(kind(np.zeros(shape)), 20)
    for value in (np.nan, -np.inf):
        bad = np.zeros((2, 5, 22, 3))
        bad[1, 3, 7, 2], bad[1, 4] = value, value
        with pytest.raises(ScaMoError, match=r"made\[1, 3\]: holds a value that is not finite"):
            mpjpe(kind(bad), good)
    with pytest.raises(ScaMoError, match=r"made is \(2, 4, 22, 3\), true \(2, 5, 22, 3\): expected the same"):
        root_error(good[:, :4], good)
