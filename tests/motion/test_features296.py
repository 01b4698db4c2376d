"""The 296 features of SnapMoGen, read: a body of our own written as the description says comes back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from scamo.errors import ScaMoError
from scamo.motion import features296
from scamo.motion.features296 import MIRROR_PAIRS, N_JOINTS, PARENTS, to_joints, to_rotations
from scamo.motion.representation import SNAPMOGEN

M = np.diag([-1.0, 1, 1])
FEET = (18, 19, 22, 23)


def offsets():
    """A symmetric T-pose in centimetres; the pelvis lies on the root."""
    found = np.random.default_rng(1).uniform(3, 20, (N_JOINTS, 3))
    for left, right in MIRROR_PAIRS:
        found[right] = M @ found[left]
    found[[0, 15]] = 0
    found[[1, 2, 3, 4, 5, 6], 0] = 0
    return found


def about_y(angles):
    return Rotation.from_rotvec(np.outer(np.atleast_1d(angles), [0, 1, 0])).as_matrix()


def moving(frames=40, seed=0):
    """Absolute rotations and joints (centimetres) of a body in smooth random poses, and its heading."""
    rng = np.random.default_rng(seed)
    waves = rng.normal(size=(N_JOINTS, 3)) * np.sin(
        rng.uniform(0.5, 2, (N_JOINTS, 3)) * np.arange(frames)[:, None, None] / 9
    )
    local = Rotation.from_rotvec(0.4 * waves.reshape(-1, 3)).as_matrix().reshape(frames, N_JOINTS, 3, 3)
    yaw = rng.normal(0, 0.05, frames).cumsum()
    yaw -= yaw[0]
    local[:, 0] = about_y(yaw) @ local[:, 0]
    absolute, joints = local.copy(), np.zeros((frames, N_JOINTS, 3))
    joints[:, 0] = np.cumsum(rng.normal(0, 2, (frames, 3)), axis=0) + [0, 56, 0]
    joints[:, 0, [0, 2]] -= joints[0, 0, [0, 2]]
    for joint, parent in enumerate(PARENTS[1:], 1):
        absolute[:, joint] = absolute[:, parent] @ local[:, joint]
        joints[:, joint] = joints[:, parent] + absolute[:, parent] @ offsets()[joint]
    return absolute, joints, yaw


def written(absolute, joints, yaw):
    """The description, frame by frame; the last frame only gives the steps to it."""
    rows = []
    for t in range(len(joints) - 1):
        away, then = about_y(-yaw[t])[0], about_y(-yaw[t + 1])[0]
        step = away @ (joints[t + 1, 0] - joints[t, 0])
        places, after = (
            (turn @ (joints[at] - joints[at, 0] * [1, 0, 1]).T).T for at, turn in ((t, away), (t + 1, then))
        )
        six = [(away @ r)[:, :2].T.ravel() for r in absolute[t]]
        contacts = (np.linalg.norm(joints[t + 1] - joints[t], axis=-1) < 2)[list(FEET)]
        root = [yaw[t] - yaw[t + 1], step[0], step[2], joints[t, 0, 1]]
        rows.append(np.concatenate([root, *six, *places, *(after - places), contacts]))
    return np.array(rows)


def mirrored(absolute, joints, yaw):
    order = np.arange(N_JOINTS)
    for left, right in MIRROR_PAIRS:
        order[[left, right]] = right, left
    return M @ absolute[:, order] @ M, joints[:, order] @ M, -yaw


def test_joints_and_rotations_come_back():
    absolute, joints, yaw = moving()
    features = written(absolute, joints, yaw)
    np.testing.assert_allclose(to_joints(features), joints[:-1] / 100, atol=1e-12)
    assert to_joints(features.astype(np.float32)).dtype == np.float32
    local, root = to_rotations(features)
    np.testing.assert_allclose(root, joints[:-1, 0] / 100, atol=1e-12)
    found = local.copy()
    for joint, parent in enumerate(PARENTS[1:], 1):
        found[:, joint] = found[:, parent] @ local[:, joint]
    np.testing.assert_allclose(found, absolute[:-1], atol=1e-12)


def test_any_part_of_a_motion_is_a_motion():
    absolute, joints, yaw = moving()
    part = to_joints(written(absolute, joints, yaw)[7:20])
    whole = (joints[7:20] - joints[7, 0] * [1, 0, 1]) @ about_y(-yaw[7])[0].T / 100
    np.testing.assert_allclose(part, whole, atol=1e-12)


def test_batches_and_tensors():
    features = np.stack([written(*moving(seed=seed)) for seed in range(2)])
    both = torch.from_numpy(features).requires_grad_()
    found = to_joints(both)
    np.testing.assert_allclose(found.detach().numpy()[1], to_joints(features[1]), atol=1e-12)
    found.sum().backward()
    assert both.grad.abs().sum() > 0
    assert to_joints(both.bfloat16()).dtype == torch.float32


def test_the_mirror():
    motion = moving()
    np.testing.assert_allclose(SNAPMOGEN.mirrored(written(*motion)), written(*mirrored(*motion)), atol=1e-12)


def test_rotations_that_contradict_the_positions_show():
    features = written(*moving())
    assert SNAPMOGEN.rotations_off(features) < 1e-12
    # One elbow's rotation of one frame: only the bone to the wrist is off.
    features[5, 4 + 6 * 9 : 4 + 6 * 10] = [0, 0, 1, 0, 1, 0]
    length = np.linalg.norm(offsets()[10]) / 100
    assert 0.05 * length < SNAPMOGEN.rotations_off(features) < 2 * length


@pytest.mark.parametrize("shape", [(296,), (3, 295), (0, 296)])
def test_other_shapes_are_refused(shape):
    for function in (features296.to_joints, features296.to_rotations):
        with pytest.raises(ScaMoError, match="features: expected shape"):
            function(np.zeros(shape))
