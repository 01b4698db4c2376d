"""The 272 features: against a slow loop, known motions, and the way back by positions and by rotations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from scamo.errors import ScaMoError
from scamo.motion import features272
from scamo.motion.features272 import (
    POSITIONS,
    ROTATIONS,
    TURN,
    VELOCITIES,
    encode,
    rest_offsets,
    to_joints,
    to_joints_by_rotations,
    to_rotations,
)
from scamo.motion.skeleton import DEFAULT_OFFSETS, PARENTS, forward_kinematics
from scamo.motion.synthetic import corpus_clip

OFFSETS = DEFAULT_OFFSETS.astype(np.float64)


def about_y(angles):
    return Rotation.from_rotvec(np.outer(np.atleast_1d(angles), [0, 1, 0])).as_matrix()


def moving(frames=50, seed=0, turn=0.05):
    """Joints and rotations of a body that turns left, in smooth random poses, on a random way."""
    rng = np.random.default_rng(seed)
    waves = rng.normal(size=(22, 3)) * np.sin(
        rng.uniform(0.5, 2, (22, 3)) * np.arange(frames)[:, None, None] / 9
    )
    rotations = Rotation.from_rotvec(0.4 * waves.reshape(-1, 3)).as_matrix().reshape(frames, 22, 3, 3)
    rotations[:, 0] = about_y(1 + turn * np.arange(frames)) @ rotations[:, 0]
    root = np.cumsum(rng.normal(0, 0.02, (frames, 3)), axis=0) + [3, 1, -2]
    return forward_kinematics(rotations, OFFSETS, root), rotations


def placed(joints, rotations):
    """As the features bring a motion back: from the origin, facing +Z, on the floor."""
    forward = rotations[0, 0, :, 2]
    turn = about_y(-np.arctan2(forward[0], forward[2]))[0]
    joints = joints - [joints[0, 0, 0], joints[..., 1].min(), joints[0, 0, 2]]
    turned = rotations.copy()
    turned[:, 0] = turn @ rotations[:, 0]
    return joints @ turn.T, turned


def literal(joints, rotations):
    """The description, frame by frame and joint by joint."""
    low = joints[..., 1].min()
    rows, before = [], None
    for frame in range(len(joints)):
        forward = rotations[frame, 0] @ [0, 0, 1]
        yaw = np.arctan2(forward[0], forward[2])
        away = Rotation.from_euler("y", -yaw).as_matrix()
        local = [away @ (p - [joints[frame, 0, 0], low, joints[frame, 0, 2]]) for p in joints[frame]]
        six = [(away @ r if j == 0 else r)[:2].ravel() for j, r in enumerate(rotations[frame])]
        step, turn, moved = np.zeros(2), np.eye(3), np.zeros((22, 3))
        if before is not None:
            old_yaw, old_away, old_local = before
            step = (old_away @ (joints[frame, 0] - joints[frame - 1, 0]))[[0, 2]]
            turn = Rotation.from_euler("y", old_yaw - yaw).as_matrix()
            moved = np.array(local) - old_local
        rows.append(np.concatenate([step, turn[:2].ravel(), *local, moved.ravel(), *six]))
        before = yaw, away, np.array(local)
    return np.array(rows)


@pytest.mark.parametrize("frames", [1, 2, 50])
def test_it_is_the_description(frames):
    joints, rotations = moving(frames)
    found = encode(joints, rotations, dtype=np.float64)
    assert found.rotations == "true"
    np.testing.assert_allclose(found.features, literal(joints, rotations), atol=1e-12)
    quaternions = Rotation.from_matrix(rotations.reshape(-1, 3, 3)).as_quat()[:, [3, 0, 1, 2]]
    again = encode(joints, quaternions.reshape(frames, 22, 4), dtype=np.float64)
    np.testing.assert_allclose(again.features, found.features, atol=1e-12)


def test_groups_cover_every_column_once():
    groups = list(features272.FEATURE_GROUPS.values())
    assert [s.start for s in groups] == [0] + [s.stop for s in groups[:-1]]
    assert [s.stop - s.start for s in groups] == [2, 6, 66, 66, 132]


@pytest.mark.parametrize(("dtype", "limit"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_positions_and_rotations_bring_the_motion_back(dtype, limit):
    joints, rotations = moving(400)
    features = encode(joints, rotations, dtype=dtype).features
    assert features.dtype == dtype
    want, turned = placed(joints, rotations)
    by_positions = to_joints(features)
    assert by_positions.dtype == dtype
    np.testing.assert_allclose(by_positions, want, atol=limit)
    np.testing.assert_allclose(to_joints_by_rotations(features), want, atol=limit)
    np.testing.assert_allclose(rest_offsets(features), OFFSETS, atol=limit)
    made, root = to_rotations(features)
    np.testing.assert_allclose(made, turned, atol=limit)
    np.testing.assert_allclose(root, want[:, 0], atol=limit)


def test_another_body_takes_the_rotations():
    joints, rotations = moving()
    features = encode(joints, rotations, dtype=np.float64).features
    made, root = to_rotations(features)
    want = forward_kinematics(made, 1.1 * OFFSETS, root)
    np.testing.assert_array_equal(to_joints_by_rotations(features, 1.1 * OFFSETS), want)


def test_torch_and_batches_are_the_same_and_have_a_gradient():
    features = np.stack([encode(*moving(30, seed), dtype=np.float64).features for seed in (1, 2)])
    batch = torch.from_numpy(features).requires_grad_()
    joints = to_joints(batch)
    for one, made in zip(features, joints.detach().numpy(), strict=True):
        np.testing.assert_allclose(made, to_joints(one), atol=1e-12)
    joints[:, -1, 0].sum().backward()
    assert (batch.grad[:, 1:, [0, 1]].abs().sum((1, 2)) > 0).all()
    assert to_joints(batch.detach().half()).dtype == torch.float32


def test_a_straight_walk_is_a_constant_step():
    frames, speed, direction = 20, 0.04, 0.7
    rotations = np.tile(np.eye(3), (frames, 22, 1, 1))
    rotations[:, 0] = about_y(direction)[0]
    root = speed * np.arange(frames)[:, None] * [np.sin(direction), 0, np.cos(direction)] + [5, 1, 5]
    features = encode(forward_kinematics(rotations, OFFSETS, root), rotations, dtype=np.float64).features
    np.testing.assert_allclose(features[1:, :2], np.tile([0, speed], (frames - 1, 1)), atol=1e-12)
    np.testing.assert_allclose(features[:, TURN], np.tile([1, 0, 0, 0, 1, 0], (frames, 1)), atol=1e-12)
    np.testing.assert_allclose(features[:, VELOCITIES], 0, atol=1e-12)
    np.testing.assert_allclose(features[:, ROTATIONS], np.tile([1, 0, 0, 0, 1, 0], (frames, 22)), atol=1e-12)
    positions = features[:, POSITIONS].reshape(frames, 22, 3)
    assert (positions[:, 1, 0] > 0).all()  # the left hip is on +X
    assert positions[..., 1].min() == 0
    joints = to_joints(features)
    np.testing.assert_allclose(joints[-1, 0] - joints[0, 0], [0, 0, speed * (frames - 1)], atol=1e-12)


def test_a_left_turn_of_90_degrees():
    frames = 10
    angles = np.linspace(0, np.pi / 2, frames)
    rotations = np.tile(np.eye(3), (frames, 22, 1, 1))
    rotations[:, 0] = about_y(2 + angles)
    features = encode(forward_kinematics(rotations, OFFSETS), rotations, dtype=np.float64).features
    step = angles[1]
    want = [np.cos(step), 0, -np.sin(step), 0, 1, 0]
    np.testing.assert_allclose(features[1:, TURN], np.tile(want, (frames - 1, 1)), atol=1e-12)
    np.testing.assert_allclose(features[:, VELOCITIES], 0, atol=1e-12)
    joints = to_joints(features)
    hips = joints[-1, 1] - joints[-1, 2]
    hips /= np.linalg.norm(hips)
    np.testing.assert_allclose(hips, [0, 0, -1], atol=1e-12)  # facing +X, the left is on -Z


def test_where_a_motion_stands_and_faces_does_not_matter():
    joints, rotations = moving()
    turn = about_y(2.5)[0]
    moved = rotations.copy()
    moved[:, 0] = turn @ rotations[:, 0]
    one = encode(joints, rotations, dtype=np.float64).features
    two = encode(joints @ turn.T + [7, -3, 2], moved, dtype=np.float64).features
    np.testing.assert_allclose(two, one, atol=1e-12)


@pytest.mark.parametrize("lying", [slice(0, 5), slice(10, 20), slice(0, 30)])
def test_a_body_that_faces_straight_up_keeps_its_heading(lying):
    joints, rotations = moving(30)
    rotations[lying, 0] = Rotation.from_euler("x", -90, degrees=True).as_matrix() @ about_y(0)[0]
    joints = forward_kinematics(rotations, OFFSETS, joints[:, 0])
    features = encode(joints, rotations, dtype=np.float64).features
    still = np.tile([1, 0, 0, 0, 1, 0], (lying.stop - lying.start - 1, 1))
    np.testing.assert_allclose(features[lying, TURN][1:], still, atol=1e-12)
    by_positions = to_joints(features)
    np.testing.assert_allclose(to_joints_by_rotations(features), by_positions, atol=1e-12)
    np.testing.assert_allclose(
        np.linalg.norm(np.diff(by_positions, axis=0), axis=-1),
        np.linalg.norm(np.diff(joints, axis=0), axis=-1),
        atol=1e-12,
    )


def test_a_part_of_a_motion_is_a_motion():
    joints, rotations = moving()
    part = encode(joints, rotations, dtype=np.float64).features[20:]
    alone = encode(joints[20:], rotations[20:], dtype=np.float64).features
    floor = joints[20:, :, 1].min() - joints[..., 1].min()
    np.testing.assert_allclose(to_joints(part), to_joints(alone) + [0, floor, 0], atol=1e-12)


def test_features_that_are_off_still_give_rotations():
    features = encode(*moving()).features
    noisy = features + np.random.default_rng(0).normal(0, 0.1, features.shape)
    noisy[3, ROTATIONS] = 0
    rotations, _ = to_rotations(noisy)
    assert np.isfinite(rotations).all()
    good = np.delete(rotations, 3, axis=0)
    unit = good @ np.swapaxes(good, -1, -2)
    np.testing.assert_allclose(unit, np.broadcast_to(np.eye(3), unit.shape), atol=1e-9)
    np.testing.assert_allclose(np.linalg.det(good), 1, atol=1e-9)
    # A tilted turn does not tilt the body: heights stay those of the positions.
    np.testing.assert_array_equal(to_joints(noisy)[..., 1], noisy[:, POSITIONS].reshape(-1, 22, 3)[..., 1])


def test_rotations_of_joints_alone_are_fitted():
    joints = corpus_clip(0).joints
    found = encode(joints, dtype=np.float64)
    assert found.rotations == "fitted"
    by_positions = to_joints(found.features)
    bones = by_positions[:, 1:] - by_positions[:, list(PARENTS[1:])]
    want = joints[:, 1:] - joints[:, list(PARENTS[1:])]
    np.testing.assert_allclose(np.linalg.norm(bones, axis=-1), np.linalg.norm(want, axis=-1), atol=1e-6)
    np.testing.assert_allclose(to_joints_by_rotations(found.features), by_positions, atol=1e-5)


def test_real_motion_comes_back(shared):
    for path in sorted((shared / "data" / "humanml3d_cmu" / "joints").glob("*.npy"))[:5]:
        joints = np.load(path)
        features = encode(joints, fps=20).features
        made = to_joints(features)
        assert len(made) == len(joints)
        steps = np.linalg.norm(np.diff(made, axis=0), axis=-1)
        np.testing.assert_allclose(steps, np.linalg.norm(np.diff(joints, axis=0), axis=-1), atol=1e-5)
        apart = np.linalg.norm(made[:, :, None] - made[:, None], axis=-1)
        want = np.linalg.norm(joints[:, :, None] - joints[:, None], axis=-1)
        np.testing.assert_allclose(apart, want, atol=1e-5)


def bent(joints, rotations):
    rotations[4, 7] *= 1.01
    return joints, rotations


def reflected(joints, rotations):
    rotations[4, 7] = -rotations[4, 7]
    return joints, rotations


def nan_joint(joints, rotations):
    joints[2, 3, 0] = np.nan
    return joints, rotations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (bent, r"rotations: frame 4, joint 7 \(left_ankle\): off a rotation by 0\.02"),
        (reflected, r"rotations: frame 4, joint 7"),
        (nan_joint, r"joints: frame 2, joint 3 \(spine1\) is not finite"),
        (lambda j, r: (j, r[:-1]), r"rotations: expected shape \(50, 22, 3, 3\)"),
        (lambda j, r: (j, 2 * r[..., 0, :1].repeat(4, -1)), "rotations: frame 0, joint 0"),
        (lambda j, r: (j[:, :21], r), r"joints: expected shape \(frames, 22, 3\), got \(50, 21, 3\)"),
        (lambda j, r: (j[:0], r[:0]), r"joints: expected shape"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ScaMoError, match=message):
        encode(*change(*moving()))


def test_another_width_is_refused():
    for function in (to_joints, to_rotations, rest_offsets, to_joints_by_rotations):
        with pytest.raises(ScaMoError, match=r"features: expected shape \(\.\.\., frames, 272\)"):
            function(np.zeros((5, 263)))
