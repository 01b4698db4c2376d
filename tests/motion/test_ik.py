"""Fitted rotations: they bring the joints back, the rest pose has none, and they do not flip."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from scamo.errors import ScaMoError
from scamo.motion.ik import Fit, fit_rotations, shortest_rotations
from scamo.motion.skeleton import (
    DEFAULT_OFFSETS,
    JOINT_NAMES,
    PARENTS,
    forward_kinematics,
    quaternions_to_matrices,
)
from scamo.motion.synthetic import corpus_clip

ENDS = [10, 11, 15, 20, 21]
LEFT_ELBOW, SPINE = 18, [3, 6, 9]


def turns(degrees: np.ndarray, axis: tuple[float, float, float]) -> np.ndarray:
    """Quaternions w, x, y, z (T, 4)."""
    return Rotation.from_rotvec(np.radians(degrees)[:, None] * np.array(axis)).as_quat()[:, [3, 0, 1, 2]]


def posed(frames: int, **joints: np.ndarray) -> np.ndarray:
    """Joints (frames, 22, 3) of the default body with some joints' local quaternions."""
    rotations = np.tile([1.0, 0, 0, 0], (frames, 22, 1))
    for name, quaternions in joints.items():
        rotations[:, JOINT_NAMES.index(name)] = quaternions
    return forward_kinematics(rotations, DEFAULT_OFFSETS.astype(np.float64))


def tumbling(frames: int, seed: int = 0) -> np.ndarray:
    """Smooth random poses of the default body, and a random way of its root."""
    rng = np.random.default_rng(seed)
    waves = rng.normal(size=(22, 3)) * np.sin(
        rng.uniform(0.5, 2, (22, 3)) * np.arange(frames)[:, None, None] / 9
    )
    local = Rotation.from_rotvec(0.6 * waves.reshape(-1, 3)).as_matrix().reshape(frames, 22, 3, 3)
    root = np.cumsum(rng.normal(0, 0.02, (frames, 3)), axis=0)
    return forward_kinematics(local, DEFAULT_OFFSETS.astype(np.float64), root)


def steps(fit: Fit) -> np.ndarray:
    """Degrees (T - 1, 22) between the rotations of frames that follow one another."""
    return 2 * np.degrees(np.arccos(np.clip((fit.rotations[1:] * fit.rotations[:-1]).sum(-1), -1, 1)))


@pytest.mark.parametrize("clip", [0, 3, 5, 11])
def test_joints_of_constant_bones_come_back(clip):
    joints = corpus_clip(clip).joints
    fit = fit_rotations(joints)
    np.testing.assert_allclose(fit.joints, joints, atol=1e-5)
    np.testing.assert_allclose(fit.error, np.linalg.norm(fit.joints - joints, axis=-1), atol=1e-9)
    np.testing.assert_allclose(fit.local[:, 1:], np.tile(fit.offsets[1:], (len(joints), 1, 1)), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(fit.rotations, axis=-1), 1, atol=1e-12)
    assert (fit.rotations[:, ENDS] == [1, 0, 0, 0]).all()


def test_official_motions_come_back(shared):
    for name in ("000021", "012314"):
        joints = np.load(shared / "reference" / "official" / f"{name}.new_joints.npy")
        fit = fit_rotations(joints)
        assert fit.error.max() < 1e-5
        assert steps(fit).max() < 60


def test_the_rest_pose_is_found_and_has_no_rotation():
    fit = fit_rotations(tumbling(50))
    np.testing.assert_allclose(fit.offsets, DEFAULT_OFFSETS, atol=1e-7)
    rest = fit_rotations(posed(1))
    np.testing.assert_allclose(np.abs(rest.rotations[..., 0]), 1, atol=1e-9)
    assert rest.error.max() < 1e-7


def test_a_turn_of_the_body_turns_the_pelvis_alone():
    angles = np.linspace(0, 720, 97)
    fit = fit_rotations(
        posed(97, pelvis=turns(angles, (0, 1, 0)), left_elbow=turns(np.full(97, 70.0), (0, 1, 0)))
    )
    np.testing.assert_allclose(steps(fit)[:, 0], 7.5, atol=1e-5)
    assert steps(fit)[:, 1:].max() < 1e-4
    assert ((fit.rotations[1:] * fit.rotations[:-1]).sum(-1) > 0).all(), "no change of sign"
    assert fit.error.max() < 1e-6


