"""Cleaning: feet stand still, bones keep their lengths, and what was good stays as it was."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from scamo.errors import ScaMoError
from scamo.motion.clean import _least_change
from scamo.motion.features import joints_to_features
from scamo.motion.ik import fit_rotations
from scamo.motion.measures import bone_drift, foot_skate, jerk
from scamo.motion.motion import Motion
from scamo.motion.skeleton import PARENTS, forward_kinematics
from scamo.motion.synthetic import corpus_clip

LEGS = [4, 5, 7, 8, 10, 11]
BALLS = [10, 11]


def crouching(frames: int, knees: float = 50.0) -> np.ndarray:
    """(frames, 22, 3): a body that stands still on bent legs, the balls of its feet at height 0."""
    local = np.tile(np.eye(3), (22, 1, 1))
    for joints, degrees in (((1, 2), -knees / 2), ((4, 5), knees), ((7, 8), -knees / 2)):
        local[list(joints)] = Rotation.from_euler("X", degrees, degrees=True).as_matrix()
    body = forward_kinematics(local)
    body[:, 1] -= body[10, 1]
    return np.tile(body, (frames, 1, 1))


def lengths(joints: np.ndarray) -> np.ndarray:
    return np.linalg.norm(joints[:, 1:].astype(np.float64) - joints[:, list(PARENTS[1:])], axis=-1)


def swaying(frames: int = 60, fps: float = 20.0) -> Motion:
    """The whole body slides to and fro by 4 cm at up to 0.75 m/s, feet and all."""
    joints = crouching(frames)
    joints[..., 0] += (0.04 * np.sin(2 * np.pi * 3.0 * np.arange(frames) / fps))[:, None]
    return Motion(joints, fps=fps, text="a person sways", tokens=np.arange(4), meta={"seed": 3})


@pytest.mark.parametrize("fps", [20.0, 60.0])
def test_sliding_feet_are_held(fps):
    motion = swaying(fps=fps)
    before = motion.joints.copy()
    clean = motion.cleaned()
    done = clean.meta["clean"]
    assert done["foot_skate_before"] == foot_skate(before, fps) > 0.3
    assert done["foot_skate_after"] == foot_skate(clean.joints, fps) == 0
    assert done["held"] == 1
    assert np.ptp(clean.joints[:, BALLS], axis=0).max() < 1e-4
    np.testing.assert_allclose(lengths(clean.joints), lengths(before), atol=1e-6)
    others = np.delete(np.arange(22), LEGS)
    np.testing.assert_array_equal(clean.joints[:, others], before[:, others])
    # Knees stay bent forward: in front of the line from hip to ankle.
    along = clean.joints[:, [7, 8]] - clean.joints[:, [1, 2]]
    across = clean.joints[:, [4, 5]] - clean.joints[:, [1, 2]]
    assert (np.cross(across, along)[..., 0] > 0.01).all()
    np.testing.assert_array_equal(motion.joints, before)
    assert (clean.text, clean.fps, clean.meta["seed"]) == (motion.text, fps, 3)
    np.testing.assert_array_equal(clean.tokens, motion.tokens)


def test_a_walk_that_slides_keeps_its_steps():
    """A generated walk often travels further than its feet say: here by 0.6 m/s across."""
    walked = next(c for c in map(corpus_clip, range(60)) if c.spec.action == "walk").joints
    walked = walked.astype(np.float64)
    frames = len(walked)
    sliding = walked + 0.05 * np.sin(2 * np.pi * 2.5 * np.arange(frames) / 20)[:, None, None] * [1.0, 0, 0]
    clean = Motion(sliding).cleaned()
    done = clean.meta["clean"]
    assert done["foot_skate_before"] > 0.2
    assert done["foot_skate_after"] < done["foot_skate_before"] / 10
    np.testing.assert_allclose(lengths(clean.joints), lengths(sliding), atol=2e-6)
    # The feet still step: they rise as before, and go as far.
    np.testing.assert_allclose(clean.joints[:, BALLS, 1], sliding[:, BALLS, 1], atol=0.02)
    travelled = np.linalg.norm(clean.joints[-1, BALLS] - clean.joints[0, BALLS], axis=-1)
    np.testing.assert_allclose(
        travelled, np.linalg.norm(sliding[-1, BALLS] - sliding[0, BALLS], axis=-1), atol=0.1
    )


def test_good_motions_stay_nearly_as_they_are():
    for index in range(12):
        motion = Motion(corpus_clip(index).joints)
        clean = motion.cleaned()
        done = clean.meta["clean"]
        assert done["foot_skate_after"] <= done["foot_skate_before"]
        assert done["moved_mm"] < 4
        assert jerk(clean.joints, 20) < 1.1 * jerk(motion.joints, 20)
    far = Motion(crouching(30) + [0, 5.0, 0])
    np.testing.assert_allclose(far.cleaned().joints, far.joints, atol=1e-6)


def test_a_foot_out_of_reach_stretches_no_bone():
    joints = crouching(40, knees=2.0)
    # The body moves away by 0.15 m while the feet stay low.
    joints[..., 0] += np.linspace(0, 0.15, 40)[:, None]
    clean = Motion(joints).cleaned()
    np.testing.assert_allclose(lengths(clean.joints), lengths(joints), atol=1e-6)
    assert clean.meta["clean"]["held"] == 1
    assert np.abs(np.diff(clean.joints, axis=0)).max() < 0.05
    # The foot turns towards its place and reaches it, or nearly.
    assert np.ptp(clean.joints[:, BALLS], axis=0).max() < 2e-3


def test_a_long_slide_is_not_pinned_to_one_place():
    joints = crouching(60)
    joints[..., 2] += (0.03 * np.arange(60))[:, None]
    clean = Motion(joints).cleaned()
    np.testing.assert_allclose(clean.joints[:, BALLS], joints[:, BALLS], atol=0.25)
    np.testing.assert_allclose(lengths(clean.joints), lengths(joints), atol=1e-6)
    assert 0 < clean.meta["clean"]["held"] < 1


def test_smoothing_takes_the_shaking_and_leaves_the_motion():
    frames, fps = 120, 20.0
    t = np.arange(frames) / fps
    slow = crouching(frames) + [0, 1.0, 0]
    slow[:, :, 2] += 0.3 * np.sin(2 * np.pi * 0.5 * t)[:, None]
    shaken = slow + 0.01 * np.sin(2 * np.pi * 8 * t)[:, None, None]
    clean = Motion(shaken, fps=fps).cleaned(foot_lock=False, smooth=4.0)
    inner = slice(10, -10)
    free = np.delete(np.arange(22), LEGS)  # the feet count as standing: all their heights are the lowest
    assert np.abs(clean.joints - slow)[inner][:, free].max() < 1.5e-3
    assert np.abs(shaken - slow).max() > 9e-3
    np.testing.assert_allclose(lengths(clean.joints), lengths(shaken), atol=1e-6)


def test_smoothing_leaves_standing_feet_where_they_are():
    joints = crouching(80)
    rng = np.random.default_rng(0)
    upper = np.delete(np.arange(22), LEGS)
    sway = np.cumsum(rng.normal(0, 0.004, (80, 3)), axis=0)
    sway -= np.linspace(sway[0], sway[-1], 80)
    joints[:, upper] += sway[:, None]
    motion = Motion(joints)
    for lock in (False, True):
        clean = motion.cleaned(foot_lock=lock, smooth=3.0)
        assert jerk(clean.joints, 20) < 0.5 * jerk(motion.joints, 20)
        np.testing.assert_allclose(clean.joints[:, BALLS], joints[:, BALLS], atol=1e-4)


def test_constant_bones_are_those_of_the_fit():
    joints = corpus_clip(0).joints + np.random.default_rng(0).normal(0, 0.01, (1, 1, 3))
    joints = joints + np.random.default_rng(1).normal(0, 0.01, joints.shape)
    motion = Motion(joints)
    clean = motion.cleaned(constant_bones=True)
    assert bone_drift(motion.joints) > 0.01
    assert bone_drift(clean.joints) < 1e-5
    others = np.delete(np.arange(22), LEGS)
    np.testing.assert_allclose(
        clean.joints[:, others], fit_rotations(motion.joints).joints[:, others], atol=1e-6
    )
    assert fit_rotations(clean.joints).error.max() < 1e-5
    assert clean.meta["clean"]["constant_bones"] is True


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 9])
def test_short_motions(frames):
    motion = Motion(corpus_clip(1).joints[:frames])
    clean = motion.cleaned(smooth=4.0, constant_bones=True)
    assert clean.joints.shape == motion.joints.shape
    assert np.abs(clean.joints - motion.joints).max() < 0.2


def test_features_that_would_not_fit_are_left_out():
    motion = Motion.from_features(joints_to_features(corpus_clip(2).joints), text="x")
    assert motion.cleaned().features is None
    assert motion.features is not None


@pytest.mark.parametrize("smooth", [0.0, -1.0, 10.0, 99.0, np.nan])
def test_a_cutoff_that_cannot_be_is_refused(smooth):
    with pytest.raises(ScaMoError, match=r"smooth: expected a cutoff above 0 and below half .*, 10 Hz, got"):
        swaying().cleaned(smooth=smooth)


def test_least_change_is_least_squares():
    rng = np.random.default_rng(0)
    n = 9
    place_weights, step_weights = rng.uniform(0.1, 2, n), rng.uniform(0.1, 5, n - 1)
    places, steps = rng.normal(size=(n, 2)), rng.normal(size=(n - 1, 2))
    rows = np.concatenate([np.eye(n), np.diff(np.eye(n), axis=0)])
    root = np.sqrt(np.concatenate([place_weights, step_weights]))[:, None]
    expected = np.linalg.lstsq(root * rows, root * np.concatenate([places, steps]), rcond=None)[0]
    np.testing.assert_allclose(
        _least_change(place_weights, places, step_weights, steps), expected, atol=1e-12
    )