@pytest.mark.parametrize("beside", [0.0, 1e-6, 0.5, 3.0, 20.0], ids=lambda degrees: f"{degrees:g}°")
@pytest.mark.parametrize("fps", [20.0, 60.0])
def test_a_limb_passes_the_opposite_of_its_rest_direction_without_a_flip(beside, fps):
    """The forearm swings right round, past the way back into the upper arm."""
    frames = round(3 * fps)
    round_y, up = np.linspace(0, 2 * np.pi, frames), np.full(frames, np.radians(beside))
    ways = np.stack([np.cos(up) * np.cos(round_y), np.sin(up), -np.cos(up) * np.sin(round_y)], axis=-1)
    joints = posed(frames)
    joints[:, 20] = joints[:, 18] + 0.25 * ways
    fit = fit_rotations(joints, fps=fps)
    assert fit.error.max() < 1e-6
    limit = 360 / (frames - 1) + 400 / fps
    assert steps(fit)[:, LEFT_ELBOW].max() < limit
    naive = shortest_rotations(np.array([1.0, 0, 0]), ways)
    jumps = Rotation.from_matrix(np.swapaxes(naive[1:], -1, -2) @ naive[:-1]).magnitude()
    if beside == 3.0:
        assert np.degrees(jumps.max()) > 2 * limit, "the shortest rotation does flip here"


def test_twist_is_the_shortest_rotations_away_from_there():
    fit = fit_rotations(tumbling(60, seed=1))
    for joint, child in ((1, 4), (4, 7), (16, 18), (18, 20), (12, 15)):
        rest = DEFAULT_OFFSETS[child] / np.linalg.norm(DEFAULT_OFFSETS[child])
        twist = 2 * np.arctan2(fit.rotations[:, joint, 1:] @ rest, fit.rotations[:, joint, 0])
        twist = np.remainder(twist + np.pi, 2 * np.pi) - np.pi
        bend = np.degrees(np.arccos(quaternions_to_matrices(fit.rotations[:, joint]) @ rest @ rest))
        assert bend.max() < 115
        np.testing.assert_allclose(twist, 0, atol=1e-6)


def test_the_spine_shares_the_twist_of_the_shoulders():
    angles = np.linspace(0, 270, 60)
    fit = fit_rotations(posed(60, spine3=turns(angles, (0, 1, 0))))
    assert fit.error.max() < 1e-6
    heights = 2 * np.degrees(np.arctan2(fit.rotations[:, SPINE, 2], fit.rotations[:, SPINE, 0]))
    # The lower bones of the spine lean a little, so a turn about them is not quite one about Y.
    np.testing.assert_allclose(heights, np.repeat(angles[:, None] / 3, 3, axis=1), atol=3)


def test_a_joint_with_several_children_takes_scipys_best_rotation():
    joints = tumbling(30, seed=2)
    joints += np.random.default_rng(3).normal(0, 0.01, joints.shape)
    fit = fit_rotations(joints)
    for frame in (0, 13, 29):
        found = quaternions_to_matrices(fit.rotations[frame, 0])
        best, _ = Rotation.align_vectors(joints[frame, 1:4] - joints[frame, 0], fit.offsets[1:4])
        np.testing.assert_allclose(found, best.as_matrix(), atol=1e-6)


def test_stretched_bones_are_met_by_local_positions():
    joints = tumbling(40, seed=4)
    joints += np.random.default_rng(5).normal(0, 0.02, joints.shape)
    fit = fit_rotations(joints)
    bones = np.linalg.norm(joints[:, 1:] - joints[:, list(PARENTS[1:])], axis=-1)
    np.testing.assert_allclose(np.linalg.norm(fit.local[:, 1:], axis=-1), bones, atol=1e-12)
    np.testing.assert_allclose(
        forward_kinematics(fit.rotations, fit.local, fit.local[:, 0]), joints, atol=1e-12
    )
    np.testing.assert_allclose(fit.error, np.linalg.norm(fit.joints - joints, axis=-1), atol=1e-9)
    lengths = np.linalg.norm(fit.joints[:, 1:] - fit.joints[:, list(PARENTS[1:])], axis=-1)
    np.testing.assert_allclose(lengths, np.tile(lengths[:1], (40, 1)), atol=1e-12)
    assert 0 < np.median(fit.error) < 0.04


def test_bad_joints_are_named():
    good = posed(4)
    with pytest.raises(ScaMoError, match=r"joints: expected shape \(frames, .*22.*, 3\), got \(22, 3\)"):
        fit_rotations(good[0])
    with pytest.raises(ScaMoError, match="got \\(0, 22, 3\\)"):
        fit_rotations(good[:0])
    bad = good.copy()
    bad[2, 18] = bad[2, 16]
    with pytest.raises(
        ScaMoError, match=r"frame 2, joint 18 \(left_elbow\): a bone of length 0 m from left_shoulder"
    ):
        fit_rotations(bad)
    bad = good.copy()
    bad[1, 4, 0] = np.nan
    with pytest.raises(ScaMoError, match=r"frame 1, joint 4 \(left_knee\): a bone of length nan"):
        fit_rotations(bad)
